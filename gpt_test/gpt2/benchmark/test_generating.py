"""Engines that are right, wrong or fail: which of them are timed, and what the results say about the others."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gpt2 import GPT2
from gpt2.benchmark.agreement import Oracle
from gpt2.benchmark.bench import Bench, Parts
from gpt2.benchmark.engine import Engine, Place, Prompts
from gpt2.benchmark.engine_process import EngineApart
from gpt2.benchmark.engines import OurEngine, open_engine
from gpt2.benchmark.generating import generating
from gpt2.benchmark.report import table
from gpt2.benchmark.results import LeftOutError, Results
from gpt2.benchmark.run import able_peers, run_benchmark
from gpt2.benchmark.settings import OURS, PEERS, Settings
from gpt2.benchmark.subject import Subject, make_subject, random_model
from gpt2.benchmark.texts import Texts, texts_of
from gpt_config import GPT2Config
from gpt_config.errors import DataError, InputError
from gpt_encoder import GPT2Tokenizer
from gpt_test.conftest import TRAINING_TEXT

TEXTS = Texts({"story": TRAINING_TEXT}, "the test's")


@pytest.fixture
def subject(small_folder: Path, tmp_path: Path) -> Subject:
    return Subject(small_folder, tmp_path)


class FakeEngine:
    """An engine that returns our model's ids after `change`."""

    name, dtype = "transformers", "float32"

    def __init__(self, subject: Subject, change: Callable[[list[list[int]]], list[list[int]]]) -> None:
        self._ours = OurEngine(subject.folder, subject, "float32", Place(1))
        self._change = change
        self.n_calls = 0
        self.is_closed = False

    def generate(self, prompts: Prompts, n_new: int) -> list[list[int]]:
        self.n_calls += 1
        return self._change(self._ours.generate(prompts, n_new))

    def close(self) -> None:
        self.is_closed = True


def another_third_token(rows: list[list[int]]) -> list[list[int]]:
    return [row if len(row) < 3 else [*row[:2], (row[2] + 1) % 256, *row[3:]] for row in rows]


def breaks(rows: list[list[int]]) -> list[list[int]]:
    raise RuntimeError("no kernel\nfor this processor")


def measured(subject: Subject, fake: FakeEngine, sections: tuple[str, ...]) -> Results:
    """The results of the sections with our engine and `fake`, which is named transformers."""

    def open_engine(name: str, *arguments: object) -> Engine:
        return OurEngine(*arguments) if name == OURS else fake

    settings = Settings(
        sections=sections, peers=("transformers",), dtypes=("float32",), rounds=2, prompt_tokens=6, new_tokens=4,
        prefill_tokens=(8,), batch_sizes=(3,),
    )  # fmt: skip
    environment = {"cpu": "", "cores": 1, "threads": 1, "device": "cpu", "date": "", "versions": {}}
    results = Results(environment, {"texts": "", "rounds": 2})
    generating(Bench(settings, subject, TEXTS, results, lambda line: None, Parts(open_engine=open_engine)))
    assert fake.is_closed
    return results


def test_a_peer_with_the_same_ids_is_timed(subject: Subject) -> None:
    results = measured(subject, FakeEngine(subject, list), ("decode", "prefill", "batch"))
    rows = [row for row in results.rows if row.entrant.engine == "transformers"]
    assert [row.section for row in rows] == ["decode", "decode", "prefill", "batch"]
    assert all(
        row.entrant.agrees and row.value and row.times_as_fast for row in rows if row.setting != "after the first token"
    )
    [memory] = [row for row in results.rows if row.entrant.engine == "memory"]
    assert memory.value and memory.value.median == pytest.approx(results.memory["tokens_per_second"]["float32"], rel=1e-3)


def test_on_a_gpu_transformers_is_the_only_peer() -> None:
    """The GPU support of the others depends on how they were built. Tokenizers always run on a CPU."""
    results = Results()
    assert able_peers(Settings(device="cuda"), results, lambda name: "1") == ("transformers", "tiktoken", "tokenizers")
    assert [(item.engine, item.reason) for item in results.left_out] == [
        (peer, "is measured on a CPU only") for peer in ("ctranslate2", "llama-cpp-python")
    ]
    assert able_peers(Settings(), results, lambda name: "1") == PEERS


def test_without_transformers_one_line_names_the_extra() -> None:
    """ctranslate2 also needs transformers, to convert the model."""
    results = Results()
    able = able_peers(Settings(), results, lambda name: None if name == "transformers" else "1")
    assert able == ("llama-cpp-python", "tiktoken", "tokenizers")
    reason = "transformers not installed (pip install '.[benchmark]')"
    assert [(item.engine, item.reason) for item in results.left_out] == [("transformers", reason), ("ctranslate2", reason)]


def test_a_peer_with_other_tokens_is_reported_and_not_timed(subject: Subject) -> None:
    fake = FakeEngine(subject, another_third_token)
    results = measured(subject, fake, ("decode",))
    [row] = [row for row in results.rows if row.entrant.engine == "transformers"]
    assert row.entrant.agrees is False and row.value is None and fake.n_calls == 1
    assert row.entrant.note.startswith("token 3 is ")
    [line] = [line for line in table(results) if "transformers" in line]
    assert " NO " in line and "not timed" in line


def test_a_peer_that_fails_is_left_out_and_the_others_are_timed(subject: Subject) -> None:
    results = measured(subject, FakeEngine(subject, breaks), ("decode",))
    [item] = results.left_out
    assert item.reason == "failed with RuntimeError: no kernel"
    assert [row.entrant.engine for row in results.rows] == [OURS, OURS, "memory"]


@pytest.mark.parametrize("change", [lambda rows: [row[:-1] for row in rows], lambda rows: rows[:-1], lambda rows: []])
def test_too_few_tokens_are_wrong_in_any_dtype(subject: Subject, change: Callable) -> None:
    fake, prompts = FakeEngine(subject, change), [[1, 2, 3], [4, 5, 6]]
    fake.dtype = "int8"
    assert Oracle(subject.folder).judge(fake, prompts, 4, fake.generate(prompts, 4)).agrees is False


def test_equal_tokens_of_a_lower_precision_are_counted(subject: Subject) -> None:
    fake, prompts = FakeEngine(subject, another_third_token), [[1, 2, 3], [4, 5, 6]]
    fake.dtype = "int8"
    entrant = Oracle(subject.folder).judge(fake, prompts, 4, fake.generate(prompts, 4))
    assert entrant.agrees is None and entrant.note == "4 of 8 tokens before the first difference"


def test_a_tie_is_not_a_difference(small_model: GPT2, small_tokenizer: GPT2Tokenizer, tmp_path: Path) -> None:
    """Two tokens with equal embeddings have equal logits, so both are right, and later tokens are not compared."""
    prompt = [[1, 2, 3]]
    model = GPT2(small_model.config).eval()
    model.load_state_dict(small_model.state_dict())
    token = model.generate(torch.tensor(prompt), max_new_tokens=1)[0, -1].item()
    twin = (token + 1) % 256
    with torch.no_grad():
        model.wte.weight[twin] = model.wte.weight[token]
    model.save_pretrained(tmp_path / "model", tokenizer=small_tokenizer)
    subject = Subject(tmp_path / "model", tmp_path)
    oracle = Oracle(subject.folder)
    [expected] = oracle.ids(prompt, 3)
    assert expected[0] in (token, twin)
    fake = FakeEngine(subject, lambda rows: [[token + twin - rows[0][0], *rows[0][1:]]])
    entrant = oracle.judge(fake, prompt, 3, fake.generate(prompt, 3))
    assert entrant.agrees is True and entrant.note == "equal up to a tie at token 1"


def test_random_weights_generate_varied_tokens() -> None:
    """Weights as initialised for training repeat the last token, which any engine gets right."""
    config = GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    prompt = torch.arange(8)[None]
    ids = random_model(config, 0).generate(prompt, max_new_tokens=40, stop_at_eot=False)[0, 8:]
    assert len(set(ids.tolist())) > 10


def test_a_named_subject_is_that_model(small_folder: Path, tmp_path: Path) -> None:
    made = make_subject(str(small_folder), "gpt2", 0, tmp_path)
    ours, theirs = (GPT2.from_pretrained(folder).state_dict() for folder in (made.folder, small_folder))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert made.tokenizer.encode("the cat") == Subject(small_folder, tmp_path).tokenizer.encode("the cat")


def test_an_error_leaves_no_temporary_folder(small_folder: Path, tmp_path: Path) -> None:
    made: list[Path] = []
    settings = Settings(sections=("decode",), peers=(), prompt_tokens=40)
    with pytest.raises(InputError, match=r"prompt_tokens \+ new_tokens is 168, and the model sees 40 tokens"):
        run_benchmark(
            settings, str(small_folder), "gpt2", TEXTS, lambda line: made.extend(tmp_path.iterdir()),
            parts=Parts(temporary_root=tmp_path),
        )  # fmt: skip
    assert made and not list(tmp_path.iterdir())


def test_texts(tmp_path: Path) -> None:
    texts = texts_of(None)
    assert list(texts.by_name) == ["prose", "code"] and all(len(text) > 100_000 for text in texts.by_name.values())
    assert "standard library of Python" in texts.described()
    path = tmp_path / "mine.txt"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match="not UTF-8"):
        texts_of(str(path))
    path.write_text(" \n")
    with pytest.raises(DataError, match="is empty"):
        texts_of(str(path))
    path.write_text("the cat")
    assert texts_of(str(path)).prompts == "the cat" and json.dumps(texts_of(str(path)).described())


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (signal.SIGKILL, "its process was ended by SIGKILL, most likely because memory ran out"),
        (signal.SIGSEGV, "its process was ended by SIGSEGV"),
    ],
)
def test_an_engine_in_another_process_returns_the_same_ids(subject: Subject, number: int, reason: str) -> None:
    prompts, others = [[1, 2, 3], [4, 5]], set(multiprocessing.active_children())
    here, apart = (kind(OURS, subject.folder, subject, "float32", Place(1)) for kind in (open_engine, EngineApart))
    assert apart.generate(prompts, 4) == here.generate(prompts, 4)
    with pytest.raises(LeftOutError, match="InputError: token id 300 is outside the vocabulary"):
        apart.generate([[300]], 4)
    assert apart.generate(prompts, 2) == here.generate(prompts, 2)
    for process in set(multiprocessing.active_children()) - others:
        assert process.pid
        os.kill(process.pid, number)
        process.join()
    with pytest.raises(LeftOutError, match=f"^{reason}$"):
        apart.generate([[1]], 4)
    apart.close()


def test_an_engine_that_cannot_be_opened_in_another_process_is_left_out(subject: Subject, tmp_path: Path) -> None:
    with pytest.raises(LeftOutError, match="ModelNotFoundError: "):
        EngineApart(OURS, tmp_path / "none", subject, "float32", Place(1))
