"""Compare a model with the folder that it was made from: a file of another program, a written model, or another folder.

Weights that the file has in fewer bits may change the logits a little, and then the greedy ids.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from gpt2.formats.gguf import grids_of, kinds_of, precision_of
from gpt2.formats.layout import is_transposed
from gpt2.formats.registry import load_runnable
from gpt2.formats.stored import INT8_ROWS, Error, Stored, error_of, range_error_of
from gpt2.generation.loop import generate
from gpt2.model import GPT2
from gpt2.pretrained import load_foreign, load_model
from gpt2.quantization.quantize import dequantize, is_int8, quantize_int8
from gpt2.verification.checks import EXACT, FLOAT32, Check, Outcome, Pair, Status, Tolerance
from gpt2.verification.rounded import (
    Rounding,
    by_matrix,
    by_row,
    with_rounded_inputs,
    with_rounded_weights,
)
from gpt2.weights.files import read_tensors
from gpt2.weights.folder import is_adapter_folder
from gpt2.weights.foreign import foreign_format, written_format
from gpt2.weights.names import published_names
from gpt2.weights.tokenizer import tokenizer_of
from gpt_config.errors import InputError
from gpt_config.model_config import GPT2Config, is_untied
from gpt_encoder.interface import Tokenizer

_EXACT_DTYPES = ("float32", "float64")

_N_TOKENS = 20
_BATCHES = ((1, 1), (3, 7), (2, 16))

# Blanks, code, numbers, accents and emoji.
_TEXTS = ("Once upon a time, there was 1 cat.", "  def f(x):\n\treturn x\n\n", "naïve 日本 \U0001f600", "")


Logits = Callable[[Tensor], Tensor]


class _Subject(NamedTuple):
    """What a path contains. `model` is None if another program runs it; `rounding` is what that program does to inputs."""

    logits: Logits
    greedy: Callable[[list[int], int], list[int]]
    precision: str
    weights: list[Stored]
    model: GPT2 | None = None
    tokenizer: Tokenizer | None = None
    rounding: Rounding | None = None


def compare(path: Path, folder: Path) -> Iterator[Outcome]:
    """Compare the model `path` with that in `folder`: sizes, weights, tokens, logits, greedy ids. Yields the outcomes.

    Raises CheckpointError if one of them cannot be read, and InputError if a package that runs it is missing.
    """
    expected, found = load_model(folder), _subject(path)
    names = (path.name, folder.name, found.precision)
    if found.model is not None:
        wrong = _other_sizes(found.model, expected)
        yield Outcome("sizes", *names, status=Status.FAIL if wrong else Status.PASS, note=wrong)
        if wrong:
            return
    outcomes = list(_weights(found, expected, path.name, folder.name))
    yield from outcomes
    if outcomes[0].absolute is None:  # they are those of another size, so that nothing else can be compared
        return
    tokenizer = tokenizer_of(expected)
    if found.tokenizer is not None and tokenizer is not None:
        yield Check("tokens", *names, EXACT, partial(_tokens, found.tokenizer, tokenizer)).run()
    oracle, tolerance, how = _oracle(found, expected)
    in_words = f"{folder.name}, {how}" if how else folder.name
    yield Check(
        "logits", path.name, in_words, found.precision, tolerance, partial(_logits, found.logits, oracle, expected.config)
    ).run()
    outcome = Check("greedy ids", *names, EXACT, partial(_greedy, found, expected)).run()
    if outcome.status == Status.FAIL and found.precision not in _EXACT_DTYPES and outcome.absolute == outcome.absolute:
        outcome = replace(outcome, status=Status.WARNING, note=f"{outcome.note}: the weights are rounded")
    yield outcome


def _subject(path: Path) -> _Subject:
    if written := written_format(path):
        form = load_runnable(written)
        engine = form.load_engine(path)
        rounding = None if engine.precision != "int8" else by_matrix if written == "onnx" else by_row
        return _Subject(engine.logits, engine.greedy, engine.precision, form.stored_weights(path), rounding=rounding)
    if name := foreign_format(path):
        model, tokenizer = load_foreign(path, name)
        precision = precision_of(path) if name == "gguf" else str(model.dtype).removeprefix("torch.")
        kinds = kinds_of(path) if name == "gguf" else dict.fromkeys(model.state_dict(), precision)
        grids = grids_of(path) if name == "gguf" else {}
        model, state = model.float(), model.state_dict()
        weights = [Stored(each, state[each], kinds.get(each, precision), grids.get(each)) for each in state]
    else:
        model = load_model(path)
        tokenizer = tokenizer_of(model)
        precision, weights = _of_folder(model, path)
    return _Subject(model, partial(_greedy_ids, model), precision, weights, model, tokenizer)


def _of_folder(model: GPT2, folder: Path) -> tuple[str, list[Stored]]:
    if not is_int8(model):
        kinds = _dtypes(folder)
        weights = [Stored(name, tensor, kinds.get(name, "float32")) for name, tensor in model.state_dict().items()]
        return max(weights, key=lambda each: each.values.numel()).kind, weights
    state = dequantize(copy.deepcopy(model)).state_dict()
    return "int8", [
        Stored(name, tensor, INT8_ROWS if name == "wte.weight" or is_transposed(name, tensor) else "float32")
        for name, tensor in state.items()
    ]


def _dtypes(folder: Path) -> dict[str, str]:
    """The dtype in which a folder has each weight. An adapter's folder has none: it is added to its base in float32."""
    if is_adapter_folder(folder):
        return {}
    tensors = published_names(read_tensors(folder), folder, is_untied=is_untied(folder))
    return {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}


def _oracle(found: _Subject, expected: GPT2) -> tuple[Logits, Tolerance, str]:
    """What the logits are compared with, how far they may differ, and what was done to the original model for it."""
    if found.precision in _EXACT_DTYPES:
        return expected, FLOAT32, ""
    if found.rounding is not None:
        rounded = with_rounded_inputs(expected, found.weights, found.rounding)
        change = _change(rounded, expected)
        reason = f"rounding the inputs of products changes the logits by {change:.2g}; a sum may be rounded to the next step"
        return rounded, Tolerance(change, reason), "inputs rounded"
    if found.model is not None and is_int8(found.model):
        return quantize_int8(copy.deepcopy(expected)), FLOAT32, "rounded"
    return with_rounded_weights(expected, found.weights), FLOAT32, "rounded"


def _change(rounded: GPT2, expected: GPT2) -> float:
    """The largest difference of a logit, divided by the largest logit of its batch."""
    return Check("", "", "", "", EXACT, partial(_logits, rounded, expected, expected.config)).run().relative or 0.0


def _greedy_ids(model: GPT2, prompt: list[int], n_new: int) -> list[int]:
    ids = generate(model, torch.tensor([prompt]), max_new_tokens=n_new, stop_at_eot=False)
    new: list[int] = ids[0, len(prompt) :].tolist()
    return new


def _other_sizes(found: GPT2, expected: GPT2) -> str:
    """Return what the configs say differently of the computation, or ""."""
    names = (
        "vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "inner_dim", "activation_function", "layer_norm_epsilon",
        "scale_attn_weights", "scale_attn_by_inverse_layer_idx",
    )  # fmt: skip
    pairs = {name: (getattr(found.config, name), getattr(expected.config, name)) for name in names}
    return ", ".join(f"{name} is {ours}, not {theirs}" for name, (ours, theirs) in pairs.items() if ours != theirs)


def _weights(found: _Subject, expected: GPT2, path: str, folder: str) -> Iterator[Outcome]:
    """The checks of the weights, one for each kind of numbers in the file."""
    theirs = expected.state_dict()
    lacking = sorted(theirs.keys() - {each.name for each in found.weights})
    others = [each.name for each in found.weights if each.name not in theirs or each.values.shape != theirs[each.name].shape]
    if lacking or others:
        note = f"lacks {lacking[0]}" if lacking else f"{others[0]} is not in {folder}, or has another shape there"
        yield Outcome("weights", path, folder, found.precision, Status.FAIL, note=note)
        return
    for kind in dict.fromkeys(each.kind for each in found.weights):
        stored = [each for each in found.weights if each.kind == kind]
        errors = {each.name: error_of(each, theirs[each.name]) for each in stored}
        yield _of_errors("weights", (path, folder, kind), errors, f"{kind} rounds to the nearest of its numbers")
        outside = {each.name: error for each in stored if (error := range_error_of(each, theirs[each.name]))}
        if outside:
            reason = f"{kind} cuts off at most so much of the largest weight of a group"
            yield _of_errors("ranges", (path, folder, kind), outside, reason)


def _of_errors(part: str, names: tuple[str, str, str], errors: dict[str, Error], reason: str) -> Outcome:
    wrong = [name for name, error in errors.items() if not error.is_rounding]
    status = Status.FAIL if wrong else Status.PASS
    absolute, relative, limit = (max(figures) for figures in zip(*errors.values(), strict=True))
    note = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
    return Outcome(part, *names, status, absolute, relative, Tolerance(limit, reason) if limit else EXACT, note)


def _tokens(found: Tokenizer, expected: Tokenizer) -> Iterator[Pair]:
    yield "number of tokens", [found.vocab_size], [expected.vocab_size]
    ids = sorted(found.token_bytes.keys() | expected.token_bytes.keys())
    yield "bytes of tokens", [found.token_bytes.get(i) != expected.token_bytes.get(i) for i in ids], [False] * len(ids)
    for text in filter(None, _TEXTS):
        yield repr(text), _encoded(found, text), _encoded(expected, text)


def _encoded(tokenizer: Tokenizer, text: str) -> list[int]:
    """The number of ids and the ids, or -1 if a tokenizer of characters lacks one of the text."""
    try:
        ids = tokenizer.encode(text)
    except InputError:
        return [-1]
    return [len(ids), *ids]


@torch.inference_mode()
def _logits(found: Logits, expected: Logits, config: GPT2Config) -> Iterator[Pair]:
    generator = torch.Generator().manual_seed(0)
    for rows, length in _BATCHES:
        ids = torch.randint(0, config.vocab_size, (rows, min(length, config.n_positions)), generator=generator)
        yield f"shape {tuple(ids.shape)}", found(ids), expected(ids)


@torch.inference_mode()
def _greedy(found: _Subject, expected: GPT2) -> Iterator[Pair]:
    config, generator = expected.config, torch.Generator().manual_seed(1)
    n_new = min(_N_TOKENS, config.n_positions // 2)
    prompt = torch.randint(0, config.vocab_size, (max(config.n_positions - n_new, 1),), generator=generator)[:8].tolist()
    yield f"{n_new} ids", found.greedy(prompt, n_new), _greedy_ids(expected, prompt, n_new)
