"""Owns the gate in front of the routes: who may ask, what browsers are told, and one log line and count per request."""

from __future__ import annotations

import hmac
import json
import logging
import time
import uuid
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from densedino.serve.refusal import RefusalError, error_body

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from densedino.serve.metrics import Metrics
    from densedino.serve.settings import Settings

__all__ = ["Guard", "JsonLines"]

log = logging.getLogger("densedino.serve")

_OPEN = ("/healthz", "/readyz")  # also without a token: an orchestrator has none
_LOCAL = ("localhost", "127.0.0.1", "::1")
_POLICY = (
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
_PREFLIGHT = {
    "access-control-allow-methods": "GET, POST",
    "access-control-allow-headers": "authorization, content-type, accept",
    "access-control-max-age": "600",
}


class Guard:
    """ASGI middleware, the outermost."""

    def __init__(self, app: ASGIApp, *, settings: Settings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check, pass on, and note how it ended."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        exchange = _Exchange(send, scope, self._browser_headers(headers.get("origin")))
        scope["request_id"] = exchange.id
        try:
            self._check(scope, headers)
            if self._is_preflight(scope, headers):
                await exchange.answer(204, b"", _PREFLIGHT)
            else:
                await self._app(scope, receive, exchange.send)
        except RefusalError as refusal:
            await exchange.refuse(refusal)
        except Exception:
            log.exception("failed", extra={"fields": {"request_id": exchange.id}})
            if not exchange.status:
                await exchange.refuse(RefusalError(500, "The server failed; its log says how.", kind="internal"))
        finally:
            self._note(scope, exchange)

    def _browser_headers(self, origin: str | None) -> dict[str, str]:
        if origin in self._settings.origins:
            return {**_HEADERS, "access-control-allow-origin": str(origin), "vary": "origin"}
        return _HEADERS

    def _check(self, scope: Scope, headers: dict[str, str]) -> None:
        """Raise if this request may not be answered.

        Raises:
            RefusalError: 401 without the token; 403 from a foreign page, or by a host name that is foreign.
        """
        host, origin = headers.get("host", ""), headers.get("origin")
        if self._settings.token is None and _name(host) not in _LOCAL:
            # A foreign name that leads here is how web pages reach into a local network (DNS rebinding).
            raise RefusalError(403, f"This server answers to localhost, not to {host[:99]!r}.", kind="host")
        known = origin is None or origin in self._settings.origins or urlsplit(origin).netloc == host
        if not known or (origin is None and headers.get("sec-fetch-site") == "cross-site" and scope["path"] != "/"):
            raise RefusalError(403, f"Pages of {str(origin)[:99]} may not use this server.", kind="origin")
        if self._settings.token is None or not self._is_secret(scope, headers):
            return
        given = headers.get("authorization", "")
        if not hmac.compare_digest(given.encode("utf-8"), f"Bearer {self._settings.token}".encode()):
            what = "The token is wrong." if given else "This server wants a token."
            text = f"{what} Send the header Authorization: Bearer TOKEN."
            raise RefusalError(401, text, kind="token", headers={"www-authenticate": "Bearer"})

    def _is_secret(self, scope: Scope, headers: dict[str, str]) -> bool:
        """The page itself is as public as its source; what it asks for is not."""
        path = str(scope["path"])
        return (
            path not in _OPEN
            and (path.startswith("/v1/") or path == "/metrics")
            and not self._is_preflight(scope, headers)
        )

    def _is_preflight(self, scope: Scope, headers: dict[str, str]) -> bool:
        allowed = headers.get("origin") in self._settings.origins
        return scope["method"] == "OPTIONS" and "access-control-request-method" in headers and allowed

    def _note(self, scope: Scope, exchange: _Exchange) -> None:
        seconds = time.perf_counter() - exchange.start
        route = getattr(scope.get("route"), "path", "other")
        self._metrics.answered(route, exchange.status, seconds)
        fields = {
            "request_id": exchange.id,
            "method": scope["method"],
            "path": scope["path"],
            "status": exchange.status,
            "ms": round(1000 * seconds, 1),
            "bytes": exchange.sent,
            "client": (scope.get("client") or ("", 0))[0],
        }
        log.info("request", extra={"fields": fields})


def _name(host: str) -> str:
    """The host without its port."""
    return host.partition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0].lower()


class _Exchange:
    """One request's answer on its way out."""

    def __init__(self, send: Send, scope: Scope, headers: dict[str, str]) -> None:
        self.id = uuid.uuid4().hex  # ours, not the client's: a log line cannot be forged
        self.start = time.perf_counter()
        self.status = 0
        self.sent = 0
        self._send, self._head = send, scope["method"] == "HEAD"
        self._headers = [
            (key.encode(), value.encode("latin-1")) for key, value in {**headers, "x-request-id": self.id}.items()
        ]

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": [*message.get("headers", ()), *self._headers]}
        elif message["type"] == "http.response.body":
            self.sent += len(message.get("body", b""))
        await self._send(message)

    async def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        if self.status:
            return
        encoded: list[Any] = [(key.encode(), value.encode("latin-1")) for key, value in headers.items()]
        if body:
            encoded += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await self.send({"type": "http.response.start", "status": status, "headers": encoded})
        await self.send({"type": "http.response.body", "body": b"" if self._head else body})

    async def refuse(self, refusal: RefusalError) -> None:
        await self.answer(refusal.status, error_body(refusal.kind, str(refusal), self.id), refusal.headers)


class JsonLines(logging.Formatter):
    """A log record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Fields of `extra={"fields": …}` stand beside time, level and message."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line)
