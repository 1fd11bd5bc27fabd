"""Owns how options that several verbs have are written on the command line."""

from __future__ import annotations

import json
import re
from typing import Any, TypeVar

from densedino.config import from_dict, to_dict
from densedino.errors import InputError, UnknownNameError

__all__ = ["override", "parse_resize"]

C = TypeVar("C")


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


def override(config: C, assignments: tuple[str, ...]) -> C:
    """`config` with fields set as `--set` says: "gram.steps=100", "stages.0.optimizer.clip=1", "seed=3".

    A path goes through fields, numbers of list items, and names of list items that have one, of which the list need
    not be named: `gram` is the stage of that name. Values are JSON, or text.

    Raises:
        InputError: no such field, or a value that it cannot have.
    """
    if not assignments:
        return config
    data = to_dict(config)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not path:
            raise InputError(f"--set {assignment!r}: give FIELD=VALUE, as in --set seed=3.")
        parents, last = _steps(data, path)
        place: Any = data
        for part in parents:
            place = place[_key(place, part, path)]
        key = _key(place, last, path)
        before, place[key] = place[key], _value(text)
        if isinstance(before, dict) and not isinstance(place[key], dict | None):
            raise InputError(f"--set {assignment}: {path} has fields of its own: {', '.join(before)}. Set one of them.")
    return from_dict(type(config), data)


def _steps(data: dict[str, Any], path: str) -> tuple[list[str], str]:
    """The parts of a path, the last one by itself; before the name of a list's item, the list."""
    parts = path.split(".")
    lists = [key for key, items in data.items() if isinstance(items, list) and parts[0] in _names(items)]
    *parents, last = [*lists[:1], *parts] if parts[0] not in data else parts
    return parents, last


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return {"None": None, "True": True, "False": False}.get(text, text)


def _key(place: Any, part: str, path: str) -> Any:
    """The key or index of `place` that a part of the path means."""
    if isinstance(place, dict) and part in place:
        return part
    if isinstance(place, list) and part in _names(place):
        return _names(place).index(part)
    if isinstance(place, list) and part.isascii() and part.isdigit() and int(part) < len(place):
        return int(part)
    if not isinstance(place, dict | list) or not place:
        raise InputError(f"--set {path}: there is nothing {part!r} in {json.dumps(place)}.")
    named = [
        name for items in (place.values() if isinstance(place, dict) else [place]) for name in _names(items) if name
    ]
    valid = [*place, *named] if isinstance(place, dict) else [*map(str, range(len(place))), *named]
    raise UnknownNameError("field", part, valid, hint=f"(in --set {path})")


def _names(items: Any) -> list[str]:
    """The names of a list's items, "" where one has none."""
    if not isinstance(items, list):
        return []
    return [str(item.get("name", "")) if isinstance(item, dict) else "" for item in items]
