"""Put the outputs of all stages on one page, with its pictures and its numbers as files beside it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moesaic.measure.report.evidence import Evidence, read_evidence
from moesaic.measure.report.page import draw_pictures, render_page
from moesaic.measure.report.recovery import RecoveryEvidence, read_recovery
from moesaic.measure.report.serving import read_serving
from moesaic.measure.report.stage import ReportConfig
from moesaic.measure.report.summary import summarize_all
from moesaic.models.stage_outputs import read_json, read_text


def run(
    config: ReportConfig,
    *,
    ranking: Path,
    scores: Path,
    costs: Path,
    architecture: Path,
    evaluation_parent: Path,
    evaluation_child: Path,
    baselines: Sequence[Path],
    measurements: Path,
    recovery: Path | None = None,
    recovery_baseline: Path | None = None,
    evaluation_parent_fp8: Path | None = None,
    measurements_baseline: Path | None = None,
    serving: Path | None = None,
    output: Path,
    scratch: Path,
) -> dict[str, float]:
    """Write ``report.html``, one PNG per picture and ``summary.json``; about recovery and serving too, if given."""
    evidence = read_evidence(
        ranking=read_json(ranking / "ranking.json"),
        scores=read_json(scores / "scores.json"),
        costs=read_text(costs / "costs.json"),
        architecture=read_json(architecture / "architecture.json"),
        evaluation_parent=read_json(evaluation_parent / "evaluation.json"),
        evaluation_child=read_json(evaluation_child / "evaluation.json"),
        baselines=[read_json(directory / "evaluation.json") for directory in baselines],
        measurements=read_json(measurements / "measurements.json"),
    )
    recovered = served = None
    if recovery is not None:
        others = recovery_baseline, evaluation_parent_fp8, measurements_baseline
        recovered = _read_recovery(evidence, recovery, *others)
    if serving is not None:
        served = read_serving(read_json(serving / "measurements.json"), evidence, recovered)
    summary = summarize_all(evidence, recovered, served)
    pictures = draw_pictures(evidence, recovered, served)
    page = render_page(config.title, evidence, summary, pictures)
    for name, png in pictures.items():
        (output / f"{name}.png").write_bytes(png)
    (output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    (output / "report.html").write_text(page, encoding="utf-8")
    return _metrics(summary)


def _read_recovery(
    evidence: Evidence, recovery: Path, baseline: Path | None, parent_fp8: Path | None, measurements: Path | None
) -> RecoveryEvidence:
    return read_recovery(
        evidence,
        recovery=read_json(recovery / "recovery.json"),
        recovery_baseline=_read_optional(baseline, "recovery.json"),
        evaluation_parent_fp8=_read_optional(parent_fp8, "evaluation.json"),
        measurements_baseline=_read_optional(measurements, "measurements.json"),
    )


def _read_optional(directory: Path | None, name: str) -> dict[str, Any] | None:
    return None if directory is None else read_json(directory / name)


def _metrics(summary: dict[str, Any]) -> dict[str, float]:
    """Metrics of the child: the recovered one, if there is one."""
    metrics = {
        "parameters_ratio": summary["parameters"]["ratio"],
        "experts_ratio": summary["experts"]["ratio"],
        "request_efficiency": summary["request_efficiency"]["best"],
    }
    retained = {effort: entry["accuracy"]["retention"] for effort, entry in summary["efforts"].items()}
    if recovery := summary.get("recovery"):
        metrics["request_efficiency"] = recovery["request_efficiency"]["best"]
        metrics |= _per_effort("retention_pruned", retained)
        metrics |= _per_effort("tokens_ratio", recovery["tokens_ratio"])
        metrics |= _per_effort("recovered_by_distillation", recovery["recovered_by_distillation"])
        retained = recovery["retention"]
        if recovery["baseline"]:
            metrics["points_above_baseline"] = recovery["baseline"]["differences"]["averaged"]["mean"]["points"]
    metrics |= _per_effort("retention", retained)
    for context, entry in summary["throughput"].items():
        metrics[f"speedup_{context.replace('/', '_')}"] = entry["best"]["ratio"]
    if serving := summary.get("serving"):
        metrics["served_request_efficiency"] = serving["request_efficiency"]["best"]
        metrics |= {f"served_speedup_{name}": entry["ratio"] for name, entry in serving["tokens_per_s"].items()}
    return metrics


def _per_effort(name: str, values: Mapping[str, float | None]) -> dict[str, float]:
    return {f"{name}_{effort}": value for effort, value in values.items() if value is not None}
