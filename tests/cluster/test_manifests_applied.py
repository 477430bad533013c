"""Overlays on a real cluster: applied twice and removed; and what their accounts may do there."""

import base64
import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from moesaic.platform.cluster import ClusterProfile
from moesaic.platform.cluster.jobs.job_template import job_settings, render_job
from tests.cluster.conftest import KUBECTL, MANIFESTS, remove
from tests.cluster.pods import NAMESPACE, kubectl, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

ALLOWED = [
    "create trainjobs.trainer.kubeflow.org",
    "get trainjobs.trainer.kubeflow.org",
    "delete trainjobs.trainer.kubeflow.org",
    "create rayjobs.ray.io",
    "list rayjobs.ray.io",
    "delete rayjobs.ray.io",
    "list pods",
    "get pods/log",
    "list workloads.kueue.x-k8s.io",
    "get secrets/mlpipeline-minio-artifact",
]
REFUSED = [
    "get secrets",
    "list secrets",
    "create pods",
    "create pods/exec",
    "delete pods",
    "create jobs.batch",
    "create roles.rbac.authorization.k8s.io",
    "create rolebindings.rbac.authorization.k8s.io",
    "create serviceaccounts/token",
    "patch trainjobs.trainer.kubeflow.org",
    "update configmaps",
    "list nodes",
    "list namespaces",
]


@pytest.mark.parametrize("name", ["single-node", "multi-node", "air-gapped", "small-cpu"])
def test_an_overlay_is_applied_twice_without_a_change_and_removed(name: str, record: dict[str, Any]) -> None:
    overlay, begun = MANIFESTS / "overlays" / name, time.monotonic()
    try:
        kubectl("apply", "--server-side", "-k", str(overlay))
        before = versions(overlay)
        kubectl("apply", "--server-side", "-k", str(overlay))
        assert versions(overlay) == before
    finally:
        remove(overlay)
    record.setdefault("overlays_s", {})[name] = round(time.monotonic() - begun, 1)


def versions(overlay: Path) -> dict[str, int]:
    """The generation of every object that has one: the API counts changes of what is asked for, not of states."""
    found = json.loads(kubectl("get", "-k", str(overlay), "-o", "json"))["items"]
    assert found
    return {f"{one['kind']}/{one['metadata']['name']}": one["metadata"].get("generation", 0) for one in found}


class Account:
    """A service account by its token, and nothing else."""

    def __init__(self, name: str, directory: Path) -> None:
        view = json.loads(kubectl("config", "view", "--raw", "--minify", "-o", "json"))
        cluster = view["clusters"][0]
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "it",
            "clusters": [cluster],
            "contexts": [{"name": "it", "context": {"cluster": cluster["name"], "user": "it"}}],
            "users": [{"name": "it", "user": {"token": kubectl("create", "token", name).strip()}}],
        }
        if file := cluster["cluster"].pop("certificate-authority", None):
            authority = base64.b64encode(Path(file).read_bytes()).decode()
            cluster["cluster"]["certificate-authority-data"] = authority
        self._path = directory / f"{name}.kubeconfig"
        self._path.write_text(yaml.safe_dump(config))

    def call(self, *words: str) -> "subprocess.CompletedProcess[str]":
        command = [KUBECTL, "--kubeconfig", str(self._path), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def may(self, what: str, namespace: str = NAMESPACE) -> bool:
        return self.call("-n", namespace, "auth", "can-i", *what.split()).stdout.strip() == "yes"


def test_the_account_of_tasks_may_do_what_it_must_and_nothing_more(small: None, tmp_path: Path) -> None:
    account = Account("moesaic-pipeline", tmp_path)
    assert [what for what in ALLOWED if not account.may(what)] == []
    assert [what for what in REFUSED if account.may(what)] == []
    elsewhere = [
        what for what in ("list pods", "create trainjobs.trainer.kubeflow.org") if account.may(what, "default")
    ]
    assert elsewhere == []
    for words in (("get", "secrets", "-n", NAMESPACE), ("get", "pods", "-n", "kube-system"), ("get", "nodes")):
        refused = account.call(*words)
        assert refused.returncode and "Forbidden" in refused.stderr, words
    assert account.call("get", "pods", "-n", NAMESPACE).returncode == 0


def test_the_account_of_training_nodes_may_do_nothing(small: None, tmp_path: Path) -> None:
    account = Account("moesaic-trainer", tmp_path)
    assert [what for what in (*ALLOWED, *REFUSED) if account.may(what)] == []


def test_a_pod_that_is_not_restricted_is_refused(small: None) -> None:
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "root"},
        "spec": {"containers": [{"name": "main", "image": "localhost:5000/moesaic/cpu:0.1.0"}]},
    }
    refused = given(pod)
    assert refused.returncode and 'violates PodSecurity "restricted' in refused.stderr


@pytest.mark.parametrize(
    ("stage", "template", "change", "why"),
    [
        ("distill", "trainjob", {"runtimeRef": {"name": "none"}}, "not found"),
        ("reinforce", "rayjob", {"shutdownAfterJobFinishes": False}, "should delete the cluster after finishing"),
    ],
)
def test_a_stages_job_is_taken_and_a_wrong_one_refused(
    stage: str, template: str, change: dict[str, Any], why: str, small: None, profile: ClusterProfile
) -> None:
    content = yaml.safe_load((MANIFESTS / "jobs" / f"{template}.yaml").read_text())
    jobs = {stage: {"template": content, "node": "cpu", "num_nodes": 2}}
    mine = ClusterProfile.model_validate(profile.model_dump() | {"jobs": jobs})
    settings = job_settings(mine, stage, mine.image_for(stage, ""))
    job = render_job(settings, f"moesaic-{stage}-0-1", "0", ["python3"], {}, Path("/store/log"))
    taken = given(job, "--dry-run=server")
    assert taken.returncode == 0, taken.stderr
    job["spec"] |= change
    refused = given(job, "--dry-run=server")
    assert refused.returncode and "denied the request" in refused.stderr and why in refused.stderr


def given(content: dict[str, Any], *options: str) -> "subprocess.CompletedProcess[str]":
    """An object given to the API server, which may refuse it."""
    command = [KUBECTL, "-n", NAMESPACE, "apply", *options, "-f", "-"]
    return subprocess.run(command, input=yaml.safe_dump(content), capture_output=True, text=True, check=False)


def test_the_queue_is_active(small: None) -> None:
    def active() -> bool:
        found = json.loads(kubectl("get", "localqueue", "moesaic", "-o", "json"))
        return any(one["type"] == "Active" and one["status"] == "True" for one in found["status"].get("conditions", []))

    assert wait_until(active, "Kueue takes the queue")
