"""A substitute for hypothesis if it is not installed: property tests are reported as skipped, and all other tests run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from typing import Any

import pytest


class _Strategy:
    """A substitute for strategies, for functions that make them, and for combinations of them. No test draws from it."""

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
    """A decorator that returns the test unchanged."""
    return lambda test: test


def install() -> None:
    """Make `import hypothesis` return the substitute, with the names that the tests import."""
    # The modules have a spec, because torch.compile reads the spec of each module in a list that contains hypothesis.
    module, strategies = (module_from_spec(ModuleSpec(name, None)) for name in ("hypothesis", "hypothesis.strategies"))
    strategy = _Strategy()
    strategies.__getattr__ = lambda name: getattr(strategy, name)  # type: ignore[method-assign]
    names = {"given": _given, "settings": _unchanged, "example": _unchanged, "assume": strategy, "strategies": strategies}
    for name, value in names.items():
        setattr(module, name, value)
    sys.modules |= {"hypothesis": module, "hypothesis.strategies": strategies}
