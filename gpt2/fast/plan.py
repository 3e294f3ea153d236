"""DecodePlan: the model for generation, with all attributes looked up in advance. It computes the same as `model.py`.

A decode step of the 124M model is limited by memory bandwidth while it reads the weights. The largest part of the remaining
time is the Python code of 150 module calls. In float32, a step is about 10% faster without these calls, and another 3%
without Python (see `scripted`). In int8, which reads a quarter of the bytes, it is 13% faster, and another 7% if several
greedy steps follow each other without Python. The plan does not support hooks or training: if `unchanged` finds a
difference, the model itself is called. In float32, its results are equal to the model's, bit for bit, except where MKL is
avoided: see `linear.avoids_mkl`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from gpt2.device import has_matrix_units
from gpt2.fast.forward import (
    embedded,
    embedded_in_slots,
    normed,
    run_blocks,
    run_blocks_in_slots,
    run_model_of_each,
    scripted_greedy_tokens,
    scripted_run_model,
    scripted_run_model_of_each,
    scripted_run_slots,
)
from gpt2.fast.int8_matrix import MatrixBlocks, MatrixLinear, MatrixRows
from gpt2.fast.limits import FAST, FastLimits
from gpt2.fast.linear import (
    fast_head,
    fast_linear,
    fast_norm_and_linear,
    has_same_rows,
    of_each,
    one_by_one,
    pack_float16_together,
    scripted_product,
    scripted_product_of_each,
)
from gpt2.fast.packed_rows import PackedRows
from gpt2.fast.plan_parts import BlockParts, Ends, FastLinear, Norm, PlanParts
from gpt2.fast.scripted import Scripted
from gpt2.fast.threads import step
from gpt2.fast.unchanged import activation_name, computes_as_written
from gpt2.kv_cache import KVCache
from gpt2.model import GPT2, Block
from gpt2.positions import visible_slots
from gpt2.quantization.layers import Int8Embedding, Int8Linear, pack_together
from gpt_config.errors import InputError


class DecodePlan:
    """Computes `hidden_states`, `logits` and greedy tokens of a GPT2.

    Make one for each generation, because it uses the parameters that the model has now. With `only_last`, it may return only
    the hidden state of a prompt's last token, (B, 1, C), if that is faster. Call it without gradients.
    """

    def __init__(self, model: GPT2, *, only_last: bool = False, limits: FastLimits = FAST) -> None:
        self._model, self._only_last, self._limits = model, only_last, limits
        self._dtype = model.dtype
        pack_together(model)
        pack_float16_together(model, limits)
        parts = _parts_of(model, limits)
        self._parts = parts
        self._runs = Runs(parts, limits)
        self._packed_rows: PackedRows | None = PackedRows(model, parts, limits)  # None: they are packed, or cannot be
        self._packed: PlanParts | None = None
        self._packed_runs: Runs | None = None
        # torch has kernels for int8 times int8 on a CPU only.
        self._is_int8 = parts.blocks[0].c_attn.kind in ("int8", "lifted int8")
        self._matrix_rows = MatrixRows(limits) if self._is_int8 else None
        self._has_int8_head = self._is_int8 and parts.ends.row_scales is not None
        # In int8, few rows of logits are always computed with the bits of single rows, if possible.
        self._product = self._runs.product_of_each if self._is_int8 and self._gives_each_its_bits else self._runs.product

    @staticmethod
    def fits(model: GPT2) -> bool:
        """Return whether the model is unchanged and in eval mode, so that the plan computes the same."""
        return computes_as_written(model)

    def hidden_states(self, input_ids: Tensor, *, attention_mask: Tensor | None, kv_cache: KVCache | None) -> Tensor:
        """Return the hidden states (B, T, C), like `GPT2.hidden_states`. Ids and the shape of the mask are not checked."""
        assert kv_cache is not None  # the model itself computes without one
        (B, T), past, caches = input_ids.shape, kv_cache.length, kv_cache.layers
        self.check_fit(kv_cache, B, T)
        if self._matrix_rows and self._matrix_rows.pay(B * T, is_prompt=T > 1):
            x = embedded(input_ids, attention_mask, past, self._parts.ends)
            mask = visible_slots(past, T, attention_mask, input_ids.device)
            x = normed(self._matrix_blocks.run(x, past, mask, caches), self._parts.ends.norm)
        elif _is_few(B * T, self._limits):
            x = self._runs.run_model(input_ids, attention_mask, past, caches, self._parts_for(B * T))
        else:
            x = self._in_steps(input_ids, attention_mask, past, caches)
        kv_cache.advance(T)
        return x

    def check_fit(self, kv_cache: KVCache, rows: int, n_tokens: int) -> None:
        """Raise InputError unless the tokens fit into the cache, or if the model was converted to another dtype."""
        wpe = self._parts.ends.wpe
        kv_cache.check_fit(self._model.config, rows, n_tokens, wpe, dtype=torch.float32 if is_coarse(wpe) else None)
        if wpe.dtype != self._dtype:
            raise InputError(f"the model was converted from {self._dtype} to {wpe.dtype} while it generated: generate again")

    def _in_steps(self, input_ids: Tensor, attention_mask: Tensor | None, past: int, caches: list[Tensor]) -> Tensor:
        """As `run_model`, with `_blocks_in_turn`."""
        (B, T), ends = input_ids.shape, self._parts.ends
        mask = visible_slots(past, T, attention_mask, input_ids.device)
        x = embedded(input_ids, attention_mask, past, ends)  # (B, T, C)
        # In float32 the results have the model's bits, so all tokens are computed.
        last = len(caches) - 1 if self._only_last and is_coarse(ends.wpe) else None
        x = self._blocks_in_turn(
            x, B * T, lambda x, i, block: run_blocks(x, past, mask, caches[i : i + 1], [block], only_last=i == last)
        )
        return normed(x, ends.norm)

    def _blocks_in_turn(self, x: Tensor, n_rows: int, run: Callable[[Tensor, int, BlockParts], Tensor]) -> Tensor:
        """Run each block. The number of threads may change after each, because a long prompt is not one step."""
        parts = self._parts if self._packed is None or self._limits.packed_rows < n_rows else self._packed
        for i, block in enumerate(parts.blocks):
            with step((id(self._model), "block", n_rows.bit_length()), x.device, work=n_rows):
                x = run(x, i, block)
        return x

    def hidden_states_of_slots(
        self,
        texts: Sequence[Sequence[int]],
        lengths: Sequence[int],
        slots: Sequence[int],
        layers: list[Tensor],
        own_cache: Sequence[Tensor] = (),
    ) -> Tensor:
        """Return the hidden states (B, C) after the next tokens of each of B texts: see `forward.run_blocks_in_slots`.

        `layers` and `own_cache` are caches, one tensor for each layer.
        """
        device, counts = self._parts.ends.wpe.device, [len(text) for text in texts]
        tokens = torch.tensor([token for text in texts for token in text], device=device)
        places = [range(length, length + count) for length, count in zip(lengths, counts, strict=True)]
        positions = torch.tensor([position for place in places for position in place], device=device)
        rows = counts, list(lengths), list(slots)
        if _is_few(len(tokens), self._limits):
            x: Tensor = self._runs.run_slots(tokens, positions, *rows, layers, list(own_cache), self._parts_for(len(tokens)))
        else:
            x = embedded_in_slots(tokens, positions, self._parts.ends)  # (N, C)
            own = list(own_cache)
            x = self._blocks_in_turn(
                x, len(tokens), lambda x, i, block: run_blocks_in_slots(x, *rows, layers[i : i + 1], own[i : i + 1], [block])
            )
            x = normed(x, self._parts.ends.norm)
        return x if len(tokens) == len(texts) else x[torch.tensor(counts, device=device).cumsum(0) - 1]

    def pack_for_rows(self) -> None:
        """Pack the weights for steps of several rows now, if they can be packed: see `packed_rows`. Later plans use them."""
        if self._packed_rows is not None:
            self._packed = self._packed_rows.pack()
            self._packed_runs = None if self._packed is None else Runs(self._packed, self._limits)
            self._packed_rows = None

    def _parts_for(self, n_rows: int) -> PlanParts:
        """Return the weights in the layout that is the fastest for this many rows: see `packed_rows`."""
        if self._packed_rows is not None and self._packed_rows.is_due(n_rows):
            self.pack_for_rows()
        return self._runs.parts if n_rows == 1 or self._packed_runs is None else self._packed_runs.parts

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Return the logits (N, V) of rows (N, C)."""
        if self._has_int8_head and self._matrix_rows and self._matrix_rows.pay(len(hidden_states), is_prompt=False):
            return self._matrix_head(hidden_states)
        parts = self._parts if len(hidden_states) == 1 or self._packed is None else self._packed
        y: Tensor = self._product(hidden_states, parts.ends.head)
        return y

    def greedy_tokens(self, token: int, n: int, vocab_size: int | None, kv_cache: KVCache) -> list[tuple[int, float]]:
        """Decode `n` greedy tokens of one unpadded row after `token`. Returns (token, logit) of each."""
        past, ends = kv_cache.length, self._parts.ends
        self.check_fit(kv_cache, 1, n)
        input_ids = torch.tensor([[token]], device=ends.wpe.device)
        run = self._runs.greedy_tokens
        tokens, logits = run(input_ids, n, vocab_size, past, kv_cache.layers, self._runs.parts)
        kv_cache.advance(n)
        return list(zip(tokens.tolist(), logits.tolist(), strict=True))

    @cached_property
    def for_drafts(self) -> DecodePlan | PlanOfEach | None:
        """The plan that verifies drafts, or None if it could change tokens.

        In float32 this is the plan itself, because its rounding rarely matters. In 16 bits and int8 it is a `PlanOfEach`, if
        one is possible.
        """
        if self._gives_each_its_bits:
            return PlanOfEach(self, self._model, self._parts, self._limits)
        return None if self._is_int8 else self

    @cached_property
    def _gives_each_its_bits(self) -> bool:
        if self._is_int8:
            layers = [module for module in self._model.modules() if isinstance(module, Int8Linear)]
            return all(layer.units_and_sums() is not None for layer in layers)
        return is_coarse(self._model.wpe.weight)  # not needed in float32

    @cached_property
    def _matrix_blocks(self) -> MatrixBlocks:
        return MatrixBlocks(self._model, self._limits, only_last=self._only_last)

    @cached_property
    def _matrix_head(self) -> MatrixLinear:
        return MatrixLinear(self._model.wte)


class PlanOfEach:
    """A plan for drafts in int8 and 16 bits: each token has the same bits as in a step of `plan` with this token only.

    It is slower than `plan`, but still reads the weights once for all tokens. `DecodePlan.for_drafts` makes it.
    """

    def __init__(self, plan: DecodePlan, model: GPT2, parts: PlanParts, limits: FastLimits) -> None:
        self._plan, self._config, self._limits = plan, model.config, limits
        self._parts = _of_rows_that_add_up_alike(model, parts)
        self._runs = Runs(self._parts, limits)

    def hidden_states(self, input_ids: Tensor, *, attention_mask: Tensor | None, kv_cache: KVCache | None) -> Tensor:
        """Return the hidden states (B, T, C), like `DecodePlan.hidden_states`."""
        assert kv_cache is not None
        B, T = input_ids.shape
        if T == 1:
            return self._plan.hidden_states(input_ids, attention_mask=attention_mask, kv_cache=kv_cache)
        past, caches = kv_cache.length, kv_cache.layers
        self._plan.check_fit(kv_cache, B, T)
        if _is_few(B * T, self._limits):
            x = self._runs.run_model_of_each(input_ids, attention_mask, past, caches, self._runs.parts)
        else:
            x = run_model_of_each(input_ids, attention_mask, past, caches, self._parts)
        kv_cache.advance(T)
        hidden: Tensor = x
        return hidden

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Return the logits (N, V) of rows (N, C)."""
        y: Tensor = self._runs.product_of_each(hidden_states, self._parts.ends.head)
        return y


class Runs:
    """The functions of a plan, run by TorchScript or, if the limits say so, by Python, and `parts` as their argument."""

    def __init__(self, parts: PlanParts, limits: FastLimits) -> None:
        def chosen(scripted: Scripted) -> Callable[..., Any]:
            return scripted if limits.use_torchscript else scripted.function

        self.run_model, self.run_model_of_each = chosen(scripted_run_model), chosen(scripted_run_model_of_each)
        self.greedy_tokens, self.run_slots = chosen(scripted_greedy_tokens), chosen(scripted_run_slots)
        self.product, self.product_of_each = chosen(scripted_product), chosen(scripted_product_of_each)
        # Convert the list once here, and not at every call.
        blocks = scripted_run_model.list_of(parts.blocks) if limits.use_torchscript else parts.blocks
        self.parts = parts._replace(blocks=blocks)


def _parts_of(model: GPT2, limits: FastLimits) -> PlanParts:
    wte, ln_f = model.wte, model.ln_f
    table, row_scales = (wte.weight_int8, wte.scale[:, None]) if isinstance(wte, Int8Embedding) else (wte.weight, None)
    norm = Norm(ln_f.weight, ln_f.bias, float(ln_f.eps))
    ends = Ends(table, row_scales, model.wpe.weight, norm, fast_head(wte, limits))
    return PlanParts([_parts_of_block(block, limits) for block in cast(list[Block], model.h)], ends)


def _parts_of_block(block: Block, limits: FastLimits) -> BlockParts:
    norm_1, c_attn = fast_norm_and_linear(block.ln_1, block.attn.c_attn, limits)
    norm_2, c_fc = fast_norm_and_linear(block.ln_2, block.mlp.c_fc, limits)
    attn_proj, mlp_proj = fast_linear(block.attn.c_proj, limits), fast_linear(block.mlp.c_proj, limits)
    activation = activation_name(block.mlp.activation)
    assert activation is not None  # `fits` has checked it
    return BlockParts(norm_1, c_attn, float(block.attn.scale), attn_proj, norm_2, c_fc, activation, mlp_proj)


def _of_rows_that_add_up_alike(model: GPT2, parts: PlanParts) -> PlanParts:
    """Return `parts`, in which layers packed in 16 bits multiply one row after another if several rows would change bits."""
    parts = _with_linears(parts, of_each)
    first, block = parts.blocks[0], cast(Block, model.h[0])
    asked = (
        (model.wte, parts.ends.head),
        *((block.attn.c_attn, first.c_attn), (block.attn.c_proj, first.attn_proj)),
        *((block.mlp.c_fc, first.c_fc), (block.mlp.c_proj, first.mlp_proj)),
    )
    if all(linear.kind not in ("bfloat16", "float16") or has_same_rows(layer, linear) for layer, linear in asked):
        return parts
    return _with_linears(parts, one_by_one)


def _with_linears(parts: PlanParts, change: Callable[[FastLinear], FastLinear]) -> PlanParts:
    """Return `parts` with each linear layer changed."""
    blocks = [
        block._replace(
            c_attn=change(block.c_attn),
            attn_proj=change(block.attn_proj),
            c_fc=change(block.c_fc),
            mlp_proj=change(block.mlp_proj),
        )
        for block in parts.blocks
    ]
    return PlanParts(blocks, parts.ends._replace(head=change(parts.ends.head)))


def _is_few(n_rows: int, limits: FastLimits) -> bool:
    """Return whether Python's share of the time matters for this many rows."""
    return n_rows < limits.rows_for_python


def cache_dtype(model: GPT2) -> torch.dtype:
    """Return the dtype of keys and values that is the fastest for a `DecodePlan`.

    In 16 bits on a CPU it is float32, which has the same numbers and takes twice the memory: without matrix units, torch's
    attention of one token takes 2 to 6 times as long in bfloat16, and 3 to 11 times in float16, where that of a prompt takes
    twice as long. With AMX it takes half as long in bfloat16 as in float32.
    """
    if not (is_coarse(model.wpe.weight) and DecodePlan.fits(model)):
        return model.dtype
    return torch.bfloat16 if model.dtype == torch.bfloat16 and has_matrix_units() else torch.float32


def is_coarse(weight: Tensor) -> bool:
    """Return whether a model with such weights computes in 16 bits on a CPU.

    Two logits are then often equal except for rounding. Up to 25% of texts change if rounding depends on the other rows of a
    product. Not measured on a GPU.
    """
    return weight.device.type == "cpu" and weight.dtype in (torch.float16, torch.bfloat16)
