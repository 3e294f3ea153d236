"""The fields of a JSON body, checked one by one, and ApiError, the error of a request. It knows no endpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from gpt_config.errors import one_line

# Characters of a wrong value that an error repeats.
_SHOWN = 60


class ApiError(Exception):
    """An error in OpenAI's shape. `param` is the field that is wrong, and `code` a name that programs can test."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str = "invalid_value",
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(one_line(message))
        self.status, self.code, self.param, self.headers = status, code, param, dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The JSON that a client gets."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = "authentication_error" if self.status == 401 else kind
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def unsupported(name: str, reason: str) -> ApiError:
    """The error for a field that this server does not have."""
    return ApiError(f"{name} is not supported: {reason}", code="unsupported", param=name)


def json_bytes(value: object) -> bytes:
    """JSON in ASCII, because text with lone surrogates has no UTF-8."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode("ascii")


def parse_body(content: bytes) -> Fields:
    """Return the fields of a body. Raises ApiError if it is not a JSON object."""
    try:
        found = json.loads(content, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # also for numbers with too many digits and for bytes that are not UTF-8
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ApiError(f"the body is not JSON ({reason}): send an object", code="invalid_json") from None
    if not isinstance(found, dict):
        raise ApiError(f"the body is a {type(found).__name__}: send a JSON object", code="invalid_json")
    return Fields(found)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def shown(value: object) -> str:
    """A value of a request as an error repeats it."""
    text = ascii(value) if not isinstance(value, int) or abs(value) < 10**_SHOWN else "a number of many digits"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


class Fields:
    """The fields of a JSON object. A field that is null counts as missing. Each method raises ApiError for a wrong value."""

    def __init__(self, values: Mapping[str, Any], place: str = "") -> None:
        self._values, self._place = values, place

    def get(self, name: str) -> Any:
        """The value as it is; None if it is missing."""
        return self._values.get(name)

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int | None:
        """A whole number from `low` to `high`."""
        value = self.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(name, f"must be a whole number from {low} to {high}", code="invalid_type")
        if not low <= value <= high:
            raise self.wrong(name, f"must be a whole number from {low} to {high}")
        return value

    def whole(self, name: str, low: int, high: int, default: int) -> int:
        """A whole number from `low` to `high`, with a default."""
        value = self.integer(name, low, high, default)
        assert value is not None
        return value

    def number(self, name: str, low: float, high: float, default: float) -> float:
        """A number from `low` to `high`."""
        value = self.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.wrong(name, f"must be a number from {low:g} to {high:g}", code="invalid_type")
        if not low <= value <= high:
            raise self.wrong(name, f"must be a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(name, "must be true or false", code="invalid_type")
        return value

    def text(self, name: str, default: str | None = None) -> str | None:
        """A string."""
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.wrong(name, "must be a string", code="invalid_type")
        return value

    def choice(self, name: str, choices: Sequence[str], default: str) -> str:
        """One of some strings."""
        value = self.get(name)
        if value is not None and value not in choices:
            raise self.wrong(name, f"must be {' or '.join(choices)}")
        return default if value is None else str(value)

    def object(self, name: str) -> Fields:
        """An object; an empty one if it is missing."""
        value = self.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(name, "must be an object", code="invalid_type")
        return Fields(value or {}, f"{self._place}{name}.")

    def items(self) -> list[tuple[str, Any]]:
        """All names and values."""
        return list(self._values.items())

    def refuse(self, reasons: Mapping[str, tuple[str, Callable[[Any], bool]]]) -> None:
        """Raise ApiError for a field in `reasons`: name -> (why, whether this value asks for nothing)."""
        for name, (reason, is_harmless) in reasons.items():
            value = self.get(name)
            if value is not None and not is_harmless(value):
                raise unsupported(name, reason)

    def wrong(self, name: str, must: str, *, code: str = "invalid_value") -> ApiError:
        """The error for a wrong value of a field."""
        place = f"{self._place}{name}"
        return ApiError(f"{place}={shown(self.get(name))} {must}", code=code, param=place)
