"""The state of a job and of its pods, read from the objects of the Kubernetes API."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Object = dict[str, Any]
Phase = Literal["queued", "active", "complete", "failed"]

_RANK_LABELS = ("batch.kubernetes.io/job-completion-index", "ray.io/node-type")
_BEGUN = ("Running", "Succeeded", "Failed")
_ON_THE_WAY = ("ContainerCreating", "PodInitializing")


@dataclass(frozen=True)
class State:
    """The phase of a job."""

    phase: Phase
    message: str = ""
    """The reason of a failure; else empty."""


@dataclass(frozen=True)
class FailedNode:
    """A node that failed."""

    pod: str
    message: str
    """Which node failed, on which machine, and why."""


def state_of(job: Object) -> State:
    """The state of a TrainJob or RayJob."""
    return _trainjob_state(job) if job["kind"] == "TrainJob" else _rayjob_state(job)


def pod_selector(job: Object) -> str | None:
    """Labels of a job's pods; None while there can be none."""
    if job["kind"] == "TrainJob":
        return f"jobset.sigs.k8s.io/jobset-name={job['metadata']['name']}"
    cluster = job.get("status", {}).get("rayClusterName")
    return f"ray.io/cluster={cluster}" if cluster else None


def first_node(pods: Sequence[Object]) -> str | None:
    """Name of the pod of a TrainJob's first node, once it has begun to run; the latest, if Kueue suspended the job."""
    begun = [pod for pod in pods if _node(pod) == "0" and pod.get("status", {}).get("phase") in _BEGUN]
    latest = max(begun, key=lambda pod: str(pod["metadata"].get("creationTimestamp", "")), default=None)
    return str(latest["metadata"]["name"]) if latest else None


def describe_nodes(pods: Sequence[Object], num_nodes: int) -> str:
    """The number of running nodes, and why the others wait."""
    running = sum(pod.get("status", {}).get("phase") == "Running" for pod in pods)
    waiting = sorted({reason for pod in pods if (reason := _waits_for(pod))})
    return "; ".join([f"{running} of {num_nodes} nodes run", *waiting])


def first_failure(pods: Sequence[Object]) -> FailedNode | None:
    """The node that failed first: the others fail because of it."""
    failures = [(str(end.get("finishedAt", "")), pod, end) for pod in pods if (end := _failure(pod))]
    if not failures:
        return None
    _, pod, end = min(failures, key=lambda one: one[0])
    code = f", exit code {end['exitCode']}" if "exitCode" in end else ""
    where = pod.get("spec", {}).get("nodeName", "no machine yet")
    why = f"{end.get('reason', 'Error')}{code}" + (f": {end['message']}" if end.get("message") else "")
    name = pod["metadata"]["name"]
    return FailedNode(name, f"node {_node(pod)} (pod {name} on {where}) failed first: {why}")


def _trainjob_state(job: Object) -> State:
    conditions = {
        one["type"]: one for one in job.get("status", {}).get("conditions", []) if one.get("status") == "True"
    }
    if failed := conditions.get("Failed"):
        return State("failed", _joined(failed.get("reason"), failed.get("message")))
    if "Complete" in conditions:
        return State("complete")
    return State("queued" if "Suspended" in conditions or job["spec"].get("suspend") else "active")


def _rayjob_state(job: Object) -> State:
    status = job.get("status", {})
    ray, deployment = status.get("jobStatus"), status.get("jobDeploymentStatus")
    if ray == "SUCCEEDED":
        return State("complete")
    if ray in ("FAILED", "STOPPED") or deployment == "Failed":
        return State("failed", _joined(status.get("reason") or ray, status.get("message")))
    return State("queued" if deployment in ("Suspended", "Suspending") or job["spec"].get("suspend") else "active")


def _joined(*parts: str | None) -> str:
    return ": ".join(part for part in parts if part) or "no reason is given"


def _node(pod: Object) -> str:
    """Which node of the job a pod is: its number, or head or worker."""
    labels = pod["metadata"].get("labels", {})
    return next((str(labels[name]) for name in _RANK_LABELS if name in labels), "?")


def _waits_for(pod: Object) -> str | None:
    """Why a pod waits; None if it runs or is just starting."""
    status = pod.get("status", {})
    for container in status.get("containerStatuses", []):
        waiting = container.get("state", {}).get("waiting") or {}
        if waiting and waiting.get("reason") not in _ON_THE_WAY:
            return f"node {_node(pod)} waits: {_joined(waiting.get('reason'), waiting.get('message'))}"
    for condition in status.get("conditions", []):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return f"node {_node(pod)} waits: {_joined(condition.get('reason'), condition.get('message'))}"
    return None


def _failure(pod: Object) -> Object | None:
    """How a pod's container ended, if it failed; of an evicted pod, what the node says."""
    status = pod.get("status", {})
    for container in status.get("containerStatuses", []):
        for when in ("state", "lastState"):
            ended = container.get(when, {}).get("terminated")
            if ended and ended["exitCode"]:
                return dict(ended)
    return dict(status) if status.get("phase") == "Failed" else None
