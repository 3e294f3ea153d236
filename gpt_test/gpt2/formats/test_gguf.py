"""GGUF files: what this package writes, and what the gguf package reads."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from gpt2 import GPT2
from gpt2.formats.gguf import gguf_name, write_gguf
from gpt_config import GPT2Config
from gpt_config.errors import InputError
from gpt_encoder import GPT2Tokenizer
from gpt_test.conftest import random_model


def test_every_weight_is_written_under_its_name(
    small_model: GPT2, small_tokenizer: GPT2Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gguf package is replaced by one that records what it is given."""
    kept: dict[str, tuple[np.ndarray, object]] = {}
    metadata: dict[str, object] = {}

    class Writer:
        def __init__(self, path: Path, architecture: str) -> None:
            assert architecture == "gpt2"

        def add_tensor(self, name: str, values: np.ndarray, raw_dtype: object = None) -> None:
            kept[name] = (values, raw_dtype)

        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *values: metadata.__setitem__(name, values)

    kinds = SimpleNamespace(F32="F32", F16="F16", BF16="BF16", Q8_0="Q8_0")
    quants = SimpleNamespace(quantize=lambda values, kind: values)
    monkeypatch.setitem(sys.modules, "gguf", SimpleNamespace(GGUFWriter=Writer, GGMLQuantizationType=kinds, quants=quants))
    write_gguf(small_model, small_tokenizer, tmp_path / "model.gguf", "int8")
    parameters = small_model.state_dict()
    assert len(kept) == len(parameters) + 1  # the head
    for name, theirs, kind in (
        ("wte.weight", "token_embd.weight", "Q8_0"), ("wte.weight", "output.weight", "Q8_0"),
        ("wpe.weight", "position_embd.weight", None), ("ln_f.bias", "output_norm.bias", None),
        ("h.1.attn.c_attn.weight", "blk.1.attn_qkv.weight", "Q8_0"),
        ("h.0.attn.c_proj.bias", "blk.0.attn_output.bias", None),
        ("h.1.mlp.c_fc.weight", "blk.1.ffn_up.weight", "Q8_0"), ("h.0.mlp.c_proj.weight", "blk.0.ffn_down.weight", "Q8_0"),
        ("h.0.ln_1.weight", "blk.0.attn_norm.weight", None), ("h.1.ln_2.bias", "blk.1.ffn_norm.bias", None),
    ):  # fmt: skip
        expected = parameters[name].numpy()
        is_transposed = name.startswith("h.") and expected.ndim == 2
        assert np.array_equal(kept[theirs][0], expected.T if is_transposed else expected), name
        assert kept[theirs][1] == kind, name
    [tokens] = metadata["add_token_list"]
    assert len(tokens) == small_model.config.vocab_size and metadata["add_head_count"] == (3,)


@pytest.fixture(scope="module")
def model(small_tokenizer: GPT2Tokenizer) -> GPT2:
    """A model whose rows are multiples of 32 weights, as Q8_0 needs, with some rows that have no token."""
    return random_model(
        GPT2Config(
            vocab_size=small_tokenizer.vocab_size + 3, n_positions=16, n_embd=64, n_layer=2, n_head=4,
            bos_token_id=small_tokenizer.eot_token_id, eos_token_id=small_tokenizer.eot_token_id, layer_norm_epsilon=1e-6,
        )
    )  # fmt: skip


# Largest rounding error, relative to the largest weight of a block: 2**-11 of float16, 2**-8 of bfloat16, 0.5/127 of int8.
@pytest.mark.parametrize(
    ("dtype", "rounding"), [("float32", 0.0), ("float16", 2**-11), ("bfloat16", 2**-8), ("int8", 0.51 / 127)]
)
def test_weights_are_read_as_written(
    model: GPT2, small_tokenizer: GPT2Tokenizer, tmp_path: Path, dtype: str, rounding: float
) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed (pip install '.[benchmark]')")
    write_gguf(model, small_tokenizer, tmp_path / "model.gguf", dtype)
    read = {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors
    }
    expected = {gguf_name(name): (name, tensor.numpy()) for name, tensor in model.state_dict().items()}
    expected["output.weight"] = expected["token_embd.weight"]
    assert read.keys() == expected.keys()
    for theirs, (name, values) in expected.items():
        is_matrix = values.ndim == 2 and name != "wpe.weight"
        oriented = values.T if is_matrix and name != "wte.weight" else values
        assert read[theirs].shape == oriented.shape
        difference = np.abs(read[theirs] - oriented).max()
        assert difference <= (rounding * np.abs(oriented).max() if is_matrix else 0.0), name
        assert difference > 0 or dtype == "float32" or not is_matrix


def test_metadata_is_read_as_written(model: GPT2, small_tokenizer: GPT2Tokenizer, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed (pip install '.[benchmark]')")
    write_gguf(model, small_tokenizer, tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")

    def value(name: str) -> object:
        return reader.get_field(name).contents()

    assert value("general.architecture") == "gpt2"
    sizes = {"context_length": 16, "embedding_length": 64, "block_count": 2, "feed_forward_length": 256}
    assert {name: value(f"gpt2.{name}") for name in sizes} == sizes
    assert value("gpt2.attention.head_count") == 4
    assert value("gpt2.attention.layer_norm_epsilon") == pytest.approx(1e-6)
    vocabulary = small_tokenizer.vocabulary
    in_order = sorted(vocabulary.token_ids, key=vocabulary.token_ids.__getitem__)
    assert value("tokenizer.ggml.tokens") == [*in_order, "[unused 0]", "[unused 1]", "[unused 2]"]
    assert value("tokenizer.ggml.merges") == [" ".join(pair) for pair in vocabulary.merges]
    assert value("tokenizer.ggml.eos_token_id") == small_tokenizer.eot_token_id


def test_what_cannot_be_written_is_a_one_line_error(
    small_model: GPT2, small_tokenizer: GPT2Tokenizer, openai_tokenizer: GPT2Tokenizer, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path = tmp_path / "model.gguf"
    with pytest.raises(InputError, match="dtype='int4' cannot be written as GGUF: use one of float32, float16"):
        write_gguf(small_model, small_tokenizer, path, "int4")
    with pytest.raises(InputError, match="the tokenizer has 50257 tokens and the model 300 rows"):
        write_gguf(small_model, openai_tokenizer, path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"writing GGUF needs gguf: pip install '\.\[benchmark\]'"):
        write_gguf(small_model, small_tokenizer, path)
    assert not path.exists()
