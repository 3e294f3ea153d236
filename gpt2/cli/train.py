"""`gpt2 train`: parse the options, prepare data and model, call the trainer. It trains nothing itself."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gpt2.cli.group import CONTEXT_SETTINGS
from gpt2.cli.options import Command, pass_options, threads_option, wrong_options
from gpt2.cli.training_run import RunOptions, end_run, field_options, go_on, options_of_run, write_run_file
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

# Field of TrainingConfig: its help. Options are made from the fields, so that none can be forgotten.
_HELP = {
    "batch_size": "Rows in each step, over all processes together.",
    "context": "Tokens in each row.",
    "accumulation": "Do each process's rows in so many parts, to save memory.",
    "max_steps": "Steps to train for.",
    "learning_rate": "The highest learning rate, after warm-up.",
    "min_learning_rate": "The learning rate at the end.",
    "warmup_steps": "Steps in which the learning rate climbs.",
    "weight_decay": "How much matrices shrink in each step, times the learning rate.",
    "beta1": "Of Adam: how much of the gradient's mean is kept.",
    "beta2": "Of Adam: how much of the squared gradient's mean is kept.",
    "clip_norm": "Shorten longer gradients to this; 0 does not.",
    "precision": "Of the matrix products; auto is bfloat16 where the machine gains from it.",
    "compile": "Compile the model: half a minute at the start, faster steps afterwards.",
    "gradient_checkpointing": "Save memory: compute each layer twice.",
    "sharding": "With torchrun: the whole model on each process (ddp), or a part (fsdp).",
    "seed": "Of weights, batches and dropout: one seed, one run.",
    "eval_interval": "Steps between evaluations.",
    "patience": "End after so many evaluations in a row without a better loss; 0 never.",
    "eval_batches": "Batches of validation text in each evaluation.",
    "checkpoint_interval": "Steps between checkpoints.",
    "log_interval": "Steps between lines of metrics.jsonl.",
    "sample_prompt": "What the sample at each evaluation begins with.  [default: a new text]",
    "sample_tokens": "Tokens of each sample; 0 makes none.",
}

_CHOICES = {"precision": PRECISIONS, "sharding": SHARDINGS}


@dataclass(frozen=True, kw_only=True)
class TrainOptions(RunOptions):
    """The options of `gpt2 train`. `config` has those that are fields of TrainingConfig."""

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


@click.command(cls=Command, context_settings=CONTEXT_SETTINGS)
@click.option("--data", multiple=True, metavar="PATH", help='Text or JSONL files, a folder of them, or "shakespeare".')
@click.option("--validation_data", multiple=True, metavar="PATH", help="Files to measure on.  [default: a part of --data]")
@click.option("--validation_fraction", type=float, default=0.1, show_default=True, help="How much of --data to measure on.")
@click.option("--text_field", default="text", show_default=True, help="The field of a JSONL line that holds the text.")
@click.option("--out", metavar="FOLDER", help="Where the model, checkpoints and metrics go.")
@click.option("--resume", metavar="FOLDER", help="Go on with the run in FOLDER, with the options it was started with.")
@click.option(
    "--step", "from_step", type=int, help="With --resume: from the checkpoint of this step.  [default: the newest]"
)
@click.option("--tokenizer", metavar="NAME", help="char, bpe (learned from the data), or a folder or name.  [default: gpt2]")
@click.option("--vocab_size", type=int, help="Of a bpe vocabulary.  [default: 4096]")
@click.option("--init_from", metavar="NAME", help="Start from this model instead of random weights.")
@click.option("--preset", type=click.Choice(sorted(PRESETS)), help="A new model of a published size.")
@click.option("--n_layer", type=int, help="Layers of a new model.  [default: 6]")
@click.option("--n_head", type=int, help="Attention heads of a new model.  [default: 6]")
@click.option("--n_embd", type=int, help="Width of a new model.  [default: 384]")
@click.option(
    "--dropout", type=float, help="Share of activations that are dropped in training.  [default: 0, or the model's]"
)
@field_options(TrainingConfig, _HELP, _CHOICES)
@click.option(
    "--engine", type=click.Choice(("torch", "numpy")), default="torch", show_default=True,
    help="numpy has every gradient by hand: to read, and to compare.",
)  # fmt: skip
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, mps, or auto.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes that encode text.  [default: one a core]")
@click.option("--tensorboard", is_flag=True, help="Write metrics for TensorBoard too.")
@click.option("--quiet", is_flag=True, help="No bar and no samples on the terminal.")
@threads_option
@pass_options(TrainOptions)
def train(ctx: click.Context, options: TrainOptions) -> None:
    """Train a GPT-2 on text: a new one, or one that is there already.

    FOLDER becomes an ordinary model folder with the best model so far. A run that was stopped or lost goes on with
    --resume. Start it with torchrun to train on several GPUs.
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
        raise click.UsageError("--step is for --resume")
    if not options.data:
        raise click.UsageError("name the text to learn from: --data PATH")
    if (folder / _RUN_FILE).exists() and int(os.environ.get("RANK", 0)) == 0:
        raise click.UsageError(f"{folder} holds a run already: go on with --resume {folder}, or choose another --out")
    if not (folder / _RUN_FILE).exists() and holds_model_files(folder):
        raise click.UsageError(f"{folder} holds a model, which training would overwrite: choose another --out")
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
            go_on(trainer, options.from_step)
        if processes.is_first:
            _describe(trainer, data)
        stopped = trainer.train()
    end_run(stopped, folder, processes)


def _checked_numpy(options: TrainOptions) -> TrainOptions:
    """The options as the engine of NumPy takes them. UsageError for one that it has no meaning for."""
    from gpt2.training.numpy_trainer import check_settings

    with wrong_options():
        check_settings(options.config)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise click.UsageError("--engine numpy is one process: start it without torchrun")
    if options.device not in ("auto", "cpu"):
        raise click.UsageError(f"--device {options.device} is not for --engine numpy, which runs on the CPU")
    return replace(options, device="cpu")


def _prepare(folder: Path, options: TrainOptions, processes: Processes) -> TrainingData:
    """The first process prepares, then all open the same files."""
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
    """The token files of a run that goes on; the texts they were made from are not looked at again."""
    from gpt2.training.preparation import TrainingData

    data = TrainingData.open(folder / "data")
    if data.train.fingerprint.hex() != options.data_fingerprint:
        raise DataError(f"the files in {folder / 'data'} are not those this run began with: start a new run with --out")
    return data


def _make_trainer(options: TrainOptions, data: TrainingData, folder: Path, processes: Processes) -> TrainingLoop:
    """The trainer of the engine that was asked for. Both begin with the weights that PyTorch draws."""
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
        f"{trainer.n_parameters / 1e6:.1f} million parameters, {len(data.train) / 1e6:.2f} million tokens to learn from, "
        f"{len(data.validation) / 1e6:.2f} to measure on; a vocabulary of {data.tokenizer.vocab_size}",
        err=True,
    )
