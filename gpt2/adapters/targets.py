"""Which layers of a model an adapter's targets match, in bounded time: a regular expression of a file may be hostile."""

from __future__ import annotations

import time
from collections.abc import Iterable

from gpt_config.errors import ConfigError
from gpt_config.lora_config import LoRAConfig

# Seconds for all layers of a model together; an ordinary pattern needs microseconds per layer. Python's `re` has no limit,
# and a pattern such as (?:.|\w)*\d\d takes it years.
_LIMIT = 2.0


def matching(config: LoRAConfig, target: str, modules: Iterable[str], *, limit: float = _LIMIT) -> set[str]:
    """Return the names of `modules`, such as "transformer.h.0.attn.c_attn", that `target`, one of `config.targets`, matches.

    Raises ConfigError if a regular expression takes more than `limit` seconds.

    >>> names = ["transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_fc"]
    >>> matching(LoRAConfig(target_modules=("c_fc",)), "c_fc", names)
    {'transformer.h.0.mlp.c_fc'}
    """
    if isinstance(config.target_modules, str):
        return _full_matches(target, modules, limit)
    ends = f".{target}"
    return {module for module in modules if module == target or (module.endswith(ends) and config.is_in_layers(module))}


def _full_matches(pattern: str, names: Iterable[str], limit: float) -> set[str]:
    import regex  # here, because few adapters have a regular expression

    end, hits = time.monotonic() + limit, set()
    try:
        compiled = regex.compile(pattern)
        for name in names:
            if compiled.fullmatch(name, timeout=max(end - time.monotonic(), 0.001)):
                hits.add(name)
    except TimeoutError:
        raise ConfigError(
            f"target_modules={pattern!r:.80} takes more than {limit:g} seconds to match: list the names of layers instead",
            field="target_modules",
        ) from None
    except (regex.error, RecursionError) as error:
        raise ConfigError(
            f"target_modules={pattern!r:.80} is not a regular expression ({error})", field="target_modules"
        ) from None
    return hits
