"""The position of each token and the slots it attends to. It depends on torch and errors only.

B is the batch, T the number of tokens of a call, `past` the number of slots that were cached before, S = past + T.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpt_config.errors import InputError, InputTypeError


def check_mask(attention_mask: Tensor, shape: tuple[int, ...]) -> None:
    """Raise InputError unless the mask has this shape and each value is 0, 1 or bool; InputTypeError if it is no tensor.

    Values are checked on the CPU only, because other devices would have to finish first in each call, and not while a model
    is traced or exported, because they are unknown.
    """
    if not isinstance(attention_mask, Tensor):
        raise InputTypeError(
            f"attention_mask must be a tensor of shape (batch, tokens), not {type(attention_mask).__name__}"
        )
    if attention_mask.shape != shape:
        found = tuple(attention_mask.shape)
        raise InputError(f"attention_mask has shape {found}: it must be {tuple(shape)}, with a value for cached tokens too")
    if attention_mask.dtype == torch.bool or attention_mask.device.type != "cpu":
        return
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return
    wrong = attention_mask[(attention_mask != 0) & (attention_mask != 1)]
    if wrong.numel():
        raise InputError(f"attention_mask contains {wrong[0].item()}: use 1 or True for tokens, 0 or False for padding")


def positions_of(past: int, T: int, attention_mask: Tensor | None, device: torch.device) -> Tensor:
    """Return the position of each token, int64: (T,), or (B, T) if `attention_mask` (B, S) marks padding with 0.

    Positions count tokens only: padding has the position of the token before it.
    """
    if attention_mask is None:
        return torch.arange(past, past + T, device=device)
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past:]


def visible_slots(past: int, T: int, attention_mask: Tensor | None, device: torch.device) -> Tensor | None:
    """Return which slots each token attends to: bool (B or 1, 1, T, S), or None if plain causal attention is equivalent."""
    if attention_mask is None and (past == 0 or T == 1):
        return None
    slots = torch.arange(past + T, device=device)
    visible = slots <= slots[past:, None]  # (T, S): the token itself and those before it
    if attention_mask is None:
        return visible[None, None]
    # Padding attends to itself, because in some kernels a softmax over no slots is NaN.
    itself = slots == slots[past:, None]
    return (((attention_mask != 0)[:, None, :] & visible) | itself)[:, None]
