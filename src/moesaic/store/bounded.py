"""Work in several threads at once, with a bound on how much of it waits in memory."""

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


def run_bounded(
    function: Callable[[Job], Result],
    jobs: Iterable[Job],
    num_threads: int,
    take: Callable[[Result], object] = lambda result: None,
) -> list[Result]:
    """Apply ``function`` to every job; results in the jobs' order, and the first failure ends it.

    ``jobs`` is read in the calling thread, never further than one job beyond the ``num_threads`` under way; each
    result is handed to ``take`` in that thread too, in order and as soon as it is there.
    """
    results: list[Result] = []
    waiting: dict[Future[Result], int] = {}
    early: dict[int, Result] = {}

    def collect() -> None:
        for future in wait(waiting, return_when=FIRST_COMPLETED).done:
            early[waiting.pop(future)] = future.result()
        while len(results) in early:
            results.append(early.pop(len(results)))
            take(results[-1])

    pool = ThreadPoolExecutor(num_threads)
    try:
        for index, job in enumerate(jobs):
            if len(waiting) >= num_threads:
                collect()
            waiting[pool.submit(function, job)] = index
        while waiting:
            collect()
    finally:
        pool.shutdown(cancel_futures=True)
    return results
