"""How many cores and threads there are: control groups of both versions as files on the disk, variables, and --threads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_config.cores import (
    ThreadLimit,
    available_cores,
    fixed_threads,
    limit_spinning,
    process_limit,
    spin_as_usual,
    thread_limit,
)
from gpt_config.errors import ConfigError

V2_MOUNT = "31 24 0:27 {root} /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate"
V1_MOUNT = "33 24 0:29 {root} /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:11 - cgroup cgroup rw,cpu,cpuacct"
OTHER_MOUNTS = ["22 1 254:0 / / rw - ext4 /dev/vda rw", "34 24 0:30 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"]


def system(root: Path, groups: list[str], mounts: list[str], files: Mapping[str, str]) -> Path:
    """A folder with `proc` and `sys` as the kernel would show them."""
    proc = root / "proc/self"
    proc.mkdir(parents=True)
    (proc / "cgroup").write_text("".join(f"{line}\n" for line in groups))
    (proc / "mountinfo").write_text("".join(f"{line}\n" for line in [*OTHER_MOUNTS, *mounts]))
    for name, text in files.items():
        (root / "sys/fs/cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "sys/fs/cgroup" / name).write_text(text)
    return root


@pytest.fixture(autouse=True)
def many_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 64 cores."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)


V2, V1 = "0::/user.slice/job", "4:cpu,cpuacct:/docker/12ab"


@pytest.mark.parametrize(
    ("groups", "mounts", "files", "expected"),
    [
        pytest.param([V2], [V2_MOUNT.format(root="/")], {"user.slice/job/cpu.max": "150000 100000\n"}, 2, id="v2"),
        pytest.param([V2], [V2_MOUNT.format(root="/")], {"user.slice/job/cpu.max": "max 100000\n"}, 64, id="v2-no-quota"),
        pytest.param([V2], [V2_MOUNT.format(root="/")], {"user.slice/cpu.max": "400000 100000\n"}, 4, id="v2-group-above"),
        pytest.param(
            [V2],
            [V2_MOUNT.format(root="/")],
            {"user.slice/cpu.max": "400000 100000\n", "user.slice/job/cpu.max": "800000 100000\n"},
            4,
            id="v2-least",
        ),
        pytest.param(["0::/"], [V2_MOUNT.format(root="/")], {"cpu.max": "50000 100000\n"}, 1, id="v2-own-namespace"),
        pytest.param(["0::/../other"], [V2_MOUNT.format(root="/")], {"cpu.max": "300000 100000\n"}, 3, id="v2-outside"),
        pytest.param(
            [V1, "0::/"],
            [V1_MOUNT.format(root="/")],
            {
                "cpu,cpuacct/docker/12ab/cpu.cfs_quota_us": "150000\n",
                "cpu,cpuacct/docker/12ab/cpu.cfs_period_us": "100000\n",
            },
            2,
            id="v1",
        ),
        pytest.param(
            [V1],
            [V1_MOUNT.format(root="/docker/12ab")],
            {"cpu,cpuacct/cpu.cfs_quota_us": "200000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
            2,
            id="v1-container-mounts-its-own-group",
        ),
        pytest.param(
            [V1],
            [V1_MOUNT.format(root="/")],
            {"cpu,cpuacct/docker/12ab/cpu.cfs_quota_us": "-1\n", "cpu,cpuacct/docker/12ab/cpu.cfs_period_us": "100000\n"},
            64,
            id="v1-no-quota",
        ),
        pytest.param([V2], [V2_MOUNT.format(root="/")], {"user.slice/job/cpu.max": "nonsense"}, 64, id="unreadable"),
        pytest.param(["garbage"], ["garbage"], {}, 64, id="garbage"),
        pytest.param([V2], [V2_MOUNT.format(root="/")], {"user.slice/job/cpu.max": "150000 0\n"}, 64, id="period-0"),
        pytest.param(
            [V2], [V2_MOUNT.format(root="/")], {"user.slice/job/cpu.max": f"1{400 * '0'} 1\n"}, 64, id="beyond-a-float"
        ),
        pytest.param(
            ["0::/a:b/the job"],
            [V2_MOUNT.format(root="/")],
            {"a:b/the job/cpu.max": "150000 100000\n"},
            2,
            id="colon-and-space",
        ),
        pytest.param(  # systemd writes - in a name as \x2d, and mountinfo writes the backslash as \134
            ["0::/my\\x2dbox.slice/job"],
            [V2_MOUNT.format(root="/my\\134x2dbox.slice")],
            {"job/cpu.max": "150000 100000\n"},
            2,
            id="escaped-root",
        ),
        pytest.param(
            ["0::/job"],
            [V2_MOUNT.format(root="/").replace("/sys/fs/cgroup", "/sys/fs/cgroup/of\\040all")],
            {"of all/job/cpu.max": "150000 100000\n"},
            2,
            id="escaped-folder",
        ),
        pytest.param(
            [V1, "0::/user.slice/job"],
            [V1_MOUNT.format(root="/"), V2_MOUNT.format(root="/").replace("/sys/fs/cgroup", "/sys/fs/cgroup/unified")],
            {
                "unified/user.slice/job/cpu.max": "800000 100000\n",
                "cpu,cpuacct/docker/cpu.cfs_quota_us": "300000\n",
                "cpu,cpuacct/docker/cpu.cfs_period_us": "100000\n",
            },
            3,
            id="both-versions",
        ),
        pytest.param([], [], {}, 64, id="empty"),
    ],
)
def test_quotas(tmp_path: Path, groups: list[str], mounts: list[str], files: dict[str, str], expected: int) -> None:
    cores = available_cores(system(tmp_path, groups, mounts, files))
    assert cores.count == expected
    assert ("control group" in cores.reason) == (expected < 64)


def test_a_mount_that_is_not_utf_8_hides_no_quota(tmp_path: Path) -> None:
    root = system(tmp_path, ["0::/"], [V2_MOUNT.format(root="/")], {"cpu.max": "150000 100000\n"})
    with (root / "proc/self/mountinfo").open("ab") as mounts:
        mounts.write(b"99 1 8:1 / /media/caf\xe9 rw - vfat /dev/sdb rw\n")
    assert available_cores(root).count == 2


def test_without_proc_there_is_no_quota(tmp_path: Path) -> None:
    assert available_cores(tmp_path).count == 64


def test_an_affinity_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 9}, raising=False)
    cores = available_cores(tmp_path)
    assert cores.count == 3 and "3 of 64" in cores.reason
    files = {"cpu.max": "1000000 100000\n"}
    assert available_cores(system(tmp_path, ["0::/"], [V2_MOUNT.format(root="/")], files)).count == 3


@given(quota=st.integers(1, 10**7), period=st.integers(1000, 10**6))
def test_a_quota_is_rounded_up(tmp_path_factory: pytest.TempPathFactory, quota: int, period: int) -> None:
    files = {"cpu.max": f"{quota} {period}\n"}
    cores = available_cores(system(tmp_path_factory.mktemp("root"), ["0::/"], [V2_MOUNT.format(root="/")], files))
    assert cores.count == min(64, max(1, -(-quota // period)))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ThreadLimit(64, "the machine has 64 cores", False)),
        ({"OMP_NUM_THREADS": "4"}, ThreadLimit(4, "OMP_NUM_THREADS=4", False)),
        ({"OMP_NUM_THREADS": "4,2"}, ThreadLimit(4, "OMP_NUM_THREADS=4", False)),
        ({"OMP_NUM_THREADS": "100"}, ThreadLimit(64, "the machine has 64 cores", False)),
        ({"OMP_NUM_THREADS": "9" * 5000}, ThreadLimit(64, "the machine has 64 cores", False)),
        *(
            ({"OMP_NUM_THREADS": odd}, ThreadLimit(64, "the machine has 64 cores", False))
            for odd in ("", "0", "-2", ",4", "²")
        ),
        ({"OMP_NUM_THREADS": "none"}, ThreadLimit(64, "the machine has 64 cores", False)),
        ({"GPT2_THREADS": "100", "OMP_NUM_THREADS": "4"}, ThreadLimit(100, "GPT2_THREADS=100", True)),
        ({"GPT2_THREADS": " "}, ThreadLimit(64, "the machine has 64 cores", False)),
    ],
)
def test_variables(tmp_path: Path, environment: dict[str, str], expected: ThreadLimit) -> None:
    assert thread_limit(environment, tmp_path) == expected


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "two", "1025", "٣", "9" * 5000])
def test_a_wrong_variable_is_refused(tmp_path: Path, value: str) -> None:
    with pytest.raises(ConfigError, match=f"GPT2_THREADS='{value}' must be a whole number from 1 to 1024"):
        thread_limit({"GPT2_THREADS": value}, tmp_path)


def test_a_fixed_number_holds_within() -> None:
    before = process_limit()
    with fixed_threads(3):
        assert process_limit() == ThreadLimit(3, "threads=3", True)
        with fixed_threads(5):
            assert process_limit().count == 5
        assert process_limit().count == 3
    assert process_limit() == before
    with pytest.raises(ConfigError, match="threads=0"), fixed_threads(0):
        pass


def test_limits_of_several_python_threads_end_in_any_order() -> None:
    before, first, second = process_limit(), fixed_threads(1), fixed_threads(2)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert process_limit().count == 2
    second.__exit__(None, None, None)
    assert process_limit() == before


def test_how_long_threads_spin_is_set_unless_the_user_has() -> None:
    environment: dict[str, str] = {}
    limit_spinning(environment)
    assert int(environment["GOMP_SPINCOUNT"]) > 0
    spin_as_usual(environment)
    assert not environment
    for chosen in ({"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}):
        environment = dict(chosen)
        limit_spinning(environment)
        spin_as_usual(environment)
        assert environment == chosen
