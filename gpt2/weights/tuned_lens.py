"""Files of tuned lenses: one safetensors file. It depends on the lens and on the functions that read and write tensors."""

from __future__ import annotations

import os
from pathlib import Path

from gpt2.inspection.lens import TunedLens
from gpt2.model import GPT2
from gpt2.weights.files import read_file
from gpt2.weights.writing import write_tensors
from gpt_config.errors import CheckpointError, InputError


def save_tuned_lens(lens: TunedLens, path: str | os.PathLike[str]) -> None:
    """Write a lens to a .safetensors file, completely or not at all. InputError for another suffix, or WriteError."""
    write_tensors(_checked(path), lens.state_dict())


def load_tuned_lens(path: str | os.PathLike[str], model: GPT2) -> TunedLens:
    """Return the lens in a file, in the model's dtype and on its device.

    Raises CheckpointError if the file cannot be read, or if it is the lens of a model of another shape.
    """
    tensors = read_file(_checked(path))
    lens = TunedLens(len(model.h), model.config.n_embd)
    expected = {name: tuple(tensor.shape) for name, tensor in lens.state_dict().items()}
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != expected:
        raise CheckpointError(
            f"{path} is not a tuned lens of this model, with {len(model.h)} layers of width {model.config.n_embd}: "
            "train one for it with train_tuned_lens"
        )
    lens.load_state_dict(tensors)
    return lens.to(model.device, model.dtype)


def _checked(path: str | os.PathLike[str]) -> Path:
    if Path(path).suffix != ".safetensors":
        raise InputError(f"{path} must end in .safetensors")
    return Path(path)
