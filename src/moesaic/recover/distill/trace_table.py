"""The traces of a run as arrays in two files, which every process maps into its memory.

As Python's numbers a token takes 48 bytes in every process; here it takes 4 on the disk, and of memory what the system
has to spare. Traces are written one by one, so that no more than one is held.
"""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import get_args

import numpy as np
from jaxtyping import Int

from moesaic.core.config import Effort
from moesaic.core.files import written_atomically
from moesaic.recover.generate_traces.traces import Trace

_TOKENS, _TRACES = "tokens.u32", "traces.npy"
_EFFORTS = get_args(Effort)
_TRACE = np.dtype([("start", "<i8"), ("prompt", "<i4"), ("reply", "<i4"), ("effort", "u1"), ("held_out", "?")])
"""Where its tokens begin, how many are the prompt's and the reply's, and what it is for."""


class TraceTable:
    """Traces by number, in the order in which they were written."""

    def __init__(self, directory: Path) -> None:
        self._tokens = np.memmap(directory / _TOKENS, dtype="<u4", mode="r")
        self._traces = np.load(directory / _TRACES, mmap_mode="r")

    @classmethod
    def write(cls, traces: Iterable[Trace], directory: Path) -> "TraceTable":
        """Write traces, at least one, to a directory, in place of any others there."""
        directory.mkdir(exist_ok=True)
        entries, start = [], 0
        with written_atomically(directory / _TOKENS) as partial, partial.open("wb") as file:
            for trace in traces:
                np.array(trace.token_ids, dtype="<u4").tofile(file)
                sizes = len(trace.prompt_ids), len(trace.reply_ids)
                entries.append((start, *sizes, _EFFORTS.index(trace.effort), trace.held_out))
                start += sum(sizes)
        with written_atomically(directory / _TRACES) as partial, partial.open("wb") as file:
            np.save(file, np.array(entries, dtype=_TRACE))
        return cls(directory)

    def chosen(self, efforts: Collection[str], held_out: bool) -> Int[np.ndarray, " trace"]:
        """Numbers of the traces of these efforts that are held out, or of those that are not."""
        codes = [_EFFORTS.index(effort) for effort in efforts]
        return np.flatnonzero(np.isin(self._traces["effort"], codes) & (self._traces["held_out"] == held_out))

    def num_places(self, traces: Int[np.ndarray, " trace"]) -> Int[np.ndarray, " trace"]:
        """Places that each of these traces takes in a row."""
        chosen = self._traces[traces]
        places: Int[np.ndarray, " trace"] = chosen["prompt"] + chosen["reply"] - 1
        return places

    def largest_token(self) -> int:
        """The largest token id of all."""
        return int(self._tokens.max())

    def tokens(self, trace: int) -> tuple[Int[np.ndarray, " token"], int]:
        """A trace's tokens, and how many of them are the prompt's."""
        start, prompt, reply, *_ = self._traces[trace].item()
        return self._tokens[start : start + prompt + reply].astype(np.int64), prompt
