"""The classifier equals transformers'. Its loss and metrics equal plain computations, and its folder loads again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from gpt2 import GPT2
from gpt2.finetuning.classification import (
    Classification,
    ClassificationResult,
    LabelledText,
    classify,
    encode_texts,
    measure,
    split_by_label,
)
from gpt2.finetuning.classifier import GPT2Classifier
from gpt2.finetuning.classifier_files import load_classifier, save_classifier
from gpt2.finetuning.trainable import set_trainable
from gpt_config import CheckpointError, ConfigError, DataError, InputError, TrainingConfig
from gpt_encoder import GPT2Tokenizer

LABELS = ("bad", "good", "odd")


@pytest.fixture
def classifier(small_model: GPT2) -> GPT2Classifier:
    torch.manual_seed(0)
    made = GPT2Classifier(small_model, LABELS).eval()
    torch.nn.init.normal_(made.score.weight)
    return made


def examples_of(n: int, seed: int = 0) -> list[LabelledText]:
    draw = np.random.default_rng(seed)
    return [LabelledText(draw.integers(0, 290, draw.integers(1, 40)).tolist(), int(draw.integers(3))) for _ in range(n)]


@pytest.mark.parametrize("side", ["right", "left", "none"])
def test_logits_are_those_of_transformers(
    classifier: GPT2Classifier, small_tokenizer: GPT2Tokenizer, tmp_path: Path, side: str
) -> None:
    transformers = pytest.importorskip("transformers")
    save_classifier(classifier, tmp_path, small_tokenizer)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert theirs.config.id2label == dict(enumerate(LABELS))
    ids, mask = torch.randint(0, 290, (3, 9)), torch.ones(3, 9, dtype=torch.int64)
    if side != "none":
        for row, n_padding in enumerate((0, 4, 8)):
            place = slice(9 - n_padding, 9) if side == "right" else slice(0, n_padding)
            mask[row, place], ids[row, place] = 0, small_tokenizer.eot_token_id
    # By default, transformers counts positions from the left, padding included.
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask, position_ids=positions).logits
        found = classifier(ids, None if side == "none" else mask)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_saved_classifier_loads_again(classifier: GPT2Classifier, small_tokenizer: GPT2Tokenizer, tmp_path: Path) -> None:
    save_classifier(classifier, tmp_path, small_tokenizer)
    loaded = load_classifier(tmp_path)
    ids = torch.randint(0, 290, (2, 7))
    assert loaded.labels == LABELS and loaded.context == 40 and not loaded.training
    assert torch.equal(loaded(ids), classifier(ids))
    assert load_classifier(tmp_path, dtype="bfloat16").score.weight.dtype == torch.bfloat16
    with pytest.raises(CheckpointError, match="contains a classifier"):
        GPT2.from_pretrained(tmp_path)


def test_the_context_of_training_is_saved(small_model: GPT2, small_tokenizer: GPT2Tokenizer, tmp_path: Path) -> None:
    save_classifier(GPT2Classifier(small_model, LABELS, 7), tmp_path, small_tokenizer)
    assert load_classifier(tmp_path).context == 7
    (tmp_path / "classifier.json").unlink()  # as transformers would write the folder
    assert load_classifier(tmp_path).context == 40 and load_classifier(tmp_path).labels == LABELS


def test_a_model_without_a_head_is_refused(small_folder: Path) -> None:
    with pytest.raises(CheckpointError, match="does not contain a classifier"):
        load_classifier(small_folder)


def test_a_row_of_only_padding_is_an_error(classifier: GPT2Classifier) -> None:
    with pytest.raises(InputError, match="has no token"):
        classifier(torch.zeros(2, 3, dtype=torch.int64), torch.tensor([[1, 1, 0], [0, 0, 0]]))


@pytest.mark.parametrize("balance", [False, True])
def test_the_loss_weighs_labels_and_not_padding(classifier: GPT2Classifier, balance: bool) -> None:
    train = examples_of(12)
    config = TrainingConfig(batch_size=12, context=40)
    objective = Classification(classifier, train, train[:5], config, balance=balance)
    counts = np.bincount([example.label for example in train], minlength=3)
    losses = []
    for example in train:
        loss = F.cross_entropy(classifier(torch.tensor([example.ids])), torch.tensor([example.label]))
        losses.append(loss.item() * (12 / 3 / counts[example.label] if balance else 1))
    loss = objective.loss(classifier.transformer)
    batch = [torch.from_numpy(array) for array in objective.batches(0)]
    assert loss(*batch).item() == pytest.approx(np.mean(losses), rel=1e-5)
    parts = [loss(*(tensor.chunk(3)[part] for tensor in batch)).item() for part in range(3)]
    assert np.mean(parts) == pytest.approx(np.mean(losses), rel=1e-5)


def test_validation_is_the_mean_over_rows_and_measures_accuracy(classifier: GPT2Classifier) -> None:
    validation = examples_of(5)
    objective = Classification(classifier, validation, validation, TrainingConfig(batch_size=2, context=40))
    loss = objective.loss(classifier.transformer).eval()
    objective.figures(0.0)
    values = [loss(*map(torch.from_numpy, objective.evaluation(n))).item() for n in range(objective.evaluation.count)]
    each = [F.cross_entropy(classifier(torch.tensor([e.ids])), torch.tensor([e.label])).item() for e in validation]
    assert np.mean(values) == pytest.approx(np.mean(each), rel=1e-5)
    n_right = sum(int(classifier(torch.tensor([e.ids])).argmax()) == e.label for e in validation)
    assert objective.figures(0.0) == {"accuracy": n_right / 5}


def test_classify_returns_the_probabilities_of_each_row(classifier: GPT2Classifier) -> None:
    rows = [example.ids for example in examples_of(11)]
    found = dict(classify(classifier, rows, batch_size=3))
    assert sorted(found) == list(range(11))
    for row, probabilities in found.items():
        expected = classifier(torch.tensor([rows[row]]))[0].softmax(-1).tolist()
        assert probabilities == pytest.approx(expected, abs=1e-6)


def test_metrics_equal_those_computed_by_hand(classifier: GPT2Classifier) -> None:
    result = ClassificationResult(("a", "b", "c"), [[8, 2, 0], [1, 4, 0], [0, 5, 0]])
    assert result.accuracy == 12 / 20
    assert result.f1("a") == pytest.approx(2 * (8 / 9) * (8 / 10) / (8 / 9 + 8 / 10))
    assert result.f1("b") == pytest.approx(2 * (4 / 11) * (4 / 5) / (4 / 11 + 4 / 5)) and result.f1("c") == 0
    examples = examples_of(9)
    confusion = np.array(measure(classifier, examples).confusion)
    assert confusion.sum() == 9
    assert confusion.sum(1).tolist() == np.bincount([example.label for example in examples], minlength=3).tolist()


@given(st.lists(st.sampled_from("xyz"), min_size=30, max_size=200), st.integers(0, 5))
def test_a_split_contains_every_row_once_and_labels_in_proportion(labels: list[str], seed: int) -> None:
    labels = [*labels, *"xyz" * 4]
    train, validation, test = split_by_label(labels, [0.1, 0.2], seed)
    assert sorted(train + validation + test) == list(range(len(labels)))
    for label in "xyz":
        n = labels.count(label)
        assert sum(labels[row] == label for row in validation) == max(1, round(0.1 * n))
        assert sum(labels[row] == label for row in test) == max(1, round(0.2 * n))
    assert split_by_label(labels, [0.1, 0.2], seed) == [train, validation, test]


def test_too_few_rows_of_a_label_are_an_error() -> None:
    with pytest.raises(DataError, match=r"the label 'b' has 2 rows"):
        split_by_label(["a"] * 9 + ["b"] * 2, [0.1, 0.1], 0)


def test_long_texts_are_cut_at_the_end(small_tokenizer: GPT2Tokenizer) -> None:
    texts = [("the cat " * 30, "good"), ("a dog", "bad")]
    examples, n_cut = encode_texts(texts, LABELS, small_tokenizer, 12)
    assert n_cut == 1 and examples[0].ids == small_tokenizer.encode(texts[0][0])[:12]
    assert [example.label for example in examples] == [1, 0]


def test_only_the_chosen_part_requires_gradients(small_folder: Path) -> None:
    model = GPT2.from_pretrained(small_folder)
    set_trainable(model, "last_block")
    learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learns == {name for name, _ in model.named_parameters() if name.startswith(("h.1.", "ln_f."))}
    set_trainable(model, "all")
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ConfigError, match="trainable='some'"):
        set_trainable(model, "some")
