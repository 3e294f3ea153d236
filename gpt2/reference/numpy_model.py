"""NumpyGPT2: the parameters of a model as NumPy arrays, with methods to train, load and save them.

The arithmetic is in `numpy_gpt2`. The folders are the same as those of the PyTorch model.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
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
from gpt_config.unfinished import unchanged
from gpt_config.whole_folder import whole_folder

if TYPE_CHECKING:
    from gpt_encoder.interface import Tokenizer

DTYPES = ("float32", "float64")


def init_parameters(config: GPT2Config, rng: np.random.Generator, dtype: str = "float32") -> Parameters:
    """Random parameters by published name, distributed as OpenAI initialises them.

    Matrices are normal with standard deviation `initializer_range`, or half of it for positions. Biases are 0 and the
    weights of norms are 1. Each block adds to the residual stream twice, so the matrices of these 2 n_layer additions
    (`c_proj`) are scaled by 1/sqrt(2 n_layer). Radford et al. 2019, section 2.3.
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
    """A GPT-2 in NumPy. It starts in eval mode.

    `parameters` maps the published names to arrays, which are copied and converted to `dtype`, "float32" or "float64".
    Without them, random parameters are drawn from `seed`, which also drives the dropout in training mode. ConfigError for
    another dtype; CheckpointError if names or shapes do not fit the config.

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
        """Turn dropout on. Returns the model itself."""
        self.training = True
        return self

    def eval(self) -> NumpyGPT2:
        """Turn dropout off. Returns the model itself."""
        self.training = False
        return self

    def __call__(self, input_ids: Array, *, kv_cache: KVCache | None = None) -> Array:
        """Logits (B, T, V) of the next token after each of `input_ids` (B, T)."""
        return gpt2_forward(self.parameters, self.config, input_ids, self._dropout_rng, kv_cache)[0]

    def activations(self, input_ids: Array) -> dict[str, Array]:
        """All intermediate results for `input_ids` (B, T), without dropout, by TransformerLens' names.

        The names, their order and the shapes are those of `gpt2.inspection.trace`.

        >>> model = NumpyGPT2(GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=2))
        >>> model.activations(np.array([[1, 2, 3]]))["blocks.1.attn.hook_pattern"].shape
        (1, 2, 3, 3)
        """
        kept: dict[str, Array] = {}
        gpt2_forward(self.parameters, self.config, input_ids, keep=kept.__setitem__)
        return kept

    def loss(self, input_ids: Array, targets: Array) -> float:
        """The mean cross-entropy of `targets` (B, T) after `input_ids` (B, T), in nats."""
        check_targets(self.config, input_ids, targets)
        return cross_entropy_forward(self(input_ids), targets)[0]

    def loss_and_gradients(self, input_ids: Array, targets: Array) -> tuple[float, Gradients]:
        """The loss, and its gradient for each parameter, by name."""
        return loss_and_gradients(self.parameters, self.config, input_ids, targets, self._dropout_rng)

    @property
    def _dropout_rng(self) -> np.random.Generator | None:
        return self.rng if self.training else None

    @classmethod
    def from_pretrained(cls, name_or_folder: str | os.PathLike[str], *, dtype: str = "float32") -> NumpyGPT2:
        """Load a folder with config.json and model.safetensors, or a shipped or cached model by name. It is in eval mode."""
        folder = locate_float_model(name_or_folder)
        with unchanged(folder):
            config = read_config(folder)
            tensors = find_parameters(folder, config)
            parameters = {name: np.asarray(read_floats(tensor)).reshape(tensor.shape) for name, tensor in tensors.items()}
        return cls(config, parameters, dtype=dtype)

    def save_pretrained(self, folder: str | os.PathLike[str], *, tokenizer: Tokenizer | None = None) -> None:
        """Write a model folder: config.json, model.safetensors and the tokenizer's files; all or none. WriteError."""
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        with whole_folder(folder) as new:
            path = new / "model.safetensors"
            try:
                atomic_write(path, lambda temporary: save_file(self.parameters, temporary, metadata={"format": "pt"}))
            except SafetensorError as error:  # the library reports an OSError in this way
                raise WriteError(f"cannot write {path} ({error}): free disk space; the file is unchanged") from None
            atomic_write_json(new / "config.json", {**self.config.to_dict(), "dtype": self.dtype})
            if tokenizer is not None:
                tokenizer.save_pretrained(new)


def _check_shapes(config: GPT2Config, parameters: Mapping[str, Array]) -> None:
    shapes = parameter_shapes(config)
    for name in sorted(shapes.keys() | parameters.keys()):
        found = parameters[name].shape if name in parameters else "missing"
        wanted = shapes.get(name, "absent")
        if found != wanted:
            raise CheckpointError(f"{name} is {found} instead of {wanted}: use weights and config of the same model")
