"""What a task knows of the nodes that a cluster profile gives its stage; it travels in the task's environment."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from moesaic.core.config import Amount, Config, Positive
from moesaic.platform.cluster.profile import MountPath

JOB_VARIABLE = "MOESAIC_JOB"
"""The environment variable that holds a :class:`JobPlace`; without it a stage stays in its pod."""
NODE = "node"
"""What Trainer's runtimes call the nodes that train, and the container in them."""


class JobPlace(Config):
    """Nodes to run a stage on, as a job that has everything but its name and its command."""

    manifest: dict[str, Any]
    """A TrainJob or RayJob, filled from the profile."""
    num_nodes: Positive
    gpus_per_node: Annotated[int, Field(ge=0)]
    shared: tuple[MountPath, ...]
    """Where the volumes lie that the task and all nodes of the job mount."""
    poll_s: Amount = 5.0
    """How often the job and its log are looked at."""
    patience_s: Amount = 600.0
    """How long the API server may give no answer before the stage gives up; the job goes on."""

    @property
    def kind(self) -> str:
        """TrainJob or RayJob."""
        return str(self.manifest["kind"])

    @property
    def container(self) -> str:
        """The container of a pod that does the work; others may be put beside it."""
        if self.kind == "TrainJob":
            return NODE
        head = self.manifest["spec"]["rayClusterSpec"]["headGroupSpec"]
        return str(head["template"]["spec"]["containers"][0]["name"])

    @property
    def processes_per_node(self) -> int:
        """One for each GPU, one where there is none."""
        return self.gpus_per_node or 1

    def sees(self, path: Path) -> bool:
        """Whether the job's nodes have the same file at the same path."""
        return any(path.resolve().is_relative_to(Path(shared).resolve()) for shared in self.shared)

    def to_variable(self) -> str:
        """As the value of ``MOESAIC_JOB``: no ``$``, with which Kubernetes would begin to replace names."""
        return self.to_json().replace("$", r"\u0024")
