"""The model that a command works on: the one that the user names, or the default. It finds and loads it, nothing else."""

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

# Help of options that several commands have.
MODEL_HELP = "A folder, a shipped model, or a hub name such as gpt2-xl.  [default: gpt2]"
TOKENIZER_HELP = "Use the tokenizer of this folder or model.  [default: the model's own]"
DEVICE_HELP = "cpu, cuda, cuda:1, mps, or auto: a GPU if there is one."
DTYPE_HELP = "float32, bfloat16, float16, float64, int8, or auto: the fastest with float32's text in a short trial."


@collector_paused()
def load_model_option(
    name: str | None, *, device: str, dtype: str, tokenizer_name: str | None = None
) -> tuple[GPT2, Tokenizer, str]:
    """(model, its tokenizer, its name). Without a `name` the model is `default_model()`."""
    name = default_model() if name is None else name
    folder = locate_model(name)  # first, because torch takes seconds to import, and an unknown name is an error at once
    from gpt2.pretrained import load_model
    from gpt2.weights.tokenizer import load_tokenizer_for

    model = load_model(folder, device=device, dtype=dtype)
    tokenizer = load_tokenizer_for(model, tokenizer_name)
    gc.freeze()  # torch, the model and the vocabulary live to the end: saves 10% of the time to the first word
    return model, tokenizer, name


def default_model() -> str:
    """gpt2 if it is cached or can be downloaded, else the small model that ships with the package, with a warning."""
    try:
        locate_model("gpt2")
        return "gpt2"
    except ModelNotFoundError:
        shipped = next(iter(shipped_models()), None)
        if shipped is None:
            raise
        warnings.warn(
            f"gpt2 is not in the cache and cannot be downloaded: this is {shipped}, the small model that ships "
            "(choose another with --from_pretrained)",
            GPT2Warning,
            2,
        )
        return shipped
