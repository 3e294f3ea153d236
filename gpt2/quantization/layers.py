"""int8 layers that replace `Conv1D` and `TokenEmbedding`. They depend on the kernels, not on a model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2.quantization import rounding
from gpt2.quantization.derived import Derived, state_of
from gpt2.quantization.kernels import (
    ENGINES,
    input_steps,
    int8_product,
    int8_product_of_each,
    multiplies_given_steps,
    pack,
    packing,
    packing_engine,
    plain_int8_product,
    product_of_steps,
)
from gpt_config.errors import DeviceError

_packed: Derived[list[torch.ScriptObject] | None] = Derived()
_units_and_sums: Derived[Tensor | None] = Derived()


class Int8Linear(nn.Module):
    """y = x W^T + b for x (..., n_in) float32, with W = weight_int8 (n_out, n_in) * scale (n_out,).

    On a CPU, the first of `engines` that torch has computes it. If there is none, it is computed in float32.
    """

    weight_int8: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight_int8: Tensor, scale: Tensor, bias: Tensor | None, *, engines: Sequence[str] = ENGINES) -> None:
        super().__init__()
        self.engines = tuple(engines)
        self.register_buffer("weight_int8", weight_int8)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        packed, rows = self.packed_weight(), x.reshape(-1, x.shape[-1])  # (N, n_in)
        if packed is None:
            y = plain_int8_product(rows, self.weight_int8, self.scale, self.bias)
        else:
            y = int8_product(rows, packed, self.bias, False, self.n_steps)
        return y.view(*x.shape[:-1], -1)  # (..., n_out)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Refuse another dtype, as from `model.half()`, before any tensor of the model has changed: `wte` comes first."""
        dtype = fn(torch.empty(0, dtype=torch.float32, device=self.scale.device)).dtype
        if dtype != torch.float32:
            name = str(dtype).removeprefix("torch.")
            raise DeviceError(
                f"an int8 model computes in float32, not in {name}: load the model before quantization in {name}"
            )
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def packed_weight(self) -> list[torch.ScriptObject] | None:
        """Return the weights packed for the CPU's kernel, in parts, or None if there is no such kernel."""
        if self.weight_int8.device.type != "cpu":
            return None
        return _packed.of(self, state_of(self.weight_int8, self.scale, self.bias), self._pack)

    def _pack(self) -> list[torch.ScriptObject] | None:
        engine = packing_engine(self.engines)
        return None if engine is None else pack(self.weight_int8, self.scale, self.bias, engine)

    @property
    def n_steps(self) -> int:
        """The number of steps to which the CPU's kernel rounds inputs; 0 if there is no such kernel."""
        engine = packing_engine(self.engines)
        return 0 if engine is None else input_steps(engine)

    @property
    def is_packed(self) -> bool:
        """Whether `packed_weight` has been called before."""
        return self in _packed

    def units_and_sums(self) -> Tensor | None:
        """Return what `int8_product_of_each` needs of the packed weights, (2, n_out): scales, and sums of the int8 rows.

        None if its results would differ from those of single rows: with other kernels, or with a bias so large that the
        weights are lost in rounding.
        """
        packed = self.packed_weight()
        if packed is None:
            return None
        return _units_and_sums.of(self, _packed.state(self), lambda: self._units_and_sums_of(packed))

    def _units_and_sums_of(self, packed: list[torch.ScriptObject]) -> Tensor | None:
        return self._find_units_and_sums(packed) if rounds_each_alone(self.engines) else None

    def _find_units_and_sums(self, packed: list[torch.ScriptObject]) -> Tensor | None:
        units = (self.scale.double() / rounding.LIFT).float()
        if self.bias is not None and bool((self.bias.abs() > rounding.LARGEST_BIAS * units).any()):
            return None
        ones = torch.ones(1, self.weight_int8.shape[1], dtype=torch.float32, device="cpu")
        sums = product_of_steps(ones, packed)
        if self.bias is not None:
            sums -= self.bias
        return torch.stack([units, sums[0].div_(units).round_()])


class Int8Embedding(Int8Linear):
    """The token embedding (V, C) in int8, with a scale for each token. It is also the head, like `TokenEmbedding`."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return F.embedding(input_ids, self.weight_int8) * F.embedding(input_ids, self.scale[:, None])

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Return the logits of hidden states: (..., C) to (..., V)."""
        return super().forward(hidden_states)


def rounds_each_alone(engines: Sequence[str] = ENGINES) -> bool:
    """Return whether `int8_product_of_each` is available, and gives the bits of single rows with this build of torch."""
    return multiplies_given_steps(engines) and _rounds_alike()


def gives_the_bits_of_each() -> bool:
    """Return whether `int8_product_of_each` gives the bits of single rows for an example.

    It depends on where the build of torch uses fused multiply-add instructions.
    """
    numbers = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (150, 90), dtype=torch.int8, generator=numbers, device="cpu")
    scale, bias = torch.rand(2, 150, dtype=torch.float32, generator=numbers, device="cpu")
    layer = Int8Linear(weight, scale + 0.1, bias)
    x = torch.randn(9, 90, dtype=torch.float32, generator=numbers, device="cpu") * 100
    packed, n_steps = layer.packed_weight(), layer.n_steps
    assert packed is not None
    units_and_sums = layer._find_units_and_sums(packed)
    assert units_and_sums is not None  # with a bias as small as this
    alone = torch.cat([int8_product(row, packed, bias, True, n_steps) for row in x.split(1)])
    return torch.equal(int8_product_of_each(x, packed, bias, units_and_sums, True, n_steps), alone)


_rounds_alike = functools.cache(gives_the_bits_of_each)  # constant for one build of torch on one processor


def pack_together(model: nn.Module) -> None:
    """Pack the layers that are not yet packed, several at the same time, because packing a layer uses one thread only."""
    layers = [module for module in model.modules() if isinstance(module, Int8Linear) and not module.is_packed]
    if len(layers) < 2 or layers[0].weight_int8.device.type != "cpu":
        return
    engine = packing_engine(layers[0].engines)
    if engine is None:
        return
    # Start with the largest: the head is the last to end otherwise.
    layers.sort(key=lambda layer: layer.weight_int8.numel(), reverse=True)
    with packing(engine), ThreadPoolExecutor(min(8, torch.get_num_threads())) as pool:
        list(pool.map(Int8Linear.packed_weight, layers))
