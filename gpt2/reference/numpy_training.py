"""The training loop of the NumPy engine: batches from ids, and steps over batches. It knows nothing of text or files."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from gpt2.reference.numpy_model import NumpyGPT2
from gpt2.reference.numpy_optimizers import clip_gradients
from gpt_config.errors import InputError

Array = np.ndarray[Any, np.dtype[Any]]

# Of glibc's malloc.h: which setting, and its value in bytes; the second is the largest that glibc takes.
_TRIM_THRESHOLD = (-1, 1 << 30)
_MMAP_THRESHOLD = (-3, 1 << 25)


class Optimizer(Protocol):
    """What `train` asks of SGD, Adam and AdamW."""

    def step(self, gradients: dict[str, Array], learning_rate: float) -> None: ...


def random_batches(
    ids: Sequence[int] | Array, batch_size: int, context: int, rng: np.random.Generator
) -> Iterator[tuple[Array, Array]]:
    """Without end: inputs and targets (batch_size, context) from random places; a target is the id that comes next.

    >>> from itertools import islice
    >>> [(inputs, targets)] = islice(random_batches(range(9), 1, 4, np.random.default_rng(0)), 1)
    >>> bool((targets == inputs + 1).all())
    True
    """
    all_ids = np.asarray(ids, dtype=np.int64)
    if len(all_ids) <= context:
        raise InputError(f"the text has {len(all_ids)} tokens and a context of {context} needs one more: give more text")
    while True:
        starts = rng.integers(0, len(all_ids) - context, batch_size)
        windows = all_ids[starts[:, None] + np.arange(context + 1)]  # (B, context + 1)
        yield windows[:, :-1], windows[:, 1:]


def train_step(
    model: NumpyGPT2,
    optimizer: Optimizer,
    inputs: Array,
    targets: Array,
    *,
    learning_rate: float,
    max_norm: float | None = 1.0,
) -> float:
    """One step on one batch (B, T); returns the loss before it. Gradients are clipped to `max_norm`, None for never."""
    loss, gradients = model.loss_and_gradients(inputs, targets)
    if max_norm is not None:
        clip_gradients(gradients, max_norm)
    optimizer.step(gradients, learning_rate)
    return loss


def train(
    model: NumpyGPT2,
    optimizer: Optimizer,
    batches: Iterable[tuple[Array, Array]],
    *,
    learning_rate: Callable[[int], float],
    max_norm: float | None = 1.0,
) -> Iterator[float]:
    """A step for each of `batches`, in training mode; yields the loss of each. `learning_rate` is asked with 0, 1, 2, ..."""
    keep_freed_memory()
    for step, (inputs, targets) in enumerate(batches):
        model.train()  # each time, for the reader may have looked at samples since the last step
        yield train_step(model, optimizer, inputs, targets, learning_rate=learning_rate(step), max_norm=max_norm)
    model.eval()


def keep_freed_memory() -> None:
    """Let the process keep what arrays give back, where the C library is glibc.

    By default it goes back to the system after each step and is asked for again in the next, page by page: a fifth of the
    time of a step.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library has no such switch
        malloc_option = ctypes.CDLL(None).mallopt
        malloc_option(*_TRIM_THRESHOLD)
        malloc_option(*_MMAP_THRESHOLD)
