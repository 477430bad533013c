import hashlib
import json
import random
import sys
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

import psutil
import pytest
import torch
import yaml

pytest.importorskip("kubernetes_validate", reason="validates against Kubernetes' schemas: pip install '.[dev]'")

from moesaic.core.errors import ArtifactError, ConfigError, StageError
from moesaic.core.process_group import NUM_PROCESSES
from moesaic.core.training_curve import read_curve
from moesaic.models import layout
from moesaic.models.architecture import Architecture, Block
from moesaic.models.checkpoint import Checkpoint, layer_shards, read_recovery, write_checkpoint
from moesaic.platform.cluster.jobs import ClusterJob, JobSettings
from moesaic.platform.runs.runtime import perform, plan_stage
from moesaic.recover.distill import run as distill
from moesaic.recover.distill.automodel import launch
from moesaic.recover.distill.stage import DistillConfig
from moesaic.recover.generate_traces.traces import Trace
from moesaic.recover.training import OptimizerConfig
from moesaic.search.prune_model.pruning import prune_layer
from tests.platform.kubernetes_api import KubernetesApi, serve
from tests.recover.forked_engine import fork_engine

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

CONFIG = DistillConfig(
    sequence_tokens=48,
    rows_per_step=4,
    rows_per_forward=1,
    steps=6,
    optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=1),
    evaluate_every_steps=4,
    checkpoint_every_steps=2,
    precision="float32",
)
CHILD = Architecture.of([Block(4, 2, 64, 8), Block(8, 2, 64, 16), Block(4, 2, 64, 8), Block(6, 2, 64, None)])


@pytest.fixture(scope="module")
def child(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny parent without the last experts of three layers, one layer windowed."""
    directory = tmp_path_factory.mktemp("models") / "child"
    shards = [
        ("model-outer", {name: tiny_checkpoint.tensor(name) for name in layout.outer_specs(tiny_checkpoint.shape)})
    ]
    for layer, block in enumerate(CHILD.blocks):
        tensors = {name: tiny_checkpoint.tensor(name) for name in tiny_checkpoint.layer_names(layer)}
        shards.extend(layer_shards(layer, prune_layer(tensors, list(range(block.num_experts)))))
    extra = [tiny_checkpoint.directory / "tokenizer.json"]
    write_checkpoint(directory, layout.child_config(tiny_checkpoint.config, CHILD), shards, extra)
    return directory


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty traces that count round a circle, a quarter of them held out: what is learned on one holds for another."""
    draw = random.Random(0)
    lines = [
        Trace(
            id=f"p{number}",
            task="task",
            effort=("low", "medium", "high")[number % 3],
            prompt_ids=(number % 8,),
            reply_ids=tuple((number + step) % 8 for step in range(1, draw.randrange(8, 20))),
            correct=True,
            truncated=False,
            held_out=number % 4 == 0,
        ).to_json()
        for number in range(40)
    ]
    directory = tmp_path_factory.mktemp("traces")
    (directory / "traces.jsonl").write_text("\n".join(lines) + "\n")
    return directory


def distilled(config: DistillConfig, child: Path, parent: Path, traces: Path, place: Path) -> dict[str, float]:
    for name in ("output", "scratch"):
        (place / name).mkdir(parents=True, exist_ok=True)
    return distill.run(
        config, child=child, parent=parent, traces=traces, output=place / "output", scratch=place / "scratch"
    )


@pytest.fixture(scope="module")
def trained(
    child: Path, tiny_parent: Path, traces: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, float]]:
    """The child after an undisturbed run in one process, and the run's metrics."""
    place = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        fork_engine(patch)
        return place / "output", distilled(CONFIG, child, tiny_parent, traces, place)


def assert_same_row(found: dict[str, float], expected: dict[str, float]) -> None:
    """Sums of float32 in another order, through a few steps of AdamW; a share of tokens may lose one at a near tie."""
    shares = {name for name in expected if "top1" in name}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        tolerance = {"abs": 0.01} if name in shares else {"rel": 1e-3}
        assert found[name] == pytest.approx(value, **tolerance), name


def test_training_brings_the_child_closer_to_its_parent(trained: tuple[Path, dict[str, float]]) -> None:
    output, metrics = trained
    assert metrics["held_out_loss"] < 0.9 * metrics["held_out_loss_before"]
    assert metrics["held_out_kl"] < metrics["held_out_kl_before"]
    curve = read_curve(output / "training.jsonl")
    assert [row["step"] for row in curve] == [0, 1, 2, 3, 4, 4, 5, 6, 6]
    assert metrics["loss"] == curve[-2]["loss"]
    assert curve[-2]["learning_rate"] == pytest.approx(2e-4)
    assert metrics["training_traces_left_out"] == 0


def test_experts_and_router_stay_as_they_were_byte_for_byte(
    trained: tuple[Path, dict[str, float]], child: Path
) -> None:
    before, after = Checkpoint.open(child), Checkpoint.open(trained[0])
    learning = set(layout.trainable_names(before.shape, before.architecture, CONFIG.trainable))
    changed = {name for name in before.files if not torch.equal(before.tensor(name), after.tensor(name))}
    assert changed <= learning
    assert layout.HEAD in changed and layout.EMBEDDING in changed
    assert {name for name in changed if "self_attn" in name} and {name for name in changed if "layernorm" in name}
    for layer in range(CHILD.num_layers):
        file = f"model-layer-{layer:03d}-experts.safetensors"
        digests = [hashlib.sha256((place / file).read_bytes()).hexdigest() for place in (child, trained[0])]
        assert digests[0] == digests[1]
    assert read_recovery(trained[0]) == [{"stage": "distill", "steps": 6}]
    assert (trained[0] / "tokenizer.json").read_bytes() == (child / "tokenizer.json").read_bytes()


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesApi]:
    """A Kubernetes API whose nodes are processes of this machine."""
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    for api in serve(tmp_path):
        api.runs_commands = True
        yield api


def two_nodes(shared: Path) -> ClusterJob:
    """A TrainJob of two nodes without GPUs that see a test's directory."""
    template = yaml.safe_load((Path(__file__).parents[2] / "manifests" / "jobs" / "trainjob.yaml").read_text())
    template["spec"]["trainer"] |= {"numNodes": 2, "numProcPerNode": 1, "env": []}
    settings = JobSettings(template=template, num_nodes=2, gpus_per_node=0, shared=(str(shared),), poll_s=0.2)
    return ClusterJob(settings, key="0123456789abcdef" * 4)


@pytest.mark.timeout(900)  # processes import AutoModel four times, which a busy machine takes minutes for
def test_a_run_killed_on_two_ranks_goes_on_as_a_job_of_two_nodes_and_ends_like_one_process(
    trained: tuple[Path, dict[str, float]],
    child: Path,
    tiny_parent: Path,
    traces: Path,
    tmp_path: Path,
    api: KubernetesApi,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The job's own command, once for each node, meets by the variables that Kubeflow Trainer sets."""
    output, scratch = tmp_path / "output", tmp_path / "scratch"
    output.mkdir()
    scratch.mkdir()
    with monkeypatch.context() as two_ranks:
        two_ranks.setenv(NUM_PROCESSES, "2")
        kill_in_mid_training(child, tiny_parent, traces, output, scratch)
    places = {"output": output, "scratch": scratch, "nodes": two_nodes(tmp_path)}
    metrics = distill.run(CONFIG, child=child, parent=tiny_parent, traces=traces, **places)
    assert_same_row(metrics, trained[1])
    for resumed, undisturbed in zip(
        read_curve(output / "training.jsonl"), read_curve(trained[0] / "training.jsonl"), strict=True
    ):
        assert_same_row(resumed, undisturbed)
    (job,) = api.jobs.values()
    assert "--standalone" not in job["spec"]["trainer"]["args"]
    assert len(api.processes) == 2
    errors = capfd.readouterr().err
    assert "2 of 2 nodes run" in errors and "distill: step 6/6" in errors
    log = (scratch / "engine.log").read_text()
    assert "Loading checkpoint" in log and "step 6" in log


def kill_in_mid_training(child: Path, parent: Path, traces: Path, output: Path, scratch: Path) -> None:
    """Run the stage in a fork, kill this process and nothing else: the engine must notice by itself."""
    curve = scratch / "training.jsonl"
    places = {"child": child, "parent": parent, "traces": traces, "output": output, "scratch": scratch}
    stage = get_context("fork").Process(target=distill.run, args=(CONFIG,), kwargs=places)
    stage.start()
    while stage.is_alive() and max((row["step"] for row in read_curve(curve)), default=0) < 3:
        time.sleep(0.02)
    tree = psutil.Process(stage.pid).children(recursive=True)
    stage.kill()
    stage.join()
    assert len(tree) >= 3
    _, alive = psutil.wait_procs(tree, timeout=60)
    assert not alive
    assert 3 <= max(row["step"] for row in read_curve(curve)) < 6


def test_a_job_that_diverges_ends_with_advice_and_the_node(
    child: Path, tiny_parent: Path, traces: Path, tmp_path: Path, api: KubernetesApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its nodes leave the file that the engine leaves in ``test_a_run_that_diverges_ends_with_advice``."""
    leave = "import sys; open(sys.argv[1], 'w').write('lower the rate'); sys.exit(1)"
    monkeypatch.setattr(launch, "command", lambda job, _: [sys.executable, "-c", leave, str(job.failure)])
    for name in ("output", "scratch"):
        (tmp_path / name).mkdir()
    places = {"output": tmp_path / "output", "scratch": tmp_path / "scratch", "nodes": two_nodes(tmp_path)}
    with pytest.raises(StageError, match=r"(?s)^lower the rate\nTrainJob .* failed first: Error, exit code 1"):
        distill.run(CONFIG, child=child, parent=tiny_parent, traces=traces, **places)


@pytest.mark.parametrize("where", ["here", "job"])
def test_an_engine_that_aborts_at_its_exit_has_done_its_work(
    where: str,
    trained: tuple[Path, dict[str, float]],
    child: Path,
    tiny_parent: Path,
    traces: Path,
    tmp_path: Path,
    api: KubernetesApi,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    hand_over = "import os, shutil, sys; shutil.copy(*sys.argv[1:]); os.abort()"
    tensors = str(trained[0].with_name("scratch") / "trained.safetensors")
    monkeypatch.setattr(launch, "command", lambda job, _: [sys.executable, "-c", hand_over, tensors, str(job.trained)])
    for name in ("output", "scratch"):
        (tmp_path / name).mkdir()
    places = {"output": tmp_path / "output", "scratch": tmp_path / "scratch"}
    nodes = two_nodes(tmp_path) if where == "job" else None
    distill.run(CONFIG, child=child, parent=tiny_parent, traces=traces, nodes=nodes, **places)
    for shard in trained[0].glob("*.safetensors"):
        assert (tmp_path / "output" / shard.name).read_bytes() == shard.read_bytes()
    assert "the tensors are trained, but the engine failed when it ended" in capfd.readouterr().err


def test_the_runtime_hands_a_tasks_nodes_on(child: Path, tiny_parent: Path, traces: Path, tmp_path: Path) -> None:
    """Here they see nothing of the scratch."""
    given = {"child": child, "parent": tiny_parent, "traces": traces}
    run = plan_stage("distill", CONFIG.to_json(), given, None)
    with pytest.raises(ConfigError, match=r"the nodes of a job do not see .*scratch, only what lies below"):
        perform(run, tmp_path / "output", tmp_path / "scratch", job=two_nodes(tmp_path / "elsewhere").settings)


def test_a_run_that_diverges_ends_with_advice(
    child: Path, tiny_parent: Path, traces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork_engine(monkeypatch)
    steep = CONFIG.model_copy(update={"steps": 12, "optimizer": OptimizerConfig(learning_rate=3.0, warmup_steps=0)})
    with pytest.raises(StageError, match="lower optimizer"):
        distilled(steep, child, tiny_parent, traces, tmp_path)
    assert not list((tmp_path / "output").iterdir())


def test_no_steps_hand_the_child_on_as_it_is(child: Path, tiny_parent: Path, traces: Path, tmp_path: Path) -> None:
    distilled(CONFIG.model_copy(update={"steps": 0}), child, tiny_parent, traces, tmp_path)
    before, after = Checkpoint.open(child), Checkpoint.open(tmp_path / "output")
    assert all(torch.equal(before.tensor(name), after.tensor(name)) for name in before.files)


def refused(reason: type[Exception], match: str, config: DistillConfig, *models: Path, place: Path) -> None:
    with pytest.raises(reason, match=match):
        distilled(config, *models, place)
    assert not list((place / "scratch").glob("*.yaml"))


def test_what_cannot_be_trained_on_is_refused_before_the_engine_starts(
    child: Path, tiny_parent: Path, traces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [json.loads(line) for line in (traces / "traces.jsonl").read_text().splitlines()]
    for name, kept in (("trained", False), ("held_out", True)):
        (tmp_path / name).mkdir()
        lines = [json.dumps(row) + "\n" for row in rows if row["held_out"] == kept]
        (tmp_path / name / "traces.jsonl").write_text("".join(lines))
    models = (child, tiny_parent)
    refused(ArtifactError, "is a held-out one", CONFIG, *models, tmp_path / "trained", place=tmp_path)
    refused(ArtifactError, "is a training one", CONFIG, *models, tmp_path / "held_out", place=tmp_path)
    short = CONFIG.model_copy(update={"sequence_tokens": 4})
    refused(ArtifactError, "none of the .* traces fits", short, *models, traces, place=tmp_path)
    refused(ConfigError, "cannot be cut out of", CONFIG, tiny_parent, child, traces, place=tmp_path)
    odd = CONFIG.model_copy(update={"rows_per_forward": 3})
    refused(ConfigError, "rows_per_step 4 is not a multiple", odd, *models, traces, place=tmp_path)
    monkeypatch.setenv(NUM_PROCESSES, "two")
    refused(ConfigError, "MOESAIC_NUM_PROCESSES is 'two'", CONFIG, *models, traces, place=tmp_path)


def test_traces_of_another_vocabulary_or_without_an_effort_are_refused(
    child: Path, tiny_parent: Path, tmp_path: Path
) -> None:
    def write(effort: str, token: int) -> Path:
        lines = [
            Trace(f"p{held_out}", "task", effort, (1,), (token,), True, False, held_out).to_json() + "\n"
            for held_out in (True, False)
        ]
        path = tmp_path / "other.jsonl"
        path.write_text("".join(lines))
        return path

    low = CONFIG.model_copy(update={"efforts": ("low",)})
    refused(ArtifactError, "token 64, the models only 64", low, child, tiny_parent, write("low", 64), place=tmp_path)
    refused(ArtifactError, "no traces at high effort", CONFIG, child, tiny_parent, write("low", 2), place=tmp_path)
