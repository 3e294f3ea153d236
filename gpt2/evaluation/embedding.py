"""One vector for each text: the hidden states of a layer, pooled over its tokens. It knows models and texts, not files.

GPT-2 was trained to predict tokens, not to compare texts, so its vectors are a baseline. A token sees only the tokens before
it: the last one is the only one that has read the whole text, and the mean is mostly of tokens that have read a part.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gpt2.dropout import in_mode
from gpt2.fast.threads import step
from gpt2.model import GPT2
from gpt2.weights.tokenizer import check_ids
from gpt_config.errors import CheckpointError, ConfigError, GPT2Warning, InputError, InputTypeError
from gpt_config.validation import check_choice, check_whole
from gpt_encoder.interface import Tokenizer

POOLINGS = ("mean", "last")


def embed(
    model: GPT2,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    pooling: str = "mean",
    layer: int = -1,
    normalize: bool = False,
    batch_size: int = 32,
) -> Tensor:
    """Return a vector for each text: (N, C), float32, on the CPU, for N texts and the model's width C.

    `pooling` is "mean", over the hidden states of all tokens, or "last", that of the last token. `layer` counts as
    transformers' `hidden_states`: 0 is the sum of the embeddings, i the residual stream after block i, and the last one,
    n_layer or -1, is after `ln_f`. `normalize` scales each vector to length 1, so that a product of two is their cosine. The
    vectors do not depend on `batch_size`, up to rounding. Dropout is off in either mode of the model.

    An empty text is the model's bos token. Of a text with more tokens than the model has positions, only the first ones are
    read; a GPT2Warning counts such texts. ConfigError for another pooling, layer or batch size. InputError for an empty text
    if the model has no bos token. CheckpointError if the model computes NaN.

    >>> from gpt2 import GPT2
    >>> from gpt_encoder import load_tokenizer
    >>> model, tokenizer = GPT2.from_pretrained("gpt2-tiny"), load_tokenizer("gpt2-tiny")
    >>> embed(model, tokenizer, ["The cat sat.", "A dog ran."], normalize=True).shape
    torch.Size([2, 256])
    """
    if isinstance(texts, str):
        raise InputTypeError("texts must be a list of strings, not one string: put it into a list")
    rows = [text_ids(model, tokenizer, text, f"text {number}") for number, text in enumerate(texts, 1)]
    return embed_ids(model, rows, pooling=pooling, layer=layer, normalize=normalize, batch_size=batch_size)


def text_ids(model: GPT2, tokenizer: Tokenizer, text: str, name: str) -> list[int]:
    """Return the ids of a text, the model's bos token if it is empty. The message of an InputError begins with `name`."""
    try:
        ids = tokenizer.encode(text)
        check_ids(ids, tokenizer, model.config.vocab_size)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    if not ids and model.config.bos_token_id is None:
        raise InputError(f"{name} is empty, and this model has no token to begin with: leave it out, or give it a text")
    return ids or [int(model.config.bos_token_id or 0)]


@torch.no_grad()  # not inference_mode, whose tensors cannot be used to train another model
def embed_ids(
    model: GPT2,
    rows: Sequence[Sequence[int]],
    *,
    pooling: str = "mean",
    layer: int = -1,
    normalize: bool = False,
    batch_size: int = 32,
    progress: Callable[[int], object] = lambda n_rows: None,
) -> Tensor:
    """Return `embed` of rows of ids, each with at least one. `progress` is called with the number of rows of each batch."""
    check_whole("batch_size", batch_size, 1)
    check_choice("pooling", pooling, POOLINGS)
    n_blocks, limit = _n_blocks(layer, len(model.h)), model.config.n_positions
    if long := [number for number, row in enumerate(rows, 1) if len(row) > limit]:
        warnings.warn(
            f"{len(long)} of {len(rows)} texts are longer than the {limit} positions of this model (the first is text "
            f"{long[0]}): only their first {limit} tokens are read",
            GPT2Warning,
            3,
        )
    vectors = torch.zeros(len(rows), model.config.n_embd)
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]), reverse=True)  # for less padding
    with in_mode(model, is_training=False):
        for start in range(0, len(rows), batch_size):
            places = order[start : start + batch_size]
            pooled = _pooled(model, [rows[place][:limit] for place in places], n_blocks, pooling)  # (B, C)
            vectors[places] = (unit_length(pooled) if normalize else pooled).float()
            progress(len(places))
    _check_finite(vectors)
    return vectors


def unit_length(vectors: Tensor) -> Tensor:
    """Return vectors (..., C) scaled to length 1; zeros stay zeros. CheckpointError for NaN."""
    _check_finite(vectors)
    lengths: Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / lengths.clamp(min=1e-12)


def _pooled(model: GPT2, rows: Sequence[Sequence[int]], n_blocks: int, pooling: str) -> Tensor:
    """The vectors (B, C) of rows, on the CPU. Padding comes after the tokens, so causal attention does not see it."""
    lengths = torch.tensor([len(row) for row in rows], device=model.device)
    width = int(lengths.max())
    input_ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=model.device)  # (B, T)
    positions = torch.arange(width, device=model.device)
    n_tokens = len(rows) * width
    with step((id(model), "embed", n_tokens.bit_length()), model.device, work=n_tokens):
        x = model.embed(input_ids, positions)  # (B, T, C)
        for block in model.h[:n_blocks]:
            x = block(x, None, None)
        if n_blocks == len(model.h):
            x = model.ln_f(x)
    x = x.to(torch.float32 if x.device.type == "mps" else torch.float64)  # MPS has no float64
    if pooling == "last":
        return x[torch.arange(len(rows), device=x.device), lengths - 1].cpu()
    is_padding = positions >= lengths[:, None]  # (B, T)
    return (x.masked_fill(is_padding[..., None], 0).sum(1) / lengths[:, None]).cpu()


def _n_blocks(layer: int, n_layer: int) -> int:
    """The number of blocks before the hidden states of `layer`."""
    if isinstance(layer, bool) or not isinstance(layer, int) or not -n_layer - 1 <= layer <= n_layer:
        raise ConfigError(
            f"layer={layer!r} must be a whole number from 0 (the embeddings) to {n_layer} (the last one), or from -1 to "
            f"{-n_layer - 1} from the end",
            field="layer",
        )
    return layer if layer >= 0 else n_layer + 1 + layer


def _check_finite(vectors: Tensor) -> None:
    if not bool(torch.isfinite(vectors).all()):
        raise CheckpointError("the model computes NaN for this text: use float32, or other weights")
