"""Kubernetes jobs from templates: filled first from the cluster profile, then for one run of a stage.

Fields are those of Kubeflow Trainer 2.2 (``TrainJob``) and KubeRay 1.5 (``RayJob``). Volumes are the template's own, or
those of the TrainingRuntime that it names, and the profile's certificates.
"""

import copy
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moesaic.platform.cluster.jobs.settings import NODE, JobSettings
from moesaic.platform.cluster.profile import QUEUE_LABEL, STAGE_LABEL, ClusterProfile, Node

JOB_LABEL = "moesaic/job"
"""Which stage, config and inputs a job is for: the same for all its attempts."""
_PATCHER = "moesaic/profile"
Object = dict[str, Any]


def job_settings(profile: ClusterProfile, stage: str, image: str) -> JobSettings:
    """Fill a stage's job template with the values of a cluster; the job's name and command are still open.

    Args:
        profile: of the cluster; it must have a job for the stage.
        stage: its name.
        image: the one that the stage's own task runs in.
    """
    asked = profile.jobs[stage]
    node = profile.nodes[asked.node]
    template = copy.deepcopy(asked.template)
    metadata, spec = template["metadata"], template["spec"]
    labels = {name: value for name, value in metadata.get("labels", {}).items() if name != QUEUE_LABEL}
    queue = {QUEUE_LABEL: profile.queue} if profile.queue else {}
    metadata |= {"namespace": profile.namespace, "labels": labels | queue | {STAGE_LABEL: stage}}
    spec["suspend"] = bool(profile.queue)  # Kueue resumes it; without a queue nobody would
    fill = _fill_trainjob if template["kind"] == "TrainJob" else _fill_rayjob
    fill(spec, profile, node, image, asked.num_nodes)
    shared = tuple(claim.path for claim in profile.claims)
    return JobSettings(template=template, num_nodes=asked.num_nodes, gpus_per_node=node.accelerators, shared=shared)


def render_job(
    settings: JobSettings, name: str, task: str, command: Sequence[str], environment: Mapping[str, str], log: Path
) -> Object:
    """Complete the template to the job that is created.

    Args:
        settings: of the job.
        name: of this attempt.
        task: value of ``JOB_LABEL``.
        command: what every node of a TrainJob runs, or the head of a Ray cluster.
        environment: variables beside those of the profile.
        log: where a RayJob's output goes; Kubernetes has that of a TrainJob.
    """
    job = copy.deepcopy(settings.template)
    job["metadata"] |= {"name": name, "labels": job["metadata"]["labels"] | {JOB_LABEL: task}}
    added = [{"name": key, "value": value} for key, value in sorted(environment.items())]
    spec = job["spec"]
    if settings.kind == "TrainJob":
        spec["trainer"] |= {"command": [command[0]], "args": list(command[1:])}
        spec["trainer"]["env"] = _merged(spec["trainer"]["env"], added)
    else:
        spec["entrypoint"] = _logged(command, log)
        for pod in _ray_pods(spec):
            pod["containers"][0]["env"] = _merged(pod["containers"][0]["env"], added)
    return job


def _fill_trainjob(spec: Object, profile: ClusterProfile, node: Node, image: str, num_nodes: int) -> None:
    spec["trainer"] = {
        "image": image,
        "numNodes": num_nodes,
        "numProcPerNode": node.accelerators or 1,
        "resourcesPerNode": _resources(node),
        "env": _environment(profile),
    }
    kept = [patch for patch in spec.pop("runtimePatches", []) if patch["manager"] != _PATCHER]
    volumes, mounts = _certificates(profile)
    pod = _placement(profile, node)
    if mounts:
        pod |= {"volumes": volumes, "containers": [{"name": NODE, "volumeMounts": mounts}]}
    if pod:
        nodes = {"name": NODE, "template": {"spec": {"template": {"spec": pod}}}}
        ours = {"template": {"spec": {"replicatedJobs": [nodes]}}}
        kept.append({"manager": _PATCHER, "trainingRuntimeSpec": ours})
    if kept:
        spec["runtimePatches"] = kept


def _fill_rayjob(spec: Object, profile: ClusterProfile, node: Node, image: str, num_nodes: int) -> None:
    """The head is one of the nodes; the worker group is the others."""
    cluster = spec["rayClusterSpec"]
    workers = cluster.pop("workerGroupSpecs")[0]
    if num_nodes > 1:
        others = num_nodes - 1
        cluster["workerGroupSpecs"] = [workers | {"replicas": others, "minReplicas": others, "maxReplicas": others}]
    for pod in _ray_pods(spec):
        for field in ("nodeSelector", "tolerations", "imagePullSecrets"):
            pod.pop(field, None)
        pod |= _placement(profile, node)
        pod["containers"][0] |= {"image": image, "resources": _resources(node), "env": _environment(profile)}
        volumes, mounts = _certificates(profile)
        if mounts:
            pod["volumes"] = [*pod.get("volumes", []), *volumes]
            pod["containers"][0]["volumeMounts"] = [*pod["containers"][0].get("volumeMounts", []), *mounts]


def _ray_pods(spec: Object) -> list[Object]:
    """Pod specifications of the head and of the workers; none is shared with another."""
    cluster = spec["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])]
    for group in groups:
        group["template"] = copy.deepcopy(group["template"])
    return [group["template"]["spec"] for group in groups]


def _resources(node: Node) -> Object:
    gpus = {node.accelerator: str(node.accelerators)} if node.accelerators else {}
    limits = {"memory": node.memory_limit or node.memory} | gpus
    return {"requests": {"cpu": node.cpu, "memory": node.memory}, "limits": limits}


def _placement(profile: ClusterProfile, node: Node) -> Object:
    fields: Object = {
        "nodeSelector": dict(node.selector),
        "tolerations": [one.model_dump(exclude_none=True) for one in node.tolerations],
        "imagePullSecrets": [{"name": name} for name in profile.image_pull_secrets],
    }
    return {key: value for key, value in fields.items() if value}


def _certificates(profile: ClusterProfile) -> tuple[list[Object], list[Object]]:
    """Volumes of the profile's certificates, and where the container mounts them."""
    files = profile.certificates.mounted
    volumes: list[Object] = [
        {"name": file.volume, "secret": {"secretName": file.secret}}
        if file.secret
        else {"name": file.volume, "configMap": {"name": file.config_map}}
        for file in files
    ]
    return volumes, [{"name": file.volume, "mountPath": file.directory, "readOnly": True} for file in files]


def _environment(profile: ClusterProfile) -> list[Object]:
    """The profile's variables; of its secrets MLflow's, by reference: all else that nodes need is in files."""
    plain = [{"name": name, "value": value} for name, value in sorted(profile.variables.items())]
    return plain + [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": one.secret, "key": key, "optional": one.optional}}}
        for one in profile.secrets
        for name, key in sorted(one.variables.items())
        if name.startswith("MLFLOW_")
    ]


def _merged(before: Sequence[Object], added: Sequence[Object]) -> list[Object]:
    """Variables by name; a later one replaces an earlier one."""
    return list({one["name"]: one for one in [*before, *added]}.values())


def _logged(command: Sequence[str], log: Path) -> str:
    """Ray keeps a job's output to itself: a copy goes to a file that the task sees too."""
    script = f"{shlex.join(command)} 2>&1 | tee -a {shlex.quote(str(log))}"
    return shlex.join(["bash", "-o", "pipefail", "-c", script])
