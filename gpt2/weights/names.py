"""Parameter names: converts the keys that other programs write to those of the published GPT-2 files.

It depends on state dicts, not on file formats. The published names are those of this package's parameters, so no table is
needed: wrappers' names are removed, entries that are not weights are dropped, and the head must equal the token embedding.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from gpt_config.errors import CheckpointError, GPT2Warning
from gpt_config.parameter_names import HEAD, TOKEN_EMBEDDING, is_other_head, published_parameter


def published_names(tensors: Mapping[str, Tensor], source: object, *, is_untied: bool = False) -> dict[str, Tensor]:
    """Return `tensors` under the published names, without a copy of the head. `source` is named in errors.

    Other heads beside the language model's are left out, with a GPT2Warning. `is_untied`: the config says that the head is
    not the token embedding, so both must be there and be equal.

    Raises CheckpointError if two tensors get the same name, or if the head differs from the token embedding, because tying
    it silently would compute another model.
    """
    named: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = published_parameter(key)
        if name is None:
            continue
        if name in named:
            raise CheckpointError(f"{source} contains {name!r} twice with different prefixes: remove one of them")
        named[name] = tensor
    if others := sorted({name.split(".")[0] for name in named if is_other_head(name)}):
        named = {name: tensor for name, tensor in named.items() if not is_other_head(name)}
        warnings.warn(
            f"{source} contains other heads, which a language model does not use: {', '.join(others)}", GPT2Warning, 3
        )
    head = named.pop(HEAD, None)
    if is_untied and (head is None or TOKEN_EMBEDDING not in named):
        missing = HEAD if head is None else TOKEN_EMBEDDING
        raise CheckpointError(
            f"{source} has tie_word_embeddings=false in its config and no {missing}: GPT-2's head is its token embedding; "
            "use a checkpoint with a tied head"
        )
    if head is not None:
        if TOKEN_EMBEDDING not in named:
            named[TOKEN_EMBEDDING] = head
        elif not _same(head, named[TOKEN_EMBEDDING]):
            raise CheckpointError(
                f"{source} has a {HEAD} that differs from {TOKEN_EMBEDDING}: this package supports only GPT-2's head, which "
                "is the token embedding; use a checkpoint with a tied head"
            )
    return named


def n_layers(names: Iterable[str]) -> int:
    """Return the number of layers of which `names`, the published ones, contain a tensor."""
    return len({name.split(".", 2)[1] for name in names if name.startswith("h.")})


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() or (a.shape == b.shape and torch.equal(a, b))
