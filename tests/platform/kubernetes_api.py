"""A Kubernetes API on loopback that knows jobs, pods and logs, as far as Moesaic asks for them.

Objects and answers have the API's own form. What a job does is a script of the test's, one scene per look at the job,
or the job's own command, run in processes. It validates what is created and fails on demand.
"""

import itertools
import json
import os
import re
import shlex
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

from tests.manifests.validation import problems

Object = dict[str, Any]
_JOBS = re.compile(r"/apis/(?P<api>[^/]+/[^/]+)/namespaces/moesaic/(?P<kind>trainjobs|rayjobs)(/(?P<name>[^/]+))?")
_WORKLOADS = "/apis/kueue.x-k8s.io/v1beta2/namespaces/moesaic/workloads"
_PODS = re.compile(r"/api/v1/namespaces/moesaic/pods(/(?P<name>[^/]+)/log)?")


@dataclass
class Fault:
    """What goes wrong with the next ``times`` requests of a method whose path ends with something."""

    method: str
    ending: str
    kind: int | str
    """A status to answer with, ``cut`` to answer nothing, or ``lost`` to do it and answer nothing."""
    times: int = 1


@dataclass
class KubernetesApi:
    """The server's state; tests read and change it."""

    jobs: dict[str, Object] = field(default_factory=dict)
    workloads: dict[str, Object] = field(default_factory=dict)
    pods: dict[str, Object] = field(default_factory=dict)
    logs: dict[str, list[tuple[float, str]]] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    scenes: Iterator[None] = field(default_factory=lambda: iter(()))
    runs_commands: bool = False
    lock: threading.RLock = field(default_factory=threading.RLock)
    processes: list["subprocess.Popen[bytes]"] = field(default_factory=list)
    _times: Iterator[int] = field(default_factory=itertools.count)

    def created(self) -> list[str]:
        """Names of the jobs whose creation was asked for, in order."""
        return [path for method, path in self.requests if method == "POST"]

    def condition(self, name: str, kind: str, value: bool, reason: str = "", message: str = "") -> None:
        """Set a condition of a TrainJob, as Trainer does."""
        conditions = self.jobs[name].setdefault("status", {}).setdefault("conditions", [])
        conditions[:] = [one for one in conditions if one["type"] != kind]
        conditions.append({"type": kind, "status": str(value), "reason": reason or kind, "message": message})

    def set_workload(self, job: str, message: str | None) -> None:
        """Let Kueue say why it does not admit a job, or not yet have looked at it."""
        condition = {"type": "QuotaReserved", "status": "False", "reason": "Pending", "message": message}
        labels = {"kueue.x-k8s.io/job-uid": self.jobs[job]["metadata"]["uid"]}
        status = {"status": {"conditions": [condition]}} if message else {}
        self.workloads[job] = {"metadata": {"name": job, "labels": labels}, **status}

    def set_pod(self, job: str, rank: int, phase: str, state: Object | None = None, suffix: str = "abcde") -> str:
        """Set the pod of a TrainJob's node, as JobSet labels it, and return its name."""
        name = f"{job}-node-0-{rank}-{suffix}"
        labels = {"jobset.sigs.k8s.io/jobset-name": job, "batch.kubernetes.io/job-completion-index": str(rank)}
        statuses = [{"name": "node", "state": state or {}, "ready": phase == "Running", "restartCount": 0}]
        self.pods[name] = {
            "metadata": {
                "name": name,
                "namespace": "moesaic",
                "labels": labels,
                "creationTimestamp": _stamp(time.time()),
            },
            "spec": {"nodeName": f"gpu-{rank}", "containers": [{"name": "node"}]},
            "status": {"phase": phase, "containerStatuses": statuses},
        }
        return name

    def print(self, pod: str, *lines: str) -> None:
        """Add lines to a pod's log."""
        self.logs.setdefault(pod, []).extend((time.time(), line) for line in lines)

    def answer(self, method: str, url: str, body: bytes) -> tuple[int, Any]:
        """Status and content, a dict or a log's bytes."""
        parts = urlsplit(url)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        with self.lock:
            self.requests.append((method, parts.path))
            if found := _PODS.fullmatch(parts.path):
                return self._log(found["name"], query) if found["name"] else self._list(self.pods, query)
            if parts.path == _WORKLOADS:
                return self._list(self.workloads, query)
            found = _JOBS.fullmatch(parts.path)
            assert found, parts.path
            if method == "POST":
                return self._create(json.loads(body))
            if found["name"] is None:
                return self._list(self.jobs, query)
            if found["name"] in self.jobs and method == "GET":
                next(self.scenes, None)
                self._look_at_processes()
            if found["name"] not in self.jobs:
                return _status(404, f'{found["kind"]} "{found["name"]}" not found')
            if method == "DELETE":
                return 200, self.jobs.pop(found["name"])
            return 200, self.jobs[found["name"]]

    def _create(self, job: Object) -> tuple[int, Any]:
        name = job["metadata"]["name"]
        if wrong := problems(job):
            return _status(422, "; ".join(wrong))
        if name in self.jobs:
            return _status(409, f'"{name}" already exists')
        self.jobs[name] = job
        job["metadata"] |= {"uid": f"uid-{next(self._times)}", "resourceVersion": str(next(self._times))}
        if self.runs_commands:
            self._start(job)
        return 201, job

    def _list(self, objects: dict[str, Object], query: dict[str, str]) -> tuple[int, Any]:
        wanted = dict(pair.split("=") for pair in query["labelSelector"].split(","))
        items = [one for one in objects.values() if wanted.items() <= one["metadata"]["labels"].items()]
        return 200, {"kind": "List", "metadata": {"resourceVersion": "1"}, "items": items}

    def _log(self, pod: str, query: dict[str, str]) -> tuple[int, Any]:
        if pod not in self.pods:
            return _status(404, f'pods "{pod}" not found')
        assert query["container"] == self.pods[pod]["spec"]["containers"][0]["name"]
        lines = self.logs.get(pod, [])
        if "sinceSeconds" in query:
            lines = [one for one in lines if one[0] >= time.time() - int(query["sinceSeconds"])]
        lines = lines[-int(query.get("tailLines", len(lines))) :] if lines else []
        stamped = query.get("timestamps") == "True"  # Go takes it for true
        shown = [f"{_stamp(when)} {line}" if stamped else line for when, line in lines]
        return 200, "".join(f"{line}\n" for line in shown).encode()

    def _start(self, job: Object) -> None:
        """Run the command: on every node of a TrainJob with the variables that Trainer sets; once for a RayJob."""
        name, spec = job["metadata"]["name"], job["spec"]
        spec["suspend"] = False
        if job["kind"] == "RayJob":
            self.processes = [subprocess.Popen(shlex.split(spec["entrypoint"]))]
            return
        trainer, port = spec["trainer"], _free_port()
        for rank in range(trainer["numNodes"]):
            meeting = {"NNODES": trainer["numNodes"], "NPROC_PER_NODE": trainer["numProcPerNode"], "NODE_RANK": rank}
            meeting |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            variables = {one["name"]: one["value"] for one in trainer["env"]}
            variables |= {f"PET_{key}": str(value) for key, value in meeting.items()}
            process = subprocess.Popen(
                [*trainer["command"], *trainer["args"]],
                env={"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", **variables},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            self.processes.append(process)
            pod = self.set_pod(name, rank, "Running")
            threading.Thread(target=self._keep_log, args=(pod, process), daemon=True).start()

    def _keep_log(self, pod: str, process: "subprocess.Popen[bytes]") -> None:
        assert process.stdout is not None
        with process.stdout as output:
            for line in output:
                with self.lock:
                    self.print(pod, line.decode(errors="replace").rstrip("\n"))

    def _look_at_processes(self) -> None:
        # A node has not ended before all that it printed is in its log.
        codes = [one.poll() if one.stdout is None or one.stdout.closed else None for one in self.processes]
        if not codes:
            return
        (name, job), *_ = self.jobs.items()
        bad = [rank for rank, code in enumerate(codes) if code]
        if job["kind"] == "RayJob":
            status = {None: "RUNNING", 0: "SUCCEEDED"}.get(codes[0], "FAILED")
            job["status"] = {"jobStatus": status, "jobDeploymentStatus": "Running", "rayClusterName": f"{name}-x"}
        elif bad:
            self.set_pod(name, bad[0], "Failed", {"terminated": {"exitCode": codes[bad[0]], "reason": "Error"}})
            self.condition(name, "Failed", True, "FailedJobs", "jobset failed due to one or more job failures")
        elif all(code == 0 for code in codes):
            self.condition(name, "Complete", True)


def _status(code: int, message: str) -> tuple[int, Any]:
    return code, {"kind": "Status", "status": "Failure", "message": message, "code": code}


def _stamp(when: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(when)) + f".{int(when % 1 * 1e9):09d}Z"


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _handler(api: KubernetesApi) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def _handle(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            fault = self._fault()
            if fault and isinstance(fault.kind, int):
                status, content = _status(fault.kind, "told to fail")
                api.requests.append((self.command, f"failed {urlsplit(self.path).path}"))
            elif fault and fault.kind == "cut":
                self.close_connection = True
                return
            else:
                status, content = api.answer(self.command, self.path, body)
            if fault and fault.kind == "lost":
                self.close_connection = True
                return
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/plain" if isinstance(content, bytes) else "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_DELETE = _handle

        def _fault(self) -> Fault | None:
            path = urlsplit(self.path).path
            with api.lock:
                for fault in api.faults:
                    if fault.times and fault.method == self.command and path.endswith(fault.ending):
                        fault.times -= 1
                        return fault
            return None

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    return Handler


def serve(directory: Path) -> Iterator[KubernetesApi]:
    """A server, and a kubeconfig that names it in ``directory``."""
    api = KubernetesApi()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(api))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "clusters": [{"name": "test", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        "users": [{"name": "test", "user": {"token": "a-token"}}],
    }
    (directory / "kubeconfig").write_text(yaml.safe_dump(config))
    yield api
    for process in api.processes:
        process.kill()
        process.wait()
    server.shutdown()
    server.server_close()
    thread.join()
