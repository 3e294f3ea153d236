"""The training loop: batch, loss, gradient, step; evaluate, sample, save. It knows neither text files nor options.

Everything random in step n is drawn from (seed, n, rank), the batches and the dropout alike, so a run that goes on from a
checkpoint does what the unbroken run would have done, to the last bit on the same machine.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from gpt2.model import GPT2
from gpt2.training.batches import Batches, EvaluationBatches, mix
from gpt2.training.checkpoint import (
    Checkpoint,
    gather_state,
    load_checkpoint,
    restore_state,
    save_checkpoint,
    whole_weights,
)
from gpt2.training.distributed import Processes, share_model, without_exchange
from gpt2.training.hardware import choose_precision, keep_freed_memory, measured_peak
from gpt2.training.loss import LanguageModelLoss
from gpt2.training.optimizer import learning_rate, make_optimizer
from gpt2.training.preparation import TrainingData
from gpt2.training.progress import Progress, plot_losses
from gpt_config.errors import CheckpointError, ConfigError, TrainingError
from gpt_config.generation_config import GenerationConfig
from gpt_config.training_config import TrainingConfig

CHECKPOINT_FOLDER = "checkpoints"


@dataclass(frozen=True)
class Stopped:
    """How a run ended: after how many steps, with what best validation loss, and by which signal if by one."""

    step: int
    best_loss: float
    signal: int | None = None


class Trainer:
    """Trains `model` on `data`, and keeps in `folder` what the run needs and yields.

        folder/config.json, model.safetensors, tokenizer files    the model with the lowest validation loss
        folder/checkpoints/step-NNNNNNNN.safetensors              the newest two states, to go on from
        folder/metrics.jsonl, loss.png                            how it went

    ConfigError if the context is longer than the model's, or the vocabularies differ.
    """

    def __init__(
        self,
        model: GPT2,
        data: TrainingData,
        config: TrainingConfig,
        folder: str | Path,
        *,
        processes: Processes | None = None,
        is_quiet: bool = False,
        tensorboard: bool = False,
    ) -> None:
        _check_fit(model, data, config, 1 if processes is None else processes.world_size)
        self.config, self.data, self.folder = config, data, Path(folder)
        self.processes = processes or Processes(0, 1, model.wte.weight.device)
        self.step, self.best_loss = 0, math.inf
        self._is_quiet, self._tensorboard = is_quiet or not self.processes.is_first, tensorboard
        self.model = model.to(self.processes.device).train()
        self._n_parameters = model.wte.weight.numel() + sum(p.numel() for p in model.h.parameters())
        if config.gradient_checkpointing:
            for block in model.h:
                block.forward = partial(recompute, block.forward, use_reentrant=False)  # type: ignore[method-assign]
        loss = share_model(LanguageModelLoss(model), model.h, self.processes, config)
        self._module = loss
        self._loss = torch.compile(loss) if config.compile else loss
        self._optimizer = make_optimizer(model, config)
        self._precision = choose_precision(config.precision, self.processes.device)
        # Gradients of float16 underflow: the loss is scaled up, and the gradients down again.
        self._scaler = torch.amp.GradScaler(self.processes.device.type, enabled=self._precision == torch.float16)
        self._batches = Batches(data.train, config.context, config.batch_size, config.seed)
        self._evaluation = EvaluationBatches(
            data.validation, config.context, config.batch_size, config.seed, limit=config.eval_batches
        )
        self._received: list[int] = []

    # -- the loop ------------------------------------------------------------------------------------------------------

    def train(self) -> Stopped:
        """Train until `max_steps` are done, or SIGINT or SIGTERM asks to stop; the state is saved either way.

        TrainingError if the loss is no longer a number: the last good state is saved, and the step named.
        """
        if self.processes.device.type == "cpu":
            keep_freed_memory()
        self._peak = measured_peak(self.processes.device, self._precision)
        with self._progress() as progress, self._signals():
            while self.step < self.config.max_steps:
                if self._must_stop():
                    self.save()
                    break
                if self.step == 0:
                    self._evaluate(progress)
                self._do_step(progress)
                at_end = self.step == self.config.max_steps
                if at_end or self.step % self.config.eval_interval == 0:
                    self._evaluate(progress)
                if at_end or self.step % self.config.checkpoint_interval == 0:
                    self.save()
        if self.processes.is_first and self.step == self.config.max_steps:
            plot_losses(self.folder)
        return Stopped(self.step, self.best_loss, self._received[0] if self._received else None)

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
        rate = self.config.tokens_per_step / (time.perf_counter() - start)
        progress.step(loss, rate, rate * self._operations_per_token() / (self._peak * self.processes.world_size))
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

    def train_step(self) -> tuple[float, float]:
        """One step: (mean loss over all processes, length of the gradient before clipping). It does not count the step."""
        config, processes = self.config, self.processes
        torch.manual_seed(mix(config.seed, 3, self.step, processes.rank))  # dropout
        inputs, targets = self._on_device(self._batches(self.step, processes.rank, processes.world_size))
        total = torch.zeros((), device=processes.device)
        parts = list(zip(inputs.chunk(config.accumulation), targets.chunk(config.accumulation), strict=True))
        for number, (x, y) in enumerate(parts, 1):
            with without_exchange(self._module, is_last=number == len(parts)):
                with self._autocast():
                    loss = self._loss(x, y) / len(parts)
                self._scaler.scale(loss).backward()
            total += loss.detach()
        self._scaler.unscale_(self._optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm or math.inf)
        mean_loss, norm_value = self.processes.mean(total).item(), float(norm)
        # With a scaler, gradients that overflow are its business: it leaves the step out and scales less.
        if not math.isfinite(mean_loss) or not (math.isfinite(norm_value) or self._scaler.is_enabled()):
            self._optimizer.zero_grad()
            self._fail_on_nan(mean_loss, norm_value)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad()
        return mean_loss, norm_value

    def _fail_on_nan(self, loss: float, norm: float) -> None:
        what = f"the loss of step {self.step} is {loss}"
        if math.isfinite(loss):
            what = f"the gradient of step {self.step} is {norm}"
        self.save()
        raise TrainingError(
            f"{what}: the state before it is saved in {self.folder}; try a lower learning_rate "
            f"(it is {learning_rate(self.config, self.step):.2g}), a smaller clip_norm, or precision=float32"
        )

    def _on_device(self, batch: tuple[Any, Any]) -> tuple[Tensor, Tensor]:
        inputs, targets = (torch.from_numpy(array).to(self.processes.device) for array in batch)
        return inputs, targets

    def _autocast(self) -> contextlib.AbstractContextManager[None]:
        if self._precision == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.processes.device.type, self._precision)

    def _operations_per_token(self) -> float:
        """Of a training step: six a weight (two each for output, its gradient, the weight's), and the attention's
        products over half of `context` on average (PaLM, Chowdhery et al. 2022, appendix B)."""
        attention = 6 * self.model.config.n_layer * self.config.context * self.model.config.n_embd
        return 6 * self._n_parameters + attention

    # -- evaluation ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def validation_loss(self) -> float:
        """The mean loss, in nats a token, over `eval_batches` batches of the validation text."""
        processes = self.processes
        self._module.eval()
        total = torch.zeros((), dtype=torch.float64 if processes.device.type != "mps" else torch.float32)
        for number in range(self._evaluation.count):
            x, y = self._on_device(self._evaluation(number, processes.rank, processes.world_size))
            with self._autocast():
                total += self._module(x, y).item()
        self._module.train()
        total = (total / self._evaluation.count).float().to(processes.device)
        return float(processes.mean(total).item())

    def _evaluate(self, progress: Progress | None) -> None:
        loss = self.validation_loss()
        is_best = loss < self.best_loss
        self.best_loss = min(loss, self.best_loss)
        if is_best:  # before the first step too, so that there is a model from the start
            self._save_model()
        if progress is None:
            return
        bits = bits_per_byte(loss, len(self.data.validation), self.data.validation.n_bytes)
        sample = self._sample()
        values: dict[str, Any] = {
            "step": self.step,
            "validation_loss": loss,
            "perplexity": math.exp(min(loss, 700)),
            "bits_per_byte": bits,
        }
        if sample:
            values["sample"] = sample
        progress.record(values)
        progress.say(
            f"step {self.step}: validation loss {loss:.4f}, perplexity {values['perplexity']:.2f}, "
            f"{bits:.3f} bits a byte{' (best so far)' if is_best else ''}"
        )
        if sample:
            progress.say("  | " + sample.replace("\n", "\n  | "))

    def _sample(self) -> str:
        """A continuation of the configured prompt. Under FSDP no process has a whole model to make it with."""
        from gpt2.completion import complete

        tokenizer, config = self.data.tokenizer, self.config
        if not config.sample_tokens or config.sharding == "fsdp":
            return ""
        if not config.sample_prompt and tokenizer.eot_token_id is None:
            return ""
        self.model.eval()
        options = GenerationConfig(max_new_tokens=config.sample_tokens, do_sample=True, temperature=0.8, seed=config.seed)
        try:
            completion = next(iter(complete(self.model, tokenizer, [config.sample_prompt], options)))
        finally:
            self.model.train()
        return config.sample_prompt + completion.text

    # -- saving and going on -------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint of the state as it is."""
        # All processes take part in gathering it; the first one writes.
        tensors = gather_state(self._module, self._optimizer)
        if self.processes.is_first:
            values = {
                "step": self.step,
                "best_loss": self.best_loss if math.isfinite(self.best_loss) else None,
                "scaler": self._scaler.state_dict(),
            }
            save_checkpoint(self.folder / CHECKPOINT_FOLDER, Checkpoint(tensors, values))
        self.processes.wait()

    def load(self, step: int | None = None) -> None:
        """Go on from the newest checkpoint in the folder, or that of `step`. CheckpointError if it is damaged."""
        checkpoint = load_checkpoint(self.folder / CHECKPOINT_FOLDER, step)
        try:
            restore_state(self._module, self._optimizer, checkpoint.tensors)
        except (RuntimeError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"the checkpoint in {self.folder} is not of this model ({reason})") from None
        values = checkpoint.values
        self.step = values["step"]
        self.best_loss = math.inf if values["best_loss"] is None else values["best_loss"]
        if values["scaler"]:
            self._scaler.load_state_dict(values["scaler"])

    def _save_model(self) -> None:
        """Make the folder an ordinary model folder, with the weights as they are now."""
        if self.config.sharding == "fsdp":
            weights = whole_weights(self._module)
            if self.processes.is_first:
                model = GPT2(self.model.config)
                model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in weights.items()})
                model.save_pretrained(self.folder, tokenizer=self.data.tokenizer)
        elif self.processes.is_first:
            self.model.save_pretrained(self.folder, tokenizer=self.data.tokenizer)

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


def bits_per_byte(loss: float, n_tokens: int, n_bytes: int) -> float:
    """`loss` (nats a token) as bits a byte of text: a measure that does not depend on how text is cut into tokens."""
    return loss / math.log(2) * n_tokens / max(n_bytes, 1)


def _check_fit(model: GPT2, data: TrainingData, config: TrainingConfig, world_size: int) -> None:
    if config.batch_size % (world_size * config.accumulation):
        raise ConfigError(
            f"batch_size={config.batch_size} cannot be shared by {world_size} processes in accumulation="
            f"{config.accumulation} parts each: choose a multiple of {world_size * config.accumulation}"
        )
    if config.context > model.config.n_positions:
        raise ConfigError(f"context={config.context} is longer than the {model.config.n_positions} positions of the model")
    if data.train.vocab_size > model.config.vocab_size:
        raise ConfigError(
            f"the data has {data.train.vocab_size} token ids and the model {model.config.vocab_size}: "
            "encode it with the model's tokenizer"
        )
