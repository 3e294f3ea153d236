"""Direct logit attribution: a logit as the sum of what each part of the model writes to the residual stream.

It depends on a trace and on the weights of the final norm, of the head and of the layers' outputs.
The norm of the stream at each token is taken as given: `ln_final.hook_scale`.
B: rows, T: tokens, N: parts, C = n_embd.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from gpt2.inspection.tracing import Trace, check_tokens
from gpt2.inspection.weights import matrix_of
from gpt2.model import GPT2, Block
from gpt_config.errors import InputError

_STREAM = (
    "hook_embed",
    "hook_pos_embed",
    "hook_resid_pre",
    "hook_resid_mid",
    "hook_resid_post",
    "hook_attn_out",
    "hook_mlp_out",
)


class LogitAttribution(NamedTuple):
    """The parts of logits. `values` (N, B, T) has a row for each of `names`; their sum over N is the logit, (B, T)."""

    names: list[str]
    values: Tensor

    @property
    def total(self) -> Tensor:
        """The sum of all parts: the logits (B, T)."""
        return self.values.sum(0)


@torch.no_grad()
def logit_attribution(
    model: GPT2,
    trace: Trace,
    tokens: Tensor | int,
    *,
    minus: Tensor | int | None = None,
    by: Literal["layer", "head", "neuron"] = "layer",
) -> LogitAttribution:
    """Return the parts of the logit of `tokens` after each token of the trace, or of its difference to that of `minus`.

    `tokens` and `minus` are ids: one, or a tensor that broadcasts to (B, T). The parts have TransformerLens' labels: embed,
    pos_embed, 0_attn_out, 0_mlp_out and bias, which is that of the final norm. By head, L0H1 is a head and 0_attn_bias the
    bias that the heads of a layer share; by neuron, L0N5 is a neuron and 0_mlp_bias the bias of the MLP.

    The trace needs `hook_embed`, `hook_pos_embed`, `ln_final.hook_scale`, `hook_attn_out` and `hook_mlp_out`; by head it
    needs `hook_z` in place of `hook_attn_out`, and by neuron `hook_post` in place of `hook_mlp_out`.

    >>> logit_attribution(model, trace(model, "The cat sat"), token_id).values[:, 0, -1]  # doctest: +SKIP
    """
    if by not in ("layer", "head", "neuron"):
        raise InputError(f"by={by!r} must be 'layer', 'head' or 'neuron'")
    scale = trace["ln_final.hook_scale"]  # in float32 for a model in 16 bits; so are the parts
    unembedded = _unembedding(model, tokens, trace).to(scale.dtype)
    if minus is not None:
        unembedded = unembedded - _unembedding(model, minus, trace).to(scale.dtype)
    weighted = unembedded * model.ln_f.weight  # (B, T, C)
    # The norm subtracts the mean of the stream. The same number comes from subtracting the mean of the direction.
    direction = (weighted - weighted.mean(-1, keepdim=True)) / scale
    names, values = ["embed", "pos_embed"], [_along(trace[name], direction) for name in ("hook_embed", "hook_pos_embed")]
    for layer, block in enumerate(cast(list[Block], list(model.h))):
        if by == "head":
            names += [f"L{layer}H{head}" for head in range(block.attn.n_head)] + [f"{layer}_attn_bias"]
            values += _heads(block, trace["hook_z", layer], direction)
        else:
            names.append(f"{layer}_attn_out")
            values.append(_along(trace["hook_attn_out", layer], direction))
        if by == "neuron":
            post = trace["hook_post", layer]
            weight, bias = (part.to(scale.dtype) for part in matrix_of(block.mlp.c_proj, post))
            names += [f"L{layer}N{neuron}" for neuron in range(post.shape[-1])] + [f"{layer}_mlp_bias"]
            values += [*(post * (direction @ weight.T)).movedim(-1, 0), direction @ bias]
        else:
            names.append(f"{layer}_mlp_out")
            values.append(_along(trace["hook_mlp_out", layer], direction))
    return LogitAttribution([*names, "bias"], torch.stack([*values, unembedded @ model.ln_f.bias.to(scale.dtype)]))


def _unembedding(model: GPT2, tokens: Tensor | int, trace: Trace) -> Tensor:
    """The vectors (B, T, C) with which the head multiplies the stream for `tokens`."""
    ids = torch.as_tensor(tokens, device=model.device).expand(trace.ids.shape)
    check_tokens(ids, model.config.vocab_size)
    return cast(Tensor, model.wte(ids))


def _along(part: Tensor, direction: Tensor) -> Tensor:
    return (part * direction).sum(-1)  # (B, T)


def _heads(block: Block, z: Tensor, direction: Tensor) -> list[Tensor]:
    """The part of each head, and of their common bias: (B, T) each."""
    weight, bias = (part.to(direction.dtype) for part in matrix_of(block.attn.c_proj, z.flatten(2)))
    by_head = z * (direction @ weight.T).unflatten(-1, z.shape[2:])  # (B, T, H, D)
    return [*by_head.sum(-1).movedim(-1, 0), direction @ bias]


def residual_norms(trace: Trace) -> dict[str, Tensor]:
    """Return the Euclidean norm (B, T) of each kept activation of the residual stream, and of what is added to it."""
    return {name: value.norm(dim=-1) for name, value in trace.items() if name.rpartition(".")[2] in _STREAM}
