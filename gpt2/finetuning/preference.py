"""Preference tuning: learn which of two responses to a prompt is better, with DPO. Depends on the model and on examples.

Source: Rafailov et al. 2023, "Direct Preference Optimization: Your Language Model is Secretly a Reward Model".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from gpt2.dropout import in_mode
from gpt2.finetuning.instructions import Example, Turn, conversation, make_examples
from gpt2.finetuning.records import BadRecord, Fields, text_of
from gpt2.finetuning.rows import LengthSortedRows, in_order_of_length, pad
from gpt2.finetuning.template import InstructionTemplate
from gpt2.model import GPT2
from gpt2.training.objective import Batch, Objective
from gpt_config.atomic_write import atomic_write
from gpt_config.errors import CheckpointError
from gpt_config.training_config import TrainingConfig
from gpt_encoder.interface import Tokenizer

REFERENCE_FILE = "reference.safetensors"  # log-probabilities of the model that the run began with
_IGNORED = -100  # the target of a token that is not counted
_ROWS = 1024  # rows of logits in memory at a time


class Pair(NamedTuple):
    """Two conversations that differ in the last response."""

    chosen: list[Turn]
    rejected: list[Turn]


def preference(fields: Fields) -> Pair:
    """Return the pair of a record with prompt, chosen and rejected: texts, or lists of messages. BadRecord for others.

    Messages of `prompt` come before those of `chosen` and `rejected`; without it, both are whole conversations.
    """
    if isinstance(fields.get("chosen"), list):
        before = fields.get("prompt") or []
        if not isinstance(before, list) or not isinstance(fields.get("rejected"), list):
            raise BadRecord("chosen is a list of messages, and prompt or rejected is not: use one form for all of them")
        pair = Pair(*(conversation({"messages": [*before, *fields[name]]}) for name in ("chosen", "rejected")))
    else:
        prompt = text_of(fields, "prompt")
        pair = Pair(*([Turn(prompt, text_of(fields, name))] for name in ("chosen", "rejected")))
    without = [[*turns[:-1], turns[-1]._replace(response="", thought="")] for turns in pair]
    if without[0] != without[1]:
        raise BadRecord("chosen and rejected do not answer the same prompt: they may differ in the last response only")
    if pair.chosen == pair.rejected:
        raise BadRecord("chosen and rejected are equal")
    return pair


@dataclass(frozen=True)
class EncodedPair:
    """The ids of both conversations, and for each token whether it is in the last response or ends it."""

    chosen: Example
    rejected: Example

    @property
    def n_tokens(self) -> int:
        """The length of the longer one."""
        return max(len(self.chosen.ids), len(self.rejected.ids))


def encode_pairs(
    pairs: Sequence[Pair], tokenizer: Tokenizer, template: InstructionTemplate, context: int
) -> tuple[list[EncodedPair], int]:
    """Return the encoded pairs, and how many were dropped because a conversation is longer than `context` tokens."""
    encoded = []
    for pair in pairs:
        sides, _, n_dropped = make_examples(pair, tokenizer, template, context, "drop")
        if not n_dropped:
            encoded.append(EncodedPair(*map(_last_response, sides)))
    return encoded, len(pairs) - len(encoded)


def _last_response(example: Example) -> Example:
    n_before = max((place + 1 for place, learned in enumerate(example.is_learned) if not learned), default=0)
    return Example(example.ids, [False] * n_before + [True] * (len(example.ids) - n_before))


def response_log_probs(model: GPT2, input_ids: Tensor, targets: Tensor) -> Tensor:
    """Return the log-probability, in nats, of the targets (B, T) that are not negative, summed over each row: (B,).

    The logits of a part are computed again in the backward pass: those of a batch may need more memory than the model.
    """
    hidden, counted = model.hidden_states(input_ids), targets >= 0  # (B, T, C), (B, T)
    rows, wanted = hidden[counted], targets[counted]  # (N, C), (N,)
    parts = [
        recompute(
            _log_probs, rows[start : start + _ROWS], model.wte.weight, wanted[start : start + _ROWS], use_reentrant=False
        )
        for start in range(0, len(rows), _ROWS)
    ]
    each = torch.cat(parts)  # (N,)
    total = torch.zeros(len(targets), dtype=each.dtype, device=each.device)
    return total.index_add(0, counted.nonzero()[:, 0], each)


def _log_probs(rows: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(rows, head)
    exact = torch.promote_types(logits.dtype, torch.float32)
    return logits.to(exact).log_softmax(-1).gather(1, targets[:, None])[:, 0]


class DPOLoss(nn.Module):
    """The mean over pairs of -log sigmoid(margin) times the weight of the pair (equation 7 of the paper).

    The margin is beta times what the log-ratio of model and reference is larger for the chosen response than for the
    rejected one. A row of `input_ids` and `targets` (B, 2 T) has both conversations; `reference` (B, 2) has their
    log-probabilities.
    """

    def __init__(self, model: GPT2, beta: float) -> None:
        super().__init__()
        self.model, self._beta = model, beta
        self._n_seen = self._n_right = 0  # validation pairs since the last call of `figures`
        self._margin = 0.0  # the sum of their margins

    def forward(self, input_ids: Tensor, targets: Tensor, reference: Tensor, weights: Tensor) -> Tensor:
        ids, wanted = (tensor.unflatten(1, (2, -1)).flatten(0, 1) for tensor in (input_ids, targets))  # (2 B, T)
        ratios = response_log_probs(self.model, ids, wanted).view(-1, 2) - reference  # (B, 2)
        margins = self._beta * (ratios[:, 0] - ratios[:, 1])
        if not self.training:
            self._n_seen += len(margins)
            self._n_right += int((margins > 0).sum())
            self._margin += margins.sum().item()
        return (-F.logsigmoid(margins) * weights).mean()

    def figures(self) -> dict[str, float]:
        """Return accuracy and mean margin of the counted pairs, and begin to count again."""
        n_seen = max(1, self._n_seen)
        result = {"accuracy": self._n_right / n_seen, "margin": self._margin / n_seen}
        self._n_seen, self._n_right, self._margin = 0, 0, 0.0
        return result


class PreferenceTuning(Objective):
    """Prefer the chosen responses. `reference` has the log-probabilities of (train, validation) pairs, (n, 2) each."""

    def __init__(
        self,
        model: GPT2,
        train: Sequence[EncodedPair],
        validation: Sequence[EncodedPair],
        reference: tuple[NDArray[np.float64], NDArray[np.float64]],
        config: TrainingConfig,
        beta: float,
    ) -> None:
        self._loss = DPOLoss(model, beta)
        rows = LengthSortedRows([pair.n_tokens for pair in train], config.batch_size, config.seed)
        self.tokens_per_step = 2 * rows.mean_width * config.batch_size
        self.batches = _TrainingRows(train, reference[0], rows)
        self.evaluation = _ValidationRows(validation, reference[1], config.batch_size)

    def loss(self, model: GPT2) -> nn.Module:
        return self._loss

    def figures(self, loss: float) -> dict[str, float]:
        return self._loss.figures()


class _TrainingRows:
    def __init__(self, pairs: Sequence[EncodedPair], reference: NDArray[np.float64], rows: LengthSortedRows) -> None:
        self._pairs, self._reference, self._rows = pairs, reference, rows

    def __call__(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        rows = self._rows(step)[rank::world_size]
        return _batch([self._pairs[row] for row in rows], self._reference[rows], 1.0)


class _ValidationRows:
    def __init__(self, pairs: Sequence[EncodedPair], reference: NDArray[np.float64], batch_size: int) -> None:
        self._batches = in_order_of_length([pair.n_tokens for pair in pairs], batch_size)
        self._pairs, self._reference, self.count = pairs, reference, len(self._batches)

    def __call__(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """Return all rows in each process. With this weight, the mean over batches is the mean over pairs."""
        rows = self._batches[step]
        return _batch([self._pairs[row] for row in rows], self._reference[rows], self.count * len(rows) / len(self._pairs))

    def share(self, step: int) -> float:
        """Return the same weight for all batches: the losses of the pairs already have theirs."""
        return 1 / self.count


def _batch(pairs: Sequence[EncodedPair], reference: NDArray[np.float64], weight: float) -> Batch:
    ids, targets = _ids_and_targets(pairs)
    weights = np.full(len(pairs), weight, np.float32)
    return ids.reshape(len(pairs), -1), targets.reshape(len(pairs), -1), reference.astype(np.float32), weights


def _ids_and_targets(pairs: Sequence[EncodedPair]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return inputs and targets, (2 n, T) each: the chosen conversation of each pair, then the rejected one."""
    sides = [side for pair in pairs for side in (pair.chosen, pair.rejected)]
    wanted = [
        [token if counts else _IGNORED for token, counts in zip(side.ids[1:], side.is_learned[1:], strict=True)]
        for side in sides
    ]
    return pad([side.ids[:-1] for side in sides], 0), pad(wanted, _IGNORED)


@torch.no_grad()
def reference_log_probs(
    model: GPT2, pairs: Sequence[EncodedPair], batch_size: int, precision: torch.dtype = torch.float32
) -> NDArray[np.float64]:
    """Return the log-probabilities, in nats, of the chosen and the rejected response of each pair: (n, 2).

    `precision` is that of the training, so that the errors of matrix products in 16 bits are the same in both.
    """
    found = np.zeros((len(pairs), 2))
    in_few_bits = torch.autocast(model.device.type, precision, enabled=precision != torch.float32)
    with in_mode(model, is_training=False), in_few_bits:
        for rows in in_order_of_length([pair.n_tokens for pair in pairs], batch_size):
            ids, targets = map(torch.from_numpy, _ids_and_targets([pairs[row] for row in rows]))
            log_probs = response_log_probs(model, ids.to(model.device), targets.to(model.device))
            found[rows] = log_probs.double().cpu().view(-1, 2).numpy()
    return found


def save_reference(folder: Path, train: NDArray[np.float64], validation: NDArray[np.float64]) -> None:
    """Write the reference's log-probabilities into the folder of a run."""
    tensors = {"train": train, "validation": validation}
    atomic_write(folder / REFERENCE_FILE, lambda temporary: save_file(tensors, temporary))


def load_reference(folder: Path, n_train: int, n_validation: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return what `save_reference` wrote. CheckpointError if it is missing, damaged, or of other data."""
    path = folder / REFERENCE_FILE
    try:
        tensors = load_file(path)
        train, validation = tensors["train"], tensors["validation"]
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"cannot read {path} ({error}): start a new run in another folder") from None
    if train.shape != (n_train, 2) or validation.shape != (n_validation, 2):
        raise CheckpointError(
            f"{path} has {len(train)} and {len(validation)} pairs, and the data {n_train} and {n_validation}: resume with "
            "the data of the start, or start a new run in another folder"
        )
    return train, validation
