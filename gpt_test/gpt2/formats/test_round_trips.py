"""Models that are written for other programs and read back: the same bits, over odd shapes and vocabularies."""

from __future__ import annotations

import dataclasses
import json
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gpt2 import GPT2
from gpt2.formats.export import export_model
from gpt2.formats.registry import load_format
from gpt2.pretrained import load_foreign
from gpt2.weights.foreign import foreign_format
from gpt_config import CheckpointError, GPT2Config, InputError
from gpt_config.errors import GPT2Warning, WriteError
from gpt_encoder import CharTokenizer, GPT2Tokenizer, load_tokenizer
from gpt_test.conftest import random_model

TINY = GPT2Config(vocab_size=11, n_positions=6, n_embd=6, n_layer=2, n_head=3)
IDS = torch.tensor([[1, 5, 2, 7]])
FORMATS = ("openai", "nanogpt", "llmc")
ACTIVATION = {"openai": "gelu_new", "nanogpt": "gelu", "llmc": "gelu_new"}


def configs(name: str) -> st.SearchStrategy[GPT2Config]:
    """Odd shapes, such as width 60 with 5 heads, and vocabularies from one token to 300 tokens and 50,304."""
    sizes = st.tuples(st.sampled_from(((60, 5), (6, 3), (1, 1), (7, 7))), st.sampled_from((1, 11, 128, 129, 300, 50304)))
    return st.builds(
        lambda pair, layers, positions: GPT2Config(
            vocab_size=pair[1] if pair[0][0] < 60 or pair[1] < 50304 else 300, n_embd=pair[0][0], n_head=pair[0][1],
            n_layer=layers, n_positions=positions, activation_function=ACTIVATION[name],
        ),
        sizes, st.integers(1, 3), st.integers(1, 9),
    )  # fmt: skip


@pytest.mark.parametrize(("name", "dtype"), [(name, dtype) for name in FORMATS for dtype in load_format(name).DTYPES])
@settings(max_examples=8)
@given(st.data())
def test_a_round_trip_keeps_all_bits(name: str, dtype: str, data: st.DataObject) -> None:
    config = data.draw(configs(name))
    model = random_model(config, data.draw(st.integers(0, 9))).to(getattr(torch, dtype)).float()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        agreement = export_model(model, None, path, to=name, dtype=dtype)
        assert agreement.n_equal == agreement.n_ids == min(20, config.n_positions - 1)
        assert foreign_format(path) == name
        found, _ = load_foreign(path)
        assert found.dtype == getattr(torch, dtype)
        expected = model.state_dict()
        for key, tensor in found.state_dict().items():
            assert torch.equal(tensor.float(), expected[key]), key
        for field in ("n_embd", "n_head", "n_layer", "n_positions", "vocab_size", "activation_function"):
            assert getattr(found.config, field) == getattr(config, field), field


@pytest.mark.parametrize("dtype", load_format("safetensors").DTYPES)
def test_a_model_folder_has_another_dtype(
    dtype: str, small_model: GPT2, small_tokenizer: GPT2Tokenizer, tmp_path: Path
) -> None:
    agreement = export_model(small_model, small_tokenizer, tmp_path / "out", to="safetensors", dtype=dtype)
    assert agreement.n_ids == 20 and (agreement.n_equal == 20 or dtype != "float32")
    assert foreign_format(tmp_path / "out") is None
    found = GPT2.from_pretrained(tmp_path / "out", dtype=dtype)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert size < found.wte.weight.itemsize * sum(p.numel() for p in found.parameters()) * 1.1
    for key, tensor in found.state_dict().items():
        assert torch.equal(tensor, small_model.state_dict()[key].to(getattr(torch, dtype))), key
    assert load_tokenizer(tmp_path / "out").token_bytes == small_tokenizer.token_bytes


def test_an_own_vocabulary_goes_with_openais_format(
    small_model: GPT2, small_tokenizer: GPT2Tokenizer, tmp_path: Path
) -> None:
    export_model(small_model, small_tokenizer, tmp_path / "out", to="openai")
    found, tokenizer = load_foreign(tmp_path / "out")
    assert isinstance(tokenizer, GPT2Tokenizer) and tokenizer.vocabulary.merges == small_tokenizer.vocabulary.merges
    assert tokenizer.token_bytes == small_tokenizer.token_bytes
    assert found.config.eos_token_id == small_model.config.eos_token_id
    with pytest.raises(InputError, match="no place for a CharTokenizer: choose another format"):
        export_model(small_model, CharTokenizer("abc"), tmp_path / "char", to="openai")
    assert not list((tmp_path / "char").iterdir())


def test_openais_vocabulary_is_known_by_its_size(openai_tokenizer: GPT2Tokenizer, tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, vocab_size=50304, activation_function="gelu", n_embd=3)
    export_model(random_model(config), None, tmp_path / "ckpt.pt", to="nanogpt")
    found, tokenizer = load_foreign(tmp_path)
    assert (tokenizer and tokenizer.vocab_size, found.config.eos_token_id) == (50257, 50256)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("change", "message"),
    [({"n_inner": 7}, "cannot say n_inner=7, only 24"),
     ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06, only 1e-05"),
     ({"scale_attn_by_inverse_layer_idx": True}, "only False"), ({"activation_function": "relu"}, "='relu', only 'gelu")],
)  # fmt: skip
def test_what_a_format_cannot_say_is_refused(name: str, change: dict[str, object], message: str, tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, **{"activation_function": ACTIVATION[name], **change})
    with pytest.raises(InputError, match=message):
        export_model(random_model(config), None, tmp_path / "out", to=name)
    assert not (tmp_path / "out").is_file() and not list(tmp_path.glob("out/*"))


def test_a_dtype_that_a_format_or_a_number_does_not_have_is_refused(tmp_path: Path) -> None:
    model = random_model(TINY)
    with pytest.raises(InputError, match=r"dtype='float16' cannot be written as an llm\.c model: use float32 or bfloat16"):
        export_model(model, None, tmp_path / "out", to="llmc", dtype="float16")
    with torch.no_grad():
        model.wpe.weight[0, 0] = 70000.0
    with pytest.raises(InputError, match=r"wpe\.weight has numbers up to 7e\+04, and float16 ends at 6\.55e\+04"):
        export_model(model, None, tmp_path / "out", to="nanogpt", dtype="float16")


def test_a_file_that_reads_back_wrong_gets_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    form = load_format("llmc")
    whole = form.write

    def write(model: GPT2, tokenizer: object, path: Path, dtype: str) -> None:
        whole(model, None, path, dtype)
        content = bytearray(path.read_bytes())
        content[1100] ^= 1
        path.write_bytes(content)

    (tmp_path / "out").write_bytes(b"old")
    monkeypatch.setattr(form, "write", write)
    with pytest.raises(WriteError, match="read back with other numbers"):
        export_model(random_model(TINY), None, tmp_path / "out", to="llmc")
    assert (tmp_path / "out").read_bytes() == b"old"


class _NanoBlock(nn.Module):
    """A block as nanoGPT has it: norms before each part, linear layers, and the exact GELU."""

    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = (nn.LayerNorm(width, bias=bias) for _ in range(2))
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.c_attn, self.attn.c_proj = nn.Linear(width, 3 * width, bias), nn.Linear(width, width, bias)
        self.mlp.c_fc, self.mlp.c_proj = nn.Linear(width, 4 * width, bias), nn.Linear(4 * width, width, bias)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attn.c_attn(self.ln_1(x)).chunk(3, -1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
        past = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        y = scores.masked_fill(~past, -torch.inf).softmax(-1) @ v
        x = x + self.attn.c_proj(y.transpose(1, 2).flatten(2))
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x))))


class _NanoGPT(nn.Module):
    def __init__(self, arguments: dict[str, int]) -> None:
        super().__init__()
        width, bias = arguments["n_embd"], bool(arguments["bias"])
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(arguments["vocab_size"], width),
                "wpe": nn.Embedding(arguments["block_size"], width),
                "h": nn.ModuleList(_NanoBlock(width, arguments["n_head"], bias) for _ in range(arguments["n_layer"])),
                "ln_f": nn.LayerNorm(width, bias=bias),
            }
        )
        self.lm_head = nn.Linear(width, arguments["vocab_size"], bias=False)
        self.lm_head.weight = self.transformer["wte"].weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.transformer["wte"](ids) + self.transformer["wpe"](torch.arange(ids.shape[1]))
        for block in self.transformer["h"]:
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))


ARGUMENTS = {"n_layer": 2, "n_head": 5, "n_embd": 60, "block_size": 8, "vocab_size": 65, "dropout": 0.2}


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod."])
@pytest.mark.parametrize("bias", [True, False])
def test_a_checkpoint_of_nanogpt_has_the_logits_of_its_model(bias: bool, prefix: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = _NanoGPT({**ARGUMENTS, "bias": bias})
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)
    state = {prefix + name: tensor for name, tensor in theirs.state_dict().items()}
    content = {"model": state, "model_args": {**ARGUMENTS, "bias": bias}, "iter_num": 3, "config": {"dataset": "x"}}
    torch.save({**content, "best_val_loss": torch.tensor(1.5), "optimizer": {"state": {}}}, tmp_path / "ckpt.pt")
    assert foreign_format(tmp_path) == foreign_format(tmp_path / "ckpt.pt") == "nanogpt"
    ours, tokenizer = load_foreign(tmp_path)
    torch.testing.assert_close(ours(IDS), theirs(IDS), atol=2e-5, rtol=1e-5)
    again = GPT2.from_pretrained(tmp_path / "ckpt.pt", dtype="float64")
    assert torch.equal(again.wte.weight, ours.wte.weight.double())
    assert tokenizer is None and ours.config.resid_pdrop == 0.2 and ours.config.eos_token_id is None


def test_nanogpt_loads_what_is_written(tmp_path: Path) -> None:
    model = random_model(dataclasses.replace(TINY, activation_function="gelu"))
    export_model(model, None, tmp_path / "ckpt.pt", to="nanogpt")
    content = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    theirs = _NanoGPT(content["model_args"])
    theirs.load_state_dict(content["model"])
    torch.testing.assert_close(theirs(IDS), model(IDS), atol=1e-5, rtol=1e-5)
    parameters = list(theirs.parameters())
    groups = [{"params": [p for p in parameters if (p.dim() >= 2) == is_matrix]} for is_matrix in (True, False)]
    torch.optim.AdamW(groups).load_state_dict(content["optimizer"])
    with pytest.warns(GPT2Warning, match="nanoGPT computes the exact GELU, and this model 'gelu_new'"):
        export_model(random_model(TINY), None, tmp_path / "other.pt", to="nanogpt")


def test_llmc_files_have_the_order_of_llmc(tmp_path: Path) -> None:
    model = random_model(TINY)
    export_model(model, None, tmp_path / "model.bin", to="llmc")
    content = (tmp_path / "model.bin").read_bytes()
    assert struct.unpack("<9i", content[:36]) == (20240326, 3, 6, 11, 2, 3, 6, 128, 0)
    state, parts = model.state_dict(), []
    parts += [state["wte.weight"], torch.zeros(117, 6), state["wpe.weight"]]
    for module in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
        parts += [state[f"h.{layer}.{module}.weight"].t() for layer in (0, 1)]
        parts += [state[f"h.{layer}.{module}.bias"] for layer in (0, 1)]
    parts += [state["ln_f.weight"], state["ln_f.bias"]]
    assert content[1024:] == np.concatenate([part.numpy().ravel() for part in parts]).tobytes()


def test_other_files_of_llmc_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    for number, message in ((20240520, "but a file of tokens of llm.c"), (20240328, "but a tokenizer of llm.c"), (7, ":")):
        path.write_bytes(struct.pack("<2i", number, 1) + bytes(1016))
        with pytest.raises(CheckpointError, match=f"is not an llm.c model ?{message}"):
            load_foreign(path, "llmc")
    path.write_bytes(struct.pack("<8i", 20240326, 4, 6, 11, 2, 3, 6, 128) + bytes(992))
    with pytest.raises(CheckpointError, match="has version 4 of"):
        load_foreign(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda c: c.pop("model"), "needs the dictionaries model and model_args"),
     (lambda c: c["model_args"].pop("n_head"), "its model_args lack 'n_head'"),
     (lambda c: c["model_args"].update(n_head=7), "n_embd=6 is not a multiple"),
     (lambda c: c["model_args"].update(n_layer=10**6), "n_layer=1000000, but the weights have 2 layers"),
     (lambda c: c["model"].pop("transformer.wpe.weight"), r"missing wpe\.weight"),
     (lambda c: c["model"].update(x=3), "'x' is not a tensor with a name")],
)  # fmt: skip
def test_what_is_no_checkpoint_of_nanogpt_is_one_line(change: Callable, message: str, tmp_path: Path) -> None:
    export_model(random_model(dataclasses.replace(TINY, activation_function="gelu")), None, tmp_path / "a", to="nanogpt")
    content = torch.load(tmp_path / "a")
    change(content)
    torch.save(content, tmp_path / "b")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_foreign(tmp_path / "b", "nanogpt")
    assert str(caught.value).isprintable()
