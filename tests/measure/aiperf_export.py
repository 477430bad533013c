"""What AIPerf reports of a small load."""

from typing import Any


def metric(avg: float, **others: float) -> dict[str, Any]:
    return {"unit": "any", "avg": avg, **others}


def export() -> dict[str, Any]:
    """The part that is read of what AIPerf 0.13.0 wrote of such a load on a tiny model, rounded."""
    lengths = {"output_sequence_length": metric(8.0, sum=48.0), "input_sequence_length": metric(32.0, sum=192.0)}
    warmup = {"output_sequence_length": metric(8.0, sum=16.0), "input_sequence_length": metric(32.0, sum=64.0)}
    return {
        "schema_version": "1.4",
        "was_cancelled": False,
        "is_complete": True,
        "error_summary": [],
        "request_throughput": metric(13.079),
        "request_count": metric(6.0),
        "output_token_throughput": metric(104.632),
        "time_to_first_token": metric(68.4, p50=71.7, p99=92.5, p90=83.2),
        "inter_token_latency": metric(10.7, p50=12.2, p99=16.6),
        "request_latency": metric(143.3, p50=157.4, p99=200.9),
        **lengths,
        "warmup_metrics": {"request_count": metric(2.0), **warmup},
    }
