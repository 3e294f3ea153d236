"""llama.cpp itself reads our GGUF files, and we read its quantized ones. Slow, because it has to be built for its tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpt2 import GPT2
from gpt2.formats.export import export_model
from gpt2.formats.gguf import precision_of
from gpt2.generation.loop import generate
from gpt2.pretrained import load_foreign
from gpt_config import GPT2Config
from gpt_encoder import GPT2Tokenizer, load_tokenizer
from gpt_encoder.interface import Tokenizer
from gpt_test.conftest import random_model

pytestmark = pytest.mark.slow
llama_cpp = pytest.importorskip("llama_cpp", reason="this system has no llama-cpp-python")

TEXTS = (
    "Once upon a time, there was a small cat.", "  two\n\nlines\t of 1234 'quoted' text!", "naïve 日本 \U0001f600 fin",
    "<|endoftext|> is text here",
)  # fmt: skip


def opened(path: Path, n_ctx: int) -> Any:
    return llama_cpp.Llama(
        str(path), n_ctx=n_ctx, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False,
        type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32,
    )  # fmt: skip


def log_probs(llama: Any, ids: list[int]) -> torch.Tensor:
    """The log-probabilities of the token after each of `ids`."""
    llama.reset()
    llama.eval(ids)
    return torch.from_numpy(np.array(llama.scores[: len(ids)])).log_softmax(-1)


def greedy(llama: Any, prompt: list[int], n_new: int) -> list[int]:
    llama.reset()
    tokens = llama.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0)
    return [int(next(tokens)) for _ in range(n_new)]


def compare(path: Path, model: GPT2, tokenizer: Tokenizer, tolerance: float, *, prompt: str, n_new: int) -> None:
    """Compare ids, greedy text and log-probabilities with the numbers in the file."""
    llama = opened(path, model.config.n_positions)
    for text in TEXTS:
        assert llama.tokenize(text.encode(), add_bos=False, special=False) == tokenizer.encode(text), text
    ids = tokenizer.encode(prompt)
    with torch.inference_mode():
        expected = generate(model, torch.tensor([ids]), max_new_tokens=n_new, stop_at_eot=False)[0].tolist()
        ours = model(torch.tensor([expected]))[0].log_softmax(-1)
    theirs = log_probs(llama, expected)
    difference = float((theirs - ours).abs().max())
    assert difference < tolerance, difference
    new = greedy(llama, ids, n_new)
    named = [token_id for token_id in new if token_id < tokenizer.vocab_size]
    assert llama.detokenize(named).decode("utf-8", "replace") == tokenizer.decode(named)
    n_equal = next((place for place, (a, b) in enumerate(zip(new, expected[len(ids) :], strict=True)) if a != b), n_new)
    if n_equal < n_new:  # the best two tokens may differ by less than what llama.cpp rounds
        best = ours[len(ids) + n_equal - 1].topk(2).values
        assert float(best[0] - best[1]) < 2 * tolerance, (new, expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0.01), ("float16", 0.02), ("bfloat16", 0.1), ("q8_0", 0.5)])
def test_a_shipped_model(dtype: str, tolerance: float, tmp_path: Path) -> None:
    """llama.cpp rounds GELU to float16, and what it multiplies with weights in fewer bits to as many."""
    model, tokenizer = GPT2.from_pretrained("gpt2-tiny"), load_tokenizer("gpt2-tiny")
    export_model(model, tokenizer, tmp_path / "model.gguf", to="gguf", dtype=dtype)
    read = load_foreign(tmp_path / "model.gguf")[0].float()
    compare(tmp_path / "model.gguf", read, tokenizer, tolerance, prompt="Once upon a time", n_new=20)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0.01), ("float16", 0.1)])
def test_an_own_vocabulary_with_unused_rows(
    dtype: str, tolerance: float, small_tokenizer: GPT2Tokenizer, tmp_path: Path
) -> None:
    end = small_tokenizer.eot_token_id
    model = random_model(
        GPT2Config(
            vocab_size=304, n_positions=128, n_embd=60, n_layer=2, n_head=5, n_inner=28, bos_token_id=end, eos_token_id=end,
            layer_norm_epsilon=1e-4,
        )
    )  # fmt: skip
    export_model(model, small_tokenizer, tmp_path / "model.gguf", to="gguf", dtype=dtype)
    read = load_foreign(tmp_path / "model.gguf")[0].float()
    compare(tmp_path / "model.gguf", read, small_tokenizer, tolerance, prompt="the small cat", n_new=20)


@pytest.mark.parametrize(("kind", "name"), [("Q4_0", "q4_0"), ("Q4_K_M", "q4_k"), ("Q5_K_M", "q5_k"), ("Q6_K", "q6_k")])
def test_files_that_llama_cpp_quantized_are_read(
    kind: str, name: str, small_tokenizer: GPT2Tokenizer, tmp_path: Path
) -> None:
    """Our logits with the dequantized weights are llama.cpp's with the quantized ones, up to its rounding of activations."""
    model = random_model(GPT2Config(vocab_size=304, n_positions=64, n_embd=256, n_layer=2, n_head=4))
    export_model(model, small_tokenizer, tmp_path / "whole.gguf", to="gguf")
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    small = tmp_path / "small.gguf"
    assert llama_cpp.llama_model_quantize(str(tmp_path / "whole.gguf").encode(), str(small).encode(), settings) == 0
    assert precision_of(small) == name
    read, tokenizer = load_foreign(small)
    assert isinstance(tokenizer, GPT2Tokenizer) and tokenizer.encode(TEXTS[0]) == small_tokenizer.encode(TEXTS[0])
    ids = torch.randint(0, 300, (30,), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours, whole = (each(ids[None])[0].log_softmax(-1) for each in (read, model))
    theirs = log_probs(opened(small, 64), ids.tolist())
    assert float((theirs - ours).abs().mean()) < 0.5 * float((ours - whole).abs().mean())
    assert float((theirs - ours).abs().max()) < 1.0 < float((ours - whole).abs().max())
