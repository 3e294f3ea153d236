"""Which part of a pretrained model learns. It knows parameters, not tasks."""

from __future__ import annotations

from gpt2.model import GPT2
from gpt_config.finetuning_config import TRAINABLE
from gpt_config.validation import check_choice


def set_trainable(model: GPT2, part: str) -> None:
    """Let `part` of `model` require gradients and no other: "all", or "last_block", with the final norm behind it."""
    check_choice("trainable", part, TRAINABLE)
    model.requires_grad_(part == "all")
    model.h[-1].requires_grad_(True)
    model.ln_f.requires_grad_(True)
