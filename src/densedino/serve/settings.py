"""Owns what an operator can set: where the server listens, who may ask, and every limit."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from densedino.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Settings", "read_token"]

_LEAST_TOKEN = 16
_POSITIVE = (
    "max_bytes",
    "max_pixels",
    "max_tokens",
    "max_requests",
    "max_connections",
    "max_buffered",
    "max_wait",
    "max_batch",
    "decoders",
    "decode_seconds",
    "upload_seconds",
    "header_seconds",
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a server behaves. The defaults suit one machine that answers its own user."""

    host: str = "127.0.0.1"
    port: int = 8188
    token: str | None = None
    """What requests must bring as `Authorization: Bearer …`; any address but loopback needs one."""
    origins: tuple[str, ...] = ()
    """Pages of other origins that may call, such as "https://app.example.org". None by default."""
    max_bytes: int = 32 * 2**20
    """Of one request."""
    max_pixels: int = 50_000_000
    """Of one image, as its header declares it: more is refused before a pixel is decoded."""
    max_tokens: int = 4096
    """Larger images are made smaller, aspect kept, until they have at most that many patches."""
    max_requests: int = 32
    """Images worked on or waiting; the next one is told to come again (429)."""
    max_connections: int = 512
    max_buffered: int = 256 * 2**20
    """Bytes of all requests that are being received."""
    max_wait: float = 5.0
    """Seconds: an image that would be done later than that is refused (429), also if it was let in before."""
    max_batch: int = 8
    """Images run at once."""
    decoders: int = 2
    """Processes that decode images."""
    decode_seconds: float = 10.0
    upload_seconds: float = 20.0
    """In which a request's body must arrive."""
    header_seconds: float = 10.0
    """In which a request's head must arrive; also, how long a connection may be idle."""
    drain_seconds: float = 30.0
    """After SIGTERM, for answers that are due."""

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}; it must be above 0.")
        if not 0 <= self.port <= 65535:
            raise InputError(f"port {self.port} is none; give 1 to 65535, or 0 for any that is free.")
        if self.token is not None and len(self.token) < _LEAST_TOKEN:
            raise InputError(
                f"the token has {len(self.token)} characters; give at least {_LEAST_TOKEN}, such as "
                'python -c "import secrets; print(secrets.token_urlsafe())" prints.'
            )
        if self.token is not None and not (self.token.isascii() and self.token.isprintable() and " " not in self.token):
            raise InputError("the token has spaces or characters outside ASCII; an HTTP header cannot carry it.")
        if not self.loopback and self.token is None:
            raise InputError(
                f"{self.host} can be reached from other machines, and no token is set. Set DENSEDINO_TOKEN or "
                "--token-file to a secret of 16 characters or more, or leave --host out to listen on this machine only."
            )
        for origin in self.origins:
            if not origin.startswith(("http://", "https://")) or origin.count("/") != 2:
                raise InputError(f"origin {origin!r}: write scheme and host, such as https://app.example.org.")

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False


def read_token(path: Path | None) -> str | None:
    """The token in the file `path`, else that of the environment, else None.

    Raises:
        InputError: the file cannot be read or is empty.
    """
    if path is None:
        return os.environ.get("DENSEDINO_TOKEN") or None
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--token-file {path}: {error}") from error
    if not text:
        raise InputError(f"--token-file {path} is empty; write the token into it, on one line.")
    return text
