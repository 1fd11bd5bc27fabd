"""Owns how options that several verbs have are written on the command line."""

from __future__ import annotations

import re

from densedino.errors import InputError

__all__ = ["parse_resize"]


def parse_resize(text: str) -> int | tuple[int, int] | None:
    """What `--resize` says: None for native, the short side in pixels, or (height, width).

    Raises:
        InputError: none of these.
    """
    if text == "native":
        return None
    match = re.fullmatch(r"([1-9][0-9]*)(?:[x×]([1-9][0-9]*))?", text.lower())
    if not match:
        raise InputError(f"--resize {text!r}: give native, 512 (short side in pixels), or 512x768 (height x width).")
    return (int(match[1]), int(match[2])) if match[2] else int(match[1])
