"""DecodePlan: the model with everything looked up beforehand, for generation. It computes what `model.py` says.

A decode step of the 124M model waits for memory while it reads the weights; the Python of 150 module calls, which runs
between the reads, is the largest part of the rest. Without the calls a step in float32 is about a tenth faster, and without
Python (see `scripted`) another 3%; in int8, where there is a quarter to read, 13%, and 7% more where several greedy
steps follow each other without it. This file knows the operations of a block in their order, and nothing of hooks or
training, where the model itself is called. In float32 its results are the model's, bit for bit.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2.fast import int8_matrix
from gpt2.fast.linear import FastLinear, fast_head, fast_linear, fast_norm_and_linear, has_same_rows, product
from gpt2.fast.plan_parts import Blocks, Ends
from gpt2.fast.scripted import Scripted
from gpt2.kv_cache import KVCache
from gpt2.model import ACTIVATIONS, GPT2, MLP, Block, CausalSelfAttention, Conv1D, TokenEmbedding
from gpt2.positions import positions_of, visible_slots
from gpt2.quantization.layers import Int8Embedding, Int8Linear, pack_together

# What the plan has a copy of. With anything else in the model, an adapter for example, it would skip that.
_KNOWN_MODULES = {
    *(GPT2, TokenEmbedding, nn.Embedding, nn.ModuleList, nn.LayerNorm, Block, CausalSelfAttention, MLP, Conv1D),
    *(Int8Embedding, Int8Linear),
}


# By the names that a config gives them: what `run_blocks` has a copy of.
_KNOWN_ACTIVATIONS = {"gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu", "relu"}

# What someone may have put into one module alone, in place of what its class does.
_OVERRIDDEN = {"forward", "logits"}

# So many rows are computed for so long that Python does not matter, and Ctrl-C is not to wait for all blocks.
_ROWS_FOR_PYTHON = 64


class DecodePlan:
    """`hidden_states`, `logits` and greedy tokens of a GPT2. Make one for each generation: it holds the parameters as they
    are now.

    With `only_last`, of a prompt it may give the hidden state of the last token alone, (B, 1, C), where that is faster.
    Call it without gradients.
    """

    def __init__(self, model: GPT2, *, only_last: bool = False) -> None:
        self._model = model
        self._only_last = only_last
        pack_together(model)
        norms, layers = [], []
        blocks = cast(list[Block], model.h)
        for block in blocks:
            weight_1, bias_1, c_attn = fast_norm_and_linear(block.ln_1, block.attn.c_attn)
            weight_2, bias_2, c_fc = fast_norm_and_linear(block.ln_2, block.mlp.c_fc)
            norms.append([weight_1, bias_1, weight_2, bias_2])
            layers.append([c_attn, fast_linear(block.attn.c_proj), c_fc, fast_linear(block.mlp.c_proj)])
        packed = [[layer.packed[0] for layer in four if layer.packed] for four in layers]
        list_of = _run_model.list_of
        self._blocks = Blocks(
            list_of(norms),
            [block.attn.scale for block in blocks],
            list_of([[layer.kind for layer in four] for four in layers]),
            list_of([[layer.weight for layer in four] for four in layers]),
            list_of([[layer.bias for layer in four] for four in layers]),
            list_of([[layer.other for layer in four] for four in layers]),
            model.config.activation_function,
            model.config.layer_norm_epsilon,
        )
        self._packed = list_of(packed) if packed[0] else packed
        wte = model.wte
        table, row_scales = (wte.weight_int8, wte.scale[:, None]) if isinstance(wte, Int8Embedding) else (wte.weight, None)
        self._ends = Ends(table, row_scales, model.wpe.weight, model.ln_f.weight, model.ln_f.bias)
        self._head = fast_head(model.wte)
        # Bytes are multiplied by bytes, which torch has kernels for on a CPU alone.
        self._is_int8 = bool(packed[0])
        # Several tokens can have the bits that each would have alone; in float32 nobody needs it.
        self.computes_each_alone = is_coarse(model.wpe.weight)
        if self._is_int8:
            int8_layers = [module for module in model.modules() if isinstance(module, Int8Linear)]
            self.computes_each_alone = all(layer.units_and_sums() is not None for layer in int8_layers)
        self._first_layers = layers[0]
        self._has_int8_head = row_scales is not None and self._is_int8

    @cached_property
    def _matrix_blocks(self) -> int8_matrix.MatrixBlocks:
        return int8_matrix.MatrixBlocks(self._model)

    @cached_property
    def _matrix_head(self) -> int8_matrix.MatrixLinear:
        return int8_matrix.MatrixLinear(self._model.wte)

    @cached_property
    def _alone(self) -> tuple[Blocks, FastLinear]:
        """Blocks and head for `each_alone`: with a kind that is multiplied row by row where it must be."""
        if self._head.kind != "bfloat16" or all(map(has_same_rows, [*self._first_layers, self._head])):
            return self._blocks, self._head
        kinds = [["bfloat16 or float32"] * len(self._first_layers) for _ in self._blocks.kinds]
        return self._blocks._replace(kinds=_run_model.list_of(kinds)), replace(self._head, kind="bfloat16 or float32")

    @staticmethod
    def fits(model: GPT2) -> bool:
        """Whether the model is the plain one in eval mode, with nothing in it that the plan would pass over."""
        name = model.config.activation_function
        if model.training or name not in _KNOWN_ACTIVATIONS or len(model.h) != model.config.n_layer:
            return False
        for module in model.modules():
            if type(module) not in _KNOWN_MODULES and not _is_plain_model(module):
                return False
            if module._forward_hooks or module._forward_pre_hooks:
                return False
            if not _OVERRIDDEN.isdisjoint(vars(module)):
                return False
            tensors = (*module._parameters.values(), *module._buffers.values())
            if any(type(tensor) not in (nn.Parameter, Tensor, type(None)) for tensor in tensors):
                return False
        blocks = cast(list[Block], model.h)
        layers = [layer for block in blocks for layer in (*block.attn.children(), *block.mlp.children())]
        return len(set(map(type, layers))) == 1 and all(block.mlp.activation is ACTIVATIONS[name] for block in blocks)

    def hidden_states(
        self, input_ids: Tensor, *, attention_mask: Tensor | None, kv_cache: KVCache | None, each_alone: bool = False
    ) -> Tensor:
        """As `GPT2.hidden_states`: (B, T, C). Ids and the mask's shape are not checked.

        With `each_alone`, if it `computes_each_alone`, a token has the bits that it would have in a step of its own.
        """
        assert kv_cache is not None  # the model itself computes without one
        (B, T), past, caches = input_ids.shape, kv_cache.length, kv_cache.layers
        kv_cache.check_fit(self._model.config, B, T, self._ends.wpe)
        each_alone &= self.computes_each_alone and T > 1
        if not each_alone and self._is_int8 and int8_matrix.pays(B * T, is_prompt=T > 1):
            x = embedded(input_ids, attention_mask, past, self._ends)
            mask = visible_slots(past, T, attention_mask, input_ids.device)
            x = self._matrix_blocks.run(x, past, mask, caches, only_last=self._only_last)
            kv_cache.advance(T)
            return final_norm(x, self._ends, self._blocks.eps)
        run_all = _run_model if B * T < _ROWS_FOR_PYTHON else run_model
        blocks = self._alone[0] if each_alone else self._blocks
        x = run_all(input_ids, attention_mask, past, caches, blocks, self._packed, self._ends, each_alone)
        kv_cache.advance(T)
        return x

    def greedy_tokens(self, token: int, n: int, vocab_size: int | None, kv_cache: KVCache) -> list[tuple[int, float]]:
        """`n` tokens of one unpadded row behind `token`, each the most probable one and read for the next; their logits."""
        past, head = kv_cache.length, self._head
        kv_cache.check_fit(self._model.config, 1, n, self._ends.wpe)
        input_ids = torch.tensor([[token]], device=head.weight.device)
        tokens, logits = _greedy_tokens(
            *(input_ids, n, vocab_size, past, kv_cache.layers, self._blocks, self._packed, self._ends),
            *(head.kind, head.weight, head.other, head.packed),
        )
        kv_cache.advance(n)
        return list(zip(tokens.tolist(), logits.tolist(), strict=True))

    @property
    def for_drafts(self) -> DecodePlan | _EachAlone | None:
        if not self.takes_drafts:
            return None
        return _EachAlone(self) if self.computes_each_alone else self

    @property
    def takes_drafts(self) -> bool:
        """Whether what it gives for several tokens is what it gives for each, to the digits that matter."""
        return self.computes_each_alone or not self._is_int8

    def logits(self, hidden_states: Tensor, *, each_alone: bool = False) -> Tensor:
        """Of rows (N, C): (N, V). In int8, a few rows are always computed each alone, if they can be."""
        if each_alone and self.computes_each_alone:
            return self._alone[1](hidden_states, each_alone=True)
        if self._has_int8_head and int8_matrix.pays(len(hidden_states), is_prompt=False):
            return self._matrix_head(hidden_states)
        return self._head(hidden_states, each_alone=self._is_int8 and self.computes_each_alone)


class _EachAlone:
    def __init__(self, plan: DecodePlan) -> None:
        self._plan = plan

    def hidden_states(self, input_ids: Tensor, *, attention_mask: Tensor | None, kv_cache: KVCache | None) -> Tensor:
        return self._plan.hidden_states(input_ids, attention_mask=attention_mask, kv_cache=kv_cache, each_alone=True)

    def logits(self, hidden_states: Tensor) -> Tensor:
        return self._plan.logits(hidden_states, each_alone=True)


def _is_plain_model(module: nn.Module) -> bool:
    """Whether a class that adds to GPT2, as `gpt2.GPT2` does, computes what GPT2 computes."""
    names = ("forward", "hidden_states", "embed", "stream", "logits")
    return isinstance(module, GPT2) and all(getattr(type(module), name) is getattr(GPT2, name) for name in names)


def is_coarse(weight: Tensor) -> bool:
    """Whether a model with such weights computes in 16 bits: two tokens are then often the most probable up to the last
    digits, and up to one text in four is another if those depend on what is computed beside it. On a GPU nobody has looked.
    """
    return weight.device.type == "cpu" and weight.dtype in (torch.float16, torch.bfloat16)


def greedy_tokens(
    input_ids: Tensor,
    n: int,
    vocab_size: int | None,
    past: int,
    caches: list[Tensor],
    blocks: Blocks,
    packed: list[list[torch.classes.quantized.LinearPackedParamsBase]],  # type: ignore[name-defined]
    ends: Ends,
    kind: str,
    weight: Tensor,
    other: Tensor,
    head: list[torch.classes.quantized.LinearPackedParamsBase],  # type: ignore[name-defined]
) -> tuple[Tensor, Tensor]:
    """`n` tokens behind `input_ids` (1, 1), each the most probable one and read for the next, and their logits: (n,) each.

    Nothing looks at the values in between, so a GPU never waits. From `kind` on, what `product` takes for the head.
    """
    tokens: list[Tensor] = []
    largest: list[Tensor] = []
    for i in range(n):
        x = run_model(input_ids, None, past + i, caches, blocks, packed, ends, False)
        logits = product(x[:, -1], kind, weight, None, other, head, 0, False)
        value, input_ids = logits[:, :vocab_size].max(1, keepdim=True)  # on a CPU the first of equals, as by argmax
        tokens.append(input_ids)
        largest.append(value)
    return torch.cat(tokens).view(-1), torch.cat(largest).view(-1)


def run_model(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    past: int,
    caches: list[Tensor],
    blocks: Blocks,
    packed: list[list[torch.classes.quantized.LinearPackedParamsBase]],  # type: ignore[name-defined]
    ends: Ends,
    each_alone: bool,
) -> Tensor:
    """The hidden states (B, T, C) of `input_ids` (B, T) behind `past` cached tokens, in what TorchScript knows of Python."""
    x = embedded(input_ids, attention_mask, past, ends)
    mask: Tensor | None = None
    if not each_alone or attention_mask is not None:
        mask = visible_slots(past, input_ids.size(1), attention_mask, input_ids.device)
    x = run_blocks(x, past, mask, caches, blocks, packed, each_alone)
    return final_norm(x, ends, blocks.eps)


def embedded(input_ids: Tensor, attention_mask: Tensor | None, past: int, ends: Ends) -> Tensor:
    """Tokens and their positions: (B, T, C)."""
    x = F.embedding(input_ids, ends.wte)
    row_scales = ends.row_scales
    if row_scales is not None:
        x = x * F.embedding(input_ids, row_scales)
    if attention_mask is None:
        return x + ends.wpe.narrow(0, past, input_ids.size(1))
    return x + F.embedding(positions_of(past, input_ids.size(1), attention_mask, input_ids.device), ends.wpe)


def final_norm(x: Tensor, ends: Ends, eps: float) -> Tensor:
    return torch.layer_norm(x, [x.size(-1)], ends.norm_weight, ends.norm_bias, eps)


def run_blocks(
    x: Tensor,
    past: int,
    mask: Tensor | None,
    caches: list[Tensor],
    blocks: Blocks,
    packed: list[list[torch.classes.quantized.LinearPackedParamsBase]],  # type: ignore[name-defined]
    each_alone: bool,
) -> Tensor:
    """All blocks on the stream `x` (B, T, C) behind `past` cached tokens: (B, T, C), in what TorchScript knows of Python.

    Every list has an entry a block; `packed` is what `product` takes. With `each_alone` a token has the bits that it would
    have in a step of its own.
    """
    norms, scales, kinds, weights, biases, others, activation, eps = blocks
    B, T, C = x.size(0), x.size(1), x.size(2)
    x = x.view(B * T, C)  # a row a token
    for i, cache in enumerate(caches):
        kind, norm, weight, bias, other, pack = kinds[i], norms[i], weights[i], biases[i], others[i], packed[i]
        y = torch.layer_norm(x, [C], norm[0], norm[1], eps)
        y = product(y, kind[0], weight[0], bias[0], other[0], pack, 0, each_alone)
        heads = y.view(B, T, 3, cache.size(2), cache.size(4)).permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
        cache.narrow(3, past, T).copy_(heads[1:])
        if each_alone:
            y = attention_of_each(heads[0], cache, past, mask, scales[i])
        else:
            y = attention(heads[0], cache, past, mask, scales[i])
        y = y.transpose(1, 2).reshape(B * T, C)
        x += product(y, kind[1], weight[1], bias[1], other[1], pack, 1, each_alone)
        y = torch.layer_norm(x, [C], norm[2], norm[3], eps)
        y = product(y, kind[2], weight[2], bias[2], other[2], pack, 2, each_alone)
        y = activated_each(y, activation) if each_alone else activated(y, activation)
        x += product(y, kind[3], weight[3], bias[3], other[3], pack, 3, each_alone)
    return x.view(B, T, C)


def attention(q: Tensor, cache: Tensor, past: int, mask: Tensor | None, scale: float) -> Tensor:
    """Of queries (B, H, T, D) behind `past` cached tokens: (B, H, T, D). `mask` is what `visible_slots` gives."""
    k, v = cache.narrow(3, 0, past + q.size(2)).unbind()
    is_causal = mask is None and q.size(2) > 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale)


def attention_of_each(q: Tensor, cache: Tensor, past: int, mask: Tensor | None, scale: float) -> Tensor:
    """The same, one query after the other. Without `mask`, each sees all that stands before it."""
    k, v = cache.unbind()
    ys: list[Tensor] = []
    for t, query in enumerate(q.split(1, 2)):
        S = past + t + 1
        seen = None if mask is None else mask.narrow(2, t, 1).narrow(3, 0, S)
        ys.append(F.scaled_dot_product_attention(query, k.narrow(2, 0, S), v.narrow(2, 0, S), attn_mask=seen, scale=scale))
    return torch.cat(ys, 2)


def activated(x: Tensor, activation: str) -> Tensor:
    return F.relu(x) if activation == "relu" else F.gelu(x, approximate="none" if activation == "gelu" else "tanh")


def activated_each(x: Tensor, activation: str) -> Tensor:
    """The same, row by row (N, C), for torch computes what is left over behind whole registers to other last digits."""
    return torch.cat([activated(row, activation) for row in x.split(1)])


_run_model = Scripted(run_model)
_greedy_tokens = Scripted(greedy_tokens)
