"""Which model a command works on, when the user names one and when not. It finds and loads; commands do the rest."""

from __future__ import annotations

import gc
import warnings
from typing import TYPE_CHECKING

from gpt2.weights.folder import locate_model
from gpt_config.collector import collector_paused
from gpt_config.errors import GPT2Warning, ModelNotFoundError
from gpt_config.shipped import shipped_models

if TYPE_CHECKING:
    from gpt2.pretrained import GPT2
    from gpt_encoder.interface import Tokenizer

DTYPE_HELP = "float32, bfloat16, float16, float64, int8, or auto (the fastest of them here that says the same)."


@collector_paused()
def load_model_option(
    name: str | None, *, device: str, dtype: str, tokenizer_name: str | None = None
) -> tuple[GPT2, Tokenizer, str]:
    """(model, its tokenizer, its name); without a `name` it is gpt2, or else the small model that ships."""
    name = default_model() if name is None else name
    folder = locate_model(name)  # before torch is imported, which takes longer than to say that there is no such model
    from gpt2.pretrained import load_model
    from gpt2.weights.tokenizer import load_tokenizer_for

    model = load_model(folder, device=device, dtype=dtype)
    tokenizer = load_tokenizer_for(model, tokenizer_name)
    gc.freeze()  # torch, the model and the vocabulary stay to the end: a tenth of the time to the first word less
    return model, tokenizer, name


def default_model() -> str:
    """gpt2 if it can be had, else the small model that ships with the package."""
    try:
        locate_model("gpt2")
        return "gpt2"
    except ModelNotFoundError:
        shipped = next(iter(shipped_models()), None)
        if shipped is None:
            raise
        warnings.warn(
            f"gpt2 is not in the cache and cannot be downloaded: this is {shipped}, the small model that ships "
            "(--from_pretrained names another)",
            GPT2Warning,
            2,
        )
        return shipped
