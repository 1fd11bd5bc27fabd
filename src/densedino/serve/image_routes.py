"""Owns the routes that take an image: its features, similarity to a point, a mask from points."""

# No `from __future__ import annotations` here: FastAPI reads the annotations when a route is defined.

import functools
from typing import Annotated

from fastapi import FastAPI, Query, Request, Response

from densedino.features.pictures import patch_at
from densedino.serve import schema
from densedino.serve.answers import (
    BYTES,
    FEATURES_CONTENT,
    POINT,
    AskedFormat,
    Layers,
    Parts,
    Points,
    Tokens,
    answer_features,
    layers_of,
    points_of,
    wanted_of,
)
from densedino.serve.intake import read_image_bytes
from densedino.serve.points import segment, similarity
from densedino.serve.service import Service, View
from densedino.serve.wire import MEDIA, DType, npy, png

__all__ = ["add_features", "add_points"]


def add_features(app: FastAPI, service: Service) -> None:
    """The route that everything else is made of."""

    @app.post(
        "/v1/features",
        tags=["features"],
        openapi_extra=schema.IMAGE_BODY,
        response_class=Response,
        responses={200: {"content": FEATURES_CONTENT, "description": "features, in the format asked for"}},
    )
    async def features(
        request: Request,
        tokens: Tokens = None,
        layers: Layers = "",
        parts: Parts = "",
        format: AskedFormat = None,  # noqa: A002
        dtype: DType = "float32",
    ) -> Response:
        """Dense features of an image: one vector per patch, and CLS for the whole."""
        wanted = wanted_of(request, format, parts, dtype)
        async with read_image_bytes(request, service) as data:
            found = await service.features(data, View(tokens=tokens, layers=layers_of(layers)))
        return await answer_features(service, found, wanted=wanted)


def add_points(app: FastAPI, service: Service) -> None:
    """The routes that a few points ask."""

    @app.post(
        "/v1/similarity",
        tags=["points"],
        openapi_extra=schema.IMAGE_BODY,
        response_model=schema.Similar,
        responses={200: {"content": {"application/x-npy": BYTES}}},
    )
    async def similar(
        request: Request,
        point: Annotated[str, Query(pattern=POINT, description="x,y in pixels of the image", examples=["240,130"])],
        tokens: Tokens = None,
        format: Annotated[str, Query(pattern="^(json|npy)$")] = "json",  # noqa: A002
    ) -> Response:
        """Cosine similarity of every patch to the one that shows a point."""
        async with read_image_bytes(request, service) as data:
            found = await service.features(data, View(tokens=tokens))
        row, column = patch_at(found, points_of([point])[0])
        cosine = similarity(found.patches[0][row, column], found)
        if format == "npy":
            return Response(npy(cosine.numpy()), media_type=MEDIA["npy"])
        body = schema.Similar(
            patch=(row, column),
            grid=found.grid,
            stride=found.stride,
            similarity=cosine.double().round(decimals=6).tolist(),
        )
        return Response(await service.thread(body.model_dump_json), media_type="application/json")

    @app.post(
        "/v1/segment",
        tags=["points"],
        openapi_extra=schema.IMAGE_BODY,
        response_model=schema.Segmented,
        responses={200: {"content": {"image/png": BYTES, "application/x-npy": BYTES}}},
    )
    async def segmented(
        request: Request,
        positive: Points,
        negative: Points = [],  # noqa: B006 (FastAPI copies it)
        threshold: Annotated[float | None, Query(ge=-2, le=2, allow_inf_nan=False)] = None,
        tokens: Tokens = None,
        format: Annotated[str, Query(pattern="^(json|npy|png)$")] = "json",  # noqa: A002
    ) -> Response:
        """A mask from a few points inside (`positive`) and outside (`negative`) of what is meant."""
        inside, outside = points_of(positive), points_of(negative)
        async with read_image_bytes(request, service) as data:
            found = await service.features(data, View(tokens=tokens))
        result = await service.thread(
            functools.partial(segment, found, positive=inside, negative=outside, threshold=threshold)
        )
        if format != "json":
            write = png if format == "png" else npy
            body = await service.thread(lambda: write(result.mask.numpy()))
            return Response(body, media_type="image/png" if format == "png" else MEDIA["npy"])
        scores = result.scores.double().round(decimals=6)
        content = schema.Segmented(
            grid=found.grid,
            threshold=result.threshold,
            scores=scores.tolist(),
            mask=(result.scores > result.threshold).tolist(),
        )
        return Response(await service.thread(content.model_dump_json), media_type="application/json")
