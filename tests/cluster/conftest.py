"""A real cluster, named by KUBECONFIG: `make test-cluster`; docs/cluster.md says what it must have."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moesaic.platform.cluster import ClusterProfile, read_profile
from tests.cluster.pods import KUBECTL, NAMESPACE, Reader, get, give_back, kubectl, wait_until

MANIFESTS = Path(__file__).parents[2] / "manifests"
OVERLAY = MANIFESTS / "overlays" / "small-cpu"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that apply and remove overlays come before those that share one for the rest of the session."""
    items.sort(key=lambda item: "small" in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session", autouse=True)
def cluster() -> None:
    """Skip without a cluster; fail if it does not answer, or has what these tests would remove."""
    if not os.environ.get("KUBECONFIG"):
        pytest.skip("KUBECONFIG names no cluster")
    kubectl("get", "nodes", "--request-timeout=20s")
    if f"namespace/{NAMESPACE}" in kubectl("get", "ns", "-o", "name").split():
        pytest.exit(f"the cluster has a namespace {NAMESPACE}, which these tests remove; delete it, or take another", 2)


@pytest.fixture(scope="session")
def record() -> Iterator[dict[str, Any]]:
    """What is measured; MOESAIC_CLUSTER_RECORD names the file that gets it."""
    begun, measured = time.monotonic(), dict[str, Any]()
    yield measured
    if path := os.environ.get("MOESAIC_CLUSTER_RECORD"):
        server = json.loads(kubectl("version", "-o", "json"))["serverVersion"]["gitVersion"]
        whole = {"kubernetes": server, "total_s": round(time.monotonic() - begun), **measured}
        Path(path).write_text(json.dumps(whole, indent=1, sort_keys=True) + "\n")


@pytest.fixture(scope="session")
def profile() -> ClusterProfile:
    """The small cluster's; MOESAIC_CLUSTER_IMAGE names another image than it does."""
    found = read_profile(MANIFESTS / "profiles" / "small-cpu.yaml")
    image = os.environ.get("MOESAIC_CLUSTER_IMAGE")
    return found.but(image=image, registry=None) if image else found


@pytest.fixture(scope="session")
def small(cluster: None) -> Iterator[None]:
    """The small overlay, applied for all tests that need it and removed after them."""
    kubectl("apply", "--server-side", "-k", str(OVERLAY))
    wait_until(lambda: "moesaic-pipeline" in kubectl("get", "sa", "-o", "name"), "the overlay is there")
    yield
    remove(OVERLAY)


@pytest.fixture(scope="session")
def reader(small: None, profile: ClusterProfile) -> Reader:
    return Reader(profile)


def remove(overlay: Path) -> None:
    """Remove an overlay, and wait until its namespace has gone."""
    volumes = [claim["spec"].get("volumeName") for claim in get("pvc")["items"]]
    kubectl("delete", "trainjobs,rayjobs,jobs,pods", "--all", "--wait", "--timeout=60s", check=False)
    kubectl("delete", "-k", str(overlay), "--ignore-not-found", "--wait", "--timeout=120s")
    wait_until(lambda: NAMESPACE not in kubectl("get", "ns", "-o", "name"), "the namespace has gone")
    give_back([name for name in volumes if name])


__all__ = ["KUBECTL", "remove"]
