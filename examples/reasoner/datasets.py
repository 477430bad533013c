"""The committed problems: `python -m examples.reasoner.datasets`; `--published 1000` writes those of a record."""

from pathlib import Path

from examples.reasoner.tasks import SUITE
from examples.tiny_reasoner import datasets

PLAN = datasets.Plan(
    SUITE,
    seeds={"test": 201, "calibration_short": 202, "calibration_long": 203, "prompts": 204, "validation": 205},
    num_test=100,
    num_validation=60,
    num_prompts=dict.fromkeys(SUITE.short, 400) | dict.fromkeys(SUITE.far, 50),
)

if __name__ == "__main__":
    datasets.main(PLAN, Path(__file__).parent / "data")
