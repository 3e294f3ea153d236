"""Gate: what every request passes: the checks of host, origin and key, errors in one shape, and a line in the access log.

It is an ASGI application around another one, and knows no endpoint except by its path.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import logging
import secrets
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gpt2.serving.fields import ApiError, json_bytes
from gpt2.serving.metrics import Metrics

access_log = logging.getLogger("gpt2.serving.access")
_log = logging.getLogger("gpt2.serving")

# Paths that need no key: a browser cannot send one with the page, and neither can a load balancer.
OPEN_PATHS = ("/", "/health")

# Of all answers: no cache keeps a text, no browser takes JSON for a page, and no other page shows ours in a frame, where its
# visitor would click on what they do not see. A page's own policy cannot say the last, because it is in a `meta` element.
_HEADERS = [
    (b"cache-control", b"no-store"),
    (b"x-content-type-options", b"nosniff"),
    (b"content-security-policy", b"frame-ancestors 'none'"),
]

# The status in the log for a client that has left before the answer.
LEFT = 499


@dataclass(frozen=True)
class Access:
    """Who may call. `api_key` None: everybody who reaches the port. `hosts`: names in the Host header besides addresses."""

    api_key: str | None = None
    hosts: Collection[str] = ()
    log: str = "text"  # or "json", "none"
    most_bytes: int = 4 * 2**20  # of a body
    paths: Collection[str] = field(default=())  # for the metrics; all others are counted together


class Gate:
    """Wraps an application: see the head of this file."""

    def __init__(self, app: ASGIApp, access: Access, metrics: Metrics) -> None:
        self._app, self._access, self._metrics = app, access, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1000})
            return
        call = _Call(scope, send)
        try:
            self._check(scope)
            await self._app(scope, receive, call.send)
        except ClientDisconnect:
            call.status = LEFT
        except Exception as error:
            await call.fail(_as_api_error(error, call.number))
        finally:
            self._report(call)

    def _check(self, scope: Scope) -> None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get(b"host", "")
        if not is_allowed_host(host, self._access.hosts):
            raise ApiError(
                f"the Host header {host!r} is not a name of this server: use its address, or allow the name at its start",
                code="invalid_host",
            )
        origin = headers.get(b"origin")
        if origin is not None and origin.partition("://")[2] != host:
            raise ApiError("requests from pages of other sites are refused", status=403, code="cross_origin")
        if scope["path"] not in OPEN_PATHS and not self._has_key(dict(scope["headers"]).get(b"authorization", b"")):
            raise ApiError(
                "the API key is missing or wrong: send it as Authorization: Bearer KEY",
                status=401,
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        length = headers.get(b"content-length", "0")
        if length.isdecimal() and int(length[:20]) > self._access.most_bytes:
            raise too_large(self._access.most_bytes)

    def _has_key(self, header: bytes) -> bool:
        if self._access.api_key is None:
            return True
        kind, _, key = header.partition(b" ")
        is_same = hmac.compare_digest(key.strip(), self._access.api_key.encode("utf-8"))
        return is_same and kind.lower() == b"bearer"

    def _report(self, call: _Call) -> None:
        seconds = time.perf_counter() - call.began
        path = call.scope["path"]
        self._metrics.answered(path if path in self._access.paths else "other", call.status, seconds)
        if self._access.log == "none":
            return
        client = (call.scope.get("client") or ("-",))[0]
        facts = {
            "client": client,
            "method": call.scope["method"],
            "path": path,
            "status": call.status,
            "seconds": round(seconds, 4),
            "id": call.number,
            **call.scope.get("gpt2.facts", {}),
        }
        if self._access.log == "json":
            access_log.info("%s", json.dumps({"time": round(time.time(), 3), **facts}))
        else:
            shown = " ".join(f"{name}={value}" for name, value in facts.items() if name not in _IN_FRONT)
            access_log.info("%s %s %s %s %s", client, facts["method"], ascii(path)[1:-1], call.status, shown)


_IN_FRONT = ("client", "method", "path", "status")


class _Call:
    """One request on its way: its number, when it began, and the status of its answer."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self.scope, self._send = scope, send
        self.number = secrets.token_hex(6)
        self.began = time.perf_counter()
        self.status = LEFT
        self._has_started = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._has_started, self.status = True, message["status"]
            own = [(b"x-request-id", self.number.encode()), *_HEADERS]
            message = {**message, "headers": [*message.get("headers", []), *own]}
        await self._send(message)

    async def fail(self, error: ApiError) -> None:
        """Send an error, if the answer has not begun."""
        if self._has_started:
            return
        body = json_bytes(error.body)
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        headers += [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in error.headers.items()]
        await self.send({"type": "http.response.start", "status": error.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})


def _as_api_error(error: Exception, number: str) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        code = {404: "path_not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        message = {404: "there is no such path: see docs/serve.md for the list", 405: "this path has other methods"}
        return ApiError(
            message.get(error.status_code, error.detail), status=error.status_code, code=code, headers=error.headers
        )
    _log.error("error %s", number, exc_info=error)
    return ApiError(f"the server failed; its log has the reason (error {number})", status=500, code="internal_error")


def too_large(most_bytes: int) -> ApiError:
    """The error for a body above the limit."""
    return ApiError(f"the body has more than {most_bytes} bytes: send less", status=413, code="body_too_large")


def is_allowed_host(header: str, names: Collection[str]) -> bool:
    """Whether the Host header is an address, localhost, or one of `names`; the port does not matter.

    A page of another site can make its own name point to this machine, so other names are refused. It cannot do this with
    addresses.

    >>> [is_allowed_host(host, ["gpt2.lan"]) for host in ("127.0.0.1:80", "[::1]:80", "localhost", "gpt2.lan", "evil.com")]
    [True, True, True, True, False]
    """
    host, colon, port = header.rpartition(":") if not header.endswith("]") else (header, "", "")
    if not colon:
        host = header
    elif not port.isdecimal():
        return False
    host = host.lower().rstrip(".")
    if host == "localhost" or host.endswith(".localhost") or host in {name.lower() for name in names}:
        return True
    try:
        ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether only programs on this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def add_facts(scope: Scope, **facts: Any) -> None:
    """Add facts to the line of a request in the access log."""
    scope.setdefault("gpt2.facts", {}).update(facts)
