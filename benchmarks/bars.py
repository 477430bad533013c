"""What the benchmarks share: CPU seconds, resident memory, bars that are met or missed, and the record of a run."""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from moesaic.core.code import code_version
from moesaic.platform.runs import records

_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**18)}
"""Blocks from this size on go back to the system when they are freed, so that resident memory is what is in use."""


@dataclass(frozen=True)
class Bar:
    """What a ratio should be."""

    what: str
    value: float
    least: float | None = None
    most: float | None = None

    @property
    def met(self) -> bool:
        """Whether it is, before any rounding."""
        return (self.least is None or self.value >= self.least) and (self.most is None or self.value <= self.most)

    def __str__(self) -> str:
        wanted = f">= {self.least:g}" if self.least is not None else f"<= {self.most:g}"
        return f"{'met' if self.met else 'MISSED':6}  {self.value:8.3f}  {wanted:8}  {self.what}"


def cpu_seconds(action: Callable[[], Any], repeats: int = 1) -> float:
    """CPU seconds of one call, all threads of this process together; the least of several calls."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        action()
        times.append(time.process_time() - start)
    return min(times)


def return_freed_memory() -> None:
    """Start this program anew with an allocator that keeps no large block it has freed, unless it runs with it."""
    if not _MALLOC.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **_MALLOC})


def resident_bytes(key: str) -> int:
    """Bytes of resident memory of this process: now (VmRSS) or at its highest (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def conclude(command: str, bars: Sequence[Bar], found: dict[str, Any], record: Path | None) -> None:
    """Print what was found and every bar; write the record, if it is wanted."""
    content = {
        "command": command,
        "commit": code_version(),
        "date": str(date.today()),
        "hardware": records.describe_hardware(),
        "load_average": round(os.getloadavg()[1], 1),
        "versions": records.installed_versions(),
        **_rounded(found),
        "bars": [
            {"what": bar.what, "value": round(bar.value, 4), "least": bar.least, "most": bar.most, "met": bar.met}
            for bar in bars
        ],
    }
    print(json.dumps(_rounded(found), indent=1))
    for bar in bars:
        print(bar)
    if record:
        record.write_text(json.dumps(content, indent=1) + "\n")


def _rounded(found: Any) -> Any:
    """Numbers to four significant digits."""
    if isinstance(found, dict):
        return {key: _rounded(value) for key, value in found.items()}
    if isinstance(found, list):
        return [_rounded(value) for value in found]
    return float(f"{found:.4g}") if isinstance(found, float) else found
