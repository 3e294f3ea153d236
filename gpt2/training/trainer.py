"""Training with PyTorch: the steps of the loop, on one device or in several processes. Depends on model and objective."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from gpt2.dropout import in_mode
from gpt2.fast import threads
from gpt2.model import GPT2
from gpt2.quantization.quantize import check_can_learn
from gpt2.training.batches import mix
from gpt2.training.checkpoint import (
    gather_state,
    load_checkpoint,
    restore_state,
    whole_weights,
)
from gpt2.training.distributed import Processes, share_model, without_exchange
from gpt2.training.hardware import choose_precision, keep_freed_memory, measured_peak
from gpt2.training.loop import CHECKPOINT_FOLDER, Stopped, TrainingLoop, training_operations
from gpt2.training.memory import check_batch_memory
from gpt2.training.objective import Batch, LanguageModelling, Objective
from gpt2.training.optimizer import learning_rate, make_optimizer
from gpt2.training.outputs import Outputs, no_scores, text_outputs
from gpt2.training.preparation import TrainingData
from gpt2.training.run_logs import RunLog
from gpt2.training.weight_average import WeightAverage
from gpt_config.errors import CheckpointError, ConfigError
from gpt_config.training_config import TrainingConfig


class Trainer(TrainingLoop):
    """Trains `model` with PyTorch. State, metrics and results of the run are written into `folder`: see `TrainingLoop`.

    `data` is an encoded text, for language modelling, or another `Objective`. `outputs` writes the best model and samples a
    text. By default, a run on text writes an ordinary model folder; other runs write only checkpoints and metrics.
    Parameters that require no gradient do not change. The model may be in either mode, training or evaluation, and is in the
    same one afterwards.

    InputError if the model is in int8, ConfigError if weights that are to be trained have 16 bits, or if a batch needs more
    memory than there is.
    """

    def __init__(
        self,
        model: GPT2,
        data: TrainingData | Objective,
        config: TrainingConfig,
        folder: str | Path,
        *,
        outputs: Outputs | None = None,
        processes: Processes | None = None,
        is_quiet: bool = False,
        tensorboard: bool = False,
        logs: Sequence[str | RunLog] = (),
    ) -> None:
        check_can_learn(model)
        _check_precision(model)
        processes = processes or Processes(0, 1, model.device)
        if isinstance(data, Objective):
            objective, self._outputs = data, outputs or Outputs()
        else:
            objective, self._outputs = LanguageModelling(data, config), outputs or text_outputs(data.tokenizer, config)
        super().__init__(
            model.config, objective, config, folder, processes, is_quiet=is_quiet, tensorboard=tensorboard, logs=logs
        )
        self.model = model.to(self.processes.device)
        if config.gradient_checkpointing:
            for block in model.h:
                block.forward = partial(recompute, block.forward, use_reentrant=False)
        loss = objective.loss(model).to(self.processes.device)
        self._module = share_model(loss, model.h, self.processes, config)
        self._loss = torch.compile(self._module) if config.compile else self._module
        self._optimizer = make_optimizer(self._module, config)
        self._average = WeightAverage(self._module, config.ema)
        self._precision = choose_precision(config.precision, self.processes.device)
        # Gradients underflow in float16, so the loss is scaled up, and the gradients are scaled down again.
        self._check_memory()
        self._scaler = torch.amp.GradScaler(self.processes.device.type, enabled=self._precision == torch.float16)

    def _check_memory(self) -> None:
        config, device = self.config, self.processes.device
        rows = config.batch_size // self.processes.world_size
        tokens = int(self.objective.tokens_per_step / config.batch_size)
        check_batch_memory(self.model.config, config, self.processes, tokens)  # there may be too many rows to divide
        n_rows = rows // parts_of_step(rows, tokens, config.accumulation, device)
        check_batch_memory(self.model.config, config, self.processes, tokens, n_rows)

    @property
    def n_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self._module.parameters() if parameter.requires_grad)

    def _begin(self) -> float:
        if self.processes.device.type == "cpu":
            keep_freed_memory()
        return measured_peak(self.processes.device, self._precision) * self.processes.world_size

    def train(self) -> Stopped:
        with in_mode(self._module, is_training=True):
            return super().train()

    def train_step(self) -> tuple[float, float]:
        with in_mode(self._module, is_training=True), threads.step((id(self), "train"), self.processes.device):
            return self._train_step()

    def _train_step(self) -> tuple[float, float]:
        config, processes = self.config, self.processes
        torch.manual_seed(mix(config.seed, 3, self.step, processes.rank))  # dropout
        batch = self._on_device(self.objective.batches(self.step, processes.rank, processes.world_size))
        rows, tokens = batch[0].shape
        n_parts = parts_of_step(rows, tokens, config.accumulation, processes.device)
        parts = list(zip(*(tensor.chunk(n_parts) for tensor in batch), strict=True))
        losses = []
        for number, part in enumerate(parts, 1):
            with without_exchange(self._module, is_last=number == len(parts)):
                with self._autocast():
                    loss = self._loss(*part) / len(parts)
                self._scaler.scale(loss).backward()
            losses.append(loss.detach())
        self._scaler.unscale_(self._optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self._module.parameters(), config.clip_norm or math.inf)
        mean_loss, norm_value = processes.mean(torch.stack(losses).sum()).item(), float(norm)
        # If gradients overflow, the scaler skips the step and reduces its scale.
        if not math.isfinite(mean_loss) or not (math.isfinite(norm_value) or self._scaler.is_enabled()):
            self._optimizer.zero_grad()
            self._fail_on_nan(mean_loss, norm_value)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._average.update(self.step)
        self._optimizer.zero_grad()
        return mean_loss, norm_value

    def _on_device(self, batch: Batch) -> list[Tensor]:
        return [torch.from_numpy(array).to(self.processes.device) for array in batch]

    def _autocast(self) -> contextlib.AbstractContextManager[None]:
        if self._precision == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.processes.device.type, self._precision)

    def _operations_per_token(self) -> float | None:
        model = self.model
        if not all(parameter.requires_grad for parameter in model.parameters()):
            return None  # it depends on the first layer that is trained
        n_used = model.wte.weight.numel() + sum(parameter.numel() for parameter in model.h.parameters())
        return training_operations(n_used, model.config, self.config)

    # -- evaluation ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def validation_loss(self) -> float:
        processes = self.processes
        total = torch.zeros((), dtype=torch.float64 if processes.device.type != "mps" else torch.float32)
        evaluation = self.objective.evaluation
        with in_mode(self._module, is_training=False), self._average.in_place():
            for number in range(evaluation.count):
                batch = self._on_device(evaluation(number, processes.rank, processes.world_size))
                with threads.step((id(self), "evaluate"), processes.device), self._autocast():
                    total += self._module(*batch).item() * evaluation.share(number)
        return float(processes.mean(total.float().to(processes.device)).item())

    def _sample(self) -> str:
        if not self.config.sample_tokens or self.config.sharding == "fsdp":  # with FSDP, no process has the whole model
            return ""
        with in_mode(self.model, is_training=False), self._average.in_place():
            return self._outputs.sample(self.model)

    def _scores(self) -> dict[str, float]:
        if self._outputs.scores is no_scores:
            return {}
        with in_mode(self.model, is_training=False), self._average.in_place():
            model = self._whole_model()
            scores = self._outputs.scores(model.to(self.processes.device)) if self.processes.is_first else {}
        self.processes.wait_for_work()  # the others wait for the first, for hours if there are many items
        return scores

    # -- saving and loading --------------------------------------------------------------------------------------------

    def save(self) -> None:
        # All processes gather the state; rank 0 writes it.
        tensors = gather_state(self._module, self._optimizer) | self._average.gather()
        if self.processes.is_first:
            self._write_checkpoint(tensors, scaler=self._scaler.state_dict())
        self.processes.wait()

    def load(self, step: int | None = None) -> None:
        checkpoint = load_checkpoint(self.folder / CHECKPOINT_FOLDER, step)
        try:
            load_weights = partial(restore_state, self._module, self._optimizer, checkpoint.tensors)
            self._average.restore(checkpoint.tensors, load_weights)
            if checkpoint.values.get("scaler"):
                self._scaler.load_state_dict(checkpoint.values["scaler"])
        except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(
                f"the checkpoint in {self.folder} does not fit this model ({reason}): use the model of that run"
            ) from None
        self._restore_progress(checkpoint)

    def _save_model(self, folder: Path) -> None:
        with self._average.in_place():
            self._write_model(folder)

    def _write_model(self, folder: Path) -> None:
        model = self._whole_model()
        if self.processes.is_first:
            self._outputs.write(model, folder)

    def _whole_model(self) -> GPT2:
        """The model; with FSDP a copy in eval mode on the CPU of the first process. All processes must call this."""
        if self.config.sharding != "fsdp":
            return self.model
        weights = whole_weights(self._module)
        if not self.processes.is_first:
            return self.model
        model = GPT2(self.model.config).eval()
        model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in weights.items()})
        return model


def _check_precision(model: GPT2) -> None:
    """Raise ConfigError if weights of 16 bits are to be trained: a step of AdamW is smaller than their rounding."""
    narrow = {str(weight.dtype) for weight in model.parameters() if weight.requires_grad and weight.dtype.itemsize < 4}
    if narrow:
        raise ConfigError(
            f"the model is in {min(narrow).removeprefix('torch.')}, which rounds most steps of training away: load it with "
            "dtype=float32; precision=bfloat16 computes its matrix products in 16 bits"
        )


def parts_of_step(rows: int, tokens: int, accumulation: int, device: torch.device) -> int:
    """Return the number of parts in which to compute `rows` of `tokens` each: a divisor of `rows`, at least `accumulation`.

    On a CPU it may be more, for speed. Activations of more than 4,096 tokens do not stay in its caches from one operation
    to the next: 64 rows of 256 tokens took 20% longer in one part than in parts of 8 rows. Matrix products over fewer than
    1,024 tokens are slow too.
    """
    if device.type != "cpu":
        return accumulation
    for n_parts in range(accumulation, rows + 1, accumulation):
        n_tokens = rows // n_parts * tokens
        if rows % n_parts == 0 and n_tokens <= 4096:
            return n_parts if n_tokens >= 1024 else accumulation
    return accumulation
