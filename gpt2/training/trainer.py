"""Training with PyTorch: the steps of the loop, on one device or many processes. It knows neither text files nor options."""

from __future__ import annotations

import contextlib
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from gpt2.model import GPT2
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
from gpt2.training.loss import LanguageModelLoss
from gpt2.training.optimizer import learning_rate, make_optimizer
from gpt2.training.preparation import TrainingData
from gpt_config.errors import CheckpointError
from gpt_config.generation_config import GenerationConfig
from gpt_config.training_config import TrainingConfig


class Trainer(TrainingLoop):
    """Trains `model` on `data` with PyTorch, and keeps in `folder` what the run needs and yields: see `TrainingLoop`."""

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
        processes = processes or Processes(0, 1, model.wte.weight.device)
        super().__init__(model.config, data, config, folder, processes, is_quiet=is_quiet, tensorboard=tensorboard)
        self.model = model.to(self.processes.device).train()
        self._n_used = model.wte.weight.numel() + sum(p.numel() for p in model.h.parameters())
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
        self._n_parts = _n_parts(config, self.processes)

    @property
    def n_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def _begin(self) -> float:
        if self.processes.device.type == "cpu":
            keep_freed_memory()
        return measured_peak(self.processes.device, self._precision) * self.processes.world_size

    def train_step(self) -> tuple[float, float]:
        config, processes = self.config, self.processes
        torch.manual_seed(mix(config.seed, 3, self.step, processes.rank))  # dropout
        inputs, targets = self._on_device(self._batches(self.step, processes.rank, processes.world_size))
        losses = []
        parts = list(zip(inputs.chunk(self._n_parts), targets.chunk(self._n_parts), strict=True))
        for number, (x, y) in enumerate(parts, 1):
            with without_exchange(self._module, is_last=number == len(parts)):
                with self._autocast():
                    loss = self._loss(x, y) / len(parts)
                self._scaler.scale(loss).backward()
            losses.append(loss.detach())
        self._scaler.unscale_(self._optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm or math.inf)
        mean_loss, norm_value = processes.mean(torch.stack(losses).sum()).item(), float(norm)
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

    def _on_device(self, batch: tuple[Any, Any]) -> tuple[Tensor, Tensor]:
        inputs, targets = (torch.from_numpy(array).to(self.processes.device) for array in batch)
        return inputs, targets

    def _autocast(self) -> contextlib.AbstractContextManager[None]:
        if self._precision == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.processes.device.type, self._precision)

    def _operations_per_token(self) -> float:
        return training_operations(self._n_used, self.model.config, self.config)

    # -- evaluation ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def validation_loss(self) -> float:
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
        # All processes take part in gathering it; the first one writes.
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
            raise CheckpointError(f"the checkpoint in {self.folder} is not of this model ({reason})") from None
        self._go_on_from(checkpoint)
        if checkpoint.values.get("scaler"):
            self._scaler.load_state_dict(checkpoint.values["scaler"])

    def _save_model(self) -> None:
        if self.config.sharding == "fsdp":
            weights = whole_weights(self._module)
            if self.processes.is_first:
                model = GPT2(self.model.config)
                model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in weights.items()})
                model.save_pretrained(self.folder, tokenizer=self.data.tokenizer)
        elif self.processes.is_first:
            self.model.save_pretrained(self.folder, tokenizer=self.data.tokenizer)


def _n_parts(config: TrainingConfig, processes: Processes) -> int:
    """How many parts a process does its rows in: those of `accumulation`, cut further on a CPU, where the numbers of a part
    of more than 4,096 tokens leave the caches between one operation and the next (64 rows of 256 tokens took a fifth longer
    at once than in parts of 8 rows) and products over fewer than 1,024 are slow themselves."""
    if processes.device.type != "cpu":
        return config.accumulation
    rows = config.batch_size // processes.world_size
    for n_parts in range(config.accumulation, rows + 1, config.accumulation):
        tokens = rows // n_parts * config.context
        if rows % n_parts == 0 and tokens <= 4096:
            return n_parts if tokens >= 1024 else config.accumulation
    return config.accumulation
