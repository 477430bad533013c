"""The tiny pipeline on a real cluster, every task a pod; distillation over two pods; reinforcement up to its error."""

import copy
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from moesaic.core.code import code_version
from moesaic.pipelines import compiled
from moesaic.pipelines.recipe import Recipe
from moesaic.pipelines.recipes import find_recipe
from moesaic.platform.cluster import ClusterProfile
from moesaic.platform.ingest.stage import IngestConfig
from moesaic.platform.runs.local import run_compiled
from moesaic.platform.runs.run_context import RunContext
from moesaic.platform.store import Store
from moesaic.recover.distill.stage import DistillConfig
from moesaic.search.search_architecture.stage import Limits
from tests.cluster.conftest import MANIFESTS, put_inputs
from tests.cluster.pods import STORE, Finished, PipelineDriver, Reader, get, image_of, kubectl, needs_images, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(2400)]

TIMED = {"measurements", "architecture"}
"""Inputs that hold times: how fast models are, how long the solver took. The child's digest stands for the latter."""


def tiny() -> Recipe:
    """The short recipe with modelled costs: nothing but `benchmark` depends on how fast a machine is. Few replies."""
    limits = {"long": Limits(memory_ratio=0.45), "short": Limits(memory_ratio=0.85)}  # on a GPU it is launch-bound
    costs = {"source": "model", "hardware": "h100"}
    return find_recipe("tiny_cpu_fast").but(
        measure_costs=costs,
        search_architecture={"limits": limits},
        rank_experts={"max_sequences": 8},
        evaluate={"problems_per_task": 2},
        benchmark={"input_tokens": (128,)},
    )


@pytest.fixture(scope="session")
def searched(
    ingest: IngestConfig, reader: Reader, profile: ClusterProfile, record: dict[str, Any]
) -> tuple[PipelineDriver, dict[str, Finished]]:
    """The search pipeline, run as pods."""
    manifest = compiled()["search"]
    names = yaml.safe_load(manifest.read_text())["root"]["inputDefinitions"]["parameters"]
    driver = PipelineDriver(manifest, profile, tiny().arguments(ingest, code_version(), names), reader)
    begun = time.monotonic()
    done = driver.run()
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


DISTILL = tiny().distill.but(
    steps=8, rows_per_step=4, rows_per_forward=2, evaluate_every_steps=4, checkpoint_every_steps=3
)
_SAME_STEPS, _SAME, _ALIKE = 3, 1e-5, 1e-2
"""Two processes against one, as parts of a step's loss: the same mathematics, summed in another order.

As long as every router chooses the same experts, losses differ by rounding: 1e-6 was seen in the first three steps.
Then a token that is near a tie gets other experts, which is no longer rounding: 5e-4 was seen up to the seventh step,
4e-3 at the eighth. So the second bound is judged, not derived. Rows that both processes saw, or none, would change the
loss of the first step, and by far more than either bound.
"""
_KILLED_AT_ROW = 7
"""Of the training curve: the held-out loss before and after step 4, and the losses of 5 steps."""


@dataclass(frozen=True)
class Distillation:
    """A distillation on the cluster, in its task's pod or on nodes of a TrainJob."""

    profile: ClusterProfile
    reader: Reader
    given: dict[str, list[Any]]

    def run(self, config: DistillConfig, num_nodes: int = 0) -> list[float]:
        """Run it to its end; the loss of every step."""
        trained = self._driver(num_nodes).run_task("distill", config.to_json(), self.given)
        manifest = json.loads(self.reader.read(f"{trained.artifacts['trained'][0]['uri']}/manifest.json"))
        (curve,) = [one["sha256"] for one in manifest["files"] if one["path"].endswith("training.jsonl")]
        lines = self.reader.read(f"{STORE}/objects/sha256/{curve[:2]}/{curve}").splitlines()
        rows = [json.loads(line) for line in lines]
        return [row["loss"] for row in rows if "loss" in row]

    def start(self, config: DistillConfig, num_nodes: int) -> None:
        """Run it up to an end that is not its own."""
        with suppress(AssertionError):
            self._driver(num_nodes).run_task("distill", config.to_json(), self.given)

    def _driver(self, num_nodes: int) -> PipelineDriver:
        profile = self.profile
        if num_nodes:
            template = yaml.safe_load((MANIFESTS / "jobs" / "trainjob.yaml").read_text())
            jobs = {"distill": {"template": template, "node": "cpu", "num_nodes": num_nodes}}
            profile = ClusterProfile.model_validate(profile.model_dump() | {"jobs": jobs})
        return PipelineDriver(compiled()["compress"], profile, {"version": code_version()}, self.reader)


def training_pod() -> str | None:
    """The node of a TrainJob that runs."""
    pods = get("pods", "-l", "jobset.sigs.k8s.io/jobset-name")["items"]
    return next((one["metadata"]["name"] for one in pods if one["status"]["phase"] == "Running"), None)


def failed(job: dict[str, Any]) -> bool:
    return any(one["type"] == "Failed" and one["status"] == "True" for one in job["status"].get("conditions", []))


def seconds_of_task(one: Finished, reader: Reader) -> dict[str, float]:
    """From the creation of its Job to its end, and what the stage took of that."""
    records = [f"{made['uri']}/record.json" for artifacts in one.artifacts.values() for made in artifacts]
    found = reader.run("sh", "-c", f"for one in {' '.join(records)}; do [ -f $one ] && cat $one && break; done")
    stage_s = json.loads(found)["duration_s"]
    return {"pod_s": one.pod_s, "stage_s": round(stage_s, 1), "overhead_s": round(one.pod_s - stage_s, 1)}


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
    record["tasks"] = {name: seconds_of_task(one, reader) for name, one in sorted(done.items())}
    owners = set(reader.run("find", STORE, "-user", "0", "-type", "f", "-newer", f"{STORE}/records").split())
    assert not owners, "root has put the inputs, and nothing since"


@pytest.fixture(scope="session")
def distillation(
    searched: tuple[PipelineDriver, dict[str, Finished]], traces: list[Any], profile: ClusterProfile, reader: Reader
) -> Distillation:
    _, done = searched
    child, parent = done["prune-model"].artifacts["child"], done["ingest"].artifacts["parent"]
    return Distillation(profile, reader, {"child": child, "parent": parent, "traces": traces})


@pytest.fixture(scope="session")
def undisturbed(distillation: Distillation, record: dict[str, Any]) -> list[float]:
    """The losses of one process in the task's own pod."""
    begun = time.monotonic()
    losses = distillation.run(DISTILL)
    record["distill_one_process_s"] = round(time.monotonic() - begun, 1)
    return losses


def test_distillation_over_two_pods_ends_like_one_process(
    distillation: Distillation, undisturbed: list[float], record: dict[str, Any]
) -> None:
    begun = time.monotonic()
    losses = distillation.run(DISTILL, num_nodes=2)
    record["distill_two_pods_s"] = round(time.monotonic() - begun, 1)
    (job,) = get("trainjobs")["items"]
    assert job["spec"]["trainer"]["numNodes"] == 2
    assert losses[:_SAME_STEPS] == pytest.approx(undisturbed[:_SAME_STEPS], rel=_SAME)
    assert losses == pytest.approx(undisturbed, rel=_ALIKE)
    assert losses[-1] < losses[0]


_KILLER = """
import os, signal, sys, time
from pathlib import Path
store, wanted, until = Path(sys.argv[1]), int(sys.argv[2]), time.monotonic() + 600
while not any(len(one.read_text().splitlines()) >= wanted for one in store.rglob("training.jsonl")):
    assert time.monotonic() < until
    time.sleep(0.01)
for one in Path("/proc").glob("[0-9]*"):
    words = (one / "cmdline").read_bytes().split(b"\\0")
    if b"nemo_automodel.cli.app" in words and b"torch.distributed.run" not in words:
        os.kill(int(one.name), signal.SIGKILL)
        print("killed")
"""


def test_training_that_is_killed_goes_on_from_its_checkpoint(
    distillation: Distillation, undisturbed: list[float], reader: Reader, record: dict[str, Any]
) -> None:
    config = DISTILL.but(checkpoint_every_steps=4)  # another stage run, and the same mathematics
    kubectl("delete", "trainjobs", "--all", "--wait")
    begun = time.monotonic()
    task = threading.Thread(target=distillation.start, args=(config,), kwargs={"num_nodes": 1}, daemon=True)
    task.start()
    pod = wait_until(training_pod, "the node runs")
    said = kubectl("exec", pod, "--", "python3", "-c", _KILLER, f"{STORE}/scratch", str(_KILLED_AT_ROW))
    assert said.split() == ["killed"]
    task.join(400)
    (job,) = get("trainjobs")["items"]
    wait_until(lambda: failed(get("job", "distill")), "the task has failed with its job")
    losses = distillation.run(config, num_nodes=1)
    record["distill_killed_and_resumed_s"] = round(time.monotonic() - begun, 1)
    assert losses == undisturbed
    names = [one["metadata"]["name"] for one in get("trainjobs")["items"]]
    assert names == [job["metadata"]["name"], job["metadata"]["name"].removesuffix("-1") + "-2"]
    second = kubectl("logs", "-l", f"jobset.sigs.k8s.io/jobset-name={names[1]}", "--tail=-1")
    assert second.count("Saving checkpoint") == 1, "that of step 4 was there"


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


@pytest.fixture
def pretended_gpu(small: None) -> Iterator[None]:
    """The node and the queue say that they have a GPU."""
    (node, *_) = kubectl("get", "nodes", "-o", "name").split()
    capacity = "/status/capacity/nvidia.com~1gpu"
    groups = get("clusterqueue", "moesaic")["spec"]["resourceGroups"]
    more = copy.deepcopy(groups)
    more[0]["coveredResources"].append("nvidia.com/gpu")
    more[0]["flavors"][0]["resources"].append({"name": "nvidia.com/gpu", "nominalQuota": "1"})
    change("clusterqueue/moesaic", {"op": "replace", "path": "/spec/resourceGroups", "value": more})
    change(node, {"op": "add", "path": capacity, "value": "1"}, "--subresource=status")
    yield
    change(node, {"op": "remove", "path": capacity}, "--subresource=status")
    change("clusterqueue/moesaic", {"op": "replace", "path": "/spec/resourceGroups", "value": groups})


def change(what: str, operation: dict[str, Any], *options: str) -> None:
    kubectl("patch", what, "--type=json", "-p", json.dumps([operation]), *options)


@needs_images("nemo-rl")
def test_a_rayjob_runs_nemo_rls_driver_up_to_where_it_needs_a_gpu(
    searched: tuple[PipelineDriver, dict[str, Finished]],
    traces: list[Any],
    pretended_gpu: None,
    profile: ClusterProfile,
    reader: Reader,
    record: dict[str, Any],
) -> None:
    _, done = searched
    template = yaml.safe_load((MANIFESTS / "jobs" / "rayjob.yaml").read_text())
    head = template["spec"]["rayClusterSpec"]["headGroupSpec"]
    head["rayStartParams"]["num-gpus"] = "0"  # Ray is told the truth
    head["template"]["spec"]["volumes"][2]["emptyDir"]["sizeLimit"] = "1Gi"
    nodes = profile.model_dump()["nodes"] | {
        "gpu": {"cpu": "500m", "memory": "1Gi", "memory_limit": "6Gi", "accelerators": 1}
    }
    jobs = {"reinforce": {"template": template, "node": "gpu", "num_nodes": 1}}
    values = profile.model_dump() | {"nodes": nodes, "jobs": jobs, "images": {"reinforce": image_of("nemo-rl")}}
    on_ray = ClusterProfile.model_validate(values | {"registry": None, "image": profile.image_for("ingest", "")})
    driver = PipelineDriver(compiled()["compress"], on_ray, {"version": code_version()}, reader)
    config = tiny().policies[0].but(engine="nemo_rl", steps=2, prompts_per_step=4, generations_per_prompt=2)
    given = {
        "model": done["prune-model"].artifacts["child"],
        "prompts": done["ingest"].artifacts["prompts"],
        "traces": traces,
    }
    begun = time.monotonic()
    with pytest.raises(AssertionError) as failed:
        driver.run_task("reinforce", config.to_json(), given)
    record["rayjob_up_to_its_gpu_s"] = round(time.monotonic() - begun, 1)
    said = str(failed.value)
    assert "1 of 1 nodes run" in said
    assert re.search(r"RayJob moesaic-reinforce-\w{12}-1 failed: ", said)
    assert "Not enough GPUs available. Requested 1 GPUs, but only 0 are available in the cluster." in said
