"""llm.c's model files (`gpt2_124M.bin`), in and out: a header of 256 numbers, then all weights in a fixed order.

The header has the magic number, the version (3: float32, 5: bfloat16) and the sizes. The weights of one kind follow one
another for all layers; matrices have shape (outputs, inputs). The token embedding is padded to whole groups of 128 rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from gpt2.formats.layout import check_computes, transposed
from gpt2.formats.registry import Imported, config_of
from gpt_config.errors import CheckpointError
from gpt_config.file_reading import open_regular
from gpt_config.model_config import GPT2Config

if TYPE_CHECKING:
    from gpt2.model import GPT2
    from gpt_encoder.interface import Tokenizer

TITLE = "an llm.c model"
DTYPES = ("float32", "bfloat16")
IS_FOLDER = False

_MAGIC, _N_HEADER = 20240326, 256
_DTYPE_OF_VERSION = {3: torch.float32, 5: torch.bfloat16}
_OTHER_FILES = {20240327: "a state for debugging", 20240328: "a tokenizer", 20240520: "a file of tokens"}

# The order of the parameters of a block.
_IN_BLOCK = tuple(
    f"{module}.{part}"
    for module in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    for part in ("weight", "bias")
)


def read(path: Path) -> Imported:
    """Read a model file of version 3 or 5."""
    try:
        with open_regular(path) as file:
            size = file.seek(0, 2)
            file.seek(0)
            header = np.frombuffer(file.read(4 * _N_HEADER), dtype="<i4").tolist() if size >= 4 * _N_HEADER else [0]
            config, n_rows, dtype = _described(path, header)
            n_numbers = config.n_parameters + (n_rows - config.vocab_size) * config.n_embd
            if size != 4 * _N_HEADER + n_numbers * dtype.itemsize:
                raise CheckpointError(
                    f"{path} has {size} bytes, but its header describes {4 * _N_HEADER + n_numbers * dtype.itemsize}: "
                    "copy it again"
                )
            numbers = np.fromfile(file, dtype="<i4" if dtype.itemsize == 4 else "<i2", count=n_numbers)
    except OSError as error:
        raise CheckpointError(f"cannot read {path} ({error.strerror}): check the file and its permissions") from None
    return Imported(config, transposed(_split(torch.from_numpy(numbers).view(dtype), config, n_rows)))


def _described(path: Path, header: list[int]) -> tuple[GPT2Config, int, torch.dtype]:
    """The config, the rows of the token embedding with padding, and the dtype of the numbers."""
    if header[0] != _MAGIC:
        other = _OTHER_FILES.get(header[0])
        raise CheckpointError(
            f"{path} is not {TITLE}" + (f" but {other} of llm.c" if other else "") + ": name a file such as gpt2_124M.bin"
        )
    version, positions, vocabulary, layers, heads, width, n_rows = header[1:8]
    if version not in _DTYPE_OF_VERSION:
        raise CheckpointError(f"{path} has version {version} of llm.c's format: this package reads 3 and 5")
    config = config_of(
        path, TITLE, vocab_size=vocabulary, n_positions=positions, n_embd=width, n_layer=layers, n_head=heads
    )  # fmt: skip
    if n_rows < vocabulary:
        raise CheckpointError(f"{path} has {n_rows} rows for {vocabulary} tokens: copy it again")
    return config, n_rows, _DTYPE_OF_VERSION[version]


def _split(numbers: Tensor, config: GPT2Config, n_rows: int) -> dict[str, Tensor]:
    """Return views of `numbers` by name, without the padding of the token embedding."""
    tensors, at = {}, 0
    for name, shape in _shapes(config, n_rows).items():
        size = int(np.prod(shape))
        tensors[name] = numbers[at : at + size].view(shape)
        at += size
    tensors["wte.weight"] = tensors["wte.weight"][: config.vocab_size]
    return tensors


def _shapes(config: GPT2Config, n_rows: int) -> dict[str, tuple[int, ...]]:
    """Return the names of all parameters in the order of the file, with their shapes there."""
    width, inner = config.n_embd, config.inner_dim
    sizes = {"attn.c_attn": (3 * width, width), "mlp.c_fc": (inner, width), "mlp.c_proj": (width, inner)}
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (n_rows, width), "wpe.weight": (config.n_positions, width)}
    for part in _IN_BLOCK:
        module, _, kind = part.rpartition(".")
        shape = (width,) if module.startswith("ln_") else sizes.get(module, (width, width))
        shapes |= {f"h.{layer}.{part}": shape if kind == "weight" else shape[:1] for layer in range(config.n_layer)}
    return shapes | {"ln_f.weight": (width,), "ln_f.bias": (width,)}


def write(model: GPT2, tokenizer: Tokenizer | None, path: Path, dtype: str) -> None:
    """Write version 3 for float32, version 5 for bfloat16. The format has no tokenizer."""
    config = model.config
    check_computes(config, TITLE)
    n_rows = -(-config.vocab_size // 128) * 128
    target = getattr(torch, dtype)
    version = next(number for number, kind in _DTYPE_OF_VERSION.items() if kind == target)
    header = np.zeros(_N_HEADER, dtype="<i4")
    sizes = (config.n_positions, config.vocab_size, config.n_layer, config.n_head, config.n_embd, n_rows)
    header[:8] = (_MAGIC, version, *sizes)
    tensors = transposed(model.state_dict())
    with open(path, "wb") as file:
        file.write(header.tobytes())
        for name in _shapes(config, n_rows):
            values = tensors[name].detach().to(target).contiguous()
            if name == "wte.weight":
                values = torch.cat([values, values.new_zeros(n_rows - config.vocab_size, config.n_embd)])
            file.write(values.view(torch.int16 if target.itemsize == 2 else torch.int32).numpy().data)
