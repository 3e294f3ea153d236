"""Parameter names: converts the keys that other programs write to those of the published GPT-2 files.

It depends on state dicts, not on file formats. The published names are those of this package's parameters, so no table is
needed: prefixes are removed, entries that are not weights are dropped, and the head must equal the token embedding.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from gpt_config.errors import CheckpointError

# Prefixes added by torch.compile, by DistributedDataParallel, and by transformers' models with a head.
_PREFIXES = re.compile(r"^(?:_orig_mod\.|module\.|transformer\.)+")

# The causal mask and the value for masked scores, which old versions of transformers saved like weights.
_NOT_WEIGHTS = re.compile(r"^h\.\d+\.attn\.(?:bias|masked_bias)$")
_HEAD = "lm_head.weight"


def published_names(tensors: Mapping[str, Tensor], source: object) -> dict[str, Tensor]:
    """Return `tensors` under the published names, without a copy of the head. `source` is named in errors.

    Raises CheckpointError if two tensors get the same name, or if the head differs from the token embedding, because tying
    it silently would compute another model.
    """
    named: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = _PREFIXES.sub("", key)
        if _NOT_WEIGHTS.match(name):
            continue
        if name in named:
            raise CheckpointError(f"{source} contains {name!r} twice with different prefixes: remove one of them")
        named[name] = tensor
    head = named.pop(_HEAD, None)
    if head is not None:
        if "wte.weight" not in named:
            named["wte.weight"] = head
        elif not _same(head, named["wte.weight"]):
            raise CheckpointError(
                f"{source} has a {_HEAD} that differs from wte.weight: this package supports only GPT-2's head, which is "
                "the token embedding; use a checkpoint with a tied head"
            )
    return named


def n_layers(names: Iterable[str]) -> int:
    """Return the number of layers of which `names`, the published ones, contain a tensor."""
    return len({name.split(".", 2)[1] for name in names if name.startswith("h.")})


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() or (a.shape == b.shape and torch.equal(a, b))
