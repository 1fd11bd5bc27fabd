"""Owns strict configurations: nested frozen dataclasses to JSON and back, with every mistake reported at once."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from densedino.errors import InputError

__all__ = ["from_dict", "to_dict"]

T = TypeVar("T")

KIND = "kind"
"""The key that names the class, where a field may hold one of several dataclasses."""


def to_dict(config: object) -> dict[str, Any]:
    """A dataclass as what JSON holds: dicts, lists, strings, numbers, booleans and None; `from_dict` reads it back."""
    written: dict[str, Any] = _write(type(config), config)
    return written


def from_dict(cls: type[T], data: Mapping[str, Any]) -> T:
    """Make a dataclass of what `to_dict` wrote, or a part of it: what is absent gets its default.

    Fields may be bool, int, float, str, Path, None, Literal, tuple, dict[str, …], dataclasses, and unions of these. A
    union of several dataclasses is told apart by the key "kind", the class's name. The classes' annotations must be
    there at run time.

    Raises:
        InputError: unknown or missing keys, values of another type, values that a class refuses: all of them listed,
            each with its place, what is valid, and the nearest valid name.
    """
    problems: list[str] = []
    config: T = _read_dataclass(cls, data, "", problems)
    if problems:
        count = f"{len(problems)} problems" if len(problems) > 1 else "a problem"
        raise InputError(f"{count} in the configuration {cls.__name__}:\n  " + "\n  ".join(problems))
    return config


def _write(annotation: Any, value: Any) -> Any:
    if is_dataclass(value):
        hints = typing.get_type_hints(type(value))
        tag = {KIND: type(value).__name__} if len(_dataclasses_in(annotation)) > 1 else {}
        return tag | {field.name: _write(hints[field.name], getattr(value, field.name)) for field in fields(value)}
    # A container's items are annotated by the one member of a union that is that container.
    container = next((m for m in _members(annotation) if typing.get_origin(m) is type(value)), None)
    if isinstance(value, tuple):
        items = _item_annotations(container, len(value))
        return [_write(item, v) for item, v in zip(items, value, strict=True)]
    if isinstance(value, dict):
        return {key: _write(typing.get_args(container)[1], v) for key, v in value.items()}
    return str(value) if isinstance(value, Path) else value


def _read(annotation: Any, value: Any, place: str, problems: list[str]) -> Any:
    """`value` as `annotation` has it; None, and a line more in `problems`, if it is not that."""
    members = _members(annotation)
    classes = _dataclasses_in(annotation)
    if isinstance(value, Mapping) and classes:
        return _read_one_of(classes, value, place, problems)
    for member in members:
        found: list[str] = []
        origin = typing.get_origin(member)
        if origin is tuple and isinstance(value, list | tuple):
            return _read_tuple(member, value, place, problems)
        if origin is dict and isinstance(value, Mapping):
            item = typing.get_args(member)[1]
            return {str(key): _read(item, v, f"{place}.{key}", problems) for key, v in value.items()}
        read = _read_scalar(member, value, found)
        if not found:
            return read
    near = difflib.get_close_matches(str(value), [str(v) for m in members for v in typing.get_args(m)], n=1, cutoff=0.5)
    guess = f"; did you mean {near[0]!r}?" if near else ""
    problems.append(f"{place}: got {value!r}{guess or ';'} Valid: {' or '.join(map(_name, members))}.")
    return None


def _read_scalar(member: Any, value: Any, problems: list[str]) -> Any:
    if typing.get_origin(member) is Literal:
        fits = any(value == v and type(value) is type(v) for v in typing.get_args(member))
    elif member is float:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        value = float(value) if fits else value
    elif member is Path:
        fits = isinstance(value, str | Path)
        value = Path(value) if fits else value
    elif member in (bool, int, str, type(None)):
        fits = type(value) is member
    else:
        fits = False
    if not fits:
        problems.append("")
    return value


def _read_tuple(member: Any, value: list[Any] | tuple[Any, ...], place: str, problems: list[str]) -> Any:
    annotations = _item_annotations(member, len(value))
    if len(annotations) != len(value):
        problems.append(f"{place}: got {len(value)} items; valid: {len(annotations)}.")
        return None
    items = enumerate(zip(annotations, value, strict=True))
    return tuple(_read(item, v, f"{place}[{i}]", problems) for i, (item, v) in items)


def _read_one_of(classes: list[type], value: Mapping[str, Any], place: str, problems: list[str]) -> Any:
    if len(classes) == 1:
        return _read_dataclass(classes[0], value, place, problems)
    by_name = {cls.__name__: cls for cls in classes}
    if value.get(KIND) not in by_name:
        problems.append(f"{place}.{KIND}: got {value.get(KIND)!r}; valid: {', '.join(by_name)}.")
        return None
    return _read_dataclass(by_name[value[KIND]], {k: v for k, v in value.items() if k != KIND}, place, problems)


def _read_dataclass(cls: Any, data: Any, place: str, problems: list[str]) -> Any:
    if not isinstance(data, Mapping):
        problems.append(f"{place or cls.__name__}: got {data!r}; valid: a mapping of the fields of {cls.__name__}.")
        return None
    dot = f"{place}." if place else ""
    hints, known = typing.get_type_hints(cls), {field.name: field for field in fields(cls) if field.init}
    before = len(problems)
    for key in data:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            guess = f"did you mean {near[0]!r}? " if near else ""
            problems.append(f"{dot}{key}: unknown key; {guess}Valid: {', '.join(known)}.")
    for name, field in known.items():
        if name not in data and field.default is MISSING and field.default_factory is MISSING:
            problems.append(f"{dot}{name}: missing; it has no default. Valid: {_name(hints[name])}.")
    values = {name: _read(hints[name], data[name], dot + name, problems) for name in known if name in data}
    if len(problems) > before:
        return None
    try:
        return cls(**values)
    except InputError as error:
        problems.append(f"{place or cls.__name__}: {error}")
        return None


def _members(annotation: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def _dataclasses_in(annotation: Any) -> list[type]:
    return [member for member in _members(annotation) if is_dataclass(member) and isinstance(member, type)]


def _item_annotations(container: Any, length: int) -> list[Any]:
    args = typing.get_args(container)
    return [args[0]] * length if args[1:] == (...,) else list(args)


def _name(annotation: Any) -> str:
    if annotation is type(None):
        return "null"
    if typing.get_origin(annotation) is Literal:
        return ", ".join(map(repr, typing.get_args(annotation)))
    return annotation.__name__ if type(annotation) is type else str(annotation)
