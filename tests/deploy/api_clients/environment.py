"""The clients that our server is tried with, in a virtual environment of their own; ``make pins`` writes its pins."""

from pathlib import Path

from moesaic.core.own_environment import OwnEnvironment

API_CLIENTS = OwnEnvironment(
    title="clients",
    program="python",
    variable="MOESAIC_API_CLIENTS",
    pins=Path(__file__).with_name("constraints.txt"),
)
WANTED = ("langchain-openai", "litellm", "openai", "schemathesis")
