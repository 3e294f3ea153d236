"""Distillation: a student learns from the text and from the probabilities of a teacher. Depends on models, not on files.

Sources: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", for the loss; Sanh et al. 2019, "DistilBERT",
for a student that begins with some layers of its teacher.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gpt2.model import GPT2
from gpt2.training.loss import LanguageModelLoss
from gpt2.training.objective import LanguageModelling
from gpt2.training.preparation import TrainingData
from gpt2.weights.tokenizer import tokenizer_of
from gpt_config.errors import ConfigError
from gpt_config.model_config import GPT2Config
from gpt_config.training_config import TrainingConfig
from gpt_encoder.interface import Tokenizer

_ROWS = 1024  # rows of logits in memory at a time


@dataclass(frozen=True)
class _Weights:
    """The temperature of both models, and the share of the teacher's part in the loss."""

    temperature: float
    share: float


class Distillation(LanguageModelling):
    """Predict the next token at every position of a text, as a teacher does. Evaluations measure the text's own loss.

    The loss of a token is (1 - share) times its cross-entropy, plus share * T^2 times the divergence KL(teacher || student)
    of the probabilities at temperature T. T^2 keeps the size of its gradient, whatever T is (section 2).
    """

    def __init__(self, data: TrainingData, config: TrainingConfig, teacher: GPT2) -> None:
        super().__init__(data, config)
        self._teacher, self._tokenizer = teacher, data.tokenizer
        self._weights = _Weights(config.temperature_of_teacher, config.teacher_share)

    def check(self, model: GPT2Config, config: TrainingConfig) -> None:
        super().check(model, config)
        teacher = self._teacher.config
        _check_vocabulary(teacher.vocab_size, model.vocab_size)
        _check_tokens(tokenizer_of(self._teacher), self._tokenizer)
        if teacher.n_positions < config.context:
            raise ConfigError(
                f"context={config.context} is longer than the {teacher.n_positions} positions of the teacher: use at most "
                f"{teacher.n_positions}",
                field="context",
            )

    def loss(self, model: GPT2) -> nn.Module:
        return DistillationLoss(model, self._teacher.to(model.device), self._weights.temperature, self._weights.share)


def _check_vocabulary(n_teacher: int, n_student: int) -> None:
    if n_teacher < n_student:
        raise ConfigError(
            f"the teacher has {n_teacher} token ids and the student {n_student}: use the teacher's tokenizer, or a teacher "
            "with the student's"
        )


def _check_tokens(teachers: Tokenizer | None, students: Tokenizer) -> None:
    """Raise ConfigError if an id is another token for the teacher. Its probabilities would be those of other tokens."""
    if teachers is None:
        return
    theirs = teachers.token_bytes
    for token_id, ours in students.token_bytes.items():
        if theirs.get(token_id, ours) != ours:
            raise ConfigError(
                f"the token {token_id} is {theirs[token_id]!r} for the teacher and {ours!r} for the student: use the "
                "teacher's tokenizer, or a teacher with the student's"
            )


class DistillationLoss(LanguageModelLoss):
    """The loss of `Distillation`, of `targets` (B, T) given `input_ids` (B, T), both int64. In eval mode, the text's own.

    The teacher is no part of the module: it is not trained, saved or divided among processes.
    """

    def __init__(self, model: GPT2, teacher: GPT2, temperature: float, share: float) -> None:
        super().__init__(model)
        self._teacher = (teacher.eval(),)
        self._weights = _Weights(temperature, share)

    def forward(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input_ids, targets)
        [teacher] = self._teacher
        with torch.no_grad():
            guide = teacher.hidden_states(input_ids).flatten(0, 1)  # (B * T, C of the teacher)
        rows = self.model.hidden_states(input_ids).flatten(0, 1)  # (B * T, C)
        head = self.model.wte.weight
        taught = _Taught(targets.flatten(), guide, teacher.wte.weight[: len(head)], self._weights)
        apply: Any = _SumOfLosses.apply  # it has no types in torch
        total: Tensor = apply(rows, head, taught)
        return total / targets.numel()


class _Taught(NamedTuple):
    """What the student learns: the targets (N,), and the teacher's hidden states (N, C) and head (V, C)."""

    targets: Tensor
    rows: Tensor
    head: Tensor
    weights: _Weights


class _SumOfLosses(torch.autograd.Function):
    """Both heads and the loss, in parts, with the gradients in the forward pass: see `gpt2.training.loss`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, head: Tensor, taught: _Taught) -> Tensor:
        device, dtype = rows.device.type, rows.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        exact = torch.promote_types(dtype, torch.float32)
        weight, guide = head.to(dtype), taught.head.to(dtype)
        total = torch.zeros((), dtype=exact, device=rows.device)
        d_rows, d_head = torch.zeros_like(rows), torch.zeros_like(head, dtype=exact)
        for start in range(0, len(rows), _ROWS):
            part = rows[start : start + _ROWS].to(dtype)
            logits = (part @ weight.t()).to(exact)
            teacher = (taught.rows[start : start + _ROWS].to(dtype) @ guide.t()).to(exact)
            loss, d_logits = loss_and_gradient(logits, teacher, taught.targets[start : start + _ROWS], taught.weights)
            total += loss
            d_rows[start : start + _ROWS] = d_logits @ weight.to(exact)
            d_head.addmm_(d_logits.t(), part.to(exact))
        ctx.save_for_backward(d_rows, d_head)
        return total

    @staticmethod
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:
        d_rows, d_head = ctx.saved_tensors
        return d_rows.mul_(d_total), d_head.mul_(d_total), None


def loss_and_gradient(logits: Tensor, teacher: Tensor, targets: Tensor, weights: _Weights) -> tuple[Tensor, Tensor]:
    """Return the sum of the losses of N tokens, and its gradient (N, V) with respect to the student's `logits` (N, V).

    With p and q the probabilities of student and teacher at temperature T, the gradient of T^2 KL(q || p) is T (p - q).
    """
    temperature, share = weights.temperature, weights.share
    right = targets[:, None]
    log_probs = logits.log_softmax(-1)
    soft, guide = (logits / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
    own = -log_probs.gather(1, right).sum()
    divergence = (guide.exp() * (guide - soft)).sum()
    d_own = log_probs.exp()
    d_own.scatter_add_(1, right, torch.full_like(right, -1, dtype=d_own.dtype))
    d_soft = temperature * (soft.exp() - guide.exp())
    loss = (1 - share) * own + share * temperature**2 * divergence
    return loss, (1 - share) * d_own + share * d_soft


def layers_of_student(n_teacher: int, n_student: int) -> list[int]:
    """Return the teacher's layers that a student begins with: the first, the last, and others at equal distances.

    For 6 of 12 they are those of DistilGPT-2.

    >>> layers_of_student(12, 6)
    [0, 2, 4, 7, 9, 11]
    """
    if n_student == 1:
        return [0]
    return [round(layer * (n_teacher - 1) / (n_student - 1)) for layer in range(n_student)]


@torch.no_grad()
def start_from_teacher(student: GPT2, teacher: GPT2) -> list[int]:
    """Copy embeddings, final norm and `layers_of_student` from `teacher` into `student`, and return these layers.

    ConfigError if the student is wider, has other heads, or more layers, positions or tokens than the teacher.
    """
    ours, theirs = student.config, teacher.config
    for name in ("n_embd", "n_head", "inner_dim", "activation_function"):
        if getattr(ours, name) != getattr(theirs, name):
            raise ConfigError(
                f"{name}={getattr(ours, name)} is not that of the teacher, {getattr(theirs, name)}, so the student cannot "
                "begin with its layers: choose the teacher's, or student_start=random",
                field=name if name.startswith("n_") else None,
            )
    _check_vocabulary(theirs.vocab_size, ours.vocab_size)
    if ours.n_positions > theirs.n_positions:
        raise ConfigError(
            f"the student has {ours.n_positions} positions and the teacher {theirs.n_positions}: use a context of at most "
            f"{theirs.n_positions}"
        )
    if ours.n_layer > theirs.n_layer:
        raise ConfigError(
            f"n_layer={ours.n_layer} is more than the teacher's {theirs.n_layer}, so the student cannot begin with its "
            "layers: choose fewer, or student_start=random",
            field="n_layer",
        )
    layers = layers_of_student(theirs.n_layer, ours.n_layer)
    for block, layer in zip(student.h, layers, strict=True):
        block.load_state_dict(teacher.h[layer].state_dict())
    student.wte.weight.copy_(teacher.wte.weight[: ours.vocab_size])
    student.wpe.weight.copy_(teacher.wpe.weight[: ours.n_positions])
    student.ln_f.load_state_dict(teacher.ln_f.state_dict())
    return layers
