"""ONNX, out: a folder that transformers.js, optimum and onnxruntime run. `onnx_graph` has the graph.

`onnx/model.onnx` is in float32, `onnx/model_quantized.onnx` in int8, both beside config.json and the tokenizer. Weights of
more than 2 GB, the limit of a protocol buffer, are in a file beside the graph. Needs the packages onnx and, for int8,
onnxruntime.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gpt2.formats.hub_files import write_hub_files
from gpt2.formats.onnx_graph import IR_VERSION, OPSET, build_graph
from gpt2.formats.stored import UINT8_MATRIX, Stored
from gpt_config.errors import CheckpointError, InputError

if TYPE_CHECKING:
    from gpt2.model import GPT2
    from gpt_encoder.interface import Tokenizer

TITLE = "an ONNX model"
DTYPES = ("float32", "int8")
IS_FOLDER = True

# The names that transformers.js gives to the two kinds.
_FLOAT, _INT8 = "model.onnx", "model_quantized.onnx"

# Bytes. Larger weights are stored outside of the graph: a protocol buffer has at most 2 GB.
_MAX_INSIDE = 1_900_000_000

# Weights outside of the graph begin at multiples of this, so that they can be mapped.
_ALIGNMENT = 4096


def write(model: GPT2, tokenizer: Tokenizer | None, path: Path, dtype: str) -> None:
    """Write the folder. InputError if a package is missing, or if an int8 model would be too large for one file."""
    place = path / "onnx"
    place.mkdir()
    with _needed("writing ONNX"):
        size = 4 * sum(tensor.numel() for tensor in model.state_dict().values())
        is_outside = size > _MAX_INSIDE
        if dtype == "int8":
            if size > 4 * _MAX_INSIDE:
                raise InputError(f"{size / 1e9:.0f} GB of float32 weights are too many for int8 in one file: use float32")
            _write_int8(model, place)
        else:
            write_graph(model, place / _FLOAT, is_outside=is_outside)
    outside = {"transformers.js_config": {"use_external_data_format": {_FLOAT: 1}}}
    write_hub_files(model, tokenizer, path, dtype="float32", **(outside if is_outside and dtype == "float32" else {}))


def write_graph(model: GPT2, path: Path, *, is_outside: bool = False) -> None:
    """Write a float32 `model` to the file `path`; with `is_outside`, its weights to the file `{path}_data`."""
    from onnx import helper, save_model

    tensors = {name: tensor.detach().float().contiguous() for name, tensor in model.state_dict().items()}
    weights = list(_outside(tensors, path) if is_outside else _inside(tensors))
    made = helper.make_model(
        build_graph(model.config, weights), opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION,
        producer_name="gpt2",
    )  # fmt: skip
    save_model(made, str(path))


def _inside(tensors: dict[str, Tensor]) -> Iterator[Any]:
    from onnx import numpy_helper

    for name, tensor in tensors.items():
        yield numpy_helper.from_array(tensor.numpy(), name)


def _outside(tensors: dict[str, Tensor], path: Path) -> Iterator[Any]:
    """Write the numbers to a file beside `path`, and yield tensors that say where they are."""
    from onnx import TensorProto

    data = path.with_name(f"{path.name}_data")
    with open(data, "wb") as file:
        for name, tensor in tensors.items():
            file.write(bytes(-file.tell() % _ALIGNMENT))
            stored = TensorProto(
                name=name, data_type=TensorProto.FLOAT, dims=tensor.shape, data_location=TensorProto.EXTERNAL
            )
            for key, value in (("location", data.name), ("offset", file.tell()), ("length", 4 * tensor.numel())):
                stored.external_data.add(key=key, value=str(value))
            file.write(tensor.numpy().data)
            yield stored


def _write_int8(model: GPT2, place: Path) -> None:
    """Quantize the matrices by onnxruntime's quantizer. Unsigned weights do not overflow on processors without VNNI."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    size = 4 * sum(tensor.numel() for tensor in model.state_dict().values())
    whole = place / _FLOAT
    write_graph(model, whole, is_outside=size > _MAX_INSIDE)
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)  # it advises to prepare graphs of other exporters
    try:
        quantize_dynamic(whole, place / _INT8, weight_type=QuantType.QUInt8)
    finally:
        logging.root.setLevel(level)
    for file in place.iterdir():
        if file.name != _INT8:
            file.unlink()


def is_onnx(path: Path) -> bool:
    """Whether a folder has a graph where this module and others write it."""
    return any((path / "onnx" / name).is_file() for name in (_FLOAT, _INT8))


def _graph_of(path: Path) -> Path:
    found = [path / "onnx" / name for name in (_FLOAT, _INT8) if (path / "onnx" / name).is_file()]
    if not found:
        raise CheckpointError(f"{path} has no onnx/{_FLOAT}: name a folder that gpt2 export has written")
    return found[0]


def _unreadable(file: Path, error: Exception) -> CheckpointError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return CheckpointError(f"{file} is not a readable ONNX model ({reason:.200}): write it again")


class Engine:
    """A written graph, run by onnxruntime or, if that is not installed, by onnx's own evaluator, which is slow."""

    def __init__(self, path: Path) -> None:
        """Load the graph of the folder `path`. CheckpointError if it cannot be read."""
        graph = _graph_of(path)
        self.precision = "int8" if graph.name == _INT8 else "float32"
        try:
            self._run, inputs, self.runs_by = _loaded(graph)
        except Exception as error:  # each package has its own kinds of error
            raise _unreadable(graph, error) from None
        self._past = {name: shape for name, shape in inputs.items() if name.startswith("past_key_values.")}

    def logits(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the logits (B, T, V) of ids (B, T), in one call. `mask` (B, T) is 0 for padding."""
        return self._call(ids, torch.ones_like(ids) if mask is None else mask, self._empty(len(ids)))[0]

    def greedy(self, prompt: list[int], n_new: int) -> list[int]:
        """Return `n_new` greedy ids: one call for the prompt, then one per token with the past."""
        ids, past = list(prompt), self._empty(1)
        new = ids
        for _ in range(n_new):
            logits, past = self._call(torch.tensor([new]), torch.ones(1, len(ids), dtype=torch.int64), past)
            new = [int(logits[0, -1].argmax())]
            ids += new
        return ids[len(prompt) :]

    def _empty(self, rows: int) -> dict[str, Any]:
        import numpy as np

        return {name: np.zeros((rows, heads, 0, size), np.float32) for name, (_, heads, _, size) in self._past.items()}

    def _call(self, ids: Tensor, mask: Tensor, past: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        logits, *present = self._run(None, {**{name: value.numpy() for name, value in inputs.items()}, **past})
        return torch.from_numpy(logits), dict(zip(past, present, strict=True))


def load_engine(path: Path) -> Engine:
    """Return what runs the folder `path`. InputError if onnx is not installed."""
    with _needed("running ONNX"):
        return Engine(path)


def stored_weights(path: Path) -> list[Stored]:
    """Return the weights of a written model; in int8, the head is stored again. CheckpointError if it is damaged."""
    with _needed("reading ONNX"):
        import onnx
        from onnx import numpy_helper

        place = _graph_of(path)
        try:
            onnx.checker.check_model(str(place))
            graph = onnx.load(str(place), load_external_data=False).graph
            found = {
                tensor.name: torch.from_numpy(numpy_helper.to_array(tensor, str(place.parent)).copy())
                for tensor in graph.initializer
            }
            return [stored for name in found if (stored := _stored(name, found)) is not None]
        except Exception as error:  # each kind of damage has its own
            raise _unreadable(place, error) from None


def _stored(name: str, found: dict[str, Tensor]) -> Stored | None:
    weight = name.removesuffix("_quantized")
    if weight != name:  # onnxruntime stores the transposed head as "wte.weight_Transposed"
        zero, scale = (found[f"{weight}_{part}"] for part in ("zero_point", "scale"))
        values = (found[name].int() - zero.int()) * scale
        published = weight.removesuffix("_Transposed")
        return Stored(published, values if published == weight else values.t(), UINT8_MATRIX)
    return Stored(name, found[name], "float32") if name.endswith((".weight", ".bias")) else None


def _loaded(file: Path) -> tuple[Any, dict[str, list[Any]], str]:
    """The function that runs a graph, the shapes of its inputs by name, and which package runs it."""
    try:
        import onnxruntime
    except ImportError:
        return _evaluated(file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors only
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return session.run, {each.name: each.shape for each in session.get_inputs()}, "onnxruntime"


def _evaluated(file: Path) -> tuple[Any, dict[str, list[Any]], str]:
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(str(file))
    shapes = {
        each.name: [size.dim_value or size.dim_param for size in each.type.tensor_type.shape.dim]
        for each in evaluator.proto_.graph.input
    }
    return evaluator.run, shapes, "onnx"


@contextlib.contextmanager
def _needed(what: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        package = (error.name or "onnx").partition(".")[0]
        raise InputError(f"{what} needs {package}: pip install '.[onnx]'") from None
