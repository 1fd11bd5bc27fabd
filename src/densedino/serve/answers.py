"""Owns what routes share: how parameters are described and read, and how features become an answer."""

# No `from __future__ import annotations` here: FastAPI reads the annotations when a route is defined.

import functools
from typing import Annotated, Any

from fastapi import Query, Request, Response

from densedino.errors import InputError
from densedino.features.tokens import Features
from densedino.serve.service import Service
from densedino.serve.wire import MEDIA, DType, Format, Wanted, choose_format, encode

__all__ = [
    "BYTES",
    "FEATURES_CONTENT",
    "POINT",
    "AskedFormat",
    "Layers",
    "Parts",
    "Points",
    "Tokens",
    "answer_features",
    "layers_of",
    "points_of",
    "wanted_of",
]

POINT = r"^\d{1,6}(\.\d{1,6})?,\d{1,6}(\.\d{1,6})?$"
Tokens = Annotated[
    int | None,
    Query(
        ge=1,
        le=65536,
        description="resize to about so many patches; the image's own size if not given",
        examples=[1024],
    ),
]
Layers = Annotated[
    str,
    Query(pattern=r"^(-?\d{1,3}(,-?\d{1,3}){0,31})?$", description="blocks wanted besides the last", examples=["5,-2"]),
]
Parts = Annotated[
    str,
    Query(pattern=r"^[a-z,]{0,40}$", description="of cls, patches, registers", examples=["cls,patches"]),
]
Points = Annotated[list[str], Query(description="x,y in pixels of the image", examples=[["240,130"]], max_length=64)]
BYTES: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}


AskedFormat = Annotated[Format | None, Query(description="else what Accept says, else json")]
FEATURES_CONTENT: dict[str, Any] = {media: BYTES for name, media in MEDIA.items() if name != "json"} | {
    "application/json": {
        "schema": {"type": "object"},
        "example": {"model": "vitt16", "grid": [1, 2], "cls": [0.1, 0.2], "patches": [[[0.1, 0.2], [0.3, 0.4]]]},
    }
}


async def answer_features(service: Service, features: Features, *, wanted: Wanted) -> Response:
    """Features of one image, written as wanted."""
    body = await service.thread(functools.partial(encode, features, wanted, service.dino))
    headers = {"x-densedino-fingerprint": service.dino.fingerprint}
    return Response(body, media_type=MEDIA[wanted.format], headers=headers)


def wanted_of(request: Request, form: Format | None, parts: str, dtype: DType) -> Wanted:
    """What a request asks for. Raises: InputError: no such part, or things that do not go together."""
    named: Any = tuple(dict.fromkeys(part for part in parts.split(",") if part))
    return Wanted(format=choose_format(form, request.headers.get("accept", "")), parts=named, dtype=dtype)


def layers_of(text: str) -> tuple[int, ...]:
    """Blocks of the query "5,-1", each once."""
    return tuple(dict.fromkeys(int(part) for part in text.split(",") if part))


def points_of(texts: list[str]) -> list[tuple[float, float]]:
    """Pairs of "x,y". Raises: InputError: a text that is none."""
    pairs = []
    for text in texts:
        parts = text.split(",")
        try:
            x, y = float(parts[0]), float(parts[1])
        except (ValueError, IndexError):
            raise InputError(f"point {text[:40]!r}: write x,y in pixels of the image, such as 240,130.") from None
        if len(parts) != 2 or not (0 <= x < 1e6 and 0 <= y < 1e6):
            raise InputError(f"point {text[:40]!r}: write x,y in pixels of the image, such as 240,130.")
        pairs.append((x, y))
    return pairs
