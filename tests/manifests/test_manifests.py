"""What is applied to a cluster: it builds, nothing in it is unknown to the API, and it is as tight as it says."""

import copy
import functools
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("kubernetes_validate", reason="validates against Kubernetes' schemas: pip install '.[dev]'")

from tests.manifests.validation import Object, beyond_restricted, pod_specifications, problems

FOLDER = Path(__file__).parents[2] / "manifests"
OVERLAYS = ("small-cpu", "single-node", "multi-node", "air-gapped")
CLUSTER_SCOPED = {"Namespace", "ResourceFlavor", "ClusterQueue"}
KUBECTL = shutil.which("kubectl", path=str(Path(sys.executable).parent)) or shutil.which("kubectl")
SECRETS = {
    "mlflow": {"backend-store-uri", "flask-secret-key", "basic_auth.ini"},
    "moesaic-store": {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"},
    "postgres": {"password"},
    "registry": set[str](),
}
"""Secrets that the manifests may refer to, and their keys; docs/cluster.md says how to make them."""

needs_kubectl = pytest.mark.skipif(KUBECTL is None, reason="builds overlays with kubectl: pip install '.[dev]'")


def written() -> list[Path]:
    """Every file of objects as it is written, before any overlay."""
    places = ("base", "components/*", "overlays/*", "../examples/small_cluster")
    paths = [path for place in places for path in FOLDER.glob(f"{place}/*.yaml")]
    return sorted(path for path in [*paths, *FOLDER.glob("jobs/*.yaml")] if path.name != "kustomization.yaml")


def objects_of(text: str) -> list[Object]:
    return [found for found in yaml.safe_load_all(text) if found]


@functools.cache
def built(overlay: str) -> str:
    assert KUBECTL
    command = [KUBECTL, "kustomize", str(FOLDER / "overlays" / overlay)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def every_overlay() -> Iterator[tuple[str, Object]]:
    for overlay in OVERLAYS:
        for found in objects_of(built(overlay)):
            yield overlay, found


def named(overlay: str) -> dict[tuple[str, str], Object]:
    return {(found["kind"], found["metadata"]["name"]): found for found in objects_of(built(overlay))}


def name_of(found: Object) -> str:
    return f"{found['kind']}/{found['metadata']['name']}"


def references(found: Any, field: str) -> Iterator[Any]:
    """Every value of a field, however deep."""
    if isinstance(found, dict):
        if field in found:
            yield found[field]
        for part in found.values():
            yield from references(part, field)
    elif isinstance(found, list):
        for part in found:
            yield from references(part, field)


@pytest.mark.parametrize("path", written(), ids=lambda path: str(path.relative_to(FOLDER.parent)))
def test_what_is_written_is_valid_even_without_kubectl(path: Path) -> None:
    found = objects_of(path.read_text())
    assert found
    for one in found:
        assert problems(one) == [], name_of(one)
        for pod in pod_specifications(one):
            assert beyond_restricted(pod) == [], name_of(one)


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("kustomization.yaml")), ids=lambda path: path.parent.name)
def test_kustomizations_list_every_file_beside_them(path: Path) -> None:
    listed = yaml.safe_load(path.read_text())["resources"]
    beside = {one.name for one in path.parent.glob("*.yaml")} - {"kustomization.yaml"}
    assert beside <= set(listed)
    assert all((path.parent / one).exists() for one in listed)


def test_jobs_are_templates_and_not_applied() -> None:
    assert {path.name for path in FOLDER.glob("jobs/*")} == {"rayjob.yaml", "trainjob.yaml"}
    for path in FOLDER.glob("jobs/*"):
        (job,) = objects_of(path.read_text())
        assert job["spec"]["suspend"] is True
        assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "moesaic"


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlays_build_into_valid_objects(overlay: str) -> None:
    found = objects_of(built(overlay))
    assert {name_of(one): problems(one) for one in found if problems(one)} == {}
    assert len(found) == len(named(overlay)) >= 11


@needs_kubectl
@pytest.mark.parametrize(
    ("kind", "place"),
    [
        ("Deployment", ("spec", "template", "spec", "containers", 0)),
        ("NetworkPolicy", ("spec",)),
        ("PersistentVolumeClaim", ("spec", "resources")),
        ("TrainingRuntime", ("spec", "template", "spec", "replicatedJobs", 0, "template", "spec", "template", "spec")),
        ("ClusterQueue", ("spec", "resourceGroups", 0, "flavors", 0)),
        ("LocalQueue", ("spec",)),
        ("ResourceFlavor", ("spec",)),
    ],
)
def test_an_unknown_field_is_found_however_deep(kind: str, place: tuple[str | int, ...]) -> None:
    found = copy.deepcopy(next(one for one in objects_of(built("single-node")) if one["kind"] == kind))
    inner: Any = found
    for step in place:
        inner = inner[step]
    inner["unheardOf"] = 1
    assert any("unheardOf" in problem for problem in problems(found))


@pytest.mark.parametrize("file", ["rayjob", "trainjob"])
def test_an_unknown_field_of_a_job_is_found(file: str) -> None:
    (job,) = objects_of((FOLDER / "jobs" / f"{file}.yaml").read_text())
    (job["spec"]["rayClusterSpec"] if file == "rayjob" else job["spec"]["trainer"])["podSpecOverrides"] = []
    assert any("podSpecOverrides" in problem for problem in problems(job))


@needs_kubectl
def test_every_pod_is_within_the_restricted_standard() -> None:
    pods = [(overlay, name_of(one), pod) for overlay, one in every_overlay() for pod in pod_specifications(one)]
    assert len(pods) == 1 + 3 + 2 + 3
    assert [(overlay, name, wrong) for overlay, name, pod in pods if (wrong := beyond_restricted(pod))] == []
    labels = named("single-node")["Namespace", "moesaic"]["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


def test_the_restricted_check_finds_what_it_is_for() -> None:
    (job,) = objects_of((FOLDER / "jobs/rayjob.yaml").read_text())
    pod = pod_specifications(job)[0]
    container = pod["containers"][0]
    pod["securityContext"]["runAsUser"] = 0
    pod["volumes"].append({"name": "disk", "hostPath": {"path": "/"}})
    container["securityContext"] = {"capabilities": {"drop": ["ALL"], "add": ["SYS_ADMIN"]}}
    pod["hostNetwork"] = True
    assert beyond_restricted(pod) == [
        "may run as root",
        "hostNetwork is set",
        "volume disk",
        "ray may gain privileges",
        "ray keeps capabilities",
        "ray may write to its root file system",
    ]


@needs_kubectl
def test_rights_are_within_the_namespace_and_name_what_they_are_for() -> None:
    assert not any(one["kind"] in ("ClusterRole", "ClusterRoleBinding", "Secret") for _, one in every_overlay())
    rules = named("single-node")["Role", "moesaic-pipeline"]["rules"]
    assert "*" not in [word for rule in rules for field in ("apiGroups", "resources", "verbs") for word in rule[field]]
    changed = {
        resource for rule in rules for resource in rule["resources"] if {"create", "delete"} & set(rule["verbs"])
    }
    assert changed == {"workflowtaskresults", "trainjobs", "rayjobs"}
    (secrets,) = [rule for rule in rules if "secrets" in rule["resources"]]
    assert secrets["verbs"] == ["get"]
    assert secrets["resourceNames"] == ["mlpipeline-minio-artifact"]


@needs_kubectl
def test_secrets_are_only_referred_to_and_documented() -> None:
    documented = (FOLDER.parent / "docs" / "cluster.md").read_text()
    for overlay, one in every_overlay():
        by_key = [(reference["name"], reference["key"]) for reference in references(one, "secretKeyRef")]
        for volume in references(one, "secret"):
            by_key += [(volume["secretName"], item["key"]) for item in volume.get("items", [])]
            assert volume["secretName"] in SECRETS
        pulled = [reference["name"] for group in references(one, "imagePullSecrets") for reference in group]
        for name, key in [*by_key, *((name, None) for name in pulled)]:
            assert key is None or key in SECRETS[name], f"{overlay}: {name_of(one)} asks for {key} of {name}"
            assert f"`{name}`" in documented
        for variable in (entry for entries in references(one, "env") for entry in entries):
            assert "value" not in variable or not any(word in variable["name"] for word in ("KEY", "TOKEN", "SECRET"))


@needs_kubectl
def test_what_is_named_is_there() -> None:
    for overlay in OVERLAYS:
        found = named(overlay)
        for one in found.values():
            names = {"serviceAccountName": "ServiceAccount", "claimName": "PersistentVolumeClaim"}
            for field, kind in names.items():
                assert all((kind, name) in found for name in references(one, field)), name_of(one)
            assert ("metadata" in one) and (one["kind"] in CLUSTER_SCOPED) != ("namespace" in one["metadata"])
            assert one["metadata"].get("namespace", "moesaic") == "moesaic"
        assert ("ClusterQueue", found["LocalQueue", "moesaic"]["spec"]["clusterQueue"]) in found
        (group,) = found["ClusterQueue", "moesaic"]["spec"]["resourceGroups"]
        assert [("ResourceFlavor", flavor["name"]) in found for flavor in group["flavors"]] == [True]
        pods = [one["spec"]["template"]["metadata"]["labels"] for (kind, _), one in found.items() if kind in WORKLOADS]
        for (kind, _), one in found.items():
            if kind == "Service":
                assert any(one["spec"]["selector"].items() <= labels.items() for labels in pods)


WORKLOADS = {"Deployment", "StatefulSet"}


@needs_kubectl
def test_images_are_pinned_and_come_from_where_the_overlay_says() -> None:
    for overlay, one in every_overlay():
        for image in (container["image"] for pod in pod_specifications(one) for container in pod["containers"]):
            tag = image.rpartition(":")[2]
            assert tag[0].isdigit() or tag[0] == "v"
            assert image.startswith("registry.internal/") == (overlay == "air-gapped")
            assert image.startswith("localhost:5000/moesaic/cpu:") == (overlay == "small-cpu")


@needs_kubectl
def test_ingress_is_denied_but_where_a_policy_allows_it() -> None:
    for overlay in OVERLAYS:
        policies = [one["spec"] for one in objects_of(built(overlay)) if one["kind"] == "NetworkPolicy"]
        assert {"podSelector": {}, "policyTypes": ["Ingress"]} in policies
        for policy in policies:
            assert all(rule.get("from") and rule.get("ports") for rule in policy.get("ingress", [])) or (
                policy["podSelector"] == {"matchLabels": {"moesaic/role": "trainer"}}
            )


@needs_kubectl
def test_the_air_gapped_overlay_lets_mlflow_reach_private_addresses_alone() -> None:
    egress = named("air-gapped")["NetworkPolicy", "mlflow"]["spec"]["egress"]
    assert all(rule.get("to") for rule in egress)
    assert [rule["cidr"] for rule in references(egress, "ipBlock")] == ["10.0.0.0/8"]


def test_two_jobs_ask_for_what_the_base_gives() -> None:
    runtime = objects_of((FOLDER / "base/training-runtime.yaml").read_text())[0]
    (trainjob,) = objects_of((FOLDER / "jobs/trainjob.yaml").read_text())
    assert trainjob["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    patched = trainjob["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    assert patched[0]["name"] == runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["name"]
