"""Runs small benchmarks again by the commands of their newest records, and says which number no longer holds.

What was measured holds if every bar that was met is met again. What was computed, of which a record has no bars, holds
if every number is the same. Benchmarks that need a run of the demo or hours are not here; their records name their
commands.

Run: python benchmarks/again.py [NAME ...]
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("results")
SMALL = ("h100_cost_model", "h100_search", "mxfp4_speed", "scoring_speed", "prune_speed", "s3_speed")
"""A few minutes each on two cores, out of nothing but the repository."""
_OF_THE_RUN = ("command", "commit", "date", "hardware", "load_average", "versions", "moesaic")
"""Keys of a record that say how it came about."""
Row = tuple[str, Any, Any, bool]
"""What a number is, what it was, what it is now, and whether that holds."""


def main() -> None:
    """Run, compare and print; exit code 1 if something no longer holds, or runs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"records, of {', '.join(SMALL)} (all)")
    names = parser.parse_args().names or SMALL
    if unknown := sorted(set(names) - set(SMALL)):
        parser.error(f"{unknown[0]} is none of the small records; choose of {', '.join(SMALL)}")
    table = Table("record", "number", "published", "now", "", box=None)
    fallen = 0
    for name in names:
        record = newest(name, RESULTS)
        published = json.loads(record.read_text())
        print(f"{record.name}: {published['command']}", file=sys.stderr)
        try:
            now_found = run_again(published["command"])
        except subprocess.CalledProcessError as failed:
            table.add_row(name, "all", "", f"its command ends with status {failed.returncode}", "NO LONGER RUNS")
            fallen += 1
            continue
        for what, then, now, holds in compare(published, now_found):
            table.add_row(name, what, _text(then), _text(now), "holds" if holds else "NO LONGER HOLDS")
            fallen += not holds
    Console(width=160).print(table)
    sys.exit(fallen > 0)


def newest(name: str, results: Path) -> Path:
    """The latest record of a benchmark."""
    return max(results.glob(f"{name}_*-core-*.json"), key=lambda path: path.stem.rpartition("_")[2])


def run_again(command: str) -> dict[str, Any]:
    """The record that a benchmark's command writes now."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.json"
        _, *arguments = shlex.split(command)
        subprocess.run(
            [sys.executable, *arguments, "--record", record], cwd=ROOT, stdout=subprocess.DEVNULL, check=True
        )
        content: dict[str, Any] = json.loads(record.read_text())
        return content


def compare(published: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Row]:
    """Bar by bar; of a record without bars only the numbers that differ, or one row that says how many are the same."""
    if "bars" in published:
        values = {bar["what"]: bar for bar in now["bars"]}
        for bar in published["bars"]:
            again = values.get(bar["what"], {"value": None, "met": False})
            yield bar["what"], bar["value"], again["value"], again["met"] or not bar["met"]
        return
    before, after = (dict(_leaves(content)) for content in (published, now))
    different = [where for where in before.keys() | after.keys() if before.get(where) != after.get(where)]
    for where in sorted(different):
        yield where, before.get(where), after.get(where), False
    if not different:
        yield f"{len(before)} numbers and names", "", "the same", True


def _leaves(content: Any, where: Sequence[str] = ()) -> Iterator[tuple[str, Any]]:
    """Every value that is no list and no mapping, by where it stands."""
    if isinstance(content, dict):
        items = {key: value for key, value in content.items() if where or key not in _OF_THE_RUN}
    elif isinstance(content, list):
        items = dict(enumerate(content))
    else:
        yield ".".join(where), content
        return
    for key, value in items.items():
        yield from _leaves(value, (*where, str(key)))


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
