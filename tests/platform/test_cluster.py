"""Cluster profiles are checked, and give the tasks of the compiled pipelines what they say, byte for byte the same."""

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

from moesaic.core.config import Config
from moesaic.core.errors import ArtifactError, ConfigError
from moesaic.pipelines import compiled
from moesaic.platform.cluster import ClusterProfile, place, placed_text, read_profile
from moesaic.stages import STAGES

PROFILES = Path(__file__).parents[2] / "manifests" / "profiles"
SMALL: dict[str, Any] = {
    "default": "cpu",
    "nodes": {
        "cpu": {"cpu": 2, "memory": "4Gi"},
        "gpu": {
            "cpu": 8,
            "memory": "64Gi",
            "accelerators": 2,
            "shared_memory": "8Gi",
            "selector": {"pool": "h100"},
            "tolerations": [{"key": "nvidia.com/gpu", "effect": "NoSchedule"}],
        },
    },
    "stages": {"score_blocks": "gpu"},
}


def profile(**changes: Any) -> ClusterProfile:
    return ClusterProfile.model_validate(SMALL | changes)


@functools.cache
def parsed(name: str) -> dict[str, Any]:
    """A compiled pipeline; placing leaves it as it is."""
    found: dict[str, Any] = yaml.safe_load(compiled()[name].read_text())
    return found


def search() -> dict[str, Any]:
    return copy.deepcopy(parsed("search"))


def placed(**changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Containers and platform configs of the search pipeline, by executor."""
    pipeline, platform = place(search(), profile(**changes), STAGES)
    containers = {name: one["container"] for name, one in pipeline["deploymentSpec"]["executors"].items()}
    return containers, platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


def test_every_task_gets_what_its_stage_is_given() -> None:
    containers, platform = placed()
    resources = containers["exec-score-blocks"]["resources"]
    assert resources == {
        "resourceCpuRequest": "8",
        "resourceCpuLimit": "8",
        "resourceMemoryRequest": "64Gi",
        "resourceMemoryLimit": "64Gi",
        "accelerator": {"resourceType": "nvidia.com/gpu", "resourceCount": "2"},
    }
    assert platform["exec-score-blocks"]["nodeSelector"] == {"labels": {"pool": "h100"}}
    assert platform["exec-score-blocks"]["tolerations"] == [
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    ]
    shared = {"volumeName": "shared-memory", "mountPath": "/dev/shm", "medium": "Memory", "sizeLimit": "8Gi"}
    assert platform["exec-score-blocks"]["emptyDirMounts"][-1] == shared
    assert "accelerator" not in containers["exec-prune-model-2"]["resources"]
    assert "nodeSelector" not in platform["exec-prune-model-2"]
    assert platform["exec-prune-model-2"]["podMetadata"]["labels"] == {"moesaic/stage": "prune_model"}


def test_tasks_are_no_root_and_get_volumes_where_images_write() -> None:
    _, platform = placed()
    for config in platform.values():
        assert config["securityContext"] == {"runAsUser": "10001", "runAsGroup": "0", "runAsNonRoot": True}
        assert [one["mountPath"] for one in config["emptyDirMounts"]][:2] == ["/scratch", "/tmp"]


def test_variables_secrets_and_claims_reach_every_task() -> None:
    containers, platform = placed(
        environment={"MOESAIC_STORE": "/store"},
        secrets=[{"secret": "mlflow-user", "variables": {"MLFLOW_TRACKING_PASSWORD": "password"}}],
        claims=[{"claim": "moesaic-store", "path": "/store"}],
        queue="moesaic",
        image_pull_secrets=["registry"],
    )
    assert all(one["env"] == [{"name": "MOESAIC_STORE", "value": "/store"}] for one in containers.values())
    for config in platform.values():
        (secret,) = config["secretAsEnv"]
        assert secret["secretNameParameter"] == {"runtimeValue": {"constant": "mlflow-user"}}
        assert secret["keyToEnv"] == [{"secretKey": "password", "envVar": "MLFLOW_TRACKING_PASSWORD"}]
        (claim,) = config["pvcMount"]
        assert claim["pvcNameParameter"] == {"runtimeValue": {"constant": "moesaic-store"}}
        assert claim["mountPath"] == "/store"
        assert config["podMetadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "moesaic"
        assert config["imagePullSecret"][0]["secretName"] == "registry"


AUTHORITIES, CLIENT = {"config_map": "authorities", "key": "ca.pem"}, {"secret": "client", "key": "tls-combined.pem"}


def test_certificates_are_mounted_in_every_task_and_named_by_our_variables() -> None:
    containers, platform = placed(certificates={"authorities": AUTHORITIES, "client": CLIENT})
    files = {
        "SSL_CERT_FILE": "/etc/moesaic/authorities/ca.pem",
        "SSL_CLIENT_CERT": "/etc/moesaic/client/tls-combined.pem",
    }
    assert all(one["env"] == [{"name": name, "value": files[name]} for name in files] for one in containers.values())
    for config in platform.values():
        (authorities,), (client,) = config["configMapAsVolume"], config["secretAsVolume"]
        assert authorities["configMapNameParameter"] == {"runtimeValue": {"constant": "authorities"}}
        assert authorities["mountPath"] == "/etc/moesaic/authorities"
        assert (client["secretName"], client["mountPath"]) == ("client", "/etc/moesaic/client")


def test_an_object_with_both_certificates_is_mounted_once() -> None:
    """Kubeflow calls the volume as the secret is called: twice would be no pod."""
    both = {"secret": "site", "key": "tls-combined.pem"}
    containers, platform = placed(certificates={"authorities": both | {"key": "ca.crt"}, "client": both})
    assert all(len(config["secretAsVolume"]) == 1 and "configMapAsVolume" not in config for config in platform.values())
    values = [one["value"] for one in containers["exec-ingest"]["env"]]
    assert values == ["/etc/moesaic/site/ca.crt", "/etc/moesaic/site/tls-combined.pem"]


def test_a_registry_replaces_what_stands_before_our_images_and_keeps_the_digest() -> None:
    digest = "sha256:" + "a" * 64
    pipeline = search()
    for number, executor in enumerate(pipeline["deploymentSpec"]["executors"].values()):
        executor["container"]["image"] = f"ghcr.io/team/moesaic/search:1@{digest}" if number else "python:3.12"
    documents = place(pipeline, profile(registry="registry.internal/ml/"), STAGES)
    images = [one["container"]["image"] for one in documents[0]["deploymentSpec"]["executors"].values()]
    assert images[0] == "python:3.12"
    assert set(images[1:]) == {f"registry.internal/ml/moesaic/search:1@{digest}"}


def test_a_stage_can_have_another_image() -> None:
    containers, _ = placed(images={"evaluate": "moesaic/serve@sha256:1234"}, registry="registry.internal/ml")
    assert containers["exec-evaluate"]["image"] == "registry.internal/ml/moesaic/serve@sha256:1234"
    assert containers["exec-rank-experts"]["image"].startswith("registry.internal/ml/moesaic/search:")
    with pytest.raises(ConfigError, match=r"names the stages \['evaluation'\]"):
        placed(images={"evaluation": "moesaic/serve:1"})


def test_the_compiled_pipeline_is_not_touched_and_placing_gives_the_same_bytes() -> None:
    path, before = compiled()["search"], search()
    first = placed_text(path, profile(queue="moesaic"), STAGES)
    assert placed_text(path, profile(queue="moesaic"), STAGES) == first
    assert list(yaml.safe_load_all(first)) == place(before, profile(queue="moesaic"), STAGES)
    assert before == search()


@pytest.mark.parametrize("name", sorted(path.stem for path in PROFILES.glob("*.yaml")))
def test_examples_place_every_pipeline_in_kubeflows_own_form(name: str) -> None:
    example = read_profile(PROFILES / f"{name}.yaml")
    for pipeline_name in compiled():
        pipeline, platform = place(parsed(pipeline_name), example, STAGES)
        json_format.ParseDict(pipeline, pipeline_spec_pb2.PipelineSpec())
        json_format.ParseDict(platform, pipeline_spec_pb2.PlatformSpec())
        tasks = set(pipeline["deploymentSpec"]["executors"])
        assert set(platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]) == tasks


def test_examples_fit_their_overlays() -> None:
    names = {path.stem for path in PROFILES.glob("*.yaml")}
    assert names == {path.name for path in (PROFILES.parent / "overlays").iterdir()}
    assert read_profile(PROFILES / "air-gapped.yaml").registry == "registry.internal"
    written = (PROFILES.parent / "base" / "accounts.yaml").read_text()
    for name in names:
        example = read_profile(PROFILES / f"{name}.yaml")
        assert f"name: {example.service_account}\n" in written
        assert {claim.claim for claim in example.claims} <= {"moesaic-store"}
        flavors = yaml.safe_load_all((PROFILES.parent / "overlays/single-node/quota.yaml").read_text())
        labels = next(flavors)["spec"]["nodeLabels"]
        assert all(node.selector == labels for node in example.nodes.values() if node.accelerators)


def test_one_image_for_all_stages_and_limits_above_what_is_asked_for() -> None:
    nodes = {"cpu": {"cpu": "250m", "cpu_limit": 2, "memory": "1Gi", "memory_limit": "4Gi"}}
    containers, _ = placed(
        image="moesaic/cpu:1", images={"evaluate": "own:1"}, registry="localhost:5000", nodes=nodes, stages={}
    )
    assert containers["exec-rank-experts"]["image"] == "localhost:5000/moesaic/cpu:1"
    assert containers["exec-evaluate"]["image"] == "own:1"
    assert containers["exec-ingest"]["resources"] == {
        "resourceCpuRequest": "250m",
        "resourceCpuLimit": "2",
        "resourceMemoryRequest": "1Gi",
        "resourceMemoryLimit": "4Gi",
    }


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"stages": {"score_block": "gpu"}}, "score_block"),
        ({"stages": {"distill": "tpu"}}, "tpu"),
        ({"default": "tpu"}, "tpu"),
        (
            {"nodes": {"cpu": {"cpu": 2, "memory": "7Gi", "memory_limit": "4Gi"}}},
            "memory_limit 4Gi is less than memory 7Gi",
        ),
        (
            {"nodes": {"cpu": {"cpu": "1.5", "cpu_limit": "900m", "memory": "7Gi"}}},
            "cpu_limit 900m is less than cpu 1.5",
        ),
        ({"nodes": {"cpu": {"cpu": 2, "memory": "4 GB"}, "gpu": SMALL["nodes"]["gpu"]}}, "memory"),
        ({"environment": {"AWS_SECRET_ACCESS_KEY": "abc"}}, "AWS_SECRET_ACCESS_KEY"),
        ({"environment": {"MLFLOW_TRACKING_URI": "http://user:word@mlflow"}}, "MLFLOW_TRACKING_URI"),
        ({"claims": [{"claim": "store", "path": "/scratch"}]}, "/scratch"),
        ({"claims": [{"claim": "store", "path": "store"}]}, "path"),
        ({"claims": [{"claim": "store", "path": "/a/../b"}]}, "path"),
        (
            {"environment": {"A": "b"}, "secrets": [{"secret": "s", "variables": {"A": "key"}}]},
            "set twice",
        ),
        ({"node_selector": {}}, "node_selector"),
        ({"certificates": {"client": AUTHORITIES}}, "holds a private key"),
        ({"certificates": {"authorities": CLIENT | AUTHORITIES}}, "one of them"),
        ({"certificates": {"authorities": {"key": "ca.pem"}}}, "one of them"),
        ({"certificates": {"authorities": AUTHORITIES | {"key": "../token"}}}, "key"),
        ({"certificates": {"authorities": AUTHORITIES | {"config_map": "a.b"}}}, "config_map"),
        ({"certificates": {"client": CLIENT | {"secret": "tmp"}}}, "names of other volumes"),
        ({"certificates": {"client": CLIENT | {"secret": "authorities"}, "authorities": AUTHORITIES}}, "both called"),
        ({"certificates": {"client": CLIENT}, "environment": {"SSL_CLIENT_CERT": "/a"}}, "set twice"),
        (
            {"certificates": {"client": CLIENT}, "claims": [{"claim": "c", "path": "/etc/moesaic/client"}]},
            "mounted twice",
        ),
    ],
)
def test_a_bad_profile_is_explained(changes: dict[str, Any], word: str, tmp_path: Path) -> None:
    path = tmp_path / "profile.yaml"
    path.write_text(yaml.safe_dump(SMALL | changes))
    with pytest.raises(ConfigError, match=word):
        place(search(), read_profile(path), STAGES)


def test_a_profile_that_is_not_there_or_no_yaml_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="manifests/profiles"):
        read_profile(tmp_path / "missing.yaml")
    (tmp_path / "broken.yaml").write_text("nodes: [")
    with pytest.raises(ConfigError, match="no YAML"):
        read_profile(tmp_path / "broken.yaml")
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(ConfigError, match="ClusterProfile"):
        read_profile(tmp_path / "empty.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("default: cpu\nnodes: {}\ndefault: gpu\n", "profile.yaml, from line 1: the key 'default' occurs twice"),
        ("nodes:\n  cpu:\n    cpu: 1\n    cpu: 2\n", "from line 3: the key 'cpu' occurs twice"),
        ("environment:\n  SINCE: 2026-01-01\n", "holds what is no text, number, list or mapping"),
        ("default: &a [*a]\n", "holds what is no text, number, list or mapping"),
        ("? [1, 2]\n: 3\n", "unhashable key|holds what is no text"),
        ("default: cpu\n--- \nnodes: {}\n", "is no YAML: expected a single document"),
        ("default: !!python/name:os.system\n", "is no YAML: could not determine a constructor"),
        ("[" * 1000, "is no YAML|holds what is no text"),
        ("default: \tcpu\n\t- a\n", "is no YAML"),
    ],
)
def test_what_yaml_alone_would_take_or_fail_at_is_said(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "profile.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_profile(tmp_path / "profile.yaml")


@pytest.mark.parametrize("worker", [{}, {"template": None}, [], "x"])
def test_a_template_of_another_form_is_explained(worker: object, tmp_path: Path) -> None:
    pod = {"spec": {"containers": [{"name": "ray"}], "volumes": None}}
    groups = {"headGroupSpec": {"template": pod}, "workerGroupSpecs": [worker]}
    template = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": "j"},
        "spec": {"rayClusterSpec": groups},
    }
    jobs = {"reinforce": {"template": template, "node": "cpu", "num_nodes": 2}}
    claims = [{"claim": "store", "path": "/store"}]
    (tmp_path / "profile.yaml").write_text(yaml.safe_dump(SMALL | {"jobs": jobs, "claims": claims}))
    with pytest.raises(ConfigError, match="the template of the job of reinforce has not the form of a RayJob"):
        read_profile(tmp_path / "profile.yaml")


def test_what_is_no_pipeline_of_ours_is_refused() -> None:
    with pytest.raises(ArtifactError, match="make compile"):
        place({"deploymentSpec": {"executors": {"exec-a": {"importer": {}}}}}, profile(), STAGES)


def test_a_profile_is_a_config_like_all_others() -> None:
    assert issubclass(ClusterProfile, Config)
    assert ClusterProfile.parse(profile().to_json()) == profile()
