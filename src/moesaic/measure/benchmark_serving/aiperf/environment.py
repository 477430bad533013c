"""AIPerf's virtual environment; ``MOESAIC_AIPERF`` may name an installed program instead."""

from importlib.resources import files

from moesaic.core.own_environment import OwnEnvironment

AIPERF = OwnEnvironment(
    title="AIPerf",
    packages=("aiperf",),
    program="aiperf",
    variable="MOESAIC_AIPERF",
    pins=(files(__package__) / "constraints.txt").read_text(),
)
