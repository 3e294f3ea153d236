"""Mangles files, by a seed, and checks what a reader makes of them: the right result, or one line of a GPT2Error."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from gpt_config import GPT2Error

# How many files of each kind a test tries: some in each run of the suite, many with -m slow.
FEW_OR_MANY = pytest.mark.parametrize("n_files", [150, pytest.param(5_000, marks=pytest.mark.slow)])

# Seconds for one file. Reading a small file takes milliseconds; the rest is for a busy machine.
_LIMIT = 120.0

# Values that a field of a JSON file does not expect.
STRANGE: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 10**6, 1 << 31, 1 << 63, -(1 << 63), 10**30, 0.5, -0.0, 1e300, float("nan"),
    float("inf"), "", "0", "x", "\x1b[2J\r\n", "\u202e\u2028", "\ud800", "a" * 5000, "../x", "/dev/zero", [], [[]], [1, 2],
    {}, {"": ""}, {"a": {"b": 1}}, [None] * 50,
]  # fmt: skip


def mangled_bytes(content: bytes, random: Random, end: int | None = None) -> bytes:
    """Return `content` with one to three changes before byte `end`: bits, bytes, or ranges that are lost or repeated."""
    changed = bytearray(content)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        limit = max(min(len(changed), len(content) if end is None else end), 1)
        start = random.randrange(limit)
        stop = min(start + random.choice((1, 2, 8, 60)), limit)
        kind = random.randrange(7)
        if kind == 0 and start < len(changed):
            changed[start] ^= 1 << random.randrange(8)
        elif kind == 1 and start < len(changed):
            changed[start] = random.choice(b'0123456789"{}[],:-\x00\xff \n')
        elif kind == 2:
            del changed[start:stop]
        elif kind == 3:
            changed[start:start] = changed[start:stop]
        elif kind == 4:
            changed[start:stop] = random.randbytes(stop - start)
        elif kind == 5:
            del changed[random.randrange(len(changed) + 1) :]
        else:
            changed += random.choice((b"\x00", b" ", b"}", changed[start:stop]))
    return bytes(changed)


def mangled_json(value: Any, random: Random) -> str:
    """Return the JSON of `value` with a change: a strange value, a lost, renamed or repeated key, or damaged text."""
    value = copy.deepcopy(value)
    kind = random.randrange(10)
    if kind == 0:
        return random.choice(("[" * 100_000, '{"a":' * 100_000, "[" * 5000 + "]" * 5000, "", "null", "[]", "1", '"x"', "{"))
    if kind == 1:
        return mangled_bytes(json.dumps(value).encode(), random).decode("utf-8", errors="replace")
    for _ in range(random.choice((1, 1, 2))):
        parent = _some_container(value, random)
        keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
        if not keys:
            continue
        key = random.choice(keys)
        if kind == 2:
            del parent[key]
        elif kind == 3 and isinstance(parent, dict):
            parent[random.choice((str(key) + "x", "", "\x1b[31m", str(random.choice(keys))))] = parent.pop(key)
        elif kind == 4:
            parent[key] = copy.deepcopy(parent[random.choice(keys)])
        elif kind == 5:
            deep: Any = parent[key]
            for _ in range(random.choice((1, 90, 400))):
                deep = [deep]
            parent[key] = deep
        else:
            parent[key] = copy.deepcopy(random.choice(STRANGE))
    return json.dumps(value)


def _some_container(value: Any, random: Random) -> Any:
    """Return `value` or, as often, one of the lists and objects in it."""
    children = [child for child in (value.values() if isinstance(value, dict) else value) if isinstance(child, (dict, list))]
    return value if not children or random.random() < 0.6 else _some_container(random.choice(children), random)


def outcome(read: Callable[[], Any], what: str = "") -> Any:
    """Return what `read` returns, or None after a GPT2Error, which must be one line. Other errors and long waits fail.

    `what` is shown with a failure.
    """
    began = time.monotonic()
    try:
        result = read()
    except GPT2Error as error:
        line = str(error)
        assert line.isprintable() and 10 < len(line) < 20_000, (what, line)
        result = None
    except Exception as error:
        raise AssertionError(f"{what} ended with {type(error).__name__}, not with a GPT2Error") from error
    assert time.monotonic() - began < _LIMIT, what
    return result
