"""A real cluster, named by KUBECONFIG: `make test-cluster`; docs/cluster.md says what it must have."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moesaic.data.sets import DataSets
from moesaic.pipelines import example
from moesaic.platform.cluster import ClusterProfile, read_profile
from moesaic.platform.ingest.stage import IngestConfig
from moesaic.platform.runs.records import describe_hardware, installed_versions
from moesaic.platform.store import Store
from tests.cluster.pods import KUBECTL, NAMESPACE, STORE, Reader, get, give_back, kubectl, volume_here, wait_until

MANIFESTS = Path(__file__).parents[2] / "manifests"
OVERLAY = MANIFESTS / "overlays" / "small-cpu"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that apply and remove overlays come before those that share one; images that one test alone pulls, last."""
    items.sort(key=lambda item: ("small" in getattr(item, "fixturenames", ()), item.path.name == "test_images.py"))


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
        whole = {
            "command": "make test-cluster",
            "versions": versions(),
            "hardware": describe_hardware(),
            "images": sorted({image for node in get("nodes")["items"] for image in our_images(node)}),
            "outcomes": OUTCOMES,
            "measured": measured | {"total_s": round(time.monotonic() - begun)},
        }
        Path(path).write_text(json.dumps(whole, indent=1) + "\n")


def versions() -> dict[str, str]:
    """Of Kubernetes and of what runs here; of controllers those of MOESAIC_CLUSTER_VERSIONS, as they tell none."""
    kubernetes = json.loads(kubectl("version", "-o", "json"))["serverVersion"]["gitVersion"]
    told = dict(one.split("=", 1) for one in os.environ.get("MOESAIC_CLUSTER_VERSIONS", "").split())
    return {"kubernetes": kubernetes, **told, **installed_versions()}


OUTCOMES: dict[str, dict[str, Any]] = {}
"""Of every test: how it ended, and its seconds without those of its fixtures."""


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        OUTCOMES[report.nodeid.partition("::")[2]] = {"outcome": report.outcome, "seconds": round(report.duration, 1)}


def our_images(node: dict[str, Any]) -> list[str]:
    """Those of this project that a node has pulled, by digest."""
    return [name for one in node["status"]["images"] for name in one["names"] if "moesaic/" in name and "@" in name]


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


@pytest.fixture(scope="session")
def ingest(reader: Reader, tmp_path_factory: pytest.TempPathFactory) -> IngestConfig:
    """The inputs, put into the volume's store by root where the volume lies here, else by a pod."""
    local = tmp_path_factory.mktemp("inputs") / "store"
    config = put_inputs(Store.at(local))
    if os.geteuid() == 0 and (volume := volume_here()):
        assert put_inputs(Store.at(volume)) == config
    else:
        kubectl("cp", f"{local}/.", f"{reader.name}:{STORE}")
    return config


def put_inputs(store: Store) -> IngestConfig:
    parent = store.add_directory(example() / "parent", "model", format="safetensors", producer="test").id
    sets = DataSets.at(example() / "data")
    ids = {
        name: store.add_file(getattr(sets, name), "dataset", format="jsonl", producer="test").id
        for name in ("calibration_short", "calibration_long", "prompts", "tests")
    }
    return IngestConfig(parent=parent, **ids)


def remove(overlay: Path) -> None:
    """Remove an overlay, and wait until its namespace has gone."""
    volumes = [claim["spec"].get("volumeName") for claim in get("pvc")["items"]]
    kubectl("delete", "trainjobs,rayjobs,jobs,pods", "--all", "--wait", "--timeout=300s", check=False)
    kubectl("delete", "-k", str(overlay), "--ignore-not-found", "--wait", "--timeout=400s")
    wait_until(lambda: NAMESPACE not in kubectl("get", "ns", "-o", "name"), "the namespace has gone")
    give_back([name for name in volumes if name])


__all__ = ["KUBECTL", "remove"]
