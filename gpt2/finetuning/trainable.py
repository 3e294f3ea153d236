"""Which part of a pretrained model learns. It knows parameters, not tasks."""

from __future__ import annotations

from gpt2.model import GPT2
from gpt_config.errors import ConfigError

TRAINABLE = ("all", "last_block")


def set_trainable(model: GPT2, part: str) -> None:
    """Let `part` of `model` require gradients and no other: "all", or "last_block", with the final norm behind it."""
    if part not in TRAINABLE:
        raise ConfigError(f"trainable={part!r} must be one of {', '.join(TRAINABLE)}")
    model.requires_grad_(part == "all")
    model.h[-1].requires_grad_(True)
    model.ln_f.requires_grad_(True)
