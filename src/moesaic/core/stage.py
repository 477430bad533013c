"""What a stage says of itself: its name, its config, what it takes and hands on. Its room holds the rest.

A stage is a folder ``moesaic/<ring>/<name>`` with ``stage.py`` (config and declaration, imports nothing heavy),
``run.py`` (the function on files), ``needs.py`` (bytes, memory and time that it takes, and where it can run, for
``moesaic plan``; absent where it reads and writes small files only) and its mathematics in modules beside them.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

from moesaic.core.config import Config

Metrics = dict[str, float]


Kind = Literal["model", "dataset", "artifact"]
"""As Kubeflow types it: weights, a data set, or anything else."""
Runtime = Literal["search", "train", "rl", "serve", "kv"]
"""The image in which a stage runs, a folder of ``images/``."""


@dataclass(frozen=True)
class Port:
    """One input or output of a stage: a directory."""

    name: str
    content: str
    """What it holds, for people."""
    kind: Kind
    many: bool = False
    """Whether it is any number of directories."""
    optional: bool = False
    """Whether the stage does without."""
    by_manifest: bool = False
    """Whether the stage takes the manifest as it is; the files stay in the store."""


model = partial(Port, kind="model")
dataset = partial(Port, kind="dataset")
artifact = partial(Port, kind="artifact")


@dataclass(frozen=True)
class Stage:
    """The declaration of a stage; everything else that speaks of stages is derived from it or checked against it."""

    name: str
    config: type[Config]
    runtime: Runtime
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    """One is the output directory itself, several are folders inside it."""
    makes_weights: bool = False
    """Whether its output goes to the store, and only a manifest on to the next stage."""
    trains: bool = False
    """Whether its MLflow run exists from the start, so that its engine can log the curve as it grows."""
    reads_store: bool = False
    """Whether it also takes the store's directory, as ``store``."""
    reads_registry: bool = False
    """Whether it also takes the address of the model registry, as ``registry``."""
    alone: bool = False
    """Whether it times what it runs, so that on one machine nothing else may run beside it."""
    model_field: str = ""
    """The config field that names the model it makes, for a stage that begins a new one; empty for every other."""
    step_field: str = ""
    """The config field that tells it from other runs of the stage on one model; empty where the stage's name does."""
    returns: str = ""
    """A function of the runtime that makes a list for a loop out of its first output's path; empty for none."""

    @property
    def about(self) -> list[str]:
        """What it does, for people: the paragraphs of its ``stage.py``'s docstring, each as one line."""
        text = sys.modules[self.config.__module__].__doc__ or ""
        return [" ".join(paragraph.split()) for paragraph in text.strip().split("\n\n")]

    @property
    def required(self) -> tuple[str, ...]:
        """Names of the inputs that it cannot do without."""
        return tuple(port.name for port in self.inputs if not port.optional)

    @property
    def optional(self) -> tuple[str, ...]:
        """Names of the inputs that it does without."""
        return tuple(port.name for port in self.inputs if port.optional)

    @property
    def lists(self) -> tuple[str, ...]:
        """Names of the inputs that are any number of directories."""
        return tuple(port.name for port in self.inputs if port.many)

    @property
    def by_manifest(self) -> tuple[str, ...]:
        """Names of the inputs that it takes as manifests."""
        return tuple(port.name for port in self.inputs if port.by_manifest)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of what it hands on."""
        return tuple(port.name for port in self.outputs)

    @property
    def room(self) -> str:
        """The package that holds it, such as ``moesaic.search.prune_model``."""
        return self.config.__module__.rpartition(".")[0]

    @property
    def run(self) -> Callable[..., Metrics]:
        """The stage's function on files; its module is imported now."""
        function: Callable[..., Metrics] = import_module(f"{self.room}.run").run
        return function

    def planned_by(self, name: str) -> Callable[..., Any] | None:
        """A function of its ``needs.py``; None if it has none of that name.

        ``needs``: what a run of it takes, :class:`moesaic.costs.facts.Needs`; without one it takes small files only.
        ``check_placement``: whether it runs where a cluster puts it, :class:`moesaic.costs.facts.Placement`.
        ``check_inputs``: whether a run's parent and data sets are ones that its config can work on.
        ``simulate``: what it holds on a device at its peak, found by running it on tensors without values.
        ``check_memory``: whether a device has room for so many bytes, for a stage that knows best what would fit.
        """
        if find_spec(f"{self.room}.needs") is None:
            return None
        function: Callable[..., Any] | None = getattr(import_module(f"{self.room}.needs"), name, None)
        return function
