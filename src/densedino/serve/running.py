"""Owns the process: listening, connections that stall, SIGTERM and what is still answered after it, the log."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import threading
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from densedino.errors import InputError
from densedino.serve.api import create_app
from densedino.serve.guard import JsonLines
from densedino.serve.service import Service

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from densedino.features.extractor import FeatureExtractor
    from densedino.serve.collection import Collection
    from densedino.serve.scene_map import SceneMap
    from densedino.serve.settings import Settings

__all__ = ["listen", "serve", "write_log"]

_GRACE = 1.0  # seconds for requests that are on their way on connections which are open already


def listen(settings: Settings) -> socket.socket:
    """Take the address, before anything long begins.

    Raises:
        InputError: it is taken, or not this machine's.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((settings.host.strip("[]"), settings.port))
    except OSError as error:
        sock.close()
        raise InputError(
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror}. Choose another --port, or 0 for any."
        ) from error
    return sock


def serve(
    dino: FeatureExtractor,
    sock: socket.socket,
    settings: Settings,
    *,
    collection: Collection | None = None,
    scene: SceneMap | None = None,
    started: Callable[[Service, Callable[[], None]], None] = lambda service, stop: None,
) -> None:
    """Answer requests until SIGTERM or SIGINT, then those that were let in; a second signal ends at once.

    Args:
        dino: the model.
        sock: from `listen`.
        settings: limits.
        collection: images to show and to search.
        scene: to show as a map.
        started: called once requests are taken, with a function that does what SIGTERM does.
    """
    asyncio.run(_serve(Service(dino, settings, collection=collection, scene=scene), sock, settings, started))


async def _serve(
    service: Service,
    sock: socket.socket,
    settings: Settings,
    started: Callable[[Service, Callable[[], None]], None],
) -> None:
    async with service:
        config = uvicorn.Config(
            create_app(service),
            http=_protocol(settings),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=max(1, round(settings.header_seconds)),
            timeout_graceful_shutdown=max(1, round(settings.drain_seconds)),
            backlog=128,
        )
        server = _Server(config, service)
        task = asyncio.create_task(server.serve(sockets=[sock]))
        while not server.started and not task.done():
            await asyncio.sleep(0.01)
        if not task.done():
            started(service, server.stop)
        await task


class _Server(uvicorn.Server):
    """The server of uvicorn, which ends well on a signal instead of dying of it."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._told = False

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Be no longer ready, then stop; at the second signal, without waiting."""
        self._service.ready = False
        self.force_exit = self._told
        self._told = True
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take in who stands in the kernel's queue already, and only then stop listening."""
        for sock in sockets or ():
            sock.listen(0)  # the queue grows no longer
        await asyncio.sleep(_GRACE / 2)
        await super().shutdown(sockets)

    def stop(self) -> None:
        """Do what SIGTERM does; from any thread."""
        self.handle_exit(signal.SIGTERM, None)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle SIGTERM and SIGINT while serving, and put back what was there."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _protocol(settings: Settings) -> type[H11Protocol]:
    """The HTTP protocol of uvicorn, with a limit on connections and on the time that a request's head may take."""

    class Protocol(H11Protocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            if len(self.connections) > settings.max_connections:
                transport.close()
            else:
                self._wait_for_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is None or self.cycle.response_complete:
                self._wait_for_head()
            else:
                self._stop_waiting()

        def shutdown(self) -> None:
            """Close once nothing more can be on its way."""
            if self.cycle is None or self.cycle.response_complete:
                self._stop_waiting()
                self.loop.call_later(_GRACE, super().shutdown)
            else:
                super().shutdown()

        def _wait_for_head(self) -> None:
            if self._timer is None:
                self._timer = self.loop.call_later(settings.header_seconds, self._too_slow)

        def _stop_waiting(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _too_slow(self) -> None:
            self._timer = None
            if self.cycle is None or self.cycle.response_complete:
                self.transport.close()

    return Protocol


def write_log(kind: str) -> None:
    """Send the service's log to stderr: "json", a line each; "text", only what goes wrong."""
    handler = logging.StreamHandler(sys.stderr)
    if kind == "json":
        handler.setFormatter(JsonLines())
    for name, level in (
        ("densedino.serve", logging.INFO if kind == "json" else logging.WARNING),
        ("uvicorn", logging.WARNING),
    ):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False
