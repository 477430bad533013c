"""Importing the outer packages is cheap: no torch, no transformers, no MLflow."""

import json
import subprocess
import sys

import pytest

HEAVY = ["torch", "transformers", "mlflow", "matplotlib", "highspy"]


@pytest.mark.parametrize(
    "module",
    [
        "moesaic",
        "moesaic.command_line.main",
        "moesaic.pipelines.recipes",
        "moesaic.platform.runs.runtime",
        "pipelines",
        "pipelines.search",
        "moesaic.pipelines.recipes",
    ],
)
def test_importing_loads_nothing_heavy(module: str) -> None:
    code = f"import json, sys, {module}; print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert json.loads(loaded) == []
