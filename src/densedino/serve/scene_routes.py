"""Owns the routes of the scene that the server was started with: what it is, and its tiles."""

# No `from __future__ import annotations` here: FastAPI reads the annotations when a route is defined.

from typing import Annotated

from fastapi import FastAPI, Path, Request, Response

from densedino.serve import schema
from densedino.serve.answers import (
    BYTES,
    FEATURES_CONTENT,
    AskedFormat,
    Layers,
    Parts,
    answer_features,
    layers_of,
    wanted_of,
)
from densedino.serve.refusal import RefusalError
from densedino.serve.scene_map import TILE
from densedino.serve.service import Service, View
from densedino.serve.wire import DType

__all__ = ["add_scene"]

Level = Annotated[int, Path(ge=0, le=32)]
Number = Annotated[int, Path(ge=0, lt=2**31)]


def add_scene(app: FastAPI, service: Service) -> None:
    """The routes of the map."""

    @app.get("/v1/scene", tags=["scene"])
    async def scene() -> schema.SceneInfo:
        """Sizes and zoom levels of the scene; 404 if the server was started without one."""
        found = service.scene
        if found is None:
            raise RefusalError(404, "There is no scene: densedino serve SCENE.tif.", kind="not_found")
        return schema.SceneInfo(
            size=found.scene.size,
            grid=found.grid,
            stride=found.stride,
            tile=TILE,
            levels=found.levels,
            stored=found.store is not None,
            metres_per_pixel=found.scene.gsd,
        )

    @app.get(
        "/v1/scene/{level}/{row}/{column}/image",
        tags=["scene"],
        response_class=Response,
        responses={200: {"content": {"image/jpeg": BYTES}}},
    )
    async def image(level: Level, row: Number, column: Number) -> Response:
        """A JPEG of one tile."""
        body = await service.tile_picture((level, row, column))
        return Response(body, media_type="image/jpeg", headers={"cache-control": "private, max-age=3600"})

    @app.get(
        "/v1/scene/{level}/{row}/{column}/features",
        tags=["scene"],
        response_class=Response,
        responses={200: {"content": FEATURES_CONTENT, "description": "features, in the format asked for"}},
    )
    async def features(
        request: Request,
        level: Level,
        row: Number,
        column: Number,
        layers: Layers = "",
        parts: Parts = "",
        format: AskedFormat = None,  # noqa: A002
        dtype: DType = "float32",
    ) -> Response:
        """Features of one tile."""
        wanted = wanted_of(request, format, parts, dtype)
        found = await service.tile_features((level, row, column), View(layers=layers_of(layers)))
        return await answer_features(service, found, wanted=wanted)
