"""Graphs of torch.export, torch.jit and ONNX give the model's logits at lengths other than the one of the export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gpt2 import GPT2
from gpt_config import GPT2Config
from gpt_test.conftest import random_model

CONFIG = GPT2Config(vocab_size=61, n_positions=24, n_embd=20, n_layer=2, n_head=4)
LENGTHS = (1, 2, 7, 13, CONFIG.n_positions)
Graph = Callable[..., Tensor]


@pytest.fixture(scope="module")
def model() -> GPT2:
    return random_model(CONFIG)


def ids_of(length: int) -> Tensor:
    return torch.randint(0, CONFIG.vocab_size, (2, length), generator=torch.Generator().manual_seed(length))


def mask_of(length: int) -> Tensor:
    """Return a mask of two rows; the second row is padded on the left."""
    mask = torch.ones(2, length, dtype=torch.int64)
    mask[1, : length // 2] = 0
    return mask


def assert_equal_at_every_length(graph: Graph, model: GPT2, *, masked: bool) -> None:
    """Compare the logits at the tokens; the logits at padding are undefined."""
    for length in LENGTHS:
        ids, mask = ids_of(length), mask_of(length)
        options = {"attention_mask": mask} if masked else {}
        with torch.no_grad():
            found, expected = graph(ids, **options), model(ids, **options)
        assert found.shape == (2, length, CONFIG.vocab_size)
        seen = mask.bool() if masked else torch.ones_like(mask).bool()
        torch.testing.assert_close(found[seen], expected[seen], atol=1e-5, rtol=0, msg=f"{length} tokens")


def exported(model: GPT2, *, masked: bool) -> torch.export.ExportedProgram:
    length = torch.export.Dim("length", min=1, max=CONFIG.n_positions)
    options = {"attention_mask": mask_of(9)} if masked else {}
    shapes = {name: {1: length} for name in ("input_ids", *options)}
    return torch.export.export(model, (ids_of(9),), options, dynamic_shapes=shapes)


@pytest.mark.parametrize("masked", [False, True])
def test_an_exported_program_takes_every_length(model: GPT2, masked: bool) -> None:
    assert_equal_at_every_length(exported(model, masked=masked).module(), model, masked=masked)


def test_an_exported_program_refuses_more_tokens_than_positions(model: GPT2) -> None:
    with pytest.raises(AssertionError, match="<= 24"):
        exported(model, masked=False).module()(ids_of(CONFIG.n_positions + 1))


class WithPositionalMask(nn.Module):
    """The model with a positional mask, because `torch.jit.trace` takes positional arguments only."""

    def __init__(self, model: GPT2) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids, attention_mask=attention_mask)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*:DeprecationWarning")
def test_a_trace_takes_every_length(model: GPT2) -> None:
    assert_equal_at_every_length(torch.jit.trace(model, ids_of(9)), model, masked=False)
    traced = torch.jit.trace(WithPositionalMask(model), (ids_of(9), mask_of(9)))
    assert_equal_at_every_length(lambda ids, attention_mask: traced(ids, attention_mask), model, masked=True)


@pytest.mark.parametrize("masked", [False, True])
def test_an_onnx_graph_takes_every_length(model: GPT2, tmp_path: Path, masked: bool) -> None:
    reason = "is not installed (pip install -r requirements-dev.txt)"
    onnx = pytest.importorskip("onnx", reason=f"onnx {reason}")
    pytest.importorskip("onnxscript", reason=f"onnxscript {reason}")
    from onnx.reference import ReferenceEvaluator

    program = torch.onnx.export(exported(model, masked=masked), dynamo=True, verbose=False)
    assert program is not None
    path = tmp_path / "model.onnx"
    program.save(path)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    evaluator = ReferenceEvaluator(str(path))

    def graph(ids: Tensor, **options: Tensor) -> Tensor:
        inputs = {name: value.numpy() for name, value in {"input_ids": ids, **options}.items()}
        return torch.from_numpy(evaluator.run(None, inputs)[0])

    assert_equal_at_every_length(graph, model, masked=masked)
