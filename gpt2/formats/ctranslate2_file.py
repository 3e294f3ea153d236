"""Reads the weights of a CTranslate2 model, `model.bin`. It knows what the parts of a GPT-2 are called there.

The file has a version, the name of the kind of model, and the variables: name, shape, type and numbers. The names of
variables that are stored once and used twice follow.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from gpt2.formats.layout import is_transposed
from gpt2.formats.stored import INT8_ROWS, Stored
from gpt_config.errors import CheckpointError
from gpt_config.file_reading import open_regular

# Variables that are weights have at most 2 dimensions.
_MAX_VARIABLES, _MAX_DIMENSIONS = 100_000, 4

_TYPES = {0: ("<f4", "float32"), 1: ("<i1", INT8_ROWS), 2: ("<i2", ""), 3: ("<i4", ""), 4: ("<f2", "float16"),
          5: ("<i2", "bfloat16")}  # fmt: skip

_OUTSIDE = {
    "decoder/embeddings": "wte", "decoder/position_encodings": "wpe", "decoder/layer_norm": "ln_f"
}  # fmt: skip
_IN_BLOCK = {
    "self_attention/layer_norm": "ln_1", "self_attention/linear_0": "attn.c_attn",
    "self_attention/linear_1": "attn.c_proj", "ffn/layer_norm": "ln_2", "ffn/linear_0": "mlp.c_fc",
    "ffn/linear_1": "mlp.c_proj",
}  # fmt: skip
_PARTS = {"weight": "weight", "encodings": "weight", "gamma": "weight", "bias": "bias", "beta": "bias"}


def stored_weights(path: Path) -> Iterator[Stored]:
    """Yield the weights of `model.bin`. CheckpointError if it is damaged."""
    try:
        with open_regular(path) as file:
            variables = dict(_variables(file))
    except OSError as error:
        raise CheckpointError(f"cannot read {path} ({error.strerror}): check the file and its permissions") from None
    except (ValueError, struct.error) as error:
        raise CheckpointError(f"{path} is not a readable CTranslate2 model ({error}): write it again") from None
    for name, (values, kind) in variables.items():
        ours = published_name(name)
        if ours is None:
            continue
        if kind == INT8_ROWS:
            scale, _ = variables.get(f"{name}_scale", (torch.empty(0), ""))
            if values.dim() != 2 or scale.shape != values.shape[:1]:
                raise CheckpointError(f"{path} has no scale for each row of {name!r:.80}: write it again")
            values = values.float() / scale[:, None]
        yield Stored(ours, values.float().t() if is_transposed(ours, values) else values.float(), kind)


def published_name(name: str) -> str | None:
    """Return the published name of a variable, or None for one that is no weight.

    >>> published_name("decoder/layer_3/ffn/linear_0/bias"), published_name("decoder/num_heads")
    ('h.3.mlp.c_fc.bias', None)
    """
    module, _, part = name.rpartition("/")
    if part not in _PARTS:
        return None
    if module in _OUTSIDE:
        return f"{_OUTSIDE[module]}.{_PARTS[part]}"
    block, _, inner = module.removeprefix("decoder/layer_").partition("/")
    return f"h.{block}.{_IN_BLOCK[inner]}.{_PARTS[part]}" if inner in _IN_BLOCK else None


def _variables(file: BinaryIO) -> Iterator[tuple[str, tuple[Tensor, str]]]:
    """The name, the numbers and the kind of each variable with numbers."""
    size = file.seek(0, 2)
    file.seek(0)

    def number(layout: str) -> int:
        found: int = struct.unpack(layout, file.read(struct.calcsize(layout)))[0]
        return found

    def text() -> str:
        return file.read(number("<H")).rstrip(b"\x00").decode("utf-8")

    number("<I")  # the version of the format
    text()
    number("<I")  # the version of the kind of model
    count = number("<I")
    if count > _MAX_VARIABLES:
        raise ValueError(f"it names {count} variables")
    for _ in range(count):
        name, n_dimensions = text(), number("<B")
        if n_dimensions > _MAX_DIMENSIONS:
            raise ValueError(f"{name!r:.80} has {n_dimensions} dimensions")
        shape = [number("<I") for _ in range(n_dimensions)]
        kind, n_bytes = number("<B"), number("<I")
        if kind not in _TYPES:
            raise ValueError(f"{name!r:.80} has the unknown type {kind}")
        layout, title = _TYPES[kind]
        if math.prod(shape) * np.dtype(layout).itemsize != n_bytes or n_bytes > size - file.tell():
            raise ValueError(f"{name!r:.80} has {n_bytes} bytes for the shape {shape}")
        values = torch.from_numpy(np.frombuffer(file.read(n_bytes), dtype=layout).copy().reshape(shape))
        yield name, (values.view(torch.bfloat16) if title == "bfloat16" else values, title)
