"""Whether engines say the same: their greedy ids against those of our float32 model. It knows no clocks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gpt2.benchmark.engine import Engine, Prompts
from gpt2.benchmark.results import Entrant
from gpt2.pretrained import GPT2

if TYPE_CHECKING:
    from torch import Tensor

# Two tokens whose logits lie this near to each other, in standard deviations of all logits, are a tie: each engine adds up
# in another order, and rounding decides. What the next tokens then are says nothing.
_TIE = 1e-3


class Oracle:
    """Our model in float32, and what it says."""

    def __init__(self, folder: Path) -> None:
        self._model = GPT2.from_pretrained(folder)
        self._known: dict[str, list[list[int]]] = {}

    def ids(self, prompts: Prompts, n_new: int) -> list[list[int]]:
        """The greedy ids after each prompt, each computed alone."""
        key = repr((prompts, n_new))
        if key not in self._known:
            self._known[key] = [self._continue(list(prompt), n_new) for prompt in prompts]
        return self._known[key]

    def judge(self, engine: Engine, prompts: Prompts, n_new: int, found: list[list[int]]) -> Entrant:
        """How what an engine has `found` compares. Where its precision is float32 it agrees or does not; of another one it
        is told how many tokens are the same."""
        expected = self.ids(prompts, n_new)
        shape = [len(row) for row in found]
        if shape != [n_new] * len(expected):
            return Entrant(engine.name, engine.dtype, False, f"made {shape} tokens, not {n_new} for each prompt")
        same = [_n_same(*rows) for rows in zip(found, expected, strict=True)]
        if engine.dtype != "float32":
            note = "" if sum(same) == n_new * len(same) else f"{sum(same)} of {n_new * len(same)} tokens until it differs"
            return Entrant(engine.name, engine.dtype, None, note)
        ties = []
        for prompt, row, right, n in zip(prompts, found, expected, same, strict=True):
            if n == n_new:
                continue
            gap = self._gap([*prompt, *right[:n]], right[n], row[n])
            if not gap <= _TIE:
                return Entrant(engine.name, engine.dtype, False, f"token {n + 1} is {row[n]}, not {right[n]}: not timed")
            ties.append(n + 1)
        note = f"the same up to a tie at token {min(ties)}" if ties else ""
        return Entrant(engine.name, engine.dtype, True, note)

    def _continue(self, prompt: list[int], n_new: int) -> list[int]:
        ids = self._model.generate(torch.tensor([prompt]), max_new_tokens=n_new, stop_at_eot=False)
        return ids[0, len(prompt) :].tolist()

    @torch.inference_mode()
    def _gap(self, ids: list[int], right: int, found: int) -> float:
        """How much less probable `found` is than `right` after `ids`, in standard deviations of the logits."""
        logits: Tensor = self._model(torch.tensor([ids[-self._model.config.n_positions :]]))[0, -1]
        if not 0 <= found < len(logits):
            return float("inf")
        return float((logits[right] - logits[found]) / logits.std())


def _n_same(found: list[int], expected: list[int]) -> int:
    """How many tokens at the start are the same."""
    return next((n for n, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b), len(expected))
