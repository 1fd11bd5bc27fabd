"""Owns the HTTP routes: what each takes, which status it gives, and how it is described in OpenAPI."""

# No `from __future__ import annotations` here: FastAPI reads the annotations when a route is defined.

from typing import Annotated

from fastapi import FastAPI, Path, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

import densedino
from densedino.errors import DenseDinoError, ImageError, InputError
from densedino.serve import schema
from densedino.serve.collection_routes import add_collection, add_search
from densedino.serve.guard import Guard
from densedino.serve.image_routes import add_features, add_points
from densedino.serve.page import page_files
from densedino.serve.refusal import RefusalError, error_body
from densedino.serve.scene_routes import add_scene
from densedino.serve.service import Service

__all__ = ["create_app"]


def create_app(service: Service) -> FastAPI:
    """The application of a service that somebody else starts and stops."""
    app = FastAPI(
        title="densedino",
        version=densedino.__version__,
        summary="Dense visual features of images.",
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        docs_url=None,  # their page loads scripts of other hosts
        redoc_url=None,
        responses=schema.ERRORS,
    )
    _add_errors(app)
    _add_probes(app, service)
    add_features(app, service)
    add_points(app, service)
    add_search(app, service)
    add_collection(app, service)
    add_scene(app, service)
    _add_page(app)
    app.add_middleware(Guard, settings=service.settings, metrics=service.metrics)
    return app


def _add_errors(app: FastAPI) -> None:
    def answer(request: Request, status: int, kind: str, message: str, headers: dict[str, str]) -> Response:
        body = error_body(kind, message, request.scope.get("request_id", ""))
        return Response(body, status, headers, media_type="application/json")

    @app.exception_handler(DenseDinoError)
    def ours(request: Request, error: DenseDinoError) -> Response:
        if isinstance(error, RefusalError):
            return answer(request, error.status, error.kind, str(error), error.headers)
        if isinstance(error, InputError):
            return answer(request, 422, "image" if isinstance(error, ImageError) else "request", str(error), {})
        raise error

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        return answer(request, 422, "request", f"{place}: {first['msg']}.", {})

    @app.exception_handler(HTTPException)
    def http(request: Request, error: HTTPException) -> Response:
        return answer(request, error.status_code, "request", str(error.detail), dict(error.headers or {}))


def _add_probes(app: FastAPI, service: Service) -> None:
    @app.get("/healthz", tags=["operation"])
    async def healthz() -> schema.State:
        """The process is alive."""
        return schema.State(status="ok")

    @app.get("/readyz", tags=["operation"], responses={503: {"model": schema.State, "description": "not now"}})
    async def readyz() -> Response:
        """The model is loaded and takes requests; 503 before, and once the server is told to stop."""
        state = schema.State(status="ready" if service.ready else "not ready")
        return Response(state.model_dump_json(), 200 if service.ready else 503, media_type="application/json")

    @app.get("/metrics", tags=["operation"], response_class=Response)
    async def metrics() -> Response:
        """Counters, for Prometheus."""
        return Response(service.metrics.text(), media_type=service.metrics.content_type)

    @app.get("/v1/models", tags=["features"])
    async def models() -> schema.Models:
        """What computes the features here, and the limits that hold."""
        dino, settings = service.dino, service.settings
        model = schema.Model(
            id=dino.card.name,
            architecture=dino.card.model,
            embed_dim=dino.model.embed_dim,
            depth=dino.model.depth,
            stride=dino.model.stride,
            licence=dino.card.licence,
            untrained=dino.card.untrained,
            engine=dino.engine.name,
            precision=dino.precision,
            max_bytes=settings.max_bytes,
            max_pixels=settings.max_pixels,
            max_tokens=settings.max_tokens,
        )
        return schema.Models(models=[model])


def _add_page(app: FastAPI) -> None:
    files = page_files()

    def hand_out(request: Request, name: str) -> Response:
        if name not in files:
            raise RefusalError(404, "There is no such page.", kind="not_found")
        file = files[name]
        headers = {"etag": file.etag, "cache-control": "no-cache"}
        if request.headers.get("if-none-match") == file.etag:
            return Response(status_code=304, headers=headers)
        return Response(file.body, media_type=file.media_type, headers=headers)

    @app.get("/", include_in_schema=False)
    async def index(request: Request) -> Response:
        return hand_out(request, "index.html")

    @app.get("/app/{name}", include_in_schema=False)
    async def asset(request: Request, name: Annotated[str, Path()]) -> Response:
        return hand_out(request, name)
