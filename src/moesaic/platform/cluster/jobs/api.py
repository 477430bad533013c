"""The requests to the Kubernetes API that a job needs, repeated while the server cannot answer.

There are no watches: a training runs for hours, and asking every few seconds has nothing that expires or is cut off.
"""

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from math import ceil
from typing import Any, TypeVar

from moesaic.core.errors import ConfigError, StageError
from moesaic.core.network import proxy_for, proxy_headers
from moesaic.platform.cluster.jobs.settings import JobSettings

Object = dict[str, Any]
Answer = TypeVar("Answer")
_PASSES = frozenset({408, 410, 429, 500, 502, 503, 504})
"""Statuses after which the same request is tried again."""
_GONE, _TAKEN, _NOT_YET, _FORBIDDEN = 404, 409, 400, 403
_WORKLOADS, _UID_LABEL = ("kueue.x-k8s.io", "v1beta2", "workloads"), "kueue.x-k8s.io/job-uid"
"""What Kueue makes of a job that waits in a queue."""
_TIMEOUT_S = (10, 60)
_AS_IT_IS = {"_preload_content": False, "_request_timeout": _TIMEOUT_S}
"""The answer's bytes: the client's own classes refuse what they do not know, and logs that are no UTF-8."""
_OVERLAP_S = 10
"""Log lines are asked for again that far back, so that none is lost between two clocks."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0


class JobsApi:
    """Jobs of one kind in one namespace, their pods and logs."""

    def __init__(self, settings: JobSettings) -> None:
        self._kind, self._container, self._patience_s = settings.kind, settings.container, settings.patience_s
        self._namespace = settings.template["metadata"]["namespace"]
        group, _, version = settings.template["apiVersion"].partition("/")
        self._resource = (group, version, self._namespace, f"{settings.kind.lower()}s")
        try:
            from kubernetes import client
        except ImportError as missing:
            raise ConfigError("a job needs the package kubernetes; install moesaic[jobs]") from missing
        connection = client.ApiClient(_configuration())
        self._custom, self._core = client.CustomObjectsApi(connection), client.CoreV1Api(connection)

    def jobs(self, selector: str) -> list[Object]:
        """All jobs with these labels."""
        ask = self._custom.list_namespaced_custom_object
        options = {"label_selector": selector, "_request_timeout": _TIMEOUT_S}
        jobs: list[Object] = self._ask(
            "list", lambda: [self._read(one) for one in ask(*self._resource, **options)["items"]]
        )
        return jobs

    def job(self, name: str) -> Object | None:
        """One job; None if there is none of this name."""
        ask = self._custom.get_namespaced_custom_object
        get = partial(ask, *self._resource, name, _request_timeout=_TIMEOUT_S)
        job: Object | None = self._ask("get", lambda: self._read(get()), (_GONE,))
        return job

    def create(self, job: Object) -> None:
        """Create a job. If one of its name exists, it is this one: the answer to an earlier request was lost."""
        ask = self._custom.create_namespaced_custom_object
        self._ask("create", lambda: ask(*self._resource, job, _request_timeout=_TIMEOUT_S), absent=(_TAKEN,))

    def delete(self, name: str) -> None:
        """Delete a job with all that it started; it may be gone already."""
        ask = self._custom.delete_namespaced_custom_object
        options = {"propagation_policy": "Background", "_request_timeout": _TIMEOUT_S}
        self._ask("delete", lambda: ask(*self._resource, name, **options), absent=(_GONE,))

    def queue_message(self, uid: str) -> str:
        """Why Kueue does not admit the job of this uid, in its words; empty where it says nothing or refuses."""
        ask, where = self._custom.list_namespaced_custom_object, (*_WORKLOADS[:2], self._namespace, _WORKLOADS[2])
        selector = f"{_UID_LABEL}={uid}"
        answer = self._ask(
            "list workloads",
            lambda: ask(*where, label_selector=selector, _request_timeout=_TIMEOUT_S),
            absent=(_FORBIDDEN, _GONE),
        )
        states = [workload.get("status", {}) for workload in (answer or {}).get("items", [])]  # a new one has none
        conditions = [one for state in states for one in state.get("conditions", [])]
        waiting = [one for one in conditions if one["type"] == "QuotaReserved" and one["status"] == "False"]
        return str(waiting[0]["message"]) if waiting else ""

    def pods(self, selector: str) -> list[Object]:
        """All pods with these labels."""
        ask, options = self._core.list_namespaced_pod, {"label_selector": selector, **_AS_IT_IS}
        read = lambda: list(json.loads(ask(self._namespace, **options).data)["items"])  # noqa: E731
        pods: list[Object] = self._ask("list pods", read)
        return pods

    def log(self, pod: str, since_s: float | None = None, last_lines: int | None = None) -> str:
        """A pod's log with a time before each line, or its last lines without; empty where it has none or is gone.

        Args:
            pod: its name.
            since_s: leave out what is older than this time of ``time.monotonic``, and some seconds.
            last_lines: how many.
        """
        options: dict[str, Any] = {"container": self._container, "timestamps": last_lines is None, **_AS_IT_IS}
        options |= {"tail_lines": last_lines} if last_lines else {}

        def ask() -> bytes:
            back = {} if since_s is None else {"since_seconds": ceil(time.monotonic() - since_s) + _OVERLAP_S}
            return bytes(self._core.read_namespaced_pod_log(pod, self._namespace, **options, **back).data)

        content = self._ask("read a pod's log", ask, absent=(_GONE, _NOT_YET))
        return "" if content is None else content.decode(errors="replace")

    def _read(self, answer: Object) -> Object:
        """A job as the API gave it; lists leave out what kind it is. KeyError: it is no object of that API."""
        return {"kind": self._kind, **answer, "metadata": answer["metadata"]}

    def _ask(self, what: str, request: Callable[[], Answer], absent: tuple[int, ...] = ()) -> Answer | Any:
        """Ask until there is an answer; None for a status in ``absent``."""
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        begun, pause_s = time.monotonic(), _FIRST_PAUSE_S
        while True:
            try:
                return request()
            except ApiException as answer:
                if answer.status in absent:
                    return None
                lost = f"{answer.status} {_said(answer)}"
                if answer.status not in _PASSES:
                    raise StageError(
                        f"Kubernetes refuses to {what} (a {self._kind} in the namespace {self._namespace}): {lost}; "
                        "see the role moesaic-pipeline in manifests/base, and what docs/cluster.md says a cluster has"
                    ) from answer
            except HTTPError as cut:
                lost = f"{type(cut).__name__}: {cut}"
            except (AttributeError, KeyError, TypeError, ValueError) as strange:
                raise StageError(
                    f"what should be the Kubernetes API answers otherwise when asked to {what} "
                    f"({type(strange).__name__}), maybe with a page to log in; is the server in KUBECONFIG right?"
                ) from strange
            if time.monotonic() - begun > self._patience_s:
                raise StageError(
                    f"the Kubernetes API has not answered for {self._patience_s:.0f} s ({lost}); the job is left as it "
                    "is, and the stage goes on with it when it is started again"
                )
            time.sleep(min(pause_s, self._patience_s))
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def _configuration() -> Any:
    """The server that the pod's account, or a kubeconfig, names with its certificates; a pod asks its own directly."""
    from kubernetes import client, config

    configuration = client.Configuration()
    configuration.retries = False  # it is asked again here
    try:
        if "KUBERNETES_SERVICE_HOST" in os.environ:
            config.load_incluster_config(client_configuration=configuration)
        else:
            config.load_kube_config(config_file=os.environ.get("KUBECONFIG"), client_configuration=configuration)
            configuration.proxy = proxy_for(configuration.host)
            configuration.proxy_headers = proxy_headers(configuration.proxy or "")
    except config.ConfigException as missing:
        raise ConfigError(f"a job needs a Kubernetes API server: {missing}") from missing
    return configuration


def _said(answer: Any) -> str:
    """The message in the server's answer, else its status line."""
    with suppress(ValueError, TypeError, KeyError):
        return str(json.loads(answer.body)["message"])
    return str(answer.reason)
