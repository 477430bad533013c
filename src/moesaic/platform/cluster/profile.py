"""What one cluster has: nodes, volumes, secrets, its registry and its queue. One file, checked, for every pipeline.

It says *where*; recipes say *what*. Secrets are named, never given: whatever looks like one is refused.
"""

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from moesaic.core.config import Config, Positive
from moesaic.core.errors import ArtifactError, ConfigError
from moesaic.core.json_text import read_text
from moesaic.core.network import CLIENT_CERTIFICATE
from moesaic.core.redaction import holds_password, names_secret

Quantity = Annotated[str, BeforeValidator(str), Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|[KMGT]i?|P)?$")]
"""Kubernetes' form: ``8``, ``500m``, ``64Gi``."""
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$")]
"""The name of a Kubernetes object."""
QueueName = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")]
"""The name of a queue; it is the value of a label."""
VolumeName = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")]
"""The name of an object whose volume Kubeflow calls the same: a volume's has no dots."""
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
"""The name of an environment variable."""
MountPath = Annotated[str, Field(pattern=r"^(/[A-Za-z0-9_-][A-Za-z0-9._-]*)+$")]

SCRATCH, TEMPORARY, SHARED_MEMORY = "/scratch", "/tmp", "/dev/shm"
"""Where our images write, and nowhere else."""
VOLUMES = ("scratch", "tmp", "shared-memory")
"""The names of the volumes there."""
CERTIFICATES = "/etc/moesaic"
"""Where certificates are mounted."""
_OUR_IMAGE = re.compile(r"(?:.*/)?(?P<image>moesaic/[^/]+)")
QUEUE_LABEL, STAGE_LABEL = "kueue.x-k8s.io/queue-name", "moesaic/stage"
JOB_KINDS = {"distill": "TrainJob", "reinforce": "RayJob"}
"""Stages that can run on several nodes, and what starts them there."""


class Toleration(Config):
    """A taint that tasks put up with, as in a pod's specification."""

    key: str
    operator: Literal["Exists", "Equal"] = "Exists"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None


class Node(Config):
    """A kind of node, and how much of one a task gets."""

    cpu: Quantity
    """Cores that are asked for."""
    memory: Quantity
    """Asked for; what lies in shared memory counts too."""
    cpu_limit: Quantity | None = None
    """Most cores; None: as many as are asked for."""
    memory_limit: Quantity | None = None
    """Most memory; None: as much as is asked for."""
    accelerators: Annotated[int, Field(ge=0, le=16)] = 0
    """GPUs; torchrun starts one process on each."""
    accelerator: str = "nvidia.com/gpu"
    """The resource that the device plug-in offers."""
    scratch: Quantity = "100Gi"
    """Most that a task may write to /scratch on the node's disk."""
    shared_memory: Quantity | None = None
    """Size of /dev/shm; None leaves the container runtime's 64 MiB, too little for several processes."""
    selector: dict[str, str] = Field(default_factory=dict)
    """Labels that a node must have."""
    tolerations: tuple[Toleration, ...] = ()

    @model_validator(mode="after")
    def _limits_hold_what_is_asked_for(self) -> Self:
        from kubernetes.utils.quantity import parse_quantity  # takes a while to import

        for what in ("cpu", "memory"):
            asked, limit = getattr(self, what), getattr(self, f"{what}_limit")
            if limit is not None and parse_quantity(limit) < parse_quantity(asked):
                raise ValueError(f"{what}_limit {limit} is less than {what} {asked}, which is asked for; raise it")
        return self


class SecretVariables(Config):
    """Variables that a task gets from a secret of the cluster."""

    secret: Name
    variables: dict[Variable, str]
    """Name of the variable: key within the secret."""
    optional: bool = False
    """Start without them where the secret does not exist."""


class CertificateFile(Config):
    """A PEM file: one key of a secret or of a config map of the cluster."""

    secret: VolumeName | None = None
    config_map: VolumeName | None = None
    key: Annotated[str, Field(pattern=r"^[-._a-zA-Z0-9]{1,253}$")]

    @model_validator(mode="after")
    def _is_in_one(self) -> Self:
        if (self.secret is None) == (self.config_map is None):
            raise ValueError("name a `secret` or a `config_map`, one of them")
        return self

    @property
    def volume(self) -> str:
        """The name of the object, which Kubeflow gives its volume too."""
        return self.secret or self.config_map or ""

    @property
    def directory(self) -> str:
        """Where the object is mounted; each of its keys is a file there."""
        return f"{CERTIFICATES}/{self.volume}"


class Certificates(Config):
    """A site's own certificates, mounted in every task and every node of a job; docs/network.md says who uses them."""

    authorities: CertificateFile | None = None
    """The authorities that are trusted, all of them in one file: ``SSL_CERT_FILE``."""
    client: CertificateFile | None = None
    """The certificate that our connections show, with its key, in one file of a secret: ``SSL_CLIENT_CERT``."""

    @property
    def variables(self) -> dict[str, str]:
        """Environment variables that name the files."""
        files = {"SSL_CERT_FILE": self.authorities, CLIENT_CERTIFICATE: self.client}
        return {name: f"{file.directory}/{file.key}" for name, file in files.items() if file is not None}

    @property
    def mounted(self) -> list[CertificateFile]:
        """One file of each object: an object is mounted once, whole."""
        files = [file for file in (self.authorities, self.client) if file is not None]
        return list({(file.secret, file.config_map): file for file in files}.values())

    @model_validator(mode="after")
    def _can_be_mounted(self) -> Self:
        if self.client is not None and self.client.secret is None:
            raise ValueError("`client` holds a private key; keep it in a `secret`, not in a `config_map`")
        if len({file.volume for file in self.mounted}) < len(self.mounted):
            raise ValueError(f"a secret and a config map are both called {self.mounted[0].volume}; rename one")
        return self


class Claim(Config):
    """A volume that every task mounts: a store that all of them share."""

    claim: Name
    path: MountPath


class JobNodes(Config):
    """Nodes of its own for a stage that needs more than its pod has; the pod only starts them and waits."""

    template: dict[str, Any]
    """The job's object, to be filled; in a file, the path of one from there."""
    node: str
    """The kind of all its nodes."""
    num_nodes: Positive


def check_template(template: Mapping[str, Any], claims: Collection[Claim], num_nodes: int) -> None:
    """Raise ValueError if a job's template lacks what is filled in, or its nodes do not mount the profile's claims.

    The volumes of a TrainJob are those of its TrainingRuntime, in the cluster.
    """
    kind = template["kind"]
    needed = {
        "TrainJob": ["apiVersion", "metadata.name", "spec.runtimeRef.name"],
        "RayJob": ["apiVersion", "metadata.name", "spec.rayClusterSpec.headGroupSpec.template.spec.containers"],
    }[kind]
    missing = [path for path in needed if not _at(template, path)]
    groups = _at(template, "spec.rayClusterSpec.workerGroupSpecs") or []
    if kind == "RayJob" and num_nodes > 1 and len(groups) != 1:
        missing.append("one group in spec.rayClusterSpec.workerGroupSpecs")
    if missing:
        raise ValueError(f"the template of a {kind} lacks {', '.join(missing)}; manifests/jobs has examples")
    if kind == "TrainJob":
        return
    for group in [_at(template, "spec.rayClusterSpec.headGroupSpec"), *groups]:
        pod = group["template"]["spec"]
        names = {one.get("persistentVolumeClaim", {}).get("claimName"): one["name"] for one in pod.get("volumes", [])}
        mounts = {one["name"]: one["mountPath"] for one in pod["containers"][0].get("volumeMounts", [])}
        for claim in claims:
            if mounts.get(names.get(claim.claim)) != claim.path:
                raise ValueError(
                    f"the pods of a {kind}'s template do not mount the claim {claim.claim} at {claim.path}, as the "
                    "profile's tasks do; mount it there"
                )


def _at(content: Any, path: str) -> Any:
    """What stands at a path of keys; None where one is missing."""
    for key in path.split("."):
        content = content.get(key) if isinstance(content, Mapping) else None
    return content


class ClusterProfile(Config):
    """Where pipelines run. Stages without a kind of their own take the default one."""

    namespace: Name = "moesaic"
    service_account: Name = "moesaic-pipeline"
    registry: str | None = None
    """``host/path`` that replaces whatever stands before ``moesaic/`` in the images' names; digests stay."""
    image_pull_secrets: tuple[Name, ...] = ()
    queue: QueueName | None = None
    """Kueue's queue for all that runs; None: started at once."""
    user_id: Positive = 10001
    """Who tasks run as; our images' own user unless the cluster gives out others."""
    environment: dict[Variable, str] = Field(default_factory=dict)
    """``MOESAIC_STORE``, ``MLFLOW_TRACKING_URI`` and the like; nothing secret."""
    secrets: tuple[SecretVariables, ...] = ()
    claims: tuple[Claim, ...] = ()
    certificates: Certificates = Field(default_factory=Certificates)
    nodes: dict[str, Node]
    """Kinds of nodes, by names of your own."""
    default: str
    """The kind for every stage that ``stages`` does not name."""
    stages: dict[str, str] = Field(default_factory=dict)
    """Kinds of nodes by stage."""
    image: str | None = None
    """The image that every stage runs in, in place of its component's: ``moesaic/cpu`` on clusters without a GPU."""
    images: dict[str, str] = Field(default_factory=dict)
    """By stage the image that it runs in, where that is not its component's own: an evaluation through ``trtllm-serve``
    needs ``moesaic/serve``, with its digest of ``images/lock.json``."""
    jobs: dict[str, JobNodes] = Field(default_factory=dict)
    """By stage; all others stay in their pod."""

    @field_validator("environment")
    @classmethod
    def _nothing_secret(cls, environment: dict[str, str]) -> dict[str, str]:
        for name, value in environment.items():
            if names_secret(name) or holds_password(value):
                raise ValueError(f"{name} looks like a secret; name a secret of the cluster under `secrets` instead")
        return environment

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        kinds = {self.default, *self.stages.values(), *(job.node for job in self.jobs.values())}
        unknown = sorted(kinds - set(self.nodes))
        if unknown:
            raise ValueError(f"{unknown} are no kinds under `nodes`, which has {sorted(self.nodes)}")
        mounted = [SCRATCH, TEMPORARY, SHARED_MEMORY, *(claim.path for claim in self.claims)]
        mounted += [file.directory for file in self.certificates.mounted]
        if repeated := sorted({path for path in mounted if mounted.count(path) > 1}):
            raise ValueError(f"{repeated} would be mounted twice; /scratch, /tmp and /dev/shm are taken")
        volumes = [*VOLUMES, *(claim.claim for claim in self.claims)]
        if taken := sorted({file.volume for file in self.certificates.mounted} & set(volumes)):
            raise ValueError(f"{taken} under `certificates` are names of other volumes ({volumes}); rename the object")
        given = [*self.environment, *self.certificates.variables]
        given += [name for secret in self.secrets for name in secret.variables]
        if twice := sorted({name for name in given if given.count(name) > 1}):
            raise ValueError(f"{twice} are set twice, in `environment`, `secrets` or by `certificates`")
        return self

    @model_validator(mode="after")
    def _jobs_can_run(self) -> Self:
        for stage, job in self.jobs.items():
            kind = job.template.get("kind")
            if kind != JOB_KINDS.get(stage):
                raise ValueError(f"{stage} cannot run as a {kind}; there are {JOB_KINDS}")
            try:
                check_template(job.template, self.claims, job.num_nodes)
            except (AttributeError, IndexError, KeyError, TypeError) as odd:
                raise ValueError(f"the template of the job of {stage} has not the form of a {kind}: {odd!r}") from odd
        places = [self.environment.get(name, "") for name in ("MOESAIC_STORE", "MOESAIC_CACHE")]
        local = places[1] if places[0].startswith("s3://") else places[0]
        if self.jobs and not any(Path(local).is_relative_to(claim.path) for claim in self.claims):
            raise ValueError(
                f"the nodes of a job find a stage's files on a volume that all share, not at {local!r}: MOESAIC_STORE, "
                "or MOESAIC_CACHE where the store is a bucket, must be a directory of one of `claims`"
            )
        return self

    @property
    def variables(self) -> dict[str, str]:
        """What every container gets, besides those of secrets."""
        return self.environment | self.certificates.variables

    def node_for(self, stage: str) -> Node:
        """The kind of node that a stage runs on."""
        return self.nodes[self.stages.get(stage, self.default)]

    def image_for(self, stage: str, own: str) -> str:
        """The image that a stage runs in, ``own`` being its component's; the profile's registry stands before ours."""
        image = self.images.get(stage) or self.image or own
        ours = _OUR_IMAGE.fullmatch(image)
        return f"{self.registry.rstrip('/')}/{ours['image']}" if self.registry and ours else image

    def num_gpus(self, stage: str) -> int:
        """GPUs of all nodes that a stage's engine has."""
        node, count = self._engine_nodes(stage)
        return count * node.accelerators

    def num_processes(self, stage: str) -> int:
        """Processes that a stage's engine has: one on each GPU of its nodes, or one on each node without."""
        node, count = self._engine_nodes(stage)
        return count * max(1, node.accelerators)

    def _engine_nodes(self, stage: str) -> tuple[Node, int]:
        """The kind of the nodes of a stage's job, or of its task, and their number."""
        job = self.jobs.get(stage)
        return (self.nodes[job.node], job.num_nodes) if job else (self.node_for(stage), 1)

    def check_stages(self, known: Collection[str]) -> None:
        """Raise ConfigError if the profile names a stage that there is not."""
        if unknown := sorted({*self.stages, *self.images, *self.jobs} - set(known)):
            raise ConfigError(f"the cluster profile names the stages {unknown}; there are {', '.join(sorted(known))}")


def read_profile(path: Path) -> ClusterProfile:
    """Read a profile from YAML, with the templates of jobs that it names.

    Raises:
        ConfigError: if it is not there, no YAML, or not valid; every problem with its place and value.
    """
    content = _read_yaml(path, "cluster profile", "manifests/profiles")
    jobs = content.get("jobs") if isinstance(content, dict) else None
    for job in jobs.values() if isinstance(jobs, dict) else ():
        if isinstance(job, dict) and isinstance(job.get("template"), str):
            job["template"] = _read_yaml(path.parent / job["template"], "template of a job", "manifests/jobs")
    return ClusterProfile.parse(json.dumps(content))


def _read_yaml(path: Path, what: str, examples: str) -> Any:
    import yaml

    try:
        text = read_text(path, f"there is no {what} {path}; {examples} has examples")
        _check_keys(yaml.compose(text, yaml.SafeLoader), path)
        content = yaml.safe_load(text)
        json.dumps(content)
    except ConfigError:
        raise
    except ArtifactError as failure:
        raise ConfigError(str(failure)) from failure
    except yaml.YAMLError as failure:
        raise ConfigError(f"{path} is no YAML: {failure}") from failure
    except (TypeError, ValueError, RecursionError) as failure:
        raise ConfigError(
            f"{path} holds what is no text, number, list or mapping ({failure}); quote dates"
        ) from failure
    return content


def _check_keys(node: Any, path: Path) -> None:
    """Refuse a key that stands twice in a mapping, of which YAML's own reader takes the last."""
    inner = [part for pair in node.value for part in pair] if node is not None and node.id == "mapping" else []
    keys = [part.value for part in inner[::2] if part.id == "scalar"]
    if repeated := sorted({key for key in keys if keys.count(key) > 1}):
        raise ConfigError(f"{path}, from line {node.start_mark.line + 1}: the key {repeated[0]!r} occurs twice")
    for part in inner or (node.value if node is not None and node.id == "sequence" else ()):
        _check_keys(part, path)
