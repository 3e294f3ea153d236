"""PackedRows: weights in oneDNN's layout, for steps of several rows: a batch, a server, drafts.

`model.py` keeps weights (n_in, n_out). One row reads them at the speed of memory, but MKL's product of 2 to 64 rows in
float32 takes 2 to 6 times as long. oneDNN's product with packed weights takes half to three quarters of MKL's time: on two
cores with AVX-512, the products of a step of 124M take 53 instead of 92 ms for 8 rows, and 100 instead of 144 ms for 32. For
512 rows there is no difference. In bfloat16 oneDNN multiplies plain weights too, with the same bits: 8 rows take 24 ms, and
12 ms with packed weights, 32 rows 36 and 25 ms.

Packing 124M takes a second, and a second copy of the weights in memory. So it waits until it pays, and until there is room.
"""

from __future__ import annotations

import platform
from typing import cast

from gpt2.device import free_memory
from gpt2.fast.limits import FastLimits
from gpt2.fast.linear import PLAIN_FOR_ROWS, can_pack_for_rows, is_kept_packed, packed_for_rows
from gpt2.fast.plan_parts import PlanParts
from gpt2.model import GPT2, Block


class PackedRows:
    """The weights of a plan for steps of several rows, packed after `limits.steps_before_packing` of these."""

    def __init__(self, model: GPT2, parts: PlanParts, limits: FastLimits) -> None:
        self._model, self._parts, self._limits = model, parts, limits
        self._n_steps = 0

    def is_due(self, n_rows: int) -> bool:
        """Count a step of `n_rows` rows, and return whether the weights should be packed for it."""
        if n_rows == 1:
            return False
        self._n_steps += 1
        is_packed = is_kept_packed(self._model.wte)  # by an earlier plan: to check that it has not changed takes half a step
        return self._n_steps > (1 if is_packed else self._limits.steps_before_packing)

    def pack(self) -> PlanParts | None:
        """Return packed parts; None if they cannot be packed, or if the memory for them is not free."""
        model, parts = self._model, self._parts
        n_bytes, free = sum(weight.nbytes for weight in model.parameters()), free_memory()
        can_pack = platform.machine() in ("x86_64", "AMD64") and all(map(can_pack_for_rows, model.parameters()))
        if not can_pack or not {parts.ends.head.kind, parts.blocks[0].c_attn.kind} <= PLAIN_FOR_ROWS:
            return None
        if free is not None and free < 2 * n_bytes:
            return None
        blocks = [
            of_block._replace(
                c_attn=packed_for_rows(block.attn.c_attn, of_block.c_attn),
                attn_proj=packed_for_rows(block.attn.c_proj, of_block.attn_proj),
                c_fc=packed_for_rows(block.mlp.c_fc, of_block.c_fc),
                mlp_proj=packed_for_rows(block.mlp.c_proj, of_block.mlp_proj),
            )
            for block, of_block in zip(cast(list[Block], model.h), parts.blocks, strict=True)
        ]
        return PlanParts(blocks, parts.ends._replace(head=packed_for_rows(model.wte, parts.ends.head)))
