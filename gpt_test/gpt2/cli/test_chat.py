"""gpt2 chat: lines from a pipe, and a session in a pseudo-terminal."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpt2 import GPT2
from gpt2.finetuning.template import InstructionTemplate
from gpt2.generation.conversation import Conversation
from gpt_encoder import GPT2Tokenizer


@pytest.fixture
def chat(run_command, small_folder: Path):
    def run(*lines: str, options: tuple = (), folder: Path = small_folder):
        stdin = "".join(f"{line}\n" for line in lines).encode()
        return run_command("chat", "--from_pretrained", folder, "--max_tokens", 6, *options, stdin=stdin)

    return run


def answers(model: GPT2, tokenizer: GPT2Tokenizer, *texts: str, template: object = None, **options: object) -> str:
    conversation = Conversation(model, tokenizer, template)
    said = ["".join(conversation.answer(text, **{"max_new_tokens": 6, **options})) for text in texts]
    return "".join(f"{text}\n" for text in said)


def test_lines_are_answered(chat, small_model: GPT2, small_tokenizer: GPT2Tokenizer) -> None:
    """A line begins a new line of the text; one that begins with a blank, or is empty, continues the line."""
    result = chat("the cat", "and", " then", "", "//x")
    assert (result.status, result.err) == (0, "")
    assert result.out == answers(small_model, small_tokenizer, "the cat", "\nand", " then", "", "\n/x")


def test_options_are_set_by_their_names(chat, small_model: GPT2, small_tokenizer: GPT2Tokenizer) -> None:
    result = chat("/temperature 2", "/top-k 5", "/seed 3", "/max_tokens 4", "the cat", "/top_k none", "/top_k", "/quit", "a")
    expected = {"do_sample": True, "temperature": 2.0, "top_k": 5, "seed": 3, "max_new_tokens": 4}
    assert result.out == answers(small_model, small_tokenizer, "the cat", **expected)
    assert result.err.splitlines() == [
        "temperature 2.0, do_sample on", "top_k 5", "seed 3", "max_tokens 4", "top_k none", "top_k none"
    ]  # fmt: skip


def test_stop_strings_are_added_and_removed(chat) -> None:
    result = chat("/stop .", "/stop ,", "/stop none", "/do_sample", "/do_sample off")
    assert result.err.splitlines() == ["stop ('.',)", "stop ('.', ',')", "stop none", "do_sample on", "do_sample off"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("/temprature 1", "/temprature is not a command: use /temperature, or /help for a list"),
        ("/xyz", "/xyz is not a command: use /help for a list"),
        ("/temperature hot", "'hot' is not a valid float"),
        ("/temperature -1", "/temperature=-1"),
        ("/num_beams 2", "do_sample"),
        ("/num_samples 2", "/num_samples is not a command"),
        ("/do_sample perhaps", "'perhaps' is not a valid boolean"),
        ("/save", "/save FILE"),
        ("/save /dev/null/a", "cannot write"),
    ],
)
def test_a_wrong_command_is_one_line_and_changes_nothing(command: str, message: str, chat) -> None:
    result = chat("/do_sample", "/seed 1", command, "the cat")
    wrong = result.err.splitlines()[2:]
    assert len(wrong) == 1 and wrong[0].startswith("error: ") and message in wrong[0]
    assert (result.status, result.out) == (0, chat("/do_sample", "/seed 1", "the cat").out)


def test_reset_forgets_and_help_lists(chat, small_model: GPT2, small_tokenizer: GPT2Tokenizer) -> None:
    result = chat("the cat", "/reset", "the cat", "/help")
    assert result.out == 2 * answers(small_model, small_tokenizer, "the cat")
    assert all(text in result.err for text in ("/save FILE", "/temperature 1.0", "/seed none", "/do_sample off"))


def test_the_conversation_is_saved(chat, tmp_path: Path) -> None:
    text, data = tmp_path / "a.txt", tmp_path / "a.json"
    result = chat("the cat", f"/save {text}", "and", f"/save {text}", f"/save {data}")
    first, second = result.out.splitlines()
    assert text.read_text() == f"the cat{first}\nand{second}\n"
    saved = json.loads(data.read_text())
    assert [message["content"] for message in saved["messages"]] == ["the cat", first, "\nand", second]
    assert saved["options"]["max_tokens"] == 6
    assert "exists: save under another name" in chat(f"/save {text}").err


def test_instruction_models_answer_in_their_template(
    chat, small_model: GPT2, small_tokenizer: GPT2Tokenizer, tmp_path: Path
) -> None:
    template = InstructionTemplate(instruction="Q: {instruction}\n", response="A: ")
    small_model.save_pretrained(tmp_path, tokenizer=small_tokenizer)
    template.save(tmp_path)
    texts = ("the cat", "the dog")
    expected = answers(small_model, small_tokenizer, *texts, template=template)
    assert chat(*texts, "", folder=tmp_path).out == expected
    assert chat(*texts, folder=tmp_path, options=("--plain",)).out != expected
    (tmp_path / "instruction_template.json").unlink()  # the same as a chat template is still there
    assert chat(*texts, folder=tmp_path).out == expected
    assert (
        "--system is for models with a template" in chat(*texts, folder=tmp_path, options=("--plain", "--system", "a")).err
    )


def test_a_full_disk_ends_the_conversation(chat, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    result = chat("the cat", "and", "then")
    assert (result.status, result.err) == (1, "error: No space left on device\n")


def test_text_that_is_not_utf8_is_one_line(run_command, small_folder: Path) -> None:
    result = run_command("chat", "--from_pretrained", small_folder, "--max_tokens", 3, stdin=b"the cat\n\xff\nthe cat\n")
    assert result.status == 1 and result.err.startswith("error: standard input is not UTF-8")
    assert len(result.out.splitlines()) == 1  # the line before it was answered


class Terminal:
    """A program in a pseudo-terminal, of which it is the controlling one, so that Ctrl-C is a signal."""

    def __init__(self, *arguments: str) -> None:
        code = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); from gpt2.cli import main; main()"
        self.fd, other = os.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            stdin=other, stdout=other, stderr=other, start_new_session=True, env={**os.environ, "TERM": "dumb"},
        )  # fmt: skip
        os.close(other)
        self.text = ""

    def write(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def read_until(self, pattern: str) -> str:
        """Return the text since the last call, up to the pattern's match."""
        deadline = time.monotonic() + 120
        while not (found := re.search(pattern, self.text)):
            assert time.monotonic() < deadline and select.select([self.fd], [], [], 120)[0], self.text
            try:
                self.text += os.read(self.fd, 4096).decode(errors="replace").replace("\r", "")
            except OSError:  # Linux's end of file: the program has ended
                raise AssertionError(self.text) from None
        read, self.text = self.text[: found.end()], self.text[found.end() :]
        return read

    def end(self) -> int:
        try:
            return self.process.wait(120)
        finally:
            self.process.kill()
            os.close(self.fd)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals of this kind")
def test_a_session_in_a_terminal(small_folder: Path) -> None:
    """gpt2 generate without a prompt: editing with history, Ctrl-C in an answer and at the prompt, and Ctrl-D."""
    terminal = Terminal("generate", "--from_pretrained", str(small_folder), "--max_tokens", "5")
    try:
        terminal.read_until(r"continues your text.*\n")
        terminal.read_until("> ")
        terminal.write("the cat\n")
        answer = terminal.read_until("\n> ").partition("the cat\n")[2]
        assert answer
        terminal.write("/reset\n")
        terminal.read_until("> ")
        terminal.write("\x1b[A\x1b[A\n")  # twice the arrow up: the line before the last
        assert terminal.read_until("\n> ").endswith(answer)
        terminal.write("/max_tok\t 1000000\n")  # Tab completes
        terminal.read_until("max_tokens 1000000\n> ")
        terminal.write("the dog\n")
        terminal.read_until("the dog\n.{20}")
        terminal.write("\x03")
        terminal.read_until("\n> ")
        terminal.write("not sent")
        terminal.read_until("not sent")
        time.sleep(0.5)  # a signal that comes while readline draws a key is seen only at the next one
        terminal.write("\x03")
        terminal.read_until("\n> ")
        terminal.write("/max_tokens 3\nthe end\n")
        assert "Traceback" not in terminal.read_until("the end\n(.|\n)*\n> ")
        terminal.write("a \\\n")
        terminal.read_until(r"\.\.\. ")
        terminal.write("b\n")
        terminal.read_until("\n> ")
        terminal.write("\x04")
    finally:
        status = terminal.end() if terminal.process.poll() is None else terminal.process.returncode
    assert status == 0
