"""A model that records the shapes of its inputs, so that a test sees how much is computed."""

from __future__ import annotations

import torch

from gpt2 import GPT2
from gpt_config import GPT2Config


class Watched(GPT2):
    """Records the shapes of its input ids and positions, and of the hidden states whose logits it computes."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.inputs: list[torch.Size] = []
        self.scored: list[torch.Size] = []
        for embedding in (self.wte, self.wpe):
            embedding.register_forward_pre_hook(lambda _, ids: self.inputs.append(ids[0].shape))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        self.scored.append(hidden.shape[:-1])
        return super().logits(hidden)


def watched(model: GPT2) -> Watched:
    twin = Watched(model.config)
    twin.load_state_dict(model.state_dict())
    return twin.eval()
