"""One server for all tests of this folder."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("starlette", reason="starlette is not installed (pip install -r requirements-dev.txt)")
pytest.importorskip("uvicorn", reason="uvicorn is not installed (pip install -r requirements-dev.txt)")
pytest.importorskip("prometheus_client", reason="prometheus_client is not installed (pip install -r requirements-dev.txt)")

from gpt2.serving.models import Served
from gpt_encoder import GPT2Tokenizer
from gpt_test.gpt2.serving.running import Running, running, served_models, slow_model


@pytest.fixture(scope="session")
def served(small_tokenizer: GPT2Tokenizer) -> dict[str, Served]:
    models = served_models(small_tokenizer)
    small = models["small"]
    return {
        **models,
        "slow": Served("slow", slow_model(small.model, 0.01), small.tokenizer),
        "drafting": Served("drafting", small.model, small.tokenizer, speculate=True),
        "coarse": Served("coarse", copy.deepcopy(small.model).to(torch.bfloat16), small.tokenizer),
    }


@pytest.fixture(scope="session")
def server(served: dict[str, Served]) -> Iterator[Running]:
    with running(served, slots=4, max_waiting=8, grace=0.0) as found:
        yield found
