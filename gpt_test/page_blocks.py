"""The code blocks of README.md and docs/: what they are, and how those of one page are run. It knows no page.

The blocks of a page run in order in one folder, so that one can use what the blocks above it wrote. Python blocks share
their names too. What a block is, is seen in its language and in a comment on the line before it:

    bash        a script, which must succeed
    console     lines that begin with "$ " are commands, and the lines after each are all that it prints. "..." stands for
                anything. If "error: " is in the output, the command must fail, and otherwise succeed.
    python      a program; warnings are errors
    others      are not run; after `<!-- output -->` they are what the block above prints to standard output
    <!-- slow -->   before a block: it runs with -m slow only, and no other block depends on it
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

RUN_LANGUAGES = ("bash", "console", "python")
LANGUAGES = (*RUN_LANGUAGES, "", "json", "text", "yaml")

_FENCE = re.compile(r"^(?P<fence>`{3,})(?P<language>[^\n`]*)\n(?P<text>.*?)^(?P=fence) *$", re.MULTILINE | re.DOTALL)
_MARK = re.compile(r"<!-- (\w+) -->\s*$")
# Lines that set up or check an environment. They cannot run inside the tests.
_SETS_UP = re.compile(r"(pip install|python3? -m venv|\. \.venv|git clone|cd |pytest|bash \.ci|pre-commit|mkdocs)\b.*")
_SECONDS = 600


@dataclass(frozen=True)
class Block:
    """One fenced block. `language` is all that stands after the backticks; `output` is what it must print, if known."""

    page: str
    line: int
    language: str
    text: str
    mark: str = ""
    output: str | None = None

    @property
    def place(self) -> str:
        """Page and line, as an editor opens them."""
        return f"{self.page}:{self.line}"

    @property
    def is_run(self) -> bool:
        """Whether it is a program."""
        return self.language in RUN_LANGUAGES


def read_blocks(path: Path, page: str) -> list[Block]:
    """The blocks of a page, each with the output that the next one shows."""
    text, blocks = path.read_text(encoding="utf-8"), []
    for found in _FENCE.finditer(text):
        before = text[: found.start()]
        mark = _MARK.search(before)
        line = before.count("\n") + 1
        block = Block(page, line, found["language"].strip(), found["text"], mark[1] if mark else "")
        if block.mark == "output":
            assert blocks and blocks[-1].is_run, f"{block.place} is the output of no block"
            blocks[-1] = replace(blocks[-1], output=block.text)
        blocks.append(block)
    return blocks


def without_blocks(text: str) -> str:
    """A page with empty lines in place of its blocks."""
    return _FENCE.sub(lambda found: "\n" * found[0].count("\n"), text)


def commands_of(text: str) -> Iterator[tuple[str, str]]:
    """The commands of a console block, each with the output below it.

    >>> list(commands_of("$ echo 1\\n1\\n$ true\\n"))
    [('echo 1', '1\\n'), ('true', '')]
    """
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        lines = part.splitlines(keepends=True)
        n_lines = next(n for n, line in enumerate(lines, start=1) if not line.endswith("\\\n"))
        yield "".join(lines[:n_lines]).rstrip("\n"), "".join(lines[n_lines:])


def is_output(printed: str, expected: str) -> bool:
    """Whether `printed` is `expected`, in which "..." stands for anything, and alone on a line for any lines.

    On a line with "..." any number of blanks is as good as another, so that columns can stay aligned.

    >>> is_output("a 1\\nb\\nc\\n", "a ...\\n...\\nc\\n"), is_output("a 12  b\\n", "a ... b\\n"), is_output("a\\n", "b\\n")
    (True, True, False)
    """
    parts = []
    for line in expected.splitlines():
        if line.strip() == "...":
            parts.append(r"(?:.*\n)*?")
        else:
            pattern = re.escape(line.rstrip())
            if "..." in line:
                pattern = re.sub(r"(?:\\ )+", " +", pattern.replace(re.escape("..."), ".*"))
            parts.append(pattern + r" *\n")
    return re.fullmatch("".join(parts), printed if printed.endswith("\n") or not printed else printed + "\n") is not None


def runnable(script: str) -> str:
    """`script` without what sets up an environment, so that the rest of it can run inside the tests.

    >>> runnable("pip install -r requirements.txt && python generate.py x\\npytest gpt_test\\n")
    'python generate.py x\\n'
    """
    lines = []
    for line in script.splitlines(keepends=True):
        commands = line.rstrip("\n").split(" && ")
        while commands and _SETS_UP.fullmatch(commands[0]):
            del commands[0]
        if commands:
            lines.append(" && ".join(commands) + "\n")
    return "".join(lines)


class PageRun:
    """Runs blocks of one page, in their order, in `folder`. Use it in a `with` block."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._folder, self._environment = folder, environment
        self._python: subprocess.Popen[str] | None = None

    def __enter__(self) -> PageRun:
        return self

    def __exit__(self, *_: object) -> None:
        if self._python is not None:
            self._python.communicate()  # closes its input, at which it ends

    def run(self, block: Block) -> str:
        """What is wrong with the block; "" if nothing is."""
        if block.language == "python":
            printed, problem = self._run_python(block.text)
            return problem or _difference(printed, block.output)
        if block.language == "bash":
            printed, status = self._run_shell(["-e", "-c", runnable(block.text)])
            return f"status {status}:\n{printed}" if status else _difference(printed, block.output)
        return next(filter(None, (self._wrong_command(*pair) for pair in commands_of(block.text))), "")

    def _wrong_command(self, command: str, expected: str) -> str:
        if not runnable(command):
            return ""
        printed, status = self._run_shell(["-c", runnable(command)])
        if bool(status) != bool(re.search("^error: ", expected, re.MULTILINE)):
            return f"$ {command}\nstatus {status}:\n{printed}"
        difference = _difference(printed, expected)
        return difference and f"$ {command}\n{difference}"

    def _run_shell(self, arguments: Sequence[str]) -> tuple[str, int]:
        done = subprocess.run(
            ["bash", *arguments],
            cwd=self._folder,
            env=dict(self._environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            timeout=_SECONDS,
        )
        return done.stdout, done.returncode

    def _run_python(self, text: str) -> tuple[str, str]:
        if self._python is None or self._python.poll() is not None:
            self._python = subprocess.Popen(
                ["python", "-m", "gpt_test.page_session"],
                cwd=self._folder,
                env=dict(self._environment),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                encoding="utf-8",
            )
        assert self._python.stdin is not None and self._python.stdout is not None
        self._python.stdin.write(json.dumps(text) + "\n")
        self._python.stdin.flush()
        answer = self._python.stdout.readline()
        if not answer:
            return "", f"Python ended with status {self._python.wait()}"
        printed, problem = json.loads(answer)
        return printed, problem


def _difference(printed: str, expected: str | None) -> str:
    if expected is None or is_output(printed, expected):
        return ""
    return f"prints:\n{printed}\ninstead of:\n{expected}"
