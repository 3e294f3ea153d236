"""The decode loop of the NumPy engine: one sequence, one token at a time. It knows ids; only `stream_text` knows text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt2.reference import numpy_sampling as sampling
from gpt2.reference.numpy_gpt2 import gpt2_forward
from gpt2.reference.numpy_kv_cache import KVCache
from gpt2.reference.numpy_model import NumpyGPT2
from gpt_config.errors import CheckpointError, InputError
from gpt_config.generation_config import GenerationConfig
from gpt_config.model_config import GPT2Config

if TYPE_CHECKING:
    from gpt_encoder.interface import Tokenizer

Array = np.ndarray[Any, np.dtype[Any]]


def stream_ids(
    model: NumpyGPT2,
    prompt_ids: Sequence[int],
    config: GenerationConfig | None = None,
    *,
    vocab_size: int | None = None,
    use_cache: bool = True,
) -> Iterator[int]:
    """Yield the tokens after the prompt, one at a time, up to and including the end token.

    Of the controls in `config`, it has `logit_bias`, the three penalties and their window, `min_new_tokens`, `eos_token_id`,
    `stop_at_eot`, temperature, top-k, top-p, min-p and typical-p; others are refused. The repetition penalty applies to
    tokens of the prompt and of the new text, the frequency and presence penalties to tokens of the new text only. Only ids
    below `vocab_size` are chosen. When the text no longer fits into the context, its
    older half is dropped, and the cache is computed again, because the remaining tokens get new positions.
    `use_cache=False` computes all tokens again for each new one: the same ids, but slower. InputError for invalid arguments;
    CheckpointError if the model computes NaN.
    """
    config = config or GenerationConfig()
    check_options(config)
    ends = model.config.eos_token_ids if config.eos_token_id is None else config.eos_token_id
    ends = ends if config.stop_at_eot else ()
    rng, limit = np.random.default_rng(config.seed), model.config.n_positions
    ids = start_of(model.config, prompt_ids)
    n_prompt, first = len(ids), max(0, len(ids) - limit)  # the model sees ids[first:]
    cache = KVCache(model.config, dtype=model.dtype)
    for _ in range(config.max_new_tokens):
        has_outgrown = len(ids) - first > limit
        if has_outgrown:
            first = len(ids) - max(1, limit // 2)
        if has_outgrown or not use_cache:
            cache = KVCache(model.config, dtype=model.dtype)
        logits = next_logits(model, ids[first + cache.length :], cache)[:, :vocab_size]
        start = max(0, len(ids) - (config.penalty_window or len(ids)))
        logits = sampling.apply_logit_bias(logits, config.logit_bias)
        logits = sampling.apply_repetition_penalty(logits, [ids[start:]], config.repetition_penalty)
        logits = sampling.apply_frequency_penalty(logits, [ids[max(n_prompt, start) :]], config.frequency_penalty)
        logits = sampling.apply_presence_penalty(logits, [ids[max(n_prompt, start) :]], config.presence_penalty)
        if len(ids) - n_prompt < config.min_new_tokens:
            logits = sampling.without(logits, ends)
        token = choose(logits, config, rng)
        ids.append(token)
        yield token
        if token in ends:
            return


def stream_text(
    model: NumpyGPT2,
    tokenizer: Tokenizer,
    prompt: str,
    config: GenerationConfig | None = None,
) -> Iterator[str]:
    """Yield the text after `prompt` in pieces of whole characters. The arguments are those of `stream_ids`."""
    from gpt_encoder.stream_decoder import StreamDecoder

    decoder, ends = StreamDecoder(tokenizer), (*model.config.eos_token_ids, tokenizer.eot_token_id)
    ends = (*ends, *(config.eos_token_id or ())) if config else ends
    tokens = stream_ids(model, tokenizer.encode(prompt), config, vocab_size=tokenizer.vocab_size)
    for token in tokens:
        if token not in ends:
            yield decoder.push(token)
    yield decoder.flush()


def next_logits(model: NumpyGPT2, ids: Sequence[int], cache: KVCache) -> Array:
    """The logits (1, V) of the token after `ids`, which are added to the cache. No dropout, even in training mode."""
    logits, _ = gpt2_forward(model.parameters, model.config, np.array([ids]), None, cache)
    last = logits[:, -1]
    if not np.isfinite(last).all():
        raise CheckpointError(
            "the model computes NaN or infinite logits: its weights are damaged, or its training diverged; use other weights"
        )
    return last


def choose(logits: Array, config: GenerationConfig, rng: np.random.Generator) -> int:
    """The next token from logits (1, V): the most probable one, or a random one drawn with `rng`."""
    if config.greedy:
        return int(sampling.greedy(logits)[0])
    return int(sampling.sample(sampling.logits_to_probs(logits, config), [rng.random()])[0])


def start_of(config: GPT2Config, prompt_ids: Sequence[int]) -> list[int]:
    """The ids of the prompt, or the bos_token_id if it is empty. InputError if neither exists, or for an unknown id."""
    if not len(prompt_ids) and config.bos_token_id is None:
        raise InputError("the prompt is empty and this model has no bos_token_id to start from: give it a token")
    ids = [int(token) for token in prompt_ids] or [config.bos_token_id or 0]
    wrong = [token for token in ids if not 0 <= token < config.vocab_size]
    if wrong:
        raise InputError(
            f"token id {wrong[0]} is outside the vocabulary of this model: ids go from 0 to {config.vocab_size - 1}; "
            "use the tokenizer that belongs to it"
        )
    return ids


def check_options(config: GenerationConfig) -> None:
    """InputError for options that only the PyTorch engine supports."""
    if config.num_beams > 1 or config.num_return_sequences > 1 or config.stop:
        raise InputError(
            "the NumPy engine continues one prompt once, without beams or stop strings: leave out num_beams, "
            "num_return_sequences and stop, or use gpt2.complete()"
        )
    for name in ("no_repeat_ngram_size", "bad_words", "max_time", "top_logprobs"):
        if value := getattr(config, name):
            raise InputError(f"the NumPy engine has no {name}={value!r}: leave it out, or use gpt2.complete()")
