"""Other people's clients of the OpenAI API take our server for one: openai, langchain-openai, litellm, schemathesis."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moesaic.core.own_environment import own_variables
from moesaic.deploy.server.process import load
from tests.deploy.api_clients.environment import API_CLIENTS
from tests.deploy.test_server import LIMITS, Running

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]
DRIVE = Path(__file__).with_name("api_clients") / "drive.py"
EXAMPLES = 60
"""Requests of each kind to each endpoint that schemathesis makes up."""


@pytest.fixture(scope="module")
def server(tiny_parent: Path) -> Iterator[Running]:
    running = Running(load(tiny_parent, "tiny", "bf16", "float32", LIMITS))
    yield running
    running.stop()


def run(*command: str | Path, directory: Path) -> "subprocess.CompletedProcess[str]":
    own = own_variables() | {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "PYTHONWARNINGS": "ignore", "NO_COLOR": "1"}
    return subprocess.run(
        list(map(str, command)), env=own, cwd=directory, capture_output=True, text=True, timeout=600, check=False
    )


@pytest.fixture(scope="module")
def found(server: Running, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the clients report."""
    python = API_CLIENTS.find_program()
    done = run(python, DRIVE, f"{server.url}/v1", directory=tmp_path_factory.mktemp("clients"))
    assert done.returncode == 0, done.stderr[-3000:]
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def test_openai(server: Running, found: dict[str, Any]) -> None:
    seen = found["openai"]
    assert (seen["models"], seen["retrieved"], seen["gathered"]) == (["tiny"], "tiny", "assistant")
    assert seen["streamed"] == (seen["reasoning"] or "") and seen["reasoning"]
    assert len(seen["again"]) == 1, "whichever way the reply was written down, it is the same history"
    assert seen["usage"][0] == seen["usage"][1]
    assert len(set(seen["async"])) == 1
    assert "there is no model 'other'" in seen["refused"]["model"]
    assert "part 0 is of type 'image_url'" in seen["refused"]["image"]


def test_langchain_and_litellm_see_what_openai_sees(found: dict[str, Any]) -> None:
    openai, langchain, litellm = found["openai"], found["langchain"], found["litellm"]
    assert langchain["batch"] == 2 and langchain["again"] > 0
    assert langchain["streamed"] == langchain["usage"]
    assert litellm["reasoning"] == litellm["streamed"] == openai["reasoning"]
    assert litellm["usage"] == openai["usage"][0]
    assert litellm["again"] == openai["again"]
    assert langchain["text"] == litellm["text"] == openai["text"]


def test_requests_by_the_servers_own_description(server: Running, tmp_path: Path) -> None:
    """The server also refuses what fits the description and only adds up to too much; nothing ever fails."""
    program = API_CLIENTS.find_program().with_name("schemathesis")
    options = ("--max-examples", EXAMPLES, "--exclude-checks", "positive_data_acceptance", "--seed", 1, "--workers", 2)
    done = run(program, "run", f"{server.url}/openapi.json", *map(str, options), directory=tmp_path)
    assert done.returncode == 0, done.stdout[-5000:]
    counted = re.search(r"(\d+) generated", done.stdout)
    print(counted[0] if counted else done.stdout[-800:])
