"""The options of `gpt2 train` on a teacher, from which a student learns: their checks, its shape and its start."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from gpt2.cli.option_sources import was_given
from gpt2.cli.options import Choice, option, options_together
from gpt_config.model_config import GPT2Config

if TYPE_CHECKING:
    from gpt2.model import GPT2

STUDENT_STARTS = ("layers", "random")
_ONLY = ("student_start", "temperature_of_teacher", "teacher_share")


def teacher_options(group: str) -> Callable[[Any], Any]:
    """The options --teacher and --student_start, listed by --help under the heading `group`."""
    return options_together(
        option("--teacher", group=group, metavar="NAME", help="Learn from the probabilities of this model too."),
        option(
            "--student_start",
            group=group,
            type=Choice(STUDENT_STARTS),
            default=STUDENT_STARTS[0],
            show_default=True,
            help="With --teacher: begin with some of its layers, or with random weights.",
        ),
    )


def check_teacher(ctx: click.Context, teacher: str | None, init_from: str | None, engine: str) -> None:
    """UsageError for options of a teacher without one, for a second start, and for an engine that has no teachers."""
    given = [name for name in _ONLY if was_given(ctx, name)]
    if given and not teacher:
        raise click.UsageError(f"--{given[0]} is for a --teacher: name one, or leave it out")
    if teacher and init_from and was_given(ctx, "student_start"):
        raise click.UsageError("--init_from is the start of the student: leave out --student_start")
    if teacher and engine == "numpy":
        raise click.UsageError("--teacher is not supported by --engine numpy: leave one of them out")


def student_sizes(teacher: str) -> dict[str, int]:
    """The sizes of a student whose sizes are not given: those of its teacher, with half of the layers."""
    shape = teacher_shape(teacher)
    return {"n_layer": max(1, shape.n_layer // 2), "n_head": shape.n_head, "n_embd": shape.n_embd}


def teacher_shape(teacher: str) -> GPT2Config:
    """The shape of the model `teacher`, whose weights are not read."""
    from gpt2.weights.folder import locate_whole_model
    from gpt2.weights.reading import read_config

    return read_config(locate_whole_model(teacher))


def load_teacher(teacher: str) -> GPT2:
    """The model `teacher`."""
    from gpt2.pretrained import load_model

    return load_model(teacher)
