"""The content of ``summary.json``, and the verdict that the page leads with: accuracy and requests per second of the
child as it is deployed, against its parent.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from moesaic.measure.paired import difference
from moesaic.measure.report.evidence import Evaluation, Evidence, common_efforts
from moesaic.measure.report.findings import summarize
from moesaic.measure.report.recovery import AVERAGED, RecoveryEvidence, summarize_recovery
from moesaic.measure.report.serving import ServingEvidence, summarize_serving


def summarize_all(
    evidence: Evidence, recovery: RecoveryEvidence | None = None, serving: ServingEvidence | None = None
) -> dict[str, Any]:
    """Everything that the page and the gate say, of what there is."""
    summary = summarize(evidence)
    if recovery:
        summary["recovery"] = summarize_recovery(recovery)
    if serving:
        summary["serving"] = summarize_serving(serving)
    return summary | {"verdict": _verdict(_deployed(evidence, recovery, serving), summary)}


def _deployed(
    evidence: Evidence, recovery: RecoveryEvidence | None, serving: ServingEvidence | None
) -> Mapping[str, Evaluation]:
    """How both models answer: as they are served, or else after recovery, or else after pruning."""
    if serving:
        return serving.evaluations
    if recovery:
        return {"parent": recovery.parent, "child": recovery.child.stages[AVERAGED]}
    return evidence.evaluations


def _verdict(models: Mapping[str, Evaluation], summary: Mapping[str, Any]) -> dict[str, Any]:
    """By effort the difference in accuracy, who is ahead by its interval, and requests per second over the parent's.

    Speed is the engine's where both were served. Both of one workload: the longest, at the best number of users.
    """
    efforts = common_efforts(models.values())
    parent, child = (models[name] for name in ("parent", "child"))
    found = {effort: difference(child.efforts[effort].verdicts, parent.efforts[effort].verdicts) for effort in efforts}
    recovery, serving = summary.get("recovery"), summary.get("serving")
    if serving:
        rates, throughput = serving["request_efficiency"]["child_over_parent"], serving["tokens_per_s"]
    else:
        rates = (
            recovery["request_efficiency"]["equal_effort"]
            if recovery
            else summary["request_efficiency"]["child_over_parent"]
        )
        throughput = {f"{name} tokens": entry["best"] for name, entry in summary["throughput"].items()}
    return {
        "differences": {effort: asdict(each) for effort, each in found.items()},
        "ahead": [effort for effort, each in found.items() if each.sign > 0],
        "behind": [effort for effort, each in found.items() if each.sign < 0],
        "not_told_apart": [effort for effort, each in found.items() if each.sign == 0],
        "requests_per_s": {effort: rates[effort] for effort in efforts},
        "tokens_per_s": {name: entry["ratio"] for name, entry in throughput.items()},
        "engine": serving["engine"] if serving else None,
    }
