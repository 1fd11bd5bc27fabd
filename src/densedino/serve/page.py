"""Owns handing out the explorer page: its files are read once at the start, and no request names a path on disk."""

from __future__ import annotations

import hashlib
import importlib.resources
import mimetypes
from dataclasses import dataclass

__all__ = ["PageFile", "page_files"]

_TYPES = {".js": "text/javascript", ".svg": "image/svg+xml", ".webmanifest": "application/manifest+json"}


@dataclass(frozen=True)
class PageFile:
    """One file of the page."""

    body: bytes
    media_type: str
    etag: str


def page_files() -> dict[str, PageFile]:
    """All files in `serve/app`, by name; the page itself is index.html."""
    files = {}
    for entry in importlib.resources.files("densedino.serve").joinpath("app").iterdir():
        if entry.is_file() and not entry.name.startswith("."):
            body = entry.read_bytes()
            suffix = entry.name[entry.name.rfind(".") :]
            media = _TYPES.get(suffix) or mimetypes.guess_type(entry.name)[0] or "application/octet-stream"
            text = media.startswith("text/") or suffix == ".svg"
            media = f"{media}; charset=utf-8" if text else media
            files[entry.name] = PageFile(body, media, f'"{hashlib.sha256(body).hexdigest()[:32]}"')
    return files
