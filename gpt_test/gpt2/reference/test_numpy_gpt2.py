"""The whole NumPy engine against the PyTorch model: logits, loss, each gradient, cache, training and files."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2 import GPT2
from gpt2.inspection import trace
from gpt2.reference import numpy_gpt2, python_gpt2
from gpt2.reference.numpy_kv_cache import KVCache
from gpt2.reference.numpy_model import NumpyGPT2, init_parameters
from gpt2.reference.numpy_optimizers import SGD, AdamW, warmup_cosine
from gpt2.reference.numpy_training import random_batches, train
from gpt_config import CheckpointError, ConfigError, GPT2Config, InputError, InputTypeError
from gpt_test.conftest import random_model

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
ODD = GPT2Config(vocab_size=23, n_positions=9, n_embd=15, n_layer=3, n_head=5, n_inner=22, **NO_DROPOUT)
DROPPING = GPT2Config(
    vocab_size=7, n_positions=5, n_embd=6, n_layer=2, n_head=3, resid_pdrop=0.3, embd_pdrop=0.4, attn_pdrop=0.5
)


@st.composite
def configs(draw: st.DrawFn) -> GPT2Config:
    n_head = draw(st.integers(1, 5))
    return GPT2Config(
        vocab_size=draw(st.integers(2, 40)),
        n_positions=draw(st.integers(1, 12)),
        n_embd=n_head * draw(st.integers(1, 7)),
        n_layer=draw(st.integers(1, 3)),
        n_head=n_head,
        n_inner=draw(st.none() | st.integers(1, 30)),
        activation_function=draw(st.sampled_from(["gelu_new", "gelu_new", "gelu", "relu"])),
        scale_attn_weights=draw(st.booleans()),
        scale_attn_by_inverse_layer_idx=draw(st.booleans()),
        layer_norm_epsilon=draw(st.sampled_from([1e-5, 1e-3])),
        **NO_DROPOUT,
    )


def batch(config: GPT2Config, B: int, T: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config.vocab_size, (B, T))


def parameters_of(model: GPT2) -> dict[str, np.ndarray]:
    return {name: parameter.detach().numpy().copy() for name, parameter in model.named_parameters()}


@given(configs(), st.data())
@settings(max_examples=15)
def test_activations_have_the_names_and_numbers_of_a_trace(config: GPT2Config, data: st.DataObject) -> None:
    model = random_model(config, dtype=torch.float64)
    ids = batch(config, data.draw(st.integers(1, 3)), data.draw(st.integers(1, config.n_positions)))
    found = NumpyGPT2(config, parameters_of(model), dtype="float64").activations(ids)
    expected = trace(model, torch.tensor(ids))
    assert list(found) == list(expected)
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name].numpy(), rtol=1e-9, atol=1e-11, err_msg=name)


def torch_loss(model: GPT2, ids: np.ndarray, targets: np.ndarray) -> torch.Tensor:
    return F.cross_entropy(model(torch.tensor(ids)).flatten(0, 1), torch.tensor(targets).flatten())


def assert_engines_agree(model: GPT2, ids: np.ndarray, targets: np.ndarray, tolerance: float) -> None:
    parameters = parameters_of(model)
    logits, _ = numpy_gpt2.gpt2_forward(parameters, model.config, ids)
    loss, gradients = numpy_gpt2.loss_and_gradients(parameters, model.config, ids, targets)
    theirs = torch_loss(model, ids, targets)
    theirs.backward()
    dtype = parameters["wte.weight"].dtype
    assert logits.dtype == dtype
    np.testing.assert_allclose(logits, model(torch.tensor(ids)).detach().numpy(), rtol=0, atol=tolerance)
    assert abs(loss - theirs.item()) < tolerance
    assert gradients.keys() == parameters.keys()
    for name, parameter in model.named_parameters():
        assert gradients[name].dtype == dtype
        np.testing.assert_allclose(gradients[name], parameter.grad.numpy(), rtol=0, atol=tolerance, err_msg=name)


@given(config=configs(), seed=st.integers(0, 99), data=st.data())
@settings(max_examples=50)
def test_logits_loss_and_gradients_equal_pytorch(config: GPT2Config, seed: int, data) -> None:
    B, T = data.draw(st.integers(1, 6)), data.draw(st.integers(1, config.n_positions))
    model = random_model(config, seed, torch.float64)
    assert_engines_agree(model, batch(config, B, T, seed), batch(config, B, T, seed + 1), 1e-10)


@pytest.mark.parametrize(("B", "T"), [(9, 9), (5, 5), (1, 9), (15, 1), (1, 1)])
def test_a_batch_as_long_as_the_text_and_other_odd_shapes(B: int, T: int) -> None:
    """B = T, B = n_head and B = n_embd: with equal sizes, swapped axes raise no error, so the numbers must show them."""
    ids, targets = batch(ODD, B, T), batch(ODD, B, T, 1)
    assert_engines_agree(random_model(ODD, dtype=torch.float64), ids, targets, 1e-10)
    assert_engines_agree(random_model(ODD), ids, targets, 1e-4)


def test_blocks_and_their_parts_equal_those_of_the_model() -> None:
    model = random_model(ODD, dtype=torch.float64)
    x = np.random.default_rng(0).standard_normal((4, 7, 15))
    parameters = numpy_gpt2.layer_parameters(parameters_of(model), 1)
    block = model.h[1]
    pairs = [
        (numpy_gpt2.attention_forward(x, parameters, ODD, 1), numpy_gpt2.attention_backward, "attn"),
        (numpy_gpt2.mlp_forward(x, parameters, ODD), numpy_gpt2.mlp_backward, "mlp"),
        (numpy_gpt2.block_forward(x, parameters, ODD, 1), numpy_gpt2.block_backward, ""),
    ]
    for (out, saved), backward, part in pairs:
        block.zero_grad()
        tensor = torch.tensor(x, requires_grad=True)
        module = getattr(block, part) if part else block
        theirs = module(tensor) if part == "mlp" else module(tensor, None, None)
        np.testing.assert_allclose(out, theirs.detach().numpy(), rtol=0, atol=1e-12)
        d_out = np.random.default_rng(1).standard_normal(x.shape)
        theirs.backward(torch.tensor(d_out))
        d_x, gradients = backward(d_out, saved)
        np.testing.assert_allclose(d_x, tensor.grad.numpy(), rtol=0, atol=1e-11)
        wanted = {name: p.grad.numpy() for name, p in block.named_parameters() if name.startswith(part)}
        assert gradients.keys() == wanted.keys()
        for name, gradient in wanted.items():
            np.testing.assert_allclose(gradients[name], gradient, rtol=0, atol=1e-11, err_msg=name)


def test_gradients_of_the_whole_with_dropout_by_central_differences() -> None:
    """One seed always drops the same places, so the loss depends on the parameters only. Tests a few numbers of each."""
    model = random_model(DROPPING, dtype=torch.float64)
    parameters = parameters_of(model)
    ids, targets = batch(DROPPING, 3, 5), batch(DROPPING, 3, 5, 1)

    def loss() -> float:
        logits, _ = numpy_gpt2.gpt2_forward(parameters, DROPPING, ids, np.random.default_rng(4))
        return numpy_gpt2.cross_entropy_forward(logits, targets)[0]

    _, gradients = numpy_gpt2.loss_and_gradients(parameters, DROPPING, ids, targets, np.random.default_rng(4))
    places = np.random.default_rng(5)
    for name, parameter in parameters.items():
        for _ in range(4):
            place = tuple(places.integers(0, n) for n in parameter.shape)
            here, h = parameter[place], 1e-5
            parameter[place] = here + h
            above = loss()
            parameter[place] = here - h
            below = loss()
            parameter[place] = here
            assert abs((above - below) / (2 * h) - gradients[name][place]) < 1e-8, name


class RecordedDraws:
    """Replaces a generator: returns 0.5 everywhere and records the requested shapes."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def random(self, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        self.shapes.append(shape)
        return np.full(shape, 0.5, dtype)


@pytest.mark.parametrize(
    ("name", "shapes"),
    [("embd_pdrop", [(4, 5, 6)]), ("attn_pdrop", [(4, 3, 5, 5)] * 2), ("resid_pdrop", [(4, 5, 6)] * 4)],
)
def test_each_dropout_is_applied_at_its_own_place(name: str, shapes: list[tuple[int, ...]]) -> None:
    config = GPT2Config(**{**vars(DROPPING), **NO_DROPOUT, name: 0.4})
    draws, parameters = RecordedDraws(), parameters_of(random_model(config))
    numpy_gpt2.gpt2_forward(parameters, config, batch(config, 4, 5), draws)
    assert draws.shapes == shapes


def test_both_ends_of_the_tied_head_reach_the_embedding() -> None:
    """A token of the input also gets a gradient through its row in the input embedding, not only through the head."""
    model = random_model(ODD, dtype=torch.float64)
    ids, targets = np.full((1, 4), 3), np.full((1, 4), 5)
    _, gradients = numpy_gpt2.loss_and_gradients(parameters_of(model), ODD, ids, targets)
    hidden = model.hidden_states(torch.tensor(ids)).detach()
    logits = (hidden @ model.wte.weight.detach().T).requires_grad_()
    F.cross_entropy(logits.flatten(0, 1), torch.tensor(targets).flatten()).backward()
    head_alone = (logits.grad.flatten(0, 1).T @ hidden.flatten(0, 1)).numpy()
    differs = np.abs(gradients["wte.weight"] - head_alone).max(-1) > 1e-12
    assert differs.nonzero()[0].tolist() == [3]


@given(data=st.data(), seed=st.integers(0, 99))
@settings(max_examples=30)
def test_the_cache_changes_nothing(data, seed: int) -> None:
    model = random_model(ODD, seed, torch.float64)
    B, T = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    ids, cut = batch(ODD, B, T, seed), data.draw(st.integers(0, T))
    cache, ours = KVCache(ODD, B, np.float64), NumpyGPT2(ODD, parameters_of(model), dtype="float64")
    parts = [ours(part, kv_cache=cache) for part in (ids[:, :cut], ids[:, cut:]) if part.size]
    assert cache.length == T
    np.testing.assert_allclose(np.concatenate(parts, 1), model(torch.tensor(ids)).detach().numpy(), rtol=0, atol=1e-10)


def test_fifty_training_steps_equal_those_of_pytorch() -> None:
    model = random_model(ODD, dtype=torch.float64).train()
    ours = NumpyGPT2(ODD, parameters_of(model), dtype="float64")
    groups = [[p for p in model.parameters() if p.dim() >= 2], [p for p in model.parameters() if p.dim() < 2]]
    optimizer = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}], betas=(0.9, 0.95)
    )

    def rate(step: int) -> float:
        return warmup_cosine(step, learning_rate=1e-2, min_learning_rate=1e-3, warmup_steps=5, max_steps=50)

    text = np.random.default_rng(0).integers(0, 23, 300)
    batches = list(islice(random_batches(text, 4, 9, np.random.default_rng(1)), 50))
    losses = list(train(ours, AdamW(ours.parameters), batches, learning_rate=rate))
    for step, (inputs, targets) in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.zero_grad()
        theirs = torch_loss(model, inputs, targets)
        assert abs(theirs.item() - losses[step]) < 1e-9
        theirs.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert losses[-1] < losses[0] and not ours.training


def test_training_learns_with_dropout_in_float32() -> None:
    model = NumpyGPT2(DROPPING, seed=1)
    batches = islice(random_batches([0, 1, 2, 3, 4] * 20, 8, 5, np.random.default_rng(0)), 60)
    losses = list(train(model, SGD(model.parameters), batches, learning_rate=lambda step: 0.3))
    assert np.mean(losses[-5:]) < 0.8 * losses[0]
    assert all(parameter.dtype == np.float32 for parameter in model.parameters.values())
    ids = batch(DROPPING, 2, 5)
    assert (model(ids) == model(ids)).all()
    model.train()
    assert (model(ids) != model(ids)).any()
    assert (model.eval()(ids) == model(ids)).all()


def test_random_batches_are_parts_of_the_text() -> None:
    inputs, targets = next(random_batches(range(100, 105), 50, 4, np.random.default_rng(0)))
    assert inputs.shape == targets.shape == (50, 4)
    assert (targets == inputs + 1).all() and inputs.min() == 100 and targets.max() == 104
    with pytest.raises(InputError, match="4 tokens and a context of 4"):
        next(random_batches(range(4), 1, 4, np.random.default_rng(0)))


def test_initial_weights_have_the_standard_deviations_of_the_pytorch_model() -> None:
    config = GPT2Config(vocab_size=500, n_positions=300, n_embd=60, n_layer=4, n_head=2)
    torch.manual_seed(0)
    theirs = dict(GPT2(config).named_parameters())
    ours = init_parameters(config, np.random.default_rng(0))
    assert ours.keys() == theirs.keys()
    for name, parameter in theirs.items():
        assert ours[name].shape == tuple(parameter.shape) and ours[name].dtype == np.float32
        if parameter.dim() == 2:
            assert abs(ours[name].std() / parameter.std().item() - 1) < 0.1, name
        else:
            assert (ours[name] == parameter.detach().numpy()).all(), name


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_folders_are_exchanged_with_the_pytorch_model_without_loss(
    dtype: str, tmp_path: Path, small_tokenizer, small_config: GPT2Config
) -> None:
    ours = NumpyGPT2(small_config, dtype=dtype, seed=3)
    ours.save_pretrained(tmp_path / "ours", tokenizer=small_tokenizer)
    theirs = GPT2.from_pretrained(tmp_path / "ours", dtype=dtype)
    assert theirs.config == small_config
    theirs.save_pretrained(tmp_path / "theirs")
    again = NumpyGPT2.from_pretrained(tmp_path / "theirs", dtype=dtype)
    plain = python_gpt2.load_model(tmp_path / "ours")
    for name, parameter in theirs.named_parameters():
        assert parameter.detach().numpy().tobytes() == ours.parameters[name].tobytes() == again.parameters[name].tobytes()
    assert list(plain.parameters["wte.weight"][7]) == ours.parameters["wte.weight"][7].tolist()
    assert (tmp_path / "theirs" / "vocab.json").read_bytes() == (tmp_path / "ours" / "vocab.json").read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_two_byte_files_are_widened(dtype: torch.dtype, tmp_path: Path) -> None:
    model = random_model(ODD).to(dtype)
    model.save_pretrained(tmp_path)
    loaded = NumpyGPT2.from_pretrained(tmp_path)
    for name, parameter in model.named_parameters():
        assert (loaded.parameters[name] == parameter.detach().float().numpy()).all()


def test_bad_input_is_refused() -> None:
    model = NumpyGPT2(ODD)
    for ids, message in (
        (np.array([[-1]]), "from 0 to 22"),
        (np.array([[23]]), "from 0 to 22"),
        (np.zeros((1, 10), int), "10 tokens are more than the 9"),
        (np.zeros(3, int), r"\(batch, tokens\)"),
        (np.zeros((1, 0), int), r"\(batch, tokens\)"),
        (np.zeros((1, 3)), "float64"),
    ):
        with pytest.raises(InputError, match=message):
            model(ids)
    with pytest.raises(InputError, match="from 0 to 22"):
        model.loss_and_gradients(np.array([[1]]), np.array([[-100]]))
    with pytest.raises(InputTypeError, match="list"):
        model([[1]])
    with pytest.raises(ConfigError, match="float16"):
        NumpyGPT2(ODD, dtype="float16")
    with pytest.raises(CheckpointError, match=r"wte.weight is missing"):
        NumpyGPT2(ODD, {name: value for name, value in model.parameters.items() if name != "wte.weight"})
    with pytest.raises(CheckpointError, match=r"ln_f.bias is \(3,\) instead of \(15,\)"):
        NumpyGPT2(ODD, model.parameters | {"ln_f.bias": np.zeros(3)})
    with pytest.raises(InputError, match="shape"):
        model.loss_and_gradients(np.zeros((2, 3), int), np.zeros((3, 2), int))
