"""Lenses: what the model would predict if it stopped at a layer. The logit lens has no parameters; a tuned lens is trained.

They depend on a model's final norm and head, and on traces. A lens is saved by `gpt2.weights.tuned_lens`.
N: lines of a table, B: rows, T: tokens, V: vocabulary, C = n_embd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gpt2.inspection.names import layer_of
from gpt2.inspection.tracing import Inputs, Trace, trace
from gpt2.model import GPT2
from gpt_config.errors import InputError
from gpt_config.validation import check_real, check_whole


def logit_lens(model: GPT2, stream: Tensor) -> Tensor:
    """Return the logits (..., V) of the residual stream (..., C) at any place: the final norm and the head.

    nostalgebraist 2020, "interpreting GPT: the logit lens".
    """
    return model.logits(model.ln_f(stream))


class TunedLens(nn.Module):
    """A lens with an affine map for the input of each layer, `hook_resid_pre`, before the final norm and the head.

    A new one is the logit lens. Belrose et al. 2023, "Eliciting latent predictions from transformers with the tuned lens".
    """

    def __init__(self, n_layer: int, n_embd: int) -> None:
        super().__init__()
        self.translators = nn.ModuleList(nn.Linear(n_embd, n_embd) for _ in range(n_layer))
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, model: GPT2, layer: int, stream: Tensor) -> Tensor:
        """Return the logits (..., V) of the input of a layer, (..., C)."""
        return logit_lens(model, stream + self.translators[layer](stream))


class LensTable(NamedTuple):
    """What a lens predicts after each token at each place of the stream.

    `ids` and `probabilities` (N, B, T, k) are the k most probable tokens. `ranks` (N, B, T) is the rank, from 1, of the
    token that the model itself finds most probable. `entropies` and `divergences` (N, B, T), in nats: the entropy of the
    lens' distribution, and the Kullback-Leibler divergence of the model's own distribution from it.
    """

    names: list[str]
    ids: Tensor
    probabilities: Tensor
    ranks: Tensor
    entropies: Tensor
    divergences: Tensor


@torch.no_grad()
def lens_table(model: GPT2, trace: Trace, k: int = 1, *, lens: TunedLens | None = None) -> LensTable:
    """Return the table of the logit lens at each kept `hook_resid_mid` (after attention) and `hook_resid_post` (after MLP).

    With `lens`, a tuned lens, the lines are those of each kept `hook_resid_pre`. InputError if the trace has none of them.
    """
    wanted = ("hook_resid_mid", "hook_resid_post") if lens is None else ("hook_resid_pre",)
    names = [name for name in trace if name.endswith(wanted)]
    if not names:
        raise InputError(f"the trace has no {' or '.join(wanted)}: add it to the names that are traced")
    check_whole("k", k, 1)
    own = trace.logits.float().log_softmax(-1)  # (B, T, V)
    if k > own.shape[-1]:
        raise InputError(f"k={k} is more than the {own.shape[-1]} tokens of the vocabulary")
    best = own.argmax(-1, keepdim=True)
    lines = []
    for name in names:
        logits = logit_lens(model, trace[name]) if lens is None else lens(model, layer_of(name), trace[name])
        log_probs = logits.float().log_softmax(-1)
        top = log_probs.topk(k, -1)
        lines.append((
            top.indices,
            top.values.exp(),
            (log_probs > log_probs.gather(-1, best)).sum(-1) + 1,
            -(log_probs.exp() * log_probs).sum(-1),
            _divergence(own, log_probs),
        ))  # fmt: skip
    return LensTable(names, *(torch.stack(column) for column in zip(*lines, strict=True)))


def train_tuned_lens(
    model: GPT2,
    batches: Iterable[Inputs],
    *,
    lens: TunedLens | None = None,
    learning_rate: float = 1e-3,
    on_step: Callable[[int, float], object] = lambda step, loss: None,
) -> TunedLens:
    """Train a tuned lens, or `lens` further, with one step of Adam for each batch of ids or texts. The model is unchanged.

    The loss is the mean over layers and tokens of the divergence of the model's distribution from that of the lens, in nats;
    `on_step` gets the number of the step, from 1, and the loss. The lens has the model's dtype and device. A step with
    8 rows of 128 tokens of gpt2-tiny takes about 1.3 seconds of one core.
    """
    check_real("learning_rate", learning_rate, lambda rate: rate > 0, "a positive number")
    n_layer = len(model.h)
    if lens is None:
        lens = TunedLens(n_layer, model.config.n_embd).to(model.device, model.dtype)
    parameters = list(lens.parameters())
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    for step, batch in enumerate(batches, 1):
        found = trace(model, batch, "hook_resid_pre")
        tokens, own = found.mask, found.logits.float().log_softmax(-1)
        total = 0.0
        for layer in range(n_layer):  # one layer at a time, because the logits of all layers need much memory
            with torch.enable_grad():
                log_probs = lens(model, layer, found["hook_resid_pre", layer]).float().log_softmax(-1)
                loss = _divergence(own, log_probs)[tokens].mean() / n_layer
            own_parameters = list(lens.translators[layer].parameters())
            for parameter, gradient in zip(own_parameters, torch.autograd.grad(loss, own_parameters), strict=True):
                parameter.grad = gradient
            total += loss.item()
        optimizer.step()
        on_step(step, total)
    return lens


def _divergence(own: Tensor, log_probs: Tensor) -> Tensor:
    """The divergence of the distribution `log_probs` from `own`, both log-probabilities (..., V): (...)."""
    return (own.exp() * (own - log_probs)).sum(-1)


def lens_losses(model: GPT2, traces: Sequence[Trace], lens: TunedLens | None = None) -> Tensor:
    """Return the mean divergence, in nats, of the model's distribution from that of a lens, for each layer: (n_layer,).

    The traces need `hook_resid_pre`. Without `lens`, the lens is the logit lens.
    """
    sums = torch.zeros(len(model.h))
    n_tokens = 0
    with torch.no_grad():
        for one in traces:
            own = one.logits.float().log_softmax(-1)
            n_tokens += int(one.mask.sum())
            for layer in range(len(model.h)):
                stream = one["hook_resid_pre", layer]
                logits = logit_lens(model, stream) if lens is None else lens(model, layer, stream)
                sums[layer] += _divergence(own, logits.float().log_softmax(-1))[one.mask].sum().cpu()
    return sums / n_tokens
