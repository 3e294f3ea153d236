"""The GPT-2 model, its weights, generation and the command line. Importing it does not import torch.

The import registers the models in `assets`, so that this package and `gpt_encoder` find them by name.
"""

from __future__ import annotations

from importlib import import_module
from os.path import abspath, dirname, join
from typing import TYPE_CHECKING, Any

from gpt_config.shipped import register_shipped_models

if TYPE_CHECKING:
    from gpt2.generation.completion import Completion, complete, stream
    from gpt2.kv_cache import KVCache
    from gpt2.pretrained import GPT2

__version__ = "0.1.0"

register_shipped_models(join(dirname(abspath(__file__)), "assets"))

_HOME = {
    "GPT2": "gpt2.pretrained",
    "KVCache": "gpt2.kv_cache",
    "Completion": "gpt2.generation.completion",
    "complete": "gpt2.generation.completion",
    "stream": "gpt2.generation.completion",
}

__all__ = ["GPT2", "Completion", "KVCache", "complete", "stream"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562), so that `gpt2 --help` does not wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'gpt2' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
