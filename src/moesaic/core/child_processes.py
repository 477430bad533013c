"""Child processes that end with their parent, however it ends: a killed stage leaves no process behind.

Our own processes watch (``end_with``). A foreign program is started by ``tethered``: it asks the kernel for a signal at
its parent's death before it becomes that program, and its output is kept in a file.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

_SHOWN_LINES = 20
_STOP_WITHIN_S = 40.0
_WATCH_EVERY_S = 1.0
_SET_PARENT_DEATH_SIGNAL = 1
_TETHER = (
    "import ctypes, os, sys; "
    f"ctypes.CDLL(None).prctl({_SET_PARENT_DEATH_SIGNAL}, {signal.SIGTERM.value}); "
    "os.getppid() == int(sys.argv[1]) or sys.exit(1); os.execvp(sys.argv[2], sys.argv[2:])"
)


def end_with(*process_ids: int) -> None:
    """End this process when one of the given ones has ended; the own parent may still be a zombie then."""
    parent_id = os.getppid()

    def are_alive() -> bool:
        has_parent = parent_id not in process_ids or os.getppid() == parent_id
        return has_parent and all(Path(f"/proc/{process_id}").exists() for process_id in process_ids)

    def watch() -> None:
        while are_alive():
            time.sleep(_WATCH_EVERY_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def tethered(
    command: Sequence[str], log: Path, environment: Mapping[str, str] = os.environ, directory: Path | None = None
) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a command while the block lasts; its output is appended to the log.

    Args:
        command: program and arguments.
        log: its output and errors.
        environment: of the command.
        directory: where it runs; None: here.
    """
    with log.open("ab") as target:
        process = subprocess.Popen(
            [sys.executable, "-c", _TETHER, str(os.getpid()), *command],
            stdin=subprocess.DEVNULL,
            stdout=target,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            cwd=directory,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        _stop(process)


def last_lines(log: Path) -> str:
    """The last lines of a log, indented, for a message."""
    lines = log.read_text(errors="replace").splitlines()[-_SHOWN_LINES:]
    return f"{log} ends with:\n" + "\n".join(f"  {line}" for line in lines)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Terminate a process, wait, then kill it and its descendants, which share its session."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_WITHIN_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
