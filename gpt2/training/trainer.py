"""Training with PyTorch: the steps of the loop, on one device or in several processes. Depends on model and objective."""

from __future__ import annotations

import contextlib
import math
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from gpt2.fast import threads
from gpt2.model import GPT2
from gpt2.quantization.quantize import check_can_learn
from gpt2.training.batches import mix
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
from gpt2.training.loop import CHECKPOINT_FOLDER, TrainingLoop, training_operations
from gpt2.training.objective import Batch, LanguageModelling, Objective
from gpt2.training.optimizer import learning_rate, make_optimizer
from gpt2.training.outputs import Outputs, text_outputs
from gpt2.training.preparation import TrainingData
from gpt_config.errors import CheckpointError
from gpt_config.training_config import TrainingConfig


class Trainer(TrainingLoop):
    """Trains `model` with PyTorch. State, metrics and results of the run are written into `folder`: see `TrainingLoop`.

    `data` is an encoded text, for language modelling, or another `Objective`. `outputs` writes the best model and samples a
    text. By default, a run on text writes an ordinary model folder; other runs write only checkpoints and metrics.
    Parameters that require no gradient do not change.
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
    ) -> None:
        check_can_learn(model)
        processes = processes or Processes(0, 1, model.device)
        if isinstance(data, Objective):
            objective, self._outputs = data, outputs or Outputs()
        else:
            objective, self._outputs = LanguageModelling(data, config), outputs or text_outputs(data.tokenizer, config)
        super().__init__(model.config, objective, config, folder, processes, is_quiet=is_quiet, tensorboard=tensorboard)
        self.model = model.to(self.processes.device).train()
        if config.gradient_checkpointing:
            for block in model.h:
                block.forward = partial(recompute, block.forward, use_reentrant=False)
        loss = objective.loss(model).to(self.processes.device).train()
        self._module = share_model(loss, model.h, self.processes, config)
        self._loss = torch.compile(self._module) if config.compile else self._module
        self._optimizer = make_optimizer(self._module, config)
        self._precision = choose_precision(config.precision, self.processes.device)
        # Gradients underflow in float16, so the loss is scaled up, and the gradients are scaled down again.
        self._scaler = torch.amp.GradScaler(self.processes.device.type, enabled=self._precision == torch.float16)

    @property
    def n_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self._module.parameters() if parameter.requires_grad)

    def _begin(self) -> float:
        if self.processes.device.type == "cpu":
            keep_freed_memory()
        return measured_peak(self.processes.device, self._precision) * self.processes.world_size

    def train_step(self) -> tuple[float, float]:
        with threads.step((id(self), "train"), self.processes.device):
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
        self._module.eval()
        total = torch.zeros((), dtype=torch.float64 if processes.device.type != "mps" else torch.float32)
        evaluation = self.objective.evaluation
        for number in range(evaluation.count):
            batch = self._on_device(evaluation(number, processes.rank, processes.world_size))
            with threads.step((id(self), "evaluate"), processes.device), self._autocast():
                total += self._module(*batch).item()
        self._module.train()
        total = (total / evaluation.count).float().to(processes.device)
        return float(processes.mean(total).item())

    def _sample(self) -> str:
        if not self.config.sample_tokens or self.config.sharding == "fsdp":  # with FSDP, no process has the whole model
            return ""
        self.model.eval()
        try:
            return self._outputs.sample(self.model)
        finally:
            self.model.train()

    # -- saving and loading --------------------------------------------------------------------------------------------

    def save(self) -> None:
        # All processes gather the state; rank 0 writes it.
        tensors = gather_state(self._module, self._optimizer)
        if self.processes.is_first:
            values = {**self._progress_values(), "scaler": self._scaler.state_dict()}
            save_checkpoint(self.folder / CHECKPOINT_FOLDER, Checkpoint(tensors, values))
        self.processes.wait()

    def load(self, step: int | None = None) -> None:
        checkpoint = load_checkpoint(self.folder / CHECKPOINT_FOLDER, step)
        try:
            restore_state(self._module, self._optimizer, checkpoint.tensors)
        except (RuntimeError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(
                f"the checkpoint in {self.folder} does not fit this model ({reason}): use the model of that run"
            ) from None
        self._restore_progress(checkpoint)
        if checkpoint.values.get("scaler"):
            self._scaler.load_state_dict(checkpoint.values["scaler"])

    def _save_model(self) -> None:
        model = self.model
        if self.config.sharding == "fsdp":
            weights = whole_weights(self._module)
            if self.processes.is_first:
                model = GPT2(self.model.config)
                model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in weights.items()})
        if self.processes.is_first:
            self._outputs.write(model, self.folder)


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
