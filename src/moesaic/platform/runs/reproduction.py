"""The recipe of a run, read back from the records of its stages: every value as it was, whatever recipes say today.

Most stages run once in a pipeline, so their config is the recipe's. Where a stage runs several times, the way to it
says which run it is: the child of the report's evaluation is the last round's, what it was cut from an earlier one's.
"""

from collections.abc import Mapping
from typing import Any

from moesaic.core.errors import ArtifactError
from moesaic.platform.runs.lineage import Origin, origins

Values = dict[str, Any]


def recipe_values(report: Origin, *others: Origin) -> Values:
    """The values of the recipe that a report, and so the child that it is about, was made with.

    ``others`` were made beside it by the same run, such as the child's engine.

    Raises:
        ArtifactError: if records are missing, so that the recipe cannot be told.
    """
    pruned = _one(_one(report.given("evaluation_child"), "the child's evaluation").given("model"), "the child")
    values = _unambiguous(report, *others) | _of_rounds(pruned)
    values["evaluate"] = _one(report.given("evaluation_child"), "the child's evaluation").record.config
    values["policies"] = []
    for gathered in report.given("recovery"):
        averaged = _one(_one(gathered.given("evaluation_averaged"), "averaging").given("model"), "the averaged child")
        policies = averaged.given("policies")
        values["policies"] = [policy.record.config for policy in policies]
        values["distill"] = _one(_one(policies[:1], "a policy").given("model"), "distillation").record.config
        values.setdefault("earlier_distill", values["distill"])
    values["baseline"] = None
    for gathered in report.given("recovery_baseline"):
        evaluation = _one(gathered.given("evaluation_pruned"), "the baseline's evaluation")
        values["baseline"] = _one(evaluation.given("model"), "the baseline").record.config
    return values


def pipeline_of(report: Origin) -> str:
    """The name of the pipeline: ``compress`` recovers its child, ``search`` does not."""
    return "compress" if report.given("recovery") else "search"


def _unambiguous(*roots: Origin) -> Values:
    """Configs of the stages that ran with one config only, however often."""
    configs: dict[str, dict[str, Mapping[str, Any]]] = {}
    for root in roots:
        for origin in origins(root).values():
            configs.setdefault(origin.stage, {})[origin.record.config_digest] = origin.record.config
    return {stage: next(iter(by_digest.values())) for stage, by_digest in configs.items() if len(by_digest) == 1}


def _of_rounds(pruned: Origin) -> Values:
    """What the last round of pruning was, what the earlier ones were, and how many there were."""
    search, refined = _searched(pruned)
    values: Values = {
        "prune_model": pruned.record.config,
        "refine_architecture": refined.record.config,
        "search_architecture": search.record.config,
    }
    rounds, earlier, before = 1, search, _one(pruned.given("parent"), "the parent")
    while before.stage == "distill":
        values["earlier_distill"] = before.record.config
        pruned = _one(before.given("child"), "an earlier child")
        while pruned.stage != "prune_model":
            pruned = _one(pruned.given("child"), "an earlier child")
        earlier, _ = _searched(pruned)
        before = _one(pruned.given("parent"), "the parent")
        rounds += 1
    return values | {"earlier_search_architecture": earlier.record.config, "rounds": rounds}


def _searched(pruned: Origin) -> tuple[Origin, Origin]:
    """The search that chose a pruned child, and its refinement."""
    refined = _one(pruned.given("architecture"), "the refined search")
    return _one(refined.given("architecture"), "the search"), refined


def _one(matches: tuple[Origin, ...], what: str) -> Origin:
    if len(matches) != 1:
        raise ArtifactError(f"the recipe cannot be told: the record of {what} is not in the store")
    return matches[0]
