"""Give the tasks of a compiled pipeline what a cluster profile says; the compiled file itself names no cluster.

A compiled pipeline is one YAML document. Placing adds images' registry, resources and variables to its containers, and
a second document, Kubeflow's ``platforms``, with all that is Kubernetes' own. Field names are those of Kubeflow's
``KubernetesExecutorConfig`` (kubernetes_platform/proto/kubernetes_executor_config.proto, 2.17).
"""

import copy
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from moesaic.core.errors import ArtifactError
from moesaic.core.yaml_text import read_yaml
from moesaic.platform.cluster.jobs.job_template import job_settings
from moesaic.platform.cluster.jobs.settings import JOB_VARIABLE
from moesaic.platform.cluster.profile import (
    QUEUE_LABEL,
    SCRATCH,
    SHARED_MEMORY,
    STAGE_LABEL,
    TEMPORARY,
    VOLUMES,
    ClusterProfile,
    Node,
)

_WAITING_CPU, _WAITING_MEMORY = "50m", "256Mi"
_STAGE_ARGUMENT = "--function_to_execute"


def placed_text(compiled: Path, profile: ClusterProfile, stages: Collection[str]) -> str:
    """The compiled pipeline as it is uploaded to this cluster; the same input gives the same bytes.

    Raises:
        ConfigError: if the profile names a stage that is not among the given ones.
        ArtifactError: if the file is no compiled pipeline of ours.
    """
    import yaml

    pipeline = read_yaml(compiled)
    return yaml.safe_dump_all(place(pipeline, profile, stages), sort_keys=True)


def place(pipeline: Mapping[str, Any], profile: ClusterProfile, stages: Collection[str]) -> list[dict[str, Any]]:
    """The documents of a pipeline for this cluster: the pipeline, and what it asks of Kubernetes; see `placed_text`."""
    profile.check_stages(stages)
    placed = copy.deepcopy(dict(pipeline))
    try:
        executors = placed["deploymentSpec"]["executors"]
        running = {name: stage_of(executor["container"]) for name, executor in executors.items()}
    except (KeyError, ValueError) as failure:
        raise ArtifactError(
            "this is no pipeline that `make compile` wrote: a task has no container of ours"
        ) from failure
    for name, stage in running.items():
        executors[name]["container"]["image"] = profile.image_for(stage, executors[name]["container"]["image"])
        _equip(executors[name]["container"], profile, profile.node_for(stage), waits=stage in profile.jobs)
        if stage in profile.jobs:
            job = job_settings(profile, stage, executors[name]["container"]["image"])
            executors[name]["container"]["env"].append({"name": JOB_VARIABLE, "value": job.to_variable()})
    platform = {name: _platform_config(profile, stage) for name, stage in running.items()}
    return [placed, {"platforms": {"kubernetes": {"deploymentSpec": {"executors": platform}}}}]


def stage_of(container: Mapping[str, Any]) -> str:
    """The stage that a task's container runs: the name of its component's function."""
    arguments: list[str] = container["args"]
    return arguments[arguments.index(_STAGE_ARGUMENT) + 1]


def _equip(container: dict[str, Any], profile: ClusterProfile, node: Node, *, waits: bool) -> None:
    """Set what a container's own specification has: resources and variables.

    A task that ``waits`` for its job asks for next to nothing, so that it leaves its job the room.
    """
    container["resources"] = {
        "resourceCpuRequest": _WAITING_CPU if waits else node.cpu,
        "resourceCpuLimit": node.cpu_limit or node.cpu,
        "resourceMemoryRequest": _WAITING_MEMORY if waits else node.memory,
        "resourceMemoryLimit": node.memory_limit or node.memory,
    }
    if node.accelerators and not waits:
        accelerator = {"resourceType": node.accelerator, "resourceCount": str(node.accelerators)}
        container["resources"]["accelerator"] = accelerator
    container["env"] = [{"name": name, "value": value} for name, value in sorted(profile.variables.items())]


def _platform_config(profile: ClusterProfile, stage: str) -> dict[str, Any]:
    """What only Kubernetes knows: placement, volumes, secrets, user, labels."""
    node = profile.node_for(stage)
    labels = {STAGE_LABEL: stage} | ({QUEUE_LABEL: profile.queue} if profile.queue else {})
    config: dict[str, Any] = {
        "podMetadata": {"labels": labels},
        "securityContext": {"runAsUser": str(profile.user_id), "runAsGroup": "0", "runAsNonRoot": True},
        "emptyDirMounts": _volumes(node),
        "secretAsEnv": [
            {
                **_named("secretName", secret.secret),
                "keyToEnv": [{"secretKey": key, "envVar": name} for name, key in sorted(secret.variables.items())],
                "optional": secret.optional,
            }
            for secret in profile.secrets
        ],
        "pvcMount": [{**_named("pvcName", claim.claim), "mountPath": claim.path} for claim in profile.claims],
        "secretAsVolume": [
            {**_named("secretName", file.secret), "mountPath": file.directory}
            for file in profile.certificates.mounted
            if file.secret
        ],
        "configMapAsVolume": [
            {**_named("configMapName", file.config_map), "mountPath": file.directory}
            for file in profile.certificates.mounted
            if file.config_map
        ],
        "imagePullSecret": [_named("secretName", name) for name in profile.image_pull_secrets],
        "tolerations": [one.model_dump(exclude_none=True) for one in node.tolerations],
        "nodeSelector": {"labels": dict(node.selector)} if node.selector else {},
    }
    return {key: value for key, value in config.items() if value}


def _volumes(node: Node) -> list[dict[str, str]]:
    scratch, temporary, memory = VOLUMES
    volumes = [
        {"volumeName": scratch, "mountPath": SCRATCH, "sizeLimit": node.scratch},
        {"volumeName": temporary, "mountPath": TEMPORARY, "sizeLimit": node.scratch},
    ]
    if node.shared_memory:
        shared = {"volumeName": memory, "mountPath": SHARED_MEMORY, "medium": "Memory"}
        volumes.append(shared | {"sizeLimit": node.shared_memory})
    return volumes


def _named(field: str, name: str) -> dict[str, Any]:
    """A name as Kubeflow's servers read it; the plain field is for servers before 2.5."""
    plain = {"constant": name} if field == "pvcName" else {field: name}
    return {**plain, f"{field}Parameter": {"runtimeValue": {"constant": name}}}
