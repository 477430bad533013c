"""AIPerf's ``profile_export_aiperf.json``, schema 1.x, read into the sweep's terms."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moesaic.core.errors import StageError
from moesaic.measure.benchmark_serving.load_sweep import Counts, Latency, LoadRun

EXPORT = "profile_export_aiperf.json"
"""The name of AIPerf's summary file."""


def read_export(path: Path) -> LoadRun:
    """One run, warm-up apart.

    Raises:
        StageError: if there is no whole export, or it lacks a figure; every request may have failed.
    """
    try:
        content: Mapping[str, Any] = json.loads(path.read_text())
        if content.get("was_cancelled") or content.get("is_complete") is False:
            raise StageError(
                f"AIPerf did not finish: {content.get('incomplete_reason') or 'it was cancelled'} ({path})"
            )
        warmup = content.get("warmup_metrics") or {}
        return LoadRun(
            counts=_counts(content),
            warmup=_counts(warmup) if warmup else Counts(0, 0, 0),
            errors=_errors(content) + _errors(warmup),
            requests_per_s=float(content["request_throughput"]["avg"]),
            tokens_per_s=float(content["output_token_throughput"]["avg"]),
            mean_output_tokens=float(content["output_sequence_length"]["avg"]),
            ttft_ms=_latency(content["time_to_first_token"]),
            itl_ms=_latency(content["inter_token_latency"]),
            request_ms=_latency(content["request_latency"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as broken:
        raise StageError(f"{path} is no whole export of AIPerf ({broken!r}){_said_errors(path)}") from broken


def _counts(metrics: Mapping[str, Any]) -> Counts:
    lengths = (metrics[f"{side}_sequence_length"]["sum"] for side in ("input", "output"))
    return Counts(int(metrics["request_count"]["avg"]), *(int(total) for total in lengths))


def _errors(metrics: Mapping[str, Any]) -> int:
    return int(metrics.get("error_request_count", {}).get("avg", 0))


def _latency(metric: Mapping[str, Any]) -> Latency:
    return Latency(float(metric["avg"]), float(metric["p50"]), float(metric["p99"]))


def _said_errors(path: Path) -> str:
    """What AIPerf itself says of requests that failed."""
    try:
        summary = json.loads(path.read_text()).get("error_summary") or []
    except (OSError, ValueError):
        return ""
    return "; requests failed: " + json.dumps(summary)[:500] if summary else ""
