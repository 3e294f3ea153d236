"""Batch: rows that are decoded together. `admit` adds rows, `step` advances them, and ended rows are removed.

It depends on ids and models, not on tokenizers. Rows of any length may join a running batch, and each row has its own
config. The tokens of a row do not depend on the other rows, except where the rounding of a larger matrix product decides
between nearly equal logits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from random import Random

from torch import Tensor

from gpt2.device import check_one_dtype
from gpt2.fast.costs import costs_of_verifying
from gpt2.fast.limits import FAST, FastLimits
from gpt2.fast.threads import adjusted_threads
from gpt2.generation import sampling
from gpt2.generation.beam_search import beam_search
from gpt2.generation.decoder import Decoder
from gpt2.generation.draft_model import DraftModel
from gpt2.generation.prefix_cache import PrefixCache
from gpt2.generation.processors import Controls, Text
from gpt2.generation.row import Row, end_ids
from gpt2.generation.speculation import Drafter, PromptLookup, Speculation
from gpt2.generation.steps import BeamSearch, GreedyTokens, OneToken, Prefill, Step, VerifyDrafts
from gpt2.model import GPT2
from gpt_config.errors import InputError


class Batch:
    """The rows that a model is continuing.

    - `vocab_size`: only ids below it are chosen, because the embedding often has more rows than the tokenizer has ids.
    - `use_cache=False` recomputes the whole sequence for every token.
    - `draft_model`: a smaller model with the same vocabulary. While the batch has only one row, it is decoded speculatively
      if its config has `speculate` or there is a draft model.
    - `make_speculation` makes the object that decides how many tokens to draft.
    - `max_prefill_tokens`: the most prompt tokens that one step prefills; one prompt is always allowed.
    - `prefix_cache` has the keys and values of beginnings that prompts share; several batches of the model may use it in
      turn. None: the batch makes one.
    - `on_step` is called with every step before it runs.

    Do not change the model while rows run, because their next tokens may already be computed. After a change through
    `weight.data`, which torch does not count, make a new batch.

    >>> batch = Batch(model)  # doctest: +SKIP
    >>> batch.admit(start(model, prompts, config))  # doctest: +SKIP
    >>> while batch.rows:  # doctest: +SKIP
    ...     for advanced in batch.step():
    ...         print([row.ids[-1] for row in advanced])
    """

    def __init__(
        self,
        model: GPT2,
        *,
        vocab_size: int | None = None,
        use_cache: bool = True,
        draft_model: GPT2 | None = None,
        max_prefill_tokens: int | None = None,
        prefix_cache: PrefixCache | None = None,
        on_step: Callable[[Step], object] = lambda step: None,
        make_speculation: Callable[[Drafter, tuple[float, float]], Speculation] = Speculation,
        fast: FastLimits = FAST,
    ) -> None:
        self._model, self._draft_model = model, draft_model
        self._vocab_size = None if vocab_size is None else min(vocab_size, model.config.vocab_size)
        self._use_cache = use_cache
        self._max_prefill_tokens = max_prefill_tokens
        self._prefix_cache = PrefixCache() if prefix_cache is None else prefix_cache
        self._on_step, self._make_speculation = on_step, make_speculation
        self._fast = fast
        self._waiting: list[Row] = []
        self._searches: list[list[Row]] = []  # rows with beam search, one list for each prompt
        self._places: list[Row] = []  # the rows of the decoder, in its order; ended rows stay until half have ended
        self._decoder: Decoder | None = None
        self._one_at_a_time = False  # True after computing several greedy tokens in one step has failed
        self._is_in_a_step = False

    def check_model(self) -> None:
        """Raise InputError if the models have weights of several dtypes: call it after an error of torch."""
        for model in (self._model, self._draft_model):
            if model is not None:
                check_one_dtype(model)

    @property
    def rows(self) -> list[Row]:
        """The rows that have not ended."""
        found = [row for group in self._searches for row in group] + self._places + self._waiting
        return [row for row in found if row.finish_reason is None]

    def admit(self, rows: Sequence[Row]) -> None:
        """Add rows, which take part from the next step on. Raises InputError if a row is already in this batch.

        Rows with beam search that `start` made from the same prompt share one search; each gets the beam of its index.
        """
        here, now = {id(row) for row in self.rows}, self._fast.clock()
        for row in rows:
            row.began = now if row.began is None else row.began
            if id(row) in here:
                raise InputError("a row is already in this batch: make a new row with start() for another continuation")
            here.add(id(row))
            if row.config.num_beams == 1 or row.config.max_new_tokens == 0:
                self._waiting.append(row)
                continue
            of_same_prompt = (group for group in self._searches if group[0].prompt_ids is row.prompt_ids)
            group = next(of_same_prompt, None)
            if group is None:
                self._searches.append([row])
            else:
                group.append(row)

    def step(self) -> Iterator[list[Row]]:
        """Run one step. Yields a list of the rows that got a token; a step that gives several tokens yields several lists.

        Between two lists, the caller may end a row by setting its `finish_reason`. Exhaust or close the iterator before the
        next step; otherwise InputError is raised. Raises CheckpointError if the model computes NaN. An exception leaves all
        rows as they were before the step; the caller may end some rows and continue.
        """
        if self._is_in_a_step:
            raise InputError("a step of this batch is not finished: exhaust or close its iterator before the next step")
        self._is_in_a_step = True
        rounds = self._step()
        try:
            while True:
                with adjusted_threads(self._model.device):  # the reader computes with its own number of threads
                    advanced = next(rounds, None)
                if advanced is None:
                    return
                yield advanced
        finally:
            rounds.close()
            self._is_in_a_step = False

    def _step(self) -> Generator[list[Row]]:
        self._retire()
        self._waiting = [row for row in self._waiting if row.finish_reason is None]
        self._searches = [group for group in self._searches if any(row.finish_reason is None for row in group)]
        if empty := [row for row in self._waiting if row.n_tokens_left == 0]:
            for row in empty:
                row.finish_reason = "length"
            yield empty
            return
        step = self._next_step()
        if step is None:
            return
        self._on_step(step)
        match step:
            case BeamSearch():
                yield self._search(self._searches[0])
            case Prefill():
                yield self._prefill(step.n_rows)
            case VerifyDrafts():
                yield from self._verify(step.drafts)
            case GreedyTokens():
                yield from self._greedy_tokens(step.n_tokens)
            case OneToken():
                yield self._one_token()
        self._retire()

    def _next_step(self) -> Step | None:
        """Return the next step, or None if no row is left.

        The caller must run it, because speculation and the greedy head have already counted it.
        """
        if self._searches:
            return BeamSearch(len(self._searches[0]))
        if self._waiting:
            return Prefill(self._n_rows_to_prefill())
        if self._decoder is None:
            return None
        only_largest = all(row.takes_only_the_largest for row in self._places if row.finish_reason is None)
        self._decoder.only_largest = only_largest and not self._one_at_a_time
        if len(self._places) == 1:
            if drafts := self._drafts(self._places[0], self._decoder):
                return VerifyDrafts(tuple(drafts))
            if n_tokens := self._decoder.reserve_greedy_steps():
                return GreedyTokens(n_tokens)
        return OneToken(len(self._places))

    def _search(self, rows: list[Row]) -> list[Row]:
        """Run beam search from the prompt of `rows`, and give each row its beam."""
        config = rows[0].config
        beams = beam_search(
            self._model,
            rows[0].prompt_ids,
            config,
            vocab_size=self._vocab_size,
            use_cache=self._use_cache,
            fast=self._fast,
            processors=rows[0].processors,
            ends_in_stop=rows[0].ends_in_stop,
            is_late=lambda: self._is_late(rows[0]),
            vectors=rows[0].vectors,
        )
        advanced = [row for row in rows if row.finish_reason is None]
        for row in advanced:
            # `% len(beams)`, because lm_eval numbers the rows of a batch consecutively, to give each its own random draws.
            beam = beams[row.index % len(beams)]
            row.ids, row.finish_reason, row.top_logprobs = beam.ids, beam.finish_reason or "length", beam.top_logprobs
            row.logprobs = beam.logprobs if row.wants_logprobs else []
        return advanced

    def _n_rows_to_prefill(self) -> int:
        limit, n_tokens = self._max_prefill_tokens, 0
        for n_rows, row in enumerate(self._waiting):
            n_tokens += len(row.window.visible_ids)
            if n_rows and limit is not None and n_tokens > limit:
                return n_rows
        return len(self._waiting)

    def _prefill(self, n_rows: int) -> list[Row]:
        """Prefill the first `n_rows` waiting rows and give each its first token."""
        rows, decoder = self._waiting[:n_rows], self._decoder
        windows, most = [row.window for row in rows], max(row.n_tokens_left for row in rows)
        if decoder is None:
            decoder = Decoder(
                self._model,
                windows,
                most,
                use_cache=self._use_cache,
                only_largest=all(row.takes_only_the_largest for row in rows),
                vocab_size=self._vocab_size,
                prefixes=self._prefix_cache,
                fast=self._fast,
                vectors=_vectors_of(rows),
            )
            if len(rows) == 1:
                self._drafts(rows[0], decoder)  # there is no cache for drafts yet, but speculation counts this step too
            logits = decoder.next_logits()
        else:
            self._drop_ended(decoder)
            logits = decoder.join(windows, most, vectors=_vectors_of(rows))
        # Set these last, so that the rows still wait after an exception.
        self._decoder, self._waiting, self._places = decoder, self._waiting[n_rows:], self._places + rows
        return self._give(rows, logits)

    def _one_token(self) -> list[Row]:
        assert self._decoder is not None
        return self._give(self._places, self._decoder.next_logits())

    def _greedy_tokens(self, n_tokens: int) -> Iterator[list[Row]]:
        row, decoder = self._places[0], self._decoder
        assert decoder is not None
        run = decoder.greedy_tokens(n_tokens, end_ids(row.config, self._model.config))
        self._one_at_a_time = run.failed
        if row.speculation and run.tokens:
            row.speculation.stepped(len(run.tokens) - 1)
        n_given = 0
        try:
            for token in run.tokens:
                n_given += 1
                self._append(row, token, None)
                yield [row]
                if row.finish_reason:
                    return
        finally:
            decoder.reject(len(run.tokens) - n_given)

    def _verify(self, drafts: Sequence[int]) -> Iterator[list[Row]]:
        """Give the only row a token, and one more after each draft that equals the token chosen in its place."""
        row, decoder = self._places[0], self._decoder
        assert decoder is not None and row.speculation is not None
        places = decoder.next_logits(drafts).split(1)  # (1, V) each: after the row, after the first draft, and so on
        n_given = 0
        try:
            for logits, draft in zip(places, [*drafts, None], strict=False):
                n_given += 1
                yield self._give([row], logits)
                if row.ids[-1] != draft or row.finish_reason:
                    break
        finally:
            decoder.reject(len(places) - n_given)
        row.speculation.verified(len(drafts), n_given - 1)

    def _give(self, rows: list[Row], logits: Tensor) -> list[Row]:
        """Choose a token for each row from logits (B, V) and append it. Returns the rows that had not ended before."""
        try:
            tokens = self._choose(rows, logits)
        except BaseException:  # the controls leave no token: the rows have none for the step that the cache contains
            if self._decoder is not None:
                self._decoder.forget()
            raise
        logprobs: Sequence[float | None] = [None] * len(rows)
        if any(row.wants_logprobs for row in rows):
            logprobs = sampling.logprobs_of(logits, tokens)
        n_top = max(row.config.top_logprobs for row in rows)
        top = sampling.top_logprobs_of(logits, n_top, self._vocab_size) if n_top else []
        advanced = [row for row in rows if row.finish_reason is None]
        for place, (row, token, logprob) in enumerate(zip(rows, tokens, logprobs, strict=True)):
            if row.finish_reason is not None:
                row.window.ids.append(token)  # ended rows are computed too, until they are removed from the batch
                continue
            if row.config.top_logprobs:
                row.top_logprobs.append(top[place][: row.config.top_logprobs])
            self._append(row, token, logprob if row.wants_logprobs else None)
        return advanced

    def _append(self, row: Row, token: int, logprob: float | None) -> None:
        row.append(token, logprob, end_ids(row.config, self._model.config))
        if row.finish_reason is None and self._is_late(row):
            row.finish_reason = "time"

    def _is_late(self, row: Row) -> bool:
        """Whether the row has had its `max_time`."""
        limit = row.config.max_time
        return limit is not None and self._fast.clock() - (row.began or 0.0) >= limit

    def _choose(self, rows: list[Row], logits: Tensor) -> list[int]:
        """Return a token for each row of logits (B, V). Rows with the same config and processors are sampled together."""
        groups: dict[tuple[int, int], list[int]] = {}
        for place, row in enumerate(rows):
            if row.finish_reason is None:
                groups.setdefault((id(row.config), id(row.processors)), []).append(place)
        tokens = [0] * len(rows)  # of rows that have ended, any token
        for group in groups.values():
            of_group = logits if len(group) == len(rows) else logits[group]
            texts = [rows[place].text for place in group]
            chosen = sampling.choose(of_group, texts, self._controls(rows[group[0]]), self._vocab_size)
            for place, token in zip(group, chosen, strict=True):
                tokens[place] = token
        return tokens

    def _controls(self, row: Row) -> Controls:
        return Controls(row.config, end_ids(row.config, self._model.config), row.processors)

    def _drafts(self, row: Row, decoder: Decoder) -> list[int]:
        """Return drafts of the next tokens of the only row; often none."""
        if not (row.config.speculate or self._draft_model) or decoder.verifier is None:
            return []
        if row.speculation is None:
            costs = costs_of_verifying(self._model, decoder.verifier, self._fast)
            drafter: Drafter
            drafter = self._draft_model_for(row) if self._draft_model else PromptLookup(self._model.config.n_positions)
            row.speculation = self._make_speculation(drafter, costs)
        drafts = row.speculation.draft(row.window.ids, decoder.room, row.generator)
        return list(itertools.takewhile(lambda draft: draft >= 0, drafts))  # a placeholder of an embedding is no token

    def _draft_model_for(self, row: Row) -> DraftModel:
        assert self._draft_model is not None

        def choose(logits: Tensor, texts: list[list[int]], generators: list[Random]) -> list[int]:
            n_prompt = len(row.prompt_ids)
            each = [Text(ids, n_prompt, generator) for ids, generator in zip(texts, generators, strict=True)]
            return sampling.choose(logits, each, self._controls(row), self._vocab_size)

        return DraftModel(self._draft_model, self._model, choose, self._fast)

    def _retire(self) -> None:
        """Remove ended rows once at least half have ended; not earlier, because it copies the cache of the other rows."""
        n_live = sum(row.finish_reason is None for row in self._places)
        if self._decoder is None or 2 * n_live > len(self._places):
            return
        if n_live == 0:
            self._keep_ended(self._decoder)
            self._places, self._decoder, self._one_at_a_time = [], None, False
        else:
            self._drop_ended(self._decoder)

    def _drop_ended(self, decoder: Decoder) -> None:
        self._keep_ended(decoder)
        live = [place for place, row in enumerate(self._places) if row.finish_reason is None]
        if len(live) < len(self._places):
            self._places = [self._places[place] for place in live]
            decoder.select(live)

    def _keep_ended(self, decoder: Decoder) -> None:
        if self._prefix_cache.keep_texts:
            decoder.keep([place for place, row in enumerate(self._places) if row.finish_reason is not None])


def _vectors_of(rows: Sequence[Row]) -> Mapping[int, Tensor]:
    """The embeddings of all prompts, by their placeholders."""
    return {token: vector for row in rows if row.vectors for token, vector in row.vectors.items()}
