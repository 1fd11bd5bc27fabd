"""Owns how long work shows its progress: a bar with rate and remaining time, or a line now and then in a log."""

from __future__ import annotations

import sys
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console

__all__ = ["progress"]

_LINE_EVERY = 10.0  # seconds, where there is no terminal to draw a bar on


@contextmanager
def progress(what: str) -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """Two functions: begin(total), once, 0 if it is not known; and advance(count), which any thread may call.

    `what` is counted: "images".
    """
    from rich.console import Console

    console = Console(stderr=True)
    bar = _Bar(console, what) if console.is_terminal else _Lines(what)
    try:
        yield bar.begin, bar.advance
    finally:
        bar.stop()


class _Bar:
    """A bar with rate and remaining time."""

    def __init__(self, console: Console, what: str) -> None:
        from rich import progress as rich

        self._what = what
        self._bar = rich.Progress(
            rich.BarColumn(),
            rich.MofNCompleteColumn(),
            rich.TextColumn("{task.fields[rate]}"),
            rich.TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
        )
        self._start = time.perf_counter()

    def begin(self, total: int) -> None:
        self._start = time.perf_counter()
        self._bar.start()
        self._task = self._bar.add_task("", total=total or None, rate="")

    def advance(self, count: int) -> None:
        done = self._bar.tasks[0].completed + count
        rate = done / max(time.perf_counter() - self._start, 1e-9)
        self._bar.update(self._task, advance=count, rate=f"{rate:,.1f} {self._what}/s")

    def stop(self) -> None:
        self._bar.stop()


class _Lines:
    """A line now and then, for logs."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._lock = threading.Lock()
        self._done, self._total = 0, 0
        self._start = self._said = time.perf_counter()

    def begin(self, total: int) -> None:
        self._total = total
        self._start = self._said = time.perf_counter()

    def advance(self, count: int) -> None:
        with self._lock:
            self._done += count
            now = time.perf_counter()
            if now - self._said < _LINE_EVERY:
                return
            self._said = now
            rate = self._done / (now - self._start)
            of = f" of {self._total:,}, {(self._total - self._done) / rate:,.0f} s left" if self._total else ""
            print(f"progress   {self._done:,}{of}, {rate:,.1f} {self._what}/s", file=sys.stderr, flush=True)

    def stop(self) -> None:
        pass
