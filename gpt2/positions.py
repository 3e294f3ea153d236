"""Where each token stands and what it sees, from the padding and the number of cached tokens. It knows no model.

B is the batch, T the tokens of a call, `past` the slots that are cached before them, S = past + T.
"""

from __future__ import annotations

import torch
from torch import Tensor


def positions_of(past: int, T: int, attention_mask: Tensor | None, device: torch.device) -> Tensor:
    """The position of each token: (T,), or (B, T) where `attention_mask` (B, S) says which slots count."""
    if attention_mask is None:
        return torch.arange(past, past + T, device=device)
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past:]


def visible_slots(past: int, T: int, attention_mask: Tensor | None, device: torch.device) -> Tensor | None:
    """Which slots each token sees: bool (B or 1, 1, T, S), or None where plain causal attention says the same."""
    if attention_mask is None and (past == 0 or T == 1):
        return None
    slots = torch.arange(past + T, device=device)
    visible = slots <= slots[past:, None]  # (T, S): itself and what stands before
    if attention_mask is None:
        return visible[None, None]
    # Padding sees itself, for in some kernels a softmax over nothing is NaN.
    itself = slots == slots[past:, None]
    return (((attention_mask != 0)[:, None, :] & visible) | itself)[:, None]
