"""Compare the greedy ids of engines with those of our float32 model. It times nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gpt2.benchmark.engine import Engine, Prompts
from gpt2.benchmark.results import Entrant
from gpt2.pretrained import GPT2

if TYPE_CHECKING:
    from torch import Tensor

# In standard deviations of all logits. Two tokens are tied if their logits differ by at most this much: the engines add in
# different orders, so rounding decides between them. The tokens after a tie are not compared.
_TIE = 1e-3


class Oracle:
    """Our model in float32, whose greedy ids are the expected ones."""

    def __init__(self, folder: Path) -> None:
        self._model = GPT2.from_pretrained(folder)
        self._known: dict[str, list[list[int]]] = {}

    def ids(self, prompts: Prompts, n_new: int) -> list[list[int]]:
        """The `n_new` greedy ids after each prompt. Each prompt is computed alone; results are cached."""
        key = repr((prompts, n_new))
        if key not in self._known:
            self._known[key] = [self._continue(list(prompt), n_new) for prompt in prompts]
        return self._known[key]

    def judge(self, engine: Engine, prompts: Prompts, n_new: int, found: list[list[int]]) -> Entrant:
        """The result of comparing the ids that `engine` has `found` with ours.

        In float32, an engine agrees or does not agree. In another precision, the note says how many tokens are equal.
        """
        expected = self.ids(prompts, n_new)
        shape = [len(row) for row in found]
        if shape != [n_new] * len(expected):
            return Entrant(engine.name, engine.dtype, False, f"generated {shape} tokens instead of {n_new} per prompt")
        same = [_n_same(*rows) for rows in zip(found, expected, strict=True)]
        if engine.dtype != "float32":
            total = n_new * len(same)
            note = "" if sum(same) == total else f"{sum(same)} of {total} tokens before the first difference"
            return Entrant(engine.name, engine.dtype, None, note)
        ties = []
        for prompt, row, right, n in zip(prompts, found, expected, same, strict=True):
            if n == n_new:
                continue
            gap = self._gap([*prompt, *right[:n]], right[n], row[n])
            if not gap <= _TIE:
                return Entrant(engine.name, engine.dtype, False, f"token {n + 1} is {row[n]}, not {right[n]}: not timed")
            ties.append(n + 1)
        note = f"equal up to a tie at token {min(ties)}" if ties else ""
        return Entrant(engine.name, engine.dtype, True, note)

    def _continue(self, prompt: list[int], n_new: int) -> list[int]:
        ids = self._model.generate(torch.tensor([prompt]), max_new_tokens=n_new, stop_at_eot=False)
        return ids[0, len(prompt) :].tolist()

    @torch.inference_mode()
    def _gap(self, ids: list[int], right: int, found: int) -> float:
        """The logit of `right` minus that of `found` after `ids`, in standard deviations of all logits.

        Infinite if `found` is outside the vocabulary.
        """
        logits: Tensor = self._model(torch.tensor([ids[-self._model.config.n_positions :]]))[0, -1]
        if not 0 <= found < len(logits):
            return float("inf")
        return float((logits[right] - logits[found]) / logits.std())


def _n_same(found: list[int], expected: list[int]) -> int:
    """The number of equal tokens at the start."""
    return next((n for n, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b), len(expected))
