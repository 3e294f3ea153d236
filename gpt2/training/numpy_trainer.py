"""Training with the NumPy engine: loop, batches, schedule and files of the PyTorch trainer, gradients written by hand.

It is for reading and for comparison: with the same initial weights and without dropout, both engines have the same losses up
to rounding. It uses one process on the CPU, in float32 or float64.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from gpt2.reference.numpy_generation import stream_text
from gpt2.reference.numpy_model import NumpyGPT2
from gpt2.reference.numpy_optimizers import AdamW, clip_gradients
from gpt2.training.batches import mix
from gpt2.training.checkpoint import load_checkpoint
from gpt2.training.distributed import Processes
from gpt2.training.hardware import keep_freed_memory, measured_peak
from gpt2.training.loop import CHECKPOINT_FOLDER, TrainingLoop, training_operations
from gpt2.training.objective import LanguageModelling
from gpt2.training.optimizer import learning_rate
from gpt2.training.preparation import TrainingData
from gpt2.training.run_logs import RunLog
from gpt_config.errors import CheckpointError, ConfigError
from gpt_config.generation_config import GenerationConfig
from gpt_config.training_config import TrainingConfig

# The names of AdamW's state in PyTorch, and in this engine. Checkpoints have PyTorch's names, so each engine can load the
# other's checkpoints.
_MOMENTS = {"exp_avg": "mean", "exp_avg_sq": "square"}
_WEIGHT = "model.model."  # prefix of weights in a checkpoint
_STATE = "optimizer.model."  # prefix of optimizer state in a checkpoint


class NumpyTrainer(TrainingLoop):
    """Trains `model` on `data` with NumPy: see `TrainingLoop`. ConfigError for settings that only PyTorch supports."""

    def __init__(
        self,
        model: NumpyGPT2,
        data: TrainingData,
        config: TrainingConfig,
        folder: str | Path,
        *,
        is_quiet: bool = False,
        tensorboard: bool = False,
        logs: Sequence[str | RunLog] = (),
    ) -> None:
        check_settings(config)
        processes = Processes(0, 1, torch.device("cpu"))
        objective = LanguageModelling(data, config)
        super().__init__(
            model.config, objective, config, folder, processes, is_quiet=is_quiet, tensorboard=tensorboard, logs=logs
        )
        self._tokenizer = data.tokenizer
        self.model = model
        self._optimizer = AdamW(model.parameters, (config.beta1, config.beta2), weight_decay=config.weight_decay)

    @property
    def n_parameters(self) -> int:
        return sum(parameter.size for parameter in self.model.parameters.values())

    def _begin(self) -> float:
        keep_freed_memory()
        return measured_peak(self.processes.device, getattr(torch, self.model.dtype))

    def _operations_per_token(self) -> float:
        sizes = {name: parameter.size for name, parameter in self.model.parameters.items()}
        n_used = sum(size for name, size in sizes.items() if name.startswith(("h.", "wte.")))
        return training_operations(n_used, self.model.config, self.config)

    def train_step(self) -> tuple[float, float]:
        self.model.rng = np.random.default_rng(mix(self.config.seed, 3, self.step, 0))  # dropout
        with self._mode(is_training=True):
            loss, gradients = self.model.loss_and_gradients(*self.objective.batches(self.step))
        norm = clip_gradients(gradients, self.config.clip_norm or math.inf)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._fail_on_nan(loss, norm)
        self._optimizer.step(gradients, learning_rate(self.config, self.step))
        return loss, norm

    def validation_loss(self) -> float:
        evaluation = self.objective.evaluation
        with self._mode(is_training=False):
            return sum(self.model.loss(*evaluation(number)) * evaluation.share(number) for number in range(evaluation.count))

    @contextlib.contextmanager
    def _mode(self, *, is_training: bool) -> Iterator[None]:
        before = self.model.training
        self.model.training = is_training
        try:
            yield
        finally:
            self.model.training = before

    def _sample(self) -> str:
        tokenizer, config = self._tokenizer, self.config
        has_start = config.sample_prompt or tokenizer.first_ids or self.model.config.bos_token_id is not None
        if not config.sample_tokens or not has_start:
            return ""
        options = GenerationConfig(max_new_tokens=config.sample_tokens, do_sample=True, temperature=0.8, seed=config.seed)
        with self._mode(is_training=False):
            return config.sample_prompt + "".join(stream_text(self.model, tokenizer, config.sample_prompt, options))

    def save(self) -> None:
        arrays = {_WEIGHT + name: parameter for name, parameter in self.model.parameters.items()}
        for name, state in self._optimizer.states.items():
            arrays |= {f"{_STATE}{name}.{theirs}": state[ours] for theirs, ours in _MOMENTS.items()}
            arrays[f"{_STATE}{name}.step"] = np.array(state["steps"], np.float32)  # as PyTorch stores it
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        self._write_checkpoint(tensors)

    def load(self, step: int | None = None) -> None:
        checkpoint = load_checkpoint(self.folder / CHECKPOINT_FOLDER, step)
        arrays = {name: tensor.numpy() for name, tensor in checkpoint.tensors.items()}
        try:
            for name, parameter in self.model.parameters.items():
                parameter[...] = arrays[_WEIGHT + name]
                if f"{_STATE}{name}.step" in arrays:
                    state = {ours: arrays[f"{_STATE}{name}.{theirs}"].copy() for theirs, ours in _MOMENTS.items()}
                    self._optimizer.states[name] = {"steps": int(arrays[f"{_STATE}{name}.step"]), **state}
        except (KeyError, ValueError) as error:
            raise CheckpointError(
                f"the checkpoint in {self.folder} does not fit this model ({error}): use the model of that run"
            ) from None
        self._restore_progress(checkpoint)

    def _save_model(self, folder: Path) -> None:
        self.model.save_pretrained(folder, tokenizer=self._tokenizer)


def check_settings(config: TrainingConfig) -> None:
    """Raise ConfigError for settings that this engine does not support."""
    allowed: dict[str, tuple[object, ...]] = {
        "precision": ("auto", "float32"),
        "compile": (False,),
        "gradient_checkpointing": (False,),
        "accumulation": (1,),
        "sharding": ("ddp",),
        "optimizer": ("adamw",),
        "ema": (0.0,),
    }
    for name, values in allowed.items():
        value = getattr(config, name)
        if value not in values:
            raise ConfigError(
                f"{name}={value} is not supported by engine=numpy: leave it out, or use engine=torch", field=name
            )
