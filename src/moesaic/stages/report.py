"""Put the outputs of all stages on one page, with its pictures and its numbers as files beside it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moesaic.configs import ReportConfig
from moesaic.report.evidence import read_evidence
from moesaic.report.findings import summarize
from moesaic.report.page import draw_pictures, render_page
from moesaic.stages.payloads import read_json, read_text


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
    output: Path,
    scratch: Path,
) -> dict[str, float]:
    """Write ``report.html``, one PNG per picture and ``summary.json``."""
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
    summary, pictures = summarize(evidence), draw_pictures(evidence)
    page = render_page(config.title, evidence, summary, pictures)
    for picture in pictures:
        (output / f"{picture.name}.png").write_bytes(picture.png)
    (output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    (output / "report.html").write_text(page, encoding="utf-8")
    return _metrics(summary)


def _metrics(summary: dict[str, Any]) -> dict[str, float]:
    metrics = {
        "parameters_ratio": summary["parameters"]["ratio"],
        "experts_ratio": summary["experts"]["ratio"],
        "request_efficiency": summary["request_efficiency"]["best"],
    }
    for effort, found in summary["efforts"].items():
        if found["accuracy"]["retention"] is not None:
            metrics[f"retention_{effort}"] = found["accuracy"]["retention"]
    for context, found in summary["throughput"].items():
        metrics[f"speedup_{context.replace('/', '_')}"] = found["best"]["ratio"]
    return metrics
