"""Owns the routes about the images that the server was started with: the list, previews, features, search."""

# No `from __future__ import annotations` here: FastAPI reads the annotations when a route is defined.

import functools
from typing import Annotated, Literal

import torch
from fastapi import FastAPI, Path, Query, Request, Response

from densedino.errors import InputError
from densedino.features.pictures import patch_at
from densedino.serve import schema
from densedino.serve.answers import (
    BYTES,
    FEATURES_CONTENT,
    POINT,
    AskedFormat,
    Layers,
    Parts,
    Tokens,
    answer_features,
    layers_of,
    points_of,
    wanted_of,
)
from densedino.serve.intake import read_image_bytes, read_json
from densedino.serve.service import Service, View
from densedino.serve.wire import DType

__all__ = ["add_collection", "add_search"]

_SHOWN = 500  # items of one answer
ItemNumber = Annotated[int, Path(ge=0, lt=2**31)]

_SEARCH_BODY = {
    "requestBody": {
        "required": True,
        "description": "A vector as JSON; or an image, of which `point` is looked for, or the whole without one.",
        "content": {
            "application/json": {
                "schema": schema.SearchRequest.model_json_schema(),
                "example": {"vector": [0.1, -0.2, 0.3], "k": 5},
            },
            **schema.IMAGE_BODY["requestBody"]["content"],
        },
    }
}


def add_search(app: FastAPI, service: Service) -> None:
    """The search route."""

    @app.post("/v1/search", tags=["collection"], openapi_extra=_SEARCH_BODY)
    async def search(
        request: Request,
        point: Annotated[str | None, Query(pattern=POINT, description="x,y in pixels of the image")] = None,
        k: Annotated[int, Query(ge=1, le=1000, description="images wanted, of an image; JSON says its own")] = 20,
    ) -> schema.SearchResult:
        """The images of the collection that are nearest to a vector or to an image, each with its nearest patch."""
        if not len(service.collection):
            raise InputError("there is nothing to search: start the server with images, or with a store.")
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json":
            asked = await read_json(request, service, schema.SearchRequest)
            return await _found(service, torch.tensor(asked.vector), k=asked.k, of=asked.of)
        async with read_image_bytes(request, service) as data:
            features = await service.features(data, service.search_view)
        if point is None:
            return await _found(service, features.cls[0], k=k, of="cls")
        row, column = patch_at(features, points_of([point])[0])
        return await _found(service, features.patches[0][row, column], k=k, of="patches")


async def _found(
    service: Service, vector: torch.Tensor, *, k: int, of: Literal["patches", "cls"]
) -> schema.SearchResult:
    collection = service.collection
    hits = await service.thread(functools.partial(collection.search, vector, k=k, whole=of == "cls"))
    results = [
        schema.Found(
            item=hit.item,
            name=collection.names[hit.item],
            score=round(hit.score, 6),
            patch=(hit.row, hit.column),
            grid=hit.grid,
        )
        for hit in hits
    ]
    return schema.SearchResult(searched=collection.searchable, results=results)


def add_collection(app: FastAPI, service: Service) -> None:
    """The routes of single items."""

    @app.get("/v1/collection", tags=["collection"])
    async def listing(first: Annotated[int, Query(ge=0, lt=2**31)] = 0) -> schema.CollectionInfo:
        """The images that the server was started with, up to 500 of them from `first` on."""
        collection = service.collection
        names = collection.names[first : first + _SHOWN]
        return schema.CollectionInfo(
            count=len(collection),
            searchable=collection.searchable,
            stored=collection.store is not None,
            layers=list(collection.store.metadata["layers"]) if collection.store is not None else [],
            scene=service.scene is not None,
            items=[schema.Item(item=first + place, name=name) for place, name in enumerate(names)],
        )

    @app.get(
        "/v1/collection/{item}/image",
        tags=["collection"],
        response_class=Response,
        responses={200: {"content": {"image/jpeg": BYTES}}},
    )
    async def image(item: ItemNumber, side: Annotated[int, Query(ge=16, le=2048)] = 1024) -> Response:
        """A JPEG of one image, of at most `side` pixels on its longer side."""
        service.check_item(item)
        body = await service.preview(item, side=side)
        return Response(body, media_type="image/jpeg", headers={"cache-control": "private, max-age=3600"})

    @app.get(
        "/v1/collection/{item}/features",
        tags=["collection"],
        response_class=Response,
        responses={200: {"content": FEATURES_CONTENT, "description": "features, in the format asked for"}},
    )
    async def features(
        request: Request,
        item: ItemNumber,
        tokens: Tokens = None,
        layers: Layers = "",
        parts: Parts = "",
        format: AskedFormat = None,  # noqa: A002
        dtype: DType = "float32",
    ) -> Response:
        """Features of one image; of a store, as it has them, whatever `tokens` says."""
        service.check_item(item)
        wanted = wanted_of(request, format, parts, dtype)
        found = await service.item_features(item, View(tokens=tokens, layers=layers_of(layers)))
        return await answer_features(service, found, wanted=wanted)
