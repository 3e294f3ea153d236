"""JSON that every reader accepts: it has no NaN and no infinity, so such numbers are written as null.

Standard library only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def to_json(value: Any, **options: Any) -> str:
    """Return `value` as JSON, with the options of `json.dumps`.

    >>> to_json({"loss": float("nan"), "step": 1})
    '{"loss": null, "step": 1}'
    """
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
