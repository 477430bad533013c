"""A second user on this machine: a child process that gives up root's rights, as a task of a cluster does."""

import os
import pickle
import traceback
from collections.abc import Callable
from typing import TypeVar

import pytest

Result = TypeVar("Result")

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a process of another user")


def as_user(user: int, group: int, function: Callable[[], Result]) -> Result:
    """Call a function in a forked process of another user, who need not have a name; returns or raises what it does."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(group)
            os.setuid(user)
            answer = pickle.dumps((function(), None))
        except BaseException as failure:
            failure.add_note(traceback.format_exc())
            answer = pickle.dumps((None, failure))
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(answer)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        result, failed = pickle.loads(pipe.read())  # noqa: S301 (our own child wrote it)
    os.waitpid(child, 0)
    if failed:
        raise failed
    return result  # type: ignore[no-any-return]
