"""What a layer multiplies by, arranged for the kernel that reads it fastest. It knows layers, not the model around them.

A product of few rows waits for the memory that the weights come from, so the layout of the weights decides its speed;
a product of many rows waits for the arithmetic, so its precision does.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2.device import has_matrix_units
from gpt2.fast.scripted import Scripted
from gpt2.model import Conv1D, TokenEmbedding
from gpt2.quantization.kernels import LIFT, int8_product, int8_product_of_each, plain_int8_product
from gpt2.quantization.layers import Int8Embedding, Int8Linear

# From so many rows on, a CPU without matrix units for bfloat16 is faster in float32, the conversion of the weights included.
_ROWS_FOR_FLOAT32 = 256


@dataclass  # not frozen, whose __init__ torch.compile does not follow
class FastLinear:
    """What a layer computes for rows (N, n_in), without the calls of a module: the arguments of `product`, which see; also
    for `each_alone`.

    In float32, float64 and float16 it computes the same bits as the layer. For bfloat16 on a CPU the weights are packed, and
    sums may be rounded elsewhere.
    """

    kind: str
    weight: Tensor
    bias: Tensor | None
    other: Tensor
    packed: list[Any]  # one object for the kernel of int8, else none

    def __call__(self, x: Tensor, *, each_alone: bool = False) -> Tensor:
        return scripted_product(x, self.kind, self.weight, self.bias, self.other, self.packed, 0, each_alone)


def fast_linear(layer: Conv1D | Int8Linear, *, is_lifted: bool = False) -> FastLinear:
    """What `layer` computes. With `is_lifted`, if it is in int8, of rows that come times LIFT."""
    if isinstance(layer, Int8Linear):
        packed = layer.packed_weight()
        if packed is None:
            scale = layer.scale / LIFT if is_lifted else layer.scale
            return FastLinear("plain int8", layer.weight_int8, layer.bias, scale, [])
        units_and_sums = layer.units_and_sums()
        other = layer.scale if units_and_sums is None else units_and_sums
        return FastLinear("lifted int8" if is_lifted else "int8", layer.weight_int8, layer.bias, other, [packed])
    if _can_pack(layer.weight):
        return _fast_bfloat16(layer, layer.weight.t(), layer.bias.detach())
    # A bias that is a row of a matrix is added to a single row a little faster, to the same bits.
    return FastLinear("float", layer.weight, layer.bias[None], layer.weight, [])


def fast_head(head: TokenEmbedding | Int8Embedding) -> FastLinear:
    """What `head.logits` computes for rows (N, C)."""
    if isinstance(head, Int8Embedding):
        return fast_linear(head)
    if _can_pack(head.weight):
        return _fast_bfloat16(head, head.weight, None)
    return FastLinear("float head", head.weight, None, head.weight, [])


def _fast_bfloat16(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> FastLinear:
    kind = "bfloat16" if has_matrix_units() else "bfloat16 or float32"
    return FastLinear(kind, _packed(layer, weight), bias, weight.detach(), [])


def fast_norm_and_linear(norm: nn.LayerNorm, layer: Conv1D | Int8Linear) -> tuple[Tensor, Tensor, FastLinear]:
    """The weight and bias of a norm and, for what comes out of it, what `layer` computes: together the same bits.

    The lift that int8 needs is in the weight and the bias here, instead of a product of its own.
    """
    if isinstance(layer, Int8Linear):
        return norm.weight.detach() * LIFT, norm.bias.detach() * LIFT, fast_linear(layer, is_lifted=True)
    return norm.weight, norm.bias, fast_linear(layer)


def product(
    x: Tensor,
    kind: str,
    weight: Tensor,
    bias: Tensor | None,
    other: Tensor,
    packed: list[torch.classes.quantized.LinearPackedParamsBase],  # type: ignore[name-defined]
    at: int,
    each_alone: bool,
    rows_for_float32: int = _ROWS_FOR_FLOAT32,  # a default, for TorchScript sees no other global
) -> Tensor:
    """A product of rows (N, n_in), in the part of Python that TorchScript knows. With `each_alone`, several rows get the
    bits that each would get alone, in int8 if the layer has `units_and_sums`, and for "bfloat16" if it `has_same_rows`. What
    the other arguments are, by `kind`:

    - "float": `weight` (n_in, n_out), `bias` (1, n_out). "float head": `weight` (n_out, n_in), no bias.
    - "bfloat16": `weight` as oneDNN packs it, `bias` (n_out,).
    - "bfloat16 or float32": the same, and for many rows `other`, the weight (n_out, n_in) itself.
    - "int8": `packed[at]`, which adds `bias` (n_out,); the layer's `units_and_sums` in `other`, for `each_alone`.
      "lifted int8": the same, of rows that come times LIFT.
    - "plain int8", where there is no kernel: `weight` (n_out, n_in), `bias` (n_out,), the weight's scales in `other`.
    """
    if each_alone and x.size(0) > 1:
        if kind in ("int8", "lifted int8"):
            return int8_product_of_each(x, packed[at], bias, other, kind == "lifted int8")
        if kind != "bfloat16":
            rows = [_product(row, kind, weight, bias, other, packed, at, rows_for_float32) for row in x.split(1)]
            return torch.cat(rows)
    return _product(x, kind, weight, bias, other, packed, at, rows_for_float32)


def _product(
    x: Tensor,
    kind: str,
    weight: Tensor,
    bias: Tensor | None,
    other: Tensor,
    packed: list[torch.classes.quantized.LinearPackedParamsBase],  # type: ignore[name-defined]
    at: int,
    rows_for_float32: int,
) -> Tensor:
    if kind == "float":
        assert bias is not None
        return torch.addmm(bias, x, weight)
    if kind == "float head":
        return F.linear(x, weight)
    if kind in ("int8", "lifted int8"):
        return int8_product(x, packed[at], bias, kind == "lifted int8")
    if kind == "plain int8":
        return plain_int8_product(x, weight, other, bias)
    if kind == "bfloat16 or float32" and x.size(0) >= rows_for_float32:
        return F.linear(x.float(), other.float(), None if bias is None else bias.float()).to(x.dtype)
    # Packed by oneDNN: two thirds of the time of F.linear for a single row.
    none: list[int | float | complex | None] = []
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", none, "")


scripted_product = Scripted(product)

# By kind, shape and threads, for by these oneDNN chooses the order in which it adds up.
_same_rows: dict[tuple[str, torch.Size, int], bool] = {}


def has_same_rows(layer: FastLinear) -> bool:
    """Whether what oneDNN packed gives several rows the bits that each would get alone, as matrix units often do.

    Asked by one row, several times: a bias takes the result away and leaves its errors, which another order makes others.
    """
    key = layer.kind, layer.other.shape, torch.get_num_threads()
    if key not in _same_rows:
        n_in = layer.other.shape[1]
        with torch.inference_mode():
            row = torch.randn(1, n_in, generator=torch.Generator().manual_seed(0)).to(layer.other.dtype)
            example = replace(layer, bias=None)
            example.bias = -example(row)[0]
            alone = example(row)
            together = [example(row.expand(rows, n_in).contiguous()) for rows in (2, 3, 5, 9, 17)]  # as with drafts
        _same_rows[key] = n_in % 64 == 0 and all(bool((rows == alone).all()) for rows in together)
    return _same_rows[key]


def _can_pack(weight: Tensor) -> bool:
    """Whether oneDNN takes it, which without AVX-512 or newer instructions it does not. The operators are private to torch;
    where they are missing, nothing is packed."""
    takes_bfloat16 = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    return (
        weight.dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and not weight.is_inference()  # it has no version, by which a change would be noticed
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and takes_bfloat16()
    )


# Packing takes as long as dozens of tokens, so it is kept for the next generation: by layer, with the state of its weights.
_kept: weakref.WeakKeyDictionary[nn.Module, tuple[object, Tensor]] = weakref.WeakKeyDictionary()


@torch.no_grad()
def _packed(layer: nn.Module, weight: Tensor) -> Tensor:
    state, kept = state_of(weight), _kept.get(layer)
    if kept is None or kept[0] != state:
        kept = _kept[layer] = state, torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 1)
    return kept[1]


def state_of(weight: Tensor) -> object:
    """Differs when the weights do. Their version misses what is written through `weight.data`; sums of their bytes, eight
    at a time as whole numbers, do not. Only where values change places within a row is nothing seen."""
    matrix = weight.t() if weight.t().is_contiguous() else weight.contiguous()
    n_rows, n_bytes, offset = len(matrix), matrix.shape[1] * matrix.itemsize, matrix.storage_offset() * matrix.itemsize
    numbers = matrix.reshape(-1).view(torch.uint8 if n_bytes % 8 or offset % 8 else torch.int64)
    sums = numbers.view(n_rows, -1).sum(1, dtype=torch.int64)
    odd = torch.arange(1, 2 * len(sums), 2)  # so that no bit is multiplied out of the number
    return weight.data_ptr(), weight._version, (sums * odd).sum().item()
