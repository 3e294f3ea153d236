"""The weights of single layers, packed for the fastest kernel. It depends on layers and torch's kernels, not on the model.

A product of few rows is limited by memory bandwidth, so the layout of the weights determines its speed. A product of many
rows is limited by arithmetic, so the dtype does. With weights packed by oneDNN, a single row of bfloat16 takes 2/3 of the
time of `F.linear`. Packed by fbgemm, which adds in float32, 2 to 32 rows of float16 take a quarter to 60%.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2.device import has_matrix_units
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

# Packed weights, kept between generations, because packing takes as long as dozens of tokens.
_packed: Derived[Tensor] = Derived()

# Parts of float16 weights; None: they cannot be packed.
_packed_float16: Derived[list[torch.ScriptObject] | None] = Derived()

# For each layer, whether `product_of_each` may multiply several rows in one product. It depends on the kind of the layer and
# on the number of threads, because these decide in which order oneDNN adds.
_same_rows: Derived[bool] = Derived()


def fast_linear(layer: Conv1D | Int8Linear, limits: FastLimits = FAST, *, is_lifted: bool = False) -> FastLinear:
    """Return the `FastLinear` of `layer`. With `is_lifted`, an int8 layer expects its input rows multiplied by LIFT.

    In float32 and float64, the results are equal to the layer's, bit for bit. In bfloat16 and float16 on a CPU the weights
    are packed, and sums may be rounded differently.
    """
    if isinstance(layer, Int8Linear):
        return _fast_int8(layer, is_lifted)
    if _can_pack(layer.weight, limits):
        return _fast_bfloat16(layer, layer.weight.t(), layer.bias.detach(), limits)
    parts = _float16_parts(layer, limits)
    if parts is not None:
        return FastLinear("float16", layer.weight, layer.bias.detach(), layer.weight.detach().t(), parts)
    # A bias of shape (1, n_out) is added slightly faster to a single row, with the same result.
    return FastLinear("float", layer.weight, layer.bias[None], layer.weight, None)


def fast_head(head: TokenEmbedding | Int8Embedding, limits: FastLimits = FAST) -> FastLinear:
    """Return the `FastLinear` that computes `head.logits` for rows (N, C)."""
    if isinstance(head, Int8Embedding):
        return fast_linear(head)
    if _can_pack(head.weight, limits):
        return _fast_bfloat16(head, head.weight, None, limits)
    parts = _float16_parts(head, limits)
    if parts is not None:
        return FastLinear("float16", head.weight, None, head.weight.detach(), parts)
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
def _fast_bfloat16(layer: nn.Module, weight: Tensor, bias: Tensor | None, limits: FastLimits) -> FastLinear:
    """Return the `FastLinear` of `weight` (n_out, n_in). With matrix units, any number of rows is computed in bfloat16."""

    def pack() -> Tensor:
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 1)
        return packed

    kind = "bfloat16" if uses_matrix_units(limits) else "bfloat16 or float32"
    packed = _packed.of(layer, state_with_contents(weight), pack)
    return FastLinear(kind, packed, bias, weight.detach(), None, limits.rows_for_float32)


@torch.no_grad()
def _float16_parts(layer: Conv1D | TokenEmbedding, limits: FastLimits) -> list[torch.ScriptObject] | None:
    """Return the weights of a float16 layer packed by fbgemm, in parts, or None if they cannot be packed."""
    if not _can_pack_float16(layer.weight, limits):
        return None
    weight = layer.weight.detach() if isinstance(layer, TokenEmbedding) else layer.weight.detach().t()  # (n_out, n_in)

    def pack() -> list[torch.ScriptObject] | None:
        if not bool(torch.isfinite(weight).all()):  # fbgemm would replace infinite weights by the largest number
            return None
        with packing(packing_engine() or ""):
            return [torch.ops.quantized.linear_prepack_fp16(rows.float(), None) for rows in weight.split(ROWS_OF_PART)]

    return _packed_float16.of(layer, state_with_contents(layer.weight), pack)


def pack_float16_together(model: nn.Module, limits: FastLimits) -> None:
    """Pack the float16 layers of a model, several at the same time, because packing a layer uses one thread only."""
    layers = [module for module in model.modules() if isinstance(module, (Conv1D, TokenEmbedding))]
    layers = [layer for layer in layers if layer not in _packed_float16 and _can_pack_float16(layer.weight, limits)]
    if len(layers) > 1:
        layers.sort(key=lambda layer: layer.weight.numel(), reverse=True)
        with packing(packing_engine() or ""), ThreadPoolExecutor(min(8, torch.get_num_threads())) as pool:
            list(pool.map(lambda layer: _float16_parts(layer, limits), layers))


@torch.no_grad()
def packed_float32(layer: nn.Module, linear: FastLinear) -> FastLinear:
    """Return the `FastLinear` of a float32 layer with weights packed by oneDNN: see `packed_rows`."""
    weight = linear.weight if linear.kind == "float head" else linear.weight.t()  # (n_out, n_in)

    def pack() -> Tensor:
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 8)
        return packed

    bias = None if linear.bias is None else linear.bias[0].detach()
    packed = _packed.of(layer, state_with_contents(linear.weight), pack)
    return linear._replace(kind="packed float32", weight=packed, bias=bias)


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
    if kind == "int8" or kind == "lifted int8":
        packed = layer.packed
        assert packed is not None
        return int8_product(x, packed, bias, kind == "lifted int8", layer.n_steps)
    if kind == "float16" or kind == "float16 row by row":
        return _float16_product(x, layer).to(x.dtype)
    if kind == "plain int8":
        return plain_int8_product(x, weight, layer.other, bias)
    if kind == "bfloat16 or float32" and x.size(0) >= layer.rows_for_float32:
        return F.linear(x.float(), layer.other.float(), None if bias is None else bias.float()).to(x.dtype)
    none: list[int | float | complex | None] = []
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", none, "")
    return y


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
    others = {"bfloat16": "bfloat16 or float32", "float16": "float16 row by row"}
    return linear._replace(kind=others.get(linear.kind, linear.kind))


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
    """Return whether oneDNN can pack this weight in bfloat16, which requires AVX-512 or newer instructions."""
    takes_bfloat16: Any = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    return limits.pack_bfloat16 and _onednn_packs(weight, torch.bfloat16) and bool(takes_bfloat16())


def _can_pack_float16(weight: Tensor, limits: FastLimits) -> bool:
    """Return whether fbgemm can pack this weight. It needs an x86 CPU with AVX2; torch will remove its operators."""
    return (
        limits.pack_float16
        and weight.dtype == torch.float16
        and weight.device.type == "cpu"
        and not weight.is_inference()  # an inference tensor has no version, so changes could not be detected
        and hasattr(torch.ops.quantized, "linear_prepack_fp16")
        and hasattr(torch.ops.quantized, "linear_dynamic_fp16")
        and packing_engine() in ("x86", "fbgemm")
    )


def can_pack_float32(weight: Tensor) -> bool:
    """Return whether oneDNN can pack this weight in float32."""
    return _onednn_packs(weight, torch.float32)


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
