"""The weights of single layers, packed for the fastest kernel. It depends on layers and torch's kernels, not on the model.

A product of few rows is limited by memory bandwidth, so the layout of the weights determines its speed. A product of many
rows is limited by arithmetic, so the dtype does. With weights packed by oneDNN, a single row of bfloat16 takes 2/3 of the
time of `F.linear`. Packed by fbgemm, which adds in float32, 2 to 32 rows of float16 take a quarter to 60%. With the numbers
of bfloat16 in float16, fbgemm takes 70% of oneDNN's time for a single row on an EPYC with AVX-512. With AMX both are equal.
With AVX-512 FP16, torch's own product of 128 to 512 rows of float16 takes three quarters of fbgemm's time. With AMX, GELU
applied by oneDNN to what a product adds up takes a fifth of the time of torch's, for 64 rows of bfloat16 and more.

MKL multiplies float32 slowly on AMD processors. On an EPYC with AVX-512, the products of a step of
124M take 60% of its time for one row, as a batch of parts, and half of it for 2 to 512 rows, with oneDNN (see `avoids_mkl`).
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2.device import has_bfloat16_units, has_float16_units, has_matrix_units, mkl_is_slow
from gpt2.fast.limits import FAST, FastLimits
from gpt2.fast.plan_parts import FastLinear, Norm
from gpt2.fast.scripted import Scripted
from gpt2.model import Conv1D, TokenEmbedding
from gpt2.quantization import rounding
from gpt2.quantization.derived import Derived, state_with_contents
from gpt2.quantization.kernels import (
    ROWS_OF_PART,
    int8_product,
    int8_product_of_each,
    packing,
    packing_engine,
    plain_int8_product,
)
from gpt2.quantization.layers import Int8Embedding, Int8Linear

# A product of one row in float32 is computed as this many products, which MKL distributes over the threads.
N_PARTS = 8

# Kinds whose weights can be packed for several rows: see `packed_for_rows`.
PLAIN_FOR_ROWS = {"float", "float head", "float without MKL", "float head without MKL", "bfloat16 by float16"}

# Packed weights, kept between generations, because packing takes as long as dozens of tokens.
_packed: Derived[Tensor] = Derived()

# Parts of float16 weights; None: they cannot be packed.
_packed_float16: Derived[list[torch.ScriptObject] | None] = Derived()

# For each layer, whether `product_of_each` may multiply several rows in one product. It depends on the kind of the layer and
# on the number of threads, because these decide in which order oneDNN adds.
_same_rows: Derived[bool] = Derived()


def fast_linear(layer: Conv1D | Int8Linear, limits: FastLimits = FAST, *, is_lifted: bool = False) -> FastLinear:
    """Return the `FastLinear` of `layer`. With `is_lifted`, an int8 layer expects its input rows multiplied by LIFT.

    In float32 and float64, the results are equal to the layer's, bit for bit, if not `avoids_mkl`. In bfloat16 and float16
    on a CPU the weights are packed, and sums may be rounded differently.
    """
    if isinstance(layer, Int8Linear):
        return _fast_int8(layer, is_lifted)
    few_bits = _fast_few_bits(layer, layer.weight.t(), layer.bias.detach(), limits)
    if few_bits is not None:
        return few_bits
    # A bias of shape (1, n_out) is added slightly faster to a single row, with the same result.
    if avoids_mkl(layer.weight, limits) and layer.weight.shape[0] % N_PARTS == 0:
        parts = layer.weight.detach().view(N_PARTS, -1, layer.weight.shape[1])  # (parts, n_in / parts, n_out)
        return FastLinear("float without MKL", layer.weight, layer.bias[None], parts, None)
    return FastLinear("float", layer.weight, layer.bias[None], layer.weight, None)


def fast_head(head: TokenEmbedding | Int8Embedding, limits: FastLimits = FAST) -> FastLinear:
    """Return the `FastLinear` that computes `head.logits` for rows (N, C)."""
    if isinstance(head, Int8Embedding):
        return fast_linear(head)
    few_bits = _fast_few_bits(head, head.weight, None, limits)
    if few_bits is not None:
        return few_bits
    if avoids_mkl(head.weight, limits):
        V, C = head.weight.shape
        parts = head.weight.detach()[: V - V % N_PARTS].view(N_PARTS, -1, C).transpose(1, 2)  # (parts, C, V / parts)
        return FastLinear("float head without MKL", head.weight, None, parts, None)
    return FastLinear("float head", head.weight, None, head.weight, None)


def fast_norm_and_linear(
    norm: nn.LayerNorm, layer: Conv1D | Int8Linear, limits: FastLimits = FAST
) -> tuple[Norm, FastLinear]:
    """Return a norm and the `FastLinear` of the layer after it. Together they give the bits of `layer(norm(x))`.

    For int8, the weight and the bias of the norm are multiplied by LIFT, which saves a separate product.
    """
    if isinstance(layer, Int8Linear):
        lifted = Norm(norm.weight.detach() * rounding.LIFT, norm.bias.detach() * rounding.LIFT, float(norm.eps))
        return lifted, fast_linear(layer, limits, is_lifted=True)
    return Norm(norm.weight, norm.bias, float(norm.eps)), fast_linear(layer, limits)


def _fast_int8(layer: Int8Linear, is_lifted: bool) -> FastLinear:
    packed = layer.packed_weight()
    if packed is None:
        scale = layer.scale / rounding.LIFT if is_lifted else layer.scale
        return FastLinear("plain int8", layer.weight_int8, layer.bias, scale, None)
    units_and_sums = layer.units_and_sums()
    other = layer.scale if units_and_sums is None else units_and_sums
    kind = "lifted int8" if is_lifted else "int8"
    return FastLinear(kind, layer.weight_int8, layer.bias, other, packed, n_steps=layer.n_steps)


@torch.no_grad()
def _fast_few_bits(
    layer: Conv1D | TokenEmbedding, weight: Tensor, bias: Tensor | None, limits: FastLimits
) -> FastLinear | None:
    """Return the `FastLinear` of `weight` (n_out, n_in) in 16 bits, or None if no kernel is faster than torch's products."""
    weight = weight.detach()
    parts, has_onednn = _float16_parts(layer, limits), _can_pack(weight, limits)
    if not has_onednn:
        is_fast = weight.dtype == torch.float16 and has_float16_units()
        many_rows = limits.rows_for_own_float16 if is_fast else sys.maxsize
        return None if parts is None else FastLinear("float16", weight, bias, weight, parts, many_rows)
    is_fast = has_bfloat16_units() if limits.matrix_units is None else limits.matrix_units
    many_rows = sys.maxsize if is_fast else limits.rows_for_float32
    if parts is not None:
        return FastLinear("bfloat16 by float16", weight, bias, weight, parts, many_rows, limits.rows_to_activate)
    return FastLinear(
        "bfloat16", _packed_by_onednn(layer, weight, 1), bias, weight, None, many_rows, limits.rows_to_activate
    )


def _packed_by_onednn(layer: nn.Module, weight: Tensor, n_rows: int) -> Tensor:
    """Return `weight` (n_out, n_in) of a layer in oneDNN's layout for that many rows."""

    def pack() -> Tensor:
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), n_rows)
        return packed

    return _packed.of(layer, state_with_contents(weight), pack)


@torch.no_grad()
def _float16_parts(layer: Conv1D | TokenEmbedding, limits: FastLimits) -> list[torch.ScriptObject] | None:
    """Return the weights of a layer in 16 bits packed by fbgemm, in parts, or None if they cannot be packed.

    Numbers of bfloat16 are the same in float16 between 6e-5 and 65504, and smaller ones within 3e-8.
    """
    if not _can_pack_float16(layer.weight, limits):
        return None
    weight = layer.weight.detach() if isinstance(layer, TokenEmbedding) else layer.weight.detach().t()  # (n_out, n_in)

    def pack() -> list[torch.ScriptObject] | None:
        # fbgemm would replace larger numbers by the largest one. NaN is not smaller than it either.
        if not all(bool(bound.abs() <= torch.finfo(torch.float16).max) for bound in torch.aminmax(weight)):
            return None
        with packing(packing_engine() or ""):
            return [torch.ops.quantized.linear_prepack_fp16(rows.float(), None) for rows in weight.split(ROWS_OF_PART)]

    return _packed_float16.of(layer, state_with_contents(layer.weight), pack)


def pack_float16_together(model: nn.Module, limits: FastLimits) -> None:
    """Pack the layers of a model in 16 bits, several at the same time, because packing a layer uses one thread only."""
    layers = [module for module in model.modules() if isinstance(module, (Conv1D, TokenEmbedding))]
    layers = [layer for layer in layers if layer not in _packed_float16 and _can_pack_float16(layer.weight, limits)]
    if len(layers) > 1:
        layers.sort(key=lambda layer: layer.weight.numel(), reverse=True)
        with packing(packing_engine() or ""), ThreadPoolExecutor(min(8, torch.get_num_threads())) as pool:
            list(pool.map(lambda layer: _float16_parts(layer, limits), layers))


@torch.no_grad()
def packed_for_rows(layer: nn.Module, linear: FastLinear) -> FastLinear:
    """Return the `FastLinear` of a layer with weights packed by oneDNN for several rows: see `packed_rows`."""
    if linear.kind == "bfloat16 by float16":
        return linear._replace(weight=_packed_by_onednn(layer, linear.other, 8))
    weight = linear.weight if linear.bias is None else linear.weight.t()  # (n_out, n_in)
    bias = None if linear.bias is None else linear.bias[0].detach()
    return linear._replace(kind="packed float32", weight=_packed_by_onednn(layer, weight.detach(), 8), bias=bias)


def is_kept_packed(layer: nn.Module) -> bool:
    """Return whether there are packed weights of this layer, perhaps of another state."""
    return layer in _packed


def uses_matrix_units(limits: FastLimits) -> bool:
    """Return `limits.matrix_units`, or whether the processor has matrix units if that is None."""
    return has_matrix_units() if limits.matrix_units is None else limits.matrix_units


def product(x: Tensor, layer: FastLinear) -> Tensor:
    """Return the layer's result (N, n_out) of rows `x` (N, n_in). It is written in the subset of Python of TorchScript."""
    kind, weight, bias = layer.kind, layer.weight, layer.bias
    if kind == "float":
        assert bias is not None
        return torch.addmm(bias, x, weight)
    if kind == "float head":
        return F.linear(x, weight)
    if kind == "float without MKL":
        assert bias is not None
        if x.size(0) > 1:
            return _onednn_product(x, weight.t(), bias[0])
        parts = torch.bmm(x.view(layer.other.size(0), 1, -1), layer.other)  # (parts, 1, n_out)
        return parts.sum(0).add_(bias)  # (1, n_out)
    if kind == "float head without MKL":
        return _onednn_product(x, weight, None) if x.size(0) > 1 else _logits_without_mkl(x, weight, layer.other)
    if kind == "int8" or kind == "lifted int8":
        packed = layer.packed
        assert packed is not None
        return int8_product(x, packed, bias, kind == "lifted int8", layer.n_steps)
    if kind == "float16" or kind == "float16 row by row" or (kind == "bfloat16 by float16" and x.size(0) == 1):
        return _float16_product(x, layer).to(x.dtype) if x.size(0) < layer.many_rows else F.linear(x, layer.other, bias)
    if kind == "plain int8":
        return plain_int8_product(x, weight, layer.other, bias)
    if kind != "packed float32" and x.size(0) >= layer.many_rows:
        return F.linear(x.float(), layer.other.float(), None if bias is None else bias.float()).to(x.dtype)
    return _onednn_product(x, weight, bias)


def activated_product(x: Tensor, layer: FastLinear, activation: str) -> Tensor:
    """Return `activated(product(x, layer), activation)`. Many rows in bfloat16 are rounded once instead of twice."""
    if activation != "relu" and x.size(0) >= layer.rows_to_activate and x.size(0) < layer.many_rows:
        return _onednn_product(x, layer.weight, layer.bias, activation)
    return activated(product(x, layer), activation)


def activated(x: Tensor, activation: str) -> Tensor:
    """Return the activation that `BlockParts` names, applied to `x`."""
    return F.relu(x) if activation == "relu" else F.gelu(x, approximate=activation)


def _onednn_product(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: str = "") -> Tensor:
    """Return the product, followed by GELU if `gelu` names its approximation: "tanh" or "none"."""
    none: list[int | float | complex | None] = []
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu" if gelu else "none", none, gelu)
    return y


def _logits_without_mkl(x: Tensor, weight: Tensor, parts: Tensor) -> Tensor:
    """Return the logits (1, V) of `x` (1, C). `parts` (parts, C, V / parts) are the first rows of `weight` (V, C)."""
    y = torch.bmm(x.expand(parts.size(0), 1, x.size(1)), parts).view(1, -1)  # (1, V without the rest)
    rest = weight.size(0) - y.size(1)
    return y if rest == 0 else torch.cat([y, F.linear(x, weight.narrow(0, y.size(1), rest))], 1)


def _float16_product(x: Tensor, layer: FastLinear) -> Tensor:
    """Return the result in float32 of a layer that fbgemm has packed."""
    packed, bias, x = layer.packed, layer.bias, x.float()
    assert packed is not None
    if len(packed) == 1:
        y: Tensor = torch.ops.quantized.linear_dynamic_fp16(x, packed[0])
    else:
        y = torch.cat([torch.ops.quantized.linear_dynamic_fp16(x, part) for part in packed], 1)
    return y if bias is None else y.add_(bias)


def product_of_each(x: Tensor, layer: FastLinear) -> Tensor:
    """Like `product`; each row has the same bits as in a product of this row only.

    In int8 this requires the layer's `units_and_sums`. For the kinds "bfloat16" and "float16" it requires `has_same_rows`.
    """
    if x.size(0) == 1 or layer.kind == "bfloat16" or layer.kind == "float16":
        return product(x, layer)
    if layer.kind == "int8" or layer.kind == "lifted int8":
        packed = layer.packed
        assert packed is not None
        return int8_product_of_each(x, packed, layer.bias, layer.other, layer.kind == "lifted int8", layer.n_steps)
    return torch.cat([product(row, layer) for row in x.split(1)])


scripted_product = Scripted(product)
scripted_product_of_each = Scripted(product_of_each)


def one_by_one(linear: FastLinear) -> FastLinear:
    """Return the same layer with a kind whose rows `product_of_each` multiplies one by one."""
    return linear._replace(kind=f"{linear.kind} row by row") if linear.kind in ("bfloat16", "float16") else linear


def of_each(linear: FastLinear) -> FastLinear:
    """Return the layer whose products of several rows `product_of_each` computes, by the kernel of a single row."""
    kind = "float16" if linear.kind == "bfloat16 by float16" else linear.kind
    return linear._replace(kind=kind, many_rows=sys.maxsize)


def has_same_rows(layer: nn.Module, linear: FastLinear) -> bool:
    """Return whether each of several rows has the bits of a product of this row only, as with fbgemm, and often with oneDNN.

    With oneDNN it depends on the processor.
    """
    of_layer = _packed_float16.state(layer) if linear.kind == "float16" else _packed.state(layer)
    state = of_layer, linear.kind, torch.get_num_threads()
    return _same_rows.of(layer, state, lambda: _multiplies_rows_alike(linear))


@torch.inference_mode()
def _multiplies_rows_alike(linear: FastLinear) -> bool:
    """Test `has_same_rows` by multiplying the same row several times.

    A bias subtracts the result and leaves its rounding error, which depends on the order of additions. Products of float16
    are compared in float32.
    """
    n_in = linear.other.shape[1]
    if linear.kind == "float16":
        x = torch.randn(17, n_in, generator=torch.Generator().manual_seed(0), dtype=torch.float32).half()
        each = torch.cat([_float16_product(row, linear) for row in x.split(1)])
        return all(torch.equal(_float16_product(x[:rows], linear), each[:rows]) for rows in (2, 3, 5, 9, 17))
    row = torch.randn(1, n_in, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(linear.other.dtype)
    example = linear._replace(bias=None)
    example = example._replace(bias=-product(row, example)[0])
    alone = product(row, example)
    # The numbers of rows of a step with 1, 2, 4, 8 or 16 drafts.
    together = [product(row.expand(rows, n_in).contiguous(), example) for rows in (2, 3, 5, 9, 17)]
    return n_in % 64 == 0 and all(bool((rows == alone).all()) for rows in together)


def _can_pack(weight: Tensor, limits: FastLimits) -> bool:
    """Return whether oneDNN can multiply this weight in bfloat16, which requires AVX-512 or newer instructions."""
    takes_bfloat16: Any = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    return limits.pack_bfloat16 and _onednn_packs(weight, torch.bfloat16) and bool(takes_bfloat16())


def _can_pack_float16(weight: Tensor, limits: FastLimits) -> bool:
    """Return whether fbgemm can pack this weight, and multiply it faster than oneDNN.

    It needs an x86 CPU with AVX2; torch will remove its operators.
    """
    pays: bool | None = weight.dtype == torch.float16
    if weight.dtype == torch.bfloat16 and not (limits.few_tokens and _can_pack(weight, limits)):
        pays = limits.bfloat16_by_float16
    return (
        limits.pack_float16
        and (not uses_matrix_units(limits) if pays is None else pays)
        and weight.device.type == "cpu"
        and not weight.is_inference()  # an inference tensor has no version, so changes could not be detected
        and hasattr(torch.ops.quantized, "linear_prepack_fp16")
        and hasattr(torch.ops.quantized, "linear_dynamic_fp16")
        and packing_engine() in ("x86", "fbgemm")
    )


def avoids_mkl(weight: Tensor, limits: FastLimits) -> bool:
    """Return whether products of this weight in float32 are faster without `addmm`, because of whose processor it is.

    MKL's product of one row uses one thread there, and its product of several rows half of the processor's speed. Small
    weights stay in the processor's cache, where the parts of a product cost more than they save.
    """
    avoids = mkl_is_slow() if limits.avoid_mkl is None else limits.avoid_mkl
    is_large = weight.nbytes >= limits.min_bytes_without_mkl and weight.shape[0] >= N_PARTS
    return avoids and is_large and _onednn_packs(weight, torch.float32)


def can_pack_for_rows(weight: Tensor) -> bool:
    """Return whether oneDNN can pack this weight for several rows."""
    return _onednn_packs(weight, torch.float32) or _can_pack(weight, FAST)


def _onednn_packs(weight: Tensor, dtype: torch.dtype) -> bool:
    """Return whether this weight has the dtype and can be packed. torch's operators are private and may be missing."""
    return (
        weight.dtype == dtype
        and weight.device.type == "cpu"
        and not weight.is_inference()  # an inference tensor has no version, so changes could not be detected
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
