"""Effects on a metric: tables of ablation and of activation patching, over layers, heads and positions.

They run the model once for each entry of a table. L: layers, H: heads, T: tokens, B: rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gpt2.inspection.intervention import Edits, ablate_heads, ablate_layers, intervene, patch
from gpt2.inspection.names import block_name
from gpt2.inspection.tracing import Trace, check_tokens, trace
from gpt2.model import GPT2
from gpt_config.errors import InputError

# From logits (B, T, V) to a number, or to one for each row: (B,). Of several numbers, the mean counts.
Metric = Callable[[Tensor], Tensor]

_OF_HEADS = ("hook_q", "hook_k", "hook_v", "hook_z", "hook_result", "hook_attn_scores", "hook_pattern")


def logit_of(tokens: Tensor | int, *, position: int = -1) -> Metric:
    """Return the metric: the logit of `tokens`, one id or one for each row, after the token at `position`."""
    return lambda logits: _chosen(logits[:, position], tokens)


def logit_difference(tokens: Tensor | int, others: Tensor | int, *, position: int = -1) -> Metric:
    """Return the metric: the logit of `tokens` minus that of `others`, each one id or one for each row."""
    return lambda logits: _chosen(logits[:, position], tokens) - _chosen(logits[:, position], others)


def log_probability_of(tokens: Tensor | int, *, position: int = -1) -> Metric:
    """Return the metric: the natural logarithm of the probability of `tokens`, one id or one for each row."""
    return lambda logits: _chosen(logits[:, position].log_softmax(-1), tokens)


def loss_on(ids: Tensor, *, start: int = 1) -> Metric:
    """Return the metric: the mean cross-entropy, in nats, of the tokens `ids[:, start:]`, each after those before: (B,)."""

    def metric(logits: Tensor) -> Tensor:
        log_probs = logits[:, start - 1 : -1].log_softmax(-1)
        return -log_probs.gather(-1, ids[:, start:, None].to(logits.device))[..., 0].mean(-1)

    return metric


def _chosen(values: Tensor, tokens: Tensor | int) -> Tensor:
    ids = torch.as_tensor(tokens, device=values.device).expand(len(values))
    check_tokens(ids, values.shape[-1])
    return values.gather(-1, ids[:, None])[:, 0]  # (B,)


class EffectTable(NamedTuple):
    """A metric under interventions, `values`; of the unchanged input, `base`; and for patching of the patches' source.

    Ablation has no source.
    """

    values: Tensor
    base: Tensor
    source: Tensor | None = None

    @property
    def changes(self) -> Tensor:
        """How much each intervention changes the metric: values - base."""
        return self.values - self.base

    @property
    def recovered(self) -> Tensor:
        """The part of the difference between source and base that each patch recovers: 0 for none, 1 for all."""
        if self.source is None:
            raise InputError("an ablation has no source to recover: use changes")
        return self.changes / (self.source - self.base)


def ablate_each_head(
    model: GPT2, ids: Tensor, metric: Metric, *, mean_of: Trace | None = None, attention_mask: Tensor | None = None
) -> EffectTable:
    """Return the metric with each head ablated alone, (L, H); see `ablate_heads` for `mean_of`."""
    n_head = model.config.n_head
    return _table(
        model, ids, attention_mask, metric, len(model.h), n_head, lambda i, j: ablate_heads([(i, j)], mean_of=mean_of)
    )


def ablate_each_layer(
    model: GPT2, ids: Tensor, metric: Metric, *, mean_of: Trace | None = None, attention_mask: Tensor | None = None
) -> EffectTable:
    """Return the metric with the attention or the MLP of each layer ablated alone: (L, 2), attention first."""

    def edits(layer: int, column: int) -> Edits:
        return ablate_layers([layer], part="mlp" if column else "attn", mean_of=mean_of)

    return _table(model, ids, attention_mask, metric, len(model.h), 2, edits)


def patch_each(model: GPT2, clean: Trace, corrupt_ids: Tensor, metric: Metric, name: str = "hook_resid_pre") -> EffectTable:
    """Run the model on `corrupt_ids` (B, T), and patch one activation at a time from `clean`, of the same shape.

    `name` is an activation of a block. For those of heads (`hook_z`, `hook_pattern`, ...) the table is (L, H), each head
    being patched at all positions. For others (`hook_resid_pre`, `hook_attn_out`, `hook_mlp_out`, ...) it is (L, T), one
    position at a time. `recovered` is 0 where a patch changes nothing, and 1 where it restores the clean metric.
    """
    if clean.ids.shape != corrupt_ids.shape:
        raise InputError(
            f"the clean text has shape {tuple(clean.ids.shape)} and the corrupt one {tuple(corrupt_ids.shape)}: "
            "use texts with the same number of tokens"
        )
    is_of_heads = name.endswith(_OF_HEADS)

    def edits(layer: int, column: int) -> Edits:
        full = block_name(layer, name if "." in name or not is_of_heads else f"attn.{name}")
        return patch(clean, full, heads=[column]) if is_of_heads else patch(clean, full, positions=[column])

    n_columns = model.config.n_head if is_of_heads else corrupt_ids.shape[1]
    table = _table(model, corrupt_ids, clean.attention_mask, metric, len(model.h), n_columns, edits)
    return table._replace(source=metric(clean.logits).mean())


@torch.no_grad()
def _table(
    model: GPT2,
    ids: Tensor,
    attention_mask: Tensor | None,
    metric: Metric,
    n_rows: int,
    n_columns: int,
    edits: Callable[[int, int], Edits],
) -> EffectTable:
    def measured(*changes: Edits) -> Tensor:
        with intervene(model, *changes):
            return metric(trace(model, ids, (), attention_mask=attention_mask).logits).mean()

    values = [[measured(edits(row, column)) for column in range(n_columns)] for row in range(n_rows)]
    return EffectTable(torch.stack([torch.stack(row) for row in values]), measured())
