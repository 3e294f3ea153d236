"""The exponential moving average of the weights of a run (Polyak averaging). Depends on parameters, not on the model.

After step t (from 0), average = d average + (1 - d) weight, with d = min(decay, (1 + t) / (10 + t)): in the first steps the
average is short, so that it does not keep the weights of the start. TensorFlow's ExponentialMovingAverage has the same rule.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from gpt2.training.checkpoint import whole_weights

_PREFIX = "ema."  # of the average's tensors in a checkpoint


class WeightAverage:
    """The average of the weights of `module`, which may be sharded, or nothing if `decay` is 0."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._module, self._decay = module, decay
        self._average = self._copies()

    def _copies(self) -> list[tuple[nn.Parameter, Tensor]]:
        if not self._decay:
            return []
        return [(weight, weight.detach().clone()) for weight in self._module.parameters() if weight.requires_grad]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the weights after `step`, from 0, into the average."""
        decay = min(self._decay, (1 + step) / (10 + step))
        for weight, average in self._average:
            average.lerp_(weight, 1 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the average in the place of the weights for a while. The weights are the same afterwards, bit for bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for weight, average in self._average:
            kept = weight.detach().clone()
            weight.copy_(average)
            average.copy_(kept)
        if self._average:
            _forget_gathered(self._module)

    def gather(self) -> dict[str, Tensor]:
        """Return the average by names for a checkpoint. Every process must call it; only rank 0 gets the tensors."""
        if not self._average:
            return {}
        with self.in_place():
            return {f"{_PREFIX}{name}": tensor.clone() for name, tensor in whole_weights(self._module).items()}

    def restore(self, tensors: Mapping[str, Tensor], load_weights: Callable[[], None]) -> None:
        """Take the average from the tensors of a checkpoint, and call `load_weights`, which loads the weights.

        If the tensors have no average, it begins with these weights.
        """
        found: dict[str, Any] = {
            name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items() if name.startswith(_PREFIX)
        }
        if found and self._decay:  # through the module, which divides them among the processes
            set_model_state_dict(self._module, found, options=StateDictOptions(full_state_dict=True))
            self._average = self._copies()
        load_weights()
        if not found:
            self._average = self._copies()


def _forget_gathered(module: nn.Module) -> None:
    """Let FSDP gather the parameters again. After an evaluation it keeps those that the last forward pass has gathered."""
    for part in module.modules():
        reshard = getattr(part, "reshard", None)
        if reshard is not None:
            reshard()
