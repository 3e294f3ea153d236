"""The training loop of the NumPy engine: random batches of ids, and one step per batch. It knows no text and no files."""

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

# Arguments of glibc's mallopt: the number of the option in malloc.h, and its value in bytes.
_TRIM_THRESHOLD = (-1, 1 << 30)  # how much free memory at the end of the heap the process keeps
_MMAP_THRESHOLD = (-3, 1 << 25)  # larger blocks are always returned when freed; this is the largest value glibc accepts


class Optimizer(Protocol):
    """What `train` needs of an optimizer: SGD, Adam and AdamW have it."""

    def step(self, gradients: dict[str, Array], learning_rate: float) -> None: ...


def random_batches(
    ids: Sequence[int] | Array, batch_size: int, context: int, rng: np.random.Generator
) -> Iterator[tuple[Array, Array]]:
    """Yield (inputs, targets) without end, int64 (batch_size, context) each, from random places in `ids`.

    Each target is the id that follows its input. InputError if `ids` are not longer than `context`.

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
    """One step on one batch (B, T). Returns the loss before the step, in nats.

    The gradients are clipped to a common norm of `max_norm`, or not at all if it is None.
    """
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
    """One step per batch, in training mode. Yields the loss before each step; the model is in eval mode at the end.

    `learning_rate` is called with the number of the step: 0, 1, 2, ...
    """
    keep_freed_memory()
    for step, (inputs, targets) in enumerate(batches):
        model.train()  # in every step, because the caller may use eval mode between two steps
        yield train_step(model, optimizer, inputs, targets, learning_rate=learning_rate(step), max_norm=max_norm)
    model.eval()


def keep_freed_memory() -> None:
    """Let the process keep the memory of freed arrays, if its C library is glibc.

    By default, glibc returns this memory to the system after each step, and the next step requests it again, page by page.
    That takes 20% of the time of a step.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # other C libraries have no mallopt
        malloc_option = ctypes.CDLL(None).mallopt
        malloc_option(*_TRIM_THRESHOLD)
        malloc_option(*_MMAP_THRESHOLD)
