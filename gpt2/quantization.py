"""int8: a byte a weight, by swapping modules. The model does not know.

Each output channel of a layer has its own scale, the largest of its weights in absolute value over 127, and its weights are
rounded to whole multiples of it. The rest, biases, norms and positions, stays in float32, and so does the arithmetic between
the layers. On a CPU the products are torch's `quantized.linear_dynamic`, which also rounds each row of inputs to 256 steps
between its smallest and its largest value, so that bytes are multiplied by bytes.
Several rows have those steps in common, except where `int8_product_of_each` or `gpt2.int8_matrix` multiplies them.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2.model import GPT2, Conv1D
from gpt_config.errors import CheckpointError, InputError

_TINY = torch.finfo(torch.float32).tiny

# The kernel's steps are never finer than this, so what it multiplies is lifted first and the scales of the weights lowered.
# It is a power of two, which changes no bits of a product but the exponent.
LIFT = 1024.0
_FINEST = 6.1e-5

# In units of the last place that a weight of a row can have: with sums and biases up to this, what is lost in a product in
# float32, less the bias, over the unit, is less than half a unit. 3 * 2^-24 of the sum, and 2^-24 of the bias.
_LARGEST_SUM = _LARGEST_BIAS = 2e6

# Of so many rows, what is computed on the way to bytes stays in the processor's cache.
ROWS_IN_CACHE = 1024

# In which order torch's kernels for bytes are to be had: the first is the fastest for a single row.
_ENGINES = ("x86", "fbgemm", "onednn", "qnnpack")


def quantize_int8(model: GPT2) -> GPT2:
    """Swap the layers of `model` for such of int8, in place, and return it. It can then no longer be trained.

    A quarter of the bytes, to be read for every token. CheckpointError if a weight is NaN or infinite.
    """
    check_finite(dict(model.named_parameters()))
    return _swap_layers(model.float(), quantized_rows)


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """CheckpointError if a tensor holds NaN or infinity, from which the kernels for bytes make ordinary numbers."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.stack(tensor.aminmax()).isfinite().all()):  # NaN makes both NaN
            raise CheckpointError(f"{name} holds NaN or infinity, which int8 cannot compute with: the weights are damaged")


def empty_int8(model: GPT2) -> GPT2:
    """`model`, which has no content (it is on "meta"), with layers of int8, for the content of a file to be put into."""
    # `new_empty` and not `empty_like`, which on "meta" wakes a part of torch's compiler: a fifth of a second.
    return _swap_layers(
        model, lambda weight: (weight.new_empty(weight.shape, dtype=torch.int8), weight.new_empty(len(weight)))
    )


def _swap_layers(model: GPT2, quantized: Callable[[Tensor], tuple[Tensor, Tensor]]) -> GPT2:
    model.requires_grad_(False)
    for block in model.h:
        for parent, name in ((block.attn, "c_attn"), (block.attn, "c_proj"), (block.mlp, "c_fc"), (block.mlp, "c_proj")):
            layer = getattr(parent, name)
            if type(layer) is not Conv1D:
                raise InputError(f"a layer {type(layer).__name__} has no int8: merge adapters into the model first")
            setattr(parent, name, Int8Linear(*quantized(layer.weight.detach().t()), layer.bias.detach()))
    model.wte = Int8Embedding(*quantized(model.wte.weight.detach()), None)  # type: ignore[assignment]
    return model


def is_int8(model: nn.Module) -> bool:
    """Whether `quantize_int8` has been here."""
    return any(isinstance(module, Int8Linear) for module in model.modules())


def check_can_learn(model: nn.Module) -> None:
    """InputError if the model is in int8: rounded weights have no gradient."""
    if is_int8(model):
        raise InputError("the model is in int8, which cannot be trained: start from the weights it was made of")


def quantized_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(n_out, n_in) in int8, and float32 (n_out,) by which its rows are to be multiplied."""
    parts = [_quantized_rows(part) for part in weight.split(ROWS_IN_CACHE)]
    return torch.cat([part for part, _ in parts]), torch.cat([scale for _, scale in parts])


def _quantized_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    weight = weight.float()
    scale = weight.abs().amax(1).clamp(min=_TINY) / 127
    return (weight / scale[:, None]).round_().to(torch.int8), scale


def int8_product(
    x: Tensor,
    packed: torch.classes.quantized.LinearPackedParamsBase,  # type: ignore[name-defined]
    bias: Tensor | None,
    is_lifted: bool,
    lift: float = LIFT,  # defaults, for TorchScript sees no other globals
    tiny: float = _TINY,
) -> Tensor:
    """Rows (N, n_in), which come times LIFT if `is_lifted`, by a packed weight that adds `bias`: (N, n_out)."""
    if x.size(0) == 1:
        return torch.ops.quantized.linear_dynamic(x if is_lifted else x * lift, packed)
    # All rows of a call share the 256 steps, so each is brought to the same size.
    size = x.abs().amax(1, keepdim=True).clamp_(min=tiny * lift)
    y = torch.ops.quantized.linear_dynamic(x * (lift / size), packed)
    if is_lifted:
        size = size / lift
    return y.mul_(size) if bias is None else torch.lerp(bias, y, size)  # the kernel has added the bias to y


def int8_product_of_each(
    x: Tensor,
    packed: torch.classes.quantized.LinearPackedParamsBase,  # type: ignore[name-defined]
    bias: Tensor | None,
    units_and_sums: Tensor,
    is_lifted: bool,
    lift: float = LIFT,
    finest: float = _FINEST,
    tiny: float = _TINY,
    largest_sum: float = _LARGEST_SUM,
) -> Tensor:
    """The bits that `int8_product` gives for each of the rows alone, where `rounds_each_alone`, and weights are read once.

    Steps are chosen as `ChooseQuantizationParams` in torch's `QuantUtils.h` chooses them, inputs rounded as fbgemm's
    `QuantizeAvx2` rounds them, and products come to numbers as in its `ReQuantizeForFloat`. The kernel multiplies whole
    steps with the zero point still in them, and its result is brought back to a whole number, from which the zero point
    comes off. Where that number is too large to be sure of, rows are multiplied one by one.
    """
    units, sums = units_and_sums.unbind()
    low, high = x.amin(1, keepdim=True).clamp_max_(0).double(), x.amax(1, keepdim=True).clamp_min_(0)
    step = (high - low).div_(255)
    zero = (low / step.clamp_min(tiny)).round_().neg_().float()
    step = step.float().clamp_min_(finest if is_lifted else finest / lift)
    # The kernel rounds it. Of two numbers a row, torch would be slow.
    steps = torch.addcmul(zero.expand_as(x).contiguous(), x, step.reciprocal())
    y = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(steps, 1.0, 0, packed)
    if bias is not None:
        y -= bias
    y.div_(units).round_()
    least, greatest = y.aminmax()
    if not (least.item() > -largest_sum and greatest.item() < largest_sum):
        return torch.cat([int8_product(row, packed, bias, is_lifted) for row in x.split(1)])
    y.addcmul_(zero, sums, value=-1)
    if not is_lifted:
        step *= lift
    return y.mul_(step * units) if bias is None else torch.addcmul(bias, y, step * units)


def plain_int8_product(x: Tensor, weight_int8: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The same where there is no kernel: rows (N, n_in) by (n_out, n_in) bytes and their scales (n_out,)."""
    y = F.linear(x, weight_int8.to(x.dtype)) * scale
    return y if bias is None else y + bias


class Int8Linear(nn.Module):
    """y = x W^T + b of x (..., n_in) float32, with W = weight_int8 (n_out, n_in) times scale (n_out,)."""

    weight_int8: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight_int8: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight_int8", weight_int8)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)
        self._packed: tuple[object, torch.ScriptObject] | None = None  # with what it was made of
        self._units_and_sums: tuple[torch.ScriptObject | None, Tensor | None] | None = None  # with what is packed

    def forward(self, x: Tensor) -> Tensor:
        packed, rows = self.packed_weight(), x.reshape(-1, x.shape[-1])
        if packed is None:
            y = plain_int8_product(rows, self.weight_int8, self.scale, self.bias)
        else:
            y = int8_product(rows, packed, self.bias, False)
        return y.view(*x.shape[:-1], -1)

    def packed_weight(self) -> torch.ScriptObject | None:
        """The weights as the CPU's kernel wants them, or None where there is no such kernel."""
        if self.weight_int8.device.type != "cpu":
            return None
        sources = [tensor for tensor in (self.weight_int8, self.scale, self.bias) if tensor is not None]
        state = [(tensor.data_ptr(), None if tensor.is_inference() else tensor._version) for tensor in sources]
        if self._packed is None or self._packed[0] != state:
            engine = packing_engine()
            if engine is None:
                return None
            self._packed = (state, _pack(self.weight_int8, self.scale, self.bias, engine))
        return self._packed[1]

    @property
    def is_packed(self) -> bool:
        """Whether `packed_weight` has been asked before."""
        return self._packed is not None

    def units_and_sums(self) -> Tensor | None:
        """What `int8_product_of_each` wants of the packed weights, (2, n_out): their scales, and sums of their rows.

        None where it would not keep its promise: with other kernels, and with a bias beside which weights vanish.
        """
        packed = self.packed_weight()
        if self._units_and_sums is None or self._units_and_sums[0] is not packed:
            can_have = packed is not None and rounds_each_alone()
            self._units_and_sums = packed, self._find_units_and_sums(packed) if can_have else None
        return self._units_and_sums[1]

    def _find_units_and_sums(self, packed: torch.ScriptObject | None) -> Tensor | None:
        units = (self.scale.double() / LIFT).float()
        if self.bias is not None and bool((self.bias.abs() > _LARGEST_BIAS * units).any()):
            return None
        ones = torch.ones(1, self.weight_int8.shape[1], dtype=torch.float32, device="cpu")
        sums = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(ones, 1.0, 0, packed)
        if self.bias is not None:
            sums -= self.bias
        return torch.stack([units, sums[0].div_(units).round_()])


class Int8Embedding(Int8Linear):
    """Token vectors (V, C) in int8, each with its scale; also the head, as in `TokenEmbedding`."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return F.embedding(input_ids, self.weight_int8) * F.embedding(input_ids, self.scale[:, None])

    def logits(self, hidden_states: Tensor) -> Tensor:
        """(..., C) to (..., V)."""
        return super().forward(hidden_states)


def packing_engine() -> str | None:
    """Which of torch's kernels for bytes packs the weights, or None if there is none."""
    if not (hasattr(torch, "_make_per_channel_quantized_tensor") and hasattr(torch.ops.quantized, "linear_dynamic")):
        return None
    return next((name for name in _ENGINES if name in torch.backends.quantized.supported_engines), None)


def multiplies_given_steps() -> bool:
    """Whether there is the operator for inputs in steps of the caller's choice. It takes only what fbgemm has packed."""
    has_operator = hasattr(torch.ops.quantized, "linear_with_input_q_dq_qweight_dq_output_fp32")
    return has_operator and packing_engine() in ("x86", "fbgemm")


def rounds_each_alone() -> bool:
    """Whether `int8_product_of_each` is to be had, and keeps its promise here."""
    return multiplies_given_steps() and _rounds_alike()


@functools.cache
def _rounds_alike() -> bool:
    """It depends on where those who built torch let a multiplication and an addition be rounded as one."""
    numbers = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (150, 90), dtype=torch.int8, generator=numbers, device="cpu")
    scale, bias = torch.rand(2, 150, dtype=torch.float32, generator=numbers, device="cpu")
    layer = Int8Linear(weight, scale + 0.1, bias)
    x = torch.randn(9, 90, dtype=torch.float32, generator=numbers, device="cpu") * 100
    packed = layer.packed_weight()
    units_and_sums = layer._find_units_and_sums(packed)
    assert units_and_sums is not None  # with a bias as small as this
    alone = torch.cat([int8_product(row, packed, bias, True) for row in x.split(1)])
    return torch.equal(int8_product_of_each(x, packed, bias, units_and_sums, True), alone)


def pack_together(model: GPT2) -> None:
    """Pack the layers that are not yet packed, several at a time, for one of them keeps no more than one thread busy."""
    layers = [module for module in model.modules() if isinstance(module, Int8Linear) and not module.is_packed]
    engine = packing_engine()
    if engine is None or len(layers) < 2 or layers[0].weight_int8.device.type != "cpu":
        return
    layers.sort(key=lambda layer: layer.weight_int8.numel(), reverse=True)  # the head takes as long as all blocks
    with _packing(engine), ThreadPoolExecutor(min(8, torch.get_num_threads())) as pool:
        list(pool.map(Int8Linear.packed_weight, layers))


def _pack(weight_int8: Tensor, scale: Tensor, bias: Tensor | None, engine: str) -> torch.ScriptObject:
    with _packing(engine):
        zeros = torch.zeros(len(scale), dtype=torch.int64)
        quantized = torch._make_per_channel_quantized_tensor(weight_int8, scale.double() / LIFT, zeros, 0)
        return torch.ops.quantized.linear_prepack(quantized, bias)


@contextmanager
def _packing(engine: str) -> Iterator[None]:
    """The choice of kernels and the filter of warnings are the process's: around threads, it is to stand around them all."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that torch means to remove these operators: `packing_engine` looks for them
            yield
    finally:
        torch.backends.quantized.engine = before
