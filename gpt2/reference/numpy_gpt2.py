"""GPT-2 in NumPy with every gradient derived by hand: attention, MLP, block and model, built from `numpy_layers`.

A forward function returns its result and what its backward function needs. A backward function takes dL/d(result), called
`d_out`, where L is the loss. It returns dL/d(input), called `d_x`, and the gradients of its parameters by name. No argument
is changed. Arithmetic stays in the dtype of the inputs, float32 or float64. Dropout is applied only if a generator `rng` is
given. `keep` is called with the name, as in TransformerLens, and value of each intermediate result. This module knows
nothing of text, files or optimizers.

B is the batch size, T the number of tokens in this call, S the number of cached tokens plus T, C = n_embd, H = n_head,
D = C / H, V = vocab_size.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from gpt2.reference.numpy_kv_cache import KVCache
from gpt2.reference.numpy_layers import (
    ACTIVATIONS,
    Array,
    Keep,
    Saved,
    causal_attention_backward,
    causal_attention_forward,
    cross_entropy_backward,
    cross_entropy_forward,
    dropout_backward,
    dropout_forward,
    embedding_backward,
    embedding_forward,
    ignore,
    layer_norm_backward,
    layer_norm_forward,
    linear_backward,
    linear_forward,
    merge_heads,
    split_heads,
    tied_head_backward,
    tied_head_forward,
)
from gpt_config.errors import InputError, InputTypeError
from gpt_config.model_config import GPT2Config

# Keys are the names in the published files; within a block, they have no prefix such as "h.0.".
Parameters = dict[str, Array]
Gradients = dict[str, Array]


def under(prefix: str, keep: Keep) -> Keep:
    """`keep` for the intermediate results of a part of the model, whose names begin with `prefix`."""
    return keep if keep is ignore else lambda name, value: keep(prefix + name, value)


# ---- Attention ------------------------------------------------------------------------------------------------------


def attention_scale(config: GPT2Config, layer: int) -> float:
    """1 / sqrt(D), so that the scores do not grow with D. A config can choose another scale."""
    scale = 1 / math.sqrt(config.head_dim) if config.scale_attn_weights else 1.0
    return scale / (layer + 1) if config.scale_attn_by_inverse_layer_idx else scale


def attention_forward(
    x: Array,
    parameters: Parameters,
    config: GPT2Config,
    layer: int,
    rng: np.random.Generator | None = None,
    kv_cache: KVCache | None = None,
    keep: Keep = ignore,
) -> tuple[Array, Saved]:
    """(B, T, C) to (B, T, C): one linear layer computes Q, K and V of all heads; after attention, another mixes the heads.

    Vaswani et al. 2017, section 3.2.2.
    """
    qkv, c_attn_saved = linear_forward(x, parameters["attn.c_attn.weight"], parameters["attn.c_attn.bias"])  # (B, T, 3C)
    q, k, v = (split_heads(part, config.n_head) for part in np.split(qkv, 3, axis=-1))  # (B, H, T, D) each
    for name, head in (("hook_q", q), ("hook_k", k), ("hook_v", v)):
        keep(name, head.swapaxes(1, 2))  # (B, T, H, D)
    if kv_cache is not None:
        k, v = kv_cache.append(layer, k, v)  # (B, H, S, D)
    y, saved = causal_attention_forward(
        q, k, v, attention_scale(config, layer), config.attn_pdrop, rng, keep
    )  # (B, H, T, D)
    keep("hook_z", y.swapaxes(1, 2))
    if keep is not ignore:  # the result of each head separately: n_head times the memory of `out`
        by_head = parameters["attn.c_proj.weight"].reshape(config.n_head, config.head_dim, -1)  # (H, D, C)
        keep("hook_result", (y @ by_head).swapaxes(1, 2))  # (B, T, H, C)
    out, c_proj_saved = linear_forward(merge_heads(y), parameters["attn.c_proj.weight"], parameters["attn.c_proj.bias"])
    return out, (config.n_head, c_attn_saved, saved, c_proj_saved)


def attention_backward(d_out: Array, saved: Saved) -> tuple[Array, Gradients]:
    """dL/dx (B, T, C) and the gradients of `attn.c_attn` and `attn.c_proj`.

    Only after a forward without a cache: cached tokens have no gradients.
    """
    n_head, c_attn_saved, attention_saved, c_proj_saved = saved
    d_merged, d_proj_weight, d_proj_bias = linear_backward(d_out, c_proj_saved)  # d_merged: (B, T, C)
    d_heads = causal_attention_backward(split_heads(d_merged, n_head), attention_saved)
    d_qkv = np.concatenate([merge_heads(d_head) for d_head in d_heads], axis=-1)  # (B, T, 3C)
    d_x, d_attn_weight, d_attn_bias = linear_backward(d_qkv, c_attn_saved)
    return d_x, {
        "attn.c_attn.weight": d_attn_weight,
        "attn.c_attn.bias": d_attn_bias,
        "attn.c_proj.weight": d_proj_weight,
        "attn.c_proj.bias": d_proj_bias,
    }


# ---- The block ------------------------------------------------------------------------------------------------------


def mlp_forward(x: Array, parameters: Parameters, config: GPT2Config, keep: Keep = ignore) -> tuple[Array, Saved]:
    """(..., C) to (..., C): a linear layer to n_inner channels (by default 4C), the activation, a linear layer back to C."""
    wide, fc_saved = linear_forward(x, parameters["mlp.c_fc.weight"], parameters["mlp.c_fc.bias"])
    forward, backward = ACTIVATIONS[config.activation_function]
    active, activation_saved = forward(wide)
    keep("hook_pre", wide)
    keep("hook_post", active)
    out, proj_saved = linear_forward(active, parameters["mlp.c_proj.weight"], parameters["mlp.c_proj.bias"])
    return out, (fc_saved, backward, activation_saved, proj_saved)


def mlp_backward(d_out: Array, saved: Saved) -> tuple[Array, Gradients]:
    """dL/dx (..., C) and the gradients of `mlp.c_fc` and `mlp.c_proj`."""
    fc_saved, activation_backward, activation_saved, proj_saved = saved
    d_active, d_proj_weight, d_proj_bias = linear_backward(d_out, proj_saved)
    d_x, d_fc_weight, d_fc_bias = linear_backward(activation_backward(d_active, activation_saved), fc_saved)
    return d_x, {
        "mlp.c_fc.weight": d_fc_weight,
        "mlp.c_fc.bias": d_fc_bias,
        "mlp.c_proj.weight": d_proj_weight,
        "mlp.c_proj.bias": d_proj_bias,
    }


def block_forward(
    x: Array,
    parameters: Parameters,
    config: GPT2Config,
    layer: int,
    rng: np.random.Generator | None = None,
    kv_cache: KVCache | None = None,
    keep: Keep = ignore,
) -> tuple[Array, Saved]:
    """(B, T, C) to (B, T, C): x = x + dropout(attention(norm(x))), then x = x + dropout(mlp(norm(x))).

    Radford et al. 2019, section 2.3.
    """
    epsilon, p = config.layer_norm_epsilon, config.resid_pdrop
    keep("hook_resid_pre", x)
    normed, ln_1 = layer_norm_forward(x, parameters["ln_1.weight"], parameters["ln_1.bias"], epsilon, under("ln1.", keep))
    attended, attention = attention_forward(normed, parameters, config, layer, rng, kv_cache, under("attn.", keep))
    attended, dropout_1 = dropout_forward(attended, p, rng)
    keep("hook_attn_out", attended)
    x = x + attended
    keep("hook_resid_mid", x)
    keep("hook_mlp_in", x)
    normed, ln_2 = layer_norm_forward(x, parameters["ln_2.weight"], parameters["ln_2.bias"], epsilon, under("ln2.", keep))
    out, mlp = mlp_forward(normed, parameters, config, under("mlp.", keep))
    out, dropout_2 = dropout_forward(out, p, rng)
    keep("hook_mlp_out", out)
    x = x + out
    keep("hook_resid_post", x)
    return x, (ln_1, attention, dropout_1, ln_2, mlp, dropout_2)


def block_backward(d_out: Array, saved: Saved) -> tuple[Array, Gradients]:
    """dL/dx (B, T, C) and the gradients of the block's parameters.

    The derivative of x + f(x) is 1 + f'(x). So the gradient of each sum is passed on unchanged, and the gradient that comes
    back through the layer is added to it.
    """
    ln_1, attention, dropout_1, ln_2, mlp, dropout_2 = saved
    d_normed, gradients = mlp_backward(dropout_backward(d_out, dropout_2), mlp)
    d_x, gradients["ln_2.weight"], gradients["ln_2.bias"] = layer_norm_backward(d_normed, ln_2)
    d_x += d_out
    d_normed, attention_gradients = attention_backward(dropout_backward(d_x, dropout_1), attention)
    d_through, gradients["ln_1.weight"], gradients["ln_1.bias"] = layer_norm_backward(d_normed, ln_1)
    d_x += d_through
    return d_x, gradients | attention_gradients


# ---- The model and its loss -----------------------------------------------------------------------------------------


def layer_parameters(parameters: Parameters, layer: int) -> Parameters:
    """The parameters of block `layer`, without the prefix `h.{layer}.` in their names."""
    prefix = f"h.{layer}."
    return {name.removeprefix(prefix): value for name, value in parameters.items() if name.startswith(prefix)}


class ForwardSaved(NamedTuple):
    """What `gpt2_forward` keeps for `gpt2_backward`."""

    tokens: Saved
    positions: Saved
    dropout: Saved
    blocks: list[Saved]
    ln_f: Saved
    head: Saved


def gpt2_forward(
    parameters: Parameters,
    config: GPT2Config,
    input_ids: Array,
    rng: np.random.Generator | None = None,
    kv_cache: KVCache | None = None,
    keep: Keep = ignore,
) -> tuple[Array, ForwardSaved]:
    """Ids (B, T) to logits (B, T, V): for each token, the logits of the token after it.

    With a cache, the ids continue the tokens in it. InputError for an id outside the vocabulary, or for more tokens than
    n_positions.
    """
    past = 0 if kv_cache is None else kv_cache.length
    check_ids(config, input_ids, past)
    tokens, tokens_saved = embedding_forward(parameters["wte.weight"], input_ids)
    at = np.arange(past, past + input_ids.shape[1])
    positions, positions_saved = embedding_forward(parameters["wpe.weight"], at)
    keep("hook_embed", tokens)
    keep("hook_pos_embed", np.broadcast_to(positions, tokens.shape))
    x, dropout_saved = dropout_forward(tokens + positions, config.embd_pdrop, rng)
    blocks = []
    for layer in range(config.n_layer):
        of_block = under(f"blocks.{layer}.", keep)
        x, saved = block_forward(x, layer_parameters(parameters, layer), config, layer, rng, kv_cache, of_block)
        blocks.append(saved)
    if kv_cache is not None:
        kv_cache.length += input_ids.shape[1]
    weight, bias = parameters["ln_f.weight"], parameters["ln_f.bias"]
    x, ln_f = layer_norm_forward(x, weight, bias, config.layer_norm_epsilon, under("ln_final.", keep))
    logits, head = tied_head_forward(x, parameters["wte.weight"])
    return logits, ForwardSaved(tokens_saved, positions_saved, dropout_saved, blocks, ln_f, head)


def gpt2_backward(d_logits: Array, saved: ForwardSaved) -> Gradients:
    """The gradient of each parameter, by its published name. `d_logits` is dL/dlogits (B, T, V).

    The model uses the token embedding twice, as the input embedding and as the head, so its gradient is the sum of both.
    """
    gradients: Gradients = {}
    d_x, d_wte = tied_head_backward(d_logits, saved.head)
    d_x, gradients["ln_f.weight"], gradients["ln_f.bias"] = layer_norm_backward(d_x, saved.ln_f)
    for layer in reversed(range(len(saved.blocks))):
        d_x, of_block = block_backward(d_x, saved.blocks[layer])
        gradients |= {f"h.{layer}.{name}": gradient for name, gradient in of_block.items()}
    d_x = dropout_backward(d_x, saved.dropout)
    d_wte += embedding_backward(d_x, saved.tokens)
    gradients["wte.weight"] = d_wte
    gradients["wpe.weight"] = embedding_backward(d_x.sum(0), saved.positions)  # the rows of a batch have equal positions
    return gradients


def loss_and_gradients(
    parameters: Parameters,
    config: GPT2Config,
    input_ids: Array,
    targets: Array,
    rng: np.random.Generator | None = None,
) -> tuple[float, Gradients]:
    """The mean cross-entropy of `targets` (B, T) after `input_ids` (B, T), in nats, and its gradient for each parameter."""
    check_targets(config, input_ids, targets)
    logits, saved = gpt2_forward(parameters, config, input_ids, rng)
    loss, loss_saved = cross_entropy_forward(logits, targets)
    return loss, gpt2_backward(cross_entropy_backward(loss_saved), saved)


def check_targets(config: GPT2Config, input_ids: Array, targets: Array) -> None:
    """InputError unless `targets` has one id of the vocabulary for each of `input_ids`."""
    check_ids(config, targets, 0)
    if targets.shape != input_ids.shape:
        raise InputError(f"targets have shape {targets.shape}: they must have the shape of the input, {input_ids.shape}")


def check_ids(config: GPT2Config, ids: Array, past: int) -> None:
    """InputError unless `ids` are integers (B, T) in the vocabulary, and the model has positions for `past` + T tokens.

    Without this check, NumPy would silently read id -1 as the last row. InputTypeError if `ids` are not an array.
    """
    if not isinstance(ids, np.ndarray):
        raise InputTypeError(f"ids must be an array of shape (batch, tokens), not {type(ids).__name__}")
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer) or not ids.size:
        raise InputError(f"ids have shape {ids.shape} and dtype {ids.dtype}: they must be integers of shape (batch, tokens)")
    wrong = ids[(ids < 0) | (ids >= config.vocab_size)]
    if wrong.size:
        raise InputError(
            f"token id {wrong[0]} is outside the vocabulary of this model: ids go from 0 to {config.vocab_size - 1}; "
            "use the tokenizer that belongs to it"
        )
    if past + ids.shape[1] > config.n_positions:
        raise InputError(
            f"{past + ids.shape[1]} tokens are more than the {config.n_positions} positions of this model: cut the input"
        )
