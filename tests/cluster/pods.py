"""Pods and Jobs of a real cluster, by kubectl; and a driver that runs a placed pipeline, every task a Job.

The driver stands in for Kubeflow Pipelines where there is none: it reads the compiled graph, starts a task when those
before it are done, gives it its inputs as Kubeflow's executor reads them, and keeps artifacts on the store's volume.
What runs in a pod is the container of the pipeline as it would be uploaded, command for command.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from moesaic.platform.cluster import ClusterProfile, place
from moesaic.stages import STAGES

Object = dict[str, Any]
KUBECTL = shutil.which("kubectl", path=str(Path(sys.executable).parent)) or shutil.which("kubectl") or "kubectl"
NAMESPACE, STORE = "moesaic", "/store"
ARTIFACTS = f"{STORE}/artifacts"
IMAGES = os.environ.get("MOESAIC_CLUSTER_IMAGES", "").split()
"""Those of ``tests.cluster.images.build`` that the cluster's registry has."""
_ITEM = "-loop-item"


def kubectl(*words: str, given: str | None = None, check: bool = True) -> str:
    """Run kubectl in the namespace; standard output."""
    done = subprocess.run([KUBECTL, "-n", NAMESPACE, *words], input=given, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise AssertionError(f"kubectl {' '.join(words)} failed:\n{done.stderr}")
    return done.stdout


def needs_images(*names: str) -> pytest.MarkDecorator:
    """Skip where the cluster's registry does not have these."""
    lacking = [name for name in names if name not in IMAGES]
    return pytest.mark.skipif(bool(lacking), reason=f"MOESAIC_CLUSTER_IMAGES does not name {', '.join(lacking)}")


def image_of(name: str) -> str:
    return f"localhost:5000/moesaic/{name}:0.1.0"


def get(*words: str) -> Any:
    """Objects as JSON."""
    return json.loads(kubectl("get", *words, "-o", "json"))


def apply(*objects: Object) -> None:
    kubectl("apply", "--server-side", "-f", "-", given=yaml.safe_dump_all(objects))


def wait_until(holds: Any, what: str, seconds: float = 400) -> Any:
    """Wait until a function returns something true, and return that; other people may load the machine."""
    until = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < until, f"{what}: not within {seconds:.0f} s"
        time.sleep(1)
    return found


def restricted_pod(container: Object, profile: ClusterProfile, **more: Any) -> Object:
    """A pod as the restricted standard asks for it, with the store and where images write."""
    volumes = [{"name": name, "emptyDir": {}} for name in ("scratch", "tmp")]
    mounts = [{"name": "scratch", "mountPath": "/scratch"}, {"name": "tmp", "mountPath": "/tmp"}]
    for number, claim in enumerate(profile.claims):
        volumes.append({"name": f"claim-{number}", "persistentVolumeClaim": {"claimName": claim.claim}})
        mounts.append({"name": f"claim-{number}", "mountPath": claim.path})
    tight = {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    return {
        "restartPolicy": "Never",
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": profile.user_id,
            "runAsGroup": 0,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [{"name": "main", "securityContext": tight, "volumeMounts": mounts, **container}],
        "volumes": volumes,
        **more,
    }


@dataclass
class Finished:
    """A task that has run."""

    name: str
    artifacts: dict[str, list[Object]] = field(default_factory=dict)
    """Kubeflow's artifacts by output."""
    parameters: dict[str, Any] = field(default_factory=dict)
    pod_s: float = 0.0
    """From the creation of its Job to its end."""


class PipelineDriver:
    """Runs one placed pipeline."""

    def __init__(self, manifest: Path, profile: ClusterProfile, arguments: Mapping[str, Any], reader: "Reader") -> None:
        pipeline = yaml.safe_load(manifest.read_text())
        placed, platform = place(pipeline, profile, STAGES)
        self._components, self._root = placed["components"], placed["root"]
        self._executors = placed["deploymentSpec"]["executors"]
        self._platform = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
        self._profile, self._arguments, self._reader = profile, arguments, reader

    def run(self, seconds: float = 1800) -> dict[str, Finished]:
        """Run all tasks; by name, those of loops with their index."""
        done: dict[str, Finished] = {}
        inputs = {"parameters": dict(self._arguments), "artifacts": {}}
        self._run_dag("", self._root["dag"], inputs, done, time.monotonic() + seconds)
        return done

    def run_task(self, task: str, config: str, artifacts: Mapping[str, list[Object]]) -> Finished:
        """Run one task with these inputs."""
        component = self._components[f"comp-{task}"]
        self._start(task, component, {"config": config, "version": self._arguments["version"]}, artifacts)
        finished: Finished = wait_until(lambda: self._finished(task, component), f"{task} ends", 1200)
        return finished

    def _run_dag(self, prefix: str, dag: Object, given: Object, done: dict[str, Finished], until: float) -> None:
        """Run a graph's tasks, each as soon as it can; loops one turn after the other, their tasks like all others."""
        waiting, running = dict(dag["tasks"]), dict[str, Object]()
        mine: dict[str, Finished] = {}
        while waiting or running:
            for name, task in list(waiting.items()):
                if mine.keys() >= set(task.get("dependentTasks", [])):
                    component = self._components[task["componentRef"]["name"]]
                    parameters, artifacts = self._inputs(task, given, mine)
                    del waiting[name]
                    if "dag" in component:
                        mine[name] = self._run_loop(prefix + name, task, component, parameters, artifacts, done, until)
                    else:
                        self._start(prefix + name, component, parameters, artifacts)
                        running[name] = component
            for name, component in list(running.items()):
                if finished := self._finished(prefix + name, component):
                    mine[name] = done[prefix + name] = finished
                    del running[name]
            assert time.monotonic() < until, f"still running: {sorted(running)}, waiting: {sorted(waiting)}"
            time.sleep(1)

    def _run_loop(
        self,
        name: str,
        task: Object,
        component: Object,
        parameters: Object,
        artifacts: Object,
        done: dict[str, Finished],
        until: float,
    ) -> Finished:
        iterator = task["parameterIterator"]
        items = parameters[iterator["items"]["inputParameter"]]
        for index, item in enumerate(items if isinstance(items, list) else json.loads(items)):
            turn = {"parameters": {**parameters, iterator["itemInput"]: item}, "artifacts": artifacts}
            self._run_dag(f"{name}-{index}-", component["dag"], turn, done, until)
        collected = {}
        for output, selected in component["dag"].get("outputs", {}).get("artifacts", {}).items():
            (one,) = selected["artifactSelectors"]
            inner = [done[f"{name}-{index}-{one['producerSubtask']}"] for index in range(index + 1)]
            collected[output] = [made for each in inner for made in each.artifacts[one["outputArtifactKey"]]]
        return Finished(name, collected)

    def _inputs(self, task: Object, given: Object, done: Mapping[str, Finished]) -> tuple[Object, Object]:
        parameters, artifacts = {}, {}
        for name, source in task.get("inputs", {}).get("parameters", {}).items():
            if "componentInputParameter" in source:
                parameters[name] = given["parameters"][source["componentInputParameter"]]
            elif "taskOutputParameter" in source:
                made = source["taskOutputParameter"]
                parameters[name] = done[made["producerTask"]].parameters[made["outputParameterKey"]]
            else:
                parameters[name] = source["runtimeValue"]["constant"]
        for name, source in task.get("inputs", {}).get("artifacts", {}).items():
            if "componentInputArtifact" in source:
                artifacts[name] = given["artifacts"][source["componentInputArtifact"]]
            else:
                made = source["taskOutputArtifact"]
                artifacts[name] = done[made["producerTask"]].artifacts[made["outputArtifactKey"]]
        return parameters, artifacts

    def _outputs(self, name: str, component: Object) -> Object:
        defined = component.get("outputDefinitions", {})
        artifacts = {
            key: {
                "artifacts": [
                    {"name": key, "type": one["artifactType"], "uri": f"{ARTIFACTS}/{name}/{key}", "metadata": {}}
                ]
            }
            for key, one in defined.get("artifacts", {}).items()
        }
        parameters = {key: {"outputFile": f"{ARTIFACTS}/{name}/{key}"} for key in defined.get("parameters", {})}
        return {"artifacts": artifacts, "parameters": parameters, "outputFile": f"{ARTIFACTS}/{name}/outputs.json"}

    def _start(self, name: str, component: Object, parameters: Mapping[str, Any], artifacts: Mapping[str, Any]) -> None:
        executor = component["executorLabel"]
        container, wanted = self._executors[executor]["container"], self._platform[executor]
        given = {
            "inputs": {
                "parameterValues": parameters,
                "artifacts": {key: {"artifacts": value} for key, value in artifacts.items()},
            },
            "outputs": self._outputs(name, component),
        }
        resources = container["resources"]
        pod = restricted_pod(
            {
                "image": container["image"],
                "command": container["command"],
                "args": [part.replace("{{$}}", json.dumps(given)) for part in container["args"]],
                "env": container["env"] + secrets_of(wanted),
                "resources": {
                    "requests": {"cpu": resources["resourceCpuRequest"], "memory": resources["resourceMemoryRequest"]},
                    "limits": {"cpu": resources["resourceCpuLimit"], "memory": resources["resourceMemoryLimit"]},
                },
            },
            self._profile,
            serviceAccountName=self._profile.service_account,
        )
        mount_files(pod, wanted)
        template = {"metadata": {"labels": {STAGE: wanted["podMetadata"]["labels"][STAGE]}}, "spec": pod}
        labels = {QUEUE: wanted["podMetadata"]["labels"][QUEUE]}
        metadata = {"name": name, "labels": labels}
        spec = {"backoffLimit": 0, "suspend": True, "template": template}
        kubectl("delete", "job", name, "--ignore-not-found", "--wait")
        apply({"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec})

    def _finished(self, name: str, component: Object) -> Finished | None:
        """What a task has made; None while it runs.

        Raises:
            AssertionError: with the end of its log, if it failed.
        """
        job = get("job", name)
        conditions = {one["type"]: one for one in job["status"].get("conditions", []) if one["status"] == "True"}
        if "Failed" in conditions:
            log = kubectl("logs", f"job/{name}", check=False)
            raise AssertionError(f"{name} failed: {conditions['Failed'].get('message')}\n{log}")
        if "Complete" not in conditions:
            return None
        outputs = self._outputs(name, component)
        found = Finished(name, {key: one["artifacts"] for key, one in outputs["artifacts"].items()})
        if outputs["parameters"]:
            answer = json.loads(self._reader.read(outputs["outputFile"]))
            found.parameters = {
                key: one if isinstance(one, list) else next(iter(one.values()))
                for key, one in answer["parameterValues"].items()
            }
        begun, ended = job["metadata"]["creationTimestamp"], job["status"]["completionTime"]
        found.pod_s = seconds_of(ended) - seconds_of(begun)
        return found


STAGE, QUEUE = "moesaic/stage", "kueue.x-k8s.io/queue-name"


def secrets_of(wanted: Object) -> list[Object]:
    """The variables that Kubeflow fills from secrets."""
    return [
        {
            "name": one["envVar"],
            "valueFrom": {"secretKeyRef": {"name": secret["secretName"], "key": one["secretKey"]}},
        }
        for secret in wanted.get("secretAsEnv", [])
        for one in secret["keyToEnv"]
    ]


def mount_files(pod: Object, wanted: Object) -> None:
    """Mount the secrets and config maps that Kubeflow mounts, its way: a volume is called as the object is."""
    for kind, names in (("secret", "secretName"), ("configMap", "configMapName")):
        for one in wanted.get(f"{kind}AsVolume", []):
            name = one[names]
            source = {"secretName": name} if kind == "secret" else {"name": name}
            pod["volumes"].append({"name": name, kind: source})
            pod["containers"][0]["volumeMounts"].append({"name": name, "mountPath": one["mountPath"], "readOnly": True})


def seconds_of(stamp: str) -> float:
    return time.mktime(time.strptime(stamp, "%Y-%m-%dT%H:%M:%SZ"))


class Reader:
    """A pod with the store's volume and the account of tasks, in which commands are run."""

    name = "store-reader"

    def __init__(self, profile: ClusterProfile) -> None:
        image = profile.image_for("ingest", "")
        container = {
            "image": image,
            "command": ["sleep", "7200"],
            "resources": {"requests": {"cpu": "10m", "memory": "64Mi"}},
            "env": [{"name": "HOME", "value": "/scratch"}],
        }
        kubectl("delete", "pod", self.name, "--ignore-not-found", "--wait", "--grace-period=1")
        account = {"serviceAccountName": profile.service_account, "terminationGracePeriodSeconds": 1}
        pod = restricted_pod(container, profile, **account)
        apply({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": self.name}, "spec": pod})
        wait_until(lambda: get("pod", self.name)["status"]["phase"] == "Running", "the store's reader runs", 1200)

    def run(self, *command: str) -> str:
        return kubectl("exec", self.name, "--", *command)

    def read(self, path: str) -> str:
        return self.run("cat", path)

    def records(self) -> list[Object]:
        """All records of the store."""
        listed = self.run("sh", "-c", f"for one in {STORE}/records/*.json; do tr -d '\\n' < $one; echo; done")
        return [json.loads(line) for line in listed.splitlines()]


def volume_here(name: str | None = None) -> Path | None:
    """The directory of a volume, the store's, if it lies on this machine, where root can put the inputs."""
    volume = get("pv", name or get("pvc", "moesaic-store")["spec"]["volumeName"])["spec"]
    path = volume.get("local", volume.get("hostPath", {})).get("path")
    return Path(path) if path and Path(path).is_dir() else None


def give_back(volumes: Iterable[str]) -> None:
    """Empty the volumes on this machine that are kept when their claims go, so that other claims can have them."""
    released = {one["metadata"]["name"] for one in get("pv")["items"] if one["status"]["phase"] == "Released"}
    for name in released.intersection(volumes):
        if os.geteuid() == 0 and (folder := volume_here(name)):
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            kubectl("patch", "pv", name, "--type=json", "-p", '[{"op": "remove", "path": "/spec/claimRef"}]')
