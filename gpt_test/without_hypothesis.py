"""A stand-in for hypothesis where it is not installed: each property test is skipped by name, and every other test runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from typing import Any

import pytest


class _Strategy:
    """Stands for a strategy, for what makes one, and for what one is combined into: no test draws from it."""

    def __call__(self, *args: object, **options: object) -> _Strategy:
        return self

    def __getattr__(self, name: str) -> _Strategy:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __or__(self, other: object) -> _Strategy:
        return self


def _given(*args: object, **options: object) -> pytest.MarkDecorator:
    return pytest.mark.skip(reason="hypothesis is not installed (pip install -r requirements-dev.txt)")


def _unchanged(*args: object, **options: object) -> Callable[[Any], Any]:
    """A decorator that leaves a test as it is."""
    return lambda test: test


def install() -> None:
    """Let `import hypothesis` find the stand-in, with the names that the tests import."""
    # With a spec, because torch's compiler asks for the spec of each module in a list, and hypothesis is in that list.
    module, strategies = (module_from_spec(ModuleSpec(name, None)) for name in ("hypothesis", "hypothesis.strategies"))
    strategy = _Strategy()
    strategies.__getattr__ = lambda name: getattr(strategy, name)  # type: ignore[method-assign]
    names = {"given": _given, "settings": _unchanged, "example": _unchanged, "assume": strategy, "strategies": strategies}
    for name, value in names.items():
        setattr(module, name, value)
    sys.modules |= {"hypothesis": module, "hypothesis.strategies": strategies}
