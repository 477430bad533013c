"""Machines beside this one that a stage may be given: what it asks of them. A cluster's jobs are such (platform)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Work:
    """What the nodes run."""

    command: Sequence[str]
    """The same program and arguments as on one machine, but for how processes of several nodes meet."""
    environment: Mapping[str, str]
    """Variables beside those that the nodes have anyway."""
    log: Path
    """A copy of all that the first node prints."""


class Nodes(Protocol):
    """Nodes on which a stage runs its engine's processes."""

    @property
    def num_nodes(self) -> int:
        """How many there are."""

    @property
    def gpus_per_node(self) -> int:
        """GPUs of each; 0 for nodes without."""

    @property
    def processes_per_node(self) -> int:
        """One for each GPU, one where there is none."""

    def visible(self, name: str, path: Path, scratch: Path) -> Path:
        """An input where all nodes see it: itself, or a copy in ``scratch``.

        Raises:
            ConfigError: if the nodes do not see ``scratch`` either.
        """

    def run(self, work: Work, *, prepare: Callable[[], None], show: Callable[[str], None]) -> None:
        """Run it to its end.

        Args:
            work: the command.
            prepare: writes what the command reads; called before work is started, not for work that runs already.
            show: is given every line of the log.

        Raises:
            StageError: if it fails, saying why.
        """
