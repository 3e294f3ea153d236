"""encode_batch: the ids of encode, in order, whatever the number of processes."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpt_config import ConfigError, InputError, InputTypeError
from gpt_encoder import CharTokenizer, GPT2Tokenizer, batch_encoding, tokenizer
from gpt_test.conftest import TRAINING_TEXT

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [f"{TRAINING_TEXT[n:]} <|endoftext|> é {n}" for n in range(200)] + ["", "\ud83e\udd99", "ok", TRAINING_TEXT * 30, ""]


@pytest.fixture
def _small_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_encoding, "_JOB_LENGTH", 2000)


@pytest.mark.usefixtures("_small_jobs")
@pytest.mark.parametrize("n_workers", [None, 1, 2, 3])
@pytest.mark.parametrize("allowed_special", [(), "all"])
def test_ids_are_those_of_encode(openai_tokenizer: GPT2Tokenizer, n_workers: int | None, allowed_special) -> None:
    expected = [openai_tokenizer.encode(text, allowed_special=allowed_special) for text in TEXTS]
    found = openai_tokenizer.encode_batch(iter(TEXTS), allowed_special=allowed_special, n_workers=n_workers)
    assert found == expected


@pytest.mark.usefixtures("_small_jobs")
def test_every_tokenizer_has_it() -> None:
    characters = CharTokenizer.from_texts(TEXTS[:200])
    assert characters.encode_batch(TEXTS[:200], n_workers=2) == [characters.encode(text) for text in TEXTS[:200]]


def test_very_long_texts_are_not_worked_on_together(
    openai_tokenizer: GPT2Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text without a blank is in one part, however long, and would take gigabytes."""
    texts = ["a b", "\u4eba\u4e00" * 30_000, ""]
    cut = openai_tokenizer._array_encoder._cutter.cut_texts
    monkeypatch.setattr(
        openai_tokenizer._array_encoder._cutter, "cut_texts", lambda some: lengths.append(len(some)) or cut(some)
    )
    for most, expected in ((60_000, []), (1 << 21, [3])):
        lengths: list[int] = []
        monkeypatch.setattr(tokenizer, "_MOST_TOGETHER", most)
        assert openai_tokenizer.encode_batch(texts, n_workers=1) == list(map(openai_tokenizer.encode, texts))
        assert lengths == expected


def test_little_text_starts_no_process(openai_tokenizer: GPT2Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_encoding, "ProcessPoolExecutor", lambda *_: pytest.fail("a process was started"))
    assert openai_tokenizer.encode_batch(["Hello world", ""], n_workers=8) == [[15496, 995], []]
    assert openai_tokenizer.encode_batch([]) == []


@pytest.mark.usefixtures("_small_jobs")
def test_a_worker_of_another_pool_starts_no_process(
    openai_tokenizer: GPT2Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_encoding, "ProcessPoolExecutor", lambda *_: pytest.fail("a process was started"))
    monkeypatch.setattr(batch_encoding.multiprocessing, "parent_process", object)
    assert openai_tokenizer.encode_batch(TEXTS, n_workers=2) == list(map(openai_tokenizer.encode, TEXTS))


@pytest.mark.usefixtures("_small_jobs")
def test_an_error_of_the_reader_comes_through(openai_tokenizer: GPT2Tokenizer) -> None:
    def texts():
        yield from [TRAINING_TEXT * 10] * 60
        raise KeyError("from the reader")

    with pytest.raises(KeyError, match="from the reader"):
        openai_tokenizer.encode_batch(texts(), n_workers=2)


@pytest.mark.usefixtures("_small_jobs")
@pytest.mark.parametrize("n_texts", [0, 300])
def test_wrong_input_is_refused_as_by_encode(openai_tokenizer: GPT2Tokenizer, n_texts: int) -> None:
    with pytest.raises(InputTypeError, match="must be a str, not bytes"):
        openai_tokenizer.encode_batch([TRAINING_TEXT] * n_texts + [b"bytes"], n_workers=2)
    with pytest.raises(InputError, match="allowed_special names '<x>'"):
        openai_tokenizer.encode_batch([TRAINING_TEXT] * n_texts, allowed_special={"<x>"}, n_workers=2)


@pytest.mark.parametrize("texts", ["one text", b"bytes", 5, None])
def test_one_text_is_no_batch(openai_tokenizer: GPT2Tokenizer, texts: object) -> None:
    with pytest.raises(InputTypeError, match="iterable of str"):
        openai_tokenizer.encode_batch(texts)


@pytest.mark.parametrize("n_workers", [0, -1, 1.5, "2", True])
def test_n_workers_is_a_whole_number(openai_tokenizer: GPT2Tokenizer, n_workers: object) -> None:
    with pytest.raises(ConfigError, match="n_workers"):
        openai_tokenizer.encode_batch(["a"], n_workers=n_workers)


@pytest.mark.skipif(sys.platform != "linux", reason="a forked process has what the test put into the tokenizer")
@pytest.mark.usefixtures("_small_jobs")
def test_a_killed_worker_is_one_line(small_tokenizer: GPT2Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = os.getpid()

    def encode_or_die(texts: list[str]) -> list[bytes]:
        return [b""] * len(texts) if os.getpid() == parent else os._exit(1)

    monkeypatch.setattr(small_tokenizer, "encode_each_packed", encode_or_die)
    with pytest.raises(InputError, match="n_workers=2 processes was killed"):
        small_tokenizer.encode_batch(TEXTS, n_workers=2)


@pytest.mark.skipif(sys.platform != "linux", reason="a forked process has what the test put into the tokenizer")
@pytest.mark.usefixtures("_small_jobs")
def test_an_interrupt_leaves_the_rest_undone(small_tokenizer: GPT2Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C comes while this process encodes its first job beside the other, which has six waiting."""
    parent, n_done, of_parent = os.getpid(), mmap.mmap(-1, 1), []

    def encode_or_stop(texts: list[str]) -> list[bytes]:
        if os.getpid() != parent:
            time.sleep(0.05)
            n_done[0] += 1
        else:
            of_parent.append(texts)
            if len(of_parent) == 2:  # the first was encoded before the fork
                raise KeyboardInterrupt
        return [b""] * len(texts)

    monkeypatch.setattr(small_tokenizer, "encode_each_packed", encode_or_stop)
    with pytest.raises(KeyboardInterrupt):
        small_tokenizer.encode_batch(TEXTS, n_workers=2)
    assert n_done[0] < 6


@pytest.mark.usefixtures("_small_jobs")
@pytest.mark.parametrize("slot_bytes", [None, 4, 2400])
def test_ids_for_which_there_is_no_room_are_sent(
    openai_tokenizer: GPT2Tokenizer, monkeypatch: pytest.MonkeyPatch, slot_bytes: int | None
) -> None:
    """None: the system gives no memory to share. In 2,400 bytes most jobs have room, and not all."""
    if slot_bytes is None:
        monkeypatch.setattr(batch_encoding, "_new_slot", bytearray)
    else:
        monkeypatch.setattr(batch_encoding, "_SLOT_BYTES", slot_bytes)
    assert openai_tokenizer.encode_batch(TEXTS, n_workers=2) == list(map(openai_tokenizer.encode, TEXTS))


def test_a_system_without_memory_to_share(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise OSError("Cannot allocate memory")

    monkeypatch.setattr(batch_encoding.mmap, "mmap", refuse)
    assert len(batch_encoding._new_slot()) == 0


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_a_script(tmp_path: Path, platform: str) -> None:
    """On Linux it needs no main guard, for processes are forked. Elsewhere they start anew, and texts are sent to them."""
    if platform == "linux" and sys.platform != "linux":
        pytest.skip("a script without a main guard is for Linux")
    script = tmp_path / "script.py"
    script.write_text(
        "import types\n"
        "from gpt_encoder import GPT2Tokenizer, batch_encoding\n"
        f"batch_encoding.sys = types.SimpleNamespace(platform={platform!r})\n"
        "batch_encoding._JOB_LENGTH = 100\n"
        f"if {platform == 'linux'} or __name__ == '__main__':\n"
        "    rows = GPT2Tokenizer.from_pretrained('gpt2').encode_batch(['Hello world'] * 1000, n_workers=2)\n"
        "    print(rows == [[15496, 995]] * 1000)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, str(script)], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert result.stdout == "True\n"
