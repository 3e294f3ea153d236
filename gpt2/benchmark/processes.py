"""Python in a process of its own, with this package importable and a number of threads; what it printed comes back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import gpt2
from gpt2.benchmark.results import LeftOutError


def run_python(arguments: list[str], threads: int) -> str:
    """The standard output of `python ARGUMENTS`. LeftOutError with the last line of its errors if it fails."""
    root = str(Path(gpt2.__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    result = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, encoding="utf-8")
    if result.returncode < 0:
        raise LeftOutError(f"was ended by signal {-result.returncode}: most likely there was not enough memory")
    if result.returncode:
        raise LeftOutError(f"failed: {(result.stderr.strip().splitlines() or ['no message'])[-1]}")
    return result.stdout
