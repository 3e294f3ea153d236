"""Small models of transformers with random weights, for the tests of the folders that other programs write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed (pip install '.[verify]')")

SHAPE = {"vocab_size": 300, "n_positions": 40, "n_embd": 24, "n_layer": 2, "n_head": 3}


def randomized(model: Any) -> Any:
    """`model` in eval mode, with all its parameters random."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "ln_" in name and name.endswith("weight") else 0.0
            parameter.copy_(centre + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def model(kind: str = "GPT2LMHeadModel", **changes: Any) -> Any:
    config = transformers.GPT2Config(**{**SHAPE, "bos_token_id": 299, "eos_token_id": 299, **changes})
    return randomized(getattr(transformers, kind)(config))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
