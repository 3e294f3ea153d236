"""Section training: time a step of our training loop and of a typical loop around transformers' GPT-2.

It also computes the share of the device's peak arithmetic speed that each of them reaches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from gpt2 import model as architecture
from gpt2.benchmark.bench import Bench
from gpt2.benchmark.machine import free_memory, read_per_token
from gpt2.benchmark.measure import Contender, take_turns
from gpt2.benchmark.peers import load_transformers
from gpt2.benchmark.results import Entrant, LeftOutError, Quantity, Row, timed_rows
from gpt2.benchmark.settings import OURS, Settings
from gpt2.benchmark.subject import prompt_rows
from gpt2.pretrained import GPT2, load_model
from gpt2.training import Trainer
from gpt2.training.hardware import keep_freed_memory, measured_peak, synchronize
from gpt2.training.loop import training_operations
from gpt2.training.loss import LanguageModelLoss
from gpt2.training.objective import Objective
from gpt_config.training_config import TrainingConfig

_PRECISIONS = ("float32", "bfloat16")  # of matrix products; weights and optimizer moments are float32
_RATE = 1e-4  # learning rate
# Largest relative difference of the losses before and after a step. Both sides use the same rule, so only rounding differs.
_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}


@dataclass(frozen=True)
class Learner:
    """A model in training. `step` trains on the batch; `loss` returns the loss of the batch without dropout, in nats."""

    step: Callable[[], object]
    loss: Callable[[], float]


# A function of the bench, the ids (B, T + 1) and the dtype of the matrix products.
MakeLearner = Callable[[Bench, NDArray[Any], str], Learner]


def training(bench: Bench, makers: Mapping[str, MakeLearner] | None = None) -> None:
    """Measure each precision in the settings. `makers` are the training loops by name; the default is `LEARNERS`."""
    settings = bench.settings
    setting = f"{settings.train_rows} rows of {settings.train_context}, dropout {settings.dropout:g}"
    setting += ", compiled" * settings.compile
    if bench.device.type == "cpu":
        # Our loop does this too. It applies to the whole process, so it is no advantage for our side.
        keep_freed_memory()
    for dtype in settings.dtypes:
        if dtype not in _PRECISIONS:
            continue
        try:
            _measure(bench, setting, dtype, LEARNERS if makers is None else makers)
        except Exception as error:  # most likely a lack of memory in a timed step; it must not stop the benchmark
            bench.results.leave_out("training", "all", dtype, error)


def _measure(bench: Bench, setting: str, dtype: str, makers: Mapping[str, MakeLearner]) -> None:
    settings = bench.settings
    sound = _checked(bench, setting, _learners(bench, dtype, makers), dtype)
    bench.say(f"training {dtype}: {settings.rounds} rounds")
    contenders = [Contender(partial(_timed_step, learner, bench.device)) for _, learner in sound]
    times = take_turns(contenders, settings.rounds)
    entrants, limit = [entrant for entrant, _ in sound], _tokens_at_peak(bench, dtype)
    tokens = settings.train_rows * settings.train_context
    for row in timed_rows(Quantity("training", setting, None, "tokens/s", tokens), entrants, times):
        share = row.value.median / limit if row.value is not None else None
        bench.results.rows.append(replace(row, share_of_limit=share))


def _timed_step(learner: Learner, device: torch.device) -> None:
    learner.step()
    synchronize(device)


def _tokens_at_peak(bench: Bench, dtype: str) -> float:
    """Tokens per second if all operations were as fast as those of a large matrix product."""
    config = bench.subject.config
    operations = training_operations(read_per_token(config), config, _config(bench.settings, dtype))
    return measured_peak(bench.device, getattr(torch, dtype)) / operations


def _learners(bench: Bench, dtype: str, makers: Mapping[str, MakeLearner]) -> dict[str, Learner]:
    settings = bench.settings
    ids = np.array(prompt_rows(bench.subject, bench.texts.prompts, [settings.train_context + 1] * settings.train_rows))
    learners = {}
    for name, make in makers.items():
        if name != OURS and name not in settings.peers:
            continue
        bench.say(f"training: loading {name} {dtype}")
        try:
            _check_room(bench)
            learners[name] = make(bench, ids, dtype)
        except Exception as error:  # an error in another library must not stop the benchmark
            bench.results.leave_out("training", name, dtype, error)
    return learners


def _check_room(bench: Bench) -> None:
    # Weights, gradients and two moments in float32. Activations are not counted, because they depend on the batch.
    needed, free = 16 * bench.subject.config.n_parameters, free_memory(bench.settings.device)
    if free is not None and needed > free:
        raise LeftOutError(f"not enough memory: it needs more than {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")


def _checked(bench: Bench, setting: str, learners: dict[str, Learner], dtype: str) -> list[tuple[Entrant, Learner]]:
    """The learners whose loss equals ours before a step, and after it if there is no dropout, which differs by chance."""
    bench.say(f"training {dtype}: comparing the losses")
    losses = {}
    for name, learner in learners.items():
        try:
            losses[name] = _losses(learner, with_step=bench.settings.dropout == 0)
        except Exception as error:  # the same reason as above
            bench.results.leave_out("training", name, dtype, error)
    sound = []
    for name in losses:
        learner = learners[name]
        if OURS not in losses:
            bench.results.leave_out("training", name, dtype, LeftOutError(f"cannot be checked: {OURS} has no losses"))
        elif all(abs(a - b) <= _TOLERANCE[dtype] * abs(b) for a, b in zip(losses[name], losses[OURS], strict=True)):
            sound.append((Entrant(name, dtype, True if dtype == "float32" else None), learner))
        else:
            note = f"its losses are {losses[name]} instead of {losses[OURS]}: not timed"
            bench.results.rows.append(Row("training", setting, None, Entrant(name, dtype, False, note), "tokens/s", None))
    return sound


def _losses(learner: Learner, *, with_step: bool) -> list[float]:
    before = learner.loss()
    if not with_step:
        return [before]
    learner.step()
    return [before, learner.loss()]


class _OneBatch(Objective):
    """An objective with the same batch in every step, which is enough to time a step."""

    def __init__(self, ids: NDArray[Any]) -> None:
        self._batch = (ids[:, :-1].copy(), ids[:, 1:].copy())
        self.batches = self
        self.evaluation = self
        self.tokens_per_step = float(self._batch[0].size)
        self.count = 1

    def __call__(self, step: int, rank: int = 0, world_size: int = 1) -> tuple[NDArray[Any], ...]:
        return self._batch

    def share(self, step: int) -> float:
        return 1.0

    def loss(self, model: architecture.GPT2) -> nn.Module:
        return LanguageModelLoss(model)

    def figures(self, loss: float) -> dict[str, float]:
        return {}


def _config(settings: Settings, dtype: str) -> TrainingConfig:
    return TrainingConfig(
        batch_size=settings.train_rows, context=settings.train_context, warmup_steps=0, max_steps=10**6,
        learning_rate=_RATE, min_learning_rate=_RATE, precision=dtype, compile=settings.compile,
    )  # fmt: skip


def _ours(bench: Bench, ids: NDArray[Any], dtype: str) -> Learner:
    settings, subject = bench.settings, bench.subject
    p = settings.dropout
    model = GPT2(replace(subject.config, embd_pdrop=p, attn_pdrop=p, resid_pdrop=p))
    model.load_state_dict(load_model(subject.folder).state_dict())
    trainer = Trainer(model.to(bench.device), _OneBatch(ids), _config(settings, dtype), subject.work / "run", is_quiet=True)
    return Learner(trainer.train_step, trainer.validation_loss)


def _transformers(bench: Bench, ids: NDArray[Any], dtype: str) -> Learner:
    """A typical training loop: transformers' model, torch's AdamW with the same settings, and gradient clipping."""
    settings, device = bench.settings, bench.device
    model = load_transformers(bench.subject.folder, torch.float32).to(device).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = settings.dropout
    config = _config(settings, dtype)
    decays = [[p for p in model.parameters() if (p.dim() >= 2) == is_matrix] for is_matrix in (True, False)]
    groups = [{"params": decays[0], "weight_decay": config.weight_decay}, {"params": decays[1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=_RATE, betas=(config.beta1, config.beta2))
    compute = torch.compile(model) if settings.compile else model
    rows, targets = (torch.from_numpy(part.copy()).to(device) for part in (ids[:, :-1], ids[:, 1:]))

    def loss() -> torch.Tensor:
        # With `labels` alone, transformers shifts them by one itself and so trains on one token less per row.
        value: torch.Tensor = compute(input_ids=rows, labels=targets, shift_labels=targets, use_cache=False).loss
        return value

    def autocast() -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if dtype == "float32" else torch.autocast(device.type, torch.bfloat16)

    def step() -> None:
        with autocast():
            value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def evaluated() -> float:
        model.eval()
        with autocast():
            value = float(loss())
        model.train()
        return value

    return Learner(step, evaluated)


# Training loops by the name of their package.
LEARNERS: dict[str, MakeLearner] = {OURS: _ours, "transformers": _transformers}
