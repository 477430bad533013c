"""The evidence for the recovery: run ``compress`` once per seed and hold the figures against what we ask of them.

    python benchmarks/compress.py --recipe tiny_cpu_full --seeds 0 1 --runs runs/full > RECORD.json
    python benchmarks/compress.py --recipe reasoner_cpu --of examples/reasoner --seeds 0 --runs runs/other > RECORD.json

Runs that are finished are read, not repeated; one that was killed goes on. Seeds draw the order of the data and the
rollouts anew; the search is the same.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from moesaic.platform.runs.records import describe_hardware, installed_versions

BARS = {
    "distillation recovers at least half of what pruning lost, at every effort": 0.5,
    "retention at low effort, after averaging": 1.0,
    "retention at high effort, after averaging": 0.98,
    "generated tokens per request against the parent's, at most": 1.05,
    "request-level efficiency against the parent, at the best point, more than": 1.15,
    "points of accuracy over the uniformly pruned child after the same recovery, mean of efforts, more than": 0.0,
}
"""What the method is asked for, and how much of it."""
_ROUNDING = 1e-9


def compress(recipe: str, of: Path | None, seed: int, directory: Path) -> tuple[dict[str, Any], float | None]:
    """One run's summary, and the seconds that it took if it was made now, from nothing."""
    summary = directory / "report" / "summary.json"
    is_new = not directory.exists()
    began = time.monotonic()
    if not summary.is_file():
        command = [sys.executable, "-m", "moesaic.command_line.main", "run", "compress", "--recipe", recipe]
        if of is not None:
            command += ["--parent", str(of / "parent"), "--data", str(of / "data")]
        subprocess.run([*command, "--seed", str(seed), "--output", str(directory)], check=True, stdout=sys.stderr)
    found: dict[str, Any] = json.loads(summary.read_text())
    return found, round(time.monotonic() - began, 1) if is_new else None


def peak_memory_mib(directory: Path) -> float:
    """The most memory that the process of any stage took."""
    stored = (directory / "store" / "records").glob("*.json")
    return max(float(json.loads(path.read_text())["peak_memory_mib"]) for path in stored)


def promotion(directory: Path) -> dict[str, Any]:
    """What the registry's gate said of the child."""
    said = json.loads((directory / "promotion" / "promotion.json").read_text())
    return {name: said[name] for name in ("outcome", "lines")}


def measure_bars(recovery: Mapping[str, Any]) -> dict[str, float]:
    """What one run reached, in the order of the bars; the last of them is for runs with a control.

    Distillation has nothing to bring back at an effort at which pruning lost nothing.
    """
    reached = [
        min((share for share in recovery["recovered_by_distillation"].values() if share is not None), default=1.0),
        recovery["retention"]["low"],
        recovery["retention"]["high"],
        max(recovery["tokens_ratio"].values()),
        recovery["request_efficiency"]["best"],
    ]
    if control := recovery.get("baseline"):
        reached.append(control["differences"]["averaged"]["mean"]["points"])
    return dict(zip(BARS, reached, strict=False))


def is_met(bar: str, reached: float) -> bool:
    """Whether a figure clears its bar."""
    asked = BARS[bar]
    if "more than" in bar:
        return reached > asked
    return reached <= asked + _ROUNDING if "at most" in bar else reached >= asked - _ROUNDING


def main() -> None:
    """Run, print a table to standard error and the record to standard output."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="tiny_cpu_full", help="%(default)s")
    parser.add_argument("--of", type=Path, help="directory of another parent and its data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="%(default)s")
    parser.add_argument("--runs", type=Path, default=Path("runs/full"), help="directory of the runs (%(default)s)")
    given = parser.parse_args()
    made = {seed: compress(given.recipe, given.of, seed, given.runs / f"seed-{seed}") for seed in given.seeds}
    summaries = {seed: summary for seed, (summary, _) in made.items()}
    reached = {seed: measure_bars(summary["recovery"]) for seed, summary in summaries.items()}
    bars: dict[str, dict[str, Any]] = {
        bar: {
            "asked": asked,
            "reached": {str(seed): found[bar] for seed, found in reached.items()},
            "mean": fmean(found[bar] for found in reached.values()),
            "met": all(is_met(bar, found[bar]) for found in reached.values()),
        }
        for bar, asked in BARS.items()
        if all(bar in found for found in reached.values())
    }
    for bar, found in bars.items():
        figures = ", ".join(f"{value:.3f}" for value in found["reached"].values())
        print(f"{'met   ' if found['met'] else 'MISSED'} {bar} {found['asked']}: {figures}", file=sys.stderr)
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    record = {
        "command": " ".join(["python benchmarks/compress.py", *sys.argv[1:]]),
        "commit": head.stdout.strip(),
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": describe_hardware(),
        "versions": installed_versions(),
        "bars": bars,
        "seconds": {str(seed): seconds for seed, (_, seconds) in made.items()},
        "promotion": {str(seed): promotion(given.runs / f"seed-{seed}") for seed in summaries},
        "peak_memory_mib": {str(seed): peak_memory_mib(given.runs / f"seed-{seed}") for seed in summaries},
        "runs": {str(seed): summary["recovery"] for seed, summary in summaries.items()},
        "serving": {str(seed): summary["serving"] for seed, summary in summaries.items()},
    }
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
