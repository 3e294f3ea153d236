"""`dtype="auto"`: which dtypes it accepts and which it refuses."""

from __future__ import annotations

from pathlib import Path

import torch

from gpt2 import GPT2
from gpt2.pretrained import agrees_greedily, load_fastest
from gpt2.quantization.kernels import input_steps, packing_engine
from gpt2.quantization.quantize import is_int8
from gpt2.quantization.rounding import MOST_STEPS
from gpt_config import GPT2Config
from gpt_test.conftest import random_model


def test_the_shipped_model_is_loaded_in_int8_where_the_processor_has_255_steps() -> None:
    """With 127 steps, one token of its text is 0.03 nats less likely than the best."""
    engine = packing_engine()
    has_all_steps = engine is None or input_steps(engine) == MOST_STEPS
    assert is_int8(GPT2.from_pretrained("gpt2-tiny", dtype="auto")) is has_all_steps


def test_if_the_text_differs_the_next_dtype_is_tried(small_folder: Path) -> None:
    tried = []

    def refuse(candidate: GPT2, reference: GPT2) -> bool:
        tried.append("int8" if is_int8(candidate) else candidate.dtype)
        return False

    model = load_fastest(small_folder, agree=refuse)
    assert tried == ["int8", torch.bfloat16]
    assert model.dtype == torch.float32 and not is_int8(model)


def test_one_different_token_is_enough_to_refuse(small_config: GPT2Config) -> None:
    reference, candidate = random_model(small_config), random_model(small_config)
    assert agrees_greedily(candidate, reference)
    candidate.h[0].mlp.c_proj.weight.data *= 0.5
    assert not agrees_greedily(candidate, reference)
