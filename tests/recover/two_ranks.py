"""Two processes of one distributed run, without starting Python twice."""

import os
import traceback
from collections.abc import Callable
from pathlib import Path


def run_two_ranks(run_rank: Callable[[int, Path], None], scratch: Path) -> int:
    """Both ranks are forks of this process, so that what is imported before is imported once; 0 if both succeed."""
    ranks = []
    for rank in range(2):
        if (process := os.fork()) == 0:
            try:
                run_rank(rank, scratch)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        ranks.append(process)
    return int(any([os.waitpid(process, 0)[1] for process in ranks]))
