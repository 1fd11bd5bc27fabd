"""Owns micro-batching: images of many requests go through the model together, and none waits past its bound."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from densedino.serve.refusal import busy

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from densedino.features.tokens import Features
    from densedino.images.transforms import Prepared

    Run = Callable[[Sequence[Prepared], tuple[int, ...]], Features]

__all__ = ["Batcher"]

_BATCH_TOKENS = 8192
"""Images of one batch have together at most that many patches: beyond, a batch saves no time and takes memory."""
_FORGET = 0.8
"""Weight of the past in the running mean of seconds per patch."""


@dataclass(eq=False)
class _Waiting:
    prepared: Prepared
    layers: tuple[int, ...]
    deadline: float
    result: asyncio.Future[Features]
    tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = self.prepared.valid.numel()

    @property
    def kind(self) -> tuple[Any, ...]:
        return (*self.prepared.pixels.shape, self.layers)


class Batcher:
    """A queue in front of a model that runs one batch at a time.

    While a batch runs, images gather; the oldest then decides the size, and others of that size and those layers go
    with it, wherever in the queue they stand. Nothing is delayed for the sake of company: an idle model starts at once.
    """

    def __init__(
        self,
        run: Run,
        *,
        max_batch: int,
        max_wait: float,
        ran: Callable[[int, float], None] = lambda images, seconds: None,
    ) -> None:
        """Nothing runs yet.

        Args:
            run: the model, on images of one size; called in a thread of its own, which has the cores to itself.
            max_batch: images at once.
            max_wait: seconds from arrival in which an image is to be done. One that cannot be is refused; but an idle
                model takes any.
            ran: told of every batch how many images and seconds it had.
        """
        self._run, self._ran = run, ran
        self._max_batch, self._max_wait = max_batch, max_wait
        self._waiting: list[_Waiting] = []
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="densedino-model")
        self._per_token = 0.0  # seconds; unknown until something ran
        self._running = 0  # tokens
        self._since = 0.0
        self._task: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def start(self) -> None:
        """Begin to serve the queue."""
        self._task = asyncio.create_task(self._serve())

    async def close(self) -> None:
        """Stop; whoever waits still is told to come again."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for one in self._waiting:
            self._refuse(one, "The server is stopping.")
        self._waiting.clear()
        await asyncio.to_thread(self._thread.shutdown)

    def expected_wait(self) -> float:
        """Seconds until an image that came now would begin to be computed."""
        left = max(0.0, self._running * self._per_token - (time.monotonic() - self._since)) if self._running else 0.0
        return left + sum(one.tokens for one in self._waiting) * self._per_token

    def check(self, tokens: int = 0) -> None:
        """Raise if an image of so many patches that came now would be late.

        Raises:
            RefusalError: 429, with the seconds after which it would not.
        """
        allowed = self._max_wait - self._own_seconds(tokens)
        if (wait := self.expected_wait()) > allowed:
            raise busy(
                f"The queue is {wait:.1f} s long, and answers are to take no more than {self._max_wait:g} s.",
                after=wait - allowed,
            )

    def _own_seconds(self, tokens: int) -> float:
        """What a whole batch of such images takes, up to half the time allowed: one that is slow by itself may run."""
        return min(self._per_token * min(tokens * self._max_batch, _BATCH_TOKENS), self._max_wait / 2)

    async def submit(
        self, prepared: Prepared, *, layers: tuple[int, ...] = (), arrived: float | None = None
    ) -> Features:
        """Features of one image (B = 1).

        Args:
            prepared: the image.
            layers: blocks wanted besides the last.
            arrived: `time.monotonic()` when the request came, from which its waiting is counted; now if not given.

        Raises:
            RefusalError: 429: it would be done later than `max_wait` after it came.
        """
        self.check(prepared.valid.numel())
        start = time.monotonic() if arrived is None else arrived
        one = _Waiting(prepared, layers, start + self._max_wait, asyncio.get_running_loop().create_future())
        self._waiting.append(one)
        self._arrived.set()
        return await one.result

    async def _serve(self) -> None:
        while True:
            await self._arrived.wait()
            batch = self._next()
            if not self._waiting:
                self._arrived.clear()
            if batch:
                await self._compute(batch)

    def _next(self) -> list[_Waiting]:
        """Take the oldest that may still run, and those that can go with it."""
        now = time.monotonic()
        for one in [one for one in self._waiting if one.deadline < now + self._own_seconds(one.tokens)]:
            self._waiting.remove(one)
            self._refuse(one, "It waited, and would have been late.")
        batch: list[_Waiting] = []
        for one in self._waiting:
            fits = sum(other.tokens for other in batch) + one.tokens <= _BATCH_TOKENS
            if not batch or (one.kind == batch[0].kind and fits and len(batch) < self._max_batch):
                batch.append(one)
        self._waiting = [one for one in self._waiting if one not in batch]
        return batch

    @staticmethod
    def _refuse(one: _Waiting, why: str) -> None:
        if not one.result.done():
            one.result.set_exception(busy(why, after=1.0))

    async def _compute(self, batch: list[_Waiting]) -> None:
        self._running, self._since = sum(one.tokens for one in batch), time.monotonic()
        prepared, layers = [one.prepared for one in batch], batch[0].layers
        try:
            features = await asyncio.get_running_loop().run_in_executor(self._thread, self._run, prepared, layers)
        except asyncio.CancelledError:
            for one in batch:
                self._refuse(one, "The server is stopping.")
            raise
        except Exception as error:
            for one in batch:
                if not one.result.done():
                    one.result.set_exception(error)
            return
        finally:
            seconds = time.monotonic() - self._since
            per_token = seconds / self._running
            self._per_token = _FORGET * self._per_token + (1 - _FORGET) * per_token if self._per_token else per_token
            self._running = 0
        self._ran(len(batch), seconds)
        for place, one in enumerate(batch):
            if not one.result.done():
                one.result.set_result(features[place])
