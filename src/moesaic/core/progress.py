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
    with count_steps(total, what) as advance:
        for item in items:
            yield item
            advance(1)


@contextmanager
def count_steps(total: int, what: str) -> Iterator[Callable[[int], None]]:
    """Show progress on standard error; the function it gives is called with the number of steps just done."""
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
            task = progress.add_task(what, total=total)
            yield lambda num_steps: progress.advance(task, num_steps)
    else:
        yield _StepLines(total, what).add


class _StepLines:
    """Progress in steps as lines of a log."""

    def __init__(self, total: int, what: str) -> None:
        self._total, self._what, self._done = total, what, 0
        self._start = self._last = time.monotonic()

    def add(self, num_steps: int) -> None:
        self._done += num_steps
        now = time.monotonic()
        if num_steps and (now - self._last >= _LINE_EVERY_S or self._done == self._total):
            passed_s = now - self._start
            left_s = passed_s / self._done * (self._total - self._done)
            print(
                f"{self._what}: {self._done}/{self._total}, {passed_s:.0f} s, {left_s:.0f} s left",
                file=sys.stderr,
                flush=True,
            )
            self._last = now


def say(line: str) -> None:
    """Print a line to standard error, where progress is shown."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def count_bytes(total: int, what: str) -> Iterator[Callable[[int], None]]:
    """Show progress; the function it gives is called, from any thread, with the number of bytes just moved."""
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
    """Progress in bytes as lines of a log; work that is done before the first line is due shows none."""

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
