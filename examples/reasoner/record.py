"""Measure the exported model and write record.json: `python -m examples.reasoner.record --run DIR`."""

from pathlib import Path

from examples.reasoner.datasets import PLAN
from examples.reasoner.train import RECIPE
from examples.tiny_reasoner import record

BARS = {
    "low_mean": (37, 53),
    "medium_mean": (62, 78),
    "high_mean": (80, 96),
    "high_minus_low": (25, 100),
    "high_tokens_over_low_tokens": (2, 1000),
    "far_lost_without_full_attention": (30, 100),
    "lost_by_storing": (-100, 1),
}
"""What the numbers under `bars` of the record must lie between."""

if __name__ == "__main__":
    record.main(PLAN, RECIPE, Path(__file__).parent)
