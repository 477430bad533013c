"""A site's own certificates, as a profile names them: mounted in a task and in a job's node, and shown to a server."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moesaic.core.code import code_version
from moesaic.pipelines import compiled
from moesaic.platform.cluster import ClusterProfile
from moesaic.platform.ingest.stage import IngestConfig
from tests.cluster.pods import NAMESPACE, PipelineDriver, Reader, apply, kubectl, needs_images, restricted_pod
from tests.cluster.test_faults import job, run
from tests.site_servers import write_certificates

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(2400), needs_images("cpu")]
NAME, PORT = "site", 5443
ADDRESS = f"https://{NAME}:{PORT}"
_SERVE = (
    f"mlflow server --host 0.0.0.0 --port {PORT} --workers 1 --allowed-hosts {NAME}:{PORT}"
    " --backend-store-uri sqlite:////tmp/mlflow.db --artifacts-destination /tmp/artifacts --uvicorn-opts"
    " '--ssl-certfile /site/server.pem --ssl-keyfile /site/server.pem --ssl-ca-certs /site/ca.pem --ssl-cert-reqs 2'"
)
"""MLflow behind TLS, for those who show a certificate of the site."""
_RUNS = """
import json, sqlite3
print(json.dumps(sqlite3.connect("/tmp/mlflow.db").execute("select name, status from runs").fetchall()))
"""
_ASK = f"import urllib.request; urllib.request.urlopen('{ADDRESS}/health')"
_ASK_AS_CLIENT = f"""
import os, ssl, urllib.request
context = ssl.create_default_context()
context.load_cert_chain(os.environ["SSL_CLIENT_CERT"])
print(urllib.request.urlopen("{ADDRESS}/health", context=context).status)
"""


@pytest.fixture(scope="module")
def site(profile: ClusterProfile, reader: Reader, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterProfile]:
    """A server of the site, and the profile of a cluster at it."""
    folder = tmp_path_factory.mktemp("site")
    write_certificates(folder, NAME)
    client, server, authority = (
        (folder / name).read_text() for name in ("client.pem", "server.pem", "authorities.pem")
    )
    apply(
        thing("ConfigMap", "authorities", data={"ca.pem": authority}),
        thing("Secret", "client", stringData={"tls.pem": client}),
        thing("Secret", NAME, stringData={"server.pem": server, "ca.pem": authority}),
    )
    serve(profile)
    certificates = {
        "authorities": {"config_map": "authorities", "key": "ca.pem"},
        "client": {"secret": "client", "key": "tls.pem"},
    }
    environment = profile.environment | {"MLFLOW_TRACKING_URI": ADDRESS}
    yield ClusterProfile.model_validate(
        profile.model_dump() | {"certificates": certificates, "environment": environment}
    )
    kubectl("delete", f"deployment/{NAME}", f"service/{NAME}", f"secret/{NAME}", "secret/client", "cm/authorities")


def thing(kind: str, name: str, api: str = "v1", **content: Any) -> dict[str, Any]:
    """An object of the namespace."""
    return {"apiVersion": api, "kind": kind, "metadata": {"name": name, "namespace": NAMESPACE}, **content}


def serve(profile: ClusterProfile) -> None:
    container = {
        "image": profile.image_for("ingest", ""),
        "command": ["sh", "-c", _SERVE],
        "resources": {"requests": {"cpu": "50m", "memory": "256Mi"}},
        "readinessProbe": {"tcpSocket": {"port": PORT}},
    }
    pod = restricted_pod(container, profile) | {"restartPolicy": "Always"}
    pod["volumes"].append({"name": NAME, "secret": {"secretName": NAME}})
    pod["containers"][0]["volumeMounts"].append({"name": NAME, "mountPath": "/site", "readOnly": True})
    labels = {"app": NAME}
    template = {"metadata": {"labels": labels}, "spec": pod}
    apply(
        thing("Service", NAME, spec={"selector": labels, "ports": [{"port": PORT}]}),
        thing("Deployment", NAME, "apps/v1", spec={"selector": {"matchLabels": labels}, "template": template}),
    )
    kubectl("rollout", "status", f"deployment/{NAME}", "--timeout=600s")


def test_a_task_shows_the_sites_certificate_and_logs_its_run(
    site: ClusterProfile, reader: Reader, ingest: IngestConfig
) -> None:
    with pytest.raises(AssertionError, match="certificate verify failed"):
        reader.run("python3", "-c", _ASK)
    driver = PipelineDriver(compiled()["search"], site, {"version": code_version()}, reader)
    driver.run_task("ingest", ingest.to_json(), {})
    ((name, status),) = json.loads(kubectl("exec", f"deployment/{NAME}", "--", "python3", "-c", _RUNS))
    assert (name.partition(" ")[0], status) == ("ingest", "FINISHED")


def test_a_node_of_a_job_shows_the_sites_certificate(site: ClusterProfile, tmp_path: Path) -> None:
    try:
        assert run(job(site, "8"), f"python3 -c '{_ASK_AS_CLIENT}'", tmp_path) == ["200"]
    finally:
        kubectl("delete", "trainjobs", "--all", "--wait")
