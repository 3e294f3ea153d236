"""CTranslate2 models: CTranslate2 computes the logits and the greedy ids of the model, also in int8 and with unused rows."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from gpt2 import GPT2
from gpt2.formats.ctranslate2 import load_engine
from gpt2.formats.ctranslate2_file import stored_weights
from gpt2.formats.export import Agreement, export_model
from gpt_config import CheckpointError, GPT2Config, InputError
from gpt_encoder import CharTokenizer, GPT2Tokenizer
from gpt_encoder.interface import Tokenizer
from gpt_test.conftest import random_model

REASON = "is not installed (pip install -r requirements-dev.txt)"
ctranslate2 = pytest.importorskip("ctranslate2", reason=f"ctranslate2 {REASON}")
pytest.importorskip("transformers", reason=f"transformers {REASON}")

CONFIG = GPT2Config(vocab_size=304, n_positions=48, n_embd=60, n_layer=2, n_head=5)
VARIANTS = {
    "unused rows": CONFIG,
    "gelu": dataclasses.replace(CONFIG, n_inner=28, activation_function="gelu", layer_norm_epsilon=1e-2),
    "characters": dataclasses.replace(CONFIG, vocab_size=7, activation_function="relu"),
}


def logits_of(folder: Path, ids: list[int]) -> tuple[Tensor, list[int]]:
    """The logits of `ids`, and 20 greedy ids after them."""
    tokens = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))
    generator = ctranslate2.Generator(str(folder), device="cpu", intra_threads=1)
    prompt = [tokens[token_id] for token_id in ids]
    found = np.array(generator.forward_batch([prompt]), dtype=np.float32)[0]
    [result] = generator.generate_batch(
        [prompt], max_length=20, sampling_topk=1, include_prompt_in_result=False, end_token=[]
    )  # fmt: skip
    return torch.from_numpy(found), result.sequences_ids[0]


@pytest.mark.parametrize(("name", "dtype"), [*((name, "float32") for name in VARIANTS), ("unused rows", "int8")])
def test_ids_and_logits_are_those_of_the_model(
    name: str, dtype: str, small_tokenizer: GPT2Tokenizer, tmp_path: Path
) -> None:
    tokenizer: Tokenizer = CharTokenizer("a bc\n’") if name == "characters" else small_tokenizer
    model = random_model(VARIANTS[name])
    agreement = export_model(model, tokenizer, tmp_path / "out", to="ctranslate2", dtype=dtype)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "model.bin", "config.json", "vocabulary.json", "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip
    prompt = [token_id % model.config.vocab_size for token_id in (5, 117, 3, 101)]
    found, new = logits_of(tmp_path / "out", prompt)
    with torch.inference_mode():
        expected = model(torch.tensor([prompt]))[0]
    error = float((found - expected).abs().max() / expected.abs().max())
    if dtype == "float32":
        assert error < 1e-5 and agreement == Agreement(20, 20)
        assert new == model_ids(model, prompt)
    else:
        assert 0 < error < 0.2 and agreement.n_ids == 20


def model_ids(model: GPT2, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        for _ in range(20):
            ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], dim=1)
    return ids[0, len(prompt) :].tolist()


def test_what_ctranslate2_cannot_say_is_refused(
    small_tokenizer: GPT2Tokenizer, openai_tokenizer: GPT2Tokenizer, tmp_path: Path
) -> None:
    scaled = dataclasses.replace(CONFIG, scale_attn_by_inverse_layer_idx=True)
    for config, tokenizer, message in (
        (CONFIG, None, "a CTranslate2 model needs a tokenizer"),
        (CONFIG, openai_tokenizer, "the tokenizer has 50257 tokens and the model 304 rows"),
        (scaled, small_tokenizer, "CTranslate2 scales attention by the root of the width of a head only"),
    ):
        with pytest.raises(InputError, match=message):
            export_model(random_model(config), tokenizer, tmp_path / "out", to="ctranslate2")
        assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("damage", ["no scales", "cut"])
def test_damaged_weights_are_one_line(small_tokenizer: GPT2Tokenizer, tmp_path: Path, damage: str) -> None:
    export_model(random_model(CONFIG), small_tokenizer, tmp_path / "out", to="ctranslate2", dtype="int8")
    path = tmp_path / "out" / "model.bin"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"_scale", b"_scalx") if damage == "no scales" else content[: len(content) // 2])
    message = "has no scale for each row of" if damage == "no scales" else "is not a readable CTranslate2 model"
    with pytest.raises(CheckpointError, match=message):
        list(stored_weights(path))


def test_a_missing_weight_is_one_line(small_tokenizer: GPT2Tokenizer, tmp_path: Path) -> None:
    """CTranslate2 raises a C++ exception, which Python sees as an IndexError."""
    export_model(random_model(CONFIG), small_tokenizer, tmp_path / "model", to="ctranslate2")
    path = tmp_path / "model" / "model.bin"
    path.write_bytes(path.read_bytes().replace(b"decoder/projection/weight", b"decoder/projection/weighs"))
    with pytest.raises(CheckpointError, match=r"is not a readable CTranslate2 model .* write it again"):
        load_engine(path.parent)
