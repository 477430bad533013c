"""The registry's commands on a played run, from its directory to the recipe that makes it again."""

import json
import re
from pathlib import Path

import pytest

from moesaic.command_line.main import main
from moesaic.pipelines.recipe import Recipe
from moesaic.pipelines.recipes import RECIPES
from moesaic.platform.ingest.stage import IngestConfig
from moesaic.platform.promote.stage import PromoteConfig
from moesaic.platform.registry.registry import Registry, RegistryAddress
from moesaic.platform.store import Store
from tests.measure.outside_results import write_lm_eval, write_nemo_yaml
from tests.platform.played_run import play
from tests.platform.test_promotion import summary

GATE = json.dumps(
    {
        "margin_points": {"low": 15, "high": 15},
        "kv_margin_points": {"low": 15},
        "min_request_efficiency": {"high": 1.9},
        "require_export": False,
        "recipe": "tiny_cpu",
    }
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs that share a store and a registry."""
    directory = tmp_path_factory.mktemp("commands")
    store = Store.at(directory / "store")
    for seed, name in enumerate(("one", "two")):
        made = play(store, RECIPES["tiny_cpu"]().seeded(seed), directory / "played" / name)
        run = directory / name
        made.report.write_record(run / "report")
        made.verdict.write_record(run / "artifacts" / "verdict")
        (run / "artifacts" / "verdict" / "verdict.json").write_text('{"passed": true}')
        (run / "report" / "summary.json").write_text(json.dumps(summary()))
        (run / "child").symlink_to(store.materialize(store.manifest(made.child.digest)))
    return directory


@pytest.fixture(autouse=True)
def environment(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place / 'mlflow.db'}")
    monkeypatch.setenv("MOESAIC_STORE", str(place / "store"))


def test_the_life_of_two_versions(
    place: Path, empty_mlflow: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = str(place / "one"), str(place / "two")

    def said(*arguments: str, code: int = 0) -> str:
        assert main(arguments) == code
        shown = capsys.readouterr()
        return shown.out + shown.err

    assert "dry run: nothing was changed" in said("promote", one, "--config", GATE, "--dry-run")
    assert not (place / "mlflow.db").exists()
    (place / "mlflow.db").write_bytes(empty_mlflow)
    strict = said("promote", one, "--dry-run", code=1)
    assert "refused: " in strict
    assert "export_checked" in strict
    assert "version 1 of moesaic is the champion now" in said("promote", one, "--config", GATE)
    assert "version 1 of moesaic is the champion already" in said("promote", one, "--config", GATE)
    refused = said("promote", two, code=1)
    assert "version 2 of moesaic is the challenger" in refused
    assert "lines are not met: accuracy_points" in refused
    assert "version 2 of moesaic is the champion now" in said("promote", two, "--config", GATE)
    assert "champion of moesaic: version 2 -> 1" in said("rollback", "--from", "2")
    assert "not 2" in said("rollback", "--from", "2", code=2)
    again = said("promote", two, "--config", GATE, code=1)
    assert "was champion before; now version 1 of moesaic is" in again
    assert "version 2 of moesaic is the champion now" in said("promote", two, "--config", GATE, "--again")

    shown = said("lineage")
    assert shown.startswith("moesaic version 2 (challenger, champion)")
    for stage in ("calibrate_kv", "average_checkpoints", "distill", "prune_model", "score_blocks", "rank_experts"):
        assert re.search(rf"[0-9a-f]{{12}}: {stage}", shown)
    ids = IngestConfig(**json.loads(json.dumps(inputs_of(place))))
    assert f"parent  {ids.parent}" in shown
    assert f"calibration_short  {ids.calibration_short}" in shown

    target = tmp_path / "again"
    words = said("reproduce", "1", "--output", str(target)).splitlines()[-1].split()
    assert words[:5] == ["moesaic", "run", "compress", "--recipe", str(target / "recipe.json")]
    assert Recipe.parse((target / "recipe.json").read_text()) == expected(RECIPES["tiny_cpu"]())
    assert json.loads((target / "inputs.json").read_text()) == inputs_of(place)
    assert (target / "parent" / "config.json").read_text() == "{}"
    assert sorted(path.name for path in (target / "data").iterdir()) == [
        "calibration_long.jsonl",
        "calibration_short.jsonl",
        "prompts.jsonl",
        "tests.jsonl",
    ]
    said("reproduce", "--output", str(tmp_path / "second"), "--no-inputs")
    assert Recipe.parse((tmp_path / "second" / "recipe.json").read_text()) == expected(RECIPES["tiny_cpu"]().seeded(1))
    assert not (tmp_path / "second" / "data").exists()
    assert "exists already" in said("reproduce", "--output", str(target), code=2)


def test_results_of_outside_harnesses_reach_the_report_and_the_gate(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The child loses one of a hundred problems; that is within 10 points, and not within 1."""
    run, given = place / "one", ["--effort", "high", "--outside"]
    for role, last in (("parent", 1), ("child", 0)):
        write_lm_eval(tmp_path / role, {"sums@2": (1,) * 50 + (0,) * 49 + (last,)}, model=role)
        write_nemo_yaml(tmp_path / role / "gpqa", 0.7, model=role, metric=("pass@1", "micro"))
        given.append(f"{role}={tmp_path / role}")
    (run / "report" / "report.html").write_text("<p>run</p><!-- results of outside harnesses -->")

    assert main(["report", str(run), *given]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"sums@2 +│ +51\.0 │ +50\.0 │ -1\.0 \[", shown)
    assert "unpaired" in shown
    page = (run / "outside_high" / "report.html").read_text()
    assert page.startswith("<p>run</p>")
    assert "-1.0 [" in page
    numbers = json.loads((run / "outside_high" / "outside.json").read_text())
    assert numbers["suites"]["sums@2"]["difference"]["points"] == -1
    assert len(numbers["files"]["child"]) == 3

    def gate(margin: float) -> str:
        names = {"sums@2": margin, "gpqa_diamond": 20}
        return json.dumps(json.loads(GATE) | {"model": "outside", "outside_margin_points": names})

    assert main(["promote", str(run), "--config", gate(10), *given]) == 0
    assert "is the champion now" in capsys.readouterr().out
    version = Registry(RegistryAddress(f"sqlite:///{place / 'mlflow.db'}"), "outside").version("champion")
    assert re.fullmatch(
        r"-1\.0 \[.*\], n = 100 \(interval above -10\): met", version.tags["moesaic.gate.outside.sums_2"]
    )
    assert version.tags["moesaic.outside.harness"] == "NeMo Evaluator 0.2.6, lm-evaluation-harness 0.4.12"
    assert len(version.tags["moesaic.outside.child"]) == 64
    assert main(["promote", str(run), "--config", gate(1), *given, "--dry-run"]) == 1
    assert "1 of 8 lines are not met: outside.sums@2" in capsys.readouterr().err
    assert main(["promote", str(run), "--config", gate(10), "--dry-run"]) == 1
    assert "not met: outside.sums@2, outside.gpqa_diamond" in capsys.readouterr().err
    assert main(["promote", str(run), *given, "--dry-run"]) == 2
    assert "name margins in outside_margin_points of --config, by task: sums@2, gpqa_diamond" in capsys.readouterr().err
    assert main(["report", str(run), "--effort", "low"]) == 2
    assert main(["report", str(run), "--outside", "parent=a", "b"]) == 2
    assert "is not parent=DIR child=DIR" in capsys.readouterr().err


def expected(recipe: Recipe) -> Recipe:
    """What only runs of several rounds use is taken from the one round there was; the gate is the version's own."""
    return recipe.model_copy(
        update={
            "earlier_distill": recipe.distill,
            "earlier_search_architecture": recipe.search_architecture,
            "promote": PromoteConfig.parse(GATE),
        }
    )


def inputs_of(place: Path) -> dict[str, str]:
    """The ids of the manifests that nothing in the store was made into."""
    found = Store.at(place / "store").manifests()
    return {
        "parent" if manifest.kind == "model" else manifest.files[0].path.removesuffix(".jsonl"): manifest.id
        for manifest in found
        if manifest.producer == "ingest"
    }


def test_a_registry_must_be_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert main(["lineage"]) == 2
    assert "give --registry or set MLFLOW_TRACKING_URI" in capsys.readouterr().err


def test_a_directory_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["promote", str(tmp_path)]) == 2
    assert "holds no finished run" in capsys.readouterr().err
