"""Progress of long work: a bar with the time left in a terminal, plain lines in a log."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

Item = TypeVar("Item")

_LINE_EVERY_S = 5.0


def track(items: Iterable[Item], total: int, what: str) -> Iterator[Item]:
    """Yield ``items`` and show how far along they are, on standard error."""
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as progress:
            yield from progress.track(items, total=total, description=what)
    else:
        yield from _print_lines(items, total, what)


def _print_lines(items: Iterable[Item], total: int, what: str) -> Iterator[Item]:
    start = last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last >= _LINE_EVERY_S or done == total:
            left = (now - start) / done * (total - done)
            print(f"{what}: {done}/{total}, {now - start:.0f} s, {left:.0f} s left", file=sys.stderr, flush=True)
            last = now


def say(line: str) -> None:
    """Show a line among the progress."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def count_bytes(total: int, what: str) -> Iterator[Callable[[int], None]]:
    """Give a function that is told, from any thread, how many bytes have been moved since it was last told."""
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(what, total=total)
            yield lambda num_bytes: progress.advance(task, num_bytes)
    else:
        yield _ByteLines(total, what).add


class _ByteLines:
    """Lines of a log, none for what is done before the first is due."""

    def __init__(self, total: int, what: str) -> None:
        self._total, self._what, self._done = total, what, 0
        self._start = self._last = time.monotonic()
        self._lock = Lock()

    def add(self, num_bytes: int) -> None:
        with self._lock:
            self._done += num_bytes
            now = time.monotonic()
            if now - self._last < _LINE_EVERY_S:
                return
            self._last = now
            done, total = self._done / 2**20, self._total / 2**20
            speed = done / (now - self._start)
        print(f"{self._what}: {done:,.0f}/{total:,.0f} MiB, {speed:,.0f} MiB/s", file=sys.stderr, flush=True)
