"""Taps: forward hooks that show each activation of a model by name, and put back what an intervention makes of it.

It depends on the modules of `model.py`. All uses of a model at the same time share one set of hooks, so that activations are
changed in the order of computation, however the uses are nested.
B: rows, T: tokens of the call, S: cached tokens and T, C = n_embd, H = n_head, D = C / H.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gpt2.inspection.names import block_name
from gpt2.inspection.weights import matrix_of
from gpt2.kv_cache import KVStore
from gpt2.model import GPT2, Block
from gpt_config.errors import InputError, InputTypeError


class Site(NamedTuple):
    """The place of an activation in a forward pass.

    `name` is its full name, `layer` its block or None, `past` the number of tokens (and padding) that were cached before:
    the T tokens of the call have the places past to past + T - 1 in the sequence.
    """

    name: str
    layer: int | None
    past: int


# Returns the activation that the model continues with.
Edit = Callable[[Tensor, Site], Tensor]
Observer = Callable[[str, Tensor], object]


class CallObserver(NamedTuple):
    """Functions that are called with the arguments of a call of the model, and with its logits."""

    begin: Callable[[Tensor, Tensor | None], object]  # ids (B, T), attention_mask (B, S) or None
    end: Callable[[Tensor | None], object]  # logits (B, T, V), or None after an error


@dataclass(eq=False)
class Use:
    """What one caller does with the activations of a model: `edits` and `observers` by full name.

    With `has_gradients`, the model continues with the very tensors that are observed, so that gradients flow through them.
    """

    edits: Mapping[str, Sequence[Edit]] = field(default_factory=dict)
    observers: Mapping[str, Observer] = field(default_factory=dict)
    calls: CallObserver | None = None
    has_gradients: bool = False


_taps: dict[GPT2, _Tap] = {}  # of the models that are in use


@contextmanager
def tapped(model: GPT2, use: Use) -> Iterator[None]:
    """Apply `use` to each forward pass inside the `with` block. After it, also after an error, no hooks are left."""
    tap = _taps.get(model) or _Tap(checked(model))
    _taps[model] = tap
    try:
        tap.set_uses([*tap.uses, use])
        yield
    finally:
        tap.set_uses([other for other in tap.uses if other is not use])
        if not tap.uses:
            _taps.pop(model, None)


def checked(model: GPT2) -> GPT2:
    """Return the model. InputTypeError if it is none, InputError if two layers are one module."""
    if not isinstance(model, GPT2):
        raise InputTypeError(f"only a GPT2 model can be inspected, not {type(model).__name__}")
    if len(set(model.h)) < len(model.h):
        raise InputError(
            "two layers of this model are one module, so their activations have the same hooks: copy the module"
        )
    return model


class _Heads(NamedTuple):
    """What the scores of one call are computed from: queries (B, H, T, D), keys and values (B, H, S, D), and the mask."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None


class _RecordingStore:
    """Passes keys and values to another store, and keeps what it returns: those of the cached tokens too."""

    def __init__(self, store: KVStore) -> None:
        self._store = store
        self.stored: tuple[Tensor, Tensor] | None = None

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.stored = self._store.append(layer, keys, values)
        return self.stored


class _Tap:
    """The hooks of one model. Tensors that one hook needs from another are kept until the block has been computed."""

    def __init__(self, model: GPT2) -> None:
        self._model, self.uses = model, list[Use]()
        self._handles: list[RemovableHandle] = []
        self._edited: set[str] = set()
        self._seen: set[str] = set()
        self._past = 0
        self._kept: dict[str, Any] = {}

    def set_uses(self, uses: list[Use]) -> None:
        self.uses = uses
        for handle in self._handles:
            handle.remove()
        self._handles, self._kept = [], {}
        self._edited = {name for use in uses for name in (*use.edits, *(use.observers if use.has_gradients else ()))}
        self._seen = self._edited.union(*(use.observers for use in uses))
        if uses:
            self._add_hooks()

    @property
    def _blocks(self) -> list[Block]:
        return cast(list[Block], list(self._model.h))

    # ---- Hooks --------------------------------------------------------------------------------------------------------

    def _add_hooks(self) -> None:
        model = self._model
        if any(use.calls for use in self.uses) or self._sees("hook_embed", "hook_pos_embed"):
            self._handles.append(model.register_forward_pre_hook(self._begin, with_kwargs=True))
            self._handles.append(model.register_forward_hook(self._end, always_call=True))
        if self._sees("hook_embed", "hook_pos_embed"):
            self._after(model.wte, self._embedded)
        if self._sees("hook_pos_embed"):
            self._after(model.wpe, self._placed)
        blocks = self._blocks
        if blocks:
            self._handles.append(blocks[0].register_forward_pre_hook(self._find_past))
        for layer, block in enumerate(blocks):
            self._add_block_hooks(layer, block)
        self._norm_hook(model.ln_f, "ln_final", None)

    def _add_block_hooks(self, layer: int, block: Block) -> None:
        def sees(*names: str) -> bool:
            return self._sees(*(block_name(layer, name) for name in names))

        def show(name: str) -> Callable[[Tensor], Tensor]:
            return partial(self._show, block_name(layer, name), layer)

        attn, mlp = block.attn, block.mlp
        if any(name.startswith(block_name(layer, "")) for name in self._seen):
            self._before(block, partial(self._enter_block, layer))
        has_scores = sees("attn.hook_attn_scores", "attn.hook_pattern")
        if has_scores:
            self._handles.append(attn.register_forward_pre_hook(self._wrap_store))
        self._norm_hook(block.ln_1, block_name(layer, "ln1"), layer)
        if has_scores or sees("attn.hook_q", "attn.hook_k", "attn.hook_v"):
            self._after(attn.c_attn, partial(self._split, layer, has_scores))
        if has_scores or sees("attn.hook_z"):
            self._before(attn.c_proj, partial(self._mix, layer, has_scores))
        if sees("attn.hook_result"):
            self._handles.append(attn.c_proj.register_forward_hook(partial(self._project, layer)))
        if sees("hook_attn_out"):
            self._after(attn, show("hook_attn_out"))
        is_mid_edited = block_name(layer, "hook_resid_mid") in self._edited
        if sees("hook_resid_mid", "hook_mlp_in"):
            self._before(block.ln_2, partial(self._middle, layer))
        self._norm_hook(block.ln_2, block_name(layer, "ln2"), layer)
        if sees("mlp.hook_pre"):
            self._after(mlp.c_fc, show("mlp.hook_pre"))
        if sees("mlp.hook_post"):
            self._before(mlp.c_proj, show("mlp.hook_post"))
        if sees("hook_mlp_out") or is_mid_edited:
            self._after(mlp, partial(self._out_of_mlp, layer))
        if sees("hook_resid_post") or is_mid_edited:
            self._after(block, partial(self._leave_block, layer))

    def _sees(self, *names: str) -> bool:
        return not self._seen.isdisjoint(names)

    def _after(self, module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        self._handles.append(module.register_forward_hook(lambda module, args, y: change(y)))

    def _before(self, module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        self._handles.append(module.register_forward_pre_hook(lambda module, args: (change(args[0]), *args[1:])))

    def _show(self, name: str, layer: int | None, value: Tensor) -> Tensor:
        """Apply all edits of one activation, then show the result. Returns `value` itself if nothing has changed it."""
        site = Site(name, layer, self._past)
        if name in self._edited and any(use.has_gradients and name in use.observers for use in self.uses):
            # A tensor of its own: the gradient of `hook_mlp_in` is not that of `hook_resid_mid`.
            value = value.view_as(value) if value.requires_grad else value.detach().requires_grad_()
        for use in self.uses:
            for edit in use.edits.get(name, ()):
                value = edit(value, site)
        for use in self.uses:
            if name in use.observers:
                use.observers[name](name, value)
        return value

    # ---- The call, and the embeddings -----------------------------------------------------------------------------------

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._past = getattr(kwargs.get("kv_cache"), "length", 0)
        ids = args[0] if args else kwargs.get("input_ids")
        for use in self.uses:
            if use.calls and isinstance(ids, Tensor):
                use.calls.begin(ids, kwargs.get("attention_mask"))

    def _end(self, model: nn.Module, args: tuple[Any, ...], logits: Tensor | None) -> None:
        self._past, self._kept = 0, {}
        for use in self.uses:
            if use.calls:
                use.calls.end(logits)

    def _find_past(self, block: nn.Module, args: tuple[Any, ...]) -> None:
        """`generate` calls no method that has hooks before the first block. A cache has the length before this call."""
        self._past = getattr(args[2], "length", 0)

    def _embedded(self, x: Tensor) -> Tensor:
        self._kept["shape"] = x.shape
        return self._show("hook_embed", None, x)

    def _placed(self, x: Tensor) -> Tensor:
        shape = self._kept.pop("shape", x.shape)
        shown = self._show("hook_pos_embed", None, x.expand(shape))
        return shown if "hook_pos_embed" in self._edited else x

    # ---- A block --------------------------------------------------------------------------------------------------------

    def _enter_block(self, layer: int, x: Tensor) -> Tensor:
        self._kept = {}
        return self._show(block_name(layer, "hook_resid_pre"), layer, x)

    def _middle(self, layer: int, x: Tensor) -> Tensor:
        x = self._kept["middle"] = self._show(block_name(layer, "hook_resid_mid"), layer, x)
        return self._show(block_name(layer, "hook_mlp_in"), layer, x)

    def _out_of_mlp(self, layer: int, y: Tensor) -> Tensor:
        y = self._kept["mlp_out"] = self._show(block_name(layer, "hook_mlp_out"), layer, y)
        return y

    def _leave_block(self, layer: int, x: Tensor) -> Tensor:
        if block_name(layer, "hook_resid_mid") in self._edited:  # the block has added the MLP to the unchanged stream
            x = self._kept["middle"] + self._kept["mlp_out"]
        self._kept = {}
        return self._show(block_name(layer, "hook_resid_post"), layer, x)

    def _norm_hook(self, norm: nn.LayerNorm, prefix: str, layer: int | None) -> None:
        scale_name, normalized_name = f"{prefix}.hook_scale", f"{prefix}.hook_normalized"
        if not self._sees(scale_name, normalized_name):
            return
        is_edited = not self._edited.isdisjoint((scale_name, normalized_name))

        def hook(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
            wide = args[0].to(torch.promote_types(y.dtype, torch.float32))
            centred = wide - wide.mean(-1, keepdim=True)
            scale = (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()  # (B, T, 1)
            scale = self._show(scale_name, layer, scale)
            normalized = self._show(normalized_name, layer, (centred / scale).to(y.dtype))
            return normalized * norm.weight + norm.bias if is_edited else y

        self._handles.append(norm.register_forward_hook(hook))

    # ---- Attention ------------------------------------------------------------------------------------------------------

    def _wrap_store(self, attn: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, mask, store = args
        self._kept["mask"] = mask
        if store is not None:
            store = self._kept["store"] = _RecordingStore(store)
        return x, mask, store

    def _split(self, layer: int, has_scores: bool, qkv: Tensor) -> Tensor:
        attn = self._blocks[layer].attn
        names = [block_name(layer, f"attn.hook_{part}") for part in "qkv"]
        parts = [
            self._show(name, layer, part.unflatten(-1, (attn.n_head, attn.head_dim)))  # (B, T, H, D)
            for name, part in zip(names, qkv.chunk(3, -1), strict=True)
        ]
        if not self._edited.isdisjoint(names):
            qkv = torch.cat([part.flatten(2) for part in parts], -1)
        if has_scores:
            self._kept["qkv"] = [part.transpose(1, 2) for part in parts]  # (B, H, T, D) each
        return qkv

    def _mix(self, layer: int, has_scores: bool, merged: Tensor) -> Tensor:
        """The input of `c_proj`, (B, T, C): the heads' results, before they are mixed."""
        attn = self._blocks[layer].attn
        if has_scores:
            scores_name, pattern_name = (block_name(layer, f"attn.hook_{name}") for name in ("attn_scores", "pattern"))
            heads = self._heads()
            scores = self._show(scores_name, layer, _scores(heads, attn.scale))
            pattern = self._show(pattern_name, layer, scores.softmax(-1))  # (B, H, T, S)
            if not self._edited.isdisjoint((scores_name, pattern_name)):
                merged = (pattern @ heads.v).transpose(1, 2).flatten(2)  # (B, T, C)
        z_name = block_name(layer, "attn.hook_z")
        shown = self._show(z_name, layer, merged.unflatten(-1, (attn.n_head, attn.head_dim)))  # (B, T, H, D)
        return shown.flatten(2) if z_name in self._edited else merged

    def _heads(self) -> _Heads:
        q, k, v = self._kept.pop("qkv")
        store = self._kept.pop("store", None)
        if store is not None and store.stored is not None:
            k, v = store.stored
        return _Heads(q, k, v, self._kept.pop("mask"))

    def _project(self, layer: int, c_proj: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        """The output of `c_proj`, (B, T, C), from the results of all heads and the bias."""
        attn, name = self._blocks[layer].attn, block_name(layer, "attn.hook_result")
        z = args[0].unflatten(-1, (attn.n_head, attn.head_dim))  # (B, T, H, D)
        weight, bias = matrix_of(c_proj, args[0])
        results = torch.einsum("bthd,hdc->bthc", z, weight.unflatten(0, (attn.n_head, attn.head_dim)))
        results = self._show(name, layer, results)
        return results.sum(2) + bias if name in self._edited else y


def _scores(heads: _Heads, scale: float) -> Tensor:
    """Return the attention scores (B, H, T, S), -inf where a token does not attend."""
    T, S = heads.q.shape[2], heads.k.shape[2]
    scores = (heads.q * scale) @ heads.k.transpose(-2, -1)
    visible = torch.ones(T, S, dtype=torch.bool, device=scores.device).tril(S - T) if heads.mask is None else heads.mask
    return scores.masked_fill(~visible, -math.inf)
