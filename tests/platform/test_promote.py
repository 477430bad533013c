"""A child is registered, judged and promoted on a registry in a file; the figures are those of ``recovery_inputs``."""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from moesaic.core.errors import ArtifactError, ConfigError
from moesaic.pipelines.recipes import RECIPES
from moesaic.platform.promote.run import source_of, store_address
from moesaic.platform.promote.stage import PromoteConfig
from moesaic.platform.registry.registry import Registry, RegistryAddress
from moesaic.platform.runs.lineage import keep_record
from moesaic.platform.runs.runtime import perform, plan_stage
from moesaic.platform.store import Store
from moesaic.platform.store.manifest import MANIFEST
from tests.platform.played_run import PlayedRun, play
from tests.platform.test_promotion import summary

CONFIG = PromoteConfig(
    model="child",
    margin_points={"low": 15, "high": 15},
    kv_margin_points={"low": 15},
    min_request_efficiency={"high": 1.9},
    pipeline="compress-0.1.0",
    recipe="tiny_cpu",
)


@dataclass(frozen=True)
class Given:
    """The stage's inputs, and the run they are of."""

    run: PlayedRun
    store: Store
    paths: dict[str, Path]

    def promote(self, registry: RegistryAddress | None, config: PromoteConfig, output: Path) -> dict[str, Any]:
        output.mkdir()
        run = plan_stage("promote", config.to_json(), self.paths, self.store)
        record = perform(run, output, output, self.store.directory, registry)
        return json.loads((output / "promotion.json").read_text()) | {"metrics": record.metrics}


@pytest.fixture
def given(tmp_path: Path) -> Given:
    return prepare(tmp_path, "puzzle")


def prepare(directory: Path, name: str) -> Given:
    store = Store.at(directory / "store")
    run = play(store, RECIPES["tiny_cpu"](), directory / f"run-{name}", name)
    paths = {part: directory / f"{part}-{name}" for part in ("child", "report", "bundle")}
    run.child.write_record(paths["child"])
    (paths["child"] / MANIFEST).write_text(store.manifest(run.child.digest).to_json())
    run.report.write_record(paths["report"])
    (paths["report"] / "summary.json").write_text(json.dumps(summary()))
    write_bundle(paths["bundle"], run, store, passed=True)
    return Given(run, store, paths)


def write_bundle(directory: Path, run: PlayedRun, store: Store, passed: bool) -> None:
    """The manifest of a bundle made of the child, as far as the gate looks at one."""
    record = replace(run.child.record, stage="export_engine", inputs={"child": run.child.digest})
    record = replace(record, origins={"child": run.child.record.origin})
    files = directory.with_name(f"{directory.name}-files-{passed}")
    files.mkdir()
    (files / "validation.json").write_text(json.dumps({"passed": passed}))
    manifest = store.add_directory(files, "model", format="safetensors", producer="export_engine")
    directory.mkdir(exist_ok=True)
    (directory / MANIFEST).write_text(manifest.to_json())
    record.write(directory)
    keep_record(store, record)


@pytest.fixture
def registry(empty_mlflow: bytes, tmp_path: Path) -> RegistryAddress:
    (tmp_path / "mlflow.db").write_bytes(empty_mlflow)
    return RegistryAddress(f"sqlite:///{tmp_path / 'mlflow.db'}")


def test_a_child_that_passes_becomes_the_champion(given: Given, registry: RegistryAddress, tmp_path: Path) -> None:
    found = given.promote(registry, CONFIG, tmp_path / "out")
    assert (found["version"], found["champion"], found["outcome"]) == (1, 1, "promoted")
    assert all(line["met"] for line in found["lines"])
    assert found["metrics"]["champion"] == 1
    assert found["metrics"]["accuracy_points.low"] == pytest.approx(1)
    version = Registry(registry, "child").version("champion")
    assert version.aliases == ("challenger", "champion")
    assert store_address(version.source) == given.store.directory
    assert version.tags["moesaic.manifest"] == given.run.child.digest
    assert version.tags["moesaic.source.parent"] == given.run.inputs.parent
    assert version.tags["moesaic.source.calibration_short"] == given.run.inputs.calibration_short
    assert version.tags["moesaic.origin.report"] == given.run.report.record.origin
    assert version.tags["moesaic.pipeline"] == "compress-0.1.0"
    assert version.tags["moesaic.gate.request_efficiency.high"] == "2 (>= 1.9): met"
    assert re.fullmatch(
        r"\+1\.0 \[-\S+, \S+\], n = 40 \(interval above -15\): met", version.tags["moesaic.gate.accuracy_points.low"]
    )
    assert version.tags["moesaic.gate"] == "met"


def test_a_repeated_promotion_changes_nothing(given: Given, registry: RegistryAddress, tmp_path: Path) -> None:
    given.promote(registry, CONFIG, tmp_path / "out")
    again = given.promote(registry, CONFIG, tmp_path / "again")
    assert (again["version"], again["champion"], again["outcome"]) == (1, 1, "already")
    assert len(Registry(registry, "child").history().moves) == 1


def test_a_child_that_fails_is_the_challenger_with_its_figures(
    given: Given, registry: RegistryAddress, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given.promote(registry, CONFIG, tmp_path / "first")
    other = prepare(tmp_path, "other")
    del other.paths["bundle"]
    config = CONFIG.but(kv_margin_points={"low": 5})
    found = other.promote(registry, config, tmp_path / "second")
    assert (found["version"], found["champion"], found["outcome"]) == (2, 1, "refused")
    failed = {line["name"] for line in found["lines"] if not line["met"]}
    assert failed == {"kv_accuracy_points.low", "export_checked"}
    assert "NOT MET" in capsys.readouterr().err
    client = Registry(registry, "child")
    assert client.version("challenger").number == 2
    assert client.version("champion").number == 1
    assert client.version("2").tags["moesaic.gate.export_checked"] == "no bundle (no check failed): NOT MET"


def test_a_bundle_that_failed_its_checks_does_not_count(
    given: Given, registry: RegistryAddress, tmp_path: Path
) -> None:
    write_bundle(given.paths["bundle"], given.run, given.store, passed=False)
    found = given.promote(registry, CONFIG, tmp_path / "out")
    assert [line["name"] for line in found["lines"] if not line["met"]] == ["export_checked"]


def test_evidence_of_another_child_does_not_count(given: Given, registry: RegistryAddress, tmp_path: Path) -> None:
    other = prepare(tmp_path, "other")
    del given.paths["bundle"]
    given.paths["report"] = other.paths["report"]
    config = CONFIG.model_copy(update={"require_export": False})
    found = given.promote(registry, config, tmp_path / "out")
    assert [line["name"] for line in found["lines"] if not line["met"]] == ["evidence_of_this_child"]


def test_lost_records_are_named(given: Given, registry: RegistryAddress, tmp_path: Path) -> None:
    del given.paths["bundle"]
    costs = given.run.report.record.origins["costs"]
    (given.store.directory / "records" / f"{costs}.json").unlink()
    found = given.promote(registry, CONFIG.model_copy(update={"require_export": False}), tmp_path / "out")
    (line,) = [line for line in found["lines"] if not line["met"]]
    assert line["name"] == "lineage_complete"
    assert line["figure"].endswith(f"unknown: costs {given.run.report.record.inputs['costs'][:12]}")


def test_what_cannot_be_promoted_is_refused_before_the_registry_is_touched(given: Given, tmp_path: Path) -> None:
    nowhere = RegistryAddress(f"sqlite:///{tmp_path / 'never.db'}")
    (given.paths["report"] / "summary.json").unlink()
    with pytest.raises(ArtifactError, match=r"summary\.json does not exist"):
        given.promote(nowhere, CONFIG, tmp_path / "one")
    (given.paths["child"] / MANIFEST).unlink()
    with pytest.raises(ArtifactError, match=r"holds no manifest.json"):
        given.promote(nowhere, CONFIG, tmp_path / "two")
    with pytest.raises(ConfigError, match="set MLFLOW_TRACKING_URI"):
        given.promote(None, CONFIG, tmp_path / "three")
    assert not (tmp_path / "never.db").exists()


def test_the_address_of_a_manifest_leads_back_to_its_store(tmp_path: Path) -> None:
    store = Store.at(tmp_path)
    assert source_of(store, "ab") == f"moesaic://{tmp_path}/manifests/ab.json"
    assert store_address(source_of(store, "ab")) == tmp_path
    assert store_address("s3://bucket/team/manifests/ab.json") == "s3://bucket/team"
    with pytest.raises(ArtifactError, match="name the store with --store"):
        store_address("models:/other/1")
