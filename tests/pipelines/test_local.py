"""The local runner with real tasks: what is shown, what is reused, and how a stage's failure reaches the user."""

import io
from pathlib import Path

import pytest
from kfp import compiler, dsl
from rich.console import Console

from components.ingest.component import ingest
from moesaic.core.errors import ConfigError
from moesaic.platform.ingest.stage import IngestConfig
from moesaic.platform.runs.local import LOG, _StageLines, run_compiled
from moesaic.platform.runs.run_context import RunContext
from moesaic.platform.runs.runtime import FAILURE
from moesaic.platform.store import Manifest, Store
from tests.data_sets import add_sets


@dsl.pipeline(name="only-ingest")
def only_ingest(config: str, version: str) -> dsl.Model:
    """The smallest pipeline there is."""
    return ingest(config=config, version=version).outputs["parent"]


def test_runs_reuses_reruns_and_explains(tiny_parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    manifest = tmp_path / "only-ingest.yaml"
    compiler.Compiler().compile(only_ingest, str(manifest))
    run = tmp_path / "run"
    run.mkdir()
    context = RunContext(store=tmp_path / "store", run_directory=run)
    store = Store.at(context.store)
    model = store.add_directory(tiny_parent, "model", format="safetensors", producer="test").id
    sets = add_sets(store, tmp_path / "data")
    config = IngestConfig(parent=model, **sets)

    def shown(given: IngestConfig, version: str) -> list[str]:
        screen = io.StringIO()
        outputs = run_compiled(
            manifest, {"config": given.to_json(), "version": version}, context, Console(file=screen, width=200)
        )
        assert [Manifest.read(path).id for path in outputs.values()] == [model]
        return [line.split("] ", 1)[1] for line in screen.getvalue().splitlines()]

    started, done = shown(config, "1")
    assert started == "ingest: started"
    assert done.startswith("ingest: done in ")
    assert "Got executor_input" in (run / LOG).read_text()
    assert shown(config, "1") == ["ingest: kept from an earlier run"]
    assert shown(config, "2")[0] == "ingest: started"

    swapped = config.model_copy(update={"parent": sets["tests"]})
    with pytest.raises(ConfigError, match=r"ingest: parent = \w+ is a dataset, not a model") as failure:
        shown(swapped, "2")
    assert failure.value.exit_code == 2
    assert str(run / LOG) in str(failure.value)
    assert (run / FAILURE).is_file()
    assert shown(config, "2") == ["ingest: kept from an earlier run"], "an old failure must not stop the next run"


def test_only_the_stages_own_lines_are_shown() -> None:
    log, screen = io.StringIO(), io.StringIO()
    lines = _StageLines(log, Console(file=screen, width=100))
    noise = [
        "13:44:17.833 - INFO - Running pipeline: 'search'\n",
        "-" * 80 + "\n",
        "[KFP Executor 2026-11-22 13:44:18,277 INFO]: Got executor_input:\n",
        "{\n",
        '    "inputs": {\n',
        "    }\n",
        "}\n",
        "[KFP Executor 2026-11-22 13:44:18,300 INFO]: Wrote executor output file.\n",
        "\n",
    ]
    for text in [*noise, "rank_experts: started\n", *noise, "ranking layers: 8/8\n"]:
        print("    ", end="", file=lines)
        print(text, end="", file=lines)
    shown = [line.split("] ", 1)[1] for line in screen.getvalue().splitlines()]
    assert shown == ["rank_experts: started", "ranking layers: 8/8"]
    assert "Got executor_input" in log.getvalue()
