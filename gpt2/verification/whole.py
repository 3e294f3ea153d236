"""Checks of the whole model in every engine: logits, loss, gradients, greedy ids, training steps.

Each engine reads the weights from the folder with its own reader, so the readers are compared too. transformers is included
if it is installed.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2.inspection.tracing import trace
from gpt2.kv_cache import KVCache
from gpt2.pretrained import GPT2, load_model
from gpt2.reference import numpy_gpt2, numpy_layers, numpy_optimizers, python_gpt2
from gpt2.reference.numpy_generation import stream_ids
from gpt2.reference.numpy_kv_cache import KVCache as NumpyKVCache
from gpt2.reference.numpy_model import NumpyGPT2
from gpt2.reference.numpy_training import train_step
from gpt2.training.loss import LanguageModelLoss
from gpt2.training.optimizer import make_optimizer
from gpt2.verification.checks import BY_DTYPE, DIFFERENCE_STEP, DIFFERENCES, EXACT, FLOAT64, STEPS, Check, Pair
from gpt_config.generation_config import GenerationConfig
from gpt_config.training_config import TrainingConfig

Array = np.ndarray[Any, np.dtype[Any]]

_BATCHES = ((2, 8), (4, 4))  # (B, T); B = T shows swapped axes
_NEW_TOKENS = 8  # compared per greedy text
_TRAINING_STEPS = 20
_RATE = 1e-3  # learning rate of the training steps


def model_checks(folder: Path) -> Iterator[Check]:
    """All checks of the model in `folder`."""
    engines = _Engines(folder)
    yield Check("logits", "Python", "PyTorch", "float64", FLOAT64, partial(_python_logits, engines))
    for dtype, tolerance in BY_DTYPE.items():
        yield Check("logits", "NumPy", "PyTorch", dtype, tolerance, partial(_numpy_logits, engines, dtype))
        yield Check("activations", "NumPy", "PyTorch", dtype, tolerance, partial(_activations, engines, dtype))
        yield Check("loss and gradients", "NumPy", "PyTorch", dtype, tolerance, partial(_numpy_gradients, engines, dtype))
    slopes = partial(_central_differences, engines)
    yield Check("loss and gradients", "NumPy", "central differences", "float64", DIFFERENCES, slopes)
    yield Check("logits with a KV cache", "PyTorch", "NumPy", "float64", FLOAT64, partial(_torch_cached, engines))
    yield Check("logits with a KV cache", "NumPy", "PyTorch", "float64", FLOAT64, partial(_numpy_cached, engines))
    yield Check("logits with a KV cache", "Python", "PyTorch", "float64", FLOAT64, partial(_python_cached, engines))
    yield Check("greedy ids", "NumPy", "PyTorch", "float64", EXACT, partial(_greedy, engines, _numpy_greedy))
    yield Check("greedy ids", "Python", "PyTorch", "float64", EXACT, partial(_greedy, engines, _python_greedy))
    steps = f"loss over {_TRAINING_STEPS} training steps"
    yield Check(steps, "NumPy", "PyTorch", "float64", STEPS, partial(_training, engines, _numpy_losses))
    if not importlib.util.find_spec("transformers"):
        return
    for dtype, tolerance in BY_DTYPE.items():
        yield Check("logits", "PyTorch", "transformers", dtype, tolerance, partial(_transformers_logits, engines, dtype))
    of_gradients = partial(_transformers_gradients, engines)
    yield Check("loss and gradients", "PyTorch", "transformers", "float64", FLOAT64, of_gradients)
    yield Check("greedy ids", "transformers", "PyTorch", "float64", EXACT, partial(_greedy, engines, _transformers_greedy))
    yield Check(steps, "transformers", "PyTorch", "float64", STEPS, partial(_training, engines, _transformers_losses))


class _Engines:
    """The same model in each engine, loaded at the first use."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @functools.cache  # noqa: B019  the object lives as long as the checks
    def torch(self, dtype: str) -> GPT2:
        return load_model(self.folder, dtype=dtype)

    @functools.cache  # noqa: B019
    def numpy(self, dtype: str) -> NumpyGPT2:
        return NumpyGPT2.from_pretrained(self.folder, dtype=dtype)

    @functools.cached_property
    def python(self) -> python_gpt2.Model:
        return python_gpt2.load_model(self.folder)

    @functools.cache  # noqa: B019
    def transformers(self, dtype: str) -> Any:
        from transformers import GPT2LMHeadModel
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        return GPT2LMHeadModel.from_pretrained(self.folder, dtype=getattr(torch, dtype)).eval()

    @property
    def batches(self) -> list[tuple[str, Array]]:
        """(name, ids (B, T + 1)) of each batch; the last column holds targets only."""
        config, rng = self.torch("float64").config, np.random.default_rng(0)
        sizes = [(B, min(T, config.n_positions)) for B, T in _BATCHES]
        return [(f"shape {(B, T)}", rng.integers(0, config.vocab_size, (B, T + 1))) for B, T in sizes]

    @property
    def training_batches(self) -> list[Array]:
        config, rng = self.torch("float64").config, np.random.default_rng(1)
        T = min(8, config.n_positions)
        return [rng.integers(0, config.vocab_size, (4, T + 1)) for _ in range(_TRAINING_STEPS)]


# ---- Logits ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _torch_logits(engines: _Engines, ids: Array, dtype: str) -> Tensor:
    logits: Tensor = engines.torch(dtype)(torch.from_numpy(ids))  # (B, T) -> (B, T, V)
    return logits


def _python_logits(engines: _Engines) -> Iterator[Pair]:
    for name, ids in engines.batches:
        found = [python_gpt2.forward(engines.python, row) for row in ids[:, :-1].tolist()]
        yield name, found, _torch_logits(engines, ids[:, :-1], "float64")


def _numpy_logits(engines: _Engines, dtype: str) -> Iterator[Pair]:
    for name, ids in engines.batches:
        yield name, engines.numpy(dtype)(ids[:, :-1]), _torch_logits(engines, ids[:, :-1], dtype)


def _activations(engines: _Engines, dtype: str) -> Iterator[Pair]:
    """Each intermediate result by name. Scores are -inf where a token does not attend, so these places are compared too."""
    for name, ids in engines.batches:
        found = engines.numpy(dtype).activations(ids[:, :-1])
        expected = trace(engines.torch(dtype), torch.from_numpy(ids[:, :-1]))
        yield f"names at {name}", [list(found).index(key) for key in expected], range(len(found))
        for key, array in found.items():
            hidden = np.isneginf(array)
            yield f"hidden {key} at {name}", hidden, expected[key] == -torch.inf
            yield f"{key} at {name}", np.where(hidden, 0, array), expected[key].masked_fill(expected[key] == -torch.inf, 0)


def _transformers_logits(engines: _Engines, dtype: str) -> Iterator[Pair]:
    for name, ids in engines.batches:
        with torch.no_grad():
            expected = engines.transformers(dtype)(torch.from_numpy(ids[:, :-1])).logits
        yield name, _torch_logits(engines, ids[:, :-1], dtype), expected


def _parts(ids: Array) -> list[Array]:
    """The tokens of (B, T) in the parts given to a cache: T // 2 at once, then two, which need a mask, then one by one."""
    T = ids.shape[1]
    return [part for part in np.split(ids, [T // 2, *range(T // 2 + 2, T)], axis=1) if part.size]


def _torch_cached(engines: _Engines) -> Iterator[Pair]:
    model = engines.torch("float64")
    for name, ids in engines.batches:
        cache, inputs = KVCache(model.config, batch_size=len(ids), dtype=torch.float64), ids[:, :-1]
        with torch.no_grad():
            found = torch.cat([model(torch.from_numpy(part), kv_cache=cache) for part in _parts(inputs)], dim=1)
        yield name, found, engines.numpy("float64")(inputs)


def _numpy_cached(engines: _Engines) -> Iterator[Pair]:
    model = engines.numpy("float64")
    for name, ids in engines.batches:
        cache, inputs = NumpyKVCache(model.config, batch_size=len(ids), dtype=model.dtype), ids[:, :-1]
        found = np.concatenate([model(part, kv_cache=cache) for part in _parts(inputs)], axis=1)
        yield name, found, _torch_logits(engines, inputs, "float64")


def _python_cached(engines: _Engines) -> Iterator[Pair]:
    name, ids = engines.batches[0]
    row, cache = ids[:1, :-1], python_gpt2.KVCache(engines.python.config)
    parts = [python_gpt2.forward(engines.python, part[0].tolist(), cache) for part in _parts(row)]
    yield name, [[logits for part in parts for logits in part]], _torch_logits(engines, row, "float64")


# ---- Loss and gradients ---------------------------------------------------------------------------------------------


def _torch_gradients(model: GPT2, ids: Array) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    loss = LanguageModelLoss(model)(torch.from_numpy(ids[:, :-1]), torch.from_numpy(ids[:, 1:]))
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.item(), gradients


def _numpy_gradients(engines: _Engines, dtype: str) -> Iterator[Pair]:
    model = engines.numpy(dtype)
    for name, ids in engines.batches:
        loss, gradients = numpy_gpt2.loss_and_gradients(model.parameters, model.config, ids[:, :-1], ids[:, 1:])
        yield from _paired(name, (loss, gradients), _torch_gradients(engines.torch(dtype), ids))


def _central_differences(engines: _Engines) -> Iterator[Pair]:
    """The slope of the loss along random directions of all parameters together, scaled to the size of each tensor."""
    model, rng = engines.numpy("float64"), np.random.default_rng(2)
    for name, ids in engines.batches:
        inputs, targets = ids[:, :-1], ids[:, 1:]
        _, gradients = numpy_gpt2.loss_and_gradients(model.parameters, model.config, inputs, targets)
        found, expected = [], []
        for _ in range(3):
            direction = {
                key: rng.standard_normal(value.shape) * np.abs(value).mean() for key, value in model.parameters.items()
            }
            found.append(sum(float(np.vdot(gradients[key], step)) for key, step in direction.items()))
            above, below = (_loss_along(model, direction, sign * DIFFERENCE_STEP, inputs, targets) for sign in (1, -1))
            expected.append((above - below) / (2 * DIFFERENCE_STEP))
        yield name, found, expected


def _loss_along(model: NumpyGPT2, direction: dict[str, Array], step: float, inputs: Array, targets: Array) -> float:
    parameters = {key: value + step * direction[key] for key, value in model.parameters.items()}
    logits, _ = numpy_gpt2.gpt2_forward(parameters, model.config, inputs)
    return numpy_layers.cross_entropy_forward(logits, targets)[0]


def _transformers_gradients(engines: _Engines) -> Iterator[Pair]:
    model = engines.transformers("float64")
    for name, ids in engines.batches:
        model.zero_grad()
        loss = _transformers_loss(model, ids)
        loss.backward()
        gradients = {key.removeprefix("transformer."): p.grad for key, p in model.named_parameters() if p.grad is not None}
        found = _torch_gradients(engines.torch("float64"), ids)
        yield from _paired(name, found, (loss.item(), gradients))
        model.zero_grad()


def _paired(name: str, found: tuple[float, dict[str, Any]], expected: tuple[float, dict[str, Any]]) -> Iterator[Pair]:
    yield f"loss at {name}", found[0], expected[0]
    for key in sorted(found[1].keys() | expected[1].keys()):
        yield f"{key} at {name}", found[1][key], expected[1][key]


def _transformers_loss(model: Any, ids: Array) -> Tensor:
    logits = model(torch.from_numpy(ids[:, :-1])).logits
    return F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(ids[:, 1:]).flatten())


# ---- Greedy ids -----------------------------------------------------------------------------------------------------


def _greedy(engines: _Engines, of_engine: Callable[[_Engines, Array], list[int]]) -> Iterator[Pair]:
    for name, ids in engines.batches[:1]:
        prompt = ids[:1, : max(1, ids.shape[1] // 2)]
        model = engines.torch("float64")
        expected = model.generate(torch.from_numpy(prompt), max_new_tokens=_NEW_TOKENS)[0, prompt.shape[1] :].tolist()
        found = of_engine(engines, prompt)
        ends = model.config.eos_token_ids
        yield name, _until(ends, found), _until(ends, expected)


def _until(ends: tuple[int, ...], ids: list[int]) -> list[int]:
    """`ids` up to and including the first of `ends`: some engines stop there, others continue after it."""
    return ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids)) + 1]


def _numpy_greedy(engines: _Engines, prompt: Array) -> list[int]:
    return list(stream_ids(engines.numpy("float64"), prompt[0].tolist(), GenerationConfig(max_new_tokens=_NEW_TOKENS)))


def _python_greedy(engines: _Engines, prompt: Array) -> list[int]:
    return list(islice(python_gpt2.generate(engines.python, prompt[0].tolist(), max_new_tokens=_NEW_TOKENS), _NEW_TOKENS))


def _transformers_greedy(engines: _Engines, prompt: Array) -> list[int]:
    ids = torch.from_numpy(prompt)
    model = engines.transformers("float64")
    options = {"max_new_tokens": _NEW_TOKENS, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    new: list[int] = model.generate(ids, **options)[0, prompt.shape[1] :].tolist()
    return new


# ---- Training -------------------------------------------------------------------------------------------------------


def _training(engines: _Engines, of_engine: Callable[[_Engines], list[float]]) -> Iterator[Pair]:
    """The losses of training without dropout, because each engine draws other random numbers.

    The weights after training are not compared. The bias of the keys cancels in the softmax, so its gradient consists of
    rounding errors only, and Adam turns these into steps as long as all others.
    """
    model = copy.deepcopy(engines.torch("float64"))
    loss = LanguageModelLoss(model)
    expected = _losses(model, lambda ids: loss(torch.from_numpy(ids[:, :-1]), torch.from_numpy(ids[:, 1:])), engines)
    yield "losses", of_engine(engines), expected


def _losses(model: nn.Module, loss_of: Callable[[Array], Tensor], engines: _Engines) -> list[float]:
    optimizer = make_optimizer(model, TrainingConfig(learning_rate=_RATE, beta2=0.95, weight_decay=0.1))
    losses = []
    for ids in engines.training_batches:
        loss = loss_of(ids)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _numpy_losses(engines: _Engines) -> list[float]:
    model = NumpyGPT2(engines.numpy("float64").config, engines.numpy("float64").parameters, dtype="float64")
    optimizer = numpy_optimizers.AdamW(model.parameters, betas=(0.9, 0.95), weight_decay=0.1)
    return [train_step(model, optimizer, ids[:, :-1], ids[:, 1:], learning_rate=_RATE) for ids in engines.training_batches]


def _transformers_losses(engines: _Engines) -> list[float]:
    model = copy.deepcopy(engines.transformers("float64"))
    return _losses(model, lambda ids: _transformers_loss(model, ids), engines)


@contextlib.contextmanager
def random_model() -> Iterator[Path]:
    """A temporary folder with a tiny model. Its random weights are large enough for every part to change the result."""
    import tempfile

    from gpt_config.model_config import GPT2Config

    torch_state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = GPT2(GPT2Config(vocab_size=31, n_positions=16, n_embd=12, n_layer=2, n_head=3, bos_token_id=0, eos_token_id=0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    torch.random.set_rng_state(torch_state)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        yield Path(folder)
