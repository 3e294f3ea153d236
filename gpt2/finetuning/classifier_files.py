"""A classifier's folder: an ordinary model folder with a head and labels, which transformers loads too."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import save_file

from gpt2.checkpoints.loading import assemble, read_config
from gpt2.checkpoints.naming import published_names
from gpt2.checkpoints.weight_files import read_tensors
from gpt2.device import resolve_device, resolve_dtype
from gpt2.finetuning.classification import GPT2Classifier
from gpt2.model_folder import locate_model
from gpt_config.atomic_write import atomic_write, atomic_write_json
from gpt_config.errors import CheckpointError, WriteError

if TYPE_CHECKING:
    from gpt_encoder.interface import Tokenizer

_HEAD = "score.weight"


def save_classifier(classifier: GPT2Classifier, folder: str | os.PathLike[str], tokenizer: Tokenizer) -> None:
    """Write config.json with the labels, model.safetensors and the tokenizer's files; each is whole or not there at all."""
    folder = Path(folder)
    tensors = {name: parameter.detach().contiguous() for name, parameter in classifier.named_parameters()}
    try:
        atomic_write(folder / "model.safetensors", lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    except SafetensorError as error:  # an OSError of the library's own kind
        raise WriteError(f"cannot write {folder / 'model.safetensors'} ({error}): make room") from None
    labels = dict(enumerate(classifier.labels))
    atomic_write_json(
        folder / "config.json",
        {
            **classifier.transformer.config.to_dict(),
            "architectures": ["GPT2ForSequenceClassification"],
            "id2label": {str(number): label for number, label in labels.items()},
            "label2id": {label: number for number, label in labels.items()},
            "pad_token_id": tokenizer.eot_token_id,
            "problem_type": "single_label_classification",
            "dtype": str(classifier.score.weight.dtype).removeprefix("torch."),
        },
    )
    tokenizer.save_pretrained(folder)


def load_classifier(
    name_or_folder: str | os.PathLike[str], *, device: str = "cpu", dtype: str = "float32"
) -> GPT2Classifier:
    """A classifier in eval mode. CheckpointError if the folder holds a model that is none."""
    folder = locate_model(name_or_folder)
    tensors = published_names(read_tensors(folder), folder)
    head, labels = tensors.pop(_HEAD, None), _labels(folder)
    if head is None or head.shape[0] != len(labels):
        raise CheckpointError(
            f"{folder} holds no classifier (a head for each label): make one with gpt2 finetune --task classification"
        )
    target_device, target_dtype = resolve_device(device), resolve_dtype(dtype)
    transformer = assemble(read_config(folder), tensors, folder, device=target_device, dtype=target_dtype)
    classifier = GPT2Classifier(transformer, labels)
    classifier.score.load_state_dict({"weight": head})
    return classifier.eval()


def _labels(folder: Path) -> list[str]:
    try:
        names = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("id2label", {})
        return [str(names[str(number)]) for number in range(len(names))]
    except (OSError, ValueError, KeyError, AttributeError):
        return []
