"""Where AIPerf is: where ``MOESAIC_AIPERF`` says, or in an environment that is made once and kept."""

from importlib.resources import files

from moesaic.core.own_environment import OwnEnvironment

AIPERF = OwnEnvironment(
    title="AIPerf",
    packages=("aiperf",),
    program="aiperf",
    variable="MOESAIC_AIPERF",
    pins=(files(__package__) / "constraints.txt").read_text(),
)
