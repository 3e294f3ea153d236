"""Set up a fine-tuning run: base model, data, trainable parameters and trainer. Trains nothing itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from gpt2.adapters.files import read_adapter, save_adapter
from gpt2.adapters.lora import add_lora, named_lora_parameters
from gpt2.finetuning.classification import Classification, LabelledText, encode_texts, measure, split_by_label
from gpt2.finetuning.classifier import GPT2Classifier
from gpt2.finetuning.classifier_files import load_classifier, save_classifier
from gpt2.finetuning.instructions import InstructionTuning, Turn, conversation, make_examples, with_thoughts
from gpt2.finetuning.labels import Label, label_of, names_of, split_at_random, suspicion_of
from gpt2.finetuning.preference import (
    PreferenceTuning,
    encode_pairs,
    load_reference,
    preference,
    reference_log_probs,
    save_reference,
)
from gpt2.finetuning.records import Fields, fingerprint_of, has_tables, labelled_columns, read_records, text_of
from gpt2.finetuning.template import TEMPLATE_FILE, InstructionTemplate
from gpt2.finetuning.trainable import set_trainable
from gpt2.generation.completion import complete
from gpt2.model import GPT2
from gpt2.pretrained import GPT2 as TrainedGPT2
from gpt2.pretrained import load_model, save_model
from gpt2.training.batches import shuffled
from gpt2.training.data_report import report_of, report_of_rows
from gpt2.training.distributed import Processes
from gpt2.training.hardware import choose_precision
from gpt2.training.objective import LanguageModelling, Objective
from gpt2.training.outputs import ModelWriter, Outputs, text_outputs
from gpt2.training.preparation import TrainingData, prepare
from gpt2.training.run_logs import RunLog
from gpt2.training.task_scores import Task, TaskScores
from gpt2.training.trainer import Trainer
from gpt2.weights.folder import locate_whole_model, tokenizer_source
from gpt2.weights.resize import add_special_tokens
from gpt2.weights.tokenizer import end_generation_at, folder_of, load_tokenizer_for
from gpt_config.errors import ConfigError, DataError
from gpt_config.finetuning_config import FinetuningConfig
from gpt_config.generation_config import GenerationConfig
from gpt_config.lora_config import LoRAConfig
from gpt_config.model_config import GPT2Config
from gpt_config.training_config import TrainingConfig
from gpt_config.whole_folder import whole_folder
from gpt_encoder.interface import Tokenizer

Paths = Sequence[str | Path]
T = TypeVar("T")


@dataclass
class Finetuning:
    """A run that is ready to start: call `trainer.train()`, then `finish()`, which returns the metrics of the result.

    `told` are lines to show to the user before the run. `fingerprint` changes if the data changes. `labels` are those of a
    classifier.
    """

    trainer: Trainer
    fingerprint: str
    told: list[str] = field(default_factory=list)
    finish: Callable[[], dict[str, Any]] = dict
    labels: tuple[str, ...] = ()


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
    labels: tuple[str, ...] = ()


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
    has_new_data: bool = False,
    shape: GPT2Config | None = None,
    is_quiet: bool = False,
    tensorboard: bool = False,
    logs: Sequence[str | RunLog] = (),
    tasks: Sequence[Task] = (),
) -> Finetuning:
    """Return a run that trains the model `base` for `config.task` on the files `data`, and writes its results into `folder`.

    With `is_resumed`, the token files in `folder` are used again, unless `has_new_data`; call `trainer.load()` to load a
    checkpoint. With the `shape` of the run's model, `base` is not read, because the checkpoint has all weights and `folder`
    the tokenizer. `tasks` are scored at each evaluation, and `logs` get the metrics: see `TrainingLoop`.

    ConfigError if the settings do not fit the model. DataError, with file and line, if data cannot be used.
    """
    processes, folder = processes or Processes(0, 1, torch.device("cpu")), Path(folder)
    if not data:
        raise DataError("there is no data: name the training files")
    if tasks and config.task == "classification":
        raise ConfigError("eval_tasks are for language models: leave them out for task=classification", field="eval_tasks")
    if config.lora_rank and shape is None:
        locate_whole_model(base)  # an adapter cannot be the base of another adapter
    torch.manual_seed(config.seed)
    model = load_model(base) if shape is None else _model_of_run(shape, folder)
    if config.context > model.config.n_positions:
        raise ConfigError(
            f"context={config.context} is longer than the {model.config.n_positions} positions of {base}: use at most "
            f"{model.config.n_positions}"
        )
    # DPO compares log-probabilities with those of the reference, which dropout would change.
    model.set_dropout(0.0 if config.task == "preference" else config.dropout)
    tokenizer = load_tokenizer_for(model)
    end_generation_at(model, tokenizer.eot_token_id)
    tokenizer = add_special_tokens(model, tokenizer, config.add_tokens, new_rows=config.new_rows, seed=config.seed)
    if config.lora_rank:
        add_lora(model, _lora_config(config))
    else:
        set_trainable(model, config.trainable)
    write = partial(save_adapter, base_model=base) if config.lora_rank else save_model
    start = _Base(model, tokenizer, str(base), config.context or model.config.n_positions, write)
    files = _Files(data, validation_data, test_data)
    is_reported = processes.is_first and (has_new_data or not is_resumed)
    if config.task == "text":
        source = str((folder / "data").resolve()) if is_resumed else tokenizer_source(start.name)
        task = _text(start, files, config, folder, processes, source, is_resumed and not has_new_data)
    elif config.task == "instruction":
        task = _instruction(start, files, config, processes, is_reported)
    elif config.task == "preference":
        if has_new_data:
            raise DataError(
                "the reference has measured the data of the start: start a new run in another folder for other data"
            )
        task = _preference(start, files, config, folder, processes, is_ready=shape is not None)
    else:
        task = _classification(start, files, config, folder, processes, is_reported)
    outputs = replace(task.outputs, scores=TaskScores(tasks, tokenizer, model.config)) if tasks else task.outputs
    trainer = Trainer(
        model, task.objective, task.training, folder,
        outputs=outputs, processes=processes, is_quiet=is_quiet, tensorboard=tensorboard, logs=logs,
    )  # fmt: skip
    return Finetuning(trainer, task.fingerprint, task.told, task.finish, task.labels)


def _lora_config(config: FinetuningConfig) -> LoRAConfig:
    """The adapter of a run. New tokens need an embedding that is trained, and saved with the adapter."""
    return LoRAConfig(
        rank=config.lora_rank, alpha=config.lora_alpha, dropout=config.lora_dropout,
        modules_to_save=("wte",) if config.add_tokens else (),
    )  # fmt: skip


def _model_of_run(shape: GPT2Config, folder: Path) -> GPT2:
    """The model of a run that is resumed. Its checkpoint has the weights, and its folder the tokenizer."""
    model = TrainedGPT2(shape)
    model.pretrained_from = folder
    return model.eval()


def _text(
    base: _Base,
    files: _Files,
    config: FinetuningConfig,
    folder: Path,
    processes: Processes,
    tokenizer: str,
    is_ready: bool,
) -> _Task:
    told: list[str] = []
    end = base.tokenizer.eot_token_id

    def prepared() -> TrainingData:
        return prepare(
            files.train, folder / "data", tokenizer=tokenizer, validation_data=files.validation,
            validation_fraction=config.validation_fraction, text_field=config.text_field,
            end_token_id=end, special_tokens=config.special_tokens, add_tokens=config.add_tokens, tell=told.append,
        )  # fmt: skip

    if is_ready:
        made = TrainingData.open(folder / "data", end)  # without reading the texts again
    else:
        first = prepared() if processes.is_first else None
        processes.wait_for_work()  # the others open the files of the first one
        made = first or TrainingData.open(folder / "data", end)
    context = base.context
    if not config.context:  # by default, a short text shortens the context
        context = max(1, min(context, len(made.train) - 1))
    n_rows = max(1, (len(made.train) - 1) // context)
    training = config.training_config(n_rows=n_rows, context=context, n_processes=processes.world_size)
    told.append(f"{len(made.train)} training tokens, {len(made.validation)} validation tokens")
    if processes.is_first and not is_ready:
        told += report_of(made).lines()
    outputs = text_outputs(made.tokenizer, training, base.write)
    return _Task(LanguageModelling(made, training), outputs, training, made.train.fingerprint.hex(), told)


def _instruction(base: _Base, files: _Files, config: FinetuningConfig, processes: Processes, is_reported: bool) -> _Task:
    told: list[str] = []
    conversations = read_records(files.train, conversation, skip_bad=config.skip_bad, tell=told.append)
    if files.validation:
        kept = read_records(files.validation, conversation, skip_bad=config.skip_bad, tell=told.append)
        train, validation = conversations.made, kept.made
    else:
        train, validation = _held_out(conversations.made, config)
    template = with_thoughts(InstructionTemplate.load(config.template), [*train, *validation])
    template = template.for_tokenizer(base.tokenizer)
    encoded = []
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
    if is_reported:  # without the template, whose text is in every example
        first, second = [[_content_of(turns, base.tokenizer) for turns in part] for part in (train, validation)]
        told += report_of_rows(first, second, base.tokenizer).lines()
    training = config.training_config(n_rows=len(encoded[0]), context=base.context, n_processes=processes.world_size)
    objective = InstructionTuning(encoded[0], encoded[1], training)
    outputs = _instruction_outputs(base, template, validation[0][0], config)
    return _Task(objective, outputs, training, fingerprint_of([*files.train, *files.validation], template), told)


def _held_out(examples: list[T], config: FinetuningConfig) -> tuple[list[T], list[T]]:
    """Return the examples for training, and the random part of them that is held out for validation."""
    rows = [shuffled(place, len(examples), config.seed, 8) for place in range(len(examples))]
    n_kept = max(1, round(config.validation_fraction * len(rows)))
    train, validation = ([examples[row] for row in sorted(part)] for part in (rows[n_kept:], rows[:n_kept]))
    return train, validation


def _preference(
    base: _Base, files: _Files, config: FinetuningConfig, folder: Path, processes: Processes, *, is_ready: bool
) -> _Task:
    told: list[str] = []
    read = partial(read_records, make=preference, skip_bad=config.skip_bad, tell=told.append)
    pairs = read(files.train).made
    if files.validation:
        train, validation = pairs, read(files.validation).made
    else:
        train, validation = _held_out(pairs, config)
    template = _template_for(base, config)
    encoded = []
    for name, part in (("training", train), ("validation", validation)):
        kept, n_dropped = encode_pairs(part, base.tokenizer, template, base.context)
        encoded.append(kept)
        lost = f" ({n_dropped} dropped: longer than {base.context} tokens)" if n_dropped else ""
        told.append(f"{len(kept)} {name} pairs{lost}")
    if not all(encoded):
        raise DataError(
            f"{len(encoded[0])} training pairs and {len(encoded[1])} validation pairs: each needs at least 1; add data, or "
            f"use a longer context than {base.context}"
        )
    training = config.training_config(n_rows=len(encoded[0]), context=base.context, n_processes=processes.world_size)
    if processes.is_first and not is_ready:
        model, precision = base.model.to(processes.device), choose_precision(training.precision, processes.device)
        save_reference(folder, *(reference_log_probs(model, part, config.batch_size, precision) for part in encoded))
    processes.wait_for_work()
    reference = load_reference(folder, *map(len, encoded))
    objective = PreferenceTuning(base.model, encoded[0], encoded[1], reference, training, config.beta)
    outputs = _instruction_outputs(base, template, validation[0].chosen[0], config)
    return _Task(objective, outputs, training, fingerprint_of([*files.train, *files.validation], template), told)


def _template_for(base: _Base, config: FinetuningConfig) -> InstructionTemplate:
    """The template of the base model if it has one, and the config names no other."""
    folder = folder_of(base.model)
    has_own = config.template == "default" and folder is not None and (folder / TEMPLATE_FILE).is_file()
    template = InstructionTemplate.load(folder if has_own and folder is not None else config.template)
    return template if has_own else template.for_tokenizer(base.tokenizer)


def _content_of(turns: Sequence[Turn], tokenizer: Tokenizer) -> list[int]:
    """The ids of all texts of a conversation, without a template."""
    texts = (text for turn in turns for text in (turn.system, turn.instruction, turn.input, turn.thought, turn.response))
    return tokenizer.encode("\n".join(filter(None, texts)), add_special_tokens=False)


def _instruction_outputs(base: _Base, template: InstructionTemplate, shown: Turn, config: FinetuningConfig) -> Outputs:
    """Return outputs that write the model with its template, and sample the greedy response to `shown`."""

    def write(model: GPT2, folder: Path) -> None:
        with whole_folder(folder) as new:
            base.write(model, new, tokenizer=base.tokenizer)
            template.save(new)

    def sample(model: GPT2) -> str:
        prompt = template.prompt(shown.instruction, input=shown.input, system=shown.system)
        options = GenerationConfig(max_new_tokens=config.sample_tokens)
        return prompt + complete(model, base.tokenizer, prompt, options)[0].text

    return Outputs(write, sample)


_TRAINING, _VALIDATION, _TEST = "training", "validation", "test"
LabelledTexts = list[tuple[str, Label]]  # (text, label)


def _classification(
    base: _Base, files: _Files, config: FinetuningConfig, folder: Path, processes: Processes, is_reported: bool
) -> _Task:
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
    if is_reported:
        rows = {name: [example.ids for example in part] for name, part in examples.items()}
        for first_line, name in ((0, _VALIDATION), (1, _TEST)):
            if rows[name]:
                told += report_of_rows(rows[_TRAINING], rows[name], base.tokenizer).lines(name)[first_line:]
    if config.problem_type != "regression":
        told.append(f"labels: {', '.join(labels)}")
    training = config.training_config(
        n_rows=len(examples[_TRAINING]), context=base.context, n_processes=processes.world_size
    )
    classifier = GPT2Classifier(base.model, labels, base.context, problem_type=config.problem_type)
    objective = Classification(classifier, examples[_TRAINING], examples[_VALIDATION], training, balance=config.balance)

    def write(model: GPT2, folder: Path) -> None:
        save_classifier(classifier, folder, base.tokenizer, base_model=base.name if config.lora_rank else None)

    def finish() -> dict[str, Any]:
        # Test texts if there are any: the validation texts chose the best model, so its metrics on them are too good.
        part = _TEST if examples[_TEST] else _VALIDATION
        best = _with_adapter_of(folder, classifier) if config.lora_rank else load_classifier(folder)
        return {"part": part, "texts": len(examples[part]), **measure(best, examples[part]).to_dict()}

    fingerprint = fingerprint_of([path for paths in files for path in paths])
    return _Task(objective, Outputs(write), training, fingerprint, told, finish, tuple(labels))


def _with_adapter_of(folder: Path, classifier: GPT2Classifier) -> GPT2Classifier:
    """`classifier` with the adapter and the head in `folder`. The base is not read: a resumed run may lack it."""
    adapter, parameters = read_adapter(folder), dict(named_lora_parameters(classifier.transformer))
    with torch.no_grad():
        for name, tensor in adapter.tensors.items():
            parameters[name].copy_(tensor)
    classifier.score.load_state_dict(adapter.head)
    return classifier


def _labelled_texts(paths: Paths, config: FinetuningConfig, told: list[str]) -> LabelledTexts:
    if not paths:
        return []

    def make(fields: Fields) -> tuple[str, Label]:
        return text_of(fields, config.text_column), label_of(fields, config.label_column, config.problem_type)

    def tell(line: str) -> None:
        if line not in told:
            told.append(line)

    columns = labelled_columns(config.text_column, config.label_column, tell)

    made = read_records(
        paths, make, columns=columns, wanted=(config.label_column, config.text_column), label_at=_label_at(config),
        skip_bad=config.skip_bad, tell=tell,
    ).made  # fmt: skip
    if has_tables(paths) and (suspicion := suspicion_of([label for _, label in made])):
        tell(suspicion)
    return made


def _label_at(config: FinetuningConfig) -> int:
    """The index of the label in a table without names."""
    return int(config.label_column) - 1 if config.label_column.isdigit() else 0


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


def _n_shared(texts: LabelledTexts, others: LabelledTexts) -> int:
    known = {text for text, _ in others}
    return sum(text in known for text, _ in texts)
