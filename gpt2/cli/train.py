"""`gpt2 train`: parse the options, prepare data and model, call the trainer. It trains nothing itself."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gpt2.cli.group import CONTEXT_SETTINGS
from gpt2.cli.model_option import DEVICE_HELP
from gpt2.cli.option_sources import was_given
from gpt2.cli.options import Choice, Command, NewTokens, option, pass_options, threads_option, wrong_options
from gpt2.cli.resume_options import DATA, Change, options_of_run, write_run_file
from gpt2.cli.teacher_options import check_teacher, load_teacher, student_sizes, teacher_options
from gpt2.cli.training_run import (
    RunOptions,
    check_fractions,
    check_new_rows,
    check_schedule,
    end_run,
    field_options,
    folder_options,
    read_task_options,
    report_options,
    report_threads,
    resume_run,
    shape_of_run,
    steady_stderr,
)
from gpt2.weights.folder import holds_model_files, tokenizer_source
from gpt_config.cores import MOST_THREADS
from gpt_config.errors import DataError
from gpt_config.model_config import PRESETS, GPT2Config
from gpt_config.new_tokens import NEW_ROWS
from gpt_config.training_config import DECAY_SHAPES, KEEP, OPTIMIZERS, PRECISIONS, SCHEDULES, SHARDINGS, TrainingConfig

if TYPE_CHECKING:
    from gpt2.pretrained import GPT2
    from gpt2.training.distributed import Processes
    from gpt2.training.loop import TrainingLoop
    from gpt2.training.objective import LanguageModelling
    from gpt2.training.preparation import TrainingData
    from gpt2.training.task_scores import Task

_RUN_FILE = "training.json"  # the options of a run, for --resume
_SIZES = {"n_layer": 6, "n_head": 6, "n_embd": 384}  # of a new model

# Heading: the help of each field of TrainingConfig. Options are made from the fields, so that none can be forgotten.
_HELP = {
    "Batches and steps": {
        "batch_size": "Rows of a step, over all processes together.",
        "context": "Tokens of a row.",
        "max_steps": "Steps of the run.",
        "seed": "Seed of weights, batches and dropout: the same seed gives the same run.",
    },
    "Optimizer": {
        "optimizer": "adamw, or muon for the matrices of the layers and AdamW for the rest.",
        "learning_rate": "Highest learning rate, reached after the warm-up.",
        "schedule": "How the rate falls after the warm-up: cosine, linear, constant (not at all), wsd (at the end).",
        "min_learning_rate": "Learning rate of the last step.  [default: a tenth of --learning_rate]",
        "min_learning_rate_share": "The same as a share of --learning_rate, from 0 to 1.  [default: 0.1]",
        "warmup_steps": "Steps in which the learning rate rises from 0.  [default: 100, at most 5% of the run]",
        "decay_steps": "wsd: last steps, in which the learning rate falls.  [default: 20% of the run]",
        "decay_shape": "wsd: how it falls in them.",
        "weight_decay": "AdamW: each step shrinks matrices by this share, times the learning rate.",
        "beta1": "AdamW: decay rate of the gradient's mean.",
        "beta2": "AdamW: decay rate of the squared gradient's mean.",
        "momentum": "muon: share of the last update that the next one keeps.",
        "clip_norm": "Scale longer gradients down to this norm; 0 for no limit.",
        "ema": "Evaluate and save a moving average of the weights with this decay, such as 0.999; 0 for none.",
    },
    "Teacher": {
        "temperature_of_teacher": "Divide the logits of teacher and student by this.",
        "teacher_share": "Share of the teacher's part in the loss; the rest is the text's own.",
    },
    "Speed and memory": {
        "precision": "Precision of matrix products; auto: bfloat16 if it is faster on this machine.",
        "compile": "Use torch.compile: half a minute at the start, then faster steps.",
        "accumulation": "Compute the rows of a step in this many parts: less memory.",
        "gradient_checkpointing": "Compute each layer twice: less memory, slower.",
        "sharding": "With torchrun: each process has the whole model (ddp), or a part of it (fsdp).",
    },
    "Evaluation and output": {
        "eval_interval": "Steps between evaluations.",
        "eval_batches": "Batches of validation text per evaluation.",
        "patience": "End after this many evaluations in a row without a lower loss; 0 for never.",
        "checkpoint_interval": "Steps between checkpoints.",
        "keep": "Model in the folder: best or last; both: the best, and the last in its folder last.",
        "log_interval": "Steps between lines of metrics.jsonl.",
        "sample_prompt": "Prompt of the sample at each evaluation.  [default: none, a new text]",
        "sample_tokens": "Tokens of that sample; 0 for no sample.",
    },
}

_CHOICES = {
    "precision": PRECISIONS,
    "sharding": SHARDINGS,
    "keep": KEEP,
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
    "decay_shape": DECAY_SHAPES,
}


@dataclass(frozen=True, kw_only=True)
class TrainOptions(RunOptions):
    """The options of `gpt2 train`. `config` has the fields of TrainingConfig."""

    config: TrainingConfig
    validation_fraction: float
    text_field: str
    special_tokens: bool
    tokenizer: str | None
    vocab_size: int | None
    add_tokens: tuple[str, ...]
    new_rows: str
    init_from: str | None
    teacher: str | None
    student_start: str
    preset: str | None
    n_layer: int | None
    n_head: int | None
    n_embd: int | None
    dropout: float | None
    engine: str
    workers: int | None


# Options under the headings of --help.
_data, _model = partial(option, group="Data and run"), partial(option, group="Model")
_speed = partial(option, group="Speed and memory")


@click.command(cls=Command, context_settings=CONTEXT_SETTINGS)
@_data("--data", multiple=True, metavar="PATH", help='Texts, JSONL, CSV ..., token files, a folder, or "shakespeare".')
@_data("--validation_data", multiple=True, metavar="PATH", help="Validation texts.  [default: a part of --data]")
@_data("--validation_fraction", type=float, default=0.1, show_default=True, help="That part of --data, from 0 to 1.")
@_data("--text_field", default="text", show_default=True, help="Field or column of JSON, CSV or Parquet with the text.")
@_data("--special_tokens", is_flag=True, help="Encode special tokens in texts as tokens, not as ordinary text.")
@folder_options("Data and run")
@_data("--workers", type=click.IntRange(1, MOST_THREADS), help="Processes that encode text.  [default: one per core]")
@_model("--tokenizer", metavar="NAME", help="char, bpe (learned from the data), or a folder or name.  [default: gpt2]")
@_model("--vocab_size", type=int, help="Tokens of a bpe vocabulary.  [default: 4096]")
@_model(
    "--add_tokens", type=NewTokens(), default=(), metavar="TOKEN,...", help="New special tokens, with commas between them."
)
@_model("--new_rows", type=Choice(NEW_ROWS), default="mean", help="Rows of the new tokens: mean of the others, or random.")
@_model("--init_from", metavar="NAME", help="Start from this model.  [default: random weights]")
@_model("--preset", type=Choice(PRESETS), metavar="NAME", help=f"Size of a published model: {', '.join(PRESETS)}.")
@_model("--n_layer", type=int, help="Layers of a new model.  [default: 6, or half of the teacher's]")
@_model("--n_head", type=int, help="Attention heads of a layer.  [default: 6]")
@_model("--n_embd", type=int, help="Width of a new model, in channels.  [default: 384]")
@_model("--dropout", type=float, help="Share of activations dropped in training.  [default: 0, or that of --init_from]")
@teacher_options("Teacher")
@field_options(TrainingConfig, _HELP, _CHOICES)
@_speed(
    "--engine",
    type=Choice(("torch", "numpy")),
    default="torch",
    show_default=True,
    help="numpy computes every gradient by hand: to read, and to compare.",
)
@threads_option("Speed and memory")
@_speed("--device", default="auto", show_default=True, help=DEVICE_HELP)
@report_options("Evaluation and output")
@pass_options(TrainOptions)
def train(ctx: click.Context, options: TrainOptions) -> None:
    """Train a new model on texts, or continue to train one.

    The folder of --out is an ordinary model folder with the best model so far. --resume continues a run that was stopped or
    lost, also with more steps, another schedule or other data. Start the command with torchrun to train on several GPUs.
    """
    folder, changes = options.run_folder(), list[Change]()
    if options.is_new:
        _check_new_run(ctx, folder, options)
    else:
        options, changes = options_of_run(ctx, folder / _RUN_FILE, options)
    with steady_stderr():
        options = _checked_numpy(options) if options.engine == "numpy" else options
        _run(folder, options, changes, read_task_options(ctx, options))


def _check_new_run(ctx: click.Context, folder: Path, options: TrainOptions) -> None:
    has_sizes = any(size is not None for size in (options.n_layer, options.n_head, options.n_embd))
    if options.from_step is not None:
        raise click.UsageError("--step is for --resume: leave it out")
    if not options.data:
        raise click.UsageError("name the texts to train on: --data PATH")
    if (folder / _RUN_FILE).exists() and int(os.environ.get("RANK", 0)) == 0:
        raise click.UsageError(f"{folder} already contains a run: resume it with --resume {folder}, or choose another --out")
    if not (folder / _RUN_FILE).exists() and holds_model_files(folder):
        raise click.UsageError(f"{folder} contains a model, which training would overwrite: choose another --out")
    if options.init_from and options.tokenizer:
        raise click.UsageError("--init_from has its own tokenizer: leave out --tokenizer")
    if options.init_from and (options.preset or has_sizes):
        raise click.UsageError("--init_from has its own sizes: leave out --preset, --n_layer, --n_head and --n_embd")
    if options.preset and has_sizes:
        raise click.UsageError("--preset has its own sizes: leave out --n_layer, --n_head and --n_embd")
    check_fractions(ctx)
    check_schedule(ctx, options.config.schedule)
    check_teacher(ctx, options.teacher, options.init_from, options.engine)
    if was_given(ctx, "momentum") and options.config.optimizer != "muon":
        raise click.UsageError("--momentum is for --optimizer muon: leave it out")
    check_new_rows(ctx, options.add_tokens)
    if options.vocab_size is not None and options.vocab_size < 1:
        raise click.UsageError(f"--vocab_size={options.vocab_size} must be a whole number of 1 or more")
    with wrong_options():
        _model_config(options, options.vocab_size or 1, None)  # before the texts are read


def _run(folder: Path, options: TrainOptions, changes: list[Change], tasks: list[Task]) -> None:
    from gpt2.training.distributed import join_processes
    from gpt2.training.memory import check_model_memory

    has_new_data = options.is_new or any(change.name in DATA for change in changes)
    with join_processes(options.device) as processes:
        if options.is_new and not options.init_from:
            shape = _model_config(options, options.vocab_size or 1, None)
            with wrong_options():
                check_model_memory(shape, processes, is_sharded=options.config.sharding == "fsdp")
        data = _prepare(folder, options, processes) if has_new_data else _prepared(folder, options)
        trainer = _make_trainer(options, data, folder, processes, tasks)
        options = replace(options, data_fingerprint=data.train.fingerprint.hex())
        if options.is_new and processes.is_first:
            # With more steps, the default warm-up would be another one.
            config = replace(options.config, warmup_steps=options.config.n_warmup)
            write_run_file(folder / _RUN_FILE, replace(options, config=config))
        if not options.is_new:
            resume_run(trainer, folder / _RUN_FILE, options, changes)
        if processes.is_first:
            _describe(trainer, data)
            if options.is_new:
                _report(data)
            if options.engine == "torch":
                report_threads(trainer.processes.device)
        stopped = trainer.train()
    end_run(stopped, folder, processes, options.config.keep)


def _checked_numpy(options: TrainOptions) -> TrainOptions:
    """The options for the NumPy engine. UsageError for one that it does not support."""
    from gpt2.training.numpy_trainer import check_settings

    with wrong_options():
        check_settings(options.config)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise click.UsageError("--engine numpy runs in one process: start it without torchrun")
    if options.device not in ("auto", "cpu"):
        raise click.UsageError(f"--engine numpy runs on the CPU: leave out --device {options.device}")
    if options.eval_tasks:
        raise click.UsageError("--engine numpy does not score tasks: leave out --eval_tasks, or the engine")
    return replace(options, device="cpu")


def _prepare(folder: Path, options: TrainOptions, processes: Processes) -> TrainingData:
    """The first process writes the token files, then all processes open them. A resumed run keeps its tokenizer."""
    from gpt2.training.preparation import TrainingData, prepare
    from gpt2.training.shakespeare import resolve

    source = options.init_from or options.teacher
    name = options.tokenizer or (tokenizer_source(source) if source else "gpt2")
    end = _end_token(folder, options)
    prepared = partial(
        prepare,
        data=[resolve(path) for path in options.data],
        folder=folder / "data",
        tokenizer=name if options.is_new else str((folder / "data").resolve()),
        vocab_size=options.vocab_size if options.is_new else None,
        validation_data=[resolve(path) for path in options.validation_data],
        validation_fraction=options.validation_fraction,
        text_field=options.text_field,
        end_token_id=end,
        special_tokens=options.special_tokens,
        add_tokens=options.add_tokens if options.is_new else (),
        workers=options.workers,
        tell=partial(click.echo, err=True),
    )
    data = prepared() if processes.is_first else None
    processes.wait_for_work()
    return data or TrainingData.open(folder / "data", end)


def _end_token(folder: Path, options: TrainOptions) -> int | None:
    """The end token of the model that the run started from; None for a new model, which has that of its tokenizer."""
    from gpt2.pretrained import load_model
    from gpt2.weights.tokenizer import end_token, load_tokenizer_for
    from gpt_encoder import load_tokenizer

    if not options.init_from:
        return None
    if not options.is_new and (shape := shape_of_run(folder)):
        return end_token(shape, load_tokenizer(folder / "data"))
    return load_tokenizer_for(load_model(options.init_from)).eot_token_id


def _prepared(folder: Path, options: TrainOptions) -> TrainingData:
    """The token files of a run that resumes. Its texts are not read again."""
    from gpt2.training.preparation import TrainingData

    data = TrainingData.open(folder / "data", _end_token(folder, options))
    if data.train.fingerprint.hex() != options.data_fingerprint:
        raise DataError(
            f"the files in {folder / 'data'} are not those that this run started with: start a new run with --out"
        )
    return data


def _make_trainer(
    options: TrainOptions, data: TrainingData, folder: Path, processes: Processes, tasks: list[Task]
) -> TrainingLoop:
    """The trainer of the chosen engine. Both engines start from the weights that PyTorch draws."""
    model, config = _make_model(options, data, None if options.is_new else shape_of_run(folder), folder), options.config
    if options.engine == "torch":
        from gpt2.training.outputs import text_outputs
        from gpt2.training.task_scores import TaskScores
        from gpt2.training.trainer import Trainer

        outputs = text_outputs(data.tokenizer, config)
        if tasks:
            outputs = replace(outputs, scores=TaskScores(tasks, data.tokenizer, model.config))
        return Trainer(
            model, _objective(options, data), config, folder, outputs=outputs, processes=processes,
            is_quiet=options.quiet, tensorboard=options.tensorboard, logs=options.log,
        )  # fmt: skip
    from gpt2.reference.numpy_model import NumpyGPT2
    from gpt2.training.numpy_trainer import NumpyTrainer

    weights = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    return NumpyTrainer(
        NumpyGPT2(model.config, weights), data, config, folder,
        is_quiet=options.quiet, tensorboard=options.tensorboard, logs=options.log,
    )  # fmt: skip


def _objective(options: TrainOptions, data: TrainingData) -> LanguageModelling:
    """What the model learns: the text, and with a teacher its probabilities too."""
    from gpt2.training.distillation import Distillation
    from gpt2.training.objective import LanguageModelling

    if options.teacher is None:
        return LanguageModelling(data, options.config)
    return Distillation(data, options.config, load_teacher(options.teacher))


def _make_model(options: TrainOptions, data: TrainingData, shape: GPT2Config | None, folder: Path) -> GPT2:
    """The model with its first weights; with `shape`, that of a run whose checkpoint has the weights."""
    import torch

    from gpt2.pretrained import GPT2
    from gpt2.training.distillation import start_from_teacher
    from gpt2.weights.resize import add_special_tokens
    from gpt2.weights.tokenizer import end_generation_at, load_tokenizer_for

    torch.manual_seed(options.config.seed)
    if shape is not None:
        model = GPT2(shape)
        model.pretrained_from = folder
    elif options.init_from:
        model = GPT2.from_pretrained(options.init_from)
        tokenizer = load_tokenizer_for(model)
        end_generation_at(model, tokenizer.eot_token_id)
        add_special_tokens(model, tokenizer, options.add_tokens, new_rows=options.new_rows, seed=options.config.seed)
    else:
        model = GPT2(_model_config(options, data.tokenizer.vocab_size, data.tokenizer.eot_token_id))
        if options.teacher and options.student_start == "layers":
            with wrong_options():
                layers = start_from_teacher(model, load_teacher(options.teacher))
            if int(os.environ.get("RANK", 0)) == 0:
                numbers = ", ".join(map(str, layers))
                click.echo(f"the student begins with the layers {numbers} of {options.teacher}", err=True)
        return model
    if options.dropout is not None:
        model.set_dropout(options.dropout)
    return model


def _model_config(options: TrainOptions, vocab_size: int, eot: int | None) -> GPT2Config:
    fields: dict[str, Any] = {
        "vocab_size": vocab_size,
        "bos_token_id": eot,
        "eos_token_id": eot,
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), options.dropout or 0.0),
    }
    if options.preset:
        return replace(GPT2Config.preset(options.preset), **fields)
    fields |= student_sizes(options.teacher) if options.teacher else _SIZES
    fields |= {name: size for name in _SIZES if (size := getattr(options, name)) is not None}
    return GPT2Config(**fields, n_positions=options.config.context)


def _report(data: TrainingData) -> None:
    from gpt2.training.data_report import report_of

    for line in report_of(data).lines():
        click.echo(line, err=True)


def _describe(trainer: TrainingLoop, data: TrainingData) -> None:
    click.echo(
        f"{trainer.n_parameters / 1e6:.1f} million parameters, {len(data.train) / 1e6:.2f} million tokens for training, "
        f"{len(data.validation) / 1e6:.2f} for validation; a vocabulary of {data.tokenizer.vocab_size}",
        err=True,
    )
