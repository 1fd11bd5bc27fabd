"""Features over HTTP, and the page that shows them. `densedino.serve.Client` talks to a server; it needs no extra."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from densedino.serve.client import Client

__all__ = ["Client"]


def __getattr__(name: str) -> Any:
    if name == "Client":
        from densedino.serve.client import Client

        return Client
    raise AttributeError(f"module 'densedino.serve' has no attribute {name!r}; it has Client")
