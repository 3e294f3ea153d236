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
from gpt2.cli.options import Choice, Command, option, pass_options, threads_option, wrong_options
from gpt2.cli.training_run import (
    RunOptions,
    end_run,
    field_options,
    options_of_run,
    report_threads,
    resume_run,
    write_run_file,
)
from gpt2.weights.folder import holds_model_files, tokenizer_source
from gpt_config.errors import DataError
from gpt_config.model_config import PRESETS, GPT2Config
from gpt_config.training_config import PRECISIONS, SHARDINGS, TrainingConfig

if TYPE_CHECKING:
    from gpt2.pretrained import GPT2
    from gpt2.training.distributed import Processes
    from gpt2.training.loop import TrainingLoop
    from gpt2.training.preparation import TrainingData

_RUN_FILE = "training.json"  # the options of a run, for --resume
_N_LAYER, _N_HEAD, _N_EMBD = 6, 6, 384  # of a new model

# Heading: the help of each field of TrainingConfig. Options are made from the fields, so that none can be forgotten.
_HELP = {
    "Batches and steps": {
        "batch_size": "Rows of a step, over all processes together.",
        "context": "Tokens of a row.",
        "max_steps": "Steps of the run.",
        "seed": "Seed of weights, batches and dropout: the same seed gives the same run.",
    },
    "Optimizer": {
        "learning_rate": "Highest learning rate, reached after the warm-up.",
        "min_learning_rate": "Learning rate of the last step.",
        "warmup_steps": "Steps in which the learning rate rises from 0.",
        "weight_decay": "AdamW: each step shrinks matrices by this share, times the learning rate.",
        "beta1": "AdamW: decay rate of the gradient's mean.",
        "beta2": "AdamW: decay rate of the squared gradient's mean.",
        "clip_norm": "Scale longer gradients down to this norm; 0 for no limit.",
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
        "log_interval": "Steps between lines of metrics.jsonl.",
        "sample_prompt": "Prompt of the sample at each evaluation.  [default: none, a new text]",
        "sample_tokens": "Tokens of that sample; 0 for no sample.",
    },
}

_CHOICES = {"precision": PRECISIONS, "sharding": SHARDINGS}


@dataclass(frozen=True, kw_only=True)
class TrainOptions(RunOptions):
    """The options of `gpt2 train`. `config` has the fields of TrainingConfig."""

    config: TrainingConfig
    validation_fraction: float
    text_field: str
    tokenizer: str | None
    vocab_size: int | None
    init_from: str | None
    preset: str | None
    n_layer: int | None
    n_head: int | None
    n_embd: int | None
    dropout: float | None
    engine: str
    workers: int | None


# Options under the headings of --help.
_data, _model = partial(option, group="Data and run"), partial(option, group="Model")
_speed, _output = partial(option, group="Speed and memory"), partial(option, group="Evaluation and output")


@click.command(cls=Command, context_settings=CONTEXT_SETTINGS)
@_data("--data", multiple=True, metavar="PATH", help='Text or JSONL files, a folder of them, or "shakespeare".')
@_data("--validation_data", multiple=True, metavar="PATH", help="Validation texts.  [default: a part of --data]")
@_data("--validation_fraction", type=float, default=0.1, show_default=True, help="That part of --data, from 0 to 1.")
@_data("--text_field", default="text", show_default=True, help="Field of a JSONL line that has the text.")
@_data("--out", metavar="FOLDER", help="New folder of the model, checkpoints and metrics.")
@_data("--resume", metavar="FOLDER", help="Resume the run in FOLDER, with the options it was started with.")
@_data("--step", "from_step", type=int, help="With --resume: the checkpoint of this step.  [default: the newest]")
@_data("--workers", type=click.IntRange(min=1), help="Processes that encode text.  [default: one per core]")
@_model("--tokenizer", metavar="NAME", help="char, bpe (learned from the data), or a folder or name.  [default: gpt2]")
@_model("--vocab_size", type=int, help="Tokens of a bpe vocabulary.  [default: 4096]")
@_model("--init_from", metavar="NAME", help="Start from this model.  [default: random weights]")
@_model("--preset", type=Choice(PRESETS), metavar="NAME", help=f"Size of a published model: {', '.join(PRESETS)}.")
@_model("--n_layer", type=int, help="Layers of a new model.  [default: 6]")
@_model("--n_head", type=int, help="Attention heads of a layer.  [default: 6]")
@_model("--n_embd", type=int, help="Width of a new model, in channels.  [default: 384]")
@_model("--dropout", type=float, help="Share of activations dropped in training.  [default: 0, or that of --init_from]")
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
@_output("--tensorboard", is_flag=True, help="Write metrics for TensorBoard too.")
@_output("--quiet", is_flag=True, help="Show no bar and no samples on the terminal.")
@pass_options(TrainOptions)
def train(ctx: click.Context, options: TrainOptions) -> None:
    """Train a new model on texts, or continue to train one.

    The folder of --out is an ordinary model folder with the best model so far. --resume continues a run that was stopped or
    lost. Start the command with torchrun to train on several GPUs.
    """
    folder = options.run_folder()
    if options.is_new:
        _check_new_run(folder, options)
    else:
        options = options_of_run(ctx, folder / _RUN_FILE, options)
    _run(folder, _checked_numpy(options) if options.engine == "numpy" else options)


def _check_new_run(folder: Path, options: TrainOptions) -> None:
    has_sizes = any((options.n_layer, options.n_head, options.n_embd))
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


def _run(folder: Path, options: TrainOptions) -> None:
    from gpt2.training.distributed import join_processes

    with join_processes(options.device) as processes:
        data = _prepare(folder, options, processes) if options.is_new else _prepared(folder, options)
        trainer = _make_trainer(options, data, folder, processes)
        if options.is_new and processes.is_first:
            write_run_file(folder / _RUN_FILE, replace(options, data_fingerprint=data.train.fingerprint.hex()))
        if not options.is_new:
            resume_run(trainer, options.from_step)
        if processes.is_first:
            _describe(trainer, data)
            if options.engine == "torch":
                report_threads(trainer.processes.device)
        stopped = trainer.train()
    end_run(stopped, folder, processes)


def _checked_numpy(options: TrainOptions) -> TrainOptions:
    """The options for the NumPy engine. UsageError for one that it does not support."""
    from gpt2.training.numpy_trainer import check_settings

    with wrong_options():
        check_settings(options.config)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise click.UsageError("--engine numpy runs in one process: start it without torchrun")
    if options.device not in ("auto", "cpu"):
        raise click.UsageError(f"--engine numpy runs on the CPU: leave out --device {options.device}")
    return replace(options, device="cpu")


def _prepare(folder: Path, options: TrainOptions, processes: Processes) -> TrainingData:
    """The first process writes the token files, then all processes open them."""
    from gpt2.training.preparation import prepare
    from gpt2.training.shakespeare import resolve

    prepared = partial(
        prepare,
        data=[resolve(path) for path in options.data],
        folder=folder / "data",
        tokenizer=options.tokenizer or (tokenizer_source(options.init_from) if options.init_from else "gpt2"),
        vocab_size=options.vocab_size,
        validation_data=[resolve(path) for path in options.validation_data],
        validation_fraction=options.validation_fraction,
        text_field=options.text_field,
        workers=options.workers,
    )
    data = prepared() if processes.is_first else None
    processes.wait()
    return data or prepared()


def _prepared(folder: Path, options: TrainOptions) -> TrainingData:
    """The token files of a run that resumes. Its texts are not read again."""
    from gpt2.training.preparation import TrainingData

    data = TrainingData.open(folder / "data")
    if data.train.fingerprint.hex() != options.data_fingerprint:
        raise DataError(
            f"the files in {folder / 'data'} are not those that this run started with: start a new run with --out"
        )
    return data


def _make_trainer(options: TrainOptions, data: TrainingData, folder: Path, processes: Processes) -> TrainingLoop:
    """The trainer of the chosen engine. Both engines start from the weights that PyTorch draws."""
    model, config = _make_model(options, data), options.config
    if options.engine == "torch":
        from gpt2.training.trainer import Trainer

        return Trainer(
            model, data, config, folder, processes=processes, is_quiet=options.quiet, tensorboard=options.tensorboard
        )
    from gpt2.reference.numpy_model import NumpyGPT2
    from gpt2.training.numpy_trainer import NumpyTrainer

    weights = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    return NumpyTrainer(
        NumpyGPT2(model.config, weights), data, config, folder, is_quiet=options.quiet, tensorboard=options.tensorboard
    )


def _make_model(options: TrainOptions, data: TrainingData) -> GPT2:
    import torch

    from gpt2.pretrained import GPT2

    if options.init_from:
        model = GPT2.from_pretrained(options.init_from)
        if options.dropout is not None:
            model.set_dropout(options.dropout)
        return model
    torch.manual_seed(options.config.seed)
    return GPT2(_model_config(options, data))


def _model_config(options: TrainOptions, data: TrainingData) -> GPT2Config:
    eot = data.tokenizer.eot_token_id
    fields: dict[str, Any] = {
        "vocab_size": data.tokenizer.vocab_size,
        "bos_token_id": eot,
        "eos_token_id": eot,
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), options.dropout or 0.0),
    }
    if options.preset:
        return replace(GPT2Config.preset(options.preset), **fields)
    return GPT2Config(
        **fields,
        n_layer=options.n_layer or _N_LAYER,
        n_head=options.n_head or _N_HEAD,
        n_embd=options.n_embd or _N_EMBD,
        n_positions=options.config.context,
    )


def _describe(trainer: TrainingLoop, data: TrainingData) -> None:
    click.echo(
        f"{trainer.n_parameters / 1e6:.1f} million parameters, {len(data.train) / 1e6:.2f} million tokens for training, "
        f"{len(data.validation) / 1e6:.2f} for validation; a vocabulary of {data.tokenizer.vocab_size}",
        err=True,
    )
