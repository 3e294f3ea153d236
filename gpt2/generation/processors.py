"""Controls on the logits of the next token that depend on the text so far. They depend on torch and a config, not on models.

Each `apply_` function takes logits (B, V) and what it needs of the B texts, and returns logits of the same shape, with -inf
for excluded tokens. Its argument is not changed. `process` applies them in the order of transformers:

1. `logit_bias` (transformers: `sequence_bias`)
2. `repetition_penalty`
3. `frequency_penalty`, `presence_penalty` (OpenAI's API; transformers has neither)
4. `no_repeat_ngram_size`
5. `bad_words` (`bad_words_ids`)
6. `min_new_tokens`
7. the caller's processors, in their order

Temperature, top-k, top-p, min-p and typical-p come after these: see `sampling`. Beam search applies the controls to
log-probabilities, as transformers does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from gpt_config.errors import InputError, InputTypeError
from gpt_config.generation_config import GenerationConfig

# (ids (1, T) int64, logits (1, V)) -> logits (1, V). It may change its argument. Drafts are verified by calling it for texts
# that may not be continued, so its result must depend on its arguments only.
LogitsProcessor = Callable[[Tensor, Tensor], Tensor]


class Text(NamedTuple):
    """The ids of a growing text, of which the first `n_prompt` are the prompt, and the random generator of its row."""

    ids: list[int]
    n_prompt: int
    generator: Random


@dataclass(frozen=True)
class Controls:
    """What changes the logits of a row: its config, its end tokens, and the processors of the caller."""

    config: GenerationConfig
    ends: Collection[int] = ()
    processors: tuple[LogitsProcessor, ...] = ()

    def are_off(self, n_new: int) -> bool:
        """Whether the logits after `n_new` new tokens stay as they are."""
        return not (self.processors or self.config.has_token_controls or self._forbids_end(n_new))

    def _forbids_end(self, n_new: int) -> bool:
        return n_new < self.config.min_new_tokens and bool(self.ends)


def process(logits: Tensor, texts: Sequence[Text], controls: Controls) -> Tensor:
    """Apply all controls to the logits (B, V) of the tokens after B texts. Returns logits (B, V).

    Raises InputError if they exclude every token of a row, or if a processor of the caller returns anything but logits.
    """
    config = controls.config
    all_ids, n_new = [text.ids for text in texts], [len(text.ids) - text.n_prompt for text in texts]
    if all(map(controls.are_off, n_new)):
        return logits
    logits = apply_logit_bias(logits, config.logit_bias)
    window = config.penalty_window or max(map(len, all_ids), default=1)
    logits = apply_repetition_penalty(logits, [ids[-window:] for ids in all_ids], config.repetition_penalty)
    if config.frequency_penalty or config.presence_penalty:
        new_ids = [text.ids[max(text.n_prompt, len(text.ids) - window) :] for text in texts]
        logits = apply_frequency_penalty(logits, new_ids, config.frequency_penalty)
        logits = apply_presence_penalty(logits, new_ids, config.presence_penalty)
    logits = apply_no_repeat_ngram(logits, all_ids, config.no_repeat_ngram_size)
    logits = apply_bad_words(logits, all_ids, [word for word in config.bad_word_ids if not _is_end(word, controls.ends)])
    logits = apply_min_new_tokens(logits, n_new, config.min_new_tokens, controls.ends)
    for processor in controls.processors:
        rows = zip(all_ids, logits.split(1), strict=True)
        logits = torch.cat([_processed(processor, ids, row) for ids, row in rows])
    for highest in logits.amax(-1).tolist():
        if highest == -torch.inf:
            raise InputError(f"the controls exclude every token: {', '.join(_names(controls))} leave none to choose")
        if not math.isfinite(highest):
            raise InputError(
                f"a logits_processor returned a logit of {highest}: it must return numbers, or -inf to exclude a token"
            )
    return logits


def apply_logit_bias(logits: Tensor, bias: Sequence[tuple[int, float]]) -> Tensor:
    """Add a number to the logit of each id in `bias`, as in OpenAI's API; ids outside the logits have no effect."""
    known = [(token, number) for token, number in bias if token < logits.shape[-1]]
    if not known:
        return logits
    tokens, numbers = zip(*known, strict=True)
    largest = torch.finfo(logits.dtype).max  # a number beyond the dtype stays finite
    bounded = [number if number == -math.inf else max(-largest, min(number, largest)) for number in numbers]
    added = torch.tensor(bounded, dtype=logits.dtype, device=logits.device).expand(len(logits), -1)
    return logits.index_add(-1, torch.tensor(tokens, device=logits.device), added)


def apply_repetition_penalty(logits: Tensor, seen_ids: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Divide positive logits of the ids in each row of `seen_ids` by `penalty`, and multiply negative ones by it.

    From Keskar et al. 2019, section 4.1; the sign is handled as in transformers. `penalty` 1 changes nothing.
    """
    if penalty == 1:
        return logits
    logits = logits.clone()
    for place, ids in enumerate(seen_ids):
        seen = _ids_below(logits.shape[-1], ids, logits.device)
        scores = logits[place, seen]
        logits[place, seen] = _finite(torch.where(scores < 0, scores * penalty, scores / penalty), scores)
    return logits


def _finite(changed: Tensor, logits: Tensor) -> Tensor:
    """`changed` with the largest number in place of infinity, whose softmax is NaN. What is excluded from `logits` stays."""
    largest = torch.finfo(logits.dtype).max
    return torch.where(logits == -torch.inf, logits, changed.clamp(-largest, largest))


def apply_frequency_penalty(logits: Tensor, new_ids: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Subtract `penalty` from a token's logit for each time it occurs in its row of `new_ids`.

    With `apply_presence_penalty`, this is the formula of OpenAI's API, which counts generated tokens only:
    logit - count * frequency_penalty - (count > 0) * presence_penalty.
    """
    return logits if penalty == 0 else _lowered(logits, penalty, _counts(logits, new_ids))


def apply_presence_penalty(logits: Tensor, new_ids: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Subtract `penalty` once from the logit of each token that occurs in its row of `new_ids`."""
    return logits if penalty == 0 else _lowered(logits, penalty, _counts(logits, new_ids).clamp(max=1))


def _lowered(logits: Tensor, penalty: float, times: Tensor) -> Tensor:
    """`logits` less `penalty` as often as `times` says."""
    return torch.where(times > 0, _finite(logits - penalty * times, logits), logits)


def apply_no_repeat_ngram(logits: Tensor, texts: Sequence[Sequence[int]], size: int) -> Tensor:
    """Exclude each token that would repeat a sequence of `size` tokens of its text (Paulus et al. 2017). 0: no limit."""
    if size == 0:
        return logits
    banned = []
    for ids in texts:
        last = ids[len(ids) - size + 1 :]
        starts = range(len(ids) - size + 1)
        banned.append([ids[start + size - 1] for start in starts if ids[start : start + size - 1] == last])
    return _without(logits, banned)


def apply_bad_words(logits: Tensor, texts: Sequence[Sequence[int]], words: Sequence[Sequence[int]]) -> Tensor:
    """Exclude the last token of each sequence of ids in `words`, where the text ends with the ids before it."""
    if not words:
        return logits
    return _without(
        logits,
        [
            [last for *first, last in words if len(first) <= len(ids) and list(ids[len(ids) - len(first) :]) == first]
            for ids in texts
        ],
    )


def apply_min_new_tokens(logits: Tensor, n_new: Sequence[int], min_new_tokens: int, ends: Collection[int]) -> Tensor:
    """Exclude the end tokens `ends` from the rows with fewer than `min_new_tokens` new tokens."""
    return _without(logits, [list(ends) if n < min_new_tokens else [] for n in n_new])


def as_processors(given: LogitsProcessor | Iterable[LogitsProcessor] | None) -> tuple[LogitsProcessor, ...]:
    """One processor, several or None as a tuple. A list that is callable, as in transformers, counts as one.

    Raises InputTypeError for anything that cannot be called.
    """
    if given is None:
        return ()
    found = (given,) if callable(given) else tuple(given) if isinstance(given, Iterable) else ()
    if not all(map(callable, found)) or (not found and not isinstance(given, Iterable)):
        raise InputTypeError(
            f"logits_processor must be a function (ids, logits) -> logits, or a list of them, not {type(given).__name__}"
        )
    return found


def _processed(processor: LogitsProcessor, ids: list[int], logits: Tensor) -> Tensor:
    found = processor(torch.tensor([ids], device=logits.device), logits.clone())
    if not isinstance(found, Tensor) or found.shape != logits.shape:
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise InputError(
            f"a logits_processor returned {got}: it must return a tensor of the shape of its logits, {tuple(logits.shape)}"
        )
    return found.to(logits)


def _is_end(word: Sequence[int], ends: Collection[int]) -> bool:
    """Whether a bad word is an end token alone: as in transformers, a text may still end."""
    return len(word) == 1 and word[0] in ends


def _names(controls: Controls) -> list[str]:
    names = ("logit_bias", "no_repeat_ngram_size", "bad_words", "min_new_tokens")
    return [name for name in names if getattr(controls.config, name)] + ["logits_processor"] * bool(controls.processors)


def _ids_below(limit: int, ids: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(sorted({token for token in ids if token < limit}), dtype=torch.int64, device=device)


def _without(logits: Tensor, banned: Sequence[Sequence[int]]) -> Tensor:
    """Exclude the ids in each row of `banned`."""
    if not any(banned):
        return logits
    logits = logits.clone()
    for place, ids in enumerate(banned):
        logits[place, _ids_below(logits.shape[-1], ids, logits.device)] = -torch.inf
    return logits


def _counts(logits: Tensor, ids: Sequence[Sequence[int]]) -> Tensor:
    """How often each token occurs in each row of `ids`, (B, V) in the dtype of `logits`."""
    n = logits.shape[-1]
    rows = [torch.tensor(row, dtype=torch.int64).bincount(minlength=n)[:n] for row in ids]
    return torch.stack(rows).to(logits)
