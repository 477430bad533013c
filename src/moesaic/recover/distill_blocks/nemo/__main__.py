"""A worker process: reads its jobs from standard input, a line of JSON each, and trains one after another."""

import sys
from contextlib import redirect_stdout

from moesaic.core.child_processes import end_with
from moesaic.recover.distill_blocks.nemo.jobs import BlockJob


def main(stage_pid: int) -> None:
    """Train the blocks listed on standard input; end when the stage does."""
    end_with(stage_pid)
    jobs = [BlockJob.from_json(line) for line in sys.stdin]
    with redirect_stdout(sys.stderr):  # before NeMo's logger takes hold of it
        from moesaic.recover.distill_blocks.nemo.train import train_block

        for job in jobs:
            train_block(job)


if __name__ == "__main__":
    main(int(sys.argv[1]))
