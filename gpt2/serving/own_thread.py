"""Compute beside the engine without slowing it down."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")


async def in_own_thread(function: Callable[_P, _T], *arguments: _P.args, **options: _P.kwargs) -> _T:
    """Call a function in a thread that ends with it, and return what it returns.

    OpenMP keeps workers for every thread in which torch has computed, and while it has more of them than there are cores,
    each waits by sleeping: a step in bfloat16 then takes a quarter longer. So no thread but the engine's may stay.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="gpt2-once")
    try:
        return await asyncio.get_running_loop().run_in_executor(pool, lambda: function(*arguments, **options))
    finally:
        pool.shutdown(wait=False)
