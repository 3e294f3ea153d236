"""The names of GPT-2's parameters, as other programs write them and as the published files have them.

It knows names, not tensors. The torch reader and the reference engines use it, so that they read the same files.
"""

from __future__ import annotations

import re

HEAD, TOKEN_EMBEDDING = "lm_head.weight", "wte.weight"

# Modules that contain the model or one of its blocks. Each is a part of a name, and none is one of a published name.
_WRAPPERS = frozenset(
    (
        *("transformer", "model", "base_model", "pretrained_model"),  # transformers, Lightning, trlx, trl
        *(
            "module",
            "_orig_mod",
            "_forward_module",
        ),  # DistributedDataParallel and DeepSpeed, torch.compile, Lightning Fabric
        *("_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_fpw_module"),  # torch's checkpointing and FSDP
    )
)

# The causal mask and the value for masked scores, which old versions of transformers saved like weights.
_NOT_WEIGHTS = re.compile(r"h\.\d+\.attn\.(?:bias|masked_bias)")

# Heads beside the language model: v_head of trl and trlx, multiple_choice_head of transformers' GPT2DoubleHeadsModel.
_OTHER_HEAD = re.compile(r"(?!lm_head\.)\w+_heads?\..+")


def published_parameter(key: str) -> str | None:
    """The published name of a tensor: `key` without its wrappers, wherever they are. None if the tensor is no weight.

    >>> published_parameter("module.transformer.h.0._orig_mod.attn.c_attn.weight")
    'h.0.attn.c_attn.weight'
    """
    name = ".".join(part for part in key.split(".") if part not in _WRAPPERS)
    return None if _NOT_WEIGHTS.fullmatch(name) else name


def is_other_head(name: str) -> bool:
    """Whether the parameter belongs to a head that a language model does not use.

    >>> [is_other_head(name) for name in ("v_head.summary.weight", "lm_head.weight", "h.0.v_head.weight")]
    [True, False, False]
    """
    return _OTHER_HEAD.fullmatch(name) is not None
