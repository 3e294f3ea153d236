"""The loss and its hand-written gradients equal those of torch's cross-entropy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gpt2 import GPT2
from gpt2.training.loss import LanguageModelLoss, LossLimits, sum_of_losses
from gpt_config import GPT2Config


def inputs(n_rows: int, width: int, vocab_size: int, *, of_rows: bool = True, of_head: bool = True) -> tuple[Tensor, ...]:
    numbers = torch.Generator().manual_seed(n_rows + width + vocab_size)
    rows, head = (torch.randn(n, width, generator=numbers, dtype=torch.float64) for n in (n_rows, vocab_size))
    targets = torch.randint(vocab_size, (n_rows,), generator=numbers)
    return rows.requires_grad_(of_rows), head.requires_grad_(of_head), targets


def plain(rows: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(rows, head), targets, reduction="sum")


@given(
    n_rows=st.integers(0, 20),
    width=st.integers(1, 5),
    vocab_size=st.integers(1, 9),
    at_once=st.integers(1, 25),
    of_rows=st.booleans(),
    of_head=st.booleans(),
    factor=st.floats(-2, 2),
)
@settings(max_examples=60)
def test_it_is_cross_entropy(
    n_rows: int, width: int, vocab_size: int, at_once: int, of_rows: bool, of_head: bool, factor: float
) -> None:
    """For any number of parts, whether rows, head, both or neither need a gradient."""
    rows, head, targets = inputs(n_rows, width, vocab_size, of_rows=of_rows, of_head=of_head)
    learning = [tensor for tensor in (rows, head) if tensor.requires_grad]
    found = sum_of_losses(rows, head, targets, LossLimits(rows=at_once, logits=0))
    expected = plain(rows, head, targets)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert found.requires_grad == bool(learning)
    if n_rows and learning:
        pairs = zip(*(torch.autograd.grad(value * factor, learning) for value in (found, expected)), strict=True)
        for ours, right in pairs:
            torch.testing.assert_close(ours, right, rtol=1e-11, atol=1e-11)


def test_gradients_are_computed_only_if_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, head, targets = inputs(6, 3, 5)
    expected = plain(rows, head, targets).item()
    with torch.no_grad():
        assert not sum_of_losses(rows, head, targets).requires_grad
        monkeypatch.setattr(Tensor, "scatter_", None)  # the first operation of the gradients
        assert sum_of_losses(rows, head, targets).item() == pytest.approx(expected)
    with pytest.raises(TypeError):
        sum_of_losses(rows, head, targets)


def test_a_second_backward_pass_is_refused() -> None:
    """The first one overwrites the gradients."""
    value = sum_of_losses(*inputs(6, 3, 5))
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_small_probabilities_survive_float16() -> None:
    """The gradients of a mean are small, and float16 ends at 6e-8. So they are computed in float16 before the division."""
    rows, head, targets = inputs(64, 4, 3)
    with torch.autocast("cpu", torch.float16):
        value = sum_of_losses(rows.float(), head.float(), targets) * 1e-9
    plain_gradient = torch.autograd.grad(plain(rows, head, targets) * 1e-9, head)[0]
    torch.testing.assert_close(torch.autograd.grad(value, head)[0], plain_gradient, rtol=0.02, atol=1e-11)


@pytest.mark.parametrize(("n_rows", "vocab_size", "size"), [(1024, 500, 100.0), (20000, 65, 400.0)])
def test_sums_over_many_rows_fit_into_float16(n_rows: int, vocab_size: int, size: float) -> None:
    """The sum is computed before a GradScaler's factor is applied, so a smaller factor would not help."""
    rows, head = torch.full((n_rows, 3), size), torch.zeros(vocab_size, 3, requires_grad=True)
    targets = torch.zeros(n_rows, dtype=torch.int64)
    with torch.autocast("cpu", torch.float16):
        value = sum_of_losses(rows, head, targets) / n_rows
    found, right = (torch.autograd.grad(v, head)[0] for v in (value, plain(rows, head, targets) / n_rows))
    torch.testing.assert_close(found, right, rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("vocab_size", [900, 4100])  # 4,100 outputs become 4,160
@pytest.mark.parametrize("wrong", [-1, 0])
def test_a_target_outside_the_vocabulary_is_refused(vocab_size: int, wrong: int) -> None:
    rows, head = torch.ones(2, 3), torch.ones(vocab_size, 3)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="out of bounds"):
        sum_of_losses(rows, head, torch.tensor([0, wrong or vocab_size]))


@pytest.mark.parametrize("vocab_size", [5, 900])
def test_the_loss_of_a_model_with_any_vocabulary_size(vocab_size: int) -> None:
    torch.manual_seed(0)
    model = GPT2(GPT2Config(vocab_size=vocab_size, n_positions=8, n_embd=16, n_layer=1, n_head=2)).double().eval()
    x, y = torch.randint(0, vocab_size, (2, 3, 8))
    value = LanguageModelLoss(model)(x, y)
    value.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    expected = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
    expected.backward()
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("rows_of_part", [1024, 7])
@pytest.mark.parametrize("n_outputs", [900, 960])
def test_under_autocast_the_head_is_multiplied_in_bfloat16(
    rows_of_part: int, n_outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss equals cross-entropy up to the rounding of bfloat16, with and without padding of the head. The head is never
    multiplied in float32, which takes three times as long."""
    limits = LossLimits(rows=rows_of_part, logits=0, min_padded=900 if n_outputs == 960 else 901)
    torch.manual_seed(0)
    model = GPT2(GPT2Config(vocab_size=900, n_positions=8, n_embd=16, n_layer=1, n_head=2)).eval()
    x, y = torch.randint(0, 900, (2, 3, 8))
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
    right = torch.autograd.grad(expected, list(model.parameters()))
    of_head: list[torch.dtype] = []
    mm = torch.mm

    def watched(x: Tensor, weight: Tensor, *, out: Tensor) -> Tensor:
        assert weight.shape == (16, n_outputs)
        of_head.append(weight.dtype)
        return mm(x, weight, out=out)

    monkeypatch.setattr(torch, "mm", watched)
    with torch.autocast("cpu", torch.bfloat16):
        value = LanguageModelLoss(model, limits)(x, y)
    assert of_head == [torch.bfloat16] * (1 if rows_of_part == 1024 else 4)
    torch.testing.assert_close(value, expected, rtol=1e-3, atol=0)
    for gradient, theirs in zip(torch.autograd.grad(value, list(model.parameters())), right, strict=True):
        torch.testing.assert_close(gradient, theirs, rtol=0.05, atol=0.01 * theirs.abs().amax().item())
