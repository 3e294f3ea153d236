"""Interventions: change activations while the model runs, in a call, in training, or while it generates.

`intervene` applies edits; the other functions return edits for it. It depends on the taps of a model, not on generation.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from gpt2.inspection.names import Names, block_name, checked_index, select_names
from gpt2.inspection.taps import Edit, Site, Use, checked, tapped
from gpt2.inspection.tracing import Trace
from gpt2.model import GPT2
from gpt_config.errors import InputError, InputTypeError

# What takes the place of an activation: a tensor, or a function of the activation, or of the activation and its Site. The
# function may also change the tensor that it gets, and return None.
Change = Tensor | float | Callable[..., Tensor | None]
Edits = Mapping[str, Change]


@contextmanager
def intervene(model: GPT2, *edits: Edits) -> Iterator[None]:
    """Change activations in each forward pass of `model` inside the `with` block, also in `generate`, `stream` and training.

    Each of `edits` maps a name (see `select_names`) to a tensor or number, which must broadcast to the activation's shape,
    or to a function: `f(value)` or `f(value, site)` returns the new value, or changes `value` in place and returns None.
    The functions of TransformerLens, `f(value, hook)`, run unchanged if they use `hook.name` only.

    Edits of one name apply in the order of `edits`, and those of an outer `with` block first. Gradients flow through them.
    While a text is generated from a cache, a call has the new token only; `site.past` says how many tokens came before. A
    generation belongs inside one block as a whole: of one that is under way when a block begins, a part may be unchanged.

    After the block, also after an error or Ctrl-C, the model is as it was before. Raises ActivationNameError for unknown
    names, and InputError, from the model's call, if a new value does not fit.

    >>> with intervene(model, {"blocks.3.attn.hook_z": lambda z: 0 * z}):  # doctest: +SKIP
    ...     logits = model(ids)
    """
    n_layer = len(checked(model).h)
    chosen: dict[str, list[Edit]] = {}
    for one in edits:
        if not isinstance(one, Mapping):
            raise InputTypeError(f"edits must be a mapping from names to tensors or functions, not {type(one).__name__}")
        for name, change in one.items():
            edit = partial(_apply, _as_function(name, change))
            for full in select_names(n_layer, name):
                chosen.setdefault(full, []).append(edit)
    with tapped(model, Use(edits=chosen)):
        yield


def _as_function(name: str, change: Change) -> Callable[[Tensor, Site], object]:
    if isinstance(change, (Tensor, int, float)):
        return lambda value, site: torch.as_tensor(change)
    if not callable(change):
        raise InputTypeError(f"the edit of {name} must be a tensor, a number or a function, not {type(change).__name__}")
    return change if _takes_site(change) else lambda value, site: change(value)


def _takes_site(function: Callable[..., Any]) -> bool:
    """Return whether the second positional parameter of a function has no default, so that it must be given."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a function of torch that is written in C++
        return False
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(one.kind in kinds and one.default is inspect.Parameter.empty for one in parameters) > 1


def _apply(function: Callable[[Tensor, Site], object], value: Tensor, site: Site) -> Tensor:
    """Return the new value in the shape, dtype and device of `value`, which the function may change in place."""
    given = value.clone()
    new = function(given, site)
    if new is None:
        return given
    if not isinstance(new, Tensor):
        raise InputTypeError(f"the edit of {site.name} returned {type(new).__name__}: it must return a tensor or None")
    try:
        return new.to(value).expand(value.shape)
    except RuntimeError:
        raise InputError(
            f"the edit of {site.name} has shape {tuple(new.shape)}, and the activation {tuple(value.shape)}: "
            "give a shape that broadcasts to it, or a function"
        ) from None


# ---- Edits: ablation ------------------------------------------------------------------------------------------------


def ablate_heads(heads: Iterable[tuple[int, int]], *, mean_of: Trace | None = None) -> dict[str, Change]:
    """Return edits that replace the result of each (layer, head) by zeros, or by its mean over the tokens of a trace.

    `mean_of` must have `hook_z` of these layers.
    """
    return _of_parts(heads, "attn.hook_z", "heads", mean_of)


def ablate_neurons(neurons: Iterable[tuple[int, int]], *, mean_of: Trace | None = None) -> dict[str, Change]:
    """Return edits that replace each (layer, neuron) of the MLPs, after the activation function, by 0 or by its mean.

    `mean_of` must have `hook_post` of these layers.
    """
    return _of_parts(neurons, "mlp.hook_post", "neurons", mean_of)


def ablate_layers(
    layers: Iterable[int], *, part: Literal["attn", "mlp", "both"] = "both", mean_of: Trace | None = None
) -> dict[str, Change]:
    """Return edits that replace what layers add to the residual stream by zeros, or by its mean over the tokens of a trace.

    `part` is the attention, the MLP, or both. `mean_of` must have `hook_attn_out` and `hook_mlp_out`, if `part` needs them.
    """
    if part not in ("attn", "mlp", "both"):
        raise InputError(f"part={part!r} must be 'attn', 'mlp' or 'both'")
    names = [f"hook_{one}_out" for one in (("attn", "mlp") if part == "both" else (part,))]
    full = [block_name(layer, name) for layer in layers for name in names]
    return {name: 0.0 if mean_of is None else token_mean(mean_of, name) for name in full}


def token_mean(trace: Trace, name: str) -> Tensor:
    """Return the mean of an activation (B, T, ...) over all tokens of a trace without padding: (...)."""
    return trace[name][trace.mask].mean(0)


def _of_parts(parts: Iterable[tuple[int, int]], name: str, what: str, mean_of: Trace | None) -> dict[str, Change]:
    of_layer: dict[int, list[int]] = {}
    for layer, index in parts:
        of_layer.setdefault(layer, []).append(index)

    def replace(indices: Sequence[int], mean: Tensor | None, value: Tensor) -> Tensor:
        places = [checked_index(index, value.shape[2], what) for index in indices]
        value[:, :, places] = 0 if mean is None else mean.to(value)[places]
        return value

    full = {layer: block_name(layer, name) for layer in of_layer}
    return {
        full[layer]: partial(replace, indices, None if mean_of is None else token_mean(mean_of, full[layer]))
        for layer, indices in of_layer.items()
    }


# ---- Edits: patching, steering, attention ----------------------------------------------------------------------------


def patch(
    source: Trace, names: Names, *, positions: Iterable[int] | None = None, heads: Iterable[int] | None = None
) -> dict[str, Change]:
    """Return edits that replace activations by those of another trace, of the same number of rows or of one.

    `positions` are the places of tokens in the sequence, None all those of `source`; -1 is the last one of `source`. Tokens
    that are generated after them are not changed. `heads` selects heads of `hook_q`, `hook_k`, `hook_v`, `hook_z`,
    `hook_result`, `hook_attn_scores` and `hook_pattern`. Scores and patterns can be patched for equal lengths only.
    """
    kept = set(select_names(source.n_layer, names))
    n_tokens = source.ids.shape[1]
    places = [checked_index(at, n_tokens, "tokens") for at in (range(n_tokens) if positions is None else positions)]
    chosen = None if heads is None else list(heads)

    def replace(value: Tensor, site: Site) -> Tensor:
        other = source[site.name].to(value).expand(len(value), *source[site.name].shape[1:])
        is_between = site.name.endswith(("hook_attn_scores", "hook_pattern"))
        if is_between:  # (B, H, T, S), others (B, T, ...)
            value, other = value.transpose(1, 2), other.transpose(1, 2)
        here = [at for at in places if site.past <= at < site.past + value.shape[1]]
        if value.shape[2:] != other.shape[2:] and here:
            raise InputError(
                f"{site.name} has shape {tuple(other.shape)} in the trace and {tuple(value.shape)} here: "
                "patch between texts of one model and, for attention, of one length"
            )
        rows = [at - site.past for at in here]
        if chosen is None:
            value[:, rows] = other[:, here]
        elif here:
            for head in (checked_index(head, value.shape[2], "heads") for head in chosen):
                value[:, rows, head] = other[:, here, head]
        return value.transpose(1, 2) if is_between else value

    found = [name for name in source if name in kept]
    if not found:
        raise source.missing(next(iter(kept), str(names)))
    return dict.fromkeys(found, replace)


def steer(name: str, vector: Tensor, *, scale: float = 1.0, positions: Iterable[int] | None = None) -> dict[str, Change]:
    """Return an edit that adds `scale` times a vector to an activation, such as "blocks.3.hook_resid_pre".

    `vector` must broadcast to the activation of a token. `positions` are the places of tokens in the sequence, from 0; None
    is every token, also of those that are generated.
    """
    places = None if positions is None else list(positions)
    if places and min(places) < 0:
        raise InputError(f"position {min(places)} is negative, and a text that grows has no last token: count from 0")

    def add(value: Tensor, site: Site) -> Tensor:
        if places is None:
            return value + scale * vector.to(value)
        rows = [at - site.past for at in places if site.past <= at < site.past + value.shape[1]]
        value[:, rows] += scale * vector.to(value)
        return value

    return {name: add}


def replace_pattern(layer: int, head: int, pattern: Tensor | Callable[[Tensor], Tensor]) -> dict[str, Change]:
    """Return an edit of the attention pattern of one head.

    `pattern` is a tensor (N, N), of which the rows and columns of the tokens at hand are used, or a function from the
    pattern (B, T, S) to another. Rows need not have the sum 1.
    """

    def replace(value: Tensor, site: Site) -> Tensor:
        place = checked_index(head, value.shape[1], "heads")
        T, S = value.shape[2:]
        if isinstance(pattern, Tensor):
            if min(pattern.shape) < S or pattern.dim() != 2:
                raise InputError(f"the pattern has shape {tuple(pattern.shape)}, and the text {S} tokens: give {S} x {S}")
            value[:, place] = pattern[site.past : site.past + T, :S].to(value)
        else:
            value[:, place] = pattern(value[:, place])
        return value

    return {block_name(layer, "attn.hook_pattern"): replace}
