"""Settings of the job that runs a stage on several nodes; the task gets them as an environment variable."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from moesaic.core.config import Amount, Config, Positive
from moesaic.platform.cluster.profile import MountPath

JOB_VARIABLE = "MOESAIC_JOB"
"""The environment variable that holds a :class:`JobSettings`; without it a stage stays in its pod."""
NODE = "node"
"""What Trainer's runtimes call the nodes that train, and the container in them."""


class JobSettings(Config):
    """The job of a stage: its template, which lacks only the name and the command, and its nodes."""

    template: dict[str, Any]
    """A TrainJob or RayJob, filled from the profile."""
    num_nodes: Positive
    gpus_per_node: Annotated[int, Field(ge=0)]
    shared: tuple[MountPath, ...]
    """Mount paths of the volumes that the task and all nodes of the job share."""
    poll_s: Amount = 5.0
    """How often the job's state and log are read."""
    patience_s: Amount = 600.0
    """How long the API server may give no answer before the stage gives up; the job goes on."""

    @property
    def kind(self) -> str:
        """TrainJob or RayJob."""
        return str(self.template["kind"])

    @property
    def container(self) -> str:
        """The name of the container that does the work; a pod may have others."""
        if self.kind == "TrainJob":
            return NODE
        head = self.template["spec"]["rayClusterSpec"]["headGroupSpec"]
        return str(head["template"]["spec"]["containers"][0]["name"])

    @property
    def processes_per_node(self) -> int:
        """One process for each GPU; one process on a node without GPUs."""
        return self.gpus_per_node or 1

    def sees(self, path: Path) -> bool:
        """Whether the nodes see the same file at this path."""
        return any(path.resolve().is_relative_to(Path(shared).resolve()) for shared in self.shared)

    def to_variable(self) -> str:
        """The value of ``MOESAIC_JOB``. It has no ``$``, because Kubernetes expands names after one."""
        return self.to_json().replace("$", r"\u0024")
