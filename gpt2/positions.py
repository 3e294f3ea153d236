"""The position of each token and the slots it attends to. It depends on torch only.

B is the batch, T the number of tokens of a call, `past` the number of slots that were cached before, S = past + T.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
