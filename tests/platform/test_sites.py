"""Behind a proxy, with an authority and client certificates of the site's own, every connection gets through.

The server asks for a client's certificate and answers 401, so an error that names 401 came from behind all of it.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import close_session, constants

from moesaic.core.errors import MoesaicError
from moesaic.core.hub import fetch as fetch_from_hub
from moesaic.core.network import site_variables
from moesaic.core.own_environment import own_variables
from moesaic.core.virtual_environment import why_unreachable
from moesaic.deploy.engines import Server
from moesaic.deploy.engines.completions import Completion, RequestSettings, complete
from moesaic.deploy.engines.server_answers import fetch
from moesaic.deploy.engines.vllm.engine import variables as vllm_variables
from moesaic.platform.cluster.jobs.api import JobsApi
from moesaic.platform.cluster.jobs.settings import JobSettings
from moesaic.platform.cluster.submission import Kubeflow
from moesaic.platform.registry.registry import Registry, RegistryAddress
from moesaic.platform.runs.tracking import pipeline_run
from moesaic.platform.store import S3Options, Store
from tests.site_servers import HOST, Site, site_servers

_NETWORK = ("PROXY", "SSL_", "CA_BUNDLE", "PIP_CERT", "PIP_CLIENT", "MLFLOW_TRACKING_")
UV = shutil.which("uv") or str(Path(__file__).parents[2] / "build/tools/bin/uv")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site_servers(tmp_path_factory.mktemp("site")) as running:
        yield running


@pytest.fixture(params=["lower", "upper"])
def at_site(request: pytest.FixtureRequest, site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Site:
    """Only the common variables are set: proxies in one of the cases, authorities by one of two names."""
    for name in [name for name in os.environ if any(part in name.upper() for part in _NETWORK)]:
        monkeypatch.delenv(name)
    upper = request.param == "upper"
    monkeypatch.setenv("HTTPS_PROXY" if upper else "https_proxy", site.proxy)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE" if upper else "SSL_CERT_FILE", str(site.authorities))
    monkeypatch.setenv("SSL_CLIENT_CERT", str(site.certificate))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr("moesaic.deploy.engines.completions._MAX_RETRIES", 0)
    monkeypatch.setenv("KUBECONFIG", str(_kubeconfig(site, tmp_path)))
    site.asked.clear(), site.tunnels.clear()
    return site


def _kubeconfig(site: Site, folder: Path) -> Path:
    """A kubeconfig has its own certificates."""
    files = f"client-certificate: {site.certificate}, client-key: {site.certificate}"
    (folder / "kubeconfig").write_text(
        f"""apiVersion: v1
kind: Config
clusters: [{{name: c, cluster: {{server: "{site.url}", certificate-authority: {site.authorities}}}}}]
users: [{{name: u, user: {{{files}}}}}]
contexts: [{{name: x, context: {{cluster: c, user: u}}}}]
current-context: x
"""
    )
    return folder / "kubeconfig"


def _run_in_mlflow(url: str) -> None:
    with pipeline_run(url, "search", {}, "0"):
        pass


def _complete(url: str) -> None:
    list(
        complete(
            Server(url, "m", None, Path("log")), [Completion("p", (1,), 1, 0, 0)], RequestSettings(frozenset(), 1, 20)
        )
    )


def _jobs(_: str) -> None:
    template = {"apiVersion": "a/v1", "kind": "TrainJob", "metadata": {"namespace": "team"}}
    JobsApi(JobSettings.model_construct(kind="TrainJob", container="n", patience_s=0.1, template=template)).jobs("a=b")


CLIENTS: dict[str, Callable[[str], Any]] = {
    "models of a server": lambda url: fetch(f"{url}/v1/models", None, "a list"),
    "completions": _complete,
    "S3": lambda url: Store.at("s3://bucket/x", S3Options(endpoint_url=url, region="us-east-1", attempts=1)),
    "MLflow's registry": lambda url: Registry(RegistryAddress(url), "child").history(),
    "MLflow's runs": _run_in_mlflow,
    "Kubeflow": Kubeflow.connect,
    "Kubernetes": _jobs,
}


@pytest.mark.parametrize("client", CLIENTS)
def test_our_clients_get_through(client: str, at_site: Site) -> None:
    with pytest.raises(MoesaicError, match=r"401|nobody"):
        CLIENTS[client](at_site.url)
    assert at_site.tunnels and set(at_site.tunnels) == {f"{HOST}:443"}
    assert {who for _, _, who in at_site.asked} == {"a client of the site"}


def test_a_hub_of_the_sites_own_is_asked_the_same_way(
    at_site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", at_site.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for name, value in site_variables(os.environ).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(MoesaicError, match=f"the model a/b on {at_site.url}"):
        fetch_from_hub("a/b", None, "model", ["*"])
    close_session()  # which knows this site's proxy
    assert set(at_site.tunnels) == {f"{HOST}:443"}
    assert {who for _, _, who in at_site.asked} == {"a client of the site"}


def test_an_index_of_packages_is_looked_for_the_same_way(at_site: Site) -> None:
    assert why_unreachable(f"{at_site.url}/whl") == "HTTP Error 401: Unauthorized" or at_site.asked
    assert [(method, path) for method, path, _ in at_site.asked] == [("HEAD", "/whl")]


@pytest.mark.parametrize("program", ["pip", "uv"])
def test_installers_of_the_separate_environments_get_through(program: str, at_site: Site, tmp_path: Path) -> None:
    index = ["--index-url", f"{at_site.url}/simple", "nothing-of-ours"]
    command = [sys.executable, "-m", "pip", "download", "--no-input", "--retries", "0", *index]
    if program == "uv":
        if not os.access(UV, os.X_OK):
            pytest.skip("uv is not installed")
        (tmp_path / "in.txt").write_text("nothing-of-ours")
        command = [UV, "--no-config", "--no-cache", "pip", "compile", "in.txt", *index[:2]]
    variables = {name: value for name, value in own_variables().items() if name != "PIP_FIND_LINKS"}
    done = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert ("GET", "/simple/nothing-of-ours/", "a client of the site") in at_site.asked, done.stderr


def test_engines_and_load_clients_inherit_it(at_site: Site, tmp_path: Path) -> None:
    for variables in (vllm_variables(tmp_path), own_variables()):
        assert variables["https_proxy"] == variables["HTTPS_PROXY"] == at_site.proxy
        assert variables["SSL_CERT_FILE"] == variables["REQUESTS_CA_BUNDLE"] == str(at_site.authorities)
        assert "127.0.0.1" in variables["no_proxy"].split(",")


def test_another_authority_is_not_trusted(at_site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    for use in ("models of a server", "completions", "S3", "MLflow's registry", "Kubeflow"):
        with pytest.raises(MoesaicError):
            CLIENTS[use](at_site.url)
    assert at_site.asked == []
