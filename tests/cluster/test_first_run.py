"""The first run of docs/cluster.md: its Job, as it is there."""

import time
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.pods import get, kubectl, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(2400)]
JOB = Path(__file__).parents[2] / "examples" / "small_cluster" / "first-run.yaml"


def test_the_first_run_ends_and_says_what_was_found(small: None, record: dict[str, Any]) -> None:
    begun = time.monotonic()
    kubectl("apply", "-f", str(JOB))
    ended = ("Complete", "Failed")

    def end() -> str | None:
        conditions = get("job", "first-run")["status"].get("conditions", [])
        return next((one["type"] for one in conditions if one["type"] in ended and one["status"] == "True"), None)

    how = wait_until(end, "the job ends", 2000)
    log = kubectl("logs", "job/first-run", "--tail=60")
    assert how == "Complete", log
    assert "Child:  /store/first-run/child" in log
    record["first_run_s"] = round(time.monotonic() - begun, 1)
