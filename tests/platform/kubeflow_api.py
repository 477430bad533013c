"""A stub of Kubeflow Pipelines' API (v2beta1) on loopback, as strict as the real one's types allow.

It keeps pipelines, versions, experiments and runs in memory. Requests are read by the real client's models: a path, a
query parameter or a field that it does not know is refused, and what is uploaded must parse as Kubeflow's own messages.
Runs do what their script says, a step each time they are read, or what was recorded of a real server's. Answers and
refusals have the form that was recorded of Kubeflow Pipelines 2.17.
"""

import email
import email.policy
import json
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any, ClassVar

import kfp_server_api
import yaml
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2
from kfp_server_api import models

from .workflow import Workflow, recorded

PREFIX, LOGS = "/apis/v2beta1", r"/apis/v1alpha1/runs/([^/]+)/nodes/([^/]+)/log"
ENDED = ("SUCCEEDED", "FAILED")
START = datetime(2026, 11, 1, 12, 0, tzinfo=UTC)
_API = kfp_server_api.ApiClient()
_LISTING = ("page_token", "page_size", "sort_by", "filter", "namespace")
_NEVER = datetime(1970, 1, 1, tzinfo=UTC)
"""What the real server writes for an end that is yet to come."""


@dataclass(frozen=True)
class Step:
    """What a run and its tasks are like at one reading: ``{"rank-experts": "RUNNING"}``, or state and message.

    ``CACHED`` is what succeeds without having run.
    """

    state: str
    tasks: Mapping[str, str | tuple[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Fault:
    """What happens to the next request that matches: a status with a body, or the connection is cut (0)."""

    matches: Callable[[str, str], bool]
    status: int
    body: str = '{"message": "try later"}'


@dataclass
class KubeflowApi:
    """Runs until :meth:`stop`."""

    multi_user: bool = False
    token: str | None = None
    script: list[Step] = field(default_factory=lambda: [Step("SUCCEEDED")])
    faults: list[Fault] = field(default_factory=list)
    log: list[tuple[str, str]] = field(default_factory=list)
    """Method and path of every request."""
    logs: dict[str, str] = field(default_factory=dict)
    """By pod."""
    forbidden: str | None = None
    """A namespace that the user may not use."""

    def __post_init__(self) -> None:
        self.pipelines: dict[str, Any] = {}
        self.versions: dict[str, Any] = {}
        self.experiments: dict[str, Any] = {}
        self.runs: dict[str, Any] = {}
        self._steps: dict[str, int] = {}
        self.workflows: dict[str, Workflow] = {}
        self._recordings: dict[str, Iterator[dict[str, Any]]] = {}
        self.played_until: dict[str, str] = {}
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"api": self}))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def count(self, method: str, ending: str) -> int:
        """How many requests there were of a kind."""
        return sum(one == method and path.endswith(ending) for one, path in self.log)

    # ---- what each path does ----

    def healthz(self, **_: Any) -> Any:
        return models.V2beta1GetHealthzResponse(multi_user=self.multi_user)

    def list_pipelines(self, query: dict[str, str], **_: Any) -> Any:
        self._check_namespace(query.get("namespace"))
        return models.V2beta1ListPipelinesResponse(pipelines=_filtered(self.pipelines, query))

    def create_pipeline(self, body: Any, **_: Any) -> Any:
        self._check_namespace(body.namespace)
        _check_new(self.pipelines, body)
        body.pipeline_id = f"pipeline-{len(self.pipelines)}"
        self.pipelines[body.pipeline_id] = body
        return body

    def list_versions(self, query: dict[str, str], pipeline_id: str, **_: Any) -> Any:
        mine = {key: one for key, one in self.versions.items() if one.pipeline_id == pipeline_id}
        return models.V2beta1ListPipelineVersionsResponse(pipeline_versions=_filtered(mine, query))

    def get_version(self, pipeline_id: str, version_id: str, **_: Any) -> Any:
        found = _get(self.versions, version_id)
        if found.pipeline_id != pipeline_id:
            raise Refused(404, f"no version {version_id} of {pipeline_id}")
        return found

    def upload_version(self, query: dict[str, str], body: str, **_: Any) -> Any:
        _get(self.pipelines, query["pipelineid"])
        specification, platform = [*yaml.load_all(body, yaml.CSafeLoader), {}][:2]
        json_format.ParseDict(specification, pipeline_spec_pb2.PipelineSpec())
        json_format.ParseDict(platform, pipeline_spec_pb2.PlatformSpec())
        made = models.V2beta1PipelineVersion(
            pipeline_id=query["pipelineid"],
            pipeline_version_id=f"version-{len(self.versions)}",
            display_name=query["name"],
            pipeline_spec={"pipeline_spec": specification, "platform_spec": platform} if platform else specification,
        )
        _check_new({key: one for key, one in self.versions.items() if one.pipeline_id == made.pipeline_id}, made)
        self.versions[made.pipeline_version_id] = made
        return made

    def list_experiments(self, query: dict[str, str], **_: Any) -> Any:
        self._check_namespace(query.get("namespace"))
        return models.V2beta1ListExperimentsResponse(experiments=_filtered(self.experiments, query))

    def create_experiment(self, body: Any, **_: Any) -> Any:
        self._check_namespace(body.namespace)
        _check_new(self.experiments, body)
        body.experiment_id = f"experiment-{len(self.experiments)}"
        self.experiments[body.experiment_id] = body
        return body

    def create_run(self, body: Any, **_: Any) -> Any:
        _get(self.experiments, body.experiment_id)
        reference = body.pipeline_version_reference
        version = self.get_version(reference.pipeline_id, reference.pipeline_version_id)
        specification = version.pipeline_spec.get("pipeline_spec", version.pipeline_spec)
        wanted, given = set(specification["root"]["inputDefinitions"]["parameters"]), body.runtime_config.parameters
        if wanted != set(given):
            raise Refused(400, f"parameters differ: {sorted(wanted ^ set(given))}")
        return self.add_run(body)

    def add_run(self, run: Any) -> Any:
        """Begin a run."""
        run.run_id = f"run-{len(self.runs)}"
        run.created_at, run.finished_at, run.state = START, _NEVER, "PENDING"
        run.state_history = [models.V2beta1RuntimeStatus(update_time=START, state="PENDING")]
        self.runs[run.run_id], self._steps[run.run_id] = run, 0
        self.workflows[run.run_id] = Workflow(START, _loops(run.pipeline_spec))
        return run

    def play(self, recording: str) -> str:
        """Begin a run that goes as it was recorded; returns its id."""
        run_id = f"run-{len(self.runs)}"
        *_, last = recorded(recording)
        self._recordings[run_id], self.played_until[run_id] = recorded(recording), last["finished_at"]
        self.runs[run_id] = next(self._recordings[run_id]) | {"run_id": run_id}
        return run_id

    def list_runs(self, query: dict[str, str], **_: Any) -> Any:
        chosen = [one for one in self.runs.values() if one.experiment_id == query["experiment_id"]]
        assert query["sort_by"] == "created_at desc"
        return models.V2beta1ListRunsResponse(runs=chosen[::-1][: int(query["page_size"])] or None)

    def get_run(self, run_id: str, **_: Any) -> Any:
        run = _get(self.runs, run_id)
        if isinstance(run, dict):
            self.runs[run_id] = next(self._recordings[run_id], run) | {"run_id": run_id}
            return run
        number = self._steps[run_id]
        if run.state == "CANCELING":
            self._set_state(run, "FAILED", number)
        elif number < len(self.script) and run.state not in ENDED:
            step = self.script[number]
            self._steps[run_id] += 1
            rows = self.workflows[run_id].update(100 * number + 10, step.tasks)
            run.run_details = models.V2beta1RunDetails(task_details=rows)
            self._set_state(run, step.state, number)
        return run

    def _set_state(self, run: Any, state: str, number: int) -> None:
        moment = START + timedelta(seconds=100 * (number + 1))
        if state != run.state:
            run.state = state
            run.state_history.append(models.V2beta1RuntimeStatus(update_time=moment, state=state))
        run.finished_at = moment if state in ENDED else _NEVER

    def terminate_run(self, run_id: str, **_: Any) -> None:
        run = _get(self.runs, run_id)
        if run.state in ENDED:
            raise Refused(400, f"Failed to terminate a run {run_id}. Row not found.")
        self._set_state(run, "CANCELING", self._steps[run_id])

    def retry_run(self, run_id: str, **_: Any) -> None:
        run = _get(self.runs, run_id)
        if run.state != "FAILED":
            raise Refused(400, f"Workflow cannot be retried: {run_id} is {run.state}")
        self._set_state(run, "RUNNING", self._steps[run_id])

    def _check_namespace(self, namespace: str | None) -> None:
        if bool(namespace) != self.multi_user:
            raise Refused(400, "Invalid input error: An experiment cannot have an empty namespace in multi-user mode")
        if namespace and namespace == self.forbidden:
            raise Refused(403, f"Check if you have permission to access namespace {namespace}: PermissionDenied")


class Refused(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(status, message)
        self.status, self.message = status, message


_ROUTES: dict[tuple[str, str], tuple[Callable[..., Any], tuple[str, ...], str | None]] = {
    ("GET", "/healthz"): (KubeflowApi.healthz, (), None),
    ("GET", "/pipelines"): (KubeflowApi.list_pipelines, (*_LISTING, "tags"), None),
    ("POST", "/pipelines"): (KubeflowApi.create_pipeline, (), "V2beta1Pipeline"),
    ("POST", "/pipelines/upload_version"): (
        KubeflowApi.upload_version,
        ("name", "display_name", "pipelineid", "description", "tags"),
        "file",
    ),
    ("GET", "/pipelines/(?P<pipeline_id>[^/:]+)/versions"): (KubeflowApi.list_versions, _LISTING[:4], None),
    ("GET", "/pipelines/(?P<pipeline_id>[^/:]+)/versions/(?P<version_id>[^/:]+)"): (KubeflowApi.get_version, (), None),
    ("GET", "/experiments"): (KubeflowApi.list_experiments, _LISTING, None),
    ("POST", "/experiments"): (KubeflowApi.create_experiment, (), "V2beta1Experiment"),
    ("GET", "/runs"): (KubeflowApi.list_runs, (*_LISTING, "experiment_id"), None),
    ("POST", "/runs"): (KubeflowApi.create_run, ("experiment_id",), "V2beta1Run"),
    ("GET", "/runs/(?P<run_id>[^/:]+)"): (KubeflowApi.get_run, ("experiment_id",), None),
    ("POST", "/runs/(?P<run_id>[^/:]+):terminate"): (KubeflowApi.terminate_run, ("experiment_id",), None),
    ("POST", "/runs/(?P<run_id>[^/:]+):retry"): (KubeflowApi.retry_run, ("experiment_id",), None),
}


class _Handler(BaseHTTPRequestHandler):
    api: ClassVar[KubeflowApi]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        with self.api.lock:
            self._answer()

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def _answer(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(url.path).removeprefix(PREFIX)
        self.api.log.append((self.command, path))
        for fault in self.api.faults:
            if fault.matches(self.command, path):
                self.api.faults.remove(fault)
                return self._send(fault.status, fault.body) if fault.status else self.connection.close()
        given = self.headers.get("Authorization")
        if self.api.token and given != f"Bearer {self.api.token}":
            message = f"Unauthenticated: User identity is empty in the request header, which has {given}"
            return self._send(401, json.dumps({"code": 16, "message": message}))
        if log := re.fullmatch(LOGS, url.path):
            found = self.api.logs.get(log[2])
            return self._send(500, '{"error_message": "no such pod"}') if found is None else self._send(200, found)
        try:
            answer = self._dispatch(path, url.query, content)
        except Refused as refused:
            return self._send(refused.status, json.dumps({"code": 0, "message": refused.message}))
        self._send(200, json.dumps({} if answer is None else _API.sanitize_for_serialization(answer)))

    def _dispatch(self, path: str, query: str, content: bytes) -> Any:
        for (method, pattern), (action, known, model) in _ROUTES.items():
            match = re.fullmatch(pattern, path)
            if match and method == self.command and self.path.startswith(PREFIX):
                values = dict(urllib.parse.parse_qsl(query, strict_parsing=bool(query)))
                if unknown := set(values) - set(known):
                    raise Refused(400, f"unknown query parameters {sorted(unknown)}")
                body = self._uploaded(content) if model == "file" else _read_model(content, model)
                return action(self.api, query=values, body=body, **match.groupdict())
        raise Refused(404, f"no such path: {self.command} {path}")

    def _uploaded(self, content: bytes) -> str:
        head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        (part,) = email.message_from_bytes(head + content, policy=email.policy.default).iter_parts()
        assert part["Content-Disposition"].params["name"] == "uploadfile"
        assert part.get_filename().endswith(".yaml")
        return part.get_payload(decode=True).decode()

    def _send(self, status: int, body: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())


def _read_model(content: bytes, model: str | None) -> Any:
    """The body as the client's own model; a field that this does not have is refused."""
    if model is None:
        if content not in (b"", b"null", b"{}"):
            raise Refused(400, "a body where there should be none")
        return None
    found = _API.deserialize(SimpleNamespace(data=content), model)
    if _API.sanitize_for_serialization(found) != json.loads(content):
        raise Refused(400, f"fields that {model} does not have: {content.decode()}")
    return found


def _filtered(kept: Mapping[str, Any], query: Mapping[str, str]) -> list[Any] | None:
    """Those of a name, by the only filter that is asked for here; nothing is None, as the real server has it."""
    if "filter" not in query:
        return list(kept.values())[: int(query["page_size"])] or None
    (predicate,) = _read_model(query["filter"].encode(), "V2beta1Filter").predicates
    assert (predicate.operation, predicate.key) == ("EQUALS", "display_name")
    return [one for one in kept.values() if one.display_name == predicate.string_value] or None


def _check_new(kept: Mapping[str, Any], wanted: Any) -> None:
    if any(one.display_name == wanted.display_name for one in kept.values()):
        raise Refused(409, f"Already exist error: The name {wanted.display_name} already exist.")


def _get(kept: Mapping[str, Any], key: str) -> Any:
    if key not in kept:
        raise Refused(404, f"Failed to authorize the request: ResourceNotFoundError: {key} not found")
    return kept[key]


def _loops(specification: Mapping[str, Any] | None) -> dict[str, str]:
    """The loop of each task that is in one."""
    components = (specification or {}).get("components", {})
    return {
        inner: name.removeprefix("comp-")
        for name, component in components.items()
        for inner in component.get("dag", {}).get("tasks", {})
    }
