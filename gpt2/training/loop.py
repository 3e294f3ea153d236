"""The loop of a training run, for any engine: step, evaluate, sample, save, and stop when asked. It computes nothing.

Everything random in step n is drawn from (seed, n, rank), the batches and the dropout alike, so a run that goes on from a
checkpoint does what the unbroken run would have done, to the last bit on the same machine.
"""

from __future__ import annotations

import abc
import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from gpt2.training.checkpoint import Checkpoint
from gpt2.training.distributed import Processes
from gpt2.training.objective import Objective
from gpt2.training.optimizer import learning_rate
from gpt2.training.progress import Progress, plot_losses
from gpt_config.errors import ConfigError, TrainingError
from gpt_config.model_config import GPT2Config
from gpt_config.training_config import TrainingConfig

CHECKPOINT_FOLDER = "checkpoints"


@dataclass(frozen=True)
class Stopped:
    """How a run ended: after how many steps, with what best validation loss, and by which signal if by one.

    `is_early`: before `max_steps`, for the validation loss had not fallen in `patience` evaluations.
    """

    step: int
    best_loss: float
    signal: int | None = None
    is_early: bool = False


class TrainingLoop(abc.ABC):
    """What every engine's training has in common; a subclass computes the steps and keeps the state.

        folder/config.json, model.safetensors, tokenizer files    the model with the lowest validation loss
        folder/checkpoints/step-NNNNNNNN.safetensors              the newest two states, to go on from
        folder/metrics.jsonl, loss.png                            how it went

    ConfigError if the objective does not fit the model, or the rows cannot be shared evenly.
    """

    def __init__(
        self,
        model_config: GPT2Config,
        objective: Objective,
        config: TrainingConfig,
        folder: str | Path,
        processes: Processes,
        *,
        is_quiet: bool = False,
        tensorboard: bool = False,
    ) -> None:
        _check_shares(config, processes.world_size)
        objective.check(model_config, config)
        self.config, self.objective, self.folder, self.processes = config, objective, Path(folder), processes
        self.step, self.best_loss = 0, math.inf
        self._n_since_best = 0  # evaluations
        self._is_quiet, self._tensorboard = is_quiet or not processes.is_first, tensorboard
        self._received: list[int] = []

    # -- what an engine does ---------------------------------------------------------------------------------------------

    @property
    @abc.abstractmethod
    def n_parameters(self) -> int:
        """How many numbers are learned."""

    @abc.abstractmethod
    def train_step(self) -> tuple[float, float]:
        """One step: (mean loss over all processes, length of the gradient before clipping). It does not count the step."""

    @abc.abstractmethod
    def validation_loss(self) -> float:
        """The mean loss, in nats a token, over `eval_batches` batches of the validation text."""

    @abc.abstractmethod
    def save(self) -> None:
        """Write a checkpoint of the state as it is."""

    @abc.abstractmethod
    def load(self, step: int | None = None) -> None:
        """Go on from the newest checkpoint in the folder, or that of `step`. CheckpointError if it is damaged."""

    @abc.abstractmethod
    def _save_model(self) -> None:
        """Make the folder an ordinary model folder, with the weights as they are now."""

    @abc.abstractmethod
    def _sample(self) -> str:
        """A text that the model makes up, or none."""

    @abc.abstractmethod
    def _begin(self) -> float:
        """Make ready; the operations a second that all processes could do at best."""

    @abc.abstractmethod
    def _operations_per_token(self) -> float | None:
        """Of a training step, if that can be said."""

    # -- the loop --------------------------------------------------------------------------------------------------------

    def train(self) -> Stopped:
        """Train until `max_steps` are done, or SIGINT or SIGTERM asks to stop; the state is saved either way.

        TrainingError if the loss is no longer a number: the last good state is saved, and the step named.
        """
        self._peak, self._operations = self._begin(), self._operations_per_token()
        with self._progress() as progress, self._signals():
            while self.step < self.config.max_steps and not self._has_had_enough():
                if self._must_stop():
                    self.save()
                    break
                if self.step == 0:
                    self._evaluate(progress)
                self._do_step(progress)
                at_end = self.step == self.config.max_steps
                if at_end or self.step % self.config.eval_interval == 0:
                    self._evaluate(progress)
                if at_end or self.step % self.config.checkpoint_interval == 0 or self._has_had_enough():
                    self.save()
        is_early = self.step < self.config.max_steps and self._has_had_enough()
        if self.processes.is_first and (is_early or self.step == self.config.max_steps):
            plot_losses(self.folder)
        return Stopped(self.step, self.best_loss, self._received[0] if self._received else None, is_early)

    def _has_had_enough(self) -> bool:
        return 0 < self.config.patience <= self._n_since_best

    def _progress(self) -> Any:
        if not self.processes.is_first:
            return contextlib.nullcontext()
        self.folder.mkdir(parents=True, exist_ok=True)
        return Progress(
            self.folder, self.step, self.config.max_steps, is_quiet=self._is_quiet, tensorboard=self._tensorboard
        )

    def _must_stop(self) -> bool:
        """Whether any process got a signal: all of them take part in saving, so all of them must leave together."""
        return self.processes.any(bool(self._received))

    def _do_step(self, progress: Progress | None) -> None:
        start = time.perf_counter()
        loss, norm = self.train_step()
        self.step += 1
        if progress is None:
            return
        rate = self.objective.tokens_per_step / (time.perf_counter() - start)
        progress.step(loss, rate, None if self._operations is None else rate * self._operations / self._peak)
        if self.step % self.config.log_interval == 0 or self.step == 1:
            progress.record(
                {
                    "step": self.step,
                    "loss": loss,
                    "learning_rate": learning_rate(self.config, self.step - 1),
                    "gradient_norm": norm,
                    "tokens_per_second": round(rate, 1),
                }
            )

    def _fail_on_nan(self, loss: float, norm: float) -> NoReturn:
        what = f"the loss of step {self.step} is {loss}"
        if math.isfinite(loss):
            what = f"the gradient of step {self.step} is {norm}"
        self.save()
        raise TrainingError(
            f"{what}: the state before it is saved in {self.folder}; try a lower learning_rate "
            f"(it is {learning_rate(self.config, self.step):.2g}), a smaller clip_norm, or precision=float32"
        )

    def _evaluate(self, progress: Progress | None) -> None:
        loss = self.validation_loss()
        is_best = loss < self.best_loss
        self._n_since_best = 0 if is_best else self._n_since_best + 1
        self.best_loss = min(loss, self.best_loss)
        if is_best:  # before the first step too, so that there is a model from the start
            self._save_model()
        if progress is None:
            return
        figures, sample = self.objective.figures(loss), self._sample()
        progress.record({"step": self.step, "validation_loss": loss, **figures, **({"sample": sample} if sample else {})})
        told = "".join(f", {name.replace('_', ' ')} {value:.4g}" for name, value in figures.items())
        progress.say(f"step {self.step}: validation loss {loss:.4f}{told}{' (best so far)' if is_best else ''}")
        if sample:
            progress.say("  | " + sample.replace("\n", "\n  | "))

    def _progress_values(self) -> dict[str, Any]:
        """Where the run is, for a checkpoint."""
        best_loss = self.best_loss if math.isfinite(self.best_loss) else None
        return {"step": self.step, "best_loss": best_loss, "n_since_best": self._n_since_best}

    def _go_on_from(self, checkpoint: Checkpoint) -> None:
        best_loss = checkpoint.values["best_loss"]
        self.step, self.best_loss = checkpoint.values["step"], math.inf if best_loss is None else best_loss
        self._n_since_best = checkpoint.values.get("n_since_best", 0)  # checkpoints of before there was patience lack it

    # -- signals -------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the run after the step that is under way; a second one ends it at once."""
        self._received.clear()
        if threading.current_thread() is not threading.main_thread():  # only the main thread may set them
            yield
            return
        before: dict[int, Any] = {}

        def stop(number: int, frame: FrameType | None) -> None:
            self._received.append(number)
            signal.signal(number, signal.SIG_DFL)

        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, stop)
        try:
            yield
        finally:
            for which, handler in before.items():
                signal.signal(which, handler)


def training_operations(n_parameters: int, model: GPT2Config, config: TrainingConfig) -> float:
    """Operations a token of a training step: six a weight (two each for output, its gradient, the weight's), and the
    attention's products over half of `context` on average (PaLM, Chowdhery et al. 2022, appendix B)."""
    return 6 * n_parameters + 6 * model.n_layer * config.context * model.n_embd


def _check_shares(config: TrainingConfig, world_size: int) -> None:
    if config.batch_size % (world_size * config.accumulation):
        raise ConfigError(
            f"batch_size={config.batch_size} cannot be shared by {world_size} processes in accumulation="
            f"{config.accumulation} parts each: choose a multiple of {world_size * config.accumulation}"
        )
