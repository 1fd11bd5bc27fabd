"""Owns the shapes of JSON that the service takes and gives, as OpenAPI shows them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "ERRORS",
    "IMAGE_BODY",
    "CollectionInfo",
    "ErrorBody",
    "Found",
    "Item",
    "Model",
    "Models",
    "SceneInfo",
    "SearchRequest",
    "SearchResult",
    "Segmented",
    "Similar",
    "State",
]

Numbers = list[float]
Grid = Annotated[tuple[int, int], Field(description="rows and columns of patches")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class ErrorDetail(_Strict):
    """What went wrong."""

    kind: str = Field(examples=["image"])
    message: str
    request_id: str


class ErrorBody(_Strict):
    """The body of every answer that is no success."""

    error: ErrorDetail


class State(_Strict):
    """Of a probe."""

    status: str = Field(examples=["ok"])


class Model(_Strict):
    """A model that answers."""

    id: str = Field(examples=["vitt16"])
    architecture: str
    embed_dim: int
    depth: int
    stride: int
    licence: str
    untrained: bool = Field(description="True: its weights are random, and so are its features")
    engine: str
    precision: str
    max_bytes: int
    max_pixels: int
    max_tokens: int


class Models(_Strict):
    """All models; one, so far."""

    models: list[Model]


class Similar(_Strict):
    """Similarity of every patch of an image to one of its patches."""

    patch: Grid
    grid: Grid
    stride: int
    similarity: list[Numbers] = Field(description="cosine of every patch, rows of columns")


class Segmented(_Strict):
    """A mask on the grid of patches; ask for format=png to have it in pixels."""

    grid: Grid
    threshold: float
    scores: list[Numbers]
    mask: list[list[bool]]


class SearchRequest(_Strict):
    """A vector to look for."""

    vector: Annotated[list[float], Field(min_length=1, max_length=8192)]
    k: Annotated[int, Field(ge=1, le=1000)] = 20
    of: Literal["patches", "cls"] = "patches"


class Found(_Strict):
    """One image of the collection, with its nearest patch."""

    item: int
    name: str
    score: float = Field(description="cosine")
    patch: Grid
    grid: Grid


class SearchResult(_Strict):
    """The nearest images, best first."""

    searched: int = Field(description="images that were compared")
    results: list[Found]


class Item(_Strict):
    """One image of the collection."""

    item: int
    name: str


class CollectionInfo(_Strict):
    """What the server was started with."""

    count: int
    searchable: int
    stored: bool = Field(description="features are those of a store; else they are computed")
    layers: list[int] = Field(description="that a store has besides the last")
    scene: bool = Field(description="there is a scene instead: see /v1/scene")
    items: list[Item]


class SceneInfo(_Strict):
    """The scene that the server was started with."""

    size: Grid
    grid: Grid
    stride: int
    tile: int = Field(description="patches on a side of a tile")
    levels: int = Field(description="0 is full size; each next one half of it; at the last, one tile shows all")
    stored: bool
    metres_per_pixel: float | None


def _refused(what: str) -> dict[str, Any]:
    return {"model": ErrorBody, "description": what}


ERRORS: dict[int | str, dict[str, Any]] = {
    400: _refused("the request cannot be read"),
    401: _refused("the token is missing or wrong"),
    403: _refused("from a page of another origin, or by a foreign host name"),
    404: _refused("there is no such thing"),
    408: _refused("the body did not arrive in time"),
    413: _refused("too many bytes"),
    415: _refused("a content type that is not taken here"),
    422: _refused("not a usable image, or a parameter that makes no sense"),
    429: _refused("too much to do; Retry-After says when to come again"),
}

_BINARY = {"schema": {"type": "string", "format": "binary"}}
IMAGE_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "An image file (JPEG, PNG, WebP, AVIF, TIFF, …): its bytes, or the field `image` of a form.",
        "content": {
            "image/jpeg": _BINARY,
            "image/png": _BINARY,
            "application/octet-stream": _BINARY,
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image"],
                    "properties": {"image": {"type": "string", "format": "binary"}},
                }
            },
        },
    }
}
