"""Read the weights in a model folder with the standard library: find each tensor in the safetensors file by its name.

This module knows GPT-2's names and shapes, and how numbers are stored; `gpt2.weights.safetensors_header` knows where. It
computes nothing.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpt2.weights.folder import refuse_special_files, weight_files
from gpt2.weights.safetensors_header import StoredTensor, read_header
from gpt_config.errors import CheckpointError
from gpt_config.model_config import CONFIG_FILES, GPT2Config, is_untied
from gpt_config.parameter_names import HEAD, TOKEN_EMBEDDING, is_other_head, published_parameter

# The types that `read_floats` can read.
FLOAT_TYPES = ("F64", "F32", "F16", "BF16")

# Faults that one error message lists; it counts the others.
_MAX_NAMED = 5


def read_floats(tensor: StoredTensor) -> array[float]:
    """The numbers of a tensor in one flat array: 8 bytes per number for F64, 4 bytes per number for the other types."""
    raw = tensor.read_bytes()
    if tensor.dtype == "F16":  # only 65,536 such numbers exist, so each is looked up in a table
        table = struct.unpack("<65536e", struct.pack("<65536H", *range(65536)))
        return array("f", map(table.__getitem__, _little_endian("H", raw)))
    if tensor.dtype == "BF16":  # the upper two bytes of a float32, whose lower two bytes are 0
        widened = bytearray(2 * len(raw))
        widened[2::4], widened[3::4] = raw[0::2], raw[1::2]
        return _little_endian("f", widened)
    return _little_endian("d" if tensor.dtype == "F64" else "f", raw)


def _little_endian(code: str, raw: bytes | bytearray) -> array[Any]:
    values = array(code, raw)
    if sys.byteorder == "big":
        values.byteswap()
    return values


def read_config(folder: Path) -> GPT2Config:
    """The config of a model folder, from `config.json` or OpenAI's `hparams.json`. CheckpointError if it has neither."""
    refuse_special_files(folder, CONFIG_FILES)
    if any((folder / name).is_file() for name in CONFIG_FILES):
        return GPT2Config.from_folder(folder)
    raise CheckpointError(f"{folder} has no config.json: name a folder that holds config.json and the weights")


def find_parameters(folder: Path, config: GPT2Config) -> dict[str, StoredTensor]:
    """Where each parameter of the model in `folder` is stored, by its published name.

    CheckpointError if the folder has no single model.safetensors, or if that file does not fit the config.
    """
    files = weight_files(folder)
    if len(files) != 1 or files[0].suffix != ".safetensors":
        found = f"its weights in {len(files)} files, such as {files[0].name}" if files else "no weights"
        raise CheckpointError(
            f"{folder} has {found}: the reference engines read a single model.safetensors; make one with "
            "GPT2.from_pretrained(folder).save_pretrained(new_folder) and name the new folder"
        )
    tensors = _published_names(read_header(files[0]), files[0], is_untied(folder))
    n_stored = len({name.split(".", 2)[1] for name in tensors if name.startswith("h.")})
    if config.n_layer > 2 * n_stored + _MAX_NAMED:  # a million missing layers would take all memory to list
        raise CheckpointError(
            f"{files[0]} does not fit its config: n_layer={config.n_layer}, but the file has {n_stored} layers: use weights "
            "and config of the same model"
        )
    _check_fit(files[0], tensors, parameter_shapes(config))
    return tensors


def parameter_shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter by its name in the published files. A linear layer y = x W + b has W (n_in, n_out)."""
    n_embd, n_inner = config.n_embd, config.inner_dim
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (config.vocab_size, n_embd),
        "wpe.weight": (config.n_positions, n_embd),
    }
    for layer in range(config.n_layer):
        linears = {"attn.c_attn": (n_embd, 3 * n_embd), "attn.c_proj": (n_embd, n_embd)}
        linears |= {"mlp.c_fc": (n_embd, n_inner), "mlp.c_proj": (n_inner, n_embd)}
        for name, (n_in, n_out) in linears.items():
            shapes |= {f"h.{layer}.{name}.weight": (n_in, n_out), f"h.{layer}.{name}.bias": (n_out,)}
        for norm in (f"h.{layer}.ln_1", f"h.{layer}.ln_2"):
            shapes |= {f"{norm}.weight": (n_embd,), f"{norm}.bias": (n_embd,)}
    return shapes | {"ln_f.weight": (n_embd,), "ln_f.bias": (n_embd,)}


def _published_names(tensors: Mapping[str, StoredTensor], path: Path, untied: bool) -> dict[str, StoredTensor]:
    """The tensors by published name, without wrappers' names, masks and heads.

    The head must equal the token embedding, because a model with another head computes other logits. If the config calls it
    `untied`, both must be there.
    """
    named: dict[str, StoredTensor] = {}
    for key, tensor in tensors.items():
        name = published_parameter(key)
        if name is None or is_other_head(name):
            continue
        if name in named:
            raise CheckpointError(f"{path} holds {name!r} twice under different prefixes: remove one of them")
        named[name] = tensor
    head = named.pop(HEAD, None)
    if untied and (head is None or TOKEN_EMBEDDING not in named):
        raise CheckpointError(
            f"{path} lacks {HEAD if head is None else TOKEN_EMBEDDING}, and its config has tie_word_embeddings=false: "
            "GPT-2's head is its token embedding; use a checkpoint with a tied head"
        )
    if head is not None and not _same(head, named.setdefault(TOKEN_EMBEDDING, head)):
        raise CheckpointError(
            f"{path} has a {HEAD} that differs from {TOKEN_EMBEDDING}: GPT-2's head is its token embedding; "
            "use a checkpoint with a tied head"
        )
    return named


def _same(a: StoredTensor, b: StoredTensor) -> bool:
    return a is b or ((a.dtype, a.shape) == (b.dtype, b.shape) and a.read_bytes() == b.read_bytes())


def _check_fit(path: Path, tensors: Mapping[str, StoredTensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise one CheckpointError for all parameters that are missing, unknown, of another shape or of another type."""
    wrong = [f"{name} is missing" for name in shapes.keys() - tensors.keys()]
    wrong += [f"{name:.80} is unknown" for name in tensors.keys() - shapes.keys()]
    for name in shapes.keys() & tensors.keys():
        if tensors[name].shape != shapes[name]:
            wrong.append(f"{name} is {tensors[name].shape} instead of {shapes[name]}")
        elif tensors[name].dtype not in FLOAT_TYPES:
            wrong.append(f"{name} is {tensors[name].dtype} instead of one of {', '.join(FLOAT_TYPES)}")
    if wrong:
        more = f"; and {len(wrong) - _MAX_NAMED} more" if len(wrong) > _MAX_NAMED else ""
        raise CheckpointError(
            f"{path} does not fit its config: {'; '.join(sorted(wrong)[:_MAX_NAMED])}{more}: "
            "use weights and config of the same model"
        )
