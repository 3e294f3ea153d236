"""DecodePlan: the model with everything looked up beforehand, for generation. It computes what `model.py` says.

A decode step of the 124M model waits for memory while it reads the weights; the Python of 150 module calls, which runs
between the reads, is the largest part of the rest. Without the calls a step in float32 is about a tenth faster, and without
Python (see `scripted`) another 3%; in int8, where there is a quarter to read, 13%, and 7% more where several greedy
steps follow each other without it. It knows nothing of hooks or training: where `unchanged` finds something, the model
itself is called. In float32 its results are the model's, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from gpt2.fast.forward import (
    embedded,
    normed,
    run_blocks,
    run_model_of_each,
    scripted_greedy_tokens,
    scripted_run_model,
    scripted_run_model_of_each,
)
from gpt2.fast.int8_matrix import MatrixBlocks, MatrixLinear, MatrixRows
from gpt2.fast.limits import FAST, FastLimits
from gpt2.fast.linear import (
    fast_head,
    fast_linear,
    fast_norm_and_linear,
    has_same_rows,
    one_by_one,
    scripted_product,
    scripted_product_of_each,
)
from gpt2.fast.plan_parts import BlockParts, Ends, Norm, PlanParts
from gpt2.fast.scripted import Scripted
from gpt2.fast.threads import step
from gpt2.fast.unchanged import activation_name, computes_as_written
from gpt2.kv_cache import KVCache
from gpt2.model import GPT2, Block
from gpt2.positions import visible_slots
from gpt2.quantization.layers import Int8Embedding, Int8Linear, pack_together


class DecodePlan:
    """`hidden_states`, `logits` and greedy tokens of a GPT2. Make one for each generation: it holds the parameters as they
    are now.

    With `only_last`, of a prompt it may give the hidden state of the last token alone, (B, 1, C), where that is faster.
    Call it without gradients.
    """

    def __init__(self, model: GPT2, *, only_last: bool = False, limits: FastLimits = FAST) -> None:
        self._model, self._only_last, self._limits = model, only_last, limits
        pack_together(model)
        parts = _parts_of(model, limits)
        self._parts = parts
        self._runs = Runs(parts, limits)
        # Bytes are multiplied by bytes, which torch has kernels for on a CPU alone.
        self._is_int8 = parts.blocks[0].c_attn.packed is not None
        self._matrix_rows = MatrixRows(limits) if self._is_int8 else None
        self._has_int8_head = self._is_int8 and parts.ends.row_scales is not None
        # In int8 a few rows of logits are always computed each alone, if they can be.
        self._product = self._runs.product_of_each if self._is_int8 and self._gives_each_its_bits else self._runs.product

    @staticmethod
    def fits(model: GPT2) -> bool:
        """Whether the model is the plain one in eval mode, with nothing in it that the plan would pass over."""
        return computes_as_written(model)

    def hidden_states(self, input_ids: Tensor, *, attention_mask: Tensor | None, kv_cache: KVCache | None) -> Tensor:
        """As `GPT2.hidden_states`: (B, T, C). Ids and the mask's shape are not checked."""
        assert kv_cache is not None  # the model itself computes without one
        (B, T), past, caches = input_ids.shape, kv_cache.length, kv_cache.layers
        kv_cache.check_fit(self._model.config, B, T, self._parts.ends.wpe)
        if self._matrix_rows and self._matrix_rows.pay(B * T, is_prompt=T > 1):
            x = embedded(input_ids, attention_mask, past, self._parts.ends)
            mask = visible_slots(past, T, attention_mask, input_ids.device)
            x = normed(self._matrix_blocks.run(x, past, mask, caches), self._parts.ends.norm)
        elif _is_few(B * T, self._limits):
            x = self._runs.run_model(input_ids, attention_mask, past, caches, self._runs.parts)
        else:
            x = self._in_steps(input_ids, attention_mask, past, caches)
        kv_cache.advance(T)
        return x

    def _in_steps(self, input_ids: Tensor, attention_mask: Tensor | None, past: int, caches: list[Tensor]) -> Tensor:
        """As `run_model`, but the number of threads may change after each block: a long prompt is not one step."""
        (B, T), device, ends = input_ids.shape, input_ids.device, self._parts.ends
        mask = visible_slots(past, T, attention_mask, device)
        x = embedded(input_ids, attention_mask, past, ends)  # (B, T, C)
        for cache, block in zip(caches, self._parts.blocks, strict=True):
            with step((id(self._model), "block", (B * T).bit_length()), device, work=B * T):
                x = run_blocks(x, past, mask, [cache], [block])
        return normed(x, ends.norm)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Of rows (N, C): (N, V)."""
        if self._has_int8_head and self._matrix_rows and self._matrix_rows.pay(len(hidden_states), is_prompt=False):
            return self._matrix_head(hidden_states)
        y: Tensor = self._product(hidden_states, self._parts.ends.head)
        return y

    def greedy_tokens(self, token: int, n: int, vocab_size: int | None, kv_cache: KVCache) -> list[tuple[int, float]]:
        """`n` tokens of one unpadded row after `token`, each the most probable one and read for the next; their logits."""
        past, ends = kv_cache.length, self._parts.ends
        kv_cache.check_fit(self._model.config, 1, n, ends.wpe)
        input_ids = torch.tensor([[token]], device=ends.wpe.device)
        run = self._runs.greedy_tokens
        tokens, logits = run(input_ids, n, vocab_size, past, kv_cache.layers, self._runs.parts)
        kv_cache.advance(n)
        return list(zip(tokens.tolist(), logits.tolist(), strict=True))

    @cached_property
    def for_drafts(self) -> DecodePlan | PlanOfEach | None:
        """What verifies drafts: this plan, where several tokens have the digits that matter of a step of each; a plan that
        gives them all bits of it; None where neither is possible."""
        if self._gives_each_its_bits:
            return PlanOfEach(self, self._model, self._parts, self._limits)
        return None if self._is_int8 else self

    @cached_property
    def _gives_each_its_bits(self) -> bool:
        if self._is_int8:
            layers = [module for module in self._model.modules() if isinstance(module, Int8Linear)]
            return all(layer.units_and_sums() is not None for layer in layers)
        return is_coarse(self._model.wpe.weight)  # in float32 it is not needed

    @cached_property
    def _matrix_blocks(self) -> MatrixBlocks:
        return MatrixBlocks(self._model, self._limits, only_last=self._only_last)

    @cached_property
    def _matrix_head(self) -> MatrixLinear:
        return MatrixLinear(self._model.wte)


class PlanOfEach:
    """A plan for drafts, in int8 and 16 bits: each token has the bits that it would have in a step of its own by `plan`.

    It takes longer, but weights are read once for all tokens. `DecodePlan.for_drafts` makes it.
    """

    def __init__(self, plan: DecodePlan, model: GPT2, parts: PlanParts, limits: FastLimits) -> None:
        self._plan, self._config, self._limits = plan, model.config, limits
        self._parts = _of_rows_that_add_up_alike(model, parts)
        self._runs = Runs(self._parts, limits)

    def hidden_states(self, input_ids: Tensor, *, attention_mask: Tensor | None, kv_cache: KVCache | None) -> Tensor:
        """As `DecodePlan.hidden_states`: (B, T, C)."""
        assert kv_cache is not None
        B, T = input_ids.shape
        if T == 1:
            return self._plan.hidden_states(input_ids, attention_mask=attention_mask, kv_cache=kv_cache)
        past, caches = kv_cache.length, kv_cache.layers
        kv_cache.check_fit(self._config, B, T, self._parts.ends.wpe)
        if _is_few(B * T, self._limits):
            x = self._runs.run_model_of_each(input_ids, attention_mask, past, caches, self._runs.parts)
        else:
            x = run_model_of_each(input_ids, attention_mask, past, caches, self._parts)
        kv_cache.advance(T)
        hidden: Tensor = x
        return hidden

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Of rows (N, C): (N, V)."""
        y: Tensor = self._runs.product_of_each(hidden_states, self._parts.ends.head)
        return y


class Runs:
    """The functions of a plan, as TorchScript runs them or, where the limits say so, as Python does; `parts` for them."""

    def __init__(self, parts: PlanParts, limits: FastLimits) -> None:
        def chosen(scripted: Scripted) -> Callable[..., Any]:
            return scripted if limits.use_torchscript else scripted.function

        self.run_model, self.run_model_of_each = chosen(scripted_run_model), chosen(scripted_run_model_of_each)
        self.greedy_tokens = chosen(scripted_greedy_tokens)
        self.product, self.product_of_each = chosen(scripted_product), chosen(scripted_product_of_each)
        # A list is converted once here, not at every call.
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
    assert activation is not None  # or it does not fit
    return BlockParts(norm_1, c_attn, float(block.attn.scale), attn_proj, norm_2, c_fc, activation, mlp_proj)


def _of_rows_that_add_up_alike(model: GPT2, parts: PlanParts) -> PlanParts:
    """Layers that oneDNN packed are multiplied one row after the other, unless several rows have the same bits."""
    first, block = parts.blocks[0], cast(Block, model.h[0])
    asked = (
        (model.wte, parts.ends.head),
        *((block.attn.c_attn, first.c_attn), (block.attn.c_proj, first.attn_proj)),
        *((block.mlp.c_fc, first.c_fc), (block.mlp.c_proj, first.mlp_proj)),
    )
    if all(linear.kind != "bfloat16" or has_same_rows(layer, linear) for layer, linear in asked):
        return parts
    blocks = [
        block._replace(
            c_attn=one_by_one(block.c_attn),
            attn_proj=one_by_one(block.attn_proj),
            c_fc=one_by_one(block.c_fc),
            mlp_proj=one_by_one(block.mlp_proj),
        )
        for block in parts.blocks
    ]
    return PlanParts(blocks, parts.ends._replace(head=one_by_one(parts.ends.head)))


def _is_few(n_rows: int, limits: FastLimits) -> bool:
    """Whether Python's share of the time matters for this many rows."""
    return n_rows < limits.rows_for_python


def is_coarse(weight: Tensor) -> bool:
    """Whether a model with such weights computes in 16 bits. Two tokens then often tie up to the last digits, and up to 25%
    of texts change if these depend on the rows computed beside them. Not measured on a GPU."""
    return weight.device.type == "cpu" and weight.dtype in (torch.float16, torch.bfloat16)
