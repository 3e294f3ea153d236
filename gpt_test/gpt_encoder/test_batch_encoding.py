"""encode_batch: the ids are those of encode, in order, for any number of processes."""

from __future__ import annotations

import mmap
import multiprocessing
import multiprocessing.process
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from gpt_config import ConfigError, InputError, InputTypeError
from gpt_encoder import CharTokenizer, GPT2Tokenizer
from gpt_encoder.batch_encoding import BatchSettings, new_slot
from gpt_test.conftest import TRAINING_TEXT

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [f"{TRAINING_TEXT[n:]} <|endoftext|> é {n}" for n in range(200)] + ["", "\ud83e\udd99", "ok", TRAINING_TEXT * 30, ""]
SMALL_JOBS = BatchSettings(job_length=2000)


@pytest.fixture
def _no_process_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", lambda _: pytest.fail("a process was started"))


@pytest.fixture
def _no_memory_to_share(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise OSError("Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)


@pytest.mark.parametrize("n_workers", [None, 1, 2, 3])
@pytest.mark.parametrize("allowed_special", [(), "all"])
def test_ids_are_those_of_encode(openai_tokenizer: GPT2Tokenizer, n_workers: int | None, allowed_special) -> None:
    expected = [openai_tokenizer.encode(text, allowed_special=allowed_special) for text in TEXTS]
    found = openai_tokenizer.encode_batch(
        iter(TEXTS), allowed_special=allowed_special, n_workers=n_workers, settings=SMALL_JOBS
    )
    assert found == expected


def test_char_tokenizer_has_encode_batch() -> None:
    characters = CharTokenizer.from_texts(TEXTS[:200])
    found = characters.encode_batch(TEXTS[:200], n_workers=2, settings=SMALL_JOBS)
    assert found == [characters.encode(text) for text in TEXTS[:200]]


def test_very_long_texts(openai_tokenizer: GPT2Tokenizer) -> None:
    """A text without blanks is never split, however long it is."""
    texts = ["a b", "\u4eba\u4e00" * 30_000, ""]
    assert openai_tokenizer.encode_batch(texts, n_workers=1) == list(map(openai_tokenizer.encode, texts))


@pytest.mark.usefixtures("_no_process_starts")
def test_short_texts_start_no_process(openai_tokenizer: GPT2Tokenizer) -> None:
    assert openai_tokenizer.encode_batch(["Hello world", ""], n_workers=8) == [[15496, 995], []]
    assert openai_tokenizer.encode_batch([]) == []
    three_jobs = [TRAINING_TEXT] * 15
    found = openai_tokenizer.encode_batch(three_jobs, n_workers=8, settings=SMALL_JOBS)
    assert found == list(map(openai_tokenizer.encode, three_jobs))


@pytest.mark.usefixtures("_no_process_starts")
def test_a_worker_of_another_pool_starts_no_process(
    openai_tokenizer: GPT2Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multiprocessing, "parent_process", object)
    found = openai_tokenizer.encode_batch(TEXTS, n_workers=2, settings=SMALL_JOBS)
    assert found == list(map(openai_tokenizer.encode, TEXTS))


def test_an_exception_of_the_iterable_is_raised(openai_tokenizer: GPT2Tokenizer) -> None:
    def texts():
        yield from [TRAINING_TEXT * 10] * 60
        raise KeyError("from the iterable")

    with pytest.raises(KeyError, match="from the iterable"):
        openai_tokenizer.encode_batch(texts(), n_workers=2, settings=SMALL_JOBS)


@pytest.mark.parametrize("n_texts", [0, 300])
def test_wrong_input_raises_the_errors_of_encode(openai_tokenizer: GPT2Tokenizer, n_texts: int) -> None:
    with pytest.raises(InputTypeError, match="must be a str, not bytes"):
        openai_tokenizer.encode_batch([TRAINING_TEXT] * n_texts + [b"bytes"], n_workers=2, settings=SMALL_JOBS)
    with pytest.raises(InputError, match="allowed_special names '<x>'"):
        openai_tokenizer.encode_batch([TRAINING_TEXT] * n_texts, allowed_special={"<x>"}, n_workers=2, settings=SMALL_JOBS)


@pytest.mark.parametrize("texts", ["one text", b"bytes", 5, None])
def test_a_single_text_is_an_error(openai_tokenizer: GPT2Tokenizer, texts: object) -> None:
    with pytest.raises(InputTypeError, match="iterable of str"):
        openai_tokenizer.encode_batch(texts)


@pytest.mark.parametrize("n_workers", [0, -1, 1.5, "2", True])
def test_n_workers_must_be_a_positive_int(openai_tokenizer: GPT2Tokenizer, n_workers: object) -> None:
    with pytest.raises(ConfigError, match="n_workers"):
        openai_tokenizer.encode_batch(["a"], n_workers=n_workers)


@pytest.mark.skipif(sys.platform != "linux", reason="only a forked process has the local class of the test")
def test_a_killed_worker_raises_input_error(small_tokenizer: GPT2Tokenizer) -> None:
    parent = os.getpid()

    class DiesInOtherProcesses(GPT2Tokenizer):
        def encode_each_packed(self, texts: Sequence[str]) -> list[bytes]:
            return [b""] * len(texts) if os.getpid() == parent else os._exit(1)

    with pytest.raises(InputError, match="n_workers=2 processes was killed"):
        DiesInOtherProcesses(small_tokenizer.vocabulary).encode_batch(TEXTS, n_workers=2, settings=SMALL_JOBS)


@pytest.mark.skipif(sys.platform != "linux", reason="only a forked process has the local class of the test")
def test_an_interrupt_cancels_the_queued_jobs(small_tokenizer: GPT2Tokenizer) -> None:
    """KeyboardInterrupt is raised while this process encodes its second job and the worker has six jobs queued."""
    parent, n_done, of_parent = os.getpid(), mmap.mmap(-1, 1), []

    class StopsInThisProcess(GPT2Tokenizer):
        def encode_each_packed(self, texts: Sequence[str]) -> list[bytes]:
            if os.getpid() != parent:
                time.sleep(0.05)
                n_done[0] += 1
            else:
                of_parent.append(texts)
                if len(of_parent) == 2:  # its first job was encoded before the fork
                    raise KeyboardInterrupt
            return [b""] * len(texts)

    with pytest.raises(KeyboardInterrupt):
        StopsInThisProcess(small_tokenizer.vocabulary).encode_batch(TEXTS, n_workers=2, settings=SMALL_JOBS)
    assert n_done[0] < 6


@pytest.mark.parametrize("slot_bytes", [4, 2400])
def test_ids_that_do_not_fit_into_shared_memory_are_sent(openai_tokenizer: GPT2Tokenizer, slot_bytes: int) -> None:
    """Most jobs, but not all, fit into 2,400 bytes."""
    settings = BatchSettings(job_length=2000, slot_bytes=slot_bytes)
    found = openai_tokenizer.encode_batch(TEXTS, n_workers=2, settings=settings)
    assert found == list(map(openai_tokenizer.encode, TEXTS))


@pytest.mark.usefixtures("_no_memory_to_share")
def test_a_system_without_shared_memory(openai_tokenizer: GPT2Tokenizer) -> None:
    assert len(new_slot(4)) == 0
    found = openai_tokenizer.encode_batch(TEXTS, n_workers=2, settings=SMALL_JOBS)
    assert found == list(map(openai_tokenizer.encode, TEXTS))


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_a_script(tmp_path: Path, start_method: str) -> None:
    """A script needs a main guard only if processes are spawned. With fork, as on Linux, it needs none."""
    if start_method == "fork" and sys.platform != "linux":
        pytest.skip("a script without a main guard works on Linux only")
    script = tmp_path / "script.py"
    script.write_text(
        "from gpt_encoder import GPT2Tokenizer\n"
        "from gpt_encoder.batch_encoding import BatchSettings\n"
        f"if {start_method == 'fork'} or __name__ == '__main__':\n"
        f"    settings = BatchSettings(job_length=100, start_method={start_method!r})\n"
        "    tokenizer = GPT2Tokenizer.from_pretrained('gpt2')\n"
        "    rows = tokenizer.encode_batch(['Hello world'] * 1000, n_workers=2, settings=settings)\n"
        "    print(rows == [[15496, 995]] * 1000)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, str(script)], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert result.stdout == "True\n"


def test_processes_are_forked_on_linux_only() -> None:
    assert BatchSettings().start_method == ("fork" if sys.platform == "linux" else "spawn")
