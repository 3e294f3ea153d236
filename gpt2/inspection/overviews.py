"""What the page, the pictures and `gpt2 inspect` show of a text: one forward pass, measured, as plain values.

It depends on traces and their measures, and on a tokenizer. It draws nothing. L: layers, H: heads, T: tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpt2.inspection.attention import duplicate_token_scores, induction_scores, previous_token_scores
from gpt2.inspection.attribution import logit_attribution
from gpt2.inspection.effects import log_probability_of, patch_each
from gpt2.inspection.gradients import integrated_gradients
from gpt2.inspection.lens import lens_table
from gpt2.inspection.tracing import as_batch, check_tokens, tokenizer_for, trace
from gpt2.model import GPT2
from gpt_config.errors import InputError
from gpt_encoder.interface import Tokenizer

_NAMES = ("hook_embed", "hook_pos_embed", "hook_z", "hook_pattern", "hook_mlp_out", "hook_resid_mid", "hook_resid_post",
          "ln_final.hook_scale")  # fmt: skip
# Visible characters in place of control characters, which would move a terminal's cursor.
_VISIBLE = {code: chr(0x2400 + code) for code in range(32)} | dict.fromkeys(range(128, 160), "\ufffd")
_VISIBLE |= {127: "\u2421", 10: "\u21b5", 0x2028: "\u21b5", 0x2029: "\u21b5"}
# Characters without a width, and those that reverse the order of the text around them.
_VISIBLE |= dict.fromkeys((0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)), "\ufffd")


class Guess(NamedTuple):
    """A token that the model or a lens predicts: its id, its text, and its probability."""

    id: int
    label: str
    probability: float


class Head(NamedTuple):
    """A head and its score."""

    layer: int
    head: int
    score: float


class Attribution(NamedTuple):
    """Integrated gradients of the log-probability of `target` after the last token: a score per token, in nats.

    The scores add up to `total`, the difference to zeros in place of the embeddings, up to `error`.
    """

    target: Guess
    scores: list[float]
    total: float
    error: float


class Patching(NamedTuple):
    """How the log-probability of `target` changes, in nats, if the stream before a layer is that of another text: (L, T).

    `target` is what the model predicts after the other text, with the probability there. `before` and `other` are its
    log-probabilities after the text and after the other text.
    """

    labels: list[str]
    target: Guess
    before: float
    other: float
    changes: Tensor

    @property
    def shares(self) -> Tensor:
        """The changes as shares of the difference between both texts, or of 0.5 nats if that is more: (L, T)."""
        return self.changes / max(abs(self.other - self.before), 0.5)


@dataclass(frozen=True, kw_only=True, eq=False)
class Overview:
    """What `overview` measures of a text of T tokens.

    - `labels`: the tokens as text, with visible characters in place of control characters.
    - `bits`: the surprisal of each token; that of the first one is None.
    - `guesses`: what the model predicts after each token, the most probable first.
    - `lens`: the same for each line of the logit lens, by `lens_names`.
    - `patterns` (L, H, T, T) on the CPU, in float32.
    - `scores`: measures of heads, (L, H) each, by name; NaN if the text has nothing to measure.
    - `parts` (N, T): the parts of the logit of `guesses[t][0]` after token t, by `part_names`.
    - `change`: what an intervention has changed, in words; empty if nothing.
    """

    model: str
    change: str
    ids: list[int]
    labels: list[str]
    bits: list[float | None]
    guesses: list[list[Guess]]
    lens_names: list[str]
    lens: list[list[list[Guess]]]
    patterns: Tensor
    scores: dict[str, Tensor]
    part_names: list[str]
    parts: Tensor
    attribution: Attribution | None = None
    patching: Patching | None = None

    @property
    def n_layer(self) -> int:
        """L."""
        return self.patterns.shape[0]

    @property
    def n_head(self) -> int:
        """H."""
        return self.patterns.shape[1]

    @property
    def loss(self) -> float | None:
        """The mean cross-entropy of the tokens after the first, in nats; None for a text of one token."""
        scored = [bits for bits in self.bits if bits is not None]
        return sum(scored) / len(scored) * math.log(2) if scored else None

    def notable_heads(self, n: int = 4) -> dict[str, list[Head]]:
        """Return the `n` best heads by each measure, and those that write most for or against the next token."""
        found = {name: _best(values, n) for name, values in self.scores.items() if not values.isnan().any()}
        written = [(name, float(self.parts[i, -1])) for i, name in enumerate(self.part_names) if name.startswith("L")]
        largest = sorted(written, key=lambda one: -abs(one[1]))[:n]
        places = [(name[1:].split("H"), score) for name, score in largest]
        heads = [Head(int(layer), int(head), score) for (layer, head), score in places]
        return {**found, "logit": heads}

    def to_dict(self) -> dict[str, Any]:
        """Return everything except the patterns, as values for JSON."""
        values: dict[str, Any] = {
            "model": self.model,
            "change": self.change,
            "ids": self.ids,
            "pieces": self.labels,
            "bits": self.bits,
            "next": [[one._asdict() for one in guesses] for guesses in self.guesses],
            "lens": {
                name: [[one._asdict() for one in guesses] for guesses in line]
                for name, line in zip(self.lens_names, self.lens, strict=True)
            },
            "heads": {name: score.tolist() for name, score in self.scores.items()},
            "logit_parts": dict(zip(self.part_names, self.parts.tolist(), strict=True)),
        }
        if self.attribution is not None:
            values["attribution"] = {**self.attribution._asdict(), "target": self.attribution.target._asdict()}
        if self.patching is not None:
            changes = self.patching.changes.tolist()
            values["patching"] = {**self.patching._asdict(), "target": self.patching.target._asdict(), "changes": changes}
        return values


@torch.no_grad()
def overview(
    model: GPT2,
    ids_or_text: str | list[int] | Tensor,
    *,
    tokenizer: Tokenizer | None = None,
    k: int = 8,
    attribute: bool = False,
    patch_from: str | list[int] | Tensor | None = None,
    name: str = "",
    change: str = "",
) -> Overview:
    """Run the model on a text, or the ids of one row, and return what it does with it, for `page`, pictures and JSON.

    - `tokenizer`: by default that of the folder from which the model was loaded.
    - `k`: how many predictions to keep per token, at most all of the vocabulary.
    - `attribute`: also compute integrated gradients, which takes about 100 times as long as the rest.
    - `patch_from`: another text with the same number of tokens, for a table of patching; one call per layer and token.
    - `name` and `change`: what to say of the model and of the interventions in force.

    Inside `intervene`, everything is that of the changed model. InputError if the text is empty or longer than the model's
    context, or if the texts have different lengths.
    """
    tokenizer = tokenizer or tokenizer_for(model)
    ids = _one_row(model, ids_or_text, tokenizer)
    found = trace(model, ids, _NAMES)
    log_probs = found.logits[0].float().log_softmax(-1)  # (T, V)
    k = min(k, log_probs.shape[-1])
    lens = lens_table(model, found, k)
    best = log_probs.argmax(-1)
    parts = logit_attribution(model, found, best[None], by="head")
    surprisals = -log_probs[:-1].gather(-1, ids[0, 1:, None])[:, 0] / math.log(2)
    scores = {"previous": previous_token_scores, "duplicate": duplicate_token_scores, "induction": induction_scores}
    shown = Overview(
        model=name,
        change=change,
        ids=ids[0].tolist(),
        labels=[label_of(tokenizer, one) for one in ids[0].tolist()],
        bits=[None, *surprisals.tolist()],
        guesses=_guesses(tokenizer, *_top(log_probs, k)),
        lens_names=lens.names,
        lens=[_guesses(tokenizer, *line) for line in zip(lens.ids[:, 0], lens.probabilities[:, 0], strict=True)],
        patterns=found.stack("hook_pattern")[:, 0].float().cpu(),
        scores={name: score(found).float().cpu() for name, score in scores.items()},
        part_names=parts.names,
        parts=parts.values[:, 0].float().cpu(),
    )
    if attribute:
        shown = replace(shown, attribution=_attribution(model, ids, shown.guesses[-1][0]))
    if patch_from is not None:
        shown = replace(shown, patching=_patching(model, ids, _one_row(model, patch_from, tokenizer), tokenizer))
    return shown


def label_of(tokenizer: Tokenizer, token: int) -> str:
    """Return the text of a token, with visible characters in place of control characters and of parts of characters."""
    return tokenizer.decode_bytes([token]).decode("utf-8", errors="backslashreplace").translate(_VISIBLE)


def signed(value: float) -> str:
    """Return a number with its sign and two decimals; never "-0.00".

    >>> signed(-0.001), signed(1.5)
    ('+0.00', '+1.50')
    """
    return f"{round(value, 2) + 0.0:+.2f}"


def _one_row(model: GPT2, ids_or_text: str | list[int] | Tensor, tokenizer: Tokenizer) -> Tensor:
    if isinstance(ids_or_text, str) and not ids_or_text:
        raise InputError("the text is empty: give at least one token")
    ids, _ = as_batch(model, ids_or_text, tokenizer)
    if len(ids) != 1:
        raise InputError(f"there are {len(ids)} rows: an overview shows one")
    longest = model.config.n_positions
    if not 0 < ids.shape[1] <= longest:
        raise InputError(f"the text has {ids.shape[1]} tokens: the model takes 1 to {longest}")
    check_tokens(ids, model.config.vocab_size)
    return ids


def _top(log_probs: Tensor, k: int) -> tuple[Tensor, Tensor]:
    top = log_probs.topk(k, -1)
    return top.indices, top.values.exp()


def _guesses(tokenizer: Tokenizer, ids: Tensor, probabilities: Tensor) -> list[list[Guess]]:
    """The Guesses of (T, k) ids and probabilities."""
    return [
        [Guess(token, label_of(tokenizer, token), p) for token, p in zip(*row, strict=True)]
        for row in zip(ids.tolist(), probabilities.tolist(), strict=True)
    ]


def _best(values: Tensor, n: int) -> list[Head]:
    flat = values.flatten().topk(min(n, values.numel()))
    n_head = values.shape[1]
    return [Head(at // n_head, at % n_head, s) for at, s in zip(flat.indices.tolist(), flat.values.tolist(), strict=True)]


def _attribution(model: GPT2, ids: Tensor, target: Guess) -> Attribution:
    found = integrated_gradients(model, ids, log_probability_of(target.id))
    return Attribution(target, found.scores[0].tolist(), float(found.total[0]), float(found.error[0]))


def _patching(model: GPT2, ids: Tensor, other_ids: Tensor, tokenizer: Tokenizer) -> Patching:
    if other_ids.shape != ids.shape:
        raise InputError(
            f"the text has {ids.shape[1]} tokens and the other text {other_ids.shape[1]}: patch between texts of one length"
        )
    other = trace(model, other_ids, "hook_resid_pre")
    log_prob, token = (float(v) for v in other.logits[0, -1].float().log_softmax(-1).max(-1))
    target = Guess(int(token), label_of(tokenizer, int(token)), math.exp(log_prob))
    table = patch_each(model, other, ids, log_probability_of(target.id))
    labels = [label_of(tokenizer, one) for one in other_ids[0].tolist()]
    return Patching(labels, target, float(table.base), log_prob, table.changes.float().cpu())
