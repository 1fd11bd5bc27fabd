"""Owns how a request is refused: one exception that carries the status, and the one shape of every error's body."""

from __future__ import annotations

import json
import math
from typing import Any

from densedino.errors import DenseDinoError

__all__ = ["RefusalError", "busy", "error_body"]


class RefusalError(DenseDinoError):
    """A request that gets no result, with the HTTP status that says why."""

    def __init__(self, status: int, message: str, *, kind: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        """One word for programs: "image", "busy", "token" …"""
        self.headers = headers or {}


def busy(message: str, *, after: float) -> RefusalError:
    """A 429 that says when to come again, in `after` seconds."""
    seconds = max(1, math.ceil(after))
    return RefusalError(429, f"{message} Try again in {seconds} s.", kind="busy", headers={"retry-after": str(seconds)})


def error_body(kind: str, message: str, request_id: str) -> bytes:
    """The JSON of an error, in ASCII: what came in may be no valid text."""
    content: dict[str, Any] = {"error": {"kind": kind, "message": message, "request_id": request_id}}
    return json.dumps(content).encode("ascii")
