"""GGUF, the files of llama.cpp, in and out: what the parts of a GPT-2 are called there. `gguf_file` reads the bytes.

Writing needs the `gguf` package. GGUF's documentation describes the metadata. Names and layout of the tensors are those that
llama.cpp reads for "gpt2". Its matrices have shape (outputs, inputs), the transpose of the published ones.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2.formats.gguf_file import Container, has_equal_steps, kind_name, read_container, read_numbers, read_range
from gpt2.formats.layout import TANH_GELU, transposed
from gpt2.formats.registry import Imported, config_of
from gpt2.formats.stored import Grid
from gpt2.weights.names import published_names
from gpt2.weights.tokenizer import folder_of
from gpt_config.errors import CheckpointError, GPT2Warning, InputError, VocabularyError
from gpt_encoder.interface import EOT_TOKEN
from gpt_encoder.tokenizer import GPT2Tokenizer
from gpt_encoder.vocab_files import Vocabulary

if TYPE_CHECKING:
    from torch import Tensor

    from gpt2.model import GPT2
    from gpt_config.model_config import GPT2Config
    from gpt_encoder.interface import Tokenizer

TITLE = "a GGUF file"
DTYPES = ("float32", "float16", "bfloat16", "q8_0")
IS_FOLDER = False

# The names of dtypes in gguf, and the number that says which most tensors of a file have.
_KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "Q8_0", "q8_0": "Q8_0"}
_FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7}

# Weights of a group of Q8_0, and the version of these layouts.
_GROUP, _QUANTIZATION_VERSION = 32, 2

# Kinds of tokens.
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5

# llama.cpp's names of the parameters outside the blocks.
_OUTSIDE = {
    "wte.weight": "token_embd.weight",
    "wpe.weight": "position_embd.weight",
    "ln_f.weight": "output_norm.weight",
    "ln_f.bias": "output_norm.bias",
}
# llama.cpp's names of the modules of a block.
_IN_BLOCK = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def write_gguf(model: GPT2, tokenizer: GPT2Tokenizer, path: str | os.PathLike[str], dtype: str = "float32") -> None:
    """Write the weights of a float32 `model` and the vocabulary of `tokenizer`.

    `dtype` is the dtype of the matrices: float32, float16, bfloat16, or int8, which is llama.cpp's Q8_0. Vectors and
    position embeddings are float32. The head is the token embedding, and not written again. InputError if `dtype` is another
    one or does not fit the width, if the package gguf is not installed, or if the tokenizer has more tokens than the model
    has rows.
    """
    if dtype not in _KINDS:
        raise InputError(f"dtype={dtype!r} cannot be written as GGUF: use one of {', '.join(_KINDS)}")
    if tokenizer.vocab_size > model.config.vocab_size:
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model {model.config.vocab_size} rows: "
            "use the tokenizer of this model"
        )
    if _KINDS[dtype] == "Q8_0" and (model.config.n_embd % _GROUP or model.config.inner_dim % _GROUP):
        raise InputError(
            f"q8_0 has groups of {_GROUP} weights, which does not fit n_embd={model.config.n_embd} and "
            f"n_inner={model.config.inner_dim}: use float16"
        )
    try:
        import gguf
    except ImportError:
        raise InputError("writing GGUF needs gguf: pip install '.[benchmark]'") from None
    writer = gguf.GGUFWriter(Path(path), "gpt2")
    writer.add_name(folder.name if (folder := folder_of(model)) else "gpt2")
    writer.add_file_type(_FILE_TYPES[_KINDS[dtype]])
    writer.add_quantization_version(_QUANTIZATION_VERSION)
    _add_sizes(writer, model.config)
    _add_vocabulary(writer, model.config, tokenizer)
    kind = getattr(gguf.GGMLQuantizationType, _KINDS[dtype])
    for name, tensor in model.state_dict().items():
        is_matrix = tensor.dim() == 2 and name != "wpe.weight"
        values = tensor.t() if is_matrix and name != "wte.weight" else tensor  # (inputs, outputs) -> (outputs, inputs)
        _add(writer, gguf_name(name), values, kind if is_matrix else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    """Return llama.cpp's name of a parameter.

    >>> gguf_name("h.0.attn.c_attn.weight")
    'blk.0.attn_qkv.weight'
    """
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    _, layer, rest = name.split(".", 2)
    module, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{_IN_BLOCK[module]}.{kind}"


def _add_sizes(writer: Any, config: GPT2Config) -> None:
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.inner_dim)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)


def _add_vocabulary(writer: Any, config: GPT2Config, tokenizer: GPT2Tokenizer) -> None:
    vocabulary, unused = tokenizer.vocabulary, count()
    added = {token.text: token.token_id for token in vocabulary.added_tokens}
    named = {**added, **vocabulary.special_tokens, **vocabulary.token_ids}
    tokens = {token_id: token for token, token_id in named.items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    # llama.cpp needs a distinct name for each id, so rows without a token get one too.
    writer.add_token_list([tokens.get(i) or f"[unused {next(unused)}]" for i in range(config.vocab_size)])
    kinds = [_NORMAL if i in tokens else _UNUSED for i in range(config.vocab_size)]
    for kind, ids in (
        (_USER_DEFINED, [token.token_id for token in vocabulary.added_tokens]),
        (_CONTROL, vocabulary.special_tokens.values()),
    ):
        for token_id in ids:
            kinds[token_id] = kind
    writer.add_token_types(kinds)
    writer.add_add_bos_token(False)
    writer.add_token_merges([" ".join(pair) for pair in vocabulary.merges])
    writer.add_bos_token_id(config.bos_token_id or 0)
    writer.add_eos_token_id(next(iter(config.eos_token_ids), 0))


def _add(writer: Any, name: str, tensor: Tensor, kind: Any) -> None:
    import numpy as np
    from gguf import GGMLQuantizationType, quants

    values = np.ascontiguousarray(tensor.detach().float().numpy())
    if kind is None or kind == GGMLQuantizationType.F32:
        writer.add_tensor(name, values)
    else:
        writer.add_tensor(name, quants.quantize(values, kind), raw_dtype=kind)


def write(model: GPT2, tokenizer: Tokenizer | None, path: Path, dtype: str) -> None:
    """Write a file that llama.cpp runs. InputError for what the format or llama.cpp cannot say."""
    if not isinstance(tokenizer, GPT2Tokenizer):
        what = "needs a tokenizer" if tokenizer is None else f"has no place for a {type(tokenizer).__name__}"
        raise InputError(f"{TITLE} {what}: name a byte-level BPE, or choose another format")
    config, vocabulary = model.config, tokenizer.vocabulary
    if config.activation_function not in TANH_GELU:
        raise InputError(f"llama.cpp computes 'gelu_new', not {config.activation_function!r}: choose another format")
    if not config.scale_attn_weights or config.scale_attn_by_inverse_layer_idx:
        raise InputError("llama.cpp scales attention by the root of the width of a head only: choose another format")
    if vocabulary.first_ids or vocabulary.last_ids:
        raise InputError(f"{TITLE} has no place for tokens that begin or end each text: choose another format")
    write_gguf(model, tokenizer, path, dtype)


def read(path: Path) -> Imported:
    """Read a file in float32, float16, bfloat16 or a quantized type, which becomes float32."""
    container = read_container(path)
    if (kind := container.values.get("general.architecture")) != "gpt2":
        raise CheckpointError(f"{path} contains a model of the architecture {kind!r:.80}: only gpt2 can be read")
    names = _published(container)
    tensors = {ours: read_numbers(container, theirs) for ours, theirs in names.items()}
    tensors = transposed(published_names(tensors, path))
    table = tensors.get("wte.weight")
    if table is None or table.dim() != 2:
        raise CheckpointError(f"{path} has no token embedding: use another file")
    return Imported(_config(container, table.shape[0]), tensors, _tokenizer(container))


def kinds_of(path: Path) -> dict[str, str]:
    """Return the kind of the numbers of each weight of a file, such as float16 or q4_0, by its published name."""
    container = read_container(path)
    return {ours: kind_name(container.tensors[theirs].kind) for ours, theirs in _weights(container).items()}


def grids_of(path: Path) -> dict[str, Callable[[], Grid]]:
    """Return what computes the Grid of each weight of a type with equal steps, by its published name."""
    container = read_container(path)
    is_weighted = any(key.startswith("quantize.imatrix.") for key in container.values)

    def grid(ours: str, theirs: str) -> Grid:
        low, high, n_steps = read_range(container, theirs)
        return Grid(transposed({ours: low})[ours], transposed({ours: high})[ours], n_steps, is_weighted)

    names = {ours: theirs for ours, theirs in _weights(container).items() if has_equal_steps(container.tensors[theirs].kind)}
    return {ours: partial(grid, ours, theirs) for ours, theirs in names.items()}


def _weights(container: Container) -> dict[str, str]:
    """llama.cpp's name of each weight by the published one; of a head that is stored twice, the one that is read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `read` has warned
        names = _published(container)
    return {"wte.weight": names.pop("lm_head.weight"), **names} if "lm_head.weight" in names else names


def _published(container: Container) -> dict[str, str]:
    """llama.cpp's name of each weight of a file by the published one."""
    outside = {theirs: ours for ours, theirs in _OUTSIDE.items()} | {"output.weight": "lm_head.weight"}
    modules = {theirs: ours for ours, theirs in _IN_BLOCK.items()}
    names = {}
    for name in _without_second_head(container):
        block, _, rest = name.removeprefix("blk.").partition(".")
        module, _, part = rest.partition(".")
        ours = f"h.{block}.{modules[module]}.{part}" if name.startswith("blk.") and module in modules else outside.get(name)
        if ours is None:
            raise CheckpointError(f"{container.path} contains {name!r:.80}, which GPT-2 does not have: use another file")
        names[ours] = name
    return names


def precision_of(path: Path) -> str:
    """Return the dtype of the matrices of a file, such as float16 or q4_0: that in which most of their numbers are."""
    container = read_container(path)
    sizes: dict[int, int] = {}
    for stored in container.tensors.values():
        sizes[stored.kind] = sizes.get(stored.kind, 0) + math.prod(stored.shape)
    return kind_name(max(sizes, key=lambda kind: sizes[kind])) if sizes else "float32"


def _without_second_head(container: Container) -> list[str]:
    """The names of the tensors without the worse one of two heads: GPT-2 has one, which programs may quantize twice."""
    names = list(container.tensors)
    both = [container.tensors[name] for name in ("token_embd.weight", "output.weight") if name in container.tensors]
    if len(both) < 2 or both[0].kind == both[1].kind:
        return names
    worse = "token_embd.weight" if both[0].n_bytes < both[1].n_bytes else "output.weight"
    warnings.warn(f"{container.path} has its head in two precisions: the better one is used for both", GPT2Warning, 2)
    return [name for name in names if name != worse]


def _config(container: Container, n_rows: int) -> GPT2Config:
    import numpy as np

    names = {
        "context_length": "n_positions", "embedding_length": "n_embd", "block_count": "n_layer",
        "feed_forward_length": "n_inner", "attention.head_count": "n_head",
        "attention.layer_norm_epsilon": "layer_norm_epsilon",
    }  # fmt: skip
    fields = {ours: container.values.get(f"gpt2.{theirs}") for theirs, ours in names.items()}
    lacking = [theirs for theirs, ours in names.items() if fields[ours] is None]
    if lacking:
        raise CheckpointError(f"{container.path} has no gpt2.{lacking[0]}: use another file")
    if isinstance(epsilon := fields["layer_norm_epsilon"], float):
        fields["layer_norm_epsilon"] = float(str(np.float32(epsilon)))  # 1e-5, not the nearest number in float32
    if isinstance(fields["n_embd"], int) and fields["n_inner"] == 4 * fields["n_embd"]:
        del fields["n_inner"]
    ends = {f"{kind}_token_id": container.values.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", "eos")}
    return config_of(container.path, TITLE, vocab_size=n_rows, **fields, **ends)


def _tokenizer(container: Container) -> GPT2Tokenizer | None:
    """The tokenizer, or None if the file has none, or one of another program."""
    tokens, kinds, merges = (container.values.get(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type", "merges"))
    split = container.values.get("tokenizer.ggml.pre", "gpt-2")
    if not isinstance(tokens, list) or not isinstance(merges, list) or split != "gpt-2":
        warnings.warn(f"{container.path} has no tokenizer of GPT-2's kind", GPT2Warning, 2)
        return None
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        kinds = [_NORMAL] * len(tokens)
    try:
        ids = {token: i for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind != _UNUSED}
        special = {token: i for token, i in ids.items() if kinds[i] == _CONTROL or token == EOT_TOKEN}
        return GPT2Tokenizer(Vocabulary(ids, [_pair(merge) for merge in merges], special))
    except (VocabularyError, TypeError, ValueError, AttributeError, KeyError) as error:
        raise CheckpointError(f"{container.path} has a damaged tokenizer ({error}): use another file") from None


def _pair(merge: str) -> tuple[str, str]:
    left, right = merge.split(" ")
    return left, right
