"""The classifier equals transformers'. Its loss and metrics equal plain computations, and its folder loads again."""

from __future__ import annotations

import json
import math
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
from gpt2.finetuning.label_results import MultiLabelResult, RegressionResult
from gpt2.finetuning.labels import label_of, split_at_random
from gpt2.finetuning.records import BadRecord
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


# -- kinds of classifiers: one label, several, a number ---------------------------------------------------------------------

KINDS = [
    (None, 1), (None, 2), (None, 3),
    ("single_label_classification", 3),
    ("multi_label_classification", 1), ("multi_label_classification", 3),
    ("regression", 1), ("regression", 2),
]  # fmt: skip
TEXTS = ["the cat sat", "a boat came home with a fish!!", "the old dog " * 30, "!"]


def theirs_of(folder: Path, tokenizer: GPT2Tokenizer, problem_type: str | None, n_labels: int):
    """transformers' classifier, saved into `folder`. Its padding is "!", an ordinary token, with the id 0."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=300, n_positions=40, n_embd=24, n_layer=2, n_head=3, num_labels=n_labels, problem_type=problem_type,
        pad_token_id=0, bos_token_id=tokenizer.eot_token_id, eos_token_id=tokenizer.eot_token_id,
    )  # fmt: skip
    theirs = transformers.GPT2ForSequenceClassification(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize(("problem_type", "n_labels"), KINDS)
def test_scores_are_those_of_transformers_pipeline(
    small_tokenizer: GPT2Tokenizer, tmp_path: Path, problem_type: str | None, n_labels: int
) -> None:
    theirs = theirs_of(tmp_path, small_tokenizer, problem_type, n_labels)
    assert small_tokenizer.encode("!") == [0]
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.model_max_length = 40
    pipeline = transformers.TextClassificationPipeline(model=theirs, tokenizer=tokenizer)
    classifier = load_classifier(tmp_path)
    assert classifier.labels == tuple(f"LABEL_{number}" for number in range(n_labels))
    found = dict(classify(classifier, [small_tokenizer.encode(text)[:40] for text in TEXTS], batch_size=2))
    for row, scores in enumerate(pipeline(TEXTS, top_k=None, truncation=True)):
        expected = {score["label"]: score["score"] for score in scores}
        assert dict(zip(classifier.labels, found[row], strict=True)) == pytest.approx(expected, abs=1e-5)
    save_classifier(classifier, tmp_path / "again", small_tokenizer)
    again = load_classifier(tmp_path / "again")
    assert again.labels == classifier.labels and again.pad_token_id == 0
    assert again.scores(torch.ones(1, n_labels)).tolist() == classifier.scores(torch.ones(1, n_labels)).tolist()
    assert transformers.AutoConfig.from_pretrained(tmp_path / "again").num_labels == n_labels


TARGETS = {
    "single_label_classification": (3, [2, 0, 1, 1]),
    "multi_label_classification": (3, [(1.0, 0.0, 1.0), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.0, 1.0, 0.0)]),
    "regression": (1, [0.5, -2.0, 3.25, 1.0]),
}


@pytest.mark.parametrize("problem_type", TARGETS)
def test_losses_are_those_of_transformers(small_tokenizer: GPT2Tokenizer, tmp_path: Path, problem_type: str) -> None:
    n_labels, targets = TARGETS[problem_type]
    theirs = theirs_of(tmp_path, small_tokenizer, problem_type, n_labels)
    rows = [[5, 9, 3], [7], [2, 8, 8, 1, 4], [11, 12]]
    examples = [LabelledText(ids, target) for ids, target in zip(rows, targets, strict=True)]
    padded = torch.tensor([ids + [0] * (5 - len(ids)) for ids in rows])
    labels = torch.tensor(targets)
    with torch.no_grad():
        expected = theirs(padded, attention_mask=(padded > 0).long(), labels=labels).loss.item()
    classifier = load_classifier(tmp_path)
    assert classifier.problem_type == problem_type
    objective = Classification(classifier, examples, examples, TrainingConfig(batch_size=4, context=40))
    loss = objective.loss(classifier.transformer).eval()
    assert loss(*map(torch.from_numpy, objective.batches(0))).item() == pytest.approx(expected, rel=1e-5)
    parts = [objective.evaluation(n) for n in range(objective.evaluation.count)]
    assert np.mean([loss(*map(torch.from_numpy, part)).item() for part in parts]) == pytest.approx(expected, rel=1e-5)


def test_an_unknown_problem_type_and_wrong_labels_are_one_line(small_tokenizer: GPT2Tokenizer, tmp_path: Path) -> None:
    theirs_of(tmp_path, small_tokenizer, None, 3)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    for changes, message in (
        ({"problem_type": "regresion"}, "problem_type='regresion' must be one of"),
        ({"id2label": {"0": "a", "1": "b"}}, r"the shape \(3, 24\) and 2 labels"),
        ({"id2label": {"0": "a", "1": "b", "2": "a"}}, "the label 'a' twice"),
        ({"id2label": {"0": "a", "1": "b", "x": "c"}}, "does not describe the labels"),
        ({"id2label": [1]}, "does not describe the labels"),
    ):
        path.write_text(json.dumps({**values, **changes}))
        with pytest.raises(CheckpointError, match=message) as caught:
            load_classifier(tmp_path)
        assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_labels_of_records() -> None:
    several, number = "multi_label_classification", "regression"
    assert label_of({"label": 3}, "label", "single_label_classification") == "3"
    for value in (["joy", "odd one", 3, "joy"], "joy, odd  one,3,joy"):
        assert label_of({"label": value}, "label", several) == ("joy", "odd one", "3")
    assert label_of({"label": []}, "label", several) == label_of({"label": ""}, "label", several) == ()
    assert label_of({"label": "-2.5"}, "label", number) == label_of({"label": -2.5}, "label", number) == -2.5
    assert isinstance(label_of({"label": 4}, "label", number), float)
    for bad, problem_type, message in (
        (["a"], "single_label_classification", "use problem_type=multi_label"),
        (math.nan, "single_label_classification", "is nan, not a label"),
        ("much", number, "'much', not a finite number"),
        ("1e999", number, "not a finite number"),
        (10**400, number, "not a finite number"),
        (True, number, "is bool, not text"),
        ([["a"]], several, r"contains \['a'\]"),
        (None, several, "there is no field 'label'"),
        (2.5, several, "contains 2.5"),
    ):
        with pytest.raises(BadRecord, match=message):
            label_of({} if bad is None else {"label": bad}, "label", problem_type)


def test_results_equal_those_computed_by_hand() -> None:
    result = MultiLabelResult.of("ab", [[1, 0], [1, 1], [0, 0]], [[0.9, 0.5], [0.2, 0.7], [0.1, 0.1]])
    assert result.to_dict() == {
        "accuracy": 1 / 3, "micro_f1": 4 / 6, "macro_f1": pytest.approx(2 / 3), "f1": {"a": 2 / 3, "b": 2 / 3},
        "labels": ["a", "b"], "actual": [2, 1], "predicted": [1, 2], "right": [1, 1],
    }  # fmt: skip
    values = RegressionResult([1.0, 2.0, 3.0], [1.0, 2.0, 5.0]).to_dict()
    assert values == pytest.approx({"mse": 4 / 3, "rmse": math.sqrt(4 / 3), "mae": 2 / 3, "r2": -1.0})
    assert RegressionResult([1.0], [2.0]).to_dict()["r2"] is None


def test_a_random_split_contains_every_row_once() -> None:
    parts = split_at_random(50, [0.1, 0.0, 0.3], 4)
    assert [len(part) for part in parts] == [30, 5, 0, 15] and sorted(row for part in parts for row in part) == list(
        range(50)
    )
    with pytest.raises(DataError, match="2 rows, too few"):
        split_at_random(2, [0.1, 0.1], 0)
