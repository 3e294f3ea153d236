"""ONNX models: onnxruntime computes the logits and the greedy ids of the model, for prompts, steps and padded rows."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gpt2 import GPT2
from gpt2.formats import onnx as onnx_format
from gpt2.formats.export import Agreement, export_model
from gpt2.formats.onnx import Engine, write_graph
from gpt2.formats.stored import wrong_weight
from gpt_config import GPT2Config, InputError
from gpt_config.errors import WriteError
from gpt_encoder import GPT2Tokenizer, load_tokenizer
from gpt_test.conftest import random_model

REASON = "is not installed (pip install -r requirements-dev.txt)"
onnx = pytest.importorskip("onnx", reason=f"onnx {REASON}")
onnxruntime = pytest.importorskip("onnxruntime", reason=f"onnxruntime {REASON}")

CONFIG = GPT2Config(vocab_size=300, n_positions=80, n_embd=60, n_layer=2, n_head=5, bos_token_id=3, eos_token_id=3)
VARIANTS = (
    CONFIG,
    dataclasses.replace(CONFIG, n_inner=7, activation_function="gelu", layer_norm_epsilon=1e-3),
    dataclasses.replace(CONFIG, n_embd=6, n_head=1, n_layer=3, activation_function="relu", scale_attn_weights=False),
    dataclasses.replace(CONFIG, vocab_size=1, n_embd=4, n_head=2, scale_attn_by_inverse_layer_idx=True),
)
Session = Any


def session_of(folder: Path, name: str = "model.onnx") -> Session:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(folder / "onnx" / name), options, providers=["CPUExecutionProvider"])


def call(session: Session, ids: Tensor, mask: Tensor, positions: Tensor, past: dict[str, np.ndarray]) -> list[np.ndarray]:
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    return session.run(None, {name: value.numpy() for name, value in inputs.items()} | past)


def empty_past(config: GPT2Config, rows: int) -> dict[str, np.ndarray]:
    shape = (rows, config.n_head, 0, config.head_dim)
    return {
        f"past_key_values.{layer}.{kind}": np.zeros(shape, np.float32)
        for layer in range(config.n_layer)
        for kind in ("key", "value")
    }


def greedy(session: Session, config: GPT2Config, prompt: list[int], n_new: int) -> list[int]:
    """As programs do it that know optimum's names: the outputs `present` become the inputs `past_key_values`."""
    ids, new, past = list(prompt), torch.tensor([prompt]), empty_past(config, 1)
    names = [output.name.replace("present.", "past_key_values.") for output in session.get_outputs()[1:]]
    for _ in range(n_new):
        n_past = len(ids) - new.shape[1]
        positions = torch.arange(n_past, len(ids))[None]
        logits, *present = call(session, new, torch.ones(1, len(ids), dtype=torch.int64), positions, past)
        past = dict(zip(names, present, strict=True))
        new = torch.tensor([[int(logits[0, -1].argmax())]])
        ids.append(int(new))
    return ids


@pytest.mark.parametrize("config", VARIANTS, ids=["gelu_new", "gelu", "relu", "one token"])
def test_60_greedy_ids_and_the_logits_are_those_of_the_model(config: GPT2Config, tmp_path: Path) -> None:
    model = random_model(config)
    assert export_model(model, None, tmp_path / "out", to="onnx") == Agreement(20, 20)
    session = session_of(tmp_path / "out")
    prompt = [token % config.vocab_size for token in (5, 17, 3, 101)]
    expected = model_ids(model, prompt, 60)
    assert greedy(session, config, prompt, 60) == expected
    ids = torch.tensor([expected, expected[::-1]])
    logits = call(session, ids, torch.ones_like(ids), torch.arange(64).repeat(2, 1), empty_past(config, 2))[0]
    with torch.inference_mode():
        theirs = model(ids)
    assert logits.dtype == np.float32
    torch.testing.assert_close(torch.from_numpy(logits), theirs, atol=1e-4 * float(theirs.abs().max()), rtol=0)


def model_ids(model: GPT2, prompt: list[int], n_new: int) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        for _ in range(n_new):
            ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], dim=1)
    return ids[0].tolist()


def test_a_left_padded_row_has_its_logits_without_padding(tmp_path: Path) -> None:
    model = random_model(CONFIG)
    export_model(model, None, tmp_path, to="onnx")
    session, ids = session_of(tmp_path), torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=1)  # padding has position 1 in transformers
    positions[0] = torch.arange(9)
    positions[1, 4:] = torch.arange(5)
    logits, *present = call(session, ids, mask, positions, empty_past(CONFIG, 2))
    assert np.isfinite(logits).all()
    past = dict(zip(empty_past(CONFIG, 2), present, strict=True))
    step = torch.tensor([[7], [8]])
    more = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], dim=1)
    next_logits = call(session, step, more, torch.tensor([[9], [5]]), past)[0]
    with torch.inference_mode():
        for row, begin in ((0, 0), (1, 4)):
            alone = model(torch.cat([ids[row : row + 1, begin:], step[row : row + 1]], dim=1))[0]
            found = torch.from_numpy(np.concatenate([logits[row, begin:], next_logits[row]]))
            torch.testing.assert_close(found, alone, atol=2e-4, rtol=0)


def test_names_and_dimensions_are_those_of_optimum(tmp_path: Path) -> None:
    export_model(random_model(CONFIG), None, tmp_path, to="onnx")
    session = session_of(tmp_path)
    inputs = {each.name: each.shape for each in session.get_inputs()}
    outputs = {each.name: each.shape for each in session.get_outputs()}
    everything = "past_sequence_length + sequence_length"
    assert list(inputs) == [
        "input_ids", "attention_mask", "position_ids",
        *(f"past_key_values.{layer}.{kind}" for layer in (0, 1) for kind in ("key", "value")),
    ]  # fmt: skip
    assert inputs["input_ids"] == inputs["position_ids"] == ["batch_size", "sequence_length"]
    assert inputs["attention_mask"] == ["batch_size", everything]
    assert inputs["past_key_values.1.key"] == ["batch_size", 5, "past_sequence_length", 12]
    assert outputs["logits"] == ["batch_size", "sequence_length", 300]
    assert outputs["present.1.value"] == ["batch_size", 5, everything, 12] and len(outputs) == 5


def test_the_tokenizer_and_the_config_are_beside_the_graph(
    small_model: GPT2, small_tokenizer: GPT2Tokenizer, tmp_path: Path
) -> None:
    export_model(small_model, small_tokenizer, tmp_path, to="onnx")
    assert load_tokenizer(tmp_path).token_bytes == small_tokenizer.token_bytes
    values = json.loads((tmp_path / "config.json").read_text())
    assert (values["model_type"], values["n_head"], values["n_layer"], values["n_embd"]) == ("gpt2", 3, 2, 24)
    assert {path.name for path in tmp_path.iterdir()} >= {
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    }
    assert [path.name for path in (tmp_path / "onnx").iterdir()] == ["model.onnx"]


def test_large_weights_are_in_a_file_of_their_own(tmp_path: Path) -> None:
    """As for more than 2 GB, which no protocol buffer can have."""
    model = random_model(CONFIG)
    (tmp_path / "onnx").mkdir()
    write_graph(model, tmp_path / "onnx" / "model.onnx", is_outside=True)
    n_bytes = 4 * sum(tensor.numel() for tensor in model.state_dict().values())
    assert (tmp_path / "onnx" / "model.onnx_data").stat().st_size >= n_bytes
    assert (tmp_path / "onnx" / "model.onnx").stat().st_size < n_bytes / 4
    graph = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False).graph
    places = [int(entry.value) for tensor in graph.initializer for entry in tensor.external_data if entry.key == "offset"]
    assert len(places) == 28 and not any(place % 4096 for place in places)  # programs map whole pages
    assert greedy(session_of(tmp_path), CONFIG, [5, 17], 20) == model_ids(model, [5, 17], 20)
    assert wrong_weight(onnx_format.stored_weights(tmp_path), model.state_dict()) is None


def test_int8_is_made_by_the_quantizer_of_onnxruntime(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = random_model(dataclasses.replace(CONFIG, n_embd=120))
    export_model(model, None, tmp_path / "whole", to="onnx")
    agreement = export_model(model, None, tmp_path / "small", to="onnx", dtype="int8")
    assert agreement.n_ids == 20 and not caplog.records
    [file] = (tmp_path / "small" / "onnx").iterdir()
    assert file.name == "model_quantized.onnx"  # the name that transformers.js knows
    assert file.stat().st_size < (tmp_path / "whole" / "onnx" / "model.onnx").stat().st_size / 2
    ids = torch.randint(0, 300, (2, 30), generator=torch.Generator().manual_seed(0))
    session = session_of(tmp_path / "small", "model_quantized.onnx")
    logits = call(session, ids, torch.ones_like(ids), torch.arange(30).repeat(2, 1), empty_past(model.config, 2))[0]
    with torch.inference_mode():
        theirs = model(ids)
    assert 0 < float((torch.from_numpy(logits) - theirs).abs().max() / theirs.abs().max()) < 0.2


def test_without_onnxruntime_the_evaluator_of_onnx_compares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(dataclasses.replace(CONFIG, n_positions=6, n_embd=10))
    for module in ("onnxruntime", "onnxruntime.quantization"):
        monkeypatch.setitem(sys.modules, module, None)
    assert export_model(model, None, tmp_path / "out", to="onnx") == Agreement(5, 5)
    assert Engine(tmp_path / "out").runs_by == "onnx"
    with pytest.raises(InputError, match=r"writing ONNX needs onnxruntime: pip install '\.\[onnx\]'"):
        export_model(model, None, tmp_path / "int8", to="onnx", dtype="int8")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(InputError, match=r"writing ONNX needs onnx: pip install '\.\[onnx\]'"):
        export_model(model, None, tmp_path / "none", to="onnx")
    assert not list((tmp_path / "none").iterdir())


def test_a_graph_that_reads_back_wrong_gets_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(CONFIG)
    whole = write_graph

    def write(model: GPT2, path: Path, *, is_outside: bool = False) -> None:
        whole(model, path, is_outside=is_outside)
        content = bytearray(path.read_bytes())
        at = content.index(model.wpe.weight.detach().numpy().tobytes())
        content[at] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(onnx_format, "write_graph", write)
    with pytest.raises(WriteError, match=r"wpe\.weight was read back with other numbers"):
        export_model(model, None, tmp_path / "out", to="onnx")
    assert not list((tmp_path / "out").iterdir())
