"""Several files under way at once: the parts of all of them share as many lanes as there may be connections.

Memory does not grow with the number of files or their sizes.
"""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, CancelledError, Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Self, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")

_HASHERS = 2
"""Files that are read for their digests at once; with more of them, the first would be ready to leave later."""


def _ignore(value: object) -> None:
    pass


class Lanes:
    """Use it as a context; leaving it drops what has not begun, waits for what has."""

    def __init__(self, num_lanes: int, moved: Callable[[int], None] = _ignore) -> None:
        """``moved`` is told, from any thread, how many bytes have arrived since it was last told."""
        self.moved = moved
        # A file's own thread hashes and waits for its parts; the parts' threads wait for nobody.
        self._files = ThreadPoolExecutor(num_lanes)
        self._parts = ThreadPoolExecutor(num_lanes)
        self.hashing = threading.Semaphore(_HASHERS)
        self._turns: dict[str, threading.Lock] = {}
        self._failure: BaseException | None = None

    def each(self, function: Callable[[Job], Result], files: Iterable[Job]) -> list[Result]:
        """Apply ``function`` to every file, as many at once as there are lanes; the first failure ends it."""

        def run(file: Job) -> Result:
            try:
                return function(file)
            except BaseException as failure:
                self._failure = self._failure or failure
                raise

        futures = [self._files.submit(run, file) for file in files]
        wait(futures, return_when=FIRST_EXCEPTION)
        if self._failure is not None:
            raise self._failure
        return [future.result() for future in futures]

    def parts(
        self, function: Callable[[Job], Result], parts: Iterable[Job], take: Callable[[Result], object] = _ignore
    ) -> list[Result]:
        """Apply ``function`` to every part of a file in the lanes; the first failure ends it.

        Results come in the parts' order, and each is handed to ``take``, in the calling thread, once it is its turn.
        """
        failed = threading.Event()

        def run(part: Job) -> Result:
            if failed.is_set() or self._failure is not None:
                raise CancelledError
            try:
                return function(part)
            except BaseException:
                failed.set()
                raise

        futures: list[Future[Result]] = [self._parts.submit(run, part) for part in parts]
        results: list[Result] = []
        try:
            for future in futures:
                results.append(future.result())
                take(results[-1])
            return results
        finally:
            wait([future for future in futures if not future.cancel()])

    def turn(self, key: str) -> threading.Lock:
        """The lock of a key, for files of equal content."""
        return self._turns.setdefault(key, threading.Lock())

    def __enter__(self) -> Self:
        """Nothing runs yet."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, trace: TracebackType | None
    ) -> None:
        """See the class."""
        self._files.shutdown(wait=False, cancel_futures=True)
        self._parts.shutdown(cancel_futures=True)
        self._files.shutdown()
