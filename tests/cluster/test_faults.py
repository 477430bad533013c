"""Jobs that go wrong on a real cluster: each is told for what it is, and nothing is left behind."""

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
from tests.cluster.pods import get, kubectl, wait_until

pytestmark = pytest.mark.cluster

STOP, START = os.environ.get("MOESAIC_CLUSTER_STOP_API"), os.environ.get("MOESAIC_CLUSTER_START_API")
"""Commands that stop the API server and start it again, for the test that needs them."""
FORGET_S = 60
_SCRIPT = """
import sys
from pathlib import Path
from moesaic.core.nodes import Work
from moesaic.platform.cluster.jobs import ClusterJob, JobSettings
job = ClusterJob(JobSettings.parse(sys.argv[1]), sys.argv[2])
job.run(Work(["sleep", "600"], {}, Path(sys.argv[3])), prepare=lambda: None, show=print)
"""


@pytest.fixture(autouse=True)
def no_jobs(small: None) -> Iterator[None]:
    yield
    kubectl("delete", "trainjobs", "--all", "--wait", "--timeout=60s")


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
    yield
    thread.join(120)


def running_pods() -> list[str]:
    pods = get("pods", "-l", "jobset.sigs.k8s.io/jobset-name")["items"]
    return [pod["metadata"]["name"] for pod in pods if pod["status"]["phase"] == "Running"]


def test_a_job_of_two_pods_waits_for_its_turn_and_ends(profile: ClusterProfile, tmp_path: Path, capfd: Any) -> None:
    assert run(job(profile, "a", num_nodes=2), "echo from $PET_NODE_RANK of $PET_NNODES", tmp_path) == ["from 0 of 2"]
    said = capfd.readouterr().err
    assert "waits in the queue moesaic" in said


def test_a_pod_that_is_deleted_fails_the_job(profile: ClusterProfile, tmp_path: Path) -> None:
    def delete() -> None:
        (name,) = wait_until(running_pods, "the node runs")
        kubectl("delete", "pod", name, "--grace-period=0", "--force")

    with meanwhile(delete), pytest.raises(StageError, match="TrainJob moesaic-distill-bbbbbbbbbbbb-1 failed: "):
        run(job(profile, "b"), "sleep 300", tmp_path)


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


def test_a_quota_that_is_too_small_is_told_with_its_numbers(profile: ClusterProfile, tmp_path: Path) -> None:
    said = r"waits in the queue moesaic: .*\(100\) > maximum capacity \(2\)"
    stop_when(job(profile, "f", cpu=100), tmp_path, said)


def stop_when(one: ClusterJob, directory: Path, said: str) -> None:
    """Follow a job in a process until it says this, then tell the process to end: the job must be deleted."""
    command = [sys.executable, "-c", _SCRIPT, one.settings.to_json(), one.key, str(directory / "log")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
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
    assert process.returncode == 1
    assert "is deleted" in rest and "told to end (SIGTERM)" in rest
    wait_until(lambda: get("trainjobs")["items"] == [], "the job has gone", 60)


@pytest.mark.skipif(not (STOP and START), reason="MOESAIC_CLUSTER_STOP_API and _START_API name no commands")
def test_an_api_server_that_is_away_for_a_minute_costs_nothing(profile: ClusterProfile, tmp_path: Path) -> None:
    def stop_for_a_while() -> None:
        wait_until(running_pods, "the node runs")
        subprocess.run(shlex.split(str(STOP)), check=True, capture_output=True)
        time.sleep(FORGET_S)
        subprocess.run(shlex.split(str(START)), check=True, capture_output=True)

    command = "for i in $(seq 50); do echo step $i; sleep 2; done"
    with meanwhile(stop_for_a_while):
        lines = run(job(profile, "9"), command, tmp_path)
    assert lines == [f"step {number}" for number in range(1, 51)], "each once, those of that minute too"
