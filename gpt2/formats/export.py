"""Writes a model in a format of another program: whole or not at all, read back, and compared. It knows no format."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from gpt2.formats.layout import check_dtype
from gpt2.formats.registry import load_format, load_readable, load_runnable
from gpt2.formats.stored import Stored, wrong_weight
from gpt2.generation.loop import generate
from gpt2.model import GPT2
from gpt2.weights.foreign import WRITTEN_TITLES
from gpt2.weights.reading import assemble
from gpt_config.atomic_write import atomic_write
from gpt_config.errors import CheckpointError, InputError, WriteError
from gpt_config.whole_folder import whole_folder

if TYPE_CHECKING:
    from gpt_encoder.interface import Tokenizer

# Tokens that are compared.
_N_TOKENS = 20


class Agreement(NamedTuple):
    """How many of `n_ids` greedy tokens of the written model are those of the model, up to the first other one."""

    n_equal: int
    n_ids: int


def export_model(
    model: GPT2, tokenizer: Tokenizer | None, path: str | os.PathLike[str], *, to: str, dtype: str = "float32"
) -> Agreement:
    """Write a float32 `model` in the format `to`, read the file back, and compare it, before it gets its name.

    Raises InputError for what the format cannot say, and WriteError if the file cannot be written, or if what is read back
    has other numbers than were written; a former file is then unchanged.
    """
    form, path = load_format(to), Path(path)
    check_dtype(dtype, form.DTYPES, form.TITLE)
    _check_range(model, dtype)
    found: list[Agreement] = []

    def write(place: Path) -> None:
        form.write(model, tokenizer, place, dtype)
        compare = _run_and_compared if to in WRITTEN_TITLES else _compared
        found.append(compare(to, model, place, dtype))

    if form.IS_FOLDER:
        with whole_folder(path) as new:
            write(new)
    else:
        atomic_write(path, write)
    return found[0]


def _check_range(model: GPT2, dtype: str) -> None:
    """Raise InputError if a number becomes infinite in `dtype`."""
    target = getattr(torch, dtype, None)
    if isinstance(target, torch.dtype) and target.is_floating_point and target != torch.float32:
        limit = torch.finfo(target).max
        for name, tensor in model.state_dict().items():
            largest = float(tensor.abs().max())
            if limit < largest < float("inf"):
                raise InputError(
                    f"{name} has numbers up to {largest:.3g}, and {dtype} ends at {limit:.3g}: write bfloat16 or float32"
                )


@torch.inference_mode()
def _compared(to: str, model: GPT2, path: Path, dtype: str) -> Agreement:
    """Read the file, and generate with what was read."""
    config, tensors, _ = load_readable(to).read(path)
    for name, tensor in model.state_dict().items():
        if name not in tensors or not _is_stored(name, tensor, tensors[name], dtype):
            raise _read_back_wrong(path, name)
    written = assemble(GPT2, config, tensors, path, device=torch.device("cpu"), dtype=torch.float32)
    return _agreement(model, lambda prompt, n_new: _greedy(written, prompt, n_new))


@torch.inference_mode()
def _run_and_compared(to: str, model: GPT2, path: Path, dtype: str) -> Agreement:
    """Generate with the program that the file is for."""
    form = load_runnable(to)
    try:
        if name := wrong_weight(form.stored_weights(path), model.state_dict()):
            raise _read_back_wrong(path, name)
        engine = form.load_engine(path)
    except CheckpointError as error:
        raise WriteError(f"{path.name}: what was written cannot be read back ({error})") from None
    return _agreement(model, engine.greedy)


def _read_back_wrong(path: Path, name: str) -> WriteError:
    return WriteError(f"{path.name}: {name} was read back with other numbers: the disk or memory may be faulty")


def _agreement(model: GPT2, greedy: Callable[[list[int], int], list[int]]) -> Agreement:
    n_new = min(_N_TOKENS, model.config.n_positions - 1)
    if n_new < 1:
        return Agreement(0, 0)
    start = [model.config.bos_token_id or 0]
    pairs = zip(_greedy(model, start, n_new), greedy(start, n_new), strict=True)
    return Agreement(next((place for place, (ours, theirs) in enumerate(pairs) if ours != theirs), n_new), n_new)


def _greedy(model: GPT2, prompt: list[int], n_new: int) -> list[int]:
    ids = generate(model, torch.tensor([prompt]), max_new_tokens=n_new, stop_at_eot=False)
    new: list[int] = ids[0, len(prompt) :].tolist()
    return new


def _is_stored(name: str, tensor: Tensor, found: Tensor, dtype: str) -> bool:
    # Formats keep some tensors, such as norms, in float32.
    return any(wrong_weight([Stored(name, found, kind)], {name: tensor}) is None for kind in ("float32", dtype))
