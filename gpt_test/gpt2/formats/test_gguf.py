"""GGUF files: what this package writes, and what the gguf package reads."""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2 import GPT2
from gpt2.formats.export import export_model
from gpt2.formats.gguf import gguf_name, grids_of, kinds_of, precision_of, read, write_gguf
from gpt2.formats.stored import Stored, error_of, nearest
from gpt2.pretrained import save_model
from gpt2.verification.against import compare
from gpt2.weights.foreign import foreign_format
from gpt_config import GPT2Config
from gpt_config.errors import GPT2Warning, InputError
from gpt_encoder import CharTokenizer, GPT2Tokenizer
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
    write_gguf(small_model, small_tokenizer, tmp_path / "model.gguf", "float16")
    parameters = small_model.state_dict()
    assert len(kept) == len(parameters)  # the head is the token embedding
    for name, theirs, kind in (
        ("wte.weight", "token_embd.weight", "F16"),
        ("wpe.weight", "position_embd.weight", None), ("ln_f.bias", "output_norm.bias", None),
        ("h.1.attn.c_attn.weight", "blk.1.attn_qkv.weight", "F16"),
        ("h.0.attn.c_proj.bias", "blk.0.attn_output.bias", None),
        ("h.1.mlp.c_fc.weight", "blk.1.ffn_up.weight", "F16"), ("h.0.mlp.c_proj.weight", "blk.0.ffn_down.weight", "F16"),
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


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "q8_0"])
def test_a_written_file_is_read_back(model: GPT2, small_tokenizer: GPT2Tokenizer, tmp_path: Path, dtype: str) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed (pip install '.[benchmark]')")
    export_model(model, small_tokenizer, tmp_path / "model.gguf", to="gguf", dtype=dtype)
    assert foreign_format(tmp_path / "model.gguf") == "gguf"
    config, tensors, tokenizer = read(tmp_path / "model.gguf")
    theirs = {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors
    }
    for name, tensor in tensors.items():
        expected = theirs[gguf_name(name)]
        is_transposed = name.startswith("h.") and expected.ndim == 2
        assert np.array_equal(tensor.float().numpy(), expected.T if is_transposed else expected), name
    assert config == model.config  # the epsilon, too
    assert isinstance(tokenizer, GPT2Tokenizer) and tokenizer.vocabulary.merges == small_tokenizer.vocabulary.merges
    assert tokenizer.token_bytes == small_tokenizer.token_bytes
    assert tokenizer.special_tokens == small_tokenizer.special_tokens
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    kinds = reader.get_field("tokenizer.ggml.token_type").contents()
    assert kinds[small_tokenizer.eot_token_id] == gguf.TokenType.CONTROL
    assert kinds[-3:] == [gguf.TokenType.UNUSED] * 3 and kinds[0] == gguf.TokenType.NORMAL
    assert reader.get_field("tokenizer.ggml.add_bos_token").contents() is False
    assert reader.get_field("general.file_type").contents() == {"float32": 0, "float16": 1, "bfloat16": 32, "q8_0": 7}[dtype]


@pytest.mark.parametrize("size", [1e-2, 1e-3, 1e-5, 1e-9])
def test_small_weights_are_written_in_q8_0(model: GPT2, small_tokenizer: GPT2Tokenizer, tmp_path: Path, size: float) -> None:
    """Their scales are rounded by more than a thousandth, because they are below the normal numbers of float16, or lost."""
    pytest.importorskip("gguf", reason="gguf is not installed (pip install '.[benchmark]')")
    small, path = copy.deepcopy(model), tmp_path / "small.gguf"
    with torch.no_grad():
        weight = small.h[1].mlp.c_proj.weight.uniform_(-size, size, generator=torch.Generator().manual_seed(0))
    export_model(small, small_tokenizer, path, to="gguf", dtype="q8_0")
    stored = Stored("h.1.mlp.c_proj.weight", read(path)[1]["h.1.mlp.c_proj.weight"].float(), "q8_0")
    assert error_of(stored, weight).is_rounding and not error_of(stored, weight * 1.05 + 4e-6 * weight.sign()).is_rounding


def test_q8_0_needs_whole_groups(small_model: GPT2, small_tokenizer: GPT2Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="q8_0 has groups of 32 weights, which does not fit n_embd=24"):
        export_model(small_model, small_tokenizer, tmp_path / "model.gguf", to="gguf", dtype="q8_0")
    with pytest.raises(InputError, match="a GGUF file has no place for a CharTokenizer"):
        export_model(small_model, CharTokenizer("ab"), tmp_path / "model.gguf", to="gguf")
    assert not (tmp_path / "model.gguf").exists()


def write_quantized(
    model: GPT2,
    path: Path,
    kind: str,
    *,
    quantize: Callable[[np.ndarray], np.ndarray] | None = None,
    has_matrix: bool = False,
) -> dict[str, np.ndarray]:
    """Write a file with the `gguf` package, and return the rounded weights by their published names.

    `quantize` makes the bytes of a matrix; without it, the package does. `has_matrix`: an importance matrix is named.
    """
    gguf = pytest.importorskip("gguf", reason="gguf is not installed (pip install '.[benchmark]')")
    config, rounded = model.config, {}
    writer = gguf.GGUFWriter(path, "gpt2")
    for add, value in (
        (writer.add_context_length, config.n_positions), (writer.add_embedding_length, config.n_embd),
        (writer.add_block_count, config.n_layer), (writer.add_feed_forward_length, config.inner_dim),
        (writer.add_head_count, config.n_head), (writer.add_layer_norm_eps, 1e-5),
    ):  # fmt: skip
        add(value)
    if has_matrix:
        writer.add_string("quantize.imatrix.file", "imatrix.gguf")
    for name, tensor in model.state_dict().items():
        is_matrix = tensor.dim() == 2 and name != "wpe.weight"
        values = np.ascontiguousarray(tensor.T if is_matrix and name.startswith("h.") else tensor)
        raw = gguf.GGMLQuantizationType[kind if is_matrix else "F32"]
        stored = quantize(values) if quantize and is_matrix else gguf.quants.quantize(values, raw)
        writer.add_tensor(gguf_name(name), stored, raw_dtype=raw)
        numbers = gguf.quants.dequantize(stored, raw)
        rounded[name] = numbers.T if is_matrix and name.startswith("h.") else numbers
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return rounded


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantized_files_of_others_are_read_and_compared(kind: str, tmp_path: Path) -> None:
    """llama.cpp's q4_K, q5_K and q6_K are read in test_llama_cpp.py. A file with other numbers does not pass."""
    model = random_model(GPT2Config(vocab_size=300, n_positions=8, n_embd=64, n_layer=1, n_head=2))
    path = tmp_path / "model.gguf"
    rounded = write_quantized(model, path, kind)
    with pytest.warns(GPT2Warning, match="no tokenizer of GPT-2's kind"):
        config, tensors, _ = read(path)
    assert precision_of(path) == kind.lower() and config.n_embd == 64
    assert kinds_of(path)["wte.weight"] == kinds_of(path)["h.0.mlp.c_fc.weight"] == kind.lower()
    assert tensors.keys() == kinds_of(path).keys() == rounded.keys()
    for name, values in rounded.items():
        assert np.array_equal(tensors[name].numpy(), values), name
        stored = Stored(name, tensors[name], kinds_of(path)[name])
        ours = nearest(name, model.state_dict()[name], stored.kind)
        assert ours is None or torch.equal(ours, tensors[name]), name
        other = stored._replace(values=tensors[name].roll(1, 0))
        assert error_of(stored, model.state_dict()[name]).is_rounding
        assert not error_of(other, model.state_dict()[name]).is_rounding or "ln_" in name or "bias" in name
    save_model(model, tmp_path / "folder")
    with pytest.warns(GPT2Warning, match="no tokenizer of GPT-2's kind"):
        outcomes = list(compare(path, tmp_path / "folder"))
    assert {outcome.status.value for outcome in outcomes if outcome.part != "greedy ids"} == {"pass"}, outcomes
    with torch.no_grad():
        model.state_dict()["h.0.attn.c_proj.weight"].copy_(model.state_dict()["h.0.attn.c_proj.weight"].flip(0))
    write_quantized(model, path, kind)
    with pytest.warns(GPT2Warning, match="no tokenizer of GPT-2's kind"):
        wrong = {outcome.part: outcome.note for outcome in compare(path, tmp_path / "folder") if outcome.status == "fail"}
    assert wrong.keys() >= {"weights"} and wrong["weights"] == "h.0.attn.c_proj.weight"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@settings(max_examples=4)
@given(st.data())
def test_a_round_trip_keeps_all_bits_of_odd_shapes(dtype: str, small_tokenizer: GPT2Tokenizer, data: st.DataObject) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed (pip install '.[benchmark]')")
    width, heads = data.draw(st.sampled_from(((60, 5), (6, 3), (7, 7))))
    config = GPT2Config(
        vocab_size=data.draw(st.sampled_from((300, 301, 2048))), n_positions=data.draw(st.integers(2, 9)), n_embd=width,
        n_head=heads, n_layer=data.draw(st.integers(1, 2)), n_inner=data.draw(st.sampled_from((None, 7, 28))),
    )  # fmt: skip
    model = random_model(config, data.draw(st.integers(0, 9))).to(getattr(torch, dtype)).float()
    with tempfile.TemporaryDirectory() as folder:
        agreement = export_model(model, small_tokenizer, Path(folder) / "model", to="gguf", dtype=dtype)
        assert agreement.n_equal == agreement.n_ids == config.n_positions - 1
        found, tensors, _ = read(Path(folder) / "model")
        assert (found.inner_dim, found.n_head, found.vocab_size) == (config.inner_dim, heads, config.vocab_size)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensors[name].float(), tensor), name


# Bytes of a group, those of its float16 scales, and, of q6_k and q3_k, other scales that must not be 0 in all groups.
GROUPS = {"Q2_K": (84, (80, 82)), "Q3_K": (110, (108,)), "Q4_K": (144, (0, 2)), "Q5_K": (176, (0, 2)), "Q6_K": (210, (208,))}


def random_groups(kind: str) -> Callable[[np.ndarray], np.ndarray]:
    """What fills matrices with random numbers and random scales."""
    n_bytes, scales = GROUPS[kind]
    rng = np.random.default_rng(0)

    def quantize(values: np.ndarray) -> np.ndarray:
        groups = rng.integers(0, 256, (values.size // 256, n_bytes), dtype=np.uint8)
        for place in scales:
            groups[:, place : place + 2] = np.frombuffer(np.float16(0.001).tobytes(), np.uint8)
        return groups.reshape(len(values), -1)

    return quantize


@pytest.mark.parametrize("kind", list(GROUPS))
@pytest.mark.filterwarnings("ignore:.*has no tokenizer of GPT-2's kind")
def test_a_weight_may_be_half_a_step_from_its_number_and_no_more(kind: str, tmp_path: Path) -> None:
    """The original has random weights of which the file's are the nearest in their groups. Then one is moved."""
    model = random_model(GPT2Config(vocab_size=300, n_positions=8, n_embd=256, n_layer=1, n_head=2))
    path, generator = tmp_path / "model.gguf", torch.Generator().manual_seed(0)
    write_quantized(model, path, kind, quantize=random_groups(kind))
    tensors, grids, state = read(path).tensors, grids_of(path), model.state_dict()
    assert kinds_of(path)["wte.weight"] == kind.lower() and grids.keys() == {"wte.weight", *matrices_of(model)}
    for name in grids:
        low, high, n_steps, _ = grids[name]()
        step = (high - low) / n_steps
        number = ((tensors[name] - low) / step)[step > 0]  # some scales are 0
        assert torch.allclose(number, number.round(), atol=1e-3) and (number.min(), number.round().max()) == (0, n_steps)
        noise = torch.rand(low.shape, generator=generator) - 0.5
        state[name].copy_((tensors[name] + 0.99 * noise * step).clamp(low, high))
    save_model(model, tmp_path / "folder")
    outcomes = list(compare(path, tmp_path / "folder"))
    assert {outcome.status.value for outcome in outcomes if outcome.part != "greedy ids"} == {"pass"}, outcomes
    assert [outcome.part for outcome in outcomes if outcome.dtype == kind.lower()][:3] == ["sizes", "weights", "ranges"]
    name = "h.0.mlp.c_proj.weight"
    low, high, n_steps, _ = grids[name]()
    row, column = divmod(int((high - low).argmax()), low.shape[1])
    step = (high - low)[row, column] / n_steps
    state[name][row, column] = (
        tensors[name][row, column] + (0.7 if tensors[name][row, column] < high[row, column] else -0.7) * step
    )
    save_model(model, tmp_path / "other")
    wrong = {outcome.part: outcome for outcome in compare(path, tmp_path / "other") if outcome.status == "fail"}
    assert wrong["weights"].note == name and 0.6 < wrong["weights"].relative < 0.7


def matrices_of(model: GPT2) -> list[str]:
    return [name for name, tensor in model.state_dict().items() if name.startswith("h.") and tensor.dim() == 2]


@pytest.mark.parametrize("has_matrix", [False, True])
@pytest.mark.filterwarnings("ignore:.*has no tokenizer of GPT-2's kind")
def test_a_lost_scale_is_found_and_an_importance_matrix_may_cut_off_more(has_matrix: bool, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed (pip install '.[benchmark]')")
    model = random_model(GPT2Config(vocab_size=300, n_positions=8, n_embd=64, n_layer=1, n_head=2))
    path, kind = tmp_path / "model.gguf", gguf.GGMLQuantizationType.Q4_0
    save_model(model, tmp_path / "folder")

    def failed(quantize: Callable[[np.ndarray], np.ndarray]) -> set[str]:
        write_quantized(model, path, "Q4_0", quantize=quantize, has_matrix=has_matrix)
        return {outcome.part for outcome in compare(path, tmp_path / "folder") if outcome.status == "fail"}

    def without_a_scale(values: np.ndarray) -> np.ndarray:
        stored = gguf.quants.quantize(values, kind)
        stored[3, :2] = 0
        return stored

    def of_a_smaller_range(values: np.ndarray) -> np.ndarray:
        largest = np.abs(values.reshape(-1, 32)).max(-1, keepdims=True)
        return gguf.quants.quantize(values.reshape(-1, 32).clip(-0.8 * largest, 0.8 * largest).reshape(values.shape), kind)

    assert failed(lambda values: gguf.quants.quantize(values, kind)) == set()
    assert failed(without_a_scale) == {"ranges"}
    assert failed(of_a_smaller_range) == (set() if has_matrix else {"ranges"})
