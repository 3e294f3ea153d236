"""The command line: a file per command, which parses, calls and prints. Importing a module of it does not import torch."""

from __future__ import annotations

import atexit
import gc
import signal
from collections.abc import Sequence


def main(args: Sequence[str] | None = None, prog_name: str = "gpt2", command: str | None = None) -> None:
    """Run `gpt2 ...` and exit. The console script, `python -m gpt2` and `generate.py` call this.

    With `command` only that command is run, as a program of its own.
    """
    # Ctrl-C ends the process at once and without a traceback. Python's own handler would raise KeyboardInterrupt, which
    # torch's C code may lose while torch is being imported.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # At exit Python searches all objects for garbage, which takes 0.3 s with those of torch. Frozen objects are skipped.
    atexit.register(gc.freeze)
    from gpt2.cli.group import load_command, run
    from gpt_config.cores import limit_spinning

    limit_spinning()  # before torch is imported
    run(load_command(command), args, prog_name)
