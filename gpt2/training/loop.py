"""The training loop of all engines: step, evaluate, sample, save, and stop on a signal. A subclass computes the steps.

All random numbers of step n, for batches and dropout, depend only on (seed, n, rank). So a run that is resumed from a
checkpoint gives the same weights, bit for bit, as an uninterrupted run on the same machine.
"""

from __future__ import annotations

import abc
import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from torch import Tensor

from gpt2.evaluation.figures import check_not_nan
from gpt2.training.checkpoint import Checkpoint, save_checkpoint
from gpt2.training.distributed import Processes
from gpt2.training.objective import Objective
from gpt2.training.optimizer import learning_rate
from gpt2.training.progress import Progress, plot_losses
from gpt2.training.run_logs import RunLog, check_logs
from gpt_config.atomic_write import atomic_write_json, remove_abandoned
from gpt_config.errors import CheckpointError, ConfigError, TrainingError
from gpt_config.model_config import GPT2Config
from gpt_config.training_config import TrainingConfig

CHECKPOINT_FOLDER = "checkpoints"
SHAPE_FILE = "model_config.json"  # of the model in the checkpoints, which are loaded without the base model
LAST_FOLDER = "last"  # of the last model, if the run's folder has the best one
_HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none


@dataclass(frozen=True)
class Stopped:
    """How a run ended: the number of steps, the best validation loss (nats), and the signal that stopped the run, if any.

    A signal that comes during the last step stops nothing, so it is not stated.

    `is_early` is True if the run ended before `max_steps`, because the validation loss did not fall in `patience`
    evaluations. `best_step` is the number of steps after which the best loss was measured: 0 if no step improved on the
    model that the run began with; None in a run of an older version, whose checkpoints do not say it.
    """

    step: int
    best_loss: float
    signal: int | None = None
    is_early: bool = False
    best_step: int | None = None


class TrainingLoop(abc.ABC):
    """The part of training that all engines share. A subclass computes the steps and holds the state.

    A run writes these files:

        folder/config.json, model.safetensors, tokenizer files    the model with the lowest validation loss (keep="best",
                                                                  "both") or the last one (keep="last")
        folder/last/                                              the last model (keep="both")
        folder/checkpoints/step-NNNNNNNN.safetensors              the two newest checkpoints, to resume from
        folder/model_config.json                                  the shape of the model whose state they have
        folder/metrics.jsonl, loss.png                            losses and speed over the steps

    `logs` get the metrics too: names of `LOGS`, or objects with the methods of `RunLog`. `tensorboard` adds that name. If a
    log fails, a warning says so, and the run goes on.

    ConfigError if the objective does not fit the model, or if a batch cannot be divided evenly among the processes.
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
        logs: Sequence[str | RunLog] = (),
    ) -> None:
        check_logs([log for log in logs if isinstance(log, str)])
        _check_shares(config, processes.world_size)
        objective.check(model_config, config)
        self.config, self.objective, self.folder, self.processes = config, objective, Path(folder), processes
        self._model_config = model_config
        self.step, self.best_loss = 0, math.inf
        self.best_step: int | None = None  # when `best_loss` was measured
        self._n_since_best = 0  # evaluations since the best one
        self._is_quiet = is_quiet or not processes.is_first
        self._logs = (*logs, "tensorboard") if tensorboard else tuple(logs)
        self._received: list[int] = []

    # -- what a subclass implements --------------------------------------------------------------------------------------

    @property
    @abc.abstractmethod
    def n_parameters(self) -> int:
        """Number of trainable parameters."""

    @abc.abstractmethod
    def train_step(self) -> tuple[float, float]:
        """Do one step; return (mean loss over all processes, gradient norm before clipping). Does not change `step`."""

    @abc.abstractmethod
    def validation_loss(self) -> float:
        """Return the mean loss, in nats, over the validation batches of the objective."""

    @abc.abstractmethod
    def save(self) -> None:
        """Write a checkpoint of the current state."""

    @abc.abstractmethod
    def load(self, step: int | None = None) -> None:
        """Load the newest checkpoint in the folder, or the one of `step`. CheckpointError if it is missing or damaged."""

    @abc.abstractmethod
    def _save_model(self, folder: Path) -> None:
        """Write the current weights into `folder`, as an ordinary model folder."""

    @abc.abstractmethod
    def _sample(self) -> str:
        """Return a text generated by the model, or "" for none."""

    def _scores(self) -> dict[str, float]:
        """Return figures of the model on tasks, by name. All processes call it; only the first needs to return them."""
        return {}

    @abc.abstractmethod
    def _begin(self) -> float:
        """Prepare the device; return the peak speed of all processes together, in operations per second."""

    @abc.abstractmethod
    def _operations_per_token(self) -> float | None:
        """Return the operations per token of a training step, or None if they are not known."""

    # -- the loop --------------------------------------------------------------------------------------------------------

    def train(self) -> Stopped:
        """Train until `max_steps`, the end of `patience`, SIGINT, SIGTERM or SIGHUP; the state is saved in each case.

        TrainingError if a loss or gradient is not finite. The state before that step is saved; the message names the step.
        """
        self._peak, self._operations = self._begin(), self._operations_per_token()
        with self._progress() as progress, self._signals():
            if self._is_unmeasured and not self._must_stop():
                self._evaluate(progress)  # also before the first step, so that the folder always has a model
            while self.step < self.config.max_steps and not self._patience_is_over():
                if self._must_stop():
                    self.save()
                    self._save_models(is_best=False)
                    break
                self._do_step(progress)
                at_end = self.step == self.config.max_steps
                if at_end or self.step % self.config.eval_interval == 0:
                    self._evaluate(progress)
                if at_end or self.step % self.config.checkpoint_interval == 0 or self._patience_is_over():
                    self.save()
        is_early = self.step < self.config.max_steps and self._patience_is_over()
        is_done = is_early or self.step >= self.config.max_steps
        if self.processes.is_first and is_done:
            plot_losses(self.folder)
        # A signal that comes during the last step stops nothing: all steps are done and saved.
        received = self._received[0] if self._received and not is_done else None
        return Stopped(self.step, self.best_loss, received, is_early, self.best_step)

    def forget_best(self) -> None:
        """Measure the validation loss again before the next step, and compare later losses with that one only.

        For a resumed run with other validation data, on which no earlier loss was measured.
        """
        self.best_loss, self.best_step, self._n_since_best = math.inf, None, 0

    @property
    def _is_unmeasured(self) -> bool:
        return math.isinf(self.best_loss)

    def _patience_is_over(self) -> bool:
        return 0 < self.config.patience <= self._n_since_best

    def _progress(self) -> Any:
        if not self.processes.is_first:
            return contextlib.nullcontext()
        self.folder.mkdir(parents=True, exist_ok=True)
        for folder in (self.folder, self.folder / CHECKPOINT_FOLDER):  # of a run that was killed
            remove_abandoned(folder)
        return Progress(
            self.folder, self.step, self.config.max_steps,
            is_measured=not self._is_unmeasured, is_quiet=self._is_quiet, logs=self._logs,
            about={**self.config.to_dict(), "model": self._model_config.to_dict(), "parameters": self.n_parameters},
        )  # fmt: skip

    def _must_stop(self) -> bool:
        """Whether any process received a signal. All processes stop at the same step, because saving needs all of them."""
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
            f"{what}: the state before this step is saved in {self.folder}; try a lower learning_rate "
            f"(now {learning_rate(self.config, self.step):.2g}), a smaller clip_norm, or precision=float32"
        )

    def _evaluate(self, progress: Progress | None) -> None:
        loss = self.validation_loss()
        if not math.isfinite(loss):
            self._fail_on_validation(loss)
        is_best = loss < self.best_loss
        self._n_since_best = 0 if is_best else self._n_since_best + 1
        if is_best:
            self.best_loss, self.best_step = loss, self.step
        self._save_models(is_best)
        scores = self._scores()
        if progress is None:
            return
        figures, sample = self.objective.figures(loss) | scores, self._sample()
        progress.record({"step": self.step, "validation_loss": loss, **figures, **({"sample": sample} if sample else {})})
        shown = "".join(f", {name.replace('_', ' ')} {value:.4g}" for name, value in figures.items())
        progress.say(f"step {self.step}: validation loss {loss:.4f}{shown}{' (best so far)' if is_best else ''}")
        if sample:
            progress.say("  | " + sample.replace("\n", "\n  | "))

    def _fail_on_validation(self, loss: float) -> NoReturn:
        if self.step == 0:
            check_not_nan(loss)
        raise TrainingError(
            f"the validation loss after step {self.step} is {loss}: resume from an older checkpoint with a lower "
            f"learning_rate (now {learning_rate(self.config, self.step):.2g}) or precision=float32"
        )

    def _save_models(self, is_best: bool) -> None:
        """Write the models that `keep` asks for. The current one is written as the best only if `is_best`."""
        if is_best and self.config.keep != "last":
            self._save_model(self.folder)
        if self.config.keep != "best":
            self._save_model(self.folder / LAST_FOLDER if self.config.keep == "both" else self.folder)

    def _write_checkpoint(self, tensors: Mapping[str, Tensor], **values: Any) -> None:
        """Write `tensors`, the progress and `values` as a checkpoint, and beside it the shape of the model."""
        atomic_write_json(self.folder / SHAPE_FILE, self._model_config.to_dict())
        save_checkpoint(self.folder / CHECKPOINT_FOLDER, Checkpoint(tensors, {**self._progress_values(), **values}))

    def _progress_values(self) -> dict[str, Any]:
        """Return the state of the loop, for a checkpoint."""
        best_loss = self.best_loss if math.isfinite(self.best_loss) else None
        return {
            "step": self.step, "best_loss": best_loss, "best_step": self.best_step, "n_since_best": self._n_since_best,
        }  # fmt: skip

    def _restore_progress(self, checkpoint: Checkpoint) -> None:
        values = checkpoint.values
        best_loss, best_step = values.get("best_loss"), values.get("best_step")
        n_since_best = values.get("n_since_best", 0)  # like best_step, it is missing in older checkpoints
        if not all(type(number) is int and number >= 0 for number in (values.get("step"), n_since_best)):
            raise CheckpointError(f"the checkpoint in {self.folder} is damaged (its step is missing): use another one")
        for name, value, kinds in (("best_loss", best_loss, (int, float)), ("best_step", best_step, (int,))):
            if value is not None and not (type(value) in kinds and math.isfinite(value)):
                raise CheckpointError(f"the checkpoint in {self.folder} is damaged ({name}={value!r:.80}): use another one")
        self.step, self.best_loss = values["step"], math.inf if best_loss is None else best_loss
        self.best_step, self._n_since_best = best_step, n_since_best

    # -- signals -------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Let SIGINT, SIGTERM and SIGHUP end the run after the current step. A second signal ends it immediately.

        A closed terminal may send SIGHUP more than once, so a second SIGHUP has no effect. Under nohup, which ignores it,
        SIGHUP stays ignored.
        """
        self._received.clear()
        if threading.current_thread() is not threading.main_thread():  # Python sets handlers in the main thread only
            yield
            return
        before: dict[int, Any] = {}

        def stop(number: int, frame: FrameType | None) -> None:
            self._received.append(number)
            signal.signal(number, signal.SIG_IGN if number == _HANGUP else signal.SIG_DFL)

        for number in (signal.SIGINT, signal.SIGTERM, _HANGUP):
            if number is not None and not (number == _HANGUP and signal.getsignal(number) == signal.SIG_IGN):
                before[number] = signal.signal(number, stop)
        try:
            yield
        finally:
            for which, handler in before.items():
                signal.signal(which, handler)


def training_operations(n_parameters: int, model: GPT2Config, config: TrainingConfig) -> float:
    """Return the operations per token of a training step (PaLM, Chowdhery et al. 2022, appendix B).

    There are 6 per weight: 2 each for the output, the gradient of the input and the gradient of the weight. The matrix
    products of attention, over half of `context` on average, are added.
    """
    return 6 * n_parameters + 6 * model.n_layer * config.context * model.n_embd


def _check_shares(config: TrainingConfig, world_size: int) -> None:
    if config.batch_size % (world_size * config.accumulation):
        raise ConfigError(
            f"batch_size={config.batch_size} cannot be divided among {world_size} processes with accumulation="
            f"{config.accumulation}: choose a multiple of {world_size * config.accumulation}"
        )
