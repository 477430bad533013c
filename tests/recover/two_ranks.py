"""Two processes of one distributed run, without starting Python twice."""

import os
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch


def run_two_ranks(run_rank: Callable[[int, Path], None], scratch: Path) -> int:
    """Both ranks are forks of this process, so that what is imported before is imported once; 0 if both succeed."""
    ranks = []
    for rank in range(2):
        if (process := os.fork()) == 0:
            try:
                warnings.simplefilter("ignore")
                torch.set_num_threads(1)  # a fork has none of this process's other threads
                run_rank(rank, scratch)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        ranks.append(process)
    return int(any([os.waitpid(process, 0)[1] for process in ranks]))
