"""The memory of oneDNN's kernels, in a process of its own, because torch reads the bounds once."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
NAMES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")

# Runs `code` where `gpt2 serve` would begin to import torch, after it has set the bounds.
SERVE = """
import json, os, sys
from gpt2.cli import main
from gpt2.serving import kernel_memory

bound = kernel_memory.bound_kernel_memory

def bound_and_look():
    assert "torch" not in sys.modules
    bound()
    exec(sys.argv.pop(), globals())
    sys.stdout.flush()
    os._exit(0)

kernel_memory.bound_kernel_memory = bound_and_look
main(["serve", "--from_pretrained", "gpt2-tiny", "--port", "0"])
"""

# Multiplies 2 to 301 rows by weights of four shapes, and prints the megabytes in use after each 75 numbers of rows.
MULTIPLY = """
import ctypes, re, torch

def megabytes():
    ctypes.CDLL(None).malloc_trim(0)
    return int(re.search("Anonymous: +([0-9]+)", open("/proc/self/smaps_rollup").read())[1]) / 1000

weights = [torch.ops.mkldnn._reorder_linear_weight(torch.ones(n_out, 16), 8) for n_out in (16, 32, 48, 64)]
found = [megabytes()]
for n_rows in range(2, 302):
    for weight in weights:
        torch.ops.mkldnn._linear_pointwise(torch.ones(n_rows, 16), weight, None, "none", [], "")
    if n_rows % 75 == 1:
        found.append(megabytes())
print(json.dumps(found))
"""


def run(code: str, **environment: str) -> Any:
    """What `code` prints within `gpt2 serve`."""
    others = {name: value for name, value in os.environ.items() if name not in NAMES}
    result = subprocess.run(
        [sys.executable, "-c", SERVE, code],
        env={**others, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ["256", None, "256"]),
        ({"LRU_CACHE_CAPACITY": "7"}, ["256", None, "7"]),
        ({"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "7"}, ["7", None, "256"]),
        ({"DNNL_PRIMITIVE_CACHE_CAPACITY": "7"}, [None, "7", "256"]),
    ],
    ids=str,
)
def test_the_environment_goes_first(environment: dict[str, str], expected: list[str | None]) -> None:
    assert run(f"print(json.dumps([os.environ.get(name) for name in {NAMES}]))", **environment) == expected


@pytest.mark.skipif(
    sys.platform != "linux" or platform.libc_ver()[0] != "glibc" or platform.machine() != "x86_64",
    reason="it reads Linux's figures of memory, and oneDNN keeps such kernels on x86",
)
def test_products_of_ever_more_numbers_of_rows_take_no_more_memory() -> None:
    """With 1,024 kernels instead of 256, the second half takes 120 MB."""
    start, _, half, _, end = run(MULTIPLY)
    assert start + 10 < half, "the kernels are measured"
    assert end - half < 25
