"""Save and load a classifier: a model folder with a head and labels, which transformers can load too."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpt2.adapters.files import load_adapter, read_adapter, save_adapter
from gpt2.adapters.lora import merge_lora
from gpt2.device import resolve_device, resolve_dtype
from gpt2.finetuning.classifier import GPT2Classifier
from gpt2.pretrained import GPT2, locate_base_of
from gpt2.weights.files import read_tensors
from gpt2.weights.folder import is_adapter_folder, locate_model
from gpt2.weights.for_others import describe_tokenizer
from gpt2.weights.names import published_names
from gpt2.weights.reading import assemble, read_config
from gpt2.weights.writing import write_weights
from gpt_config.atomic_write import atomic_write_json
from gpt_config.errors import CheckpointError, ConfigError, Remedy
from gpt_config.file_reading import read_json
from gpt_config.unfinished import unchanged
from gpt_config.whole_folder import whole_folder
from gpt_encoder.interface import Tokenizer
from gpt_encoder.tokenizer import has_tokenizer

_FILE = "classifier.json"

# The number of labels of a config.json that names none: transformers does not write its default.
_N_LABELS = 2


def save_classifier(
    classifier: GPT2Classifier,
    folder: str | os.PathLike[str],
    tokenizer: Tokenizer,
    *,
    base_model: str | None = None,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = "50GB",
) -> None:
    """Write config.json with the labels, model.safetensors, classifier.json and the tokenizer's files.

    All files are written, or none: see `save_model`, also for `dtype` and `max_shard_size`. With `base_model`, the name of
    the model on which an adapter was trained, the adapter and the head are written in peft's format instead of the weights.
    classifier.json contains the context, for which these formats have no field, and what an adapter's format has no field
    for.
    """
    pad = tokenizer.eot_token_id if classifier.pad_token_id is None else classifier.pad_token_id
    config = classifier.to_config()
    own = {"labels": list(classifier.labels), "context": classifier.context, "problem_type": config["problem_type"]}
    with whole_folder(folder) as new:
        atomic_write_json(new / _FILE, own)
        if base_model is not None:
            save_adapter(classifier.transformer, new, base_model=base_model, tokenizer=tokenizer, head=classifier.score)
        else:
            target = classifier.score.weight.dtype if dtype is None else resolve_dtype(dtype)
            write_weights(new, dict(classifier.named_parameters()), dtype=target, max_shard_size=max_shard_size)
            values = {**classifier.transformer.config.to_dict(), **config, "pad_token_id": pad}
            atomic_write_json(new / "config.json", {**values, "dtype": str(target).removeprefix("torch.")})
            tokenizer.save_pretrained(new)
        describe_tokenizer(new, classifier.transformer.config, needs_padding=True)


def load_classifier(
    name_or_folder: str | os.PathLike[str], *, device: str = "cpu", dtype: str = "float32"
) -> GPT2Classifier:
    """Return a classifier in eval mode. An adapter is merged into its base model, a language model or a classifier.

    CheckpointError if the folder contains no classifier, or one that this package cannot compute.
    """
    folder = locate_model(name_or_folder)
    classifier = _from_adapter(folder) if is_adapter_folder(folder) else _from_model(folder)
    return classifier.to(device=resolve_device(device), dtype=resolve_dtype(dtype)).eval()


def _from_model(folder: Path) -> GPT2Classifier:
    transformer, head = _read(folder)
    if head is None:
        raise CheckpointError(
            f"{folder} does not contain a classifier (a head with an output per label): train one on labelled texts",
            remedy=Remedy("task", "classification"),
        )
    classifier = _build(transformer, head, _Described.of(folder), folder)
    classifier.score.load_state_dict({"weight": head})
    return classifier


def _from_adapter(folder: Path) -> GPT2Classifier:
    adapter = read_adapter(folder)
    base = locate_base_of(adapter)
    transformer, head = _read(base)
    head = adapter.head.get("weight", head)
    described = _Described.of(folder)
    if described.labels is None and head is not None:  # peft writes no labels: they are the base's, if it is a classifier
        described = _Described.of(base).with_n_labels(head.shape[0])
    classifier = _build(transformer, head, described, folder)
    load_adapter(transformer, adapter, head=classifier.score)
    merge_lora(transformer)
    if has_tokenizer(folder):
        transformer.pretrained_from = folder
    return classifier


def _read(folder: Path) -> tuple[GPT2, Tensor | None]:
    """Return the model in `folder`, and the weight of the classifier's head if there is one."""
    with unchanged(folder):
        config, tensors = read_config(folder), published_names(read_tensors(folder), folder)
    head = tensors.pop("score.weight", None)
    transformer = assemble(GPT2, config, tensors, folder, device=torch.device("cpu"), dtype=torch.float32)
    transformer.pretrained_from = folder
    return transformer, head


def _build(transformer: GPT2, head: Tensor | None, described: _Described, folder: Path) -> GPT2Classifier:
    labels = described.labels
    if labels is None:
        labels = tuple(f"LABEL_{number}" for number in range(described.n_labels))
    if head is not None and head.shape[:1] != (len(labels),):
        raise CheckpointError(
            f"{folder} has a head with the shape {tuple(head.shape)} and {len(labels)} labels: correct id2label in "
            "config.json, or labels in classifier.json"
        )
    if len(set(labels)) < len(labels):
        raise CheckpointError(f"{folder} has the label {max(labels, key=labels.count)!r} twice: give each its own name")
    try:
        return GPT2Classifier(
            transformer,
            labels,
            described.context,
            problem_type=described.problem_type,
            pad_token_id=described.pad_token_id,
        )
    except ConfigError as error:
        raise CheckpointError(f"{folder}: {error}") from None


class _Described(NamedTuple):
    """What the JSON files of a folder say about a classifier. `labels` is None if they name none."""

    labels: tuple[str, ...] | None = None
    n_labels: int = _N_LABELS
    context: int | None = None
    problem_type: str | None = None
    pad_token_id: int | None = None

    @classmethod
    def of(cls, folder: Path) -> _Described:
        """Read config.json, which transformers writes too, then classifier.json, whose fields win."""
        path = folder / "config.json"
        try:
            config = _object(path)
            path = folder / _FILE
            own = _object(path)
            names = own.get("labels")
            if names is None and (by_number := config.get("id2label")):
                path = folder / "config.json"
                names = [by_number[str(number)] for number in range(len(by_number))]
            pad, context = config.get("pad_token_id"), own.get("context")
            return cls(
                None if names is None else tuple(map(str, names)),
                int(config.get("num_labels") or _N_LABELS),
                None if context is None else int(context),
                own.get("problem_type") or config.get("problem_type"),
                None if pad is None else int(pad),
            )
        except (OSError, ValueError, KeyError, AttributeError, TypeError, OverflowError):
            raise CheckpointError(f"{path} does not describe the labels of a classifier: restore or correct it") from None

    def with_n_labels(self, n_labels: int) -> _Described:
        """Return the same with labels named by number, unless it already names `n_labels` labels."""
        if self.labels is not None and len(self.labels) == n_labels:
            return self
        return self._replace(labels=None, n_labels=n_labels)


def _object(path: Path) -> dict[str, Any]:
    content = read_json(path) if path.exists() else {}
    if not isinstance(content, dict):
        raise TypeError
    return content
