"""DecodePlan: the model with everything looked up beforehand, for generation. It computes what `model.py` says.

A decode step of the 124M model waits for memory while it reads the weights; the Python of 150 module calls, which runs
between the reads, is the largest part of the rest. Without it a step in float32 is about a tenth faster. This file knows the
operations of a block in their order, and nothing of hooks or training, where the model itself is called. In float32 its
results are the model's, bit for bit.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2.kv_cache import KVCache
from gpt2.model import GPT2, MLP, Block, CausalSelfAttention, Conv1D, TokenEmbedding
from gpt2.packed_linear import fast_linear, fast_norm_and_linear
from gpt2.positions import positions_of, visible_slots
from gpt2.quantization import Int8Embedding, Int8Linear

# What the plan has a copy of. With anything else in the model, an adapter for example, it would skip that.
_KNOWN_MODULES = {
    *(GPT2, TokenEmbedding, nn.Embedding, nn.ModuleList, nn.LayerNorm, Block, CausalSelfAttention, MLP, Conv1D),
    *(Int8Embedding, Int8Linear),
}


class DecodePlan:
    """`hidden_states` and `logits` of a GPT2. Make one for each generation: it holds the parameters as they are now."""

    def __init__(self, model: GPT2) -> None:
        self._model = model
        self._shape = (model.config.n_embd,)
        self._eps = model.config.layer_norm_epsilon
        self._blocks = [
            (
                *fast_norm_and_linear(block.ln_1, block.attn.c_attn),
                fast_linear(block.attn.c_proj),
                *fast_norm_and_linear(block.ln_2, block.mlp.c_fc),
                block.mlp.activation,
                fast_linear(block.mlp.c_proj),
                block.attn.scale,
            )
            for block in cast(list[Block], model.h)
        ]
        self.logits = fast_linear(model.wte)

    @staticmethod
    def fits(model: GPT2) -> bool:
        """Whether the model is the plain one in eval mode, with nothing hooked in that the plan would not call."""
        return not model.training and all(
            type(module) in _KNOWN_MODULES and not module._forward_hooks and not module._forward_pre_hooks
            for module in model.modules()
        )

    def hidden_states(self, input_ids: Tensor, *, attention_mask: Tensor | None, kv_cache: KVCache | None) -> Tensor:
        """As `GPT2.hidden_states`: (B, T, C). Ids, shapes and lengths are not checked."""
        assert kv_cache is not None  # the model itself computes without one
        (B, T), past, model = input_ids.shape, kv_cache.length, self._model
        shape, eps, layer_norm = self._shape, self._eps, torch.layer_norm
        if attention_mask is None:
            x = model.wte(input_ids) + model.wpe.weight[past : past + T]
        else:
            x = model.wte(input_ids) + model.wpe(positions_of(past, T, attention_mask, input_ids.device))
        mask = visible_slots(past, T, attention_mask, input_ids.device)
        is_causal = mask is None and T > 1
        kv_cache.reserve(x)
        seen = kv_cache.length
        x = x.view(B * T, -1)  # a row a token
        for (weight_1, bias_1, c_attn, attn_proj, weight_2, bias_2, c_fc, activation, mlp_proj, scale), stored in zip(
            self._blocks, kv_cache.layers, strict=True
        ):
            heads = c_attn(layer_norm(x, shape, weight_1, bias_1, eps)).view(B, T, 3, stored.shape[2], stored.shape[4])
            heads = heads.permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
            stored.narrow(3, past, T).copy_(heads[1:])
            k, v = stored.narrow(3, 0, seen).unbind()
            y = F.scaled_dot_product_attention(heads[0], k, v, attn_mask=mask, is_causal=is_causal, scale=scale)
            x += attn_proj(y.transpose(1, 2).reshape(B * T, -1))
            x += mlp_proj(activation(c_fc(layer_norm(x, shape, weight_2, bias_2, eps))))
        return layer_norm(x, shape, model.ln_f.weight, model.ln_f.bias, eps).view(B, T, -1)
