"""Every image as a pod under the `restricted` standard, its root file system read-only: what of it is usable."""

from typing import Any

import pytest

from images.requirements import RUNTIMES
from moesaic.platform.cluster import ClusterProfile
from tests.cluster.pods import apply, get, image_of, kubectl, needs_images, restricted_pod, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]
WRITABLE = {"/scratch", "/tmp", "/dev/shm", "/dev/mqueue", "/store"}
_LOOK = (
    "moesaic doctor && find / -xdev -type d -writable -not -path '/proc/*' -prune 2>/dev/null | sed 's/^/writable /'"
)


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs_images(name)) for name in RUNTIMES])
def test_an_image_says_what_is_usable_and_writes_nowhere_else(
    name: str, small: None, profile: ClusterProfile, record: dict[str, Any]
) -> None:
    image = profile.image_for("ingest", "") if name == "cpu" else image_of(name)
    asked = {"requests": {"cpu": "50m", "memory": "256Mi"}}
    container = {"image": image, "command": ["sh", "-c", _LOOK], "resources": asked}
    pod = restricted_pod(container, profile)
    apply({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"look-{name}"}, "spec": pod})
    ended = ("Succeeded", "Failed")
    phase = wait_until(
        lambda: (p := get("pod", f"look-{name}")["status"]["phase"]) in ended and p, "the pod ends", 1000
    )
    said = kubectl("logs", f"look-{name}")
    assert phase == "Succeeded", said
    lines = said.splitlines()
    assert {line.removeprefix("writable ") for line in lines if line.startswith("writable ")} <= WRITABLE
    assert "torch" in said
    record.setdefault("doctor", {})[name] = [line for line in lines if line and not line.startswith("writable ")]
