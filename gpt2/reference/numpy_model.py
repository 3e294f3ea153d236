"""NumpyGPT2: a model's parameters as NumPy arrays, to be trained, and to be saved to and loaded from ordinary folders.

The arithmetic is that of `numpy_gpt2`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gpt2.reference.numpy_gpt2 import Gradients, Parameters, check_targets, gpt2_forward, loss_and_gradients
from gpt2.reference.numpy_kv_cache import KVCache
from gpt2.reference.numpy_layers import Array, cross_entropy_forward
from gpt2.reference.safetensors_reader import find_parameters, parameter_shapes, read_config, read_floats
from gpt2.weights.folder import locate_float_model
from gpt_config.atomic_write import atomic_write, atomic_write_json
from gpt_config.errors import CheckpointError, ConfigError, WriteError
from gpt_config.model_config import GPT2Config

if TYPE_CHECKING:
    from gpt_encoder.interface import Tokenizer

DTYPES = ("float32", "float64")


def init_parameters(config: GPT2Config, rng: np.random.Generator, dtype: str = "float32") -> Parameters:
    """OpenAI's: normal weights, half as wide for positions, zero biases, norms that change nothing.

    What each layer adds to the stream is scaled by 1/sqrt(2 n_layer), the number of additions. Radford et al. 2019,
    section 2.3.
    """
    parameters = {}
    for name, shape in parameter_shapes(config).items():
        std = config.initializer_range
        if name == "wpe.weight":
            std /= 2
        elif name.endswith("c_proj.weight"):
            std /= math.sqrt(2 * config.n_layer)
        if len(shape) == 2:
            parameters[name] = (std * rng.standard_normal(shape)).astype(dtype)
        else:
            parameters[name] = np.full(shape, 1.0 if ".weight" in name else 0.0, dtype)
    return parameters


class NumpyGPT2:
    """A GPT-2 in NumPy, in eval mode at first.

    `parameters` maps the published names to arrays of one type, float32 or float64, which are copied; without them they are
    drawn by `seed`, which also drives the dropout of training.

    >>> model = NumpyGPT2(GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=2))
    >>> model(np.array([[1, 2, 3]])).shape
    (1, 3, 11)
    """

    def __init__(
        self, config: GPT2Config, parameters: Mapping[str, Array] | None = None, *, dtype: str = "float32", seed: int = 0
    ) -> None:
        if dtype not in DTYPES:
            raise ConfigError(f"dtype={dtype!r} is not supported by the NumPy engine: use one of {', '.join(DTYPES)}")
        self.config, self.dtype = config, dtype
        self.rng = np.random.default_rng(seed)
        self.training = False
        if parameters is None:
            self.parameters = init_parameters(config, self.rng, dtype)
        else:
            _check_shapes(config, parameters)
            self.parameters = {name: np.array(parameters[name], dtype, order="C") for name in parameter_shapes(config)}

    def train(self) -> NumpyGPT2:
        """Drop numbers out from now on."""
        self.training = True
        return self

    def eval(self) -> NumpyGPT2:
        """Drop nothing out from now on."""
        self.training = False
        return self

    def __call__(self, input_ids: Array, *, kv_cache: KVCache | None = None) -> Array:
        """Logits (B, T, V) of the token after each of `input_ids` (B, T)."""
        return gpt2_forward(self.parameters, self.config, input_ids, self._dropout_rng, kv_cache)[0]

    def loss(self, input_ids: Array, targets: Array) -> float:
        """The mean cross-entropy of `targets` (B, T)."""
        check_targets(self.config, input_ids, targets)
        return cross_entropy_forward(self(input_ids), targets)[0]

    def loss_and_gradients(self, input_ids: Array, targets: Array) -> tuple[float, Gradients]:
        """The loss, and its gradient for every parameter by name."""
        return loss_and_gradients(self.parameters, self.config, input_ids, targets, self._dropout_rng)

    @property
    def _dropout_rng(self) -> np.random.Generator | None:
        return self.rng if self.training else None

    @classmethod
    def from_pretrained(cls, name_or_folder: str | os.PathLike[str], *, dtype: str = "float32") -> NumpyGPT2:
        """Load a model in eval mode: a folder with config.json and model.safetensors, or a name that ships or is cached."""
        folder = locate_float_model(name_or_folder)
        config = read_config(folder)
        tensors = find_parameters(folder, config)
        return cls(
            config,
            {name: np.asarray(read_floats(tensor)).reshape(tensor.shape) for name, tensor in tensors.items()},
            dtype=dtype,
        )

    def save_pretrained(self, folder: str | os.PathLike[str], *, tokenizer: Tokenizer | None = None) -> None:
        """Write config.json, model.safetensors and the tokenizer's files: an ordinary model folder."""
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        path = Path(folder) / "model.safetensors"
        try:
            atomic_write(path, lambda temporary: save_file(self.parameters, temporary, metadata={"format": "pt"}))
        except SafetensorError as error:  # an OSError of the library's own kind
            raise WriteError(f"cannot write {path} ({error}): make room; the file is as it was") from None
        atomic_write_json(Path(folder) / "config.json", {**self.config.to_dict(), "dtype": self.dtype})
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


def _check_shapes(config: GPT2Config, parameters: Mapping[str, Array]) -> None:
    shapes = parameter_shapes(config)
    for name in sorted(shapes.keys() | parameters.keys()):
        found = parameters[name].shape if name in parameters else "missing"
        wanted = shapes.get(name, "no parameter of this model")
        if found != wanted:
            raise CheckpointError(f"{name} is {found} instead of {wanted}: use weights and config of the same model")
