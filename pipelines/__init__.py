"""The order of the stages and their resources (``search``), and complete, named values for them (``recipes``)."""

from pathlib import Path

MANIFESTS = Path(__file__).parents[1] / "manifests" / "pipelines"
"""Where the compiled pipelines are."""
