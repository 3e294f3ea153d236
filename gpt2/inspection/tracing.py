"""Traces: the activations of a forward pass by TransformerLens' names, and the logits.

It depends on the taps of a model, and on a tokenizer if it is given text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2.inspection.names import (
    ActivationNameError,
    Layers,
    Names,
    activation_names,
    block_name,
    select_names,
    unknown_name,
)
from gpt2.inspection.taps import CallObserver, Use, checked, tapped
from gpt2.model import GPT2
from gpt_config.errors import InputError, InputTypeError
from gpt_encoder.interface import Tokenizer
from gpt_encoder.tokenizer import has_tokenizer, load_tokenizer

# Activations (B, n_head, T, S), and their values for later tokens.
_BETWEEN_TOKENS = {"hook_attn_scores": -math.inf, "hook_pattern": 0.0}

# One text or several, a row of ids or several, or a tensor (B, T) or (T,).
Inputs = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Tensor


@dataclass(frozen=True, eq=False)
class Trace(Mapping[str, Tensor]):
    """The activations of a forward pass: a mapping from full names to tensors.

    `ids` (B, T), `attention_mask` (B, T) or None, and `logits` (B, T, V) are those of the call. Activations are (B, T, ...),
    scores and patterns (B, n_head, T, S). At padding, activations are undefined.

    `trace["blocks.3.attn.hook_z"]` and `trace["attn.hook_z", 3]` are the same; the part before `hook_` can be omitted.
    """

    n_layer: int
    ids: Tensor
    attention_mask: Tensor | None
    logits: Tensor
    activations: dict[str, Tensor] = field(repr=False)

    __eq__, __hash__ = object.__eq__, object.__hash__  # comparing tensors gives no bool

    def __getitem__(self, key: str | tuple[str, int]) -> Tensor:
        name = self._full_name(key) if isinstance(key, tuple) else key
        found = self.activations.get(name)
        if found is None:
            raise self.missing(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.activations)

    def __len__(self) -> int:
        return len(self.activations)

    @property
    def mask(self) -> Tensor:
        """Which of `ids` are tokens: bool (B, T), False at padding."""
        if self.attention_mask is None:
            return torch.ones(self.ids.shape, dtype=torch.bool, device=self.ids.device)
        return self.attention_mask[:, -self.ids.shape[1] :].bool()

    def stack(self, name: str) -> Tensor:
        """Return an activation of all layers, (n_layer, ...), such as `trace.stack("hook_pattern")`."""
        return torch.stack([self[name, layer] for layer in range(self.n_layer)])

    def gradients(self, value: Tensor) -> dict[str, Tensor]:
        """Return the gradient of a number, computed from `logits` or activations, for each kept activation.

        The trace must have been made with `with_gradients=True`. Activations that `value` does not depend on have zeros.
        """
        kept = {name: value for name, value in self.activations.items() if value.requires_grad}
        if not kept:
            raise InputError("this trace has no gradients: make it with with_gradients=True")
        found = torch.autograd.grad(value, list(kept.values()), retain_graph=True, allow_unused=True, materialize_grads=True)
        return dict(zip(kept, found, strict=True))

    def _full_name(self, key: tuple[str, int]) -> str:
        (name,) = select_names(self.n_layer, *key) or [block_name(key[1], key[0])]
        return name

    def missing(self, name: str) -> ActivationNameError:
        """Return the error for a name that this trace does not have."""
        if name in activation_names(self.n_layer):
            return ActivationNameError(f"{name!r} is not in this trace: add it to the names that are traced")
        return unknown_name(name, activation_names(self.n_layer))


def trace(
    model: GPT2,
    ids_or_text: Inputs,
    names: Names = "*",
    layers: Layers = None,
    *,
    attention_mask: Tensor | None = None,
    tokenizer: Tokenizer | None = None,
    with_gradients: bool = False,
) -> Trace:
    """Run the model on ids or text, in eval mode, and return the logits and the activations that `names` selects.

    - `ids_or_text`: a tensor (B, T) or (T,), a row of ids or several, a text or several. Shorter rows are padded on the
      right. Texts are encoded with `tokenizer`, or with that of the folder that the model was loaded from.
    - `names`: a name, a pattern, several, or a function from a name to bool: see `select_names`. "*" keeps everything;
      `hook_result` takes n_head times the memory of the residual stream.
    - `layers`: of blocks, only these.
    - `attention_mask` (B, T) is 1 for a token and 0 for padding, as in the model's call.
    - `with_gradients`: keep the graph, so that gradients flow to the activations (`Trace.gradients`) and the parameters.

    Inside `intervene`, the activations are those after the interventions. Raises ActivationNameError for unknown names, and
    the errors of the model.

    >>> trace(model, "The cat", "hook_pattern", layers=[0, -1])["blocks.0.attn.hook_pattern"].shape  # doctest: +SKIP
    torch.Size([1, 4, 2, 2])
    """
    ids, mask = as_batch(checked(model), ids_or_text, tokenizer)
    if attention_mask is None:
        attention_mask = mask
    was_training = model.training
    model.eval()
    try:
        with (
            torch.enable_grad() if with_gradients else torch.no_grad(),
            record(model, names, layers, with_gradients=with_gradients) as traces,
        ):
            model(ids, attention_mask=attention_mask)
    finally:
        model.train(was_training)
    return traces[0]


@contextmanager
def record(model: GPT2, names: Names = "*", layers: Layers = None, *, with_gradients: bool = False) -> Iterator[list[Trace]]:
    """Append a Trace to the yielded list for each call of the model inside the `with` block, as in `generate` or training.

    While a text is generated, the first call has the prompt and the others one token each: `join` makes one Trace of them.

    >>> with record(model, "hook_resid_post") as traces:  # doctest: +SKIP
    ...     model.generate(ids, max_new_tokens=5)
    >>> join(traces)["blocks.0.hook_resid_post"].shape  # doctest: +SKIP
    """
    traces: list[Trace] = []
    n_layer = len(checked(model).h)
    chosen = select_names(n_layer, names, layers)
    call: dict[str, Any] = {}

    def begin(ids: Tensor, mask: Tensor | None) -> None:
        call.clear()
        call.update(ids=ids.clone(), attention_mask=None if mask is None else mask.clone(), activations={})

    def keep(name: str, value: Tensor) -> None:
        if "activations" in call:
            # q as a part of q, k and v would keep the memory of all.
            is_part = not with_gradients and value.untyped_storage().nbytes() > value.numel() * value.element_size()
            call["activations"][name] = value.clone() if is_part else value

    def end(logits: Tensor | None) -> None:
        if logits is not None and call:
            traces.append(Trace(n_layer=n_layer, logits=logits, **call))
        call.clear()

    use = Use(observers=dict.fromkeys(chosen, keep), calls=CallObserver(begin, end), has_gradients=with_gradients)
    with tapped(model, use):
        yield traces


def join(traces: Sequence[Trace]) -> Trace:
    """Return one Trace of the calls that generated a text, as if all tokens had been computed in one call.

    Raises InputError for calls of other texts: another number of rows, or tokens that do not continue those before.
    """
    if not traces:
        raise InputError("there is nothing to join: no call of the model was recorded")
    rows = {len(one.ids) for one in traces}
    if len(rows) > 1:
        raise InputError(f"the calls have {min(rows)} to {max(rows)} rows: join the calls of one batch")
    first, last = traces[0], traces[-1]
    total = sum(one.ids.shape[1] for one in traces)
    activations = {}
    for name in first:
        parts, fill = [one[name] for one in traces], _BETWEEN_TOKENS.get(name.rpartition(".")[2])
        if fill is None:
            activations[name] = torch.cat(parts, 1)
            continue
        if parts[-1].shape[-1] != total:
            raise InputError("the calls do not continue each other: join the calls of one text within the context")
        wide = [F.pad(part, (0, total - part.shape[-1]), value=fill) for part in parts]  # (B, H, t, T)
        activations[name] = torch.cat(wide, 2)
    ids = torch.cat([one.ids for one in traces], 1)
    return Trace(first.n_layer, ids, last.attention_mask, torch.cat([one.logits for one in traces], 1), activations)


def as_batch(model: GPT2, ids_or_text: Inputs, tokenizer: Tokenizer | None = None) -> tuple[Tensor, Tensor | None]:
    """Return ids (B, T) on the model's device, and the mask (B, T) if rows were padded. `ids_or_text` is that of `trace`."""
    if isinstance(ids_or_text, Tensor):
        ids = ids_or_text[None] if ids_or_text.dim() == 1 else ids_or_text
        return ids.to(model.device), None
    if not isinstance(ids_or_text, (str, Sequence)) or not len(ids_or_text):
        raise InputTypeError(f"give a text, ids, or several of them, not {ids_or_text!r:.40}")
    rows = rows_of(model, ids_or_text, tokenizer)
    width = max(map(len, rows))
    if not min(map(len, rows)):
        raise InputError("a row has no tokens: give at least one")
    try:
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=model.device)
    except (TypeError, ValueError, RuntimeError):
        raise InputTypeError(f"give a text, ids, or several of them: {ids_or_text!r:.40} has other things") from None
    lengths = torch.tensor([len(row) for row in rows], device=model.device)
    mask = (torch.arange(width, device=model.device) < lengths[:, None]).long()  # (B, T)
    return ids, None if bool(mask.all()) else mask


def check_tokens(ids: Tensor, vocab_size: int) -> None:
    """Raise InputError if one of `ids` is outside a vocabulary of `vocab_size` ids."""
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if wrong.numel():
        raise InputError.of_token(int(wrong[0]), vocab_size)


def rows_of(model: GPT2, given: Any, tokenizer: Tokenizer | None = None) -> list[list[int]]:
    """Return the ids of a text or several, or of ids as lists. Texts need a tokenizer, as in `trace`."""
    if isinstance(given, str):
        return [(tokenizer or tokenizer_for(model)).encode(given)]
    if not given or isinstance(given[0], int):
        return [list(given)]
    if isinstance(given[0], str):
        tokenizer = tokenizer or tokenizer_for(model)
        return [tokenizer.encode(text) for text in given]
    return [list(row) for row in given]


def tokenizer_for(model: GPT2) -> Tokenizer:
    """Return the tokenizer in the folder that the model was loaded from. InputError if there is none."""
    folder = getattr(model, "pretrained_from", None)
    if folder is None or not has_tokenizer(folder):
        raise InputError("this model has no folder with a tokenizer: give tokenizer=, or ids in place of text")
    return load_tokenizer(folder)
