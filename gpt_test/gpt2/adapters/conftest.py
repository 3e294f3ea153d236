"""What the tests of adapters share: peft, inputs, and values for the matrices that change the output a lot."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

IDS = torch.tensor([[1, 5, 2, 7, 3], [4, 4, 0, 6, 2]])


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="peft is not installed (pip install '.[test]')")


def fill(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Fill the parameters with random numbers, the same in each call."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def edit_config(folder: Path, **changes: object) -> None:
    """Change fields of the adapter_config.json in `folder`."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
