"""Kill every stage at random moments, run it again, and hold what comes out against an undisturbed run.

Each stage of a tiny compression runs once undisturbed, as a task would: a process of its own, with store and MLflow.
Then, from the very same store, its process group is killed (SIGKILL) at a moment drawn from that run's duration, or
from the commit that ends it: the output goes to the store, the run is logged, the output appears in its place. It is
run again, perhaps killed again, until it is done. After every kill nothing half-made may be visible.

Run: python benchmarks/kill_stages.py [--kills 3] [--seed 0] [--stages ingest rank_experts] [--record FILE]
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bars import Bar, conclude
from pydantic import TypeAdapter
from tiny_chain import Step, put_inputs, steps, wanted_steps

from moesaic.core.files import file_digest
from moesaic.platform.runs import records
from moesaic.platform.runs.records import RECORD, Record
from moesaic.platform.store import Manifest, Store
from moesaic.platform.store.manifest import MANIFEST
from moesaic.platform.store.upkeep import verify
from moesaic.stages import STAGES

STRUCTURE_ONLY = {
    "measure_costs": "it times blocks on this machine",
    "benchmark": "it times both models on this machine",
    "benchmark_serving": "it times both models behind a server on this machine",
}
"""Stages of which no two runs are equal, and why: their payloads must have the same fields and lengths instead."""
NOT_COMPARED = {
    "search_architecture": ("seconds",),  # how long each solve took
    "refine_architecture": ("seconds",),
    "promote": ("outcome",),  # "already" where the attempt that was killed had promoted the child
}
"""Fields of a payload that tell how it was made."""
_ATTEMPT = """
import json, sys
from pathlib import Path
from types import SimpleNamespace
from moesaic.platform.runs import runtime

def artifacts(paths):
    return [artifacts(path) for path in paths] if isinstance(paths, list) else SimpleNamespace(path=paths)

def perform(*given):
    record = original(*given)
    Path(committing).touch()
    return record

stage, config, inputs, outputs, committing = json.loads(sys.argv[1])
original, runtime.perform = runtime.perform, perform
places = [{name: artifacts(path) for name, path in group.items()} for group in (inputs, outputs)]
runtime.run_stage(stage, config, *places)
"""
_PIPELINE = """
import sys
from moesaic.platform.runs.tracking import pipeline_run
with pipeline_run(sys.argv[1], "killed", {}, "killed") as run_id:
    print(run_id)
"""
_POLL_S = 0.001
_MOST_ROUNDS = 30
_KILLED_AGAIN = 0.85
"""Share of the reruns that are killed too, while kills are left."""


@dataclass(frozen=True)
class Attempt:
    """One run of a step's process."""

    seconds: float
    commit_seconds: float
    """From the end of the stage's own work to the end of the process; 0 if it did not come so far."""
    killed: bool


@dataclass
class Findings:
    """What the kills of one step showed."""

    undisturbed: Attempt
    kills: list[dict[str, Any]] = field(default_factory=list)
    runs: int = 0
    half_made: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)


class World:
    """A directory with a store, MLflow's database and the outputs of all steps; it can be put back as it was."""

    def __init__(self, directory: Path, tracking: bool) -> None:
        self.directory = directory / "world"
        self.saved = directory / "saved"
        self.log = directory / "attempts.log"
        self.database = self.directory / "mlflow.db" if tracking else None
        self.outputs = self.directory / "outputs"
        self.outputs.mkdir(parents=True, exist_ok=True)
        self.environment = {"MOESAIC_STORE": str(self.directory / "store")}
        if self.database:
            uri = f"sqlite:///{self.database}"
            begin = [sys.executable, "-W", "ignore", "-c", _PIPELINE, uri]
            run_id = subprocess.run(begin, check=True, capture_output=True, text=True).stdout.strip()
            self.environment |= {"MLFLOW_TRACKING_URI": uri, "MOESAIC_PARENT_RUN_ID": run_id}

    @property
    def store(self) -> Store:
        """Its store."""
        return Store.at(self.directory / "store")

    def save(self, name: str) -> None:
        """Keep a copy, hard links among its files included."""
        self.saved.mkdir(exist_ok=True)
        shutil.rmtree(self.saved / name, ignore_errors=True)
        subprocess.run(["cp", "-a", self.directory, self.saved / name], check=True)

    def restore(self, name: str) -> None:
        """Put a copy back in place."""
        shutil.rmtree(self.directory)
        subprocess.run(["cp", "-a", self.saved / name, self.directory], check=True)

    def place(self, source: str) -> Path:
        """Where ``step.output`` lies."""
        step, _, output = source.partition(".")
        return self.outputs / step / output

    def attempt(self, step: Step, kill_after: tuple[str, float] | None = None) -> Attempt:
        """Run the step's process to its end, or kill its group so many seconds after its start or its commit's."""
        committing = self.directory / "committing"
        committing.unlink(missing_ok=True)
        with self.log.open("a") as log:
            print(f"--- {step.name} {kill_after or ''}", file=log, flush=True)
            start, begun = time.monotonic(), 0.0
            process = subprocess.Popen(
                [sys.executable, "-c", _ATTEMPT, self._request(step, committing)],
                stdout=log,
                stderr=log,
                env=self._environment(),
                start_new_session=True,
            )
            while process.poll() is None:
                now = time.monotonic()
                if not begun and committing.exists():
                    begun = now
                if kill_after:
                    since = start if kill_after[0] == "any time" else begun
                    if since and now - since >= kill_after[1]:
                        os.killpg(process.pid, signal.SIGKILL)
                        break
                time.sleep(_POLL_S)
        status, end = process.wait(), time.monotonic()
        if status not in (0, -signal.SIGKILL):
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])
            raise SystemExit(f"{step.name} failed with status {status}:\n{tail}")
        return Attempt(end - start, end - begun if begun else 0.0, killed=status != 0)

    def _request(self, step: Step, committing: Path) -> str:
        inputs = {
            name: [str(self.place(one)) for one in source] if isinstance(source, list) else str(self.place(source))
            for name, source in step.inputs.items()
        }
        outputs = {name: str(self.place(f"{step.name}.{name}")) for name in step.outputs}
        return json.dumps([step.stage or step.name, step.config.to_json(), inputs, outputs, str(committing)])

    def _environment(self) -> dict[str, str]:
        given = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "MOESAIC_"))}
        given |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error"}
        return given | self.environment


def harass(world: World, step: Step, moments: Sequence[str], draws: random.Random) -> Findings:
    """Run a step once undisturbed, then kill it at these kinds of moments, until it is done each time."""
    world.save("before")
    findings = Findings(undisturbed=world.attempt(step))
    expected = observe(world, step)
    world.save("after")
    left = list(moments)
    for _ in range(_MOST_ROUNDS):
        if not left:
            break
        world.restore("before")
        again = True
        while True:
            kill = _draw(left[0], findings.undisturbed, draws) if left and again else None
            attempt = world.attempt(step, kill)
            findings.runs += 1
            findings.half_made += [f"{step.name}: {problem}" for problem in half_made(world, step, expected)]
            if not attempt.killed:
                break
            findings.kills.append({"moment": left.pop(0), "after_s": kill[1] if kill else 0.0})
            again = draws.random() < _KILLED_AGAIN
        findings.different += [f"{step.name}: {what}" for what in differences(expected, observe(world, step))]
    world.restore("after")
    return findings


def _draw(moment: str, undisturbed: Attempt, draws: random.Random) -> tuple[str, float]:
    whole = undisturbed.seconds if moment == "any time" else undisturbed.commit_seconds
    return moment, draws.uniform(0, whole)


def observe(world: World, step: Step) -> dict[str, Any]:
    """All of a finished step that a rerun must bring out again."""
    stage = step.stage or step.name
    found: dict[str, Any] = {}
    for name in step.outputs:
        directory = world.place(f"{step.name}.{name}")
        found[f"payload of {name}"] = _payload(directory, stage)
        record = Record.read(directory)
        found[f"record of {name}"] = [record.origin, record.subject, record.config, record.inputs, record.origins]
        found[f"metrics of {name}"] = sorted(record.metrics) if stage in STRUCTURE_ONLY else record.metrics
    found["records in the store"] = sorted(item.key for item in world.store.root.items("records/"))
    found["manifests in the store"] = [manifest.id for manifest in world.store.manifests()]
    if world.database:
        found |= _tracked(world.database)
    return found


def _payload(directory: Path, stage: str) -> Any:
    """Its digest, or its content without what no two runs have in common."""
    if stage not in STRUCTURE_ONLY and stage not in NOT_COMPARED:
        return records.content_digest(directory)
    contents = {path.name: json.loads(path.read_text()) for path in directory.glob("*.json") if path.name != RECORD}
    if stage in STRUCTURE_ONLY:
        return _structure(contents)
    return _without(contents, NOT_COMPARED[stage])


def _structure(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _structure(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_structure(value) for value in content]
    return "number" if isinstance(content, int | float) else content


def _without(content: Any, keys: Sequence[str]) -> Any:
    if isinstance(content, dict):
        return {key: _without(value, keys) for key, value in content.items() if key not in keys}
    return [_without(value, keys) for value in content] if isinstance(content, list) else content


def _tracked(database: Path) -> dict[str, Any]:
    """What MLflow holds: runs by name and status, versions of models and their aliases."""
    with contextlib.closing(sqlite3.connect(database)) as opened:
        ask = {
            "runs": "select name, status from runs",
            "model versions": "select name, source, version from model_versions",
            "aliases": "select name, alias, version from registered_model_aliases",
        }
        return {what: sorted(opened.execute(query).fetchall()) for what, query in ask.items()}


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Which of what was observed is not as it should be."""
    return [f"{name}: {found[name]} instead of {value}" for name, value in expected.items() if found[name] != value]


def half_made(world: World, step: Step, expected: Mapping[str, Any]) -> list[str]:
    """What is visible and not whole."""
    store = world.store
    problems = verify(store, store.manifests())
    problems += [item.key for item in store.root.items("objects/") if not _is_whole(store, item.key)]
    for item in store.root.items("records/"):
        kept = Record(**json.loads(store.root.read(item.key)))
        if f"records/{kept.origin}.json" != item.key:
            problems.append(item.key)
    problems += [f"tree {tree.name}" for tree in _visible(store.directory / "trees") if not _is_tree_whole(store, tree)]
    for name in step.outputs:
        directory = world.place(f"{step.name}.{name}")
        if directory.exists():
            if not (directory / RECORD).is_file():
                problems.append(f"output {name} without its record")
            elif _payload(directory, step.stage or step.name) != expected[f"payload of {name}"]:
                problems.append(f"output {name} is not whole")
            if (directory / MANIFEST).is_file():
                store.manifest(Manifest.read(directory).id)
    if world.database:
        sources = [(name, source) for name, source, _ in _tracked(world.database)["model versions"]]
        problems += [f"{sources.count(one)} model versions of {one}" for one in set(sources) if sources.count(one) > 1]
    return problems


def _is_whole(store: Store, key: str) -> bool:
    return file_digest(store.directory / key) == key.rpartition("/")[2]


def _visible(directory: Path) -> list[Path]:
    return [path for path in directory.glob("*") if not path.name.startswith(".")]


def _is_tree_whole(store: Store, tree: Path) -> bool:
    return all(
        (tree / entry.path).is_file() and (tree / entry.path).stat().st_size == entry.size_bytes
        for entry in store.manifest(tree.name).files
    )


def harass_all(given: argparse.Namespace, directory: Path) -> dict[str, Findings]:
    """All stages that were asked for, by name; goes on after the last step that is done in the directory."""
    world, notes, kept = World(directory, given.tracking), directory / "findings.json", TypeAdapter(dict[str, Findings])
    done = kept.validate_json(notes.read_bytes()) if notes.is_file() else {}
    if done:
        world.restore(list(done)[-1])
    for step in wanted_steps(steps(*put_inputs(world.store, world.directory)), given.stages):
        if step.name in done:
            continue
        to_kill = step.name in given.stages and not step.stage
        kinds = ["commit" if index % 3 == 2 else "any time" for index in range(given.kills)] if to_kill else []
        done[step.name] = harass(world, step, kinds, random.Random(f"{given.seed} {step.name}"))
        world.save(step.name)
        notes.write_bytes(kept.dump_json(done))
        for earlier in list(done)[:-1]:
            shutil.rmtree(world.saved / earlier, ignore_errors=True)
        print(_line(step.name, done[step.name]), file=sys.stderr, flush=True)
    return {name: findings for name, findings in done.items() if name in given.stages}


def _line(name: str, findings: Findings) -> str:
    problems = "; ".join([*findings.half_made, *findings.different])
    return f"{name}: {findings.undisturbed.seconds:.1f} s, {len(findings.kills)} kills, {findings.runs} runs {problems}"


def _describe(name: str, findings: Findings) -> dict[str, Any]:
    compared = STRUCTURE_ONLY.get(name)
    without = ", ".join(NOT_COMPARED.get(name, ()))
    return {
        "compared": f"structure: {compared}" if compared else f"content without {without}" if without else "digest",
        "undisturbed_s": findings.undisturbed.seconds,
        "commit_s": findings.undisturbed.commit_seconds,
        "kills": findings.kills,
        "runs_after_the_first": findings.runs,
        "half_made": findings.half_made,
        "different": findings.different,
    }


def main() -> None:
    """Kill, compare, print, record; the status is 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES), metavar="STAGE")
    parser.add_argument("--kills", type=int, default=3, help="of each stage (%(default)s); every third in its commit")
    parser.add_argument("--seed", type=int, default=0, help="%(default)s")
    parser.add_argument("--no-tracking", dest="tracking", action="store_false", help="without MLflow")
    parser.add_argument("--directory", type=Path, help="where to work, and to go on if the same is given again")
    parser.add_argument("--record", type=Path, help="JSON file to write")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        found = harass_all(given, given.directory or Path(directory))
    kills = sum(len(findings.kills) for findings in found.values())
    bars = [
        Bar("kills", kills, least=given.kills * len(found)),
        Bar("reruns that differ from the undisturbed run", sum(len(one.different) for one in found.values()), most=0),
        Bar("half-made things seen after a kill", sum(len(one.half_made) for one in found.values()), most=0),
    ]
    facts = {"seed": given.seed, "stages": {name: _describe(name, findings) for name, findings in found.items()}}
    command = f"python benchmarks/kill_stages.py --kills {given.kills} --seed {given.seed}"
    conclude(command, bars, facts, given.record)
    raise SystemExit(any(not bar.met for bar in bars))


if __name__ == "__main__":
    main()
