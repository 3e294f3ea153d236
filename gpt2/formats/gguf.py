"""A GPT-2 as a GGUF file for llama.cpp, written with the `gguf` package. It knows names and shapes, not arithmetic.

GGUF's own documentation has the metadata; names and layout of the tensors are those llama.cpp reads for "gpt2": matrices
as (outputs, inputs), the transpose of the published ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2.benchmark.peers import token_strings
from gpt2.benchmark.subject import Subject

if TYPE_CHECKING:
    from torch import Tensor

_OUTSIDE = {
    "wte.weight": "token_embd.weight",
    "wpe.weight": "position_embd.weight",
    "ln_f.weight": "output_norm.weight",
    "ln_f.bias": "output_norm.bias",
}
_IN_BLOCK = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def write_gguf(subject: Subject, path: Path, dtype: str) -> None:
    """Write the subject's weights and vocabulary; int8 is q8_0. Vectors and positions stay float32."""
    import gguf

    from gpt2.pretrained import load_model

    writer = gguf.GGUFWriter(path, "gpt2")
    _add_metadata(writer, subject)
    kind = _kinds()[dtype]
    for name, tensor in load_model(subject.folder).state_dict().items():
        is_matrix = tensor.dim() == 2 and name != "wpe.weight"
        _add(
            writer,
            gguf_name(name),
            tensor.t() if is_matrix and name != "wte.weight" else tensor,
            kind if is_matrix else None,
        )
        if name == "wte.weight":  # the head: the same numbers again
            _add(writer, "output.weight", tensor, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    """llama.cpp's name of a parameter."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    _, layer, rest = name.split(".", 2)
    module, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{_IN_BLOCK[module]}.{kind}"


def _kinds() -> dict[str, Any]:
    from gguf import GGMLQuantizationType as Kind

    return {"float32": Kind.F32, "float16": Kind.F16, "bfloat16": Kind.BF16, "int8": Kind.Q8_0}


def _add_metadata(writer: Any, subject: Subject) -> None:
    config = subject.config
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.inner_dim)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    tokens = token_strings(subject)
    merges = (subject.folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens + [f"[unused {n}]" for n in range(config.vocab_size - len(tokens))])
    writer.add_token_types([1] * config.vocab_size)  # ordinary ones: ids go in and ids come out
    writer.add_token_merges([line for line in merges if line and not line.startswith("#version")])
    writer.add_bos_token_id(config.bos_token_id or 0)
    writer.add_eos_token_id(config.eos_token_id or 0)


def _add(writer: Any, name: str, tensor: Tensor, kind: Any) -> None:
    import numpy as np
    from gguf import GGMLQuantizationType, quants

    values = np.ascontiguousarray(tensor.detach().numpy())
    if kind is None or kind == GGMLQuantizationType.F32:
        writer.add_tensor(name, values)
    else:
        writer.add_tensor(name, quants.quantize(values, kind), raw_dtype=kind)
