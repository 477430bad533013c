"""The interface of the nodes that a stage may run on; a job of a cluster implements it (platform)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Work:
    """A command that the nodes run."""

    command: Sequence[str]
    """Program and arguments as on one machine; only the rendezvous of the processes differs."""
    environment: Mapping[str, str]
    """Environment variables in addition to those that the nodes have."""
    log: Path
    """The file that gets a copy of the first node's output."""


class Nodes(Protocol):
    """Nodes on which a stage runs its engine's processes."""

    @property
    def num_nodes(self) -> int:
        """The number of nodes."""

    @property
    def gpus_per_node(self) -> int:
        """The number of GPUs of each node; 0 for nodes without GPUs."""

    @property
    def processes_per_node(self) -> int:
        """One process for each GPU; one process on a node without GPUs."""

    def visible(self, name: str, path: Path, scratch: Path) -> Path:
        """Return a path of an input that all nodes see: its own, or that of a copy in ``scratch``.

        Raises:
            ConfigError: if the nodes do not see ``scratch`` either.
        """

    def run(self, work: Work, *, prepare: Callable[[], None], show: Callable[[str], None]) -> None:
        """Run a command on the nodes and wait until it ends.

        Args:
            work: the command.
            prepare: writes what the command reads; called before work is started, not for work that runs already.
            show: is given every line of the log.

        Raises:
            StageError: if it fails, saying why.
        """
