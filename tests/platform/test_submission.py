"""Pipelines on a cluster's Kubeflow, against a stub of its API that checks requests by the real client's models."""

import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp_server_api import models

import moesaic.pipelines
from moesaic.command_line.main import main
from moesaic.core.code import code_version
from moesaic.pipelines import compiled
from moesaic.pipelines.recipes import RECIPES
from moesaic.platform.cluster import following, placed_text, read_profile
from moesaic.stages import STAGES
from tests.data_sets import write_sets
from tests.platform.kubeflow_api import PREFIX, Fault, KubeflowApi, Step
from tests.platform.workflow import fnv1a

TOKEN = "ey.secret-of-this-test"
PROFILE = {
    "namespace": "team",
    "service_account": "runner",
    "environment": {"MOESAIC_STORE": "/store"},
    "default": "cpu",
    "nodes": {"cpu": {"cpu": 2, "memory": "4Gi"}},
}
TASKS = {
    "root": {
        "dag": {
            "tasks": {
                "rank-experts": {"componentRef": {"name": "comp-rank-experts"}},
                "for-loop-1": {"componentRef": {"name": "comp-for-loop-1"}},
            }
        }
    },
    "components": {
        "comp-rank-experts": {"executorLabel": "exec-rank-experts"},
        "comp-reinforce": {"executorLabel": "exec-reinforce"},
        "comp-for-loop-1": {"dag": {"tasks": {"reinforce": {"componentRef": {"name": "comp-reinforce"}}}}},
    },
}
SUCCESS = [
    Step("RUNNING", {"rank-experts": "RUNNING"}),
    Step("RUNNING", {"rank-experts": "RUNNING"}),
    Step("RUNNING", {"rank-experts": "SUCCEEDED", "reinforce": "RUNNING", "reinforce#1": "CACHED"}),
    Step("SUCCEEDED", {"rank-experts": "SUCCEEDED", "reinforce": "SUCCEEDED", "reinforce#1": "CACHED"}),
]
FAILURE = [
    Step("RUNNING", {"rank-experts": "RUNNING"}),
    Step(
        "FAILED",
        {"rank-experts": ("FAILED", "OOMKilled: exit code 137"), "reinforce": "FAILED", "reinforce#1": "FAILED"},
    ),
]


@pytest.fixture
def api() -> Iterator[KubeflowApi]:
    server = KubeflowApi()
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that would have been waited; and nothing of this machine's own access to a Kubeflow."""
    for name in ("ENDPOINT", "UI_ENDPOINT", "SA_TOKEN_PATH", "IAP_OAUTH2_CLIENT_ID"):
        monkeypatch.delenv(f"KF_PIPELINES_{name}", raising=False)
    monkeypatch.delenv("KFP_EXISTING_TOKEN", raising=False)
    waited: list[float] = []
    monkeypatch.setattr(following, "sleep", waited.append)
    return waited


@pytest.fixture
def run(api: KubeflowApi) -> str:
    """The id of a run that somebody began."""
    return str(api.add_run(models.V2beta1Run(display_name="a run", experiment_id="-", pipeline_spec=TASKS)).run_id)


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    return write_profile(tmp_path / "profile.yaml")


@pytest.fixture
def submit(api: KubeflowApi, profile: Path, tmp_path: Path) -> list[str]:
    """A command line, with the example's parent; the store's volume is mounted here."""
    data = write_sets(tmp_path / "data")
    (tmp_path / "store").mkdir()
    given = ["--recipe", "tiny_cpu", "--data", str(data), "--host", api.url]
    return ["submit", "search", *given, "--profile", str(profile), "--store", str(tmp_path / "store")]


def write_profile(path: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump(PROFILE | changes))
    return path


def of(run: str, api: KubeflowApi, command: str, *more: str) -> int:
    return main([command, run, "--host", api.url, *more])


# ---- submitting ----


def test_a_run_has_the_recipes_arguments_and_the_profiles_account(
    submit: list[str], api: KubeflowApi, profile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*submit, "--no-wait", "--seed", "3", "--experiment", "trial"]) == 0
    (run,), (version,), (experiment,) = api.runs.values(), api.versions.values(), api.experiments.values()
    assert (run.service_account, run.experiment_id) == ("runner", experiment.experiment_id)
    assert (run.pipeline_version_reference.pipeline_version_id, experiment.display_name) == ("version-0", "trial")
    given = run.runtime_config.parameters
    assert given["version"] == code_version()
    assert given["rank_experts_config"] == RECIPES["tiny_cpu"]().rank_experts.to_json()
    parent = json.loads(given["ingest_config"])["parent"]
    assert (tmp_path / "store" / "manifests" / f"{parent}.json").is_file()
    text = placed_text(compiled()["search"], read_profile(profile), STAGES)
    assert list(version.pipeline_spec.values()) == [*yaml.safe_load_all(text)]
    out = capsys.readouterr().out
    assert version.display_name in out and "uploaded" in out
    assert f"run {run.run_id}: {api.url}/#/runs/details/{run.run_id}" in out


def test_a_version_is_uploaded_once_and_anew_when_the_profile_or_the_pipeline_changes(
    submit: list[str],
    api: KubeflowApi,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for _ in range(2):
        assert main([*submit, "--no-wait"]) == 0
    assert (len(api.runs), len(api.versions), len(api.pipelines), len(api.experiments)) == (2, 1, 1, 1)
    assert "known to the server" in capsys.readouterr().out

    write_profile(tmp_path / "profile.yaml", queue="night")
    assert main([*submit, "--no-wait"]) == 0
    assert (len(api.versions), len(api.pipelines)) == (2, 1)

    changed = tmp_path / compiled()["search"].name
    changed.write_text(compiled()["search"].read_text().replace("description: Find", "description: Seek"))
    monkeypatch.setattr(moesaic.pipelines, "compiled", lambda: {"search": changed})
    assert main([*submit, "--no-wait"]) == 0
    names = [one.display_name for one in api.versions.values()]
    assert len(set(names)) == len(names) == 3
    assert all(name.startswith(f"{changed.stem}-") for name in names)
    assert api.count("POST", "/pipelines/upload_version") == 3


def test_two_may_make_the_same_at_the_same_time(submit: list[str], api: KubeflowApi) -> None:
    def overtaken(method: str, path: str) -> bool:
        if (method, path) != ("POST", "/pipelines"):
            return False
        api.create_pipeline(models.V2beta1Pipeline(display_name="search"))
        return True

    api.faults.append(Fault(overtaken, 409, '{"message": "already exist"}'))
    assert main([*submit, "--no-wait"]) == 0
    assert [one.pipeline_id for one in api.versions.values()] == ["pipeline-0"]


def test_where_users_are_told_apart_all_is_in_the_profiles_namespace(submit: list[str], api: KubeflowApi) -> None:
    api.multi_user = True
    assert main([*submit, "--no-wait"]) == 0
    assert [one.namespace for one in (*api.pipelines.values(), *api.experiments.values())] == ["team", "team"]
    assert main(["status", *submit[submit.index("--host") : submit.index("--store")]]) == 0


def test_submitting_follows_to_the_end(submit: list[str], api: KubeflowApi, capsys: pytest.CaptureFixture[str]) -> None:
    api.script = [Step("RUNNING", {"rank-experts": "RUNNING"}), Step("SUCCEEDED", {"rank-experts": "SUCCEEDED"})]
    assert main(submit) == 0
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-2:] == [
        "[   10 s] rank_experts: running",
        "[  110 s] rank_experts: succeeded after 100 s",
    ]
    assert captured.out.splitlines()[-1].endswith("(tiny_cpu, seed 0): succeeded after 200 s")
    assert api.count("GET", "/versions/version-0") == 1, "it is asked once for the names of the tasks"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--recipe", "grand"], "there is no recipe 'grand'"),
        (["--profile", "none.yaml"], "there is no cluster profile none.yaml"),
        (["--store", "not/mounted"], "not/mounted is no directory here"),
        (["--store", "s3://bucket"], "s3://bucket is no directory here"),
    ],
)
def test_what_cannot_be_submitted_is_said_before_anything_is_sent(
    given: list[str], said: str, submit: list[str], api: KubeflowApi, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*submit, *given]) == 2
    assert said in capsys.readouterr().err
    assert api.log == []


def test_nodes_that_cannot_share_a_steps_rows_are_refused(
    submit: list[str], api: KubeflowApi, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    node = {"cpu": 1, "memory": "1Gi"}
    profile = write_profile(
        tmp_path / "profile.yaml",
        nodes={"plain": node, "three": {**node, "accelerators": 3}},
        default="plain",
        stages={"distill": "three"},
    )
    submit[1] = "compress"
    assert main([*submit, "--profile", str(profile)]) == 2
    assert "rows_per_step 8 is not a multiple of 3 processes x rows_per_forward 8 = 24" in capsys.readouterr().err
    assert api.log == []


def test_an_unknown_pipeline_is_said(submit: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    submit[1] = "expand"
    assert main(submit) == 2
    assert "there is no compiled pipeline 'expand'; choose one of" in capsys.readouterr().err


def test_another_bucket_than_the_tasks_one_is_refused(
    submit: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_profile(tmp_path / "profile.yaml", environment={"MOESAIC_STORE": "s3://team/models"})
    assert main(submit) == 2
    assert "is not where the cluster's tasks look, which is s3://team/models" in capsys.readouterr().err


# ---- following ----


def test_each_change_of_a_task_is_one_line(run: str, api: KubeflowApi, capsys: pytest.CaptureFixture[str]) -> None:
    api.script = SUCCESS
    assert of(run, api, "status", "--follow") == 0
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [
        "[   10 s] rank_experts: running",
        "[  210 s] rank_experts: succeeded after 200 s",
        "[  210 s] reinforce: running",
        "[  210 s] reinforce[1]: succeeded, from the cache",
        "[  310 s] reinforce: succeeded after 100 s",
    ]
    assert captured.out == "a run: succeeded after 400 s\n"


def test_a_failed_run_exits_with_1_and_says_which_tasks_failed(
    run: str, api: KubeflowApi, capsys: pytest.CaptureFixture[str]
) -> None:
    api.script = FAILURE
    workflow = api.workflows[run]
    api.logs = {
        workflow.pod("reinforce"): "reinforce: started\nTraceback\nerror: reinforce: no prompt is left\nadd some\n"
    }
    assert of(run, api, "status", "--follow") == 1
    err = capsys.readouterr().err
    assert "error: a run: failed after 200 s\n" in err
    assert "\n  rank_experts: OOMKilled: exit code 137\n" in err
    assert "\n  reinforce: reinforce: no prompt is left\nadd some\n" in err
    assert "\n  reinforce[1]: neither Kubeflow nor a log says why; its error is in MLflow" in err
    assert f"{api.url}/#/runs/details/{run}" in err


def test_a_task_that_kubeflow_could_not_prepare_is_named(
    run: str, api: KubeflowApi, capsys: pytest.CaptureFixture[str]
) -> None:
    api.script = [Step("FAILED", {"rank-experts-driver": ("FAILED", "no such claim")})]
    assert of(run, api, "status", "--follow") == 1
    assert "\n  rank_experts_driver: no such claim\n" in capsys.readouterr().err


def test_a_server_that_is_away_for_a_while_is_waited_for(
    run: str, api: KubeflowApi, waits: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    api.script = SUCCESS

    def once_begun(method: str, path: str) -> bool:
        return api.count("GET", f"/runs/{run}") > 2

    api.faults += [Fault(once_begun, 503), Fault(once_begun, 502, "<html>Bad Gateway</html>")]
    api.faults += [Fault(once_begun, 0)] * 4  # the client itself tries a connection that is cut four times
    assert of(run, api, "status", "--follow") == 0
    err = capsys.readouterr().err
    assert f"{api.url} fails (503): try later; trying again in 5 s" in err
    assert "fails (502)" in err and "trying again in 10 s" in err
    assert "cannot be reached" in err and "trying again in 20 s" in err
    assert waits == [5, 5, 5, 10, 20, 5]
    assert "rank_experts: succeeded" in err


def test_a_server_that_stays_away_is_given_up_and_the_run_is_not(
    run: str, api: KubeflowApi, waits: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    api.faults += [Fault(lambda method, path: path.startswith("/runs"), 503)] * 100
    assert of(run, api, "status", "--follow") == 1
    assert "the run goes on" in capsys.readouterr().err
    assert 3600 <= sum(waits) < 3600 + 2 * max(waits)


def test_an_interruption_leaves_the_run_and_says_how_to_go_on(
    run: str, api: KubeflowApi, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    api.script = SUCCESS
    monkeypatch.setattr(following, "sleep", interrupted)
    assert of(run, api, "status", "--follow") == 1
    assert f"the run goes on: `moesaic status {run} --follow --host {api.url}`" in capsys.readouterr().err
    assert api.count("POST", ":terminate") == 0


def test_status_of_a_run_and_of_all(
    run: str, submit: list[str], api: KubeflowApi, capsys: pytest.CaptureFixture[str]
) -> None:
    api.script = [Step("FAILED", {"rank-experts": "SUCCEEDED", "reinforce": "FAILED", "reinforce#1": "CACHED"})]
    assert of(run, api, "status") == 0
    out = capsys.readouterr().out
    assert out.startswith("a run: failed after 100 s\n")
    assert [line.split() for line in out.splitlines()[3:]] == [
        ["rank_experts", "succeeded"],
        ["reinforce", "failed"],
        ["reinforce[1]", "from", "the", "cache"],
    ]
    assert main([*submit, "--no-wait"]) == 0
    capsys.readouterr()
    assert main(["status", "--host", api.url, "--experiment", "moesaic"]) == 0
    (line,) = capsys.readouterr().out.splitlines()[1:]
    assert line.split()[0] == "run-1" and "(tiny_cpu, seed 0)" in line and "pending" in line


# ---- cancelling and retrying ----


def test_a_cancelled_run_ends_and_cannot_be_cancelled_again(
    run: str, api: KubeflowApi, capsys: pytest.CaptureFixture[str]
) -> None:
    assert of(run, api, "cancel", "--profile", "any.yaml") == 0
    assert f"run {run} is being cancelled" in capsys.readouterr().out
    assert api.runs[run].state == "CANCELING"
    assert of(run, api, "status", "--follow", "--profile", "any.yaml") == 1
    assert "error: a run: canceled" in capsys.readouterr().err
    assert api.runs[run].state == "FAILED", "as the real server has it"
    assert of(run, api, "cancel") == 2
    assert "refuses (400): Failed to terminate" in capsys.readouterr().err


def test_a_failed_run_is_retried_and_followed(run: str, api: KubeflowApi, capsys: pytest.CaptureFixture[str]) -> None:
    api.script = [*FAILURE, Step("RUNNING", {"rank-experts": "RUNNING"}), SUCCESS[-1]]
    assert of(run, api, "status", "--follow") == 1
    capsys.readouterr()
    assert of(run, api, "retry", "--follow", "--profile", "any.yaml") == 0
    captured = capsys.readouterr()
    assert f"run {run} runs again" in captured.out and "a run: succeeded" in captured.out
    assert [line for line in captured.err.splitlines() if "rank_experts" in line] == [
        "[   10 s] rank_experts: running",
        "[  110 s] rank_experts: failed after 100 s",
        "[  210 s] rank_experts: running, attempt 2",
        "[  310 s] rank_experts: succeeded after 100 s, attempt 2",
    ]
    assert of(run, api, "retry") == 2
    assert "cannot be retried" in capsys.readouterr().err


# ---- access ----


def test_without_a_token_one_is_told_how_to_give_it(
    run: str, api: KubeflowApi, capsys: pytest.CaptureFixture[str]
) -> None:
    api.token = TOKEN
    assert of(run, api, "status") == 2
    err = capsys.readouterr().err
    assert f"{api.url} does not know who you are (401); set KF_PIPELINES_SA_TOKEN_PATH" in err


def test_a_token_comes_from_a_file_or_the_environment_and_is_never_shown(
    run: str,
    api: KubeflowApi,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    api.token, api.script = TOKEN, SUCCESS
    file = tmp_path / "token"
    file.write_text(TOKEN)
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(file))
    assert of(run, api, "status", "--follow") == 0
    echo = json.dumps({"message": f"may not: Authorization: Bearer {TOKEN}"})
    for status in (403, 500):
        api.faults.append(Fault(lambda method, path: path.startswith("/runs"), status, echo))
        assert of(run, api, "status") != 0
    file.write_text("expired-" + TOKEN)
    assert of(run, api, "status") == 2

    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(tmp_path / "none"))
    assert of(run, api, "status") == 2
    monkeypatch.delenv("KF_PIPELINES_SA_TOKEN_PATH")
    monkeypatch.setenv("KFP_EXISTING_TOKEN", TOKEN)
    assert of(run, api, "status") == 0
    shown = capfd.readouterr()
    assert "refuses (403): may not" in shown.err
    assert "cannot be read" in shown.err
    assert TOKEN not in shown.out + shown.err


def test_a_host_that_does_not_answer_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host = f"http://127.0.0.1:{free.getsockname()[1]}"
    assert main(["status", "some-run", "--host", host]) == 2
    captured = capsys.readouterr()
    assert f"{host} cannot be reached: " in captured.err and "Connection refused" in captured.err
    assert len(captured.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (200, "<html>Log in</html>", "does not answer as Kubeflow Pipelines does"),
        (404, "not here", "--host is the address of Kubeflow Pipelines' API"),
        (403, "User may not", "refuses (403): User may not"),
    ],
)
def test_a_host_that_is_no_kubeflow_is_said(
    status: int, body: str, said: str, run: str, api: KubeflowApi, capsys: pytest.CaptureFixture[str]
) -> None:
    api.faults.append(Fault(lambda method, path: True, status, body))
    assert of(run, api, "status") == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("host", "said"),
    [
        ("", "no Kubeflow is named; give --host or set KF_PIPELINES_ENDPOINT"),
        ("kubeflow.example.com", "it begins with https:// or http://"),
        ("https://me:hunter2@kubeflow.example.com", "must not hold a name or password"),
    ],
)
def test_a_bad_host_is_said(host: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--host", host]) == 2
    err = capsys.readouterr().err
    assert said in err and "hunter2" not in err


def test_the_host_may_come_from_the_environment(
    run: str, api: KubeflowApi, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", api.url)
    monkeypatch.setenv("KF_PIPELINES_UI_ENDPOINT", "https://kubeflow.example.com/pipeline/")
    assert main(["status", run]) == 0
    assert f"https://kubeflow.example.com/pipeline/#/runs/details/{run}" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["status", "cancel", "retry"])
def test_an_unknown_run_is_said(command: str, api: KubeflowApi, capsys: pytest.CaptureFixture[str]) -> None:
    assert of("nobody's", api, command) == 2
    assert f'{api.url} has no run "nobody\'s"; `moesaic status` lists the runs' in capsys.readouterr().err


def test_an_unknown_experiment_is_said(api: KubeflowApi, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--host", api.url, "--experiment", "none"]) == 2
    assert "has no experiment 'none'" in capsys.readouterr().err


# ---- the stub itself, and what needs no server ----


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/experiments", '{"display_name": "one"}', 200),
        ("/experiments", '{"display_name": "one", "nonsense": 1}', 400),
        ("/experiments?nonsense=1", '{"display_name": "one"}', 400),
        ("/experiment", '{"display_name": "one"}', 404),
    ],
)
def test_the_stub_refuses_what_kubeflow_does_not_know(path: str, body: str, status: int, api: KubeflowApi) -> None:
    request = urllib.request.Request(f"{api.url}{PREFIX}{path}", body.encode(), method="POST")
    try:
        with urllib.request.urlopen(request) as answer:
            found = answer.status
    except urllib.error.HTTPError as refused:
        found = refused.code
        refused.close()
    assert found == status


# ---- what a real server answered ----


def followed(api: KubeflowApi, recording: str, capsys: pytest.CaptureFixture[str]) -> tuple[list[str], list[str]]:
    """The lines of a run that is followed from begin to end, and those that begin with a time."""
    run = api.play(recording)
    lines: list[str] = []
    while not lines or api.runs[run]["finished_at"] != api.played_until[run]:
        assert of(run, api, "status", "--follow") == int(recording != "search")
        lines = capsys.readouterr().err.splitlines()
    return lines, [line for line in lines if line.startswith("[")]


def test_a_recorded_success_is_told_in_order_with_what_came_from_the_cache(
    api: KubeflowApi, capsys: pytest.CaptureFixture[str]
) -> None:
    _, lines = followed(api, "search", capsys)
    assert [int(line[1:6]) for line in lines] == sorted(int(line[1:6]) for line in lines)
    assert len(lines) == len(set(lines))
    assert sum(line.endswith("succeeded, from the cache") for line in lines) == 11
    assert "[   81 s] prune_model: succeeded after 20 s" in lines
    assert [line for line in lines if "evaluate_3[" in line] == [
        "[   92 s] evaluate_3[1]: succeeded, from the cache",
        "[   92 s] evaluate_3[2]: succeeded, from the cache",
    ]


def test_a_recorded_run_whose_names_stop_is_followed_to_its_end_and_its_failure(
    api: KubeflowApi, capsys: pytest.CaptureFixture[str]
) -> None:
    hidden = fnv1a("compress-d8dzv(0).root(0).distill(0).executor(0)")
    api.logs = {f"compress-d8dzv-system-container-impl-{hidden}": "distill: started\nerror: distill: rows do not fit\n"}
    lines, timed = followed(api, "compress", capsys)
    (notice,) = [line for line in lines if "no longer reads this run's workflow" in line]
    assert notice.startswith("[  251 s]")
    later = [int(line[1:6]) for line in timed[timed.index(notice) + 1 :]]
    assert len(later) == 16 and max(later) == 503
    assert later[later.index(337) :] == sorted(later[later.index(337) :]), "a line whenever a container has ended"
    assert "  distill: distill: rows do not fit" in lines
    assert "failed after 514 s" in lines[lines.index("  distill: distill: rows do not fit") - 1]


def test_a_recorded_run_that_was_retried_and_cancelled_tells_each_attempt(
    api: KubeflowApi, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, timed = followed(api, "compress-retried", capsys)
    assert [line[9:] for line in timed if " distill_2: " in line] == [
        " distill_2: running",
        " distill_2: failed after 37 s",
        " distill_2: running, attempt 2",
        " distill_2: failed after 297 s, attempt 2",
        " distill_2: running, attempt 3",
        " distill_2: succeeded after 150 s, attempt 3",
    ]
    assert not any("average_checkpoints" in line for line in timed), "it was left out, nothing is known of it"
    assert "own.json, seed 0): canceled after 1379 s" in next(line for line in lines if line.startswith("error: "))


def test_a_recorded_retry_of_a_search_tells_every_attempt_of_a_task(
    api: KubeflowApi, capsys: pytest.CaptureFixture[str]
) -> None:
    _, timed = followed(api, "retried", capsys)
    mine = [line[9:] for line in timed if " prune_model: " in line]
    assert mine[:2] == [" prune_model: running", " prune_model: failed after 22 s"]
    assert [line.partition(", ")[2] for line in mine[2:]][::2] == ["attempt 2", "attempt 3", "attempt 4"]


def test_a_namespace_that_one_may_not_use_is_said_before_anything_is_put_into_the_store(
    submit: list[str], api: KubeflowApi, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    api.multi_user, api.forbidden = True, "team"
    assert main(submit) == 2
    assert "you may not use the namespace team, which the cluster profile names" in capsys.readouterr().err
    assert list((tmp_path / "store").iterdir()) == []
    api.multi_user = False
    assert main([*submit, "--no-wait"]) == 0
    assert "has one namespace, its own, and runs go there: it must be the profile's team" in capsys.readouterr().out
