"""Set up a fine-tuning run: base model, data, trainable parameters and trainer. Trains nothing itself."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gpt2.adapters.files import save_adapter
from gpt2.adapters.lora import add_lora
from gpt2.finetuning.classification import Classification, LabelledText, encode_texts, measure, split_by_label
from gpt2.finetuning.classifier import GPT2Classifier
from gpt2.finetuning.classifier_files import load_classifier, save_classifier
from gpt2.finetuning.instructions import InstructionTuning, Turn, conversation, make_examples, with_thoughts
from gpt2.finetuning.labels import Label, label_of, names_of, split_at_random
from gpt2.finetuning.records import BadRecord, Fields, read_records, text_of
from gpt2.finetuning.template import InstructionTemplate
from gpt2.finetuning.trainable import set_trainable
from gpt2.generation.completion import complete
from gpt2.model import GPT2
from gpt2.pretrained import load_model, save_model
from gpt2.training.batches import shuffled
from gpt2.training.distributed import Processes
from gpt2.training.objective import LanguageModelling, Objective
from gpt2.training.outputs import ModelWriter, Outputs, text_outputs
from gpt2.training.preparation import TrainingData, prepare
from gpt2.training.trainer import Trainer
from gpt2.weights.folder import locate_whole_model, tokenizer_source
from gpt2.weights.tokenizer import load_tokenizer_for
from gpt_config.errors import ConfigError, DataError
from gpt_config.finetuning_config import FinetuningConfig
from gpt_config.generation_config import GenerationConfig
from gpt_config.lora_config import LoRAConfig
from gpt_config.training_config import TrainingConfig
from gpt_encoder.interface import Tokenizer

Paths = Sequence[str | Path]


@dataclass
class Finetuning:
    """A run that is ready to start: call `trainer.train()`, then `finish()`, which returns the metrics of the result.

    `told` are lines to show to the user before the run. `fingerprint` changes if the data changes.
    """

    trainer: Trainer
    fingerprint: str
    told: list[str] = field(default_factory=list)
    finish: Callable[[], dict[str, Any]] = dict


@dataclass(frozen=True)
class _Base:
    model: GPT2
    tokenizer: Tokenizer
    name: str
    context: int  # the largest number of tokens per row
    write: ModelWriter  # writes the whole model, or the adapter of a run with LoRA


class _Files(NamedTuple):
    train: Paths
    validation: Paths
    test: Paths


class _Task(NamedTuple):
    objective: Objective
    outputs: Outputs
    training: TrainingConfig
    fingerprint: str
    told: list[str]
    finish: Callable[[], dict[str, Any]] = dict


def prepare_finetuning(
    base: str | Path,
    data: Paths,
    config: FinetuningConfig,
    folder: str | Path,
    *,
    validation_data: Paths = (),
    test_data: Paths = (),
    processes: Processes | None = None,
    is_resumed: bool = False,
    is_quiet: bool = False,
    tensorboard: bool = False,
) -> Finetuning:
    """Return a run that trains the model `base` for `config.task` on the files `data`, and writes its results into `folder`.

    With `is_resumed`, the token files in `folder` are used again; call `trainer.load()` to load a checkpoint.

    ConfigError if the settings do not fit the model. DataError, with file and line, if data cannot be used.
    """
    processes, folder = processes or Processes(0, 1, torch.device("cpu")), Path(folder)
    if not data:
        raise DataError("there is no data: name the training files")
    if config.lora_rank:
        locate_whole_model(base)  # an adapter cannot be the base of another adapter
    torch.manual_seed(config.seed)
    model = load_model(base)
    if config.context > model.config.n_positions:
        raise ConfigError(
            f"context={config.context} is longer than the {model.config.n_positions} positions of {base}: use at most "
            f"{model.config.n_positions}"
        )
    model.set_dropout(config.dropout)
    if config.lora_rank:
        add_lora(model, LoRAConfig(rank=config.lora_rank, alpha=config.lora_alpha, dropout=config.lora_dropout))
    else:
        set_trainable(model, config.trainable)
    write = partial(save_adapter, base_model=base) if config.lora_rank else save_model
    start = _Base(model, load_tokenizer_for(model), str(base), config.context or model.config.n_positions, write)
    files = _Files(data, validation_data, test_data)
    if config.task == "text":
        task = _text(start, files, config, folder, processes, is_resumed)
    elif config.task == "instruction":
        task = _instruction(start, files, config)
    else:
        task = _classification(start, files, config, folder)
    trainer = Trainer(
        model, task.objective, task.training, folder,
        outputs=task.outputs, processes=processes, is_quiet=is_quiet, tensorboard=tensorboard,
    )  # fmt: skip
    return Finetuning(trainer, task.fingerprint, task.told, task.finish)


def _text(
    base: _Base, files: _Files, config: FinetuningConfig, folder: Path, processes: Processes, is_resumed: bool
) -> _Task:
    def prepared() -> TrainingData:
        return prepare(
            files.train, folder / "data", tokenizer=tokenizer_source(base.name), validation_data=files.validation,
            validation_fraction=config.validation_fraction,
        )  # fmt: skip

    if is_resumed:
        made = TrainingData.open(folder / "data")  # without reading the texts again
    else:
        first = prepared() if processes.is_first else None
        processes.wait()  # the others open the files of the first one
        made = first or prepared()
    context = base.context
    if not config.context:  # by default, a short text shortens the context
        context = max(1, min(context, len(made.train) - 1, len(made.validation) - 1))
    n_rows = max(1, (len(made.train) - 1) // context)
    training = config.training_config(n_rows=n_rows, context=context)
    told = [f"{len(made.train)} training tokens, {len(made.validation)} validation tokens"]
    outputs = text_outputs(made.tokenizer, training, base.write)
    return _Task(LanguageModelling(made, training), outputs, training, made.train.fingerprint.hex(), told)


def _instruction(base: _Base, files: _Files, config: FinetuningConfig) -> _Task:
    conversations = read_records(files.train, conversation, skip_bad=config.skip_bad)
    if files.validation:
        kept = read_records(files.validation, conversation, skip_bad=config.skip_bad)
        train, validation = conversations.made, kept.made
    else:
        rows = [shuffled(place, len(conversations.made), config.seed, 8) for place in range(len(conversations.made))]
        n_kept = max(1, round(config.validation_fraction * len(rows)))
        train = [conversations.made[row] for row in sorted(rows[n_kept:])]
        validation = [conversations.made[row] for row in sorted(rows[:n_kept])]
    template = with_thoughts(InstructionTemplate.load(config.template), [*train, *validation])
    encoded, told = [], []
    for name, part in (("training", train), ("validation", validation)):
        examples, n_cut, n_dropped = make_examples(part, base.tokenizer, template, base.context, config.too_long)
        encoded.append(examples)
        lost = f" ({n_cut} cut to {base.context} tokens, {n_dropped} dropped)" if n_cut or n_dropped else ""
        told.append(f"{len(examples)} {name} examples{lost}")
    if not all(encoded):
        raise DataError(
            f"{len(encoded[0])} training examples and {len(encoded[1])} validation examples: each needs at least 1; "
            f"add data, or use a longer context than {base.context}"
        )
    training = config.training_config(n_rows=len(encoded[0]), context=base.context)
    objective = InstructionTuning(encoded[0], encoded[1], training)
    outputs = _instruction_outputs(base, template, validation[0][0], config)
    return _Task(objective, outputs, training, _fingerprint([*files.train, *files.validation], template), told)


def _instruction_outputs(base: _Base, template: InstructionTemplate, shown: Turn, config: FinetuningConfig) -> Outputs:
    """Return outputs that write the model with its template, and sample the greedy response to `shown`."""

    def write(model: GPT2, folder: Path) -> None:
        base.write(model, folder, tokenizer=base.tokenizer)
        template.save(folder)

    def sample(model: GPT2) -> str:
        prompt = template.prompt(shown.instruction, input=shown.input, system=shown.system)
        options = GenerationConfig(max_new_tokens=config.sample_tokens)
        return prompt + complete(model, base.tokenizer, prompt, options)[0].text

    return Outputs(write, sample)


_TRAINING, _VALIDATION, _TEST = "training", "validation", "test"
LabelledTexts = list[tuple[str, Label]]  # (text, label)


def _classification(base: _Base, files: _Files, config: FinetuningConfig, folder: Path) -> _Task:
    told: list[str] = []
    parts = {
        name: _labelled_texts(paths, config, told)
        for name, paths in zip((_TRAINING, _VALIDATION, _TEST), files, strict=True)
    }
    labels = _split_off(parts, config)
    examples: dict[str, list[LabelledText]] = {}
    for name, texts in parts.items():
        examples[name], n_cut = encode_texts(texts, labels, base.tokenizer, base.context)
        notes = [f"{n_cut} cut to {base.context} tokens"] if n_cut else []
        if name != _TRAINING and (n_known := _n_shared(texts, parts[_TRAINING])):
            notes.append(f"{n_known} of them also training texts")
        told.append(f"{len(texts)} {name} texts" + (f" ({', '.join(notes)})" if notes else ""))
    if config.problem_type != "regression":
        told.append(f"labels: {', '.join(labels)}")
    training = config.training_config(n_rows=len(examples[_TRAINING]), context=base.context)
    classifier = GPT2Classifier(base.model, labels, base.context, problem_type=config.problem_type)
    objective = Classification(classifier, examples[_TRAINING], examples[_VALIDATION], training, balance=config.balance)

    def write(model: GPT2, folder: Path) -> None:
        save_classifier(classifier, folder, base.tokenizer, base_model=base.name if config.lora_rank else None)

    def finish() -> dict[str, Any]:
        # Test texts if there are any: the validation texts chose the best model, so its metrics on them are too good.
        part = _TEST if examples[_TEST] else _VALIDATION
        return {"part": part, "texts": len(examples[part]), **measure(load_classifier(folder), examples[part]).to_dict()}

    fingerprint = _fingerprint([path for paths in files for path in paths])
    return _Task(objective, Outputs(write), training, fingerprint, told, finish)


def _labelled_texts(paths: Paths, config: FinetuningConfig, told: list[str]) -> LabelledTexts:
    if not paths:
        return []

    def make(fields: Fields) -> tuple[str, Label]:
        return text_of(fields, config.text_column), label_of(fields, config.label_column, config.problem_type)

    def columns(first_row: list[str]) -> tuple[str, ...] | None:
        return _columns(first_row, config, told)

    return read_records(paths, make, columns=columns, skip_bad=config.skip_bad).made


def _split_off(parts: dict[str, LabelledTexts], config: FinetuningConfig) -> list[str]:
    """Move training rows into the other parts, where these have no files of their own. Returns the sorted labels."""
    everything, fractions = parts[_TRAINING], {_VALIDATION: config.validation_fraction, _TEST: config.test_fraction}
    wanted = {name: fraction for name, fraction in fractions.items() if not parts[name] and fraction}
    labels = names_of([label for _, label in everything], config.label_column)
    if not labels:
        raise DataError("no row has a label: add rows with labels")
    if config.problem_type == "single_label_classification" and len(labels) < 2:
        raise DataError(f"every row has the label {labels[0]!r}: add rows with other labels")
    for name in fractions:
        if unknown := set(names_of([label for _, label in parts[name]], config.label_column)) - set(labels):
            raise DataError(f"the {name} rows have the label {min(unknown)!r}, which no training row has: add some")
    single = [label for _, label in everything if isinstance(label, str)]
    shares = list(wanted.values())
    split = split_by_label(single, shares, config.seed) if single else split_at_random(len(everything), shares, config.seed)
    for name, rows in zip((_TRAINING, *wanted), split, strict=True):
        parts[name] = [everything[row] for row in rows]
    return labels


def _columns(first_row: list[str], config: FinetuningConfig, told: list[str]) -> tuple[str, ...] | None:
    """Return the names of a table's columns, or None if its first line contains them. A name may be a number."""
    wanted, found = (config.label_column, config.text_column), [name.strip() for name in first_row]
    if set(wanted) <= set(found):
        return None
    if all(name.isdigit() for name in wanted):
        return tuple(str(number) for number in range(1, len(first_row) + 1))
    has_names = {name.lower() for name in wanted} & {name.lower() for name in found}
    if wanted == ("label", "text") and len(first_row) == 2 and not has_names:
        line = "where the first line has no column names, the first column is the label and the second the text"
        told += [] if line in told else [line]
        return wanted
    raise BadRecord(
        f"has no columns {wanted[0]!r} and {wanted[1]!r} (it has {', '.join(map(repr, found))}): "
        "set label_column and text_column to names or numbers of columns"
    )


def _n_shared(texts: LabelledTexts, others: LabelledTexts) -> int:
    known = {text for text, _ in others}
    return sum(text in known for text, _ in texts)


def _fingerprint(paths: Paths, *more: object) -> str:
    digest = hashlib.sha256(repr(more).encode())
    for path in paths:
        digest.update(hashlib.sha256(Path(path).read_bytes()).digest())
    return digest.hexdigest()
