"""The forward pass of a plan, as `model.py` computes it in eval mode. It is written in the subset of Python of TorchScript.

There are two versions. `run_model` computes all tokens together. `run_model_of_each` gives each token the same bits as a
step with this token only.
B: batch, T: tokens of a call, S: cached tokens and T, C = n_embd, H = n_head, D = C / H. N: tokens of several texts of any
lengths, one after another.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2.fast.linear import activated, activated_product, product, product_of_each
from gpt2.fast.plan_parts import BlockParts, Ends, Norm, PlanParts
from gpt2.fast.scripted import Scripted
from gpt2.positions import positions_of, visible_slots


def run_model(input_ids: Tensor, attention_mask: Tensor | None, past: int, caches: list[Tensor], parts: PlanParts) -> Tensor:
    """Return the hidden states (B, T, C) of `input_ids` (B, T) after `past` cached tokens."""
    mask = visible_slots(past, input_ids.size(1), attention_mask, input_ids.device)
    x = embedded(input_ids, attention_mask, past, parts.ends)
    return normed(run_blocks(x, past, mask, caches, parts.blocks), parts.ends.norm)


def run_model_of_each(
    input_ids: Tensor, attention_mask: Tensor | None, past: int, caches: list[Tensor], parts: PlanParts
) -> Tensor:
    """Like `run_model`; each token has the same bits as in a step with this token only."""
    mask: Tensor | None = None
    if attention_mask is not None:
        mask = visible_slots(past, input_ids.size(1), attention_mask, input_ids.device)
    x = embedded(input_ids, attention_mask, past, parts.ends)
    return normed(run_blocks_of_each(x, past, mask, caches, parts.blocks), parts.ends.norm)


def greedy_tokens(
    input_ids: Tensor, n: int, vocab_size: int | None, past: int, caches: list[Tensor], parts: PlanParts
) -> tuple[Tensor, Tensor]:
    """Decode `n` greedy tokens after `input_ids` (1, 1). Returns the tokens, int64 (n,), and their logits (n,).

    No value is read by Python in between, so a GPU never waits.
    """
    tokens: list[Tensor] = []
    largest: list[Tensor] = []
    for i in range(n):
        x = run_model(input_ids, None, past + i, caches, parts)  # (1, 1, C)
        logits = product(x[:, -1], parts.ends.head)  # (1, V)
        value, input_ids = logits[:, :vocab_size].max(1, keepdim=True)  # on a CPU the lowest id of equals, like argmax
        tokens.append(input_ids)
        largest.append(value)
    return torch.cat(tokens).view(-1), torch.cat(largest).view(-1)  # (n,) each


def embedded(input_ids: Tensor, attention_mask: Tensor | None, past: int, ends: Ends) -> Tensor:
    """Return the sum of token and position embeddings: (B, T, C)."""
    x = F.embedding(input_ids, ends.wte)
    row_scales = ends.row_scales
    if row_scales is not None:
        x = x * F.embedding(input_ids, row_scales)
    if attention_mask is None:
        return x + ends.wpe.narrow(0, past, input_ids.size(1))
    return x + F.embedding(positions_of(past, input_ids.size(1), attention_mask, input_ids.device), ends.wpe)


def normed(x: Tensor, norm: Norm) -> Tensor:
    """Return the layer norm of `x` over the last dimension."""
    return torch.layer_norm(x, [x.size(-1)], norm.weight, norm.bias, norm.eps)


def run_blocks(
    x: Tensor, past: int, mask: Tensor | None, caches: list[Tensor], blocks: list[BlockParts], only_last: bool = False
) -> Tensor:
    """Run all blocks on the residual stream `x` (B, T, C) after `past` cached tokens. Returns (B, T, C).

    `mask` is the result of `visible_slots`. With `only_last`, the result is (B, 1, C), that of the last token: the last
    block computes only keys and values of the others.
    """
    B, T, C = x.size(0), x.size(1), x.size(2)
    x = x.view(B * T, C)  # a row for each token
    for i, block in enumerate(blocks):
        heads = stored(product(normed(x, block.norm_1), block.c_attn), T, past, caches[i])  # (3, B, H, T, D)
        if only_last and i == len(blocks) - 1:  # go on as in a step of the last token, after all others
            x, heads = x.view(B, T, C)[:, -1], heads[:, :, :, -1:]  # (B, C), (3, B, H, 1, D)
            mask, past, T = None if mask is None else mask[:, :, -1:], past + T - 1, 1
        y = attention(heads, caches[i], past, mask, block.scale)  # (B, H, T, D)
        x += product(y.transpose(1, 2).reshape(B * T, C), block.attn_proj)  # (B * T, C)
        x += product(activated_product(normed(x, block.norm_2), block.c_fc, block.activation), block.mlp_proj)
    return x.view(B, T, C)


def run_blocks_of_each(x: Tensor, past: int, mask: Tensor | None, caches: list[Tensor], blocks: list[BlockParts]) -> Tensor:
    """Like `run_blocks`; each token has the same bits as in a step with this token only."""
    B, T, C = x.size(0), x.size(1), x.size(2)
    x = x.view(B * T, C)  # a row for each token
    for i, block in enumerate(blocks):
        heads = stored(product_of_each(normed(x, block.norm_1), block.c_attn), T, past, caches[i])  # (3, B, H, T, D)
        y = attention_of_each(heads[0], caches[i], past, mask, block.scale)  # (B, H, T, D)
        x += product_of_each(y.transpose(1, 2).reshape(B * T, C), block.attn_proj)  # (B * T, C)
        y = product_of_each(normed(x, block.norm_2), block.c_fc)
        x += product_of_each(activated_each(y, block.activation), block.mlp_proj)
    return x.view(B, T, C)


def run_slots(
    tokens: Tensor,
    positions: Tensor,
    counts: list[int],
    lengths: list[int],
    slots: list[int],
    caches: list[Tensor],
    own_cache: list[Tensor],
    parts: PlanParts,
) -> Tensor:
    """Return the hidden states (N, C) of N `tokens` (N,) at `positions` (N,), of which `counts[b]` belong to row b."""
    x = embedded_in_slots(tokens, positions, parts.ends)
    return normed(run_blocks_in_slots(x, counts, lengths, slots, caches, own_cache, parts.blocks), parts.ends.norm)


def embedded_in_slots(tokens: Tensor, positions: Tensor, ends: Ends) -> Tensor:
    """Return the sum of token and position embeddings: (N, C)."""
    x = F.embedding(tokens, ends.wte)
    row_scales = ends.row_scales
    if row_scales is not None:
        x = x * F.embedding(tokens, row_scales)
    return x + F.embedding(positions, ends.wpe)


def run_blocks_in_slots(
    x: Tensor,
    counts: list[int],
    lengths: list[int],
    slots: list[int],
    caches: list[Tensor],
    own_cache: list[Tensor],
    blocks: list[BlockParts],
) -> Tensor:
    """Run all blocks on the residual stream `x` (N, C) of the tokens of B rows. Returns (N, C).

    The next `counts[b]` rows of `x` belong to the text in slot `slots[b]` of the caches (2, slots, H, S, D), after
    `lengths[b]` tokens. Slot -1 stands for `own_cache`, (2, 1, H, S, D) for each layer. The products are computed for all
    texts together, and attention one text after another, each over its own tokens, so there is no padding.
    """
    N, each_has_one = x.size(0), x.size(0) == len(counts) and len(own_cache) == 0
    for i, block in enumerate(blocks):
        cache = caches[i]
        qkv = product(normed(x, block.norm_1), block.c_attn).view(N, 3, cache.size(2), cache.size(4))  # (N, 3, H, D)
        if each_has_one:
            y = attention_of_rows(qkv, lengths, slots, cache, block.scale)  # (N, C)
        else:
            y = attention_of_texts(qkv, counts, lengths, slots, cache, own_cache[i : i + 1], block.scale)  # (N, C)
        x += product(y, block.attn_proj)  # (N, C)
        x += product(activated_product(normed(x, block.norm_2), block.c_fc, block.activation), block.mlp_proj)
    return x


def attention_of_texts(
    qkv: Tensor,
    counts: list[int],
    lengths: list[int],
    slots: list[int],
    cache: Tensor,
    own_cache: list[Tensor],
    scale: float,
) -> Tensor:
    """Store the keys and values of the next tokens of texts in their slots, and return their attention (N, C).

    `qkv` (N, 3, H, D) has the queries, keys and values of all tokens. The rest is as in `run_blocks_in_slots`.
    """
    ys: list[Tensor] = []
    for b, of_text in enumerate(qkv.split_with_sizes(counts)):
        heads = of_text.permute(1, 2, 0, 3)  # (3, H, T, D)
        text = cache.select(1, slots[b]) if slots[b] >= 0 else own_cache[0].select(1, 0)  # (2, H, S, D)
        text.narrow(2, lengths[b], counts[b]).copy_(heads[1:])
        seen = text.narrow(2, 0, lengths[b] + counts[b]).unsqueeze(1)  # (2, 1, H, S, D)
        mask = visible_slots(lengths[b], counts[b], None, qkv.device)
        y = attention(heads.unsqueeze(1), seen, lengths[b], mask, scale)  # (1, H, T, D)
        ys.append(y[0].transpose(0, 1).reshape(counts[b], -1))
    return torch.cat(ys)


def attention_of_rows(qkv: Tensor, lengths: list[int], slots: list[int], cache: Tensor, scale: float) -> Tensor:
    """Like `attention_of_texts` for one token of each text, with fewer operations: a tenth of a step of 8 rows."""
    places: list[Tensor | None] = [torch.tensor(slots, device=qkv.device), torch.tensor(lengths, device=qkv.device)]
    cache.permute(1, 3, 0, 2, 4).index_put_(places, qkv[:, 1:].to(cache.dtype))  # (N, 2, H, D) into (slots, S, 2, H, D)
    q = qkv[:, 0].unsqueeze(2).to(cache.dtype)  # (N, H, 1, D)
    ys: list[Tensor] = []
    for b, query in enumerate(q.split(1)):
        k, v = cache.narrow(1, slots[b], 1).narrow(3, 0, lengths[b] + 1).unbind()  # (1, H, S, D) each
        ys.append(F.scaled_dot_product_attention(query, k, v, scale=scale))
    return torch.cat(ys).to(qkv.dtype).view(qkv.size(0), -1)  # (N, C)


def stored(qkv: Tensor, T: int, past: int, cache: Tensor) -> Tensor:
    """Split rows (B * T, 3 C) into heads (3, B, H, T, D), and store keys and values in the cache (2, B, H, S, D)."""
    heads = qkv.view(-1, T, 3, cache.size(2), cache.size(4)).permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
    cache.narrow(3, past, T).copy_(heads[1:])
    return heads


def attention(heads: Tensor, cache: Tensor, past: int, mask: Tensor | None, scale: float) -> Tensor:
    """Return the attention of `heads` (3, B, H, T, D), the queries, keys and values of the last T tokens: (B, H, T, D).

    The cache (2, B, H, S, D) has the same keys and values after those of `past` tokens, perhaps in float32: see
    `cache_dtype`. The attention of a prompt in bfloat16 stays in bfloat16, which matrix units multiply faster.
    """
    T = heads.size(3)
    q, k, v = heads.unbind()  # (B, H, T, D) each
    if past > 0 or T == 1 or heads.dtype != torch.bfloat16:
        k, v = cache.narrow(3, 0, past + T).unbind()  # (B, H, S, D) each
    is_causal = mask is None and T > 1
    return F.scaled_dot_product_attention(q.to(k.dtype), k, v, attn_mask=mask, is_causal=is_causal, scale=scale).to(q.dtype)


def attention_of_each(q: Tensor, cache: Tensor, past: int, mask: Tensor | None, scale: float) -> Tensor:
    """Like `attention`, one query after another. Without `mask`, each attends to itself and to all tokens before it."""
    k, v = cache.unbind()
    ys: list[Tensor] = []
    for t, query in enumerate(q.split(1, 2)):
        S = past + t + 1
        seen = None if mask is None else mask.narrow(2, t, 1).narrow(3, 0, S)
        # MKL's rounding depends on the alignment of a row, so give the query the alignment that it has in a single step.
        if query.storage_offset() * query.element_size() % 64:
            query = torch.empty_strided(query.size(), query.stride(), dtype=query.dtype, device=query.device).copy_(query)
        query = query.to(k.dtype)
        ys.append(F.scaled_dot_product_attention(query, k.narrow(2, 0, S), v.narrow(2, 0, S), attn_mask=seen, scale=scale))
    return torch.cat(ys, 2).to(q.dtype)


def activated_each(x: Tensor, activation: str) -> Tensor:
    """Like `activated`, one row of (N, C) after another.

    torch rounds the last elements of a tensor differently if they do not fill a register, and N decides which these are.
    """
    return torch.cat([activated(row, activation) for row in x.split(1)])


scripted_run_model = Scripted(run_model)
scripted_run_slots = Scripted(run_slots)
scripted_run_model_of_each = Scripted(run_model_of_each)
scripted_greedy_tokens = Scripted(greedy_tokens)
