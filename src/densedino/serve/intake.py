"""Owns reading the body of a request: bounded in bytes and time, the image in it, JSON in it."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from densedino.serve.refusal import RefusalError, busy

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from starlette.requests import Request

    from densedino.serve.service import Service

__all__ = ["read_image_bytes", "read_json"]

BodyT = TypeVar("BodyT", bound=BaseModel)

_JSON_BYTES = 2**20
_FIELDS = 8
_PASS_SECONDS, _PASS_BYTES = 2.0, 2**28


@contextlib.asynccontextmanager
async def _body(request: Request, service: Service, *, limit: int) -> AsyncIterator[bytes]:
    """The whole body, counted among what the server holds.

    Raises:
        RefusalError: 413, 408, or 429 if other requests hold too much.
    """
    settings = service.settings
    parts: list[bytes] = []
    try:
        try:
            async with asyncio.timeout(settings.upload_seconds):
                fits = await _receive(request, service, parts, limit=limit)
        except TimeoutError:
            text = f"The body did not arrive within {settings.upload_seconds:g} s."
            raise RefusalError(408, text, kind="slow", headers={"connection": "close"}) from None
        except ClientDisconnect:
            raise RefusalError(400, "The connection ended before the body did.", kind="request") from None
        if not fits:
            await _let_pass(request)
            text = f"The body has more than {limit:,} bytes."
            raise RefusalError(413, text, kind="size", headers={"connection": "close"})
        yield b"".join(parts)
    finally:
        service.buffered -= sum(map(len, parts))


async def _receive(request: Request, service: Service, parts: list[bytes], *, limit: int) -> bool:
    """Append what comes to `parts`; False as soon as it is more than `limit` bytes, or says that it will be."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        return False
    held = 0
    async for part in request.stream():
        parts.append(part)
        held += len(part)
        service.buffered += len(part)
        if service.buffered > service.settings.max_buffered:
            raise busy("Other requests are being received.", after=2.0)
        if held > limit:
            return False
    return True


async def _let_pass(request: Request) -> None:
    """Receive some of what is too much, and forget it: many clients read no answer before they have sent all."""
    if "expect" in request.headers:  # but this one asked first
        return
    passed = 0
    with contextlib.suppress(TimeoutError, ClientDisconnect):
        async with asyncio.timeout(_PASS_SECONDS):
            async for part in request.stream():
                passed += len(part)
                if passed > _PASS_BYTES:
                    return


@contextlib.asynccontextmanager
async def read_image_bytes(request: Request, service: Service) -> AsyncIterator[bytes]:
    """The image file in a request: its body, or the field `image` of a form.

    Raises:
        RefusalError: as `_body`; 400 or 422 for a form without the field, or one that cannot be read; 422 for no bytes.
    """
    async with _body(request, service, limit=service.settings.max_bytes) as body:
        kind = request.headers.get("content-type", "").lower()
        data = await _field(request, body) if kind.startswith("multipart/form-data") else body
        if not data:
            raise RefusalError(422, "There is no image in the request: its body is empty.", kind="image")
        yield data


async def _field(request: Request, body: bytes) -> bytes:
    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    parser = MultiPartParser(request.headers, stream(), max_files=_FIELDS, max_fields=_FIELDS)
    parser.spool_max_size = len(body) + 1  # in memory: nothing of a request is written to disk
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, UnicodeDecodeError, LookupError) as error:
        reason = getattr(error, "message", "") or "no boundary, or no valid text"
        raise RefusalError(400, f"The form cannot be read: {reason}.", kind="form") from None
    try:
        file = form.get("image")
        if isinstance(file, UploadFile):
            return await file.read()
    finally:
        await form.close()
    names = ", ".join(sorted(form))[:99]
    raise RefusalError(422, f"The form has no file in a field 'image'; it has: {names or 'nothing'}.", kind="form")


async def read_json(request: Request, service: Service, model: type[BodyT]) -> BodyT:
    """The JSON of a request, strictly as `model` has it.

    Raises:
        RefusalError: as `_body`; 422 for JSON that is none, or not of that shape.
    """
    async with _body(request, service, limit=_JSON_BYTES) as body:
        try:
            return model.model_validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise RefusalError(422, f"{place or 'body'}: {first['msg']}.", kind="request") from None
