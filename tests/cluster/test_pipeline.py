"""The tiny pipeline on a real cluster, every task a pod; distillation over two pods; reinforcement up to its error."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from moesaic.core.code import code_version
from moesaic.data.sets import DataSets
from moesaic.pipelines import compiled, example
from moesaic.pipelines.recipe import Recipe
from moesaic.pipelines.recipes import find_recipe
from moesaic.platform.cluster import ClusterProfile
from moesaic.platform.cluster.jobs.job_template import job_settings
from moesaic.platform.ingest.stage import IngestConfig
from moesaic.platform.runs.local import run_compiled
from moesaic.platform.runs.run_context import RunContext
from moesaic.platform.store import Store
from moesaic.search.search_architecture.stage import Limits
from tests.cluster.conftest import MANIFESTS
from tests.cluster.pods import STORE, Finished, PipelineDriver, Reader, kubectl, volume_here

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1500)]

TIMED = {"measurements", "architecture"}
"""Inputs that hold times: how fast models are, how long the solver took. The child's digest stands for the latter."""


def tiny() -> Recipe:
    """The short recipe with modelled costs: nothing but `benchmark` depends on how fast a machine is."""
    limits = {"long": Limits(memory_ratio=0.45), "short": Limits(memory_ratio=0.85)}  # on a GPU it is launch-bound
    costs = {"source": "model", "hardware": "h100"}
    return find_recipe("tiny_cpu_fast").but(measure_costs=costs, search_architecture={"limits": limits})


def put_inputs(store: Store) -> IngestConfig:
    parent = store.add_directory(example() / "parent", "model", format="safetensors", producer="test").id
    sets = DataSets.at(example() / "data")
    ids = {
        name: store.add_file(getattr(sets, name), "dataset", format="jsonl", producer="test").id
        for name in ("calibration_short", "calibration_long", "prompts", "tests")
    }
    return IngestConfig(parent=parent, **ids)


@pytest.fixture(scope="session")
def ingest(reader: Reader, tmp_path_factory: pytest.TempPathFactory) -> IngestConfig:
    """The inputs, put into the volume's store by root where the volume lies here, else by a pod."""
    local = tmp_path_factory.mktemp("inputs") / "store"
    config = put_inputs(Store.at(local))
    if os.geteuid() == 0 and (volume := volume_here()):
        assert put_inputs(Store.at(volume)) == config
    else:
        kubectl("cp", f"{local}/.", f"{reader.name}:{STORE}")
    return config


@pytest.fixture(scope="session")
def searched(
    ingest: IngestConfig, reader: Reader, profile: ClusterProfile, record: dict[str, Any]
) -> tuple[PipelineDriver, dict[str, Finished]]:
    """The search pipeline, run as pods."""
    manifest = compiled()["search"]
    names = yaml.safe_load(manifest.read_text())["root"]["inputDefinitions"]["parameters"]
    driver = PipelineDriver(manifest, profile, tiny().arguments(ingest, code_version(), names), reader)
    begun = time.monotonic()
    done = driver.run(1200)
    record["search_s"] = round(time.monotonic() - begun, 1)
    return driver, done


@pytest.fixture(scope="session")
def traces(searched: tuple[PipelineDriver, dict[str, Finished]], profile: ClusterProfile, reader: Reader) -> list[Any]:
    """The parent's replies to some prompts, as an artifact."""
    _, done = searched
    driver = PipelineDriver(compiled()["compress"], profile, {"version": code_version()}, reader)
    given = {"model": done["ingest"].artifacts["parent"], "prompts": done["ingest"].artifacts["prompts"]}
    config = tiny().generate_traces.but(max_prompts=24)
    return driver.run_task("generate-traces", config.to_json(), given).artifacts["traces"]


def by_stage(records: list[dict[str, Any]]) -> dict[tuple[str, str, str], Any]:
    """The inputs of every stage run, by stage, subject and config; those that hold times left out."""
    return {
        (one["stage"], one["subject"], one["config_digest"]): {
            name: digest for name, digest in one["inputs"].items() if name not in TIMED
        }
        for one in records
    }


def test_every_task_as_a_pod_gives_what_a_local_run_gives(
    searched: tuple[PipelineDriver, dict[str, Finished]],
    ingest: IngestConfig,
    reader: Reader,
    record: dict[str, Any],
    tmp_path: Path,
) -> None:
    _, done = searched
    theirs = reader.records()
    manifest = compiled()["search"]
    names = yaml.safe_load(manifest.read_text())["root"]["inputDefinitions"]["parameters"]
    store = tmp_path / "store"
    assert put_inputs(Store.at(store)) == ingest
    begun = time.monotonic()
    (tmp_path / "run").mkdir()
    context = RunContext.for_local_run(tmp_path / "run", store)
    run_compiled(manifest, tiny().arguments(ingest, code_version(), names), context, Console(stderr=True))
    record["search_local_s"] = round(time.monotonic() - begun, 1)
    ours = [json.loads(path.read_text()) for path in (store / "records").iterdir()]
    assert by_stage(theirs) == by_stage(ours)
    stage_s = {(one["stage"], one["subject"]): one["duration_s"] for one in theirs}
    record["tasks"] = {name: {"pod_s": one.pod_s} for name, one in sorted(done.items())}
    record["stages_s"] = {" ".join(key): value for key, value in sorted(stage_s.items())}
    owners = set(reader.run("find", STORE, "-user", "0", "-type", "f", "-newer", f"{STORE}/records").split())
    assert not owners, "root has put the inputs, and nothing since"


def test_a_pod_in_the_image_is_tight_and_says_what_is_usable(reader: Reader) -> None:
    said = reader.run("moesaic", "doctor")
    assert "torch" in said
    tops = reader.run("sh", "-c", "find / -xdev -type d -writable -not -path '/proc/*' -prune 2>/dev/null || true")
    assert not set(tops.split()) - {"/scratch", "/tmp", "/dev/shm", "/dev/mqueue", "/store"}


def test_distillation_over_two_pods_ends_like_one_process(
    searched: tuple[PipelineDriver, dict[str, Finished]],
    traces: list[Any],
    profile: ClusterProfile,
    reader: Reader,
    record: dict[str, Any],
) -> None:
    _, done = searched
    template = yaml.safe_load((MANIFESTS / "jobs" / "trainjob.yaml").read_text())
    two = ClusterProfile.model_validate(
        profile.model_dump() | {"jobs": {"distill": {"template": template, "node": "cpu", "num_nodes": 2}}}
    )
    config = tiny().distill.but(steps=6, rows_per_step=4, rows_per_forward=2, evaluate_every_steps=3)
    curves = {}
    for name, chosen in (("one", profile), ("two", two)):
        driver = PipelineDriver(compiled()["compress"], chosen, {"version": code_version()}, reader)
        given = {
            "child": done["prune-model"].artifacts["child"],
            "parent": done["ingest"].artifacts["parent"],
            "traces": traces,
        }
        begun = time.monotonic()
        trained = driver.run_task("distill", config.to_json(), given)
        record[f"distill_{name}_s"] = round(time.monotonic() - begun, 1)
        manifest = json.loads(reader.read(f"{trained.artifacts['trained'][0]['uri']}/manifest.json"))
        (curve,) = [one["sha256"] for one in manifest["files"] if one["path"].endswith("training.jsonl")]
        lines = reader.read(f"{STORE}/objects/sha256/{curve[:2]}/{curve}").splitlines()
        curves[name] = [json.loads(line) for line in lines]
    (job,) = [one for one in json.loads(kubectl("get", "trainjobs", "-o", "json"))["items"]]
    assert job["spec"]["trainer"]["numNodes"] == 2
    losses = {name: [row["loss"] for row in curve if "loss" in row] for name, curve in curves.items()}
    assert losses["two"] == pytest.approx(losses["one"], rel=1e-3)
    assert losses["two"][-1] < losses["two"][0]


def test_reinforcement_without_nemo_rl_ends_with_its_clear_error(
    searched: tuple[PipelineDriver, dict[str, Finished]], traces: list[Any], profile: ClusterProfile, reader: Reader
) -> None:
    _, done = searched
    template = yaml.safe_load((MANIFESTS / "jobs" / "rayjob.yaml").read_text())
    on_ray = ClusterProfile.model_validate(
        profile.model_dump() | {"jobs": {"reinforce": {"template": template, "node": "cpu", "num_nodes": 1}}}
    )
    driver = PipelineDriver(compiled()["compress"], on_ray, {"version": code_version()}, reader)
    config = tiny().policies[0].but(engine="nemo_rl")
    given = {
        "model": done["prune-model"].artifacts["child"],
        "prompts": done["ingest"].artifacts["prompts"],
        "traces": traces,
    }
    with pytest.raises(AssertionError, match=r"error: reinforce: engine .nemo_rl. needs NeMo-RL"):
        driver.run_task("reinforce", config.to_json(), given)


RAY_IMAGE = os.environ.get("MOESAIC_CLUSTER_RAY_IMAGE")
_FOLLOW = """
import sys
from pathlib import Path
from moesaic.core.nodes import Work
from moesaic.platform.cluster.jobs import ClusterJob, JobSettings
command = ["python3", "-m", "moesaic.recover.reinforce.nemo_rl.driver", "/store/none.yaml"]
job = ClusterJob(JobSettings.parse(sys.argv[1]), "8" * 64)
job.run(Work(command, {}, Path("/store/nemo_rl.log")), prepare=lambda: None, show=print)
"""


@pytest.mark.skipif(RAY_IMAGE is None, reason="MOESAIC_CLUSTER_RAY_IMAGE names no image with ray[default]")
def test_a_rayjob_runs_nemo_rls_driver_up_to_its_import(profile: ClusterProfile, reader: Reader) -> None:
    template = yaml.safe_load((MANIFESTS / "jobs" / "rayjob.yaml").read_text())
    template["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["volumes"][2]["emptyDir"]["sizeLimit"] = (
        "1Gi"
    )
    node = {"cpu": "500m", "memory": "1Gi", "memory_limit": "4Gi"}
    jobs = {"reinforce": {"template": template, "node": "cpu", "num_nodes": 1}}
    mine = ClusterProfile.model_validate(profile.model_dump() | {"nodes": {"cpu": node}, "jobs": jobs})
    settings = job_settings(mine, "reinforce", str(RAY_IMAGE)).but(poll_s=1.0)
    with pytest.raises(AssertionError) as failed:
        reader.run("python3", "-c", _FOLLOW, settings.to_json())
    said = str(failed.value)
    assert "waits in the queue moesaic" in said and "1 of 1 nodes run" in said
    assert "RayJob moesaic-reinforce-888888888888-1 failed: " in said
    assert "No module named 'nemo_rl'" in said
