"""Choose the part of a pretrained model that is trained. Depends on parameters, not on the task."""

from __future__ import annotations

from gpt2.model import GPT2
from gpt_config.finetuning_config import TRAINABLE
from gpt_config.validation import check_choice


def set_trainable(model: GPT2, part: str) -> None:
    """Require gradients for `part` of `model` only: "all", or "last_block", which includes the final layer norm.

    ConfigError if `part` is another value.
    """
    check_choice("trainable", part, TRAINABLE)
    model.requires_grad_(part == "all")
    model.h[-1].requires_grad_(True)
    model.ln_f.requires_grad_(True)
