"""How many cores and threads this process may use, and how threads wait. Standard library only.

A container with `--cpus 1.5` on a machine of 64 cores sees all 64 of them, and a thread for each is slower than two threads:
the kernel stops all of them as soon as the quota of a period is used up.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from gpt_config.errors import ConfigError

MOST_THREADS = 1024

# How often a waiting thread looks before it sleeps. With fewer, threads sleep between the products of an undisturbed step.
SPIN_COUNT = "20000"


@dataclass(frozen=True)
class Cores:
    """A number of cores, 1 or more, and in a few words what limits it."""

    count: int
    reason: str


@dataclass(frozen=True)
class ThreadLimit:
    """How many threads, or processes that encode, to use at most, and why. `is_fixed`: not fewer either."""

    count: int
    reason: str
    is_fixed: bool


class _Mount(NamedTuple):
    """A mounted hierarchy of control groups: which of its groups is mounted, where, and of which version it is."""

    root: PurePosixPath
    folder: Path
    is_v2: bool


def available_cores(root: str | Path = "/") -> Cores:
    """The cores that this process may use: those of its affinity mask, or the quota of its control groups if that is less.

    A quota of 1.5 cores counts as 2, because one thread would leave a third of it unused. `root` is the folder in which
    `proc` and `sys` are; tests hand in one of their own. What cannot be read sets no limit.
    """
    cores = _cores_of_mask()
    for quota, name in _quotas(Path(root)):
        if math.ceil(quota) < cores.count:
            cores = Cores(max(1, math.ceil(quota)), f"{name} allows {quota:g} cores")
    return cores


def thread_limit(environment: Mapping[str, str] = os.environ, root: str | Path = "/") -> ThreadLimit:
    """The number that GPT2_THREADS fixes; without it `available_cores`, or OMP_NUM_THREADS if that is less.

    ConfigError if GPT2_THREADS is not a whole number between 1 and 1024.
    """
    given = environment.get("GPT2_THREADS", "").strip()
    if given:
        if not 1 <= _whole(given) <= MOST_THREADS:
            raise ConfigError(f"GPT2_THREADS={given!r} must be a whole number from 1 to {MOST_THREADS}, or unset")
        return ThreadLimit(int(given), f"GPT2_THREADS={given}", True)
    cores = available_cores(root)
    first = environment.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # "4,2" is 4 at the outer level
    if 1 <= _whole(first) < cores.count:
        return ThreadLimit(_whole(first), f"OMP_NUM_THREADS={first}", False)
    return ThreadLimit(cores.count, cores.reason, False)


def _whole(text: str) -> int:
    """A number in ASCII digits, at most nine; 0 if it is none."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else 0


def limit_spinning(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let waiting threads sleep after some ten microseconds, which beside busy processes saves milliseconds.

    It sets GOMP_SPINCOUNT, unless that or OMP_WAIT_POLICY is set. GNU OpenMP reads it as torch is imported: call it before.
    """
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def spin_as_usual(environment: MutableMapping[str, str] = os.environ) -> None:
    """Undo `limit_spinning`, for a process that measures another program. Call it before that imports OpenMP."""
    if environment.get("GOMP_SPINCOUNT") == SPIN_COUNT:
        del environment["GOMP_SPINCOUNT"]


_in_use: list[tuple[object, ThreadLimit]] = []


@contextmanager
def use_thread_limit(limit: ThreadLimit) -> Iterator[None]:
    """Within, `process_limit` is `limit`, in all Python threads. If several of them use one, the newest holds."""
    entry = (object(), limit)  # Python threads need not leave in the order in which they entered
    _in_use.append(entry)
    try:
        yield
    finally:
        _in_use.remove(entry)


def fixed_threads(count: int, reason: str = "") -> AbstractContextManager[None]:
    """Within, all steps use `count` threads, as with the option `--threads`. ConfigError if it is not from 1 to 1024."""
    if not 1 <= count <= MOST_THREADS:
        raise ConfigError(f"threads={count} must be from 1 to {MOST_THREADS}", field="threads")
    return use_thread_limit(ThreadLimit(count, reason or f"threads={count}", True))


def process_limit() -> ThreadLimit:
    """The `thread_limit` of this process, for which files are read once, or the one that `use_thread_limit` sets."""
    newest = _in_use[-1:]
    return newest[0][1] if newest else _limit_of_process()


@cache
def _limit_of_process() -> ThreadLimit:
    return thread_limit()


def _cores_of_mask() -> Cores:
    n_cores = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else n_cores
    if allowed < n_cores:
        return Cores(allowed, f"the affinity mask allows {allowed} of {n_cores} cores")
    return Cores(n_cores, f"the machine has {n_cores} cores" if n_cores > 1 else "the machine has 1 core")


def _quotas(root: Path) -> list[tuple[float, str]]:
    """(cores, file's name) for each quota that is set for this process's control groups and for the groups above them."""
    try:
        groups, lines = (
            os.fsdecode((root / f"proc/self/{name}").read_bytes()).split("\n") for name in ("cgroup", "mountinfo")
        )
        mounts = [mount for line in lines for mount in _mounts(line, root)]
    except (OSError, ValueError):  # another system than Linux, or no access
        return []
    found = []
    for line in groups:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]  # 0::/job in version 2, 4:cpu,cpuacct:/job in version 1
        if controllers and "cpu" not in controllers.split(","):
            continue
        for mount in mounts:
            if mount.is_v2 == (not controllers):
                found += [quota for folder in _folders(mount, PurePosixPath(path)) if (quota := _quota(folder, mount.is_v2))]
    return found


def _mounts(line: str, root: Path) -> list[_Mount]:
    """The mount that a line of /proc/self/mountinfo describes, if it is of control groups with the CPU controller."""
    before, _, after = line.partition(" - ")
    kind, _, options = [*after.split(), "", "", ""][:3]
    if kind != "cgroup2" and (kind != "cgroup" or "cpu" not in options.split(",")):
        return []
    mounted, folder = (_unescaped(path) for path in before.split(" ")[3:5])
    return [_Mount(PurePosixPath(mounted), root / folder.lstrip("/"), kind == "cgroup2")]


def _unescaped(path: str) -> str:
    """A path of /proc/self/mountinfo, in which a space is \\040 and a backslash, as in names of systemd, is \\134."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)


def _folders(mount: _Mount, path: PurePosixPath) -> list[Path]:
    """The folders of a group and of all groups above it. In a container the group's own path may not be mounted: then the
    mounted folder itself is the group."""
    inside = path.relative_to(mount.root) if path.is_relative_to(mount.root) else PurePosixPath()
    return [mount.folder / folder for folder in (inside, *inside.parents)]


def _quota(folder: Path, is_v2: bool) -> tuple[float, str] | None:
    """The cores that a group's quota is worth, and the name of the file that has it; None if there is no quota."""
    try:
        if is_v2:
            quota, period = (folder / "cpu.max").read_text().split()[:2]
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        if quota.strip() == "max" or int(quota) <= 0 or int(period) <= 0:  # -1 in version 1: no quota
            return None
        return int(quota) / int(period), "the control group's cpu.max" if is_v2 else "the control group's cpu.cfs_quota_us"
    except (OSError, ValueError, OverflowError):
        return None
