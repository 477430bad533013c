"""From the recovered child to what is served: export, measure through a server, and put forward in the registry.

    parent -> export_engine -+
    child  -> export_engine -+-> benchmark_serving
                             +-> validate_bundle -> promote (of child and report)

Parent and child are measured as they would be deployed: the bundles, one after the other on the same machine.
"""

from dataclasses import dataclass
from typing import Any

from components.benchmark_serving.component import benchmark_serving
from components.export_engine.component import export_engine
from components.promote.component import promote
from components.validate_bundle.component import validate_bundle


@dataclass(frozen=True)
class DeploymentConfigs:
    """Pipeline parameters: one config, as JSON, for each of the stages; ``version`` is the code's."""

    version: Any
    export_engine: Any
    validate_bundle: Any
    benchmark_serving: Any
    promote: Any


@dataclass(frozen=True)
class Deployment:
    """What the tasks of :func:`deploy` hand on."""

    bundle: Any
    """Of the child."""
    verdict: Any
    """Of an engine on that bundle."""
    serving: Any


def deploy(configs: DeploymentConfigs, parent: Any, child: Any, prompts: Any) -> Deployment:
    """Add the tasks to the pipeline that is being described; both models have the scales of an FP8 cache."""

    def export(model: Any) -> Any:
        return export_engine(config=configs.export_engine, version=configs.version, child=model).outputs["bundle"]

    bundle = export(child)
    verdict = validate_bundle(
        config=configs.validate_bundle, version=configs.version, bundle=bundle, prompts=prompts
    ).outputs["verdict"]
    measured = benchmark_serving(
        config=configs.benchmark_serving, version=configs.version, parent=export(parent), child=bundle
    )
    return Deployment(bundle, verdict, measured.outputs["serving"])


def put_forward(configs: DeploymentConfigs, child: Any, report: Any, deployed: Deployment) -> Any:
    """Add the registry's gate; it is asked anew in every run, as the registry may have changed since. What it said."""
    asked = promote(
        config=configs.promote,
        version=configs.version,
        child=child,
        report=report,
        bundle=deployed.bundle,
        verdict=deployed.verdict,
    )
    asked.set_caching_options(False)
    return asked.outputs["promotion"]
