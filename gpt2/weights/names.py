"""Key names: from what tools leave in a state dict to the names of the published GPT-2 files. It knows no formats.

The published names are those of this package's parameters, so no table is needed: prefixes come off, what is not a
weight is dropped, and the head must be the token embedding.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from gpt_config.errors import CheckpointError

# torch.compile, DistributedDataParallel, and the model with a head in transformers.
_PREFIXES = re.compile(r"^(?:_orig_mod\.|module\.|transformer\.)+")
# The causal mask and its filler, which old versions of transformers saved as if they were weights.
_NOT_WEIGHTS = re.compile(r"^h\.\d+\.attn\.(?:bias|masked_bias)$")
_HEAD = "lm_head.weight"


def published_names(tensors: Mapping[str, Tensor], source: object) -> dict[str, Tensor]:
    """`tensors` under the published names, without duplicates of the head; `source` is named in errors.

    CheckpointError if two tensors come to one name, or if the head is not the token embedding: to tie it silently would
    compute another model.
    """
    named: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = _PREFIXES.sub("", key)
        if _NOT_WEIGHTS.match(name):
            continue
        if name in named:
            raise CheckpointError(f"{source} holds {name!r} twice under different prefixes: remove one of them")
        named[name] = tensor
    head = named.pop(_HEAD, None)
    if head is not None:
        if "wte.weight" not in named:
            named["wte.weight"] = head
        elif not _same(head, named["wte.weight"]):
            raise CheckpointError(
                f"{source} has a {_HEAD} that differs from wte.weight: GPT-2's head is its token embedding, and this "
                "package computes no other; use a checkpoint with a tied head"
            )
    return named


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() or (a.shape == b.shape and torch.equal(a, b))
