"""Strict offline validation of Kubernetes objects: the API's own schemas, and ours for custom resources."""

import functools
import json
import warnings
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from referencing import Registry, Resource

KUBERNETES = "1.34"
"""The oldest version that the manifests are meant for."""
SCHEMAS = Path(__file__).parent / "schemas"
Object = dict[str, Any]


def problems(found: Object) -> list[str]:
    """Everything that is wrong with one object; an unknown field anywhere is wrong."""
    custom = SCHEMAS / f"{found['kind']}.yaml"
    return custom_problems(found, yaml.safe_load(custom.read_text())) if custom.is_file() else own_problems(found)


def own_problems(found: Object) -> list[str]:
    """Problems of an object of Kubernetes' own API."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import kubernetes_validate

    try:
        kubernetes_validate.validate(found, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as problem:
        return [f"{'.'.join(map(str, problem.path))}: {problem.message}"]
    return []


def custom_problems(found: Object, schema: Object) -> list[str]:
    """Problems of a custom resource."""
    registry = Registry().with_resource("kubernetes", definitions())
    validator = jsonschema.Draft202012Validator(schema, registry=registry)
    return [f"{'.'.join(map(str, one.path))}: {one.message}" for one in validator.iter_errors(found)]


@functools.cache
def definitions() -> Resource[Any]:
    """Kubernetes' definitions, none of which allows unknown fields."""
    folder = files("kubernetes_validate") / "kubernetes-json-schema" / f"v{KUBERNETES}.0-local-strict"
    return Resource.from_contents(json.loads((folder / "_definitions.json").read_text()))


def pod_specifications(found: Any) -> list[Object]:
    """Every pod specification in an object, wherever it lies: whatever has containers with an image."""
    if isinstance(found, list):
        return [one for part in found for one in pod_specifications(part)]
    if not isinstance(found, dict):
        return []
    if any("image" in one for one in found.get("containers", [])):
        return [found]
    return [one for part in found.values() for one in pod_specifications(part)]


def beyond_restricted(pod: Object) -> list[str]:
    """What Kubernetes' pod security standard `restricted` would refuse, and what we ask of our own pods beyond it."""
    whole = pod.get("securityContext", {})
    wrong = [] if whole.get("runAsNonRoot") is True and whole.get("runAsUser") != 0 else ["may run as root"]
    if whole.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
        wrong.append("no seccomp profile")
    wrong += [f"{name} is set" for name in ("hostNetwork", "hostPID", "hostIPC") if pod.get(name)]
    allowed = {
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "persistentVolumeClaim",
        "projected",
        "secret",
    }
    wrong += [f"volume {one['name']}" for one in pod.get("volumes", []) if set(one) - {"name"} - allowed]
    if pod.get("automountServiceAccountToken") is not False:
        wrong.append("gets a service account token")
    for container in [*pod.get("initContainers", []), *pod["containers"]]:
        context = container.get("securityContext", {})
        if context.get("allowPrivilegeEscalation") is not False or context.get("privileged"):
            wrong.append(f"{container['name']} may gain privileges")
        capabilities = context.get("capabilities", {})
        if capabilities.get("drop") != ["ALL"] or capabilities.get("add"):
            wrong.append(f"{container['name']} keeps capabilities")
        if context.get("readOnlyRootFilesystem") is not True:
            wrong.append(f"{container['name']} may write to its root file system")
    return wrong
