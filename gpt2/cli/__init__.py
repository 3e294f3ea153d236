"""The command line: one file a command, which parses, calls and prints. No module here imports torch when it is imported."""

from __future__ import annotations

import atexit
import gc
import signal
from collections.abc import Sequence


def main(args: Sequence[str] | None = None, prog_name: str = "gpt2", command: str | None = None) -> None:
    """Run `gpt2 ...` and exit: the console script, `python -m gpt2` and `generate.py` all come here.

    With `command` it is that command alone, as if it were a program of its own.
    """
    # Ctrl-C ends the process as it ends any other: at once and without a traceback, while torch is being imported too,
    # where Python's own handler raises into C code that may lose the exception.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # As it ends, Python would look through all objects for garbage: with torch's among them for a third of a second.
    atexit.register(gc.freeze)
    from gpt2.cli.group import load_command, run
    from gpt_config.cores import limit_spinning

    limit_spinning()  # before torch is imported
    run(load_command(command), args, prog_name)
