"""How much memory generation takes, before it is taken. It depends on configs and sizes, and allocates nothing."""

from __future__ import annotations

from gpt2.device import free_memory
from gpt2.fast.plan import cache_dtype
from gpt2.model import GPT2
from gpt_config.errors import ConfigError
from gpt_config.generation_config import GenerationConfig
from gpt_config.model_config import GPT2Config

# Bytes of a continuation that is kept for the reader: of each token its id, log-probability and text, and of all.
_PER_TOKEN, _PER_TEXT = 72, 1000


def memory_of_rows(config: GPT2Config, n_rows: int, n_tokens: int, itemsize: int) -> int:
    """Return the bytes of the keys, values and logits of rows of up to `n_tokens` tokens, in numbers of `itemsize` bytes.

    It is what is needed at least: the weights, and copies while rows join or leave, come in addition.
    """
    cache = 2 * config.n_layer * config.n_embd * min(n_tokens, config.n_positions) * itemsize
    return n_rows * (cache + config.vocab_size * itemsize)


def check_memory(
    model: GPT2, n_prompt_tokens: int, config: GenerationConfig, *, n_rows: int, named: str = "batch_size"
) -> None:
    """Raise ConfigError if `n_rows` rows, the beams of a prompt or its samples need more memory than is free.

    The rows have prompts of up to `n_prompt_tokens` tokens and run together; `named` is the option that their number follows
    from. The error names the option, the memory it takes and the memory that is free. Does nothing if the system does not
    say how much is free.
    """
    free = free_memory(model.device)
    if free is None:
        return
    n_tokens, itemsize = n_prompt_tokens + config.max_new_tokens, cache_dtype(model).itemsize
    a_row = memory_of_rows(model.config, 1, n_tokens, itemsize)
    kept = config.num_return_sequences * (_PER_TEXT + config.max_new_tokens * _PER_TOKEN)
    for field, value, needed in (
        ("num_beams", config.num_beams, (config.num_beams - 1) * a_row),
        ("num_return_sequences", config.num_return_sequences, kept if config.num_return_sequences > 1 else 0),
        (named, n_rows, (n_rows - 1) * a_row),
    ):
        if needed > free:
            raise ConfigError(
                f"{field}={value} takes at least {_readable(needed)} of memory for texts of up to {n_tokens} tokens, and "
                f"{_readable(free)} are free: choose a smaller number, or shorter texts",
                field=field,
            )


def _readable(n_bytes: int) -> str:
    """The size in units of 1000, such as "8.1 GB"."""
    size, units = float(n_bytes), ["B", "kB", "MB", "GB", "TB", "PB", "EB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:,.1f} {units[0]}"
