"""The command line: one file a command, which parses, calls and prints. No module here imports torch when it is imported."""

from __future__ import annotations

from collections.abc import Sequence


def main(args: Sequence[str] | None = None, prog_name: str = "gpt2") -> None:
    """Run `gpt2 ...` and exit: the console script, `python -m gpt2` and `generate.py` all come here."""
    from gpt2.cli.group import cli, run

    run(cli, args, prog_name)
