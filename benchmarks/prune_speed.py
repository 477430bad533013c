"""Speed and memory of the ``prune_model`` stage against copying the bytes it writes.

The parent is a synthetic checkpoint of gpt-oss-120b's names, layers, experts and sharding, 8 GiB by default. The child
keeps 88 of 128 experts in every layer, which ones is random, so that its rows are scattered over the parent's files.

Both sides read files whose pages were dropped from the cache (``posix_fadvise``), write new files to the same disk and
end when all of them are on it (``fsync``). They take turns, and so does who begins:

prune   ``moesaic.search.prune_model.run.run`` as a process of its own would call it: checks, copy, fsync, final check.
copy    ``shutil.copyfile`` of every file of an earlier child, then ``fsync`` of each: the same bytes in the same files.

Digests for the store are no part of the stage: the store takes them when the output is added, and that time is given
beside the others (``store_digest_s``: SHA-256 of the child, in this process). Peak memory is the most that a process of
its own had resident while it pruned, Python and PyTorch included.

Run: python benchmarks/prune_speed.py [--scale 0.37] [--rounds 3] [--directory DIR] [--record FILE]
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bars import Bar, conclude

from moesaic.models.checkpoint import Checkpoint
from moesaic.models.synthesis import MODELS, scale_model, write_synthetic
from moesaic.search.prune_model import run as prune_model
from moesaic.search.prune_model.stage import PruneModelConfig

MIB, GIB = 2**20, 2**30
KEPT = 88
MOST_TIME, MOST_MEMORY_GIB = 1.3, 1.5
ALONE = """
import sys
from pathlib import Path
from moesaic.search.prune_model.stage import PruneModelConfig
from moesaic.platform.runs.records import peak_memory_mib
from moesaic.search.prune_model import run as prune_model
names = ("parent", "ranking", "architecture", "output", "scratch")
prune_model.run(PruneModelConfig(), **dict(zip(names, map(Path, sys.argv[1:]), strict=True)))
print(peak_memory_mib())
"""


def prepare(place: Path, scale: float) -> dict[str, Path]:
    """The stage's inputs."""
    inputs = {name: place / name for name in ("parent", "ranking", "architecture", "scratch")}
    write_synthetic(scale_model(MODELS["gpt-oss-120b"], scale), inputs["parent"])
    for name in ("ranking", "architecture", "scratch"):
        inputs[name].mkdir()
    blocks = Checkpoint.open(inputs["parent"]).architecture.blocks
    draws = random.Random(0)
    orders = [draws.sample(range(block.num_experts), block.num_experts) for block in blocks]
    (inputs["ranking"] / "ranking.json").write_text(json.dumps({"layers": [{"order": order} for order in orders]}))
    child = [replace(block, num_experts=KEPT).as_config() for block in blocks]
    (inputs["architecture"] / "architecture.json").write_text(json.dumps({"candidates": {"puzzle": {"blocks": child}}}))
    return inputs


def prune(inputs: dict[str, Path], output: Path) -> None:
    """The stage."""
    output.mkdir()
    prune_model.run(PruneModelConfig(), **inputs, output=output)


def copy(source: Path, output: Path) -> None:
    """Every file, and then each to the disk."""
    output.mkdir()
    for path in sorted(source.iterdir()):
        shutil.copyfile(path, output / path.name)
    for path in sorted(output.iterdir()):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def forget(directory: Path) -> None:
    """Drop a directory's pages from the cache; they are on the disk."""
    for path in directory.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def timed(action: Callable[[], None]) -> tuple[float, float]:
    """Seconds, and CPU seconds of this process, the kernel's copying included."""
    wall, processor = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - wall, time.process_time() - processor


def measure(inputs: dict[str, Path], place: Path, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds and CPU seconds of every round."""
    child, pruned, copied = place / "child", place / "pruned", place / "copied"
    prune(inputs, child)
    sides: list[tuple[str, Path, Path, Callable[[], None]]] = [
        ("prune", inputs["parent"], pruned, lambda: prune(inputs, pruned)),
        ("copy", child, copied, lambda: copy(child, copied)),
    ]
    found: dict[str, list[tuple[float, float]]] = {"prune": [], "copy": []}
    for index in range(rounds):
        for name, source, output, action in sides if index % 2 else reversed(sides):
            forget(source)
            found[name].append(timed(action))
            shutil.rmtree(output)
    return found


def peak_mib(inputs: dict[str, Path], output: Path) -> float:
    """Of one process that prunes."""
    output.mkdir()
    paths = [
        *(str(inputs[name]) for name in ("parent", "ranking", "architecture")),
        str(output),
        str(inputs["scratch"]),
    ]
    result = subprocess.run([sys.executable, "-c", ALONE, *paths], capture_output=True, text=True, check=True)
    shutil.rmtree(output)
    return float(result.stdout.splitlines()[-1])


def digest_s(directory: Path) -> float:
    """Seconds of the store's digests."""
    start = time.perf_counter()
    for path in directory.glob("*.safetensors"):
        with path.open("rb") as file:
            hashlib.file_digest(file, "sha256")
    return time.perf_counter() - start


def run(place: Path, scale: float, rounds: int) -> tuple[list[Bar], dict[str, Any]]:
    """The whole benchmark in one directory."""
    inputs = prepare(place, scale)
    found = measure(inputs, place, rounds)
    medians = {
        name: [statistics.median(column) for column in zip(*times, strict=True)] for name, times in found.items()
    }
    peak = peak_mib(inputs, place / "alone")
    parent_bytes, child_bytes = (
        sum(path.stat().st_size for path in directory.iterdir()) for directory in (inputs["parent"], place / "child")
    )
    bars = [
        Bar(
            "seconds to prune over seconds to copy what it writes",
            medians["prune"][0] / medians["copy"][0],
            most=MOST_TIME,
        ),
        Bar("peak memory of pruning, GiB", peak / 1024, most=MOST_MEMORY_GIB),
    ]
    facts = {
        "parent_gib": round(parent_bytes / GIB, 2),
        "child_gib": round(child_bytes / GIB, 2),
        "seconds": {name: [round(wall, 2) for wall, _ in times] for name, times in found.items()},
        "cpu_seconds": {name: [round(cpu, 2) for _, cpu in times] for name, times in found.items()},
        "median_mib_per_s": {name: round(child_bytes / MIB / wall, 1) for name, (wall, _) in medians.items()},
        "cpu_seconds_prune_over_copy": round(medians["prune"][1] / medians["copy"][1], 2),
        "peak_memory_mib": round(peak),
        "store_digest_s": round(digest_s(place / "child"), 1),
    }
    return bars, facts


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=0.37, help="of the parent, see `moesaic synth` (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="%(default)s")
    parser.add_argument(
        "--directory", type=Path, help="where to write, about four times the parent (the default's place)"
    )
    parser.add_argument("--record", type=Path, help="JSON file to write")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.directory) as place:
        bars, facts = run(Path(place), given.scale, given.rounds)
    command = f"python benchmarks/prune_speed.py --scale {given.scale:g} --rounds {given.rounds}"
    conclude(command, bars, facts, given.record)


if __name__ == "__main__":
    main()
