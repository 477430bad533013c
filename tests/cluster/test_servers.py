"""MLflow's server over PostgreSQL as pods: who is let in, what a task logs, a promotion, and restarts of both."""

import base64
import json
import re
import secrets
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from moesaic.core.code import code_version
from moesaic.pipelines import compiled
from moesaic.platform.cluster import ClusterProfile
from moesaic.platform.ingest.stage import IngestConfig
from moesaic.platform.registry.registry import CHAMPION, Registry, RegistryAddress
from tests.cluster.pods import KUBECTL, NAMESPACE, PipelineDriver, Reader, apply, kubectl, needs_images
from tests.platform.test_promote import CONFIG, Given, prepare

HERE = Path(__file__).parent
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800), needs_images("servers", "postgres")]
ADMIN, TASKS, STRANGER = "admin", "tasks", "stranger"
_AUTH = """[mlflow]
default_permission = NO_PERMISSIONS
database_uri = postgresql+psycopg2://mlflow:{password}@postgres:5432/mlflow_auth
admin_username = admin
admin_password = {password}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
"""


@dataclass(frozen=True)
class Server:
    """MLflow's server as it is reached from here."""

    passwords: dict[str, str]

    @contextmanager
    def reached(self) -> Iterator[str]:
        """Its address, while its port is forwarded through the service."""
        command = [KUBECTL, "-n", NAMESPACE, "port-forward", "service/mlflow", ":5000"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            found = re.search(r"127\.0\.0\.1:(\d+)", process.stdout.readline())
            assert found, "the port is forwarded"
            try:
                yield f"http://localhost:{found[1]}"
            finally:
                process.terminate()

    def ask(self, address: str, call: str, user: str | None = None, body: Any = None) -> Any:
        """A request of MLflow's REST API."""
        request = urllib.request.Request(
            f"{address}/api/2.0/mlflow/{call}", json.dumps(body).encode() if body else None
        )
        request.add_header("Content-Type", "application/json")
        if user:
            token = base64.b64encode(f"{user}:{self.passwords.get(user, 'wrong')}".encode()).decode()
            request.add_header("Authorization", f"Basic {token}")
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def status(self, call: str, user: str | None = None, body: Any = None) -> int:
        """With what status such a request is refused."""
        with self.reached() as address, pytest.raises(urllib.error.HTTPError) as refused:
            self.ask(address, call, user, body)
        refused.value.close()
        return int(refused.value.code)

    def runs(self) -> list[dict[str, Any]]:
        """What the tasks' user sees of runs."""
        with self.reached() as address:
            experiment = self.ask(address, "experiments/get-by-name?experiment_name=moesaic", TASKS)["experiment"]
            asked = {"experiment_ids": [experiment["experiment_id"]]}
            found: list[dict[str, Any]] = self.ask(address, "runs/search", TASKS, asked)["runs"]
        return found


@pytest.fixture(scope="module")
def server(small: None, reader: Reader, record: dict[str, Any]) -> Server:
    """The server, with users; the namespace takes it away with everything."""
    passwords = {name: secrets.token_urlsafe(16) for name in (ADMIN, TASKS, STRANGER)}
    password, begun = passwords[ADMIN], time.monotonic()
    make_secret("postgres", password=password)
    make_secret(
        "mlflow",
        **{
            "backend-store-uri": f"postgresql+psycopg2://mlflow:{password}@postgres:5432/mlflow",
            "flask-secret-key": secrets.token_urlsafe(16),
            "basic_auth.ini": _AUTH.format(password=password),
        },
    )
    make_secret("moesaic-store", AWS_ACCESS_KEY_ID="someone", AWS_SECRET_ACCESS_KEY="something")
    make_secret("mlflow-user", username=TASKS, password=passwords[TASKS])
    kubectl("apply", "--server-side", "-k", str(HERE / "servers"))
    kubectl("rollout", "status", "deployment/s3", "--timeout=600s")
    reader.run("python3", "-c", _BUCKET)
    wait_ready()
    record["servers_ready_s"] = round(time.monotonic() - begun, 1)
    server = Server(passwords)
    with server.reached() as address:
        for name in (TASKS, STRANGER):
            server.ask(address, "users/create", ADMIN, {"username": name, "password": passwords[name]})
    return server


_BUCKET = """
import urllib.request
urllib.request.urlopen(urllib.request.Request("http://s3:5000/moesaic", method="PUT"))
"""


def make_secret(name: str, **values: str) -> None:
    metadata = {"name": name, "namespace": NAMESPACE}
    apply({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": values})


def wait_ready() -> None:
    kubectl("rollout", "status", "statefulset/postgres", "--timeout=600s")
    kubectl("rollout", "status", "deployment/mlflow", "--timeout=600s")


@pytest.fixture(scope="module")
def logged(server: Server, profile: ClusterProfile, reader: Reader, ingest: IngestConfig) -> list[dict[str, Any]]:
    """The runs after a task that logs through the service as the user of a secret."""
    values = profile.model_dump()
    values["environment"] |= {"MLFLOW_TRACKING_URI": "http://mlflow:5000"}
    variables = {"MLFLOW_TRACKING_USERNAME": "username", "MLFLOW_TRACKING_PASSWORD": "password"}
    values["secrets"] = [{"secret": "mlflow-user", "variables": variables}]
    driver = PipelineDriver(
        compiled()["search"], ClusterProfile.model_validate(values), {"version": code_version()}, reader
    )
    driver.run_task("ingest", ingest.to_json(), {})
    return server.runs()


def test_who_gives_no_name_or_a_wrong_password_is_refused(server: Server) -> None:
    search = ("experiments/search?max_results=1",)
    assert server.status(*search) == 401
    assert server.status(*search, "nobody") == 401


def test_a_task_logs_its_run_and_strangers_do_not_see_it(server: Server, logged: list[dict[str, Any]]) -> None:
    (run,) = logged
    assert run["info"]["status"] == "FINISHED"
    assert "ingest" in run["info"]["run_name"]
    run_id = run["info"]["run_id"]
    for call in (f"runs/get?run_id={run_id}", f"artifacts/list?run_id={run_id}"):
        assert server.status(call, STRANGER) == 403
    assert server.status("runs/set-tag", STRANGER, {"run_id": run_id, "key": "mine", "value": "yes"}) == 403


def test_a_promotion_and_the_runs_outlive_restarts_of_both(
    server: Server,
    logged: list[dict[str, Any]],
    record: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", TASKS)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", server.passwords[TASKS])
    given = prepare(tmp_path, "puzzle")
    assert promoted(server, given, tmp_path / "first") == (1, "promoted")
    assert server.status(f"registered-models/get?name={CONFIG.model}", STRANGER) == 403
    begun = time.monotonic()
    for one in ("statefulset/postgres", "deployment/mlflow"):
        kubectl("rollout", "restart", one)
    wait_ready()
    record["servers_restarted_s"] = round(time.monotonic() - begun, 1)
    assert server.runs() == logged
    with server.reached() as address:
        version = Registry(RegistryAddress(address), CONFIG.model).version(CHAMPION)
        run_id = logged[0]["info"]["run_id"]
        files = server.ask(address, f"artifacts/list?run_id={run_id}", TASKS)["files"]
    assert (version.number, version.tags["moesaic.gate"]) == (1, "met")
    assert files, "artifacts are found through the database"
    assert promoted(server, given, tmp_path / "again") == (1, "already")


def promoted(server: Server, given: Given, output: Path) -> tuple[int, str]:
    with server.reached() as address:
        found = given.promote(RegistryAddress(address), CONFIG, output)
    return found["version"], found["outcome"]
