"""How much faster vLLM serves a child than its parent: ``benchmark_serving`` as in the demo, several times over.

Parent and child are exported and served side by side, point by point, by the recipe's own workloads. Each run starts
the servers anew, so that the spread of its repeats can be held against what the next one finds.

Run: python benchmarks/served_speed.py --child runs/demo/child [--parent MODEL] [--runs 3] [--record FILE]
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from bars import Bar, conclude

from moesaic.deploy.export_engine.bundle import write_bundle
from moesaic.measure.benchmark_serving import run as benchmark_serving
from moesaic.measure.benchmark_serving.run import PAYLOAD
from moesaic.models.checkpoint import Checkpoint
from moesaic.pipelines import example
from moesaic.pipelines.recipes import tiny_cpu


def main() -> None:
    """Serve, measure and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", type=Path, required=True)
    parser.add_argument("--parent", type=Path, default=example() / "parent")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--record", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundles = {name: Path(folder) / name for name in ("parent", "child")}
        for name, bundle in bundles.items():
            write_bundle(Checkpoint.open(getattr(given, name)), bundle, tiny_cpu().export_engine)
        runs = [measure(bundles, Path(folder) / f"run-{number}") for number in range(given.runs)]
    best = {name: [run["best_speedup"][name] for run in runs] for name in runs[0]["best_speedup"]}
    found = {
        "best_speedup": {
            name: {"median": median(of_run), "least": min(of_run), "most": max(of_run)} for name, of_run in best.items()
        },
        "runs": runs,
    }
    bars = [Bar("long context: the child is faster in every run, least ratio", min(best["long"]), least=1.0)]
    conclude(" ".join(["python benchmarks/served_speed.py", *sys.argv[1:]]), bars, found, given.record)


def measure(bundles: dict[str, Path], directory: Path) -> dict[str, Any]:
    """One run: the ratio of the best throughputs by workload, and of every point the ratios of its repeats."""
    output, scratch = directory / "output", directory / "scratch"
    for made in (output, scratch):
        made.mkdir(parents=True)
    metrics = benchmark_serving.run(tiny_cpu().benchmark_serving, **bundles, output=output, scratch=scratch)
    measured = json.loads((output / PAYLOAD).read_text())
    prefix = "best_speedup_"
    best = {name.removeprefix(prefix): ratio for name, ratio in metrics.items() if name.startswith(prefix)}
    return {"best_speedup": best, "ratios": measured["ratios"], "parent_twice": measured["parent_twice"]}


if __name__ == "__main__":
    main()
