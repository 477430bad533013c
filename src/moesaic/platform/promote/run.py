"""Register a child, judge it by the gate, and make it the champion of the model registry if every line is met."""

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from moesaic.core.errors import ArtifactError
from moesaic.deploy.export_engine.bundle_manifest import VALIDATION
from moesaic.deploy.export_engine.verdict import VERDICT, Verdict
from moesaic.measure.outside.comparison import Comparison
from moesaic.models.stage_outputs import read_json
from moesaic.platform.promote.gate import Line, Provenance, gate_table, is_met, judge, read_figures
from moesaic.platform.promote.stage import PromoteConfig
from moesaic.platform.registry.registry import CHAMPION, Registry, RegistryAddress
from moesaic.platform.runs.lineage import Input, Origin, find_digest, origins, sources, trace, unknown_inputs, walk
from moesaic.platform.runs.records import content_digest, origin_of
from moesaic.platform.store import Address, Manifest, Store
from moesaic.platform.store.manifest import MANIFEST

SUMMARY, PROMOTION = "summary.json", "promotion.json"
ORIGIN_TAG, CONFIG_TAG = "moesaic.origin", "moesaic.promote_config"
"""Tags that say how the inputs of a promotion (``.child``, ``.report``, ``.bundle``) came about, and its config."""
_DIRECTORY = "moesaic://"
"""Scheme of a manifest in a directory: MLflow's server refuses plain paths, which it takes for its own."""
_NOT_IN_TAGS = re.compile(r"[^\w./ -]")
"""Characters that MLflow allows in no tag's name; those of other harnesses' tasks and metrics may have them."""


@dataclass(frozen=True)
class Challenger:
    """A child that is to become champion, and the gate's verdict on it."""

    manifest_id: str
    source: str
    """The address of its manifest in the store."""
    lines: list[Line]
    tags: Mapping[str, str]

    @property
    def description(self) -> str:
        """The gate as Markdown, which MLflow shows with the version."""
        rows = [f"| {line.name} | {line.shown} | {line.asked} | {_word(line)} |" for line in self.lines]
        return "\n".join(["| gate | figure | asked | |", "|---|---|---|---|", *rows])


def run(
    config: PromoteConfig,
    *,
    child: Path,
    report: Path,
    bundle: Path | None = None,
    verdict: Path | None = None,
    store: Address,
    registry: RegistryAddress,
    output: Path,
    scratch: Path,
) -> dict[str, float]:
    """Write ``promotion.json``: the version, the outcome, and the gate's lines. A refusal is a result, not an error."""
    evidence = {name: path for name, path in (("bundle", bundle), ("verdict", verdict)) if path is not None}
    challenger = examine(config, Manifest.read(child).id, {"report": report, **evidence}, Store.at(store))
    Console(file=sys.stderr, width=120).print(gate_table(challenger.lines))
    promotion = register_challenger(config, challenger, registry)
    (output / PROMOTION).write_text(json.dumps(promotion, indent=1) + "\n")
    figures = {line.name: line.figure for line in challenger.lines if isinstance(line.figure, float)}
    return figures | {"version": promotion["version"], "champion": float(promotion["champion"] == promotion["version"])}


def examine(
    config: PromoteConfig, child: str, given: Mapping[str, Path], store: Store, outside: Comparison | None = None
) -> Challenger:
    """Judge a child by the gate. Nothing is changed.

    Args:
        config: the thresholds.
        child: id of its manifest in the store.
        given: directories of the evidence by name: ``report`` with its record, from which the child's own history is
            known; ``bundle`` and ``verdict`` if there are.
        store: where manifests and records are.
        outside: what harnesses outside this project measured. Which models they were given, nothing here can check.

    Raises:
        ArtifactError: if an input is not what its stage writes, or the child is not in the store.
    """
    manifest = store.manifest(child)
    figures = read_figures(read_json(given["report"] / SUMMARY))
    if outside is not None:
        measured = {task: outside.named(task) for task in config.outside_margin_points}
        figures = replace(figures, outside={task: found for task, found in measured.items() if found is not None})
    evidence = {name: _trace(store, path) for name, path in given.items()}
    history = find_digest(evidence["report"], child) if evidence["report"] else None
    lines = judge(config, figures, _verdict(given, store), _provenance(store, evidence, history))
    tags = {f"moesaic.{name}": content_digest(path) for name, path in given.items()}
    tags |= {f"{ORIGIN_TAG}.{name}": origin.id for name, origin in ({"child": history} | evidence).items() if origin}
    tags |= {CONFIG_TAG: config.to_json()} | _gate_tags(lines) | _history_tags(history) | _outside_tags(outside)
    tags |= {f"moesaic.{name}": value for name in ("pipeline", "recipe") if (value := getattr(config, name))}
    return Challenger(manifest.id, source_of(store, manifest.id), lines, tags)


def register_challenger(
    config: PromoteConfig, challenger: Challenger, address: RegistryAddress, *, again: bool = False
) -> dict[str, Any]:
    """Register a challenger and make it champion if it meets the gate; returns the content of ``promotion.json``."""
    registry = Registry(address, config.model)
    registry.create()
    known = registry.history()
    version = registry.register(challenger.manifest_id, challenger.source, challenger.tags, challenger.description)
    registry.challenge(version.number)
    met = is_met(challenger.lines)
    outcome = registry.promote(version, known, again=again) if met else "refused"
    return {
        "model": config.model,
        "version": version.number,
        "manifest": challenger.manifest_id,
        "outcome": outcome,
        CHAMPION: registry.settle(),
        "lines": [asdict(line) for line in challenger.lines],
    }


def source_of(store: Store, manifest_id: str) -> str:
    """The address of a manifest, as a version's source names it."""
    address = store.root.address
    root = address if "://" in address else f"{_DIRECTORY}{Path(address).absolute()}"
    return f"{root}/manifests/{manifest_id}.json"


def store_address(source: str) -> Address:
    """The address of the store that holds the manifest at ``source``."""
    root, separator, _ = source.rpartition("/manifests/")
    if not separator:
        raise ArtifactError(f"{source} is not the address of a manifest; name the store with --store")
    return Path(root.removeprefix(_DIRECTORY)) if root.startswith(_DIRECTORY) else root


def _trace(store: Store, directory: Path) -> Origin | None:
    origin = origin_of(directory)
    return trace(store, origin) if origin else None


def _provenance(store: Store, evidence: Mapping[str, Origin | None], child: Origin | None) -> Provenance:
    traced = [origin for origin in evidence.values() if origin]
    every = {_words(given) for origin in traced for given in walk(origin)}
    unknown = [name for name, origin in evidence.items() if origin is None]
    unknown += dict.fromkeys(_words(given) for origin in traced for given in unknown_inputs(store, origin))
    own = child is not None and all(origin and child.id in origins(origin) for origin in evidence.values())
    return Provenance(len(every.difference(unknown)), tuple(unknown), own)


def _words(given: Input) -> str:
    return f"{given.name} {given.digest[:12]}"


def _verdict(given: Mapping[str, Path], store: Store) -> Verdict | None:
    """What is known of the bundle: by an engine, else by the checks of the export; None if there is no bundle."""
    if "bundle" not in given:
        return None
    if "verdict" in given:
        return Verdict.read(read_json(given["verdict"] / VERDICT))
    bundle = given["bundle"]
    if (bundle / MANIFEST).is_file():
        entries = [entry for entry in Manifest.read(bundle).files if entry.path == VALIDATION]
        validation = json.loads(store.read_range(entries[0], 0, entries[0].size_bytes)) if entries else {}
    else:
        validation = read_json(bundle / VALIDATION)
    return Verdict.read(validation)


def _gate_tags(lines: list[Line]) -> dict[str, str]:
    names = (_NOT_IN_TAGS.sub("_", line.name) for line in lines)
    words = (f"{line.shown} ({line.asked}): {_word(line)}" for line in lines)
    tags = {f"moesaic.gate.{name}": said for name, said in zip(names, words, strict=True)}
    return tags | {"moesaic.gate": "met" if is_met(lines) else "not met"}


def _history_tags(child: Origin | None) -> dict[str, str]:
    """Tags with the digests of the child's sources and the code that made it."""
    if child is None:
        return {}
    tags = {f"moesaic.source.{name}": digest for name, digest in sources(child).items()}
    code = f"{child.record.versions.get('moesaic', '')}+{child.record.code_digest[:12]}"
    return tags | {"moesaic.code": code, "moesaic.subject": child.record.subject}


def _outside_tags(outside: Comparison | None) -> dict[str, str]:
    """Tags with the digests of the files that outside results were read from, and what they say of themselves."""
    if outside is None:
        return {}
    tags = {f"moesaic.outside.{role}": outside.digest(role) for role in outside.files}
    tags |= {f"moesaic.outside.model.{role}": name for role, name in outside.models.items()}
    harnesses = sorted({suite.harness for suite in outside.suites.values()})
    return tags | {"moesaic.outside.effort": outside.effort or "", "moesaic.outside.harness": ", ".join(harnesses)}


def _word(line: Line) -> str:
    return "met" if line.met else "NOT MET"
