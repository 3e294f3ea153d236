"""`gpt2 finetune`, `gpt2 classify`, `gpt2 generate --instruction`: from files to answers, and one line per error."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gpt2 import GPT2
from gpt2.cli.finetune import finetune
from gpt2.finetuning.run import prepare_finetuning
from gpt2.training.run_logs import read_metrics
from gpt2.weights.files import read_tensors
from gpt2.weights.tokenizer import load_tokenizer_for
from gpt_config import ConfigError, DataError, FinetuningConfig

QUIET = ["--quiet", "--sample_tokens", 4]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    draw = random.Random(0)
    rows = [("cat" if n % 3 else "dog") for n in range(120)]
    path = tmp_path / "animals.tsv"
    lines = [f'{label}\tthe {draw.choice(["old", "small"])} {label} "went" home' for label in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def instructions(tmp_path: Path) -> Path:
    path = tmp_path / "ask.jsonl"
    rows = [{"instruction": f"Say {word}.", "output": word} for word in ("cat", "dog", "sea", "fish", "boat") * 4]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_a_classifier_learns_and_is_used(run_command: Callable, table: Path, small_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = run_command(
        "finetune", "--task", "classification", "--data", table, "--from_pretrained", small_folder, "--out", out,
        "--epochs", 6, "--learning_rate", 0.01, *QUIET,
    )  # fmt: skip
    assert result.status == 0, result.err
    assert "the first column is the label and the second the text" in result.err
    assert "96 training texts" in result.err and "12 test texts" in result.err
    assert result.out.startswith("accuracy 1.0000 on 12 test texts")
    measured = json.loads((out / "test.json").read_text())
    assert measured["confusion"] == [[8, 0], [0, 4]] and measured["f1"] == {"cat": 1.0, "dog": 1.0}
    assert any("accuracy" in line for line in read_metrics(out))
    lines = 'the small dog "went" home\n\nthe old cat "went" home\r\n' + "the old dog " * 30
    result = run_command("classify", "-", "--from_pretrained", out, stdin=lines.encode())
    assert result.status == 0 and "1 texts are longer than the 40 tokens" in result.err
    answers = [json.loads(line) for line in result.out.splitlines()]
    assert [answer["label"] for answer in answers][:2] == ["dog", "cat"] and len(answers) == 3
    assert answers[1]["text"] == 'the old cat "went" home'
    assert all(sum(answer["probabilities"].values()) == pytest.approx(1) for answer in answers)


@pytest.mark.parametrize(
    ("kind", "adapter"),
    [
        ("multi_label_classification", []),
        ("regression", ["--lora_rank", 4]),
        pytest.param("multi_label_classification", ["--lora_rank", 4], marks=pytest.mark.slow),
        pytest.param("regression", [], marks=pytest.mark.slow),
    ],
)
def test_classifiers_of_other_kinds_learn_and_are_used(
    kind: str, adapter: list, run_command: Callable, small_folder: Path, tmp_path: Path
) -> None:
    path, out, is_multi = tmp_path / "data.jsonl", tmp_path / "run", kind[0] == "m"
    animals: list[list[str]] = [["cat"], ["dog"], ["cat", "dog"], []]
    texts = ["see the cat", "see the dog", "see the dog, the cat", "see the boat"]
    labels: list = animals if is_multi else [float(len(names)) for names in animals]
    rows = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)] * 30
    path.write_text("\n".join(map(json.dumps, rows)))
    args = ["--task", "classification", "--problem_type", kind, "--data", path, "--from_pretrained", small_folder]
    result = run_command("finetune", *args, "--out", out, "--epochs", 20, "--learning_rate", 0.01, *adapter, *QUIET)
    assert result.status == 0, result.err
    assert "on 12 test texts" in result.out and ("labels: cat, dog" in result.err) == is_multi
    measured = json.loads((out / "test.json").read_text())
    assert measured["micro_f1"] > 0.9 if is_multi else measured["mse"] < (0.3 if adapter else 0.1), measured  # of 0.5
    assert any(("micro_f1" if is_multi else "rmse") in line for line in read_metrics(out))
    result = run_command("classify", "-", "--from_pretrained", out, stdin="\n".join(texts).encode())
    answers = [json.loads(line) for line in result.out.splitlines()]
    if is_multi:
        assert [answer["labels"] for answer in answers] == animals
        assert all(0 <= value <= 1 for answer in answers for value in answer["probabilities"].values())
    elif not adapter:
        assert [round(answer["probabilities"]["label"]) for answer in answers] == [1, 1, 2, 0]


def test_a_classifiers_adapter_is_used_like_a_classifier(
    run_command: Callable, table: Path, small_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    result = run_command(
        "finetune", "--task", "classification", "--data", table, "--from_pretrained", small_folder, "--out", out,
        "--epochs", 6, "--learning_rate", 0.003, "--lora_rank", 4, *QUIET,
    )  # fmt: skip
    assert result.status == 0, result.err
    assert result.out.startswith("accuracy 1.0000")
    assert {"adapter_config.json", "adapter_model.safetensors", "classifier.json"} <= {path.name for path in out.iterdir()}
    assert not (out / "model.safetensors").exists()
    result = run_command("classify", "-", "--from_pretrained", out, stdin=b'the small dog "went" home')
    assert json.loads(result.out)["label"] == "dog"
    assert "belongs to a classifier" in run_command("generate", "x", "--from_pretrained", out).err


@pytest.mark.parametrize("task", ["text", "instruction"])
def test_only_the_adapter_is_trained_and_its_folder_is_a_model(
    run_command: Callable, instructions: Path, small_folder: Path, tmp_path: Path, task: str
) -> None:
    out, data = tmp_path / "run", instructions if task == "instruction" else tmp_path / "text.txt"
    (tmp_path / "text.txt").write_text("the cat saw the dog. " * 60)
    options = ["--task", task, "--data", data, "--from_pretrained", small_folder, *QUIET]
    options += ["--template", "plain"] if task == "instruction" else []
    result = run_command("finetune", *options, "--out", out, "--lora_rank", 2, "--learning_rate", 0.02)
    assert result.status == 0, result.err
    n_learned = 2 * 2 * (24 + 72 + 24 + 24 + 24 + 96 + 96 + 24)  # layers x rank x inputs and outputs
    assert f"{n_learned:,} parameters are trained" in result.err
    assert not (out / "model.safetensors").exists()
    with_adapter, base = GPT2.from_pretrained(out), GPT2.from_pretrained(small_folder)
    ids = torch.tensor([[1, 2, 3]])
    assert not torch.allclose(with_adapter(ids), base(ids))
    losses = [line["validation_loss"] for line in read_metrics(out) if "validation_loss" in line]
    assert min(losses) < losses[0]
    result = run_command(
        "generate", *(["--instruction", "Say cat."] if task == "instruction" else ["the"]), "--from_pretrained", out
    )
    assert result.status == 0, result.err


def test_only_the_last_block_is_trained(run_command: Callable, table: Path, small_folder: Path, tmp_path: Path) -> None:
    result = run_command(
        "finetune", "--task", "classification", "--data", table, "--from_pretrained", small_folder, "--out",
        tmp_path / "run", "--max_steps", 3, "--trainable", "last_block", *QUIET,
    )  # fmt: skip
    assert result.status == 0, result.err
    before, after = read_tensors(small_folder), read_tensors(tmp_path / "run")
    changed = {name for name in before if not torch.equal(before[name], after[f"transformer.{name}"])}
    assert changed and all(name.startswith(("h.1.", "ln_f.")) for name in changed)


def test_a_model_learns_to_respond_and_is_prompted_in_its_template(
    run_command: Callable, instructions: Path, small_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    result = run_command(
        "finetune", "--task", "instruction", "--data", instructions, "--from_pretrained", small_folder, "--out", out,
        "--template", "plain", "--epochs", 40, "--learning_rate", 0.01, "--dropout", 0, "--sample_tokens", 4,
    )  # fmt: skip
    assert result.status == 0, result.err
    assert "18 training examples" in result.err and "validation loss" in result.err
    for word in ("cat", "fish"):
        options = ["--from_pretrained", out, "--max_tokens", 10]
        result = run_command("generate", "--instruction", f"Say {word}.", *options)
        assert (result.status, result.out) == (0, f"{word}\n"), result.err
    result = run_command("generate", "--instruction", "Say cat.", "--echo", *options)
    assert result.out == "Say cat.\ncat\n"


def test_training_on_text_starts_from_the_weights(run_command: Callable, small_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat saw the dog. " * 60)
    out = tmp_path / "run"
    options = ["--from_pretrained", small_folder, "--out", out, "--learning_rate", 0.01, "--sample_prompt", "the"]
    result = run_command("finetune", "--data", text, *options, "--sample_tokens", 4)
    assert result.status == 0, result.err
    losses = [line["validation_loss"] for line in read_metrics(out) if "validation_loss" in line]
    assert losses[-1] < losses[0] and "  | the" in result.err
    assert GPT2.from_pretrained(out).config.vocab_size == 300


@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize("task", ["classification", "instruction", "text"])
def test_a_resumed_run_ends_with_the_weights_of_an_unbroken_one(
    table: Path, instructions: Path, small_folder: Path, tmp_path: Path, task: str, lora_rank: int
) -> None:
    data = {"classification": table, "instruction": instructions, "text": tmp_path / "text.txt"}[task]
    (tmp_path / "text.txt").write_text("the cat saw the dog. " * 60)
    config = FinetuningConfig(
        task=task,
        max_steps=5,
        batch_size=4,
        sample_tokens=0,
        evaluations_per_epoch=8,
        context=20,
        template="plain",
        lora_rank=lora_rank,
        lora_dropout=0.1 if lora_rank else 0.0,
    )

    def made(name: str):
        return prepare_finetuning(small_folder, [data], config, tmp_path / name, is_quiet=True).trainer

    unbroken = made("unbroken")
    unbroken.train()
    first = made("broken")
    first._must_stop = lambda: first.step == 3  # type: ignore[method-assign]
    assert first.train().step == 3
    second = made("broken")
    second.load()
    second.train()
    for name, tensor in unbroken._module.state_dict().items():
        assert torch.equal(tensor, second._module.state_dict()[name]), name


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        ([], 2, "give either --out FOLDER to start a run, or --resume"),
        (["--out", "x"], 2, "name the files to train on"),
        (["--out", "x", "--data", "y", "--step", 3], 2, "--step is for --resume"),
        (["--out", "x", "--data", "y", "--epochs", 0], 2, "--epochs=0.0 must be a number above 0"),
        (["--out", "x", "--data", "y", "--lora_rank", 2, "--trainable", "last_block"], 2, "--lora_rank=2"),
        (["--out", "x", "--data", "y", "--balance"], 2, "--balance is for --task classification"),
        (["--out", "x", "--data", "y", "--problem_type", "regression"], 2, "--problem_type is for --task classification"),
        (
            ["--out", "x", "--data", "y", "--task", "classification", "--problem_type", "regression", "--balance"],
            2,
            "--balance=True needs one label for each text",
        ),
        (["--out", "x", "--data", "y", "--skip_bad"], 2, "--skip_bad is for --task classification or instruction"),
        (["--out", "x", "--data", "y", "--lora_alpha", 3], 2, "--lora_alpha is for adapters: give --lora_rank"),
        (["--out", "x", "--data", "y", "--seed", 1 << 63], 2, "must be below 2**63"),
        (["--resume", "nowhere"], 1, "nowhere contains no run to resume"),
        (["--out", "x", "--data", "nowhere.csv", "--task", "classification"], 1, "there is no file or folder nowhere.csv"),
        (["--out", "x", "--data", "nowhere.txt"], 1, "there is no file or folder nowhere.txt"),
        (["--out", "x", "--data", "y", "--context", 41], 1, "context=41 is longer than the 40 positions"),
    ],
)
def test_a_mistake_is_one_line(
    run_command: Callable, small_folder: Path, tmp_path: Path, monkeypatch, args, status: int, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    base = [] if "--resume" in args else ["--from_pretrained", small_folder]
    result = run_command("finetune", *args, *base)
    assert result.status == status
    (line,) = result.err.splitlines()
    assert line.startswith("error: ") and message in line
    assert list(tmp_path.iterdir()) == [] or "nowhere" in str(args), "no file is left"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("label\ttext\ncat\tone\ndog\ttwo\n", "too few for all parts"),
        ("label\ttext\n" + "cat\tone\n" * 9, "every row has the label 'cat'"),
        ("label\twords\ncat\tone\n", "has no columns 'label' and 'text' (it has 'label', 'words')"),
        ("", "there is no usable row"),
        ("Text\tLabel\ncat\tone\n", "has no columns 'label' and 'text' (it has 'Text', 'Label')"),
        ("kind\twords\tx\ncat\tone\ttwo\n", "has no columns 'label' and 'text' (it has 'kind', 'words', 'x')"),
        ("label\ttext\n" + "cat\tone\n" * 9 + "dog\t\n", "line 11: the field 'text' is empty"),
    ],
)
def test_data_that_cannot_be_learned_from(small_folder: Path, tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.tsv"
    path.write_text(content)
    with pytest.raises(DataError) as raised:
        prepare_finetuning(small_folder, [path], FinetuningConfig(task="classification"), tmp_path / "run")
    assert message in str(raised.value)


def test_columns_may_be_numbers(small_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "three.csv"
    path.write_text("".join(f"{n},text {n},{'yes' if n % 2 else 'no'}\n" for n in range(20)))
    config = FinetuningConfig(task="classification", text_column="2", label_column="3", max_steps=1)
    run = prepare_finetuning(small_folder, [path], config, tmp_path / "run", is_quiet=True)
    assert "16 training texts" in run.told and "labels: no, yes" in run.told


def test_a_run_overwrites_no_other_and_resumes_with_its_own_data_only(
    run_command: Callable, table: Path, small_folder: Path, tmp_path: Path
) -> None:
    args = [
        "finetune",
        "--task",
        "classification",
        "--data",
        table,
        "--from_pretrained",
        small_folder,
        "--max_steps",
        1,
        *QUIET,
    ]
    assert run_command(*args, "--out", tmp_path / "run").status == 0
    assert "already contains a run" in run_command(*args, "--out", tmp_path / "run").err
    assert "contains a model" in run_command(*args, "--out", small_folder).err
    table.write_text(table.read_text() + "cat\tanother cat\n")
    assert "the data is not what the run" in run_command("finetune", "--resume", tmp_path / "run", "--quiet").err


def test_a_run_that_ended_before_its_first_checkpoint_starts_again(
    run_command: Callable, table: Path, small_folder: Path, tmp_path: Path
) -> None:
    args = ["--task", "classification", "--data", table, "--from_pretrained", small_folder, "--max_steps", 1, *QUIET]
    out = tmp_path / "run"
    assert run_command("finetune", *args, "--out", out).status == 0
    for path in (out / "checkpoints").iterdir():
        path.unlink()
    result = run_command("finetune", "--resume", out, "--quiet")
    assert result.status == 0 and "starts again" in result.err and "done: 1 steps" in result.err
    for content in ("[]", "{}"):
        (out / "finetuning.json").write_text(content)
        assert "is damaged" in run_command("finetune", "--resume", out).err


def test_an_adapter_needs_a_whole_model_as_its_base_and_keeps_its_template(
    run_command: Callable, instructions: Path, small_folder: Path, tmp_path: Path
) -> None:
    args = ["finetune", "--task", "instruction", "--data", instructions, "--lora_rank", 2, "--max_steps", 1, *QUIET]
    args += ["--template", "plain"]
    assert run_command(*args, "--from_pretrained", small_folder, "--out", tmp_path / "one").status == 0
    result = run_command(*args, "--from_pretrained", tmp_path / "one", "--out", tmp_path / "two")
    assert result.status == 1 and "gpt2 merge" in result.err and not (tmp_path / "two").exists()
    assert run_command("merge", tmp_path / "one", "--out", tmp_path / "merged").status == 0
    result = run_command(
        "generate", "--instruction", "Say cat.", "--from_pretrained", tmp_path / "merged", "--max_tokens", 2
    )
    assert result.status == 0, result.err


def test_a_folder_called_char_keeps_its_own_vocabulary(
    run_command: Callable, small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(small_folder, "char")
    Path("text.txt").write_text("the cat saw the dog. " * 60)
    options = ["--from_pretrained", "char", "--out", "run", "--max_steps", 1, *QUIET]
    result = run_command("finetune", "--data", "text.txt", *options)
    assert result.status == 0, result.err
    assert type(load_tokenizer_for(GPT2.from_pretrained("run"))).__name__ == "GPT2Tokenizer"


def test_texts_that_are_in_two_parts_are_counted(small_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "same.csv"
    path.write_text("label,text\n" + "yes,good\nno,bad\n" * 20)
    run = prepare_finetuning(small_folder, [path], FinetuningConfig(task="classification"), tmp_path / "run", is_quiet=True)
    assert "4 test texts (4 of them also training texts)" in run.told


def test_every_field_has_its_option() -> None:
    names = {parameter.name for parameter in finetune.params}
    assert {field.name for field in dataclasses.fields(FinetuningConfig)} <= names
    assert all(getattr(parameter, "help", None) for parameter in finetune.params)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("task", "x"),
        ("epochs", 0),
        ("validation_fraction", 0.95),
        ("text_column", "label"),
        ("batch_size", 0),
        ("dropout", 1.0),
        ("test_fraction", 1),
        ("skip_bad", 1),
        ("template", 2),
    ],
)
def test_an_invalid_value_is_named(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        FinetuningConfig(**{name: value})
