"""Write a GPT-2 as a GGUF file for llama.cpp. Depends on the `gguf` package, and on the names and shapes of the weights.

GGUF's documentation describes the metadata. Names and layout of the tensors are those that llama.cpp reads for "gpt2". Its
matrices have shape (outputs, inputs), the transpose of the published ones.
"""

from __future__ import annotations

import os
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt_config.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from gpt2.model import GPT2
    from gpt_config.model_config import GPT2Config
    from gpt_encoder.tokenizer import GPT2Tokenizer

# The names of dtypes in gguf.
_KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "Q8_0"}
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
    position embeddings are float32. InputError if `dtype` is another one, if the package gguf is not installed, or if the
    tokenizer has more tokens than the model has rows.
    """
    if dtype not in _KINDS:
        raise InputError(f"dtype={dtype!r} cannot be written as GGUF: use one of {', '.join(_KINDS)}")
    if tokenizer.vocab_size > model.config.vocab_size:
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model {model.config.vocab_size} rows: "
            "use the tokenizer of this model"
        )
    try:
        import gguf
    except ImportError:
        raise InputError("writing GGUF needs gguf: pip install '.[benchmark]'") from None
    writer = gguf.GGUFWriter(Path(path), "gpt2")
    _add_sizes(writer, model.config)
    _add_vocabulary(writer, model.config, tokenizer)
    kind = getattr(gguf.GGMLQuantizationType, _KINDS[dtype])
    for name, tensor in model.state_dict().items():
        is_matrix = tensor.dim() == 2 and name != "wpe.weight"
        values = tensor.t() if is_matrix and name != "wte.weight" else tensor  # (inputs, outputs) -> (outputs, inputs)
        _add(writer, gguf_name(name), values, kind if is_matrix else None)
        if name == "wte.weight":  # the head is the same matrix, which llama.cpp reads under a second name
            _add(writer, "output.weight", tensor, kind)
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
    tokens = {token_id: token for token, token_id in {**vocabulary.special_tokens, **vocabulary.token_ids}.items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    # llama.cpp needs a distinct name for each id, so rows without a token get one too.
    writer.add_token_list([tokens.get(i) or f"[unused {next(unused)}]" for i in range(config.vocab_size)])
    writer.add_token_types([1] * config.vocab_size)  # 1 is an ordinary token; callers pass ids, so no token is special
    writer.add_token_merges([" ".join(pair) for pair in vocabulary.merges])
    writer.add_bos_token_id(config.bos_token_id or 0)
    writer.add_eos_token_id(next(iter(config.eos_token_ids), 0))


def _add(writer: Any, name: str, tensor: Tensor, kind: Any) -> None:
    import numpy as np
    from gguf import GGMLQuantizationType, quants

    values = np.ascontiguousarray(tensor.detach().numpy())
    if kind is None or kind == GGMLQuantizationType.F32:
        writer.add_tensor(name, values)
    else:
        writer.add_tensor(name, quants.quantize(values, kind), raw_dtype=kind)
