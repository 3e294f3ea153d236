"""Engines that are right, wrong, or break: who is timed, and what is said of the others. And the files for the peers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gpt2 import GPT2
from gpt2.benchmark import generating
from gpt2.benchmark.agreement import Oracle
from gpt2.benchmark.engine_process import EngineApart
from gpt2.benchmark.engines import Engine, OurEngine, Place, Prompts, open_engine
from gpt2.benchmark.report import table
from gpt2.benchmark.results import LeftOutError, Results
from gpt2.benchmark.run import Bench, _able_peers, run_benchmark
from gpt2.benchmark.settings import OURS, PEERS, Settings
from gpt2.benchmark.subject import Subject, make_subject, random_model
from gpt2.benchmark.texts import Texts, texts_of
from gpt2.formats.gguf import write_gguf
from gpt_config import GPT2Config
from gpt_config.errors import DataError, InputError
from gpt_encoder import GPT2Tokenizer
from gpt_test.conftest import TRAINING_TEXT

ROOT = Path(__file__).resolve().parents[3]
TEXTS = Texts({"story": TRAINING_TEXT}, "the test's")


@pytest.fixture
def subject(small_folder: Path, tmp_path: Path) -> Subject:
    return Subject(small_folder, tmp_path)


class FakeEngine:
    """Says what `change` makes of what our model says."""

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


def measured(subject: Subject, fake: FakeEngine, monkeypatch: pytest.MonkeyPatch, sections: tuple[str, ...]) -> Results:
    """The sections with our engine and `fake`, which goes by the name of transformers."""

    def open_engine(name: str, *arguments: object) -> Engine:
        return OurEngine(*arguments) if name == OURS else fake

    monkeypatch.setattr(generating, "EngineApart", open_engine)
    settings = Settings(
        sections=sections, peers=("transformers",), dtypes=("float32",), rounds=2, prompt_tokens=6, new_tokens=4,
        prefill_tokens=(8,), batch_sizes=(3,),
    )  # fmt: skip
    environment = {"cpu": "", "cores": 1, "threads": 1, "device": "cpu", "date": "", "versions": {}}
    results = Results(environment, {"texts": "", "rounds": 2})
    generating.generating(Bench(settings, subject, TEXTS, results, lambda line: None))
    assert fake.is_closed
    return results


def test_a_peer_that_says_the_same_is_timed(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    results = measured(subject, FakeEngine(subject, list), monkeypatch, ("decode", "prefill", "batch"))
    rows = [row for row in results.rows if row.entrant.engine == "transformers"]
    assert [row.section for row in rows] == ["decode", "decode", "prefill", "batch"]
    assert all(
        row.entrant.agrees and row.value and row.times_as_fast for row in rows if row.setting != "after the first token"
    )
    [memory] = [row for row in results.rows if row.entrant.engine == "memory"]
    assert memory.value and memory.value.median == pytest.approx(results.memory["tokens_per_second"]["float32"], rel=1e-3)


def test_on_a_gpu_transformers_is_the_only_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others depend on how they were built; tokenizers do not care."""
    monkeypatch.setattr("gpt2.benchmark.run.installed_version", lambda name: "1")
    results = Results()
    assert _able_peers(Settings(device="cuda"), results) == ("transformers", "tiktoken", "tokenizers")
    assert [(item.engine, item.reason) for item in results.left_out] == [
        (peer, "is measured on a CPU alone") for peer in ("ctranslate2", "llama-cpp-python")
    ]
    assert _able_peers(Settings(), results) == PEERS


def test_a_peer_with_other_tokens_is_reported_and_not_timed(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeEngine(subject, another_third_token)
    results = measured(subject, fake, monkeypatch, ("decode",))
    [row] = [row for row in results.rows if row.entrant.engine == "transformers"]
    assert row.entrant.agrees is False and row.value is None and fake.n_calls == 1
    assert row.entrant.note.startswith("token 3 is ")
    [line] = [line for line in table(results) if "transformers" in line]
    assert " NO " in line and "not timed" in line


def test_a_peer_that_breaks_is_a_line_and_the_rest_goes_on(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    results = measured(subject, FakeEngine(subject, breaks), monkeypatch, ("decode",))
    [item] = results.left_out
    assert item.reason == "failed with RuntimeError: no kernel"
    assert [row.entrant.engine for row in results.rows] == [OURS, OURS, "memory"]


@pytest.mark.parametrize("change", [lambda rows: [row[:-1] for row in rows], lambda rows: rows[:-1], lambda rows: []])
def test_too_few_tokens_are_wrong_in_any_dtype(subject: Subject, change: Callable) -> None:
    fake, prompts = FakeEngine(subject, change), [[1, 2, 3], [4, 5, 6]]
    fake.dtype = "int8"
    assert Oracle(subject.folder).judge(fake, prompts, 4, fake.generate(prompts, 4)).agrees is False


def test_what_a_lower_precision_says_is_counted_not_judged(subject: Subject) -> None:
    fake, prompts = FakeEngine(subject, another_third_token), [[1, 2, 3], [4, 5, 6]]
    fake.dtype = "int8"
    entrant = Oracle(subject.folder).judge(fake, prompts, 4, fake.generate(prompts, 4))
    assert entrant.agrees is None and entrant.note == "4 of 8 tokens until it differs"


def test_a_tie_is_no_difference(small_model: GPT2, small_tokenizer: GPT2Tokenizer, tmp_path: Path) -> None:
    """Two tokens with one embedding have one logit: either is right, and so is what follows."""
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
    assert entrant.agrees is True and entrant.note == "the same up to a tie at token 1"


def test_random_weights_do_not_say_one_thing_only() -> None:
    """Else any engine would pass: weights as they are drawn for training repeat the last token."""
    config = GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    prompt = torch.arange(8)[None]
    ids = random_model(config, 0).generate(prompt, max_new_tokens=40, stop_at_eot=False)[0, 8:]
    assert len(set(ids.tolist())) > 10


def test_gguf_has_every_weight_under_its_name(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held against the model; the gguf package itself is replaced by one that only keeps what it is given."""
    kept: dict[str, tuple[np.ndarray, object]] = {}
    metadata: dict[str, object] = {}

    class Writer:
        def __init__(self, path: Path, architecture: str) -> None:
            assert architecture == "gpt2"

        def add_tensor(self, name: str, values: np.ndarray, raw_dtype: object = None) -> None:
            kept[name] = (values, raw_dtype)

        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *values: metadata.__setitem__(name, values)

    kinds = SimpleNamespace(F32="F32", F16="F16", BF16="BF16", Q8_0="Q8_0")
    quants = SimpleNamespace(quantize=lambda values, kind: values)
    monkeypatch.setitem(sys.modules, "gguf", SimpleNamespace(GGUFWriter=Writer, GGMLQuantizationType=kinds, quants=quants))
    write_gguf(subject, subject.work / "model.gguf", "int8")
    parameters = GPT2.from_pretrained(subject.folder).state_dict()
    assert len(kept) == len(parameters) + 1  # the head
    for name, theirs, kind in (
        ("wte.weight", "token_embd.weight", "Q8_0"), ("wte.weight", "output.weight", "Q8_0"),
        ("wpe.weight", "position_embd.weight", None), ("ln_f.bias", "output_norm.bias", None),
        ("h.1.attn.c_attn.weight", "blk.1.attn_qkv.weight", "Q8_0"),
        ("h.0.attn.c_proj.bias", "blk.0.attn_output.bias", None),
        ("h.1.mlp.c_fc.weight", "blk.1.ffn_up.weight", "Q8_0"), ("h.0.mlp.c_proj.weight", "blk.0.ffn_down.weight", "Q8_0"),
        ("h.0.ln_1.weight", "blk.0.attn_norm.weight", None), ("h.1.ln_2.bias", "blk.1.ffn_norm.bias", None),
    ):  # fmt: skip
        expected = parameters[name].numpy()
        is_transposed = name.startswith("h.") and expected.ndim == 2
        assert np.array_equal(kept[theirs][0], expected.T if is_transposed else expected), name
        assert kept[theirs][1] == kind, name
    [tokens] = metadata["add_token_list"]
    assert len(tokens) == subject.config.vocab_size and metadata["add_head_count"] == (3,)


def test_the_subject_of_a_name_is_that_model(small_folder: Path, tmp_path: Path) -> None:
    made = make_subject(str(small_folder), "gpt2", 0, tmp_path)
    ours, theirs = (GPT2.from_pretrained(folder).state_dict() for folder in (made.folder, small_folder))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert made.tokenizer.encode("the cat") == Subject(small_folder, tmp_path).tokenizer.encode("the cat")


@pytest.mark.skipif(sys.platform == "win32", reason="signals are those of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("last_words", ["", "lambda: 1 / 0", "lambda: os.kill(os.getpid(), 2)"])
def test_a_signal_leaves_no_temporary_folder(number: signal.Signals, last_words: str, tmp_path: Path) -> None:
    """Whatever goes wrong in the last words, another signal included."""
    code = (
        "import os\nfrom gpt2.benchmark.subject import temporary_folder\n"
        f"with temporary_folder({last_words}) as folder:\n"
        f"    print(folder, flush=True)\n    os.kill(os.getpid(), {int(number)})\n"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == (-signal.SIGINT if "kill" in last_words else -number) and result.stderr == ""
    assert str(tmp_path) in result.stdout and not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="signals are those of POSIX")
def test_a_signal_does_not_lose_what_was_measured(small_folder: Path, tmp_path: Path) -> None:
    """Here it comes with the second section; a first one ends silently."""
    (tmp_path / "story.txt").write_text("the cat sat " * 20)
    code = (
        "import os, sys\nimport gpt2.benchmark.training\nfrom gpt2.cli import main\n"
        "gpt2.benchmark.training.training = lambda bench: os.kill(os.getpid(), 2)\n"
        "main(sys.argv[1:])\n"
    )
    options = [
        "--from_pretrained",
        small_folder,
        "--text",
        tmp_path / "story.txt",
        "--peers",
        "none",
        "--rounds",
        1,
        "--train_context",
        8,
    ]
    command = [sys.executable, "-c", code, "benchmark", *map(str, options), "--sections"]
    result = subprocess.run([*command, "training"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == -signal.SIGINT and not result.stdout and "Traceback" not in result.stderr
    reader, writer = os.pipe()
    os.close(reader)
    for stdout in (subprocess.PIPE, writer):  # by then `tee` may be gone
        result = subprocess.run(
            [*command, "tokenizer,training"], cwd=ROOT, stdout=stdout, stderr=subprocess.PIPE, text=True
        )  # fmt: skip
        assert result.returncode == -signal.SIGINT and "Traceback" not in result.stderr
        values = json.loads((result.stdout or result.stderr).splitlines()[-1])
        assert {row["section"] for row in values["rows"]} == {"tokenizer"}
        assert [item["reason"] for item in values["left_out"]] == ["stopped by a signal, amid what was being measured"]
    os.close(writer)


def test_an_error_leaves_no_temporary_folder(small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    settings = Settings(sections=("decode",), peers=(), prompt_tokens=40)
    with pytest.raises(InputError, match=r"prompt_tokens \+ new_tokens is 168, and the model sees 40 tokens"):
        run_benchmark(settings, str(small_folder), "gpt2", TEXTS, lambda line: None)
    assert not list(tmp_path.iterdir())


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


def test_an_engine_apart_says_what_it_says_here(subject: Subject) -> None:
    prompts = [[1, 2, 3], [4, 5]]
    here, apart = (kind(OURS, subject.folder, subject, "float32", Place(1)) for kind in (open_engine, EngineApart))
    assert apart.generate(prompts, 4) == here.generate(prompts, 4)
    with pytest.raises(LeftOutError, match="InputError: token id 300 is outside the vocabulary"):
        apart.generate([[300]], 4)
    assert apart.generate(prompts, 2) == here.generate(prompts, 2)
    apart._process.kill()
    apart._process.join()
    with pytest.raises(LeftOutError, match="its process ended"):
        apart.generate([[1]], 4)
    apart.close()


def test_an_engine_apart_that_cannot_be_opened_is_left_out(subject: Subject, tmp_path: Path) -> None:
    with pytest.raises(LeftOutError, match="ModelNotFoundError: "):
        EngineApart(OURS, tmp_path / "none", subject, "float32", Place(1))
