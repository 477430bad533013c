"""Kubeflow Pipelines' API (v2beta1): the one place that talks to it, through Kubeflow's own client.

Who one is, the client finds out in its own ways: a service account's token in a file, the token of its command line,
Google's proxy, or what ``~/.config/kfp/context.json`` holds. No token passes through options, configs or messages.
"""

import json
import logging
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

from moesaic.core.errors import ConfigError, MoesaicError
from moesaic.core.network import CLIENT_CERTIFICATE, check_files, proxy_for, proxy_headers, site_variables
from moesaic.core.redaction import HIDDEN
from moesaic.platform.cluster.following import FINISHED, RunStatus, TaskStatus, Unavailable
from moesaic.platform.cluster.workflow_nodes import Place, WorkflowNodes, read_leaves, read_message

HOST_VARIABLE = "KF_PIPELINES_ENDPOINT"
_UI_VARIABLE, _TOKEN_FILE_VARIABLE, _TOKEN_VARIABLE = (
    "KF_PIPELINES_UI_ENDPOINT",
    "KF_PIPELINES_SA_TOKEN_PATH",
    "KFP_EXISTING_TOKEN",
)
"""Names that Kubeflow's client and its command line gave them."""
_ACCESS = (
    f"set {_TOKEN_FILE_VARIABLE} to the file of a service account's token, or {_TOKEN_VARIABLE}, "
    "or log in as docs/cluster.md says"
)
_REQUEST_TIMEOUT_S = (10, 60)
"""To connect, and for each read."""
_RUNS_SHOWN, _MESSAGE_LENGTH = 20, 400
_LINES_SHOWN, _REASON_LENGTH = 5, 2000
"""Of a failed task's log."""


class _NotFound(ConfigError):
    """There is no such thing on the server."""


class _Forbidden(ConfigError):
    """This user may not."""


class _Conflict(ConfigError):
    """There is such a thing already."""


@dataclass(frozen=True)
class PipelineVersion:
    """A pipeline's version on the server."""

    pipeline_id: str
    version_id: str
    is_new: bool
    """Whether it has just been uploaded."""


class Kubeflow:
    """A server of Kubeflow Pipelines, as one user."""

    def __init__(self, host: str, client: Any, multi_user: bool) -> None:
        """Use :meth:`connect`."""
        self.host, self._client, self._multi_user = host, client, multi_user
        self._leaves: dict[str, dict[str, tuple[str, ...]] | None] = {}
        self._reasons: dict[tuple[str, str], str | None] = {}

    @classmethod
    def connect(cls, host: str | None) -> "Kubeflow":
        """Reach the server at ``host``, else at ``KF_PIPELINES_ENDPOINT``.

        Raises:
            ConfigError: if none is named, nobody answers, it is no Kubeflow Pipelines, or it refuses this user.
        """
        address = _checked_host(host or os.environ.get(HOST_VARIABLE, ""))
        try:
            client = _client(address)
            with _explained(address):
                health = client.healthzs.healthz_service_get_healthz(
                    _preload_content=False, _request_timeout=_REQUEST_TIMEOUT_S
                )
                multi_user = bool(json.loads(health.data).get("multi_user"))
        except (Unavailable, _NotFound) as failure:
            raise ConfigError(
                f"{failure}; --host is the address of Kubeflow Pipelines' API, "
                "such as https://kubeflow.example.com/pipeline"
            ) from failure
        return cls(address, client, multi_user)

    def link(self, run_id: str) -> str:
        """The address of the page that shows the run."""
        shown_at = os.environ.get(_UI_VARIABLE) or self.host
        return f"{shown_at.rstrip('/')}/#/runs/details/{run_id}"

    def upload(self, pipeline: str, version: str, text: str, namespace: str) -> PipelineVersion:
        """Return the version of this name of the pipeline; pipeline and version are created if they do not exist."""
        pipelines = self._client.pipelines
        wanted = self._client.api_models.V2beta1Pipeline(display_name=pipeline, **self._in(namespace))
        pipeline_id, _ = _find_or_make(
            lambda: self._find(pipelines.pipeline_service_list_pipelines, "pipelines", pipeline, **self._in(namespace)),
            lambda: self._made(pipelines.pipeline_service_create_pipeline, "pipeline", wanted),
        )
        version_id, is_new = _find_or_make(
            lambda: self._find(
                pipelines.pipeline_service_list_pipeline_versions,
                "pipeline_versions",
                version,
                pipeline_id=pipeline_id,
            ),
            lambda: self._upload_version(pipeline_id, version, text),
        )
        return PipelineVersion(pipeline_id, version_id, is_new)

    def experiment(self, name: str, namespace: str) -> str:
        """The id of the experiment, which is created if it does not exist."""
        experiments = self._client.experiments
        wanted = self._client.api_models.V2beta1Experiment(display_name=name, **self._in(namespace))
        experiment_id, _ = _find_or_make(
            lambda: self._find_experiment(name, namespace),
            lambda: self._made(experiments.experiment_service_create_experiment, "experiment", wanted),
        )
        return experiment_id

    def start(
        self,
        name: str,
        version: PipelineVersion,
        experiment_id: str,
        arguments: Mapping[str, Any],
        service_account: str,
    ) -> str:
        """Create a run and return its id."""
        models = self._client.api_models
        run = models.V2beta1Run(
            display_name=name,
            experiment_id=experiment_id,
            pipeline_version_reference=models.V2beta1PipelineVersionReference(
                pipeline_id=version.pipeline_id, pipeline_version_id=version.version_id
            ),
            runtime_config=models.V2beta1RuntimeConfig(parameters=dict(arguments)),
            service_account=service_account,
        )
        return self._made(self._client.runs.run_service_create_run, "run", run)

    def run(self, run_id: str) -> RunStatus:
        """A run with its tasks."""
        run = self._of_run(self._client.runs.run_service_get_run, run_id)
        if getattr(run, "run_id", None) != run_id:
            raise _unexpected_answer(self.host)
        rows = run.run_details.task_details if run.run_details else None
        nodes = WorkflowNodes(rows or [], self._leaves_of(run))
        status = _run_status(run, nodes.tasks(), nodes.named_until)
        tasks = [self._explained(run_id, task, nodes) for task in status.tasks]
        if status.state == "FAILED" and status.named_until:
            tasks += self._failed_unnamed(run_id, status, nodes)
        return replace(status, tasks=tuple(sorted(tasks, key=_begin)))

    def runs(self, experiment: str, namespace: str) -> list[RunStatus]:
        """The latest runs of an experiment, newest first."""
        experiment_id = self._find_experiment(experiment, namespace)
        if experiment_id is None:
            raise ConfigError(f"{self.host} has no experiment {experiment!r}; `moesaic submit` makes it")
        page = self._call(
            self._client.runs.run_service_list_runs,
            experiment_id=experiment_id,
            page_size=_RUNS_SHOWN,
            sort_by="created_at desc",
        )
        return [_run_status(run, ()) for run in page.runs or []]

    def check_namespace(self, namespace: str) -> str:
        """What the profile's namespace means on this server, in words.

        Raises:
            ConfigError: if users have namespaces there, and this user may not use this one.
        """
        if not self._multi_user:
            return (
                f"this Kubeflow has one namespace, its own, and runs go there: it must be the profile's {namespace}, "
                "with the profile's account, claims, secrets and queue"
            )
        try:
            listing = self._client.experiments.experiment_service_list_experiments
            self._call(listing, namespace=namespace, page_size=1)
        except _Forbidden as refusal:
            raise ConfigError(
                f"you may not use the namespace {namespace}, which the cluster profile names: {refusal}"
            ) from refusal
        return f"the run goes to the namespace {namespace}"

    def cancel(self, run_id: str) -> None:
        """Ask the server to end a run."""
        self._of_run(self._client.runs.run_service_terminate_run, run_id)

    def retry(self, run_id: str) -> None:
        """Run the failed tasks of a run again."""
        self._of_run(self._client.runs.run_service_retry_run, run_id)

    def _call(self, method: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        with _explained(self.host):
            answer = method(*arguments, _request_timeout=_REQUEST_TIMEOUT_S, **named)
        return answer

    def _made(self, method: Callable[..., Any], kind: str, *arguments: Any, **named: Any) -> str:
        """The id of what a call has made."""
        made = getattr(self._call(method, *arguments, **named), f"{kind}_id", None)
        if not made:
            raise _unexpected_answer(self.host)
        return str(made)

    def _of_run(self, method: Callable[..., Any], run_id: str) -> Any:
        try:
            return self._call(method, run_id)
        except _NotFound as failure:
            raise ConfigError(f"{self.host} has no run {run_id!r}; `moesaic status` lists the runs") from failure

    def _in(self, namespace: str) -> dict[str, str]:
        """The namespace argument; a server in single-user mode refuses it."""
        return {"namespace": namespace} if self._multi_user else {}

    def _find(self, listing: Callable[..., Any], kind: str, name: str, **named: Any) -> str | None:
        """The id of the object of this kind and name; None if there is none."""
        equal = {"operation": "EQUALS", "key": "display_name", "string_value": name}
        page = self._call(listing, filter=json.dumps({"predicates": [equal]}), **named)
        if not hasattr(page, kind):
            raise _unexpected_answer(self.host)
        objects = getattr(page, kind)
        return getattr(objects[0], f"{kind.removesuffix('s')}_id") if objects else None

    def _find_experiment(self, name: str, namespace: str) -> str | None:
        listing = self._client.experiments.experiment_service_list_experiments
        return self._find(listing, "experiments", name, **self._in(namespace))

    def _upload_version(self, pipeline_id: str, version: str, text: str) -> str:
        with TemporaryDirectory() as directory:
            path = Path(directory, f"{version}.yaml")
            path.write_text(text)
            uploading = self._client.pipeline_uploads.upload_pipeline_version
            return self._made(uploading, "pipeline_version", str(path), name=version, pipelineid=pipeline_id)

    def _leaves_of(self, run: Any) -> dict[str, tuple[str, ...]] | None:
        """The tasks that run stages, which Kubeflow lists among many of its own; None if unknown."""
        if run.pipeline_spec:
            return read_leaves(run.pipeline_spec)
        reference = run.pipeline_version_reference
        if reference is None:
            return None
        key = reference.pipeline_version_id
        if key not in self._leaves:
            try:
                version = self._call(
                    self._client.pipelines.pipeline_service_get_pipeline_version, reference.pipeline_id, key
                )
                self._leaves[key] = read_leaves(version.pipeline_spec)
            except _NotFound:
                self._leaves[key] = None
        return self._leaves[key]

    def _explained(self, run_id: str, task: TaskStatus, nodes: WorkflowNodes) -> TaskStatus:
        """A task that failed with the reason that its log gives, if the server gives none."""
        if task.state != "FAILED" or task.message or not (place := nodes.place_of(task)):
            return task
        return replace(task, message=self._reason(run_id, nodes.pods(place, nodes.last_attempt(place))) or "")

    def _failed_unnamed(self, run_id: str, status: RunStatus, nodes: WorkflowNodes) -> Iterator[TaskStatus]:
        """Tasks that failed since the server stopped to name tasks: those whose log ends with the stage's error."""
        ended = {task.name for task in status.tasks if task.state in FINISHED}
        absent: set[str] = set()  # loops whose last turn has been seen
        for place in nodes.places():
            if place.title in ended or place.name in absent:
                continue
            reason = self._reason(run_id, nodes.pods(place, nodes.last_attempt(place)))
            if reason is None and place.index:
                absent.add(place.name)
            elif reason and _is_stage_error(reason, place):
                yield TaskStatus(place.path, place.title, "FAILED", None, None, reason)

    def _reason(self, run_id: str, pods: Sequence[str]) -> str | None:
        """Why a stage failed, by the log of the first of its pods that has one; None if none has."""
        for pod in pods:
            key = (run_id, pod)
            if key not in self._reasons:
                log = self._log(run_id, pod)
                self._reasons[key] = None if log is None else _reason_in(log)
            if self._reasons[key] is not None:
                return self._reasons[key]
        return None

    def _log(self, run_id: str, pod: str) -> str | None:
        """The log of a pod; None where the server does not give it. Kubeflow's client has no method for it."""
        ask = self._client.runs.api_client.call_api
        try:
            answer = self._call(
                ask,
                f"/apis/v1alpha1/runs/{run_id}/nodes/{pod}/log",
                "GET",
                query_params=[("follow", "false")],
                auth_settings=["Bearer"],
                _preload_content=False,
                _return_http_data_only=True,
            )
        except MoesaicError:
            return None
        return bytes(answer.data).decode(errors="replace")


def _checked_host(host: str) -> str:
    if not host:
        raise ConfigError(f"no Kubeflow is named; give --host or set {HOST_VARIABLE}")
    parts = urlsplit(host)
    if parts.username or parts.password:
        raise ConfigError(f"the host must not hold a name or password; {_ACCESS}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"host {host!r} is no address; it begins with https:// or http://")
    return host.rstrip("/")


def _client(host: str) -> Any:
    """Kubeflow's client. Its constructor would probe the server for 25 s if it were given no other namespace."""
    from kfp import client

    token_file = Path(os.environ.get(_TOKEN_FILE_VARIABLE) or client.KF_PIPELINES_SA_TOKEN_PATH)
    if os.environ.get(_TOKEN_FILE_VARIABLE) and not os.access(token_file, os.R_OK):
        raise ConfigError(f"{_TOKEN_FILE_VARIABLE} names {token_file}, which cannot be read")
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    variables, proxy = site_variables(os.environ), proxy_for(host)
    check_files(variables)

    class SiteClient(client.Client):
        """What the client's own arguments leave out."""

        def _load_config(self, *arguments: Any, **named: Any) -> Any:
            config = super()._load_config(*arguments, **named)
            config.cert_file = variables.get(CLIENT_CERTIFICATE) or None
            config.proxy_headers = proxy_headers(proxy) if proxy else None
            return config

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return SiteClient(
            host,
            namespace="moesaic",
            existing_token=os.environ.get(_TOKEN_VARIABLE),
            credentials=client.ServiceAccountTokenVolumeCredentials(str(token_file)) if token_file.is_file() else None,
            proxy=proxy,
            ssl_ca_cert=variables.get("SSL_CERT_FILE"),
        )


@contextmanager
def _explained(host: str) -> Iterator[None]:
    """Turn exceptions of Kubeflow's client into Moesaic's errors."""
    from kfp_server_api import ApiException
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ApiException as failure:
        raise _refusal(host, failure.status or 0, failure.body or failure.reason or "") from failure
    except HTTPError as failure:
        reason = re.sub(r"^.*?[>)]: ", "", str(getattr(failure, "reason", None) or failure))
        raise Unavailable(f"{host} cannot be reached: {reason}") from failure
    except (AttributeError, TypeError, ValueError) as failure:
        raise _unexpected_answer(host) from failure


def _unexpected_answer(host: str) -> ConfigError:
    return ConfigError(f"{host} does not answer as Kubeflow Pipelines does, maybe with a page to log in; {_ACCESS}")


def _refusal(host: str, status: int, body: str) -> MoesaicError:
    if status == 401:
        return ConfigError(f"{host} does not know who you are (401); {_ACCESS}")
    try:
        reason = str(json.loads(body)["message"])
    except (KeyError, TypeError, ValueError):
        reason = body
    reason = re.sub(r"(?i)bearer\s+\S+", f"Bearer {HIDDEN}", " ".join(reason.split()))[:_MESSAGE_LENGTH]
    if status == 429 or status >= 500:
        return Unavailable(f"{host} fails ({status}): {reason}")
    kinds: dict[int, type[ConfigError]] = {403: _Forbidden, 404: _NotFound, 409: _Conflict}
    return kinds.get(status, ConfigError)(f"{host} refuses ({status}): {reason}")


def _find_or_make(find: Callable[[], str | None], make: Callable[[], str]) -> tuple[str, bool]:
    """An id, and whether this call has created it; another client may create the same object at the same time."""
    if object_id := find():
        return object_id, False
    try:
        return make(), True
    except (_Conflict, Unavailable):
        if object_id := find():
            return object_id, False
        raise


def _run_status(run: Any, tasks: Sequence[TaskStatus], named_until: datetime | None = None) -> RunStatus:
    state, ended = run.state or "PENDING", run.finished_at
    before = [entry.state for entry in run.state_history or [] if entry.state][-2:-1]
    if state == "FAILED" and before == ["CANCELING"]:
        state = "CANCELED"  # as the server says of runs that nobody has cancelled, but not of these
    return RunStatus(
        run.run_id,
        run.display_name,
        state,
        run.created_at,
        ended if ended and ended.year > 1970 else None,
        read_message(run.error),
        tuple(tasks),
        named_until,
    )


def _reason_in(log: str) -> str:
    """Why a stage failed, by its log: its own error, else the last lines."""
    lines = [line.rstrip() for line in log.splitlines() if line.strip()]
    errors = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    reason = lines[errors[-1] :] if errors else lines[-_LINES_SHOWN:]
    return "\n".join(reason)[-_REASON_LENGTH:].removeprefix("error: ")


def _is_stage_error(reason: str, place: Place) -> bool:
    """Whether a stage has written this, rather than that its log just ends."""
    return reason.startswith(place.name.rstrip("0123456789").rstrip("-").replace("-", "_") + ": ")


def _begin(task: TaskStatus) -> float:
    return task.changes[0].moment.timestamp() if task.changes else math.inf
