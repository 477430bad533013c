"""A real S3 server on loopback, a bucket for each test, a proxy in front of it that can fail; a real MLflow server."""

import hashlib
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import pytest

from moesaic.platform.store import S3Options, Store

from .faulty_proxy import FaultyProxy
from .mlflow_server import MlflowServer, started_server

SECRET = "a-secret-that-nobody-shows"
PART_BYTES = 64 * 2**10
_SERVER = """
import threading
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server

# As in S3, and unlike in plain moto: every operation is atomic.
application, lock = DomainDispatcherApplication(create_backend_app), threading.Lock()
def atomic(environ, start_response):
    with lock:
        return application(environ, start_response)

server = make_server("127.0.0.1", 0, atomic, threaded=True, request_handler=MotoRequestHandler)
print(server.server_address[1], flush=True)
server.serve_forever()
"""


def start_server(**environment: str) -> tuple[subprocess.Popen[str], tuple[str, int]]:
    """moto's server in a process of its own."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _SERVER],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | environment,
    )
    assert process.stdout is not None
    return process, ("127.0.0.1", int(process.stdout.readline()))


def stop_server(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


@pytest.fixture(scope="session")
def mlflow_server() -> Iterator[MlflowServer]:
    """Shared by the files that need it: it takes long to start."""
    with started_server() as running:
        yield running


@pytest.fixture(scope="session")
def s3_server() -> Iterator[tuple[str, int]]:
    process, place = start_server()
    yield place
    stop_server(process)


@pytest.fixture
def proxy(s3_server: tuple[str, int]) -> Iterator[FaultyProxy]:
    proxy = FaultyProxy(s3_server)
    yield proxy
    proxy.stop()


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Credentials and a cache for this test alone; nothing of the machine's own settings."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "MOESAIC_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "tester")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def client(s3_server: tuple[str, int]) -> Any:
    """Straight to the server, around the proxy."""
    return boto3.session.Session("tester", SECRET, region_name="us-east-1").client(
        "s3", endpoint_url=f"http://{s3_server[0]}:{s3_server[1]}"
    )


@pytest.fixture
def bucket(client: Any) -> str:
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    client.create_bucket(Bucket=name)
    return name


@pytest.fixture
def address(bucket: str) -> str:
    return f"s3://{bucket}/team/models"


@pytest.fixture
def options(proxy: FaultyProxy) -> S3Options:
    """Through the proxy, with small parts and little patience."""
    return S3Options(
        endpoint_url=proxy.url,
        region="us-east-1",
        part_bytes=PART_BYTES,
        connections=3,
        attempts=3,
        retry_delay_s=0.01,
        timeout_s=5,
    )


@pytest.fixture
def store(address: str, options: S3Options) -> Store:
    return Store.at(address, options)


@pytest.fixture
def elsewhere(address: str, options: S3Options, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Store:
    """The same bucket from a machine that has fetched nothing yet."""
    with monkeypatch.context() as patch:
        patch.setenv("MOESAIC_CACHE", str(tmp_path / "other-cache"))
        return Store.at(address, replace(options))


@pytest.fixture
def parts(model: Path) -> list[str]:
    """Digests of the parts of its large file."""
    content = (model / "weights.bin").read_bytes()
    pieces = [content[start : start + PART_BYTES] for start in range(0, len(content), PART_BYTES)]
    return [hashlib.sha256(piece).hexdigest() for piece in pieces]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two files: one of a single part, one of six with a short last one."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "weights.bin").write_bytes(os.urandom(5 * PART_BYTES + 1000))
    return directory
