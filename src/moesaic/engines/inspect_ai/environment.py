"""Where inspect-ai is: where ``MOESAIC_INSPECT`` says, or in an environment that is made once and kept."""

from importlib.resources import files

from moesaic.engines.own_environment import OwnEnvironment

INSPECT = OwnEnvironment(
    title="inspect-ai",
    packages=("inspect-ai", "openai", "math-verify"),
    program="inspect",
    variable="MOESAIC_INSPECT",
    pins=(files(__package__) / "constraints.txt").read_text(),
)
