"""DecodePlan: one decode step with everything looked up beforehand. It computes what `model.py` says, bit for bit.

A decode step of the 124M model waits for memory while it reads the weights; the Python of 150 module calls, which runs
between the reads, is the largest part of the rest. Without it a step on two cores is about a tenth faster. This file
knows the operations of a block in their order, and nothing of padding, hooks or training, where the model itself is called.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2.kv_cache import KVCache
from gpt2.model import GPT2, MLP, Block, CausalSelfAttention, Conv1D

# What the plan has a copy of. With anything else in the model, an adapter or a quantized layer, it would skip that.
_PLAIN_MODULES = {GPT2, nn.Embedding, nn.ModuleList, nn.LayerNorm, Block, CausalSelfAttention, MLP, Conv1D}


class DecodePlan:
    """Next-token logits for rows without padding. Make one for each generation: it holds the parameters as they are now."""

    def __init__(self, model: GPT2) -> None:
        self._model = model
        self._shape = (model.config.n_embd,)
        self._eps = model.config.layer_norm_epsilon
        self._blocks = [
            (
                (block.ln_1.weight, block.ln_1.bias),
                (block.attn.c_attn.weight, block.attn.c_attn.bias),
                (block.attn.c_proj.weight, block.attn.c_proj.bias),
                (block.ln_2.weight, block.ln_2.bias),
                (block.mlp.c_fc.weight, block.mlp.c_fc.bias),
                (block.mlp.c_proj.weight, block.mlp.c_proj.bias),
                block.mlp.activation,
                block.attn.scale,
            )
            for block in cast(list[Block], model.h)
        ]

    @staticmethod
    def fits(model: GPT2) -> bool:
        """Whether the model is the plain one in eval mode, with nothing hooked in that the plan would not call."""
        return not model.training and all(
            type(module) in _PLAIN_MODULES and not module._forward_hooks and not module._forward_pre_hooks
            for module in model.modules()
        )

    def next_logits(self, tokens: list[int], cache: KVCache) -> Tensor:
        """Append one token a row to the cache; logits (B, V) of the token after it."""
        rows, at = len(tokens), cache.length
        model, shape, eps, layer_norm, addmm = self._model, self._shape, self._eps, torch.layer_norm, torch.addmm
        x = model.wte.weight[tokens] + model.wpe.weight[at]  # (B, C) throughout, for the time axis has length 1
        cache.reserve(x[:, None])
        for (ln_1, c_attn, attn_proj, ln_2, c_fc, mlp_proj, activation, scale), stored in zip(
            self._blocks, cache.layers, strict=True
        ):
            heads = addmm(c_attn[1], layer_norm(x, shape, *ln_1, eps), c_attn[0])
            heads = heads.view(rows, 3, stored.shape[2], stored.shape[4]).transpose(0, 1)  # (3, B, H, D)
            stored[:, :, :, at] = heads[1:]
            y = F.scaled_dot_product_attention(
                heads[0].unsqueeze(2), stored[0, :, :, : at + 1], stored[1, :, :, : at + 1], scale=scale
            )
            x = x + addmm(attn_proj[1], y.reshape(rows, -1), attn_proj[0])
            y = activation(addmm(c_fc[1], layer_norm(x, shape, *ln_2, eps), c_fc[0]))
            x = x + addmm(mlp_proj[1], y, mlp_proj[0])
        return model.logits(layer_norm(x, shape, model.ln_f.weight, model.ln_f.bias, eps))
