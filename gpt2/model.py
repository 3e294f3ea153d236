"""GPT-2 as an `nn.Module`: the architecture only. Files and names are in `gpt2/pretrained.py`, text in `gpt2/generation`.

Sources: "Language Models are Unsupervised Multitask Learners" (Radford et al. 2019), section 2.3, and `src/model.py` of
OpenAI's gpt-2 repository. Parameters have the names and shapes of the published files.
B: batch, T: tokens of this call, S: cached tokens and T, C = n_embd, H = n_head, D = C / H, V = vocab_size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2.device import check_one_dtype
from gpt2.dropout import attention_with_dropout, dropout
from gpt2.kv_cache import KVCache, KVStore
from gpt2.positions import check_mask, positions_of, visible_slots
from gpt_config.errors import InputError, InputTypeError
from gpt_config.model_config import GPT2Config


def _tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_new": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "gelu_fast": _tanh_gelu,
    "gelu": F.gelu,
    "relu": F.relu,
}


class Conv1D(nn.Module):
    """A linear layer, y = x W + b, with W of shape (inputs, outputs) as in the published files.

    OpenAI wrote it as a convolution of width 1, hence the name. `nn.Linear` stores the transpose of W.
    """

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out))
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.t(), self.bias)


class TokenEmbedding(nn.Embedding):
    """The token embedding (V, C), used at the input and again as the head (tied weights)."""

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Return the dot product of `hidden_states` with each token's vector: (..., C) to (..., V)."""
        return F.linear(hidden_states, self.weight)


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a token attends to itself and to the tokens before it."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.layer, self.n_head, self.head_dim = layer, config.n_head, config.head_dim
        self.scale = 1 / math.sqrt(config.head_dim) if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1
        self.c_attn = Conv1D(config.n_embd, 3 * config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        self.attn_pdrop, self.resid_pdrop = config.attn_pdrop, config.resid_pdrop

    def forward(self, x: Tensor, mask: Tensor | None, store: KVStore | None) -> Tensor:
        """(B, T, C) to (B, T, C). `mask` (B or 1, 1, T, S) is True where a token attends; None is plain causal attention."""
        B, T, C = x.shape
        qkv = self.c_attn(x).split(C, dim=2)  # three of (B, T, C)
        q, k, v = (y.view(B, T, self.n_head, self.head_dim).transpose(1, 2) for y in qkv)  # (B, H, T, D) each
        if store is not None:
            k, v = store.append(self.layer, k, v)  # (B, H, S, D)
        if self.training and self.attn_pdrop:
            y = attention_with_dropout(q, k, v, mask, self.attn_pdrop, self.scale)  # (B, H, T, D)
        else:
            # A single token after stored ones attends to all of S. T is symbolic in torch.export, which has no store.
            is_causal = mask is None and (store is None or T > 1)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=self.scale)
        y = y.transpose(1, 2).reshape(B, T, C)  # (B, T, C)
        return dropout(self.c_proj(y), self.resid_pdrop, self.training)


class MLP(nn.Module):
    """The position-wise feed-forward network: n_embd to inner_dim, the activation, and back to n_embd."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.c_fc = Conv1D(config.n_embd, config.inner_dim)
        self.c_proj = Conv1D(config.inner_dim, config.n_embd)
        self.activation = ACTIVATIONS[config.activation_function]
        self.resid_pdrop = config.resid_pdrop

    def forward(self, x: Tensor) -> Tensor:
        return dropout(self.c_proj(self.activation(self.c_fc(x))), self.resid_pdrop, self.training)


class Block(nn.Module):
    """One layer: attention, then the MLP, each after a layer norm and added to the residual stream (section 2.3)."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Tensor | None, store: KVStore | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask, store)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT2(nn.Module):
    """GPT-2: embeddings, blocks, a final layer norm, and the token embedding again as the head.

    >>> model = GPT2(GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=2)).eval()
    >>> model(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 11])
    """

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.wte = TokenEmbedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self._init_weights()

    @torch.no_grad()
    def _init_weights(self) -> None:
        """Initialise as OpenAI did: normal weights with std initializer_range (half for positions), zero biases. `c_proj`
        writes to the residual stream, so it is scaled by 1/sqrt(2 n_layer), 2 n_layer being the additions (section 2.3)."""
        std = self.config.initializer_range
        nn.init.normal_(self.wte.weight, std=std)
        nn.init.normal_(self.wpe.weight, std=std / 2)
        for name, parameter in self.h.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=std / math.sqrt(2 * self.config.n_layer))
            elif name.endswith(("c_attn.weight", "c_fc.weight")):
                nn.init.normal_(parameter, std=std)

    def forward(self, input_ids: Tensor, *, attention_mask: Tensor | None = None, kv_cache: KVCache | None = None) -> Tensor:
        """Return the logits (B, T, V) of the token after each of `input_ids` (B, T), int64.

        `attention_mask` (B, S) is 1 for a token and 0 for padding, and includes the cached tokens; None means no padding.
        No token attends to padding, and positions count tokens only. A padded row therefore has the logits that it has
        without padding; logits at padding are undefined. With `kv_cache`, the tokens are appended to it. Raises InputError
        for ids outside the vocabulary, more than n_positions tokens, a mask of another shape, or a cache that does not fit.
        """
        length = 0 if kv_cache is None else kv_cache.length
        try:
            return self.logits(self.hidden_states(input_ids, attention_mask=attention_mask, kv_cache=kv_cache))
        except BaseException as error:
            if kv_cache is not None:
                kv_cache.length = length  # the head raised an error or was interrupted (Ctrl-C)
            if isinstance(error, RuntimeError):
                check_one_dtype(self)
            raise

    def hidden_states(
        self, input_ids: Tensor, *, attention_mask: Tensor | None = None, kv_cache: KVCache | None = None
    ) -> Tensor:
        """Return the input of the head, (B, T, C): the residual stream after `ln_f`. Arguments as for `forward`."""
        past = 0 if kv_cache is None else kv_cache.length
        self._check_shapes(input_ids, past, attention_mask)
        B, T = input_ids.shape
        if kv_cache is not None:
            kv_cache.check_fit(self.config, B, T, self.wpe.weight)
        positions = positions_of(past, T, attention_mask, input_ids.device)
        mask = visible_slots(past, T, attention_mask, input_ids.device)
        x = self.stream(self.embed(input_ids, positions), mask, kv_cache)
        if kv_cache is not None:
            kv_cache.advance(T)
        return x

    def embed(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Return the sum of the token embeddings of (B, T) and the position embeddings of (B, T) or (T,): (B, T, C)."""
        try:
            x = self.wte(input_ids) + self.wpe(positions)
        except IndexError:  # on the CPU only; on other devices, checking the ids would wait for the device in each call
            raise self._out_of_range(input_ids, positions) from None
        return dropout(x, self.config.embd_pdrop, self.training)

    def stream(self, x: Tensor, mask: Tensor | None, store: KVStore | None) -> Tensor:
        """Run all blocks and `ln_f`: (B, T, C) to (B, T, C). `mask` and `store` are those of `CausalSelfAttention`."""
        for block in self.h:
            x = block(x, mask, store)
        x = self.ln_f(x)
        return x

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Return the logits of hidden states, (..., C) to (..., V), computed with the token embedding."""
        return self.wte.logits(hidden_states)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.wpe.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the computation; quantized weights are stored in fewer bits."""
        return self.wpe.weight.dtype

    def set_dropout(self, rate: float) -> None:
        """Set all dropout rates of the config and of the layers; they apply in training mode."""
        self.config = dataclasses.replace(self.config, embd_pdrop=rate, attn_pdrop=rate, resid_pdrop=rate)
        for block in cast("list[Block]", self.h):
            block.attn.attn_pdrop = block.attn.resid_pdrop = block.mlp.resid_pdrop = rate

    def _check_shapes(self, input_ids: Tensor, past: int, attention_mask: Tensor | None) -> None:
        if not isinstance(input_ids, Tensor):
            raise InputTypeError(f"input_ids must be a tensor of shape (batch, tokens), not {type(input_ids).__name__}")
        shape, limit = tuple(input_ids.shape), self.config.n_positions
        if len(shape) != 2 or input_ids.dtype not in (torch.int64, torch.int32):
            raise InputError(f"input_ids has shape {shape} and dtype {input_ids.dtype}: it must be (batch, tokens) of int64")
        seen = past + shape[1]
        if attention_mask is None and seen > limit:
            raise InputError(f"{seen} tokens are more than the {limit} positions of this model: cut the input")
        if attention_mask is not None:
            check_mask(attention_mask, (shape[0], seen))

    def _out_of_range(self, input_ids: Tensor, positions: Tensor) -> InputError:
        vocab_size, limit = self.config.vocab_size, self.config.n_positions
        wrong = input_ids[(input_ids < 0) | (input_ids >= vocab_size)]
        if wrong.numel():
            return InputError.of_token(int(wrong[0]), vocab_size)
        return InputError(f"{positions.max() + 1} tokens are more than the {limit} positions of this model: cut the input")
