"""The platform's servers answer as gateways and logins do: one explained error, never another library's traceback."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moesaic.core.errors import MoesaicError
from moesaic.platform.cluster.jobs.api import JobsApi
from moesaic.platform.cluster.jobs.settings import JobSettings
from moesaic.platform.cluster.submission import Kubeflow, PipelineVersion
from moesaic.platform.registry.registry import Registry, RegistryAddress
from moesaic.platform.runs.tracking import pipeline_run
from moesaic.platform.store import S3Options, Store
from tests.odd_answers import KEY, ODD, Answer, OddServer, odd_server

KUBECONFIG = """
apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "URL"}}]
users: [{name: u, user: {token: KEY}}]
contexts: [{name: x, context: {cluster: c, user: u}}]
current-context: x
"""


EMPTY_LIST = b"<ListBucketResult><Name>bucket</Name><IsTruncated>false</IsTruncated></ListBucketResult>"


@pytest.fixture(scope="module")
def odd() -> Iterator[OddServer]:
    with odd_server() as server:
        yield server


@pytest.fixture(autouse=True)
def access(monkeypatch: pytest.MonkeyPatch, odd: OddServer, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith(("KF_", "KFP_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("KFP_EXISTING_TOKEN", KEY)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", KEY)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (tmp_path / "kubeconfig").write_text(KUBECONFIG.replace("URL", odd.url).replace("KEY", KEY))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)


def explained(failure: pytest.ExceptionInfo[MoesaicError], where: str, answer: Answer) -> None:
    said = str(failure.value)
    assert where in said and KEY not in said and "\n" not in said and len(said) < 900
    if answer.status in (401, 403, 418):
        assert str(answer.status) in said or "no key ***" in said


@pytest.mark.parametrize("kind", ODD)
def test_the_registry(kind: str, odd: OddServer) -> None:
    odd.answer = ODD[kind]
    registry = Registry(RegistryAddress(odd.url), "child")
    for use in (lambda: registry.version("1"), lambda: registry.history(), lambda: registry.create()):
        with pytest.raises(MoesaicError) as failed:
            use()
        explained(failed, odd.url, odd.answer)


@pytest.mark.parametrize("kind", ODD)
def test_a_run_in_mlflow(kind: str, odd: OddServer) -> None:
    odd.answer = ODD[kind]
    with pytest.raises(MoesaicError) as failed, pipeline_run(odd.url, "search", {}, "0"):
        pass
    explained(failed, odd.url, odd.answer)


@pytest.mark.parametrize("kind", ODD)
def test_kubeflow(kind: str, odd: OddServer) -> None:
    odd.answer = ODD[kind]
    with pytest.raises(MoesaicError) as failed:
        Kubeflow.connect(odd.url).experiment("moesaic", "team")
    explained(failed, odd.url, odd.answer)


@pytest.mark.parametrize("kind", ODD)
def test_kubeflow_that_turns_odd_after_its_first_answer(kind: str, odd: OddServer) -> None:
    odd.answer = Answer(200, b'{"multi_user": true}', {"content-type": "application/json"})
    kubeflow = Kubeflow.connect(odd.url)
    odd.answer = ODD[kind]
    uses: list[Any] = [
        lambda: kubeflow.upload("compress", "1", "{}", "team"),
        lambda: kubeflow.experiment("moesaic", "team"),
        lambda: kubeflow.start("run", PipelineVersion("p", "v", False), "e", {}, "runner"),
        lambda: kubeflow.run("r"),
        lambda: kubeflow.runs("moesaic", "team"),
    ]
    for use in uses:
        with pytest.raises(MoesaicError) as failed:
            use()
        explained(failed, odd.url, odd.answer)


@pytest.mark.parametrize("kind", ODD)
def test_kubernetes(kind: str, odd: OddServer) -> None:
    odd.answer = ODD[kind]
    template = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"namespace": "team"},
    }
    api = JobsApi(JobSettings.model_construct(kind="TrainJob", container="node", patience_s=0.1, template=template))
    uses: list[Any] = [lambda: api.jobs("a=b"), lambda: api.pods("a=b")]
    for use in uses if kind.startswith("404") else [*uses, lambda: api.job("x")]:
        with pytest.raises(MoesaicError) as failed:
            use()
        explained(failed, "Kubernetes", odd.answer)


@pytest.mark.parametrize("kind", ODD)
def test_a_bucket(kind: str, odd: OddServer) -> None:
    options = S3Options(endpoint_url=odd.url, region="us-east-1", attempts=1, retry_delay_s=0)
    odd.answer = Answer(200, EMPTY_LIST)
    store = Store.at("s3://bucket/team", options)
    odd.answer = ODD[kind]
    uses: list[Any] = [lambda: Store.at("s3://bucket/team", options), lambda: list(store.root.items("manifests/"))]
    for use in uses:
        with pytest.raises(MoesaicError) as failed:
            use()
        explained(failed, "s3://bucket/team", odd.answer)
