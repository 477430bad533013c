"""What the speed benchmarks share: CPU seconds, bars that are met or missed, and the record of a run."""

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from moesaic.core.code import code_version
from moesaic.platform.runs import records


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
