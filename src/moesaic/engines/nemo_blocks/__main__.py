"""A worker process: reads its jobs from standard input, a line of JSON each, and trains one after another."""

import os
import sys
import threading
from contextlib import redirect_stdout

from moesaic.engines.nemo_blocks.jobs import BlockJob


def main() -> None:
    """Train the blocks listed up to an empty line; end at once when standard input is closed from the other side."""
    jobs = [BlockJob.from_json(line) for line in iter(sys.stdin.readline, "\n")]
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(1)), daemon=True).start()
    with redirect_stdout(sys.stderr):  # before NeMo's logger takes hold of it
        from moesaic.engines.nemo_blocks.train import train_block

        for job in jobs:
            train_block(job)


if __name__ == "__main__":
    main()
