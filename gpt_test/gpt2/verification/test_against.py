"""`gpt2 verify FILE --against FOLDER`: files of every format pass, and a changed number, token or size does not."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch

from gpt2 import GPT2
from gpt2.formats.export import export_model
from gpt2.pretrained import save_model
from gpt2.verification import Outcome, Status
from gpt2.verification.against import compare
from gpt_config import GPT2Config
from gpt_encoder import CharTokenizer, GPT2Tokenizer, train_bpe
from gpt_test.conftest import TRAINING_TEXT, random_model

PACKAGES = {"gguf": "gguf", "onnx": "onnxruntime", "ctranslate2": "ctranslate2"}
KINDS = [
    ("openai", "float32"), ("nanogpt", "float16"), ("llmc", "float32"), ("llmc", "bfloat16"), ("gguf", "float32"),
    ("gguf", "float16"), ("gguf", "bfloat16"), ("gguf", "q8_0"), ("onnx", "float32"), ("onnx", "int8"),
    ("ctranslate2", "float32"), ("ctranslate2", "float16"), ("ctranslate2", "int8"), ("safetensors", "float32"),
    ("safetensors", "float16"), ("safetensors", "bfloat16"),
]  # fmt: skip

# One of each reader of rounded weights.
QUICK = [("nanogpt", "float16"), ("llmc", "bfloat16"), ("gguf", "q8_0"), ("onnx", "int8"), ("ctranslate2", "int8")]

# The kinds of numbers in a file, where they are not all of its dtype.
MIXED = {
    ("gguf", "float16"): {"float16", "float32"}, ("gguf", "bfloat16"): {"bfloat16", "float32"},
    ("gguf", "q8_0"): {"q8_0", "float32"}, ("onnx", "int8"): {"uint8", "float32"},
    ("ctranslate2", "int8"): {"int8", "float32"},
}  # fmt: skip


@pytest.fixture(scope="module")
def models(small_tokenizer: GPT2Tokenizer) -> dict[str, GPT2]:
    """A model for each activation function; the matrices have whole groups of 32 weights."""
    end = small_tokenizer.eot_token_id
    config = GPT2Config(
        vocab_size=300, n_positions=40, n_embd=64, n_layer=2, n_head=4, bos_token_id=end, eos_token_id=end
    )  # fmt: skip
    return {name: random_model(dataclasses.replace(config, activation_function=name)) for name in ("gelu", "gelu_new")}


@pytest.fixture(scope="module")
def folders(
    models: dict[str, GPT2], small_tokenizer: GPT2Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("against")
    for name, model in models.items():
        save_model(model, place / name, tokenizer=small_tokenizer)
    return {name: place / name for name in models}


def statuses(outcomes: list[Outcome]) -> dict[str, str]:
    return {outcome.part: outcome.status.value for outcome in outcomes}


@pytest.mark.parametrize(("form", "dtype"), KINDS)
def test_a_written_file_is_the_model_that_it_was_made_from(
    form: str, dtype: str, models: dict[str, GPT2], folders: dict[str, Path], small_tokenizer: GPT2Tokenizer, tmp_path: Path
) -> None:
    if package := PACKAGES.get(form):
        pytest.importorskip(package, reason=f"{package} is not installed (pip install -r requirements-dev.txt)")
    kind = "gelu" if form == "nanogpt" else "gelu_new"
    export_model(models[kind], small_tokenizer, tmp_path / "file", to=form, dtype=dtype)
    outcomes = list(compare(tmp_path / "file", folders[kind]))
    found = statuses(outcomes)
    is_run_elsewhere = form in ("onnx", "ctranslate2")
    has_tokenizer = form in ("openai", "gguf", "safetensors")
    assert list(found) == [
        *([] if is_run_elsewhere else ["sizes"]), "weights", *(["ranges"] if dtype == "q8_0" else []),
        *(["tokens"] if has_tokenizer else []), "logits", "greedy ids",
    ]  # fmt: skip
    assert {outcome.dtype for outcome in outcomes if outcome.part == "weights"} == MIXED.get((form, dtype), {dtype})
    assert {outcome.dtype for outcome in outcomes if outcome.part != "weights"} == {dtype}
    rounded = [outcome for outcome in outcomes if outcome.part == "weights" and outcome.dtype != "float32"]
    assert all(outcome.absolute for outcome in rounded)  # rounded weights are compared, not the model itself
    has_vnni = form != "ctranslate2" or dtype != "int8" or torch.cpu._is_vnni_supported()
    for outcome in outcomes:
        if outcome.part != "greedy ids" and (has_vnni or outcome.part != "logits"):  # see docs/convert.md
            assert outcome.status == Status.PASS, outcome
    logits = next(outcome for outcome in outcomes if outcome.part == "logits")
    assert logits.tolerance is not None and (logits.tolerance.value == 1e-4 or dtype == "int8")
    assert found["greedy ids"] in (("pass",) if dtype == "float32" else ("pass", "warning"))


@pytest.mark.parametrize(
    ("form", "dtype"),
    [pair if pair in QUICK else pytest.param(*pair, marks=pytest.mark.slow) for pair in KINDS],
)
def test_a_file_with_one_wrong_weight_is_noticed(
    form: str, dtype: str, models: dict[str, GPT2], folders: dict[str, Path], tmp_path: Path, small_tokenizer: GPT2Tokenizer
) -> None:
    """A weight of one matrix has another sign, which changes the logits less than rounding to 8 bits does."""
    if package := PACKAGES.get(form):
        pytest.importorskip(package, reason=f"{package} is not installed (pip install -r requirements-dev.txt)")
    kind = "gelu" if form == "nanogpt" else "gelu_new"
    model = copy.deepcopy(models[kind])
    with torch.no_grad():
        model.state_dict()["h.1.mlp.c_proj.weight"][5, 7].neg_()
    export_model(model, small_tokenizer, tmp_path / "file", to=form, dtype=dtype)
    wrong = [outcome for outcome in compare(tmp_path / "file", folders[kind]) if outcome.status == Status.FAIL]
    assert [outcome.note for outcome in wrong if outcome.part == "weights"] == ["h.1.mlp.c_proj.weight"]
    assert any(outcome.part == "logits" for outcome in wrong) or dtype == "int8"


def test_another_number_of_a_rounded_file_is_found(
    models: dict[str, GPT2], folders: dict[str, Path], tmp_path: Path
) -> None:
    export_model(models["gelu_new"], None, tmp_path / "file", to="llmc", dtype="bfloat16")
    content = bytearray((tmp_path / "file").read_bytes())
    content[-1000:-800] = bytes(200)
    (tmp_path / "file").write_bytes(content)
    found = {outcome.part: outcome for outcome in compare(tmp_path / "file", folders["gelu_new"])}
    assert found["weights"].status == Status.FAIL and found["weights"].note.startswith("h.1.mlp.c_proj.")


def test_a_folder_with_another_weight_fails(models: dict[str, GPT2], folders: dict[str, Path], tmp_path: Path) -> None:
    model = random_model(models["gelu"].config)
    with torch.no_grad():
        model.h[1].ln_1.bias[3] += 1.0  # type: ignore[union-attr,operator]
    save_model(model, tmp_path / "other")
    found = statuses(list(compare(tmp_path / "other", folders["gelu"])))
    assert (found["weights"], found["logits"]) == ("fail", "fail")
    assert set(statuses(list(compare(folders["gelu"], folders["gelu"]))).values()) == {"pass"}


def test_another_size_and_another_tokenizer_are_named(
    models: dict[str, GPT2], folders: dict[str, Path], tmp_path: Path
) -> None:
    config = dataclasses.replace(models["gelu"].config, n_layer=1, layer_norm_epsilon=1e-3)
    save_model(random_model(config), tmp_path / "small")
    [outcome] = compare(tmp_path / "small", folders["gelu"])
    assert outcome.note == "n_layer is 1, not 2, layer_norm_epsilon is 0.001, not 1e-05"
    save_model(models["gelu"], tmp_path / "other", tokenizer=train_bpe([TRAINING_TEXT[::-1]], vocab_size=300))
    found = statuses(list(compare(tmp_path / "other", folders["gelu"])))
    assert found == {"sizes": "pass", "weights": "pass", "tokens": "fail", "logits": "pass", "greedy ids": "pass"}


def test_characters_that_a_tokenizer_lacks_are_no_difference(tmp_path: Path) -> None:
    model = random_model(GPT2Config(vocab_size=20, n_positions=16, n_embd=12, n_layer=1, n_head=3))
    for name, characters in (("one", "abc ,.1"), ("same", "abc ,.1"), ("other", "abd ,.1")):
        save_model(model, tmp_path / name, tokenizer=CharTokenizer(characters))
    assert statuses(list(compare(tmp_path / "same", tmp_path / "one")))["tokens"] == "pass"
    tokens = next(outcome for outcome in compare(tmp_path / "other", tmp_path / "one") if outcome.part == "tokens")
    assert tokens.status == Status.FAIL and tokens.note == "bytes of tokens"
