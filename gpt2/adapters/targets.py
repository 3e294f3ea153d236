"""Which layers of a model an adapter's expressions match, in bounded time: those of a file may be hostile."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace

from gpt_config.errors import ConfigError
from gpt_config.lora_config import LoRAConfig

# Seconds for all layers of a model together; an ordinary pattern needs microseconds per layer. Python's `re` has no limit,
# and a pattern such as (?:.|\w)*\d\d takes it years. `regex` counts the time of the processor.
_LIMIT = 0.5


def matching(config: LoRAConfig, target: str, modules: Iterable[str], *, limit: float = _LIMIT) -> set[str]:
    """Return the names of `modules`, such as "transformer.h.0.attn.c_attn", that `target`, one of `config.targets`, matches.

    Raises ConfigError if a regular expression takes more than `limit` seconds.

    >>> names = ["transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_fc"]
    >>> matching(LoRAConfig(target_modules=("c_fc",)), "c_fc", names)
    {'transformer.h.0.mlp.c_fc'}
    """
    if isinstance(config.target_modules, str):
        return _full_matches(target, modules, time.monotonic() + limit, limit, "target_modules")
    ends = f".{target}"
    return {module for module in modules if module == target or (module.endswith(ends) and config.is_in_layers(module))}


def layer_configs(config: LoRAConfig, modules: Iterable[str], *, limit: float = _LIMIT) -> dict[str, LoRAConfig]:
    """Return the config of each of `modules`, with the rank and alpha that the first matching pattern gives it.

    As in peft, a pattern matches the end of a name, after a dot. Raises ConfigError if all take more than `limit` seconds.

    >>> name = "transformer.h.0.mlp.c_fc"
    >>> layer_configs(LoRAConfig(rank=4, rank_pattern={"c_fc": 2}), [name])[name].rank
    2
    """
    modules = list(modules)
    end, configs = time.monotonic() + limit, dict.fromkeys(modules, config)
    for field, changed in (("rank_pattern", "rank"), ("alpha_pattern", "alpha")):
        left = modules
        for pattern, value in getattr(config, field):
            hits = _full_matches(rf"(.*\.)?({pattern})", left, end, limit, field)
            configs |= {name: replace(configs[name], **{changed: value}) for name in hits}
            left = [name for name in left if name not in hits]
    return configs


def _full_matches(pattern: str, names: Iterable[str], end: float, limit: float, field: str) -> set[str]:
    """The names that `pattern` matches. ConfigError for the `field` it is in if the time is later than `end`."""
    import regex  # here, because few adapters have a regular expression

    hits = set()
    try:
        compiled = regex.compile(pattern)
        for name in names:
            if compiled.fullmatch(name, timeout=max(end - time.monotonic(), 0.001)):
                hits.add(name)
    except TimeoutError:
        raise ConfigError(
            f"{field}={pattern!r:.80} takes more than {limit:g} seconds to match: list the names of layers instead",
            field=field,
        ) from None
    except (regex.error, RecursionError) as error:
        raise ConfigError(f"{field}={pattern!r:.80} is not a regular expression ({error})", field=field) from None
    return hits
