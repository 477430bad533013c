"""Jobs that go wrong on a real cluster: each is told for what it is, and nothing is left behind."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from moesaic.core.errors import StageError
from moesaic.core.nodes import Work
from moesaic.platform.cluster import ClusterProfile
from moesaic.platform.cluster.jobs import ClusterJob
from moesaic.platform.cluster.jobs.job_template import job_settings
from tests.cluster.conftest import MANIFESTS
from tests.cluster.pods import NAMESPACE, get, kubectl, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

STOP, START = os.environ.get("MOESAIC_CLUSTER_STOP_API"), os.environ.get("MOESAIC_CLUSTER_START_API")
"""Commands that stop the API server and start it again, for the test that needs them."""
FORGET_S = 60
_SCRIPT = """
import sys
from pathlib import Path
from moesaic.core.nodes import Work
from moesaic.platform.cluster.jobs import ClusterJob, JobSettings
settings, key, command, log = sys.argv[1:]
work = Work(["sh", "-c", command], {}, Path(log))
ClusterJob(JobSettings.parse(settings), key).run(work, prepare=lambda: None, show=print)
"""


@pytest.fixture(autouse=True)
def no_jobs(small: None) -> Iterator[None]:
    yield
    kubectl("delete", "trainjobs", "--all", "--wait", "--timeout=200s")


def job(profile: ClusterProfile, key: str, patch: Any = None, num_nodes: int = 1, **node: Any) -> ClusterJob:
    """A TrainJob of the small cluster whose nodes run anything; ``patch`` changes its template."""
    template = yaml.safe_load((MANIFESTS / "jobs" / "trainjob.yaml").read_text())
    if patch:
        patch(template)
    kind = {"cpu": "100m", "memory": "128Mi", "memory_limit": "256Mi"} | node
    mine = ClusterProfile.model_validate(
        profile.model_dump()
        | {
            "nodes": {"cpu": kind},
            "jobs": {"distill": {"template": template, "node": "cpu", "num_nodes": num_nodes}},
        }
    )
    settings = job_settings(mine, "distill", mine.image_for("distill", ""))
    return ClusterJob(settings.model_copy(update={"poll_s": 1.0}), key * 64)


def run(one: ClusterJob, command: str, log: Path) -> list[str]:
    """Run a command of the shell on the nodes; the lines that were shown."""
    lines: list[str] = []
    one.run(Work(["sh", "-c", command], {}, log / "log"), prepare=lambda: None, show=lines.append)
    return lines


@contextmanager
def meanwhile(action: Callable[[], object]) -> Iterator[None]:
    """Do something in a thread while the block runs."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join(600)


@contextmanager
def follower(one: ClusterJob, command: str, directory: Path) -> "Iterator[subprocess.Popen[str]]":
    """A process that starts a job and follows it."""
    directory.mkdir(exist_ok=True)
    words = [sys.executable, "-c", _SCRIPT, one.settings.to_json(), one.key, command, str(directory / "log")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.terminate()


def running_pods() -> list[str]:
    return [pod["metadata"]["name"] for pod in pods() if pod["status"]["phase"] == "Running"]


def unplaced_pods() -> list[str]:
    """Those that the scheduler has looked at and found no node for."""
    return [
        pod["metadata"]["name"]
        for pod in pods()
        if any(
            one["type"] == "PodScheduled" and one["status"] == "False" for one in pod["status"].get("conditions", [])
        )
    ]


def pods() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = get("pods", "-l", "jobset.sigs.k8s.io/jobset-name")["items"]
    return found


def test_a_job_of_two_pods_waits_for_its_turn_and_ends(profile: ClusterProfile, tmp_path: Path, capfd: Any) -> None:
    assert run(job(profile, "a", num_nodes=2), "echo from $PET_NODE_RANK of $PET_NNODES", tmp_path) == ["from 0 of 2"]
    said = capfd.readouterr().err
    assert "waits in the queue moesaic" in said


def delete(pod: str) -> None:
    kubectl("delete", "pod", pod, "--grace-period=0", "--force")


def evict(pod: str) -> None:
    """As a node that is drained does."""
    path = f"/api/v1/namespaces/{NAMESPACE}/pods/{pod}/eviction"
    metadata = {"name": pod, "namespace": NAMESPACE}
    asked = {"kind": "Eviction", "metadata": metadata, "deleteOptions": {"gracePeriodSeconds": 1}}
    kubectl("create", "--raw", path, "-f", "-", given=json.dumps({"apiVersion": "policy/v1", **asked}))


@pytest.mark.parametrize(("key", "end"), [("b", delete), ("7", evict)])
def test_a_pod_that_is_taken_away_fails_the_job(
    profile: ClusterProfile, tmp_path: Path, key: str, end: Callable[[str], None]
) -> None:
    def take_away() -> None:
        (name,) = wait_until(running_pods, "the node runs")
        end(name)

    with meanwhile(take_away), pytest.raises(StageError, match=f"TrainJob moesaic-distill-{key * 12}-1 failed: "):
        run(job(profile, key), "sleep 300", tmp_path)


def test_a_node_that_takes_no_pods_is_told_until_it_does(profile: ClusterProfile, tmp_path: Path, capfd: Any) -> None:
    nodes = kubectl("get", "nodes", "-o", "name").split()

    def allow_later() -> None:
        wait_until(unplaced_pods, "the node's pod waits")
        time.sleep(3)
        kubectl("uncordon", *nodes)

    kubectl("cordon", *nodes)
    try:
        with meanwhile(allow_later):
            assert run(job(profile, "6"), "echo ended", tmp_path) == ["ended"]
    finally:
        kubectl("uncordon", *nodes)
    assert re.search(r"node 0 waits: Unschedulable: 0/\d+ nodes are available: .*unschedulable", capfd.readouterr().err)


def test_a_job_that_finds_the_quota_taken_waits_and_is_admitted(
    profile: ClusterProfile, tmp_path: Path, capfd: Any
) -> None:
    first, second = (
        job(profile, "1", memory="7Gi", memory_limit="7Gi"),
        job(profile, "2", memory="7Gi", memory_limit="7Gi"),
    )
    with follower(first, "sleep 25", tmp_path / "first") as other:
        wait_until(running_pods, "the first job runs")
        assert run(second, "echo ended", tmp_path) == ["ended"]
        assert other.wait(200) == 0
    said = capfd.readouterr().err
    assert re.search(r"waits in the queue moesaic: .*insufficient unused quota for memory.*more needed", said)


def test_two_that_start_the_same_job_follow_one(profile: ClusterProfile, tmp_path: Path) -> None:
    same = job(profile, "3")
    with (
        follower(same, "echo once; sleep 15", tmp_path / "a") as one,
        follower(same, "echo once; sleep 15", tmp_path / "b") as other,
    ):
        said = [process.communicate(timeout=400) for process in (one, other)]
    assert [one.returncode, other.returncode] == [0, 0], said
    assert [lines for lines, _ in said] == ["once\n", "once\n"]
    assert len(get("trainjobs")["items"]) == 1


def test_a_pod_that_takes_too_much_memory_is_told_as_such(profile: ClusterProfile, tmp_path: Path) -> None:
    command = "echo begun; exec python3 -c 'x = bytearray(2**30); print(len(x))'"
    with pytest.raises(StageError, match=r"(?s)node 0 .* failed first: .*(OOMKilled|137)"):
        run(job(profile, "c"), command, tmp_path)


def test_an_image_that_cannot_be_pulled_is_told_while_the_job_waits(
    profile: ClusterProfile, tmp_path: Path, capfd: Any
) -> None:
    one = job(profile.but(image="localhost:5000/moesaic/cpu:none"), "d")
    stop_when(one, tmp_path, "node 0 waits: (ErrImagePull|ImagePullBackOff)")


def test_a_claim_that_cannot_be_bound_is_told_while_the_job_waits(profile: ClusterProfile, tmp_path: Path) -> None:
    def patch(template: Any) -> None:
        lost = {"name": "lost", "persistentVolumeClaim": {"claimName": "lost"}}
        nodes = {"name": "node", "template": {"spec": {"template": {"spec": {"volumes": [lost]}}}}}
        spec = {"template": {"spec": {"replicatedJobs": [nodes]}}}
        template["spec"]["runtimePatches"] = [{"manager": "test/lost", "trainingRuntimeSpec": spec}]

    kubectl("apply", "-f", "-", given=yaml.safe_dump(LOST))
    stop_when(job(profile, "e", patch), tmp_path, "node 0 waits: Unschedulable: .*(unbound|not found)")
    kubectl("delete", "pvc", "lost")


LOST = {
    "apiVersion": "v1",
    "kind": "PersistentVolumeClaim",
    "metadata": {"name": "lost"},
    "spec": {
        "accessModes": ["ReadWriteOnce"],
        "storageClassName": "no-such-class",
        "resources": {"requests": {"storage": "1Gi"}},
    },
}


def test_a_quota_that_is_too_small_is_told_with_its_numbers(
    profile: ClusterProfile, tmp_path: Path, record: dict[str, Any]
) -> None:
    said, begun = r"waits in the queue moesaic: .*\(100\) > maximum capacity \(2\)", time.monotonic()
    stop_when(job(profile, "f", cpu=100), tmp_path, said)
    record["quota_told_s"] = round(time.monotonic() - begun, 1)


def stop_when(one: ClusterJob, directory: Path, said: str) -> None:
    """Follow a job in a process until it says this, then tell the process to end: the job must be deleted."""
    with follower(one, "sleep 600", directory) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if re.search(said, line):
                break
        else:
            raise AssertionError(f"{said!r} was not said:\n{''.join(lines)}")
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        assert process.wait(200) == 1
    assert "is deleted" in rest and "told to end (SIGTERM)" in rest
    wait_until(lambda: get("trainjobs")["items"] == [], "the job has gone")


@pytest.mark.skipif(not (STOP and START), reason="MOESAIC_CLUSTER_STOP_API and _START_API name no commands")
def test_an_api_server_that_is_away_for_a_minute_costs_nothing(profile: ClusterProfile, tmp_path: Path) -> None:
    def started() -> bool:
        """Controllers that have lost their API server start anew: what asks their webhooks fails until they are up."""
        return subprocess.run(shlex.split(str(START)), capture_output=True, check=False).returncode == 0

    def stop_for_a_while() -> None:
        wait_until(running_pods, "the node runs")
        subprocess.run(shlex.split(str(STOP)), check=True, capture_output=True)
        time.sleep(FORGET_S)
        wait_until(started, "the API server is there again")

    command = "for i in $(seq 50); do echo step $i; sleep 2; done"
    with meanwhile(stop_for_a_while):
        lines = run(job(profile, "9"), command, tmp_path)
    assert lines == [f"step {number}" for number in range(1, 51)], "each once, those of that minute too"
