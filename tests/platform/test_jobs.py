"""Stages on nodes of their own: manifests, and the real Kubernetes client against an API on loopback."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("kubernetes_validate", reason="validates against Kubernetes' schemas: pip install '.[dev]'")

from moesaic.core.errors import ConfigError, StageError
from moesaic.core.nodes import Work
from moesaic.data.problems import Message, Problem
from moesaic.pipelines import compiled
from moesaic.platform.cluster import ClusterProfile, place, read_profile
from moesaic.platform.cluster.jobs import ClusterJob, JobSettings
from moesaic.platform.cluster.jobs.job_template import job_settings, render_job
from moesaic.platform.runs.run_context import RunContext
from moesaic.recover.reinforce import run as reinforce
from moesaic.recover.reinforce.nemo_rl import launch
from moesaic.recover.reinforce.stage import ReinforceConfig
from moesaic.stages import STAGES
from tests.manifests.validation import beyond_restricted, pod_specifications, problems

from .kubernetes_api import Fault, KubernetesApi, serve

MANIFESTS = Path(__file__).parents[2] / "manifests"
PROFILE: dict[str, Any] = {
    "queue": "moesaic",
    "image_pull_secrets": ["registry"],
    "environment": {"MOESAIC_STORE": "/store"},
    "secrets": [{"secret": "mlflow-user", "variables": {"MLFLOW_TRACKING_PASSWORD": "password"}}],
    "claims": [{"claim": "moesaic-store", "path": "/store"}],
    "default": "cpu",
    "nodes": {
        "cpu": {"cpu": 2, "memory": "4Gi"},
        "gpus": {
            "cpu": 80,
            "memory": "1Ti",
            "accelerators": 8,
            "selector": {"pool": "h100"},
            "tolerations": [{"key": "nvidia.com/gpu", "effect": "NoSchedule"}],
        },
    },
    "jobs": {
        stage: {"template": yaml.safe_load((MANIFESTS / "jobs" / file).read_text()), "node": "gpus", "num_nodes": 3}
        for stage, file in (("distill", "trainjob.yaml"), ("reinforce", "rayjob.yaml"))
    },
}
KEY = "0123456789abcdef" * 4
NAME = "moesaic-distill-0123456789ab-1"
NUM_STEPS = 12


def profile(**changes: Any) -> ClusterProfile:
    return ClusterProfile.model_validate(PROFILE | changes)


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesApi]:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    monkeypatch.setattr("moesaic.platform.cluster.jobs.api._FIRST_PAUSE_S", 0.01)
    yield from serve(tmp_path)


def job(place: Path, stage: str = "distill", **changes: Any) -> ClusterJob:
    """Looks at its job often; the claim is the test's own directory."""
    found = job_settings(profile(), stage, "moesaic/train:1")
    settings = {"shared": (str(place),), "poll_s": 0.01, "patience_s": 5.0} | changes
    return ClusterJob(found.model_copy(update=settings), KEY)


def follow(cluster_job: ClusterJob, log: Path, command: tuple[str, ...] = ("python3", "-m", "train")) -> list[str]:
    """Run it; the lines that were shown."""
    lines: list[str] = []
    cluster_job.run(Work(command, {"MLFLOW_RUN_ID": "abc"}, log), prepare=lambda: None, show=lines.append)
    return lines


def training(api: KubernetesApi) -> Iterator[None]:
    """The scenes of a TrainJob that waits in the queue, starts, prints and completes."""
    yield
    api.condition(NAME, "Suspended", True, message="TrainJob is suspended")
    api.set_workload(NAME, None)  # Kueue has made it, and has said nothing of it
    yield
    api.set_workload(NAME, "insufficient quota for cpu, 80 more needed")
    yield
    api.jobs[NAME]["spec"]["suspend"] = False
    api.condition(NAME, "Suspended", False, "Resumed")
    waiting = {"waiting": {"reason": "ImagePullBackOff", "message": "Back-off pulling image"}}
    pods = [api.set_pod(NAME, rank, "Pending", waiting if rank else None) for rank in range(3)]
    yield
    for rank in range(3):
        api.set_pod(NAME, rank, "Running")
    for number in range(NUM_STEPS):
        api.print(pods[0], f"step {number} \N{GREEK SMALL LETTER LAMDA}\r|#|")
        api.print(pods[1], "another node's")
        yield
    api.print(pods[0], "the last line")
    for rank in range(3):
        api.set_pod(NAME, rank, "Succeeded", {"terminated": {"exitCode": 0, "reason": "Completed"}})
    api.condition(NAME, "Complete", True)


STEPS = [*(f"step {number} \N{GREEK SMALL LETTER LAMDA}\r|#|" for number in range(NUM_STEPS)), "the last line"]


def test_a_job_waits_in_the_queue_starts_prints_and_completes(
    api: KubernetesApi, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    api.scenes = training(api)
    assert follow(job(tmp_path), tmp_path / "engine.log") == STEPS
    assert (tmp_path / "engine.log").read_bytes().decode().split("\n") == [*STEPS, ""]
    assert capsys.readouterr().err.splitlines() == [
        f"TrainJob {NAME} is created",
        f"TrainJob {NAME}: waits in the queue moesaic",
        f"TrainJob {NAME}: waits in the queue moesaic: insufficient quota for cpu, 80 more needed",
        f"TrainJob {NAME}: 0 of 3 nodes run; node 1 waits: ImagePullBackOff: Back-off pulling image; "
        "node 2 waits: ImagePullBackOff: Back-off pulling image",
        f"TrainJob {NAME}: 3 of 3 nodes run",
    ]
    trainer = api.jobs[NAME]["spec"]["trainer"]  # it is still there: nothing but time removes it
    assert [*trainer["command"], *trainer["args"]] == ["python3", "-m", "train"]
    assert {"name": "MLFLOW_RUN_ID", "value": "abc"} in trainer["env"]
    assert {one["name"] for one in trainer["env"]} >= {"LOGNAME", "USER"}, "a node's user may have no name"


@pytest.mark.parametrize(
    "fault",
    [
        Fault("GET", "trainjobs", 500, times=2),
        Fault("GET", "trainjobs", 410),
        Fault("POST", "trainjobs", 503),
        Fault("POST", "trainjobs", "lost"),
        Fault("GET", NAME, 410, times=3),
        Fault("GET", NAME, 429),
        Fault("GET", NAME, "cut", times=3),
        Fault("GET", "pods", 504),
        Fault("GET", "pods", "cut"),
        Fault("GET", "log", 500, times=2),
        Fault("GET", "log", "cut", times=2),
        Fault("GET", "log", 400),
    ],
    ids=lambda fault: f"{fault.method}-{fault.ending}-{fault.kind}",
)
def test_an_api_that_fails_for_a_while_costs_nothing(api: KubernetesApi, tmp_path: Path, fault: Fault) -> None:
    """A creation whose answer is lost is asked for again, and the 409 that comes is the job itself."""
    api.faults.append(fault)
    api.scenes = training(api)
    assert follow(job(tmp_path), tmp_path / "engine.log") == STEPS
    assert fault.times == 0
    assert list(api.jobs) == [NAME]
    assert len(api.created()) == 1 + (fault.kind == "lost") + (fault.kind == 503)


def test_an_api_that_is_gone_leaves_the_job_and_says_so(api: KubernetesApi, tmp_path: Path) -> None:
    api.scenes = training(api)
    api.faults.append(Fault("GET", NAME, "cut", times=10**6))
    with pytest.raises(StageError, match=r"has not answered for 0 s .*the stage goes on with it when it is started"):
        follow(job(tmp_path, patience_s=0.1), tmp_path / "engine.log")
    assert list(api.jobs) == [NAME]


@pytest.mark.parametrize(
    ("fault", "word"),
    [
        (Fault("POST", "trainjobs", 403), "refuses to create .*403 told to fail; see the role moesaic-pipeline"),
        (Fault("GET", "trainjobs", 404), "refuses to list"),
        (Fault("GET", NAME, 401), "refuses to get"),
    ],
)
def test_an_api_that_refuses_is_explained_at_once(api: KubernetesApi, tmp_path: Path, fault: Fault, word: str) -> None:
    api.faults.append(fault)
    with pytest.raises(StageError, match=word):
        follow(job(tmp_path), tmp_path / "engine.log")


def test_the_node_that_failed_first_is_named_with_its_last_lines(api: KubernetesApi, tmp_path: Path) -> None:
    def failing() -> Iterator[None]:
        yield
        pods = [api.set_pod(NAME, rank, "Running") for rank in range(3)]
        api.jobs[NAME]["spec"]["suspend"] = False
        api.print(pods[1], *(f"line {number}" for number in range(30)))
        yield
        ends = [(0, 1, "Error", "12:00:09"), (1, 137, "OOMKilled", "12:00:01"), (2, 1, "Error", "12:00:08")]
        for rank, code, reason, when in ends:
            finished = {"exitCode": code, "reason": reason, "finishedAt": f"2026-01-01T{when}Z"}
            api.set_pod(NAME, rank, "Failed", {"terminated": finished})
        api.condition(NAME, "Failed", True, "FailedJobs", "jobset failed due to one or more job failures")

    api.scenes = failing()
    with pytest.raises(StageError) as failure:
        follow(job(tmp_path), tmp_path / "engine.log")
    first, second, *lines = str(failure.value).splitlines()
    assert first == f"TrainJob {NAME} failed: FailedJobs: jobset failed due to one or more job failures"
    assert second == (
        f"node 1 (pod {NAME}-node-0-1-abcde on gpu-1) failed first: OOMKilled, exit code 137; its log ends with:"
    )
    assert lines == [f"  line {number}" for number in range(10, 30)]
    assert list(api.jobs) == [NAME]


def test_a_job_that_is_preempted_and_resumed_is_followed_into_its_new_pods(
    api: KubernetesApi, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def preempted() -> Iterator[None]:
        api.jobs[NAME]["spec"]["suspend"] = False
        api.print(api.set_pod(NAME, 0, "Running"), "step 1", "step 2")
        yield
        api.condition(NAME, "Suspended", True)
        api.pods.clear()
        yield
        api.condition(NAME, "Suspended", False)
        api.print(api.set_pod(NAME, 0, "Running", suffix="fghij"), "again from 1", "step 2")
        yield
        api.condition(NAME, "Complete", True)

    api.scenes = preempted()
    assert follow(job(tmp_path), tmp_path / "engine.log") == ["step 1", "step 2", "again from 1", "step 2"]
    reports = [line.partition(": ")[2] for line in capsys.readouterr().err.splitlines()[1:]]
    assert reports == ["1 of 3 nodes run", "waits in the queue moesaic", "1 of 3 nodes run"]


def test_an_evicted_node_gives_the_machines_reason(api: KubernetesApi, tmp_path: Path) -> None:
    def evicting() -> Iterator[None]:
        api.jobs[NAME]["spec"]["suspend"] = False
        pod = api.set_pod(NAME, 1, "Failed")
        api.pods[pod]["status"] = {"phase": "Failed", "reason": "Evicted", "message": "low on ephemeral-storage"}
        api.condition(NAME, "Failed", True, "FailedJobs")
        yield

    api.scenes = evicting()
    with pytest.raises(StageError, match="failed first: Evicted: low on ephemeral-storage"):
        follow(job(tmp_path), tmp_path / "engine.log")


def test_a_job_that_someone_deletes_is_missed(api: KubernetesApi, tmp_path: Path) -> None:
    def deleted() -> Iterator[None]:
        yield
        api.jobs.clear()
        yield

    api.scenes = deleted()
    with pytest.raises(StageError, match="was deleted by someone else"):
        follow(job(tmp_path), tmp_path / "engine.log")


def test_after_an_attempt_that_ended_comes_the_next(api: KubernetesApi, tmp_path: Path) -> None:
    second = f"{NAME[:-1]}2"
    api.scenes = (api.condition(NAME, "Failed", True) for _ in range(1))
    with pytest.raises(StageError, match=r"-1 failed: Failed$"):
        follow(job(tmp_path), tmp_path / "engine.log")
    api.scenes = (api.condition(second, "Complete", True) for _ in range(1))
    follow(job(tmp_path), tmp_path / "engine.log")
    assert list(api.jobs) == [NAME, second]


DRIVER = """
import json, sys
from pathlib import Path
from moesaic.core.nodes import Work
from moesaic.platform.cluster.jobs import ClusterJob, JobSettings
settings, key, folder = JobSettings.parse(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
def prepare():
    with (folder / "prepared").open("a") as file:
        file.write("once ")
ClusterJob(settings, key).run(Work(("python3",), {}, folder / "engine.log"), prepare=prepare, show=print)
"""


def start_driver(cluster_job: ClusterJob, folder: Path) -> "subprocess.Popen[str]":
    """A stage's process of its own, that can be told to end or killed."""
    arguments = [cluster_job.settings.to_variable(), cluster_job.key, str(folder)]
    return subprocess.Popen([sys.executable, "-c", DRIVER, *arguments], stderr=subprocess.PIPE, text=True)


def wait_until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def running(api: KubernetesApi) -> Iterator[None]:
    """A TrainJob that prints a line at each look, without an end."""
    api.jobs[NAME]["spec"]["suspend"] = False
    pod = api.set_pod(NAME, 0, "Running")
    while True:
        api.print(pod, f"line {len(api.logs.get(pod, []))}")
        yield


def test_a_driver_that_is_killed_and_started_again_follows_the_same_job(api: KubernetesApi, tmp_path: Path) -> None:
    api.scenes = running(api)
    log = tmp_path / "engine.log"
    driver = start_driver(job(tmp_path), tmp_path)
    wait_until(lambda: log.is_file() and "line 5\n" in log.read_text())
    driver.kill()
    driver.communicate()
    assert list(api.jobs) == [NAME]
    api.condition(NAME, "Suspended", False, "Resumed")
    threading.Timer(0.3, lambda: api.condition(NAME, "Complete", True)).start()
    prepared: list[None] = []
    lines: list[str] = []
    work = Work(("python3",), {}, log)
    job(tmp_path).run(work, prepare=lambda: prepared.append(None), show=lines.append)
    assert len(api.created()) == 1
    assert (tmp_path / "prepared").read_text() == "once " and not prepared
    assert lines == [f"line {number}" for number in range(len(lines))] == log.read_text().splitlines()


def test_a_driver_that_is_told_to_end_deletes_its_job(api: KubernetesApi, tmp_path: Path) -> None:
    api.scenes = running(api)
    driver = start_driver(job(tmp_path), tmp_path)
    wait_until(lambda: NAME in api.jobs and (tmp_path / "engine.log").is_file())
    driver.send_signal(signal.SIGTERM)
    _, errors = driver.communicate(timeout=60)
    assert driver.returncode == 1
    assert f"TrainJob {NAME} is deleted" in errors
    assert "the stage was told to end (SIGTERM)" in errors
    assert not api.jobs and "DELETE" in [method for method, *_ in api.requests]


def test_a_rayjob_runs_its_entrypoint_and_its_output_is_followed(api: KubernetesApi, tmp_path: Path) -> None:
    api.runs_commands = True
    code = "import sys; print('a \"b\" $HOME', flush=True); print('c', file=sys.stderr); sys.exit(int(sys.argv[1]))"
    command = (sys.executable, "-c", code)
    lines = follow(job(tmp_path, "reinforce"), tmp_path / "nemo_rl.log", (*command, "0"))
    assert lines == ['a "b" $HOME', "c"]
    api.jobs.clear()
    api.processes.clear()
    with pytest.raises(StageError, match=r"RayJob moesaic-reinforce-0123456789ab-1 failed: FAILED\n.*ends with:\n  a "):
        follow(job(tmp_path, "reinforce"), tmp_path / "nemo_rl.log", (*command, "3"))


def test_nemo_rl_is_driven_on_all_nodes_of_a_rayjob(
    api: KubernetesApi, tiny_parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The entrypoint is really run and says what is missing here; nothing is written while a job of it still runs."""
    questions = [
        (Problem(f"p{number}", "copy", (Message("user", "w1"),), "w3", "exact_match"), "low") for number in (1, 2)
    ]
    config = ReinforceConfig(engine="nemo_rl", efforts=("low",), steps=2, prompts_per_step=2, max_new_tokens=16)
    config = config.model_copy(update={"generations_per_prompt": 12, "replies_per_forward": 1})
    monkeypatch.setattr(launch, "_nemo_rl_root", lambda: tmp_path)
    api.runs_commands = True
    train = partial(
        launch.train, config, tiny_parent, questions, {("copy", "low"): 10.0}, tmp_path, job(tmp_path, "reinforce")
    )
    with pytest.raises(
        StageError, match=r"(?s)RayJob moesaic-reinforce-0123456789ab-1 failed: .*No module named 'nemo_"
    ):
        train()
    written = tmp_path / "nemo_rl.yaml"
    assert yaml.safe_load(written.read_text())["cluster"] == {"num_nodes": 3, "gpus_per_node": 8}
    (started,) = api.jobs.values()
    assert f"-m moesaic.recover.reinforce.nemo_rl.driver {written} " in started["spec"]["entrypoint"]
    written.unlink()
    api.processes.clear()
    started["status"] = {"jobStatus": "RUNNING", "jobDeploymentStatus": "Running"}
    api.scenes = iter(lambda: started.update(status={"jobStatus": "STOPPED", "message": "stopped"}), 1)
    with pytest.raises(StageError, match="-1 failed: STOPPED: stopped"):
        train()
    assert not written.exists() and list(api.jobs) == ["moesaic-reinforce-0123456789ab-1"]


def test_an_engine_of_one_process_gets_no_nodes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"engine 'trl' trains in one process.*leave reinforce out"):
        reinforce._train(ReinforceConfig(engine="trl"), tmp_path, [], {}, tmp_path, job(tmp_path, "reinforce"))


def test_what_nodes_do_not_see_is_copied_for_them_or_refused(tmp_path: Path) -> None:
    shared, own = tmp_path / "store", tmp_path / "own"
    for directory in (shared / "scratch", own):
        directory.mkdir(parents=True)
    (own / "traces.jsonl").write_text("{}\n")
    cluster_job = job(shared)
    assert cluster_job.visible("traces", shared / "traces", shared / "scratch") == shared / "traces"
    copied = cluster_job.visible("traces", own, shared / "scratch")
    assert copied == shared / "scratch" / "inputs" / "traces"
    assert (copied / "traces.jsonl").read_text() == "{}\n"
    assert cluster_job.visible("traces", own, shared / "scratch") == copied
    with pytest.raises(ConfigError, match=r"only what lies below .*let MOESAIC_STORE or"):
        cluster_job.visible("traces", own, own)


@pytest.mark.parametrize("stage", ["distill", "reinforce"])
@pytest.mark.parametrize("num_nodes", [1, 3])
@pytest.mark.parametrize("queue", ["moesaic", None])
def test_filled_jobs_are_valid_and_as_tight_as_their_templates(stage: str, num_nodes: int, queue: str | None) -> None:
    jobs = {name: one | {"num_nodes": num_nodes} for name, one in PROFILE["jobs"].items()}
    found = job_settings(profile(jobs=jobs, queue=queue), stage, "registry/moesaic/image:1")
    named = render_job(found, "a-name", "a-task", ["python3", "a b"], {"MOESAIC_STORE": "/other"}, Path("/store/log"))
    assert problems(named) == []
    assert [wrong for pod in pod_specifications(named) for wrong in beyond_restricted(pod)] == []
    assert named["spec"]["suspend"] is (queue is not None)
    labels = named["metadata"]["labels"]
    assert labels["moesaic/stage"] == stage and labels["moesaic/job"] == "a-task"
    assert labels.get("kueue.x-k8s.io/queue-name") == queue
    text = json.dumps(named)
    assert text.count('"registry/moesaic/image:1"') == (2 if stage == "reinforce" and num_nodes == 3 else 1)
    assert '"secretKeyRef": {"name": "mlflow-user", "key": "password"' in text
    assert '"value": "/other"' in text and '"/store"}' not in text.replace('"mountPath": "/store"}', "")


@pytest.mark.parametrize("stage", ["distill", "reinforce"])
def test_all_nodes_of_a_job_mount_the_sites_certificates(stage: str) -> None:
    """Besides the template's own volumes; variables of a TrainJob's node go by its trainer alone."""
    given = {
        "authorities": {"config_map": "authorities", "key": "ca.pem"},
        "client": {"secret": "client", "key": "c.pem"},
    }
    plain, found = (job_settings(profile(**more), stage, "i:1").template for more in ({}, {"certificates": given}))
    named = render_job(job_settings(profile(certificates=given), stage, "i:1"), "n", "t", ["a"], {}, Path("/store/log"))
    assert problems(named) == []
    spec = found["spec"]
    if stage == "distill":
        (nodes,) = spec["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
        pods, variables, before = [nodes["template"]["spec"]["template"]["spec"]], spec["trainer"]["env"], 0
    else:
        cluster = spec["rayClusterSpec"]
        pods = [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
        before = len(plain["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["volumes"])
        variables = pods[1]["containers"][0]["env"]
    for pod in pods:
        assert pod["volumes"][before:] == [
            {"name": "authorities", "configMap": {"name": "authorities"}},
            {"name": "client", "secret": {"secretName": "client"}},
        ]
        mounts = pod["containers"][0]["volumeMounts"][-2:]
        assert [mount["mountPath"] for mount in mounts] == ["/etc/moesaic/authorities", "/etc/moesaic/client"]
        assert len(pod["volumes"]) == before + 2
    assert {"name": "SSL_CLIENT_CERT", "value": "/etc/moesaic/client/c.pem"} in variables


def test_all_nodes_of_a_job_are_counted_and_placed() -> None:
    trainjob, rayjob = (job_settings(profile(), stage, "i:1").template["spec"] for stage in ("distill", "reinforce"))
    trainer = trainjob["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (3, 8)
    assert trainer["resourcesPerNode"]["limits"] == {"memory": "1Ti", "nvidia.com/gpu": "8"}
    (patch,) = trainjob["runtimePatches"]
    (nodes,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    placed = nodes["template"]["spec"]["template"]["spec"]
    assert placed["nodeSelector"] == {"pool": "h100"} and placed["imagePullSecrets"] == [{"name": "registry"}]
    groups = rayjob["rayClusterSpec"]
    assert groups["workerGroupSpecs"][0]["replicas"] == 2  # and the head
    for group in (groups["headGroupSpec"], *groups["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert {name: pod[name] for name in placed} == placed
        assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "8"


def test_a_task_finds_its_job_in_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """And only a stage that has one."""
    pipeline, _ = place(yaml.safe_load(compiled()["compress"].read_text()), profile(), STAGES)
    found = {}
    for executor in pipeline["deploymentSpec"]["executors"].values():
        container = executor["container"]
        variables = {one["name"]: one["value"] for one in container["env"]}
        stage = container["args"][container["args"].index("--function_to_execute") + 1]
        if "MOESAIC_JOB" in variables:
            found[stage] = variables
            image = container["image"]
            assert "$" not in variables["MOESAIC_JOB"]
            asked = container["resources"]
            assert (asked["resourceCpuRequest"], asked["resourceMemoryRequest"]) == ("50m", "256Mi"), "it only waits"
            assert asked["resourceMemoryLimit"] == "4Gi" and "accelerator" not in asked
            assert JobSettings.parse(variables["MOESAIC_JOB"]) == job_settings(profile(), stage, image)
    assert set(found) == {"distill", "reinforce"}
    for name, value in found["distill"].items():
        monkeypatch.setenv(name, value)
    read = RunContext.from_environment()
    assert read.job and read.job.kind == "TrainJob"
    assert read.as_environment()["MOESAIC_JOB"] == found["distill"]["MOESAIC_JOB"]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"jobs": {"evaluate": PROFILE["jobs"]["distill"]}}, "evaluate cannot run as a TrainJob"),
        ({"jobs": {"distill": PROFILE["jobs"]["reinforce"]}}, "distill cannot run as a RayJob"),
        ({"jobs": {"distill": PROFILE["jobs"]["distill"] | {"node": "tpu"}}}, "tpu"),
        ({"jobs": {"distill": PROFILE["jobs"]["distill"] | {"num_nodes": 0}}}, "num_nodes"),
        ({"claims": []}, "must be a directory of one of `claims`"),
        ({"environment": {"MOESAIC_STORE": "s3://bucket/store"}}, "MOESAIC_CACHE"),
        ({"jobs": {"distill": PROFILE["jobs"]["distill"] | {"template": "job.yaml"}}}, "no template of a job"),
    ],
)
def test_a_job_that_cannot_run_is_refused_with_the_profile(changes: dict[str, Any], word: str, tmp_path: Path) -> None:
    (tmp_path / "profile.yaml").write_text(yaml.safe_dump(PROFILE | changes))
    with pytest.raises(ConfigError, match=word):
        read_profile(tmp_path / "profile.yaml")


def test_without_an_api_server_a_job_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match="a job needs a Kubernetes API server"):
        follow(job(tmp_path), tmp_path / "engine.log")
