"""Classification: data, loss and metrics of a classifier. Reads and writes no files."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from gpt2.dropout import in_mode
from gpt2.evaluation.figures import check_not_nan
from gpt2.finetuning.classifier import GPT2Classifier
from gpt2.finetuning.label_results import THRESHOLD, MultiLabelResult, RegressionResult, f1, macro_f1
from gpt2.finetuning.labels import Label, Target, target_of
from gpt2.finetuning.rows import LengthSortedRows, in_order_of_length, pad
from gpt2.model import GPT2
from gpt2.training.batches import shuffled
from gpt2.training.objective import Batch, Objective
from gpt_config.errors import DataError
from gpt_config.training_config import TrainingConfig
from gpt_encoder.interface import Tokenizer


@dataclass(frozen=True)
class LabelledText:
    """The token ids of a text, and the index of its label; for several labels 0 or 1 for each; for a regression a number."""

    ids: list[int]
    label: Target


def encode_texts(
    texts: Sequence[tuple[str, Label]], labels: Sequence[str], tokenizer: Tokenizer, context: int
) -> tuple[list[LabelledText], int]:
    """Encode (text, label) pairs, at most the first `context` tokens of each. Returns (examples, number of texts cut)."""
    encoded = [(tokenizer.encode(text), target_of(label, labels)) for text, label in texts]
    return [LabelledText(ids[:context], label) for ids, label in encoded], sum(len(ids) > context for ids, _ in encoded)


def split_by_label(labels: Sequence[str], fractions: Sequence[float], seed: int) -> list[list[int]]:
    """Divide the indices 0 to len(labels) - 1 into sorted parts that have the same proportions of labels.

    Returns the remaining indices first, then a part for each of `fractions`. DataError if a label has too few rows to be in
    every part.
    """
    parts: list[list[int]] = [[] for _ in range(len(fractions) + 1)]
    for number, label in enumerate(sorted(set(labels))):
        rows = [row for row, other in enumerate(labels) if other == label]
        rows = [rows[shuffled(place, len(rows), seed, 7, number)] for place in range(len(rows))]
        first = 0
        for part, fraction in zip(parts[1:], fractions, strict=True):
            n_rows = max(1, round(fraction * len(rows))) if fraction else 0
            part += rows[first : first + n_rows]
            first += n_rows
        if first >= len(rows):
            raise DataError(f"the label {label!r} has {len(rows)} rows, too few for all parts of the data: add some")
        parts[0] += rows[first:]
    return [sorted(part) for part in parts]


class ClassificationLoss(nn.Module):
    """The mean over rows of the loss of the row times its weight. The losses are those of transformers.

    One label: the cross-entropy, in nats. Several: the mean over labels of the binary cross-entropy, in nats. A regression:
    the squared error.
    """

    def __init__(self, classifier: GPT2Classifier) -> None:
        super().__init__()
        self.classifier = classifier
        # Of the validation rows since the last call of `figures`: rows for one label, labels for several.
        self.n_right = self.n_seen = self.n_predicted = self.n_actual = 0

    def forward(self, input_ids: Tensor, last: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        # Padding is on the right, where causal attention does not look, so no mask is needed.
        logits = self.classifier.logits(self.classifier.transformer.hidden_states(input_ids), last)
        if not self.training:
            self._count(logits, labels)
        return (self._losses(logits.float(), labels) * weights).mean()

    def _losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of each row (B,)."""
        if self.classifier.problem_type == "regression":
            return (logits - labels.view(len(logits), -1)).square().mean(-1)
        if self.classifier.problem_type == "multi_label_classification":
            return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(-1)
        return F.cross_entropy(logits, labels, reduction="none")

    def _count(self, logits: Tensor, labels: Tensor) -> None:
        if self.classifier.problem_type == "multi_label_classification":
            there, found = labels > 0, self.classifier.scores(logits) >= THRESHOLD
            self.n_right += int((there & found).sum())
            self.n_actual += int(there.sum())
            self.n_predicted += int(found.sum())
        elif self.classifier.problem_type != "regression":
            self.n_right += int((logits.argmax(-1) == labels).sum())
        self.n_seen += len(labels)

    def figures(self, loss: float) -> dict[str, float]:
        """Return the metric of the counted rows, whose mean loss is `loss`, and begin to count again."""
        if self.classifier.problem_type == "regression":
            result = {"rmse": math.sqrt(loss)}
        elif self.classifier.problem_type == "multi_label_classification":
            result = {"micro_f1": f1(self.n_right, self.n_predicted, self.n_actual)}
        else:
            result = {"accuracy": self.n_right / max(1, self.n_seen)}
        self.n_right = self.n_seen = self.n_predicted = self.n_actual = 0
        return result


class Classification(Objective):
    """Predict the label of a text. With `balance`, each label has the same total weight, however many rows it has."""

    def __init__(
        self,
        classifier: GPT2Classifier,
        train: Sequence[LabelledText],
        validation: Sequence[LabelledText],
        config: TrainingConfig,
        *,
        balance: bool = False,
    ) -> None:
        self.classifier = classifier
        self._loss = ClassificationLoss(classifier)
        rows = LengthSortedRows([len(example.ids) for example in train], config.batch_size, config.seed)
        self.tokens_per_step = rows.mean_width * config.batch_size
        weights: NDArray[np.float32] | float = 1.0
        if balance:
            counts = Counter(example.label for example in train)
            shares = [len(train) / len(counts) / counts[place] for place in range(len(classifier.labels))]
            weights = np.array(shares, np.float32)
        self.batches = _TrainingRows(train, rows, weights)
        self.evaluation = _ValidationRows(validation, config.batch_size)

    def loss(self, model: GPT2) -> nn.Module:
        assert model is self.classifier.transformer
        return self._loss

    def figures(self, loss: float) -> dict[str, float]:
        return self._loss.figures(loss)


class _TrainingRows:
    def __init__(
        self, examples: Sequence[LabelledText], rows: LengthSortedRows, weights: NDArray[np.float32] | float
    ) -> None:
        self._examples, self._rows, self._weights = examples, rows, weights

    def __call__(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        return _batch([self._examples[row] for row in self._rows(step)[rank::world_size]], self._weights)


class _ValidationRows:
    def __init__(self, examples: Sequence[LabelledText], batch_size: int) -> None:
        batches = in_order_of_length([len(example.ids) for example in examples], batch_size)
        self._batches = [[examples[row] for row in rows] for rows in batches]
        self.count, self._n_examples = len(self._batches), len(examples)

    def __call__(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """Return all rows in each process. With these weights, the mean over batches is the mean over rows."""
        examples = self._batches[step]
        return _batch(examples, self.count * len(examples) / self._n_examples)

    def share(self, step: int) -> float:
        """Return the same weight for all batches: the losses of the rows already have theirs."""
        return 1 / self.count


def _batch(examples: Sequence[LabelledText], weights: NDArray[np.float32] | float) -> Batch:
    """Return ids, last positions, labels and weights of `examples`. `weights` has one per label, or is one for all rows."""
    labels = np.array([example.label for example in examples])
    if labels.dtype != np.int64:  # the matrix of several labels, or numbers
        labels = labels.astype(np.float32)
    last = np.array([len(example.ids) - 1 for example in examples])
    each = weights[labels] if isinstance(weights, np.ndarray) else np.full(len(examples), weights, np.float32)
    return pad([example.ids for example in examples], 0), last, labels, each


@torch.inference_mode()
def classify(
    classifier: GPT2Classifier, rows: Sequence[list[int]], batch_size: int = 32
) -> Iterator[tuple[int, list[float]]]:
    """Yield (row number, score of each label) for rows of 1 to `context` token ids, in no particular order.

    The scores are those of `GPT2Classifier.scores`: probabilities, or the values of a regression. Dropout is off in either
    mode of the classifier. CheckpointError if it computes NaN.
    """
    device = classifier.score.weight.device
    for batch in in_order_of_length([len(ids) for ids in rows], batch_size):
        last = torch.tensor(classifier.last_positions([rows[row] for row in batch]), device=device)
        ids = torch.from_numpy(pad([rows[row] for row in batch], 0)).to(device)
        with in_mode(classifier, is_training=False):
            scores = classifier.scores(classifier.logits(classifier.transformer.hidden_states(ids), last))
        check_not_nan(scores.sum().item())
        yield from zip(batch, scores.tolist(), strict=True)


@dataclass(frozen=True)
class ClassificationResult:
    """`confusion[i][j]` is the number of texts with label i for which label j was predicted."""

    labels: tuple[str, ...]
    confusion: list[list[int]]

    @property
    def accuracy(self) -> float:
        """The share of texts for which the right label was predicted, from 0 to 1."""
        n_right = sum(row[place] for place, row in enumerate(self.confusion))
        return n_right / sum(map(sum, self.confusion))

    def f1(self, label: str) -> float:
        """Return the harmonic mean of precision and recall of `label`; 0 if no text has it and it was never predicted."""
        place = self.labels.index(label)
        right = self.confusion[place][place]
        actual, predicted = sum(self.confusion[place]), sum(row[place] for row in self.confusion)
        return 2 * right / (actual + predicted) if actual + predicted else 0.0

    def _occurs(self) -> list[bool]:
        return [any(row) or any(other[place] for other in self.confusion) for place, row in enumerate(self.confusion)]

    def to_dict(self) -> dict[str, Any]:
        """Return metrics and counts as a dict that JSON can represent. `macro_f1` is over the labels that occur."""
        return {
            "accuracy": self.accuracy,
            "f1": {label: self.f1(label) for label in self.labels},
            "macro_f1": macro_f1(list(map(self.f1, self.labels)), self._occurs()),
            "labels": list(self.labels),
            "confusion": self.confusion,
        }


Result = ClassificationResult | MultiLabelResult | RegressionResult


def measure(classifier: GPT2Classifier, examples: Sequence[LabelledText], batch_size: int = 32) -> Result:
    """Classify `examples` and compare with their labels, as the classifier's `problem_type` needs."""
    scores = dict(classify(classifier, [example.ids for example in examples], batch_size))
    return result_of(classifier, [example.label for example in examples], [scores[row] for row in range(len(examples))])


def result_of(classifier: GPT2Classifier, targets: Sequence[Any], scores: Sequence[Sequence[float]]) -> Result:
    """Compare the scores of texts, as from `classify`, with their targets, as from `target_of`."""
    if classifier.problem_type == "regression":
        return RegressionResult(list(targets), [row[0] for row in scores])
    if classifier.problem_type == "multi_label_classification":
        return MultiLabelResult.of(classifier.labels, targets, scores)
    confusion = [[0] * len(classifier.labels) for _ in classifier.labels]
    for label, row in zip(targets, scores, strict=True):
        confusion[label][int(np.argmax(row))] += 1
    return ClassificationResult(classifier.labels, confusion)
