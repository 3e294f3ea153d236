"""Save and load a classifier: a model folder with a head and labels, which transformers can load too."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from gpt2.adapters.files import load_adapter, read_adapter, save_adapter
from gpt2.adapters.lora import merge_lora
from gpt2.device import resolve_device, resolve_dtype
from gpt2.finetuning.classifier import GPT2Classifier
from gpt2.pretrained import GPT2, load_base
from gpt2.weights.files import read_tensors
from gpt2.weights.folder import is_adapter_folder, locate_model
from gpt2.weights.names import published_names
from gpt2.weights.reading import assemble, read_config
from gpt2.weights.writing import write_tensors
from gpt_config.atomic_write import atomic_write_json
from gpt_config.errors import CheckpointError, Remedy
from gpt_config.file_reading import read_json
from gpt_encoder.interface import Tokenizer
from gpt_encoder.tokenizer import has_tokenizer

_FILE = "classifier.json"


def save_classifier(
    classifier: GPT2Classifier, folder: str | os.PathLike[str], tokenizer: Tokenizer, *, base_model: str | None = None
) -> None:
    """Write config.json with the labels, model.safetensors, classifier.json and the tokenizer's files.

    Each file is written completely or not at all. With `base_model`, the name of the model on which an adapter was trained,
    the adapter and the head are written in peft's format instead of the weights. classifier.json contains labels and
    context, for which these formats have no field.
    """
    folder = Path(folder)
    atomic_write_json(folder / _FILE, {"labels": list(classifier.labels), "context": classifier.context})
    if base_model is not None:
        save_adapter(classifier.transformer, folder, base_model=base_model, tokenizer=tokenizer, head=classifier.score)
        return
    write_tensors(folder / "model.safetensors", dict(classifier.named_parameters()))
    atomic_write_json(
        folder / "config.json",
        {
            **classifier.transformer.config.to_dict(),
            "architectures": ["GPT2ForSequenceClassification"],
            "id2label": {str(number): label for number, label in enumerate(classifier.labels)},
            "label2id": {label: number for number, label in enumerate(classifier.labels)},
            "pad_token_id": tokenizer.eot_token_id,
            "problem_type": "single_label_classification",
            "dtype": str(classifier.score.weight.dtype).removeprefix("torch."),
        },
    )
    tokenizer.save_pretrained(folder)


def load_classifier(
    name_or_folder: str | os.PathLike[str], *, device: str = "cpu", dtype: str = "float32"
) -> GPT2Classifier:
    """Return a classifier in eval mode. An adapter is merged into its base model.

    CheckpointError if the folder contains a model that is not a classifier.
    """
    folder = locate_model(name_or_folder)
    classifier = _from_adapter(folder) if is_adapter_folder(folder) else _from_model(folder)
    return classifier.to(device=resolve_device(device), dtype=resolve_dtype(dtype)).eval()


def _from_model(folder: Path) -> GPT2Classifier:
    tensors = published_names(read_tensors(folder), folder)
    head, (labels, context) = tensors.pop("score.weight", None), _labels_and_context(folder)
    if head is None or head.shape[0] != len(labels):
        raise CheckpointError(
            f"{folder} does not contain a classifier (a head with an output per label): train one on labelled texts",
            remedy=Remedy("task", "classification"),
        )
    transformer = assemble(GPT2, read_config(folder), tensors, folder, device=torch.device("cpu"), dtype=torch.float32)
    transformer.pretrained_from = folder
    classifier = GPT2Classifier(transformer, labels, context)
    classifier.score.load_state_dict({"weight": head})
    return classifier


def _from_adapter(folder: Path) -> GPT2Classifier:
    adapter = read_adapter(folder)
    base = load_base(adapter)
    classifier = GPT2Classifier(base, *_labels_and_context(folder))
    load_adapter(classifier.transformer, adapter, head=classifier.score)
    merge_lora(classifier.transformer)
    if has_tokenizer(folder):
        base.pretrained_from = folder
    return classifier


def _labels_and_context(folder: Path) -> tuple[list[str], int | None]:
    """Return labels and context from classifier.json, or the labels that transformers wrote into config.json, if any."""
    try:
        if (folder / _FILE).exists():
            fields = read_json(folder / _FILE)
            return [str(label) for label in fields["labels"]], int(fields["context"])
        names = read_json(folder / "config.json").get("id2label", {})
        return [str(names[str(number)]) for number in range(len(names))], None
    except (OSError, ValueError, KeyError, AttributeError, TypeError, OverflowError):
        return [], None
