"""Owns the pool of decoding processes: hand out an image, get pixels back, replace processes that hang or die."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from densedino.errors import ImageError
from densedino.images.decoding import Pixels
from densedino.serve.decoder import HEAD, pack

if TYPE_CHECKING:
    from collections.abc import Callable

    from densedino.serve.settings import Settings

__all__ = ["Decoders"]

_START_SECONDS = 60.0
_BUFFER = 2**22


class _DiedError(Exception):
    """The process ended before it answered."""


class Decoders:
    """Decodes images in processes of their own, at most `settings.decoders` at once."""

    def __init__(self, settings: Settings, *, in_chans: int, replaced: Callable[[], None] = lambda: None) -> None:
        """Nothing is started yet.

        Args:
            settings: limits, and how many processes.
            in_chans: channels that the model takes.
            replaced: called whenever a process had to be replaced.
        """
        self._settings = settings
        self._limits = {"in_chans": in_chans, "max_pixels": settings.max_pixels}
        self._replaced = replaced
        self._idle: asyncio.Queue[_Worker] = asyncio.Queue()
        self._workers: set[_Worker] = set()
        self._spawning: set[asyncio.Task[None]] = set()
        self.sealed = False
        """Whether the kernel refuses the processes files, sockets and programs."""

    @property
    def processes(self) -> list[int]:
        """Ids of the processes that run."""
        return sorted(worker.process.pid for worker in self._workers)

    async def start(self) -> None:
        """Start all processes and wait until they can decode."""
        for worker in await asyncio.gather(*(self._spawn() for _ in range(self._settings.decoders))):
            self._idle.put_nowait(worker)

    async def close(self) -> None:
        """End all processes."""
        for task in self._spawning:
            task.cancel()
        await asyncio.gather(*self._spawning, return_exceptions=True)
        for worker in list(self._workers):
            await self._end(worker)

    async def pixels(self, data: bytes) -> Pixels:
        """Decode a picture.

        Raises:
            ImageError: no usable picture, or one that takes longer or more memory than allowed.
        """
        header, body = await self._ask({}, data)
        shape, dtype = tuple(header["shape"]), np.dtype(header["dtype"])
        count = int(np.prod(shape))
        array = np.frombuffer(bytearray(body) if header["masked"] else body, dtype, count=count).reshape(shape)
        valid = None
        if header["masked"]:
            valid = np.frombuffer(body, np.bool_, offset=count * dtype.itemsize).reshape(shape[:2])
        if not array.flags.writeable:
            array = np.frombuffer(bytearray(body), dtype, count=count).reshape(shape)
        name = f"the image in {len(data):,} bytes"
        return Pixels(array=array, valid=valid, max_value=header["max_value"], name=name)

    async def preview(self, data: bytes, *, side: int) -> bytes:
        """The picture as a JPEG of at most `side` pixels on its longer side. Raises as `pixels`."""
        _, body = await self._ask({"preview": side}, data)
        return body

    async def _ask(self, extra: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        header = {**self._limits, **extra}
        try:
            worker = await self._idle.get()
            answer, body = await self._exchange(worker, header, data)
        except _DiedError:  # which need not be this image's fault: once more, in a process that nobody used
            try:
                answer, body = await self._exchange(await self._spawn(), header, data, keep=False)
            except _DiedError:
                raise ImageError(
                    f"decoding the image in {len(data):,} bytes ended its process, twice. It is damaged, or made to "
                    "do harm."
                ) from None
        if "error" in answer:
            raise ImageError(answer["error"])
        return answer, body

    async def _exchange(
        self, worker: _Worker, header: dict[str, Any], data: bytes, *, keep: bool = True
    ) -> tuple[dict[str, Any], bytes]:
        """Ask one process, and give it back, or another in its place if it is of no more use."""
        try:
            async with asyncio.timeout(self._settings.decode_seconds):
                answer = await worker.ask(header, data)
        except BaseException as error:
            await self._end(worker)
            self._replaced()
            if keep:
                self._replace()
            if isinstance(error, TimeoutError):
                seconds = f"{self._settings.decode_seconds:g} s"
                raise ImageError(f"the image in {len(data):,} bytes takes longer than {seconds} to decode.") from None
            raise
        if keep:
            self._idle.put_nowait(worker)
        else:
            await self._end(worker)
        return answer

    def _replace(self) -> None:
        async def replace() -> None:
            self._idle.put_nowait(await self._spawn())

        task = asyncio.create_task(replace())
        self._spawning.add(task)
        task.add_done_callback(self._spawning.discard)

    async def _spawn(self) -> _Worker:
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        environment = {key: value for key, value in environment.items() if key != "DENSEDINO_TOKEN"}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "densedino.serve.decoder", str(self._settings.max_pixels)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=environment,
            limit=_BUFFER,
            start_new_session=True,  # Ctrl-C is for the server, which then ends them
        )
        worker = _Worker(process)
        self._workers.add(worker)
        try:
            async with asyncio.timeout(_START_SECONDS):
                hello, _ = await worker.receive()
        except BaseException:
            await self._end(worker)
            raise
        self.sealed = bool(hello["sealed"])
        return worker

    async def _end(self, worker: _Worker) -> None:
        self._workers.discard(worker)
        with contextlib.suppress(ProcessLookupError):
            worker.process.kill()
        assert worker.process.stdin is not None
        worker.process.stdin.close()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            await worker.process.stdin.wait_closed()
        await worker.process.wait()


class _Worker:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def ask(self, header: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        assert self.process.stdin is not None
        try:
            self.process.stdin.writelines(pack(header, data))
            await self.process.stdin.drain()
        except (BrokenPipeError, ConnectionResetError) as error:
            raise _DiedError from error
        return await self.receive()

    async def receive(self) -> tuple[dict[str, Any], bytes]:
        assert self.process.stdout is not None
        try:
            head, body = HEAD.unpack(await self.process.stdout.readexactly(HEAD.size))
            header = json.loads(await self.process.stdout.readexactly(head))
            return header, await self.process.stdout.readexactly(body)
        except (asyncio.IncompleteReadError, ConnectionResetError) as error:
            raise _DiedError from error
