"""The names of activations: those of TransformerLens, in the order in which a forward pass computes them.

It depends on the number of layers, not on a model.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable
from fnmatch import fnmatchcase

from gpt_config.errors import InputError, InputTypeError

# A name, a pattern such as "blocks.*.attn.hook_z", several of them, or a function that chooses among all names.
Names = str | Iterable[str] | Callable[[str], bool]
Layers = int | Iterable[int] | None

_NORM = ("hook_scale", "hook_normalized")
_FIRST = ("hook_embed", "hook_pos_embed")
_OF_BLOCK = (
    "hook_resid_pre",
    *(f"ln1.{name}" for name in _NORM),
    *(f"attn.hook_{name}" for name in ("q", "k", "v", "attn_scores", "pattern", "z", "result")),
    "hook_attn_out",
    "hook_resid_mid",
    "hook_mlp_in",
    *(f"ln2.{name}" for name in _NORM),
    *(f"mlp.hook_{name}" for name in ("pre", "post")),
    "hook_mlp_out",
    "hook_resid_post",
)
_LAST = tuple(f"ln_final.{name}" for name in _NORM)


class ActivationNameError(InputError, KeyError):
    """No activation has the name, or the trace has not kept it. A mapping needs a KeyError."""

    __str__ = Exception.__str__  # KeyError shows its message in quotation marks


def activation_names(n_layer: int) -> list[str]:
    """Return the names of all activations of a model with `n_layer` layers, in the order of computation.

    >>> activation_names(2)[:3]
    ['hook_embed', 'hook_pos_embed', 'blocks.0.hook_resid_pre']
    """
    of_blocks = [block_name(layer, name) for layer in range(n_layer) for name in _OF_BLOCK]
    return [*_FIRST, *of_blocks, *_LAST]


def block_name(layer: int, name: str) -> str:
    """Return the full name of an activation of a block.

    >>> block_name(3, "attn.hook_z")
    'blocks.3.attn.hook_z'
    """
    return f"blocks.{layer}.{name}"


def layer_of(name: str) -> int | None:
    """Return the layer in a full name, or None if the activation belongs to no block."""
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "blocks" else None


def select_names(n_layer: int, names: Names = "*", layers: Layers = None) -> list[str]:
    """Return the full names that `names` selects, in the order of computation.

    - A str is a full name, or a name without its block: `hook_pattern` or `attn.hook_pattern` is that of every layer. In
      both, `*` stands for any text, such as in `blocks.3.*`.
    - `layers`, one layer or several, excludes the activations of other blocks. -1 is the last layer.

    Raises ActivationNameError, which lists similar names, if one of `names` selects nothing, and InputError for a layer that
    the model does not have.

    >>> select_names(3, "hook_z", layers=-1)
    ['blocks.2.attn.hook_z']
    """
    known = activation_names(n_layer)
    if callable(names):
        chosen: Collection[str] = {name for name in known if names(name)}
    elif isinstance(names, str):
        chosen = set(_matching(names, known))
    elif isinstance(names, Iterable):
        chosen = {found for name in names for found in _matching(name, known)}
    else:
        raise InputTypeError(f"names must be a str, several of them, or a function, not {type(names).__name__}")
    wanted = None if layers is None else select_layers(n_layer, layers)
    return [name for name in known if name in chosen and (wanted is None or layer_of(name) in (None, *wanted))]


def select_layers(n_layer: int, layers: Layers) -> list[int]:
    """Return layers from 0 to n_layer - 1; None is all, and negative numbers count from the end. InputError for others."""
    if layers is None:
        return list(range(n_layer))
    return [checked_index(layer, n_layer, "layers") for layer in ([layers] if isinstance(layers, int) else layers)]


def checked_index(index: int, size: int, what: str) -> int:
    """Return an index from 0 to `size` - 1; a negative one counts from the end. InputError if there are fewer `what`."""
    if not -size <= index < size:
        raise InputError(f"{index} is not one of the {size} {what} of this model: use 0 to {size - 1}")
    return index % size


def unknown_name(name: str, known: Collection[str], fault: str = "is not the name of an activation") -> ActivationNameError:
    """Return the error for a name that is not among `known`: it lists the most similar ones."""
    near = difflib.get_close_matches(name, known, 3, 0.3)
    if not near:
        return ActivationNameError(f"{name!r} {fault}: there is {', '.join([*known][:5])}" if known else f"{name!r} {fault}")
    return ActivationNameError(f"{name!r} {fault}: similar names are {', '.join(near)}")


def _matching(name: str, known: Collection[str]) -> list[str]:
    if not isinstance(name, str):
        raise InputTypeError(f"the name of an activation must be a str, not {type(name).__name__}")
    found = [full for full in known if fnmatchcase(full, name) or fnmatchcase(full, f"*.{name}")]
    if not found:
        short = list(dict.fromkeys(full.rpartition(".")[2] for full in known))
        raise unknown_name(name, known if "." in name else short)
    return found
