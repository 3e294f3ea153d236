"""GPT2Config: the shape of a GPT-2, with the field names of a Hugging Face `config.json`. It knows nothing of weights."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt_config.errors import ConfigError
from gpt_config.file_reading import read_json, special_file
from gpt_config.lfs import pointer_message
from gpt_config.unfinished import check_finished
from gpt_config.validation import check_bool, check_real, check_whole, plain_number, plain_numbers

# The names in OpenAI's hparams.json, and the general names that transformers accepts for the same fields.
_ALIASES = {
    "n_vocab": "vocab_size",
    "n_ctx": "n_positions",
    "max_position_embeddings": "n_positions",
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
}

# Keys that change what is computed: the only value that this package computes, and the remedy for any other.
_REQUIRED_VALUES: dict[str, tuple[Any, str]] = {
    "add_cross_attention": (False, "cross-attention is not part of GPT-2; use a decoder-only checkpoint"),
    "tie_word_embeddings": (True, "GPT-2's output head is its token embedding; use a checkpoint with a tied head"),
    "pruned_heads": ({}, "pruned heads change the shapes; use the unpruned checkpoint"),
    "quantization_config": (None, "these are weights quantized by another library; use the unquantized checkpoint"),
}

# The files of a model folder that describe the model; the first that exists is read.
CONFIG_FILES = ("config.json", "hparams.json")

# What transformers applies when it generates. The end tokens belong to the model; GenerationConfig has the other settings.
GENERATION_FILE = "generation_config.json"

# The model_type of a folder with int8 weights. Other libraries do not know the name, so they do not load the folder. With
# "gpt2" they would treat the weights as missing and initialize new ones.
INT8_MODEL_TYPE = "gpt2-int8"

# The fields of its config.json that say so to people and to other libraries. transformers' GPT2LMHeadModel, which does not
# look at model_type, refuses a quantization_config without quant_method.
INT8_FIELDS: dict[str, Any] = {
    "model_type": INT8_MODEL_TYPE,
    "architectures": ["gpt2.GPT2"],
    "quantization_config": {"bits": 8, "library": "gpt2", "load": "gpt2.GPT2.from_pretrained", "undo": "gpt2 dequantize"},
}

# A thousand times the sizes of any GPT-2. A larger value is taken for a corrupt file, before memory is allocated.
_MAX_SIZE = 1 << 24

# "gelu_new", "gelu_pytorch_tanh" and "gelu_fast" are all the tanh approximation that OpenAI uses; "gelu" is the exact one.
ACTIVATION_FUNCTIONS = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu", "relu")


@dataclass(frozen=True, kw_only=True)
class GPT2Config:
    """The configuration of one GPT-2; the defaults are the 124M model. Equal configs mean equal architectures.

    Field names, defaults and meanings are those of a Hugging Face GPT-2 `config.json`. Every field is validated on
    construction.

    >>> GPT2Config(n_layer=2, n_head=2, n_embd=64).head_dim
    32
    """

    vocab_size: int = 50257
    n_positions: int = 1024  # the context: the maximum number of tokens in the model's input
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # width of the MLP; None: 4 * n_embd
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True  # divide attention scores by sqrt(head_dim)
    scale_attn_by_inverse_layer_idx: bool = False  # ... and by the number of the layer, counted from 1
    bos_token_id: int | None = 50256
    eos_token_id: int | tuple[int, ...] | None = 50256  # the token that ends a text, or several of them

    def __post_init__(self) -> None:
        plain_numbers(self)
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            check_whole(name, getattr(self, name), 1, maximum=_MAX_SIZE)
        if self.n_inner is not None:
            check_whole("n_inner", self.n_inner, 1, maximum=_MAX_SIZE)
        object.__setattr__(self, "bos_token_id", self._checked_token("bos_token_id", self.bos_token_id))
        ends = self.eos_token_id if isinstance(self.eos_token_id, (list, tuple)) else [self.eos_token_id]
        checked = dict.fromkeys(self._checked_token("eos_token_id", end) for end in ends)  # each once, in their order
        known = tuple(end for end in checked if end is not None)
        object.__setattr__(self, "eos_token_id", known if len(known) > 1 else known[0] if known else None)
        if self.n_embd % self.n_head:
            raise ConfigError(
                f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}: "
                "every head gets n_embd / n_head channels, so choose sizes that divide",
                field="n_embd",
                other_fields=("n_head",),
            )
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
            check_real(name, getattr(self, name), lambda p: 0 <= p < 1, "a probability of 0 or more and less than 1")
        check_real("layer_norm_epsilon", self.layer_norm_epsilon, lambda e: e > 0, "a small positive number, such as 1e-5")
        check_real("initializer_range", self.initializer_range, lambda r: r >= 0, "0 or a positive number, such as 0.02")
        for name in ("scale_attn_weights", "scale_attn_by_inverse_layer_idx"):
            check_bool(name, getattr(self, name))
        if self.activation_function not in ACTIVATION_FUNCTIONS:
            raise ConfigError(
                f"activation_function={self.activation_function!r} is not supported: "
                f"use one of {', '.join(ACTIVATION_FUNCTIONS)}",
                field="activation_function",
            )

    def _checked_token(self, name: str, token_id: Any) -> int | None:
        """`token_id` as an int, or None if no token can have it. Configs state a missing token as null or as -1."""
        token_id = plain_number(token_id)
        if token_id is None or (token_id == -1 and type(token_id) is int):
            return None
        check_whole(name, token_id, 0, " (or -1 for none)")
        return int(token_id) if token_id < self.vocab_size else None  # the default id, in a smaller vocabulary

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All tokens that end a text, the first of `eos_token_id` first; empty if there is none."""
        ends = self.eos_token_id
        return () if ends is None else ends if isinstance(ends, tuple) else (ends,)

    @property
    def head_dim(self) -> int:
        """Channels per attention head."""
        return self.n_embd // self.n_head

    @property
    def inner_dim(self) -> int:
        """Channels inside the MLP."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    @property
    def n_parameters(self) -> int:
        """The number of parameters of the model, with biases and norms."""
        C, inner = self.n_embd, self.inner_dim
        a_layer = 4 * C + (C + 1) * 3 * C + (C + 1) * C + (C + 1) * inner + (inner + 1) * C
        return (self.vocab_size + self.n_positions) * C + self.n_layer * a_layer + 2 * C

    @classmethod
    def preset(cls, name: str) -> GPT2Config:
        """The configuration of a published model: gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2, 124M, ... 1558M.

        "gpt2_xl" is accepted for "gpt2-xl". ConfigError for any other name.
        """
        try:
            return PRESETS[name.replace("_", "-")]
        except (KeyError, AttributeError):
            raise ConfigError(f"preset {name!r} is unknown: use one of {', '.join(PRESETS)}", field="preset") from None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GPT2Config:
        """The config in the mapping of a `config.json` or of OpenAI's `hparams.json`.

        Keys that do not change the computation are ignored. Raises ConfigError for an invalid value, and for a setting that
        this package does not compute.
        """
        if not isinstance(values, dict):
            raise ConfigError(f"a config must be a JSON object of fields, not {type(values).__name__}")
        if values.get("model_type", "gpt2") not in ("gpt2", INT8_MODEL_TYPE):
            raise ConfigError(
                f"model_type={values['model_type']!r} is not 'gpt2': this package loads GPT-2 checkpoints only",
                field="model_type",
            )
        is_int8 = values.get("model_type") == INT8_MODEL_TYPE
        for key, (required, remedy) in _REQUIRED_VALUES.items():
            if is_int8 and key == "quantization_config" and values.get(key) == INT8_FIELDS[key]:
                continue
            if values.get(key, required) not in (required, None):
                raise ConfigError(f"{key}={values[key]!r} is not supported: {remedy}", field=key)
        fields = {field.name for field in dataclasses.fields(cls)}
        known = {_ALIASES[key]: value for key, value in values.items() if key in _ALIASES}
        known |= {key: value for key, value in values.items() if key in fields}  # the fields' own names win
        return cls(**known)

    @classmethod
    def from_json_file(cls, path: str | os.PathLike[str]) -> GPT2Config:
        """Read a `config.json` or `hparams.json`. ConfigError names the file if it is missing, corrupt or not GPT-2's."""
        return cls._of_file(path, _read_json(path))

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> GPT2Config:
        """The config of a model folder: `config.json` or OpenAI's `hparams.json`, with the end tokens of the folder.

        If the folder has a `generation_config.json`, the end tokens are those that it states, also if it states none, as in
        transformers. `tie_word_embeddings` is not checked: false is also written for a head that equals the token embedding,
        so who reads the weights compares the two (`is_untied`).

        Raises ConfigError, which names the file, if a file is missing, corrupt or not GPT-2's, and CheckpointError if a
        writer has not finished the folder.
        """
        check_finished(folder)
        path = _config_file(folder)
        values = _read_json(path)
        if isinstance(values, dict):
            values = {key: value for key, value in values.items() if key != "tie_word_embeddings"}
        config = cls._of_file(path, values)
        generation = Path(folder) / GENERATION_FILE
        if special_file(Path(folder), [GENERATION_FILE]):
            raise ConfigError(f"{generation} is not a regular file: replace it with the file of the model")
        if not generation.is_file():
            return config
        ends = read_generation_file(generation).get("eos_token_id")
        return cls._of_file(generation, {**dataclasses.asdict(config), "eos_token_id": ends})

    @classmethod
    def _of_file(cls, path: str | os.PathLike[str], values: Any) -> GPT2Config:
        try:
            return cls.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}", field=error.field, other_fields=error.other_fields) from None

    def to_dict(self) -> dict[str, Any]:
        """The mapping of a `config.json`, from which transformers builds the same model."""
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            **dataclasses.asdict(self),
            "eos_token_id": list(ends) if isinstance(ends := self.eos_token_id, tuple) else ends,
            "n_ctx": self.n_positions,  # the older name, which some libraries still require
            "tie_word_embeddings": True,
        }


def is_untied(folder: str | os.PathLike[str]) -> bool:
    """Whether the config of a model folder says that the head is not the token embedding. ConfigError as `from_folder`."""
    values = _read_json(_config_file(folder))
    return isinstance(values, dict) and values.get("tie_word_embeddings") not in (True, None)


def read_generation_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings in a `generation_config.json`. Raises ConfigError, which names the file, if it is damaged."""
    values = _read_json(path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must be a JSON object of settings, not {type(values).__name__}: remove the file")
    return values


def _read_json(path: str | os.PathLike[str]) -> Any:
    """The value in a JSON file. Raises ConfigError, which names the file, if it cannot be read or is not JSON."""
    try:
        return read_json(path)
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}") from None
    except ValueError as error:  # not JSON, or not UTF-8
        message = pointer_message(path) or f"{path} is not valid JSON ({error}): restore or download the file again"
        raise ConfigError(message) from None


def _config_file(folder: str | os.PathLike[str]) -> Path:
    paths = [Path(folder) / name for name in CONFIG_FILES]
    return next((path for path in paths if path.is_file()), paths[0])


_GPT2 = GPT2Config()
_MEDIUM = GPT2Config(n_embd=1024, n_layer=24, n_head=16)
_LARGE = GPT2Config(n_embd=1280, n_layer=36, n_head=20)
_XL = GPT2Config(n_embd=1600, n_layer=48, n_head=25)

PRESETS: dict[str, GPT2Config] = {
    "gpt2": _GPT2,
    "gpt2-medium": _MEDIUM,
    "gpt2-large": _LARGE,
    "gpt2-xl": _XL,
    "distilgpt2": GPT2Config(n_layer=6),
    # OpenAI's names for the same four sizes
    "124M": _GPT2,
    "355M": _MEDIUM,
    "774M": _LARGE,
    "1558M": _XL,
}
