"""AIPerf's virtual environment; ``MOESAIC_AIPERF`` may name an installed program instead."""

from pathlib import Path

from moesaic.core.own_environment import OwnEnvironment

AIPERF = OwnEnvironment(
    title="AIPerf",
    program="aiperf",
    variable="MOESAIC_AIPERF",
    pins=Path(__file__).with_name("constraints.txt"),
)
