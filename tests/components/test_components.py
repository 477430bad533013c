"""The wrappers are thin, complete and true to their contracts; the body of each runs as the stage it is named for."""

import ast
import importlib
import inspect
import json
from pathlib import Path
from types import FunctionType, SimpleNamespace

import pytest
import yaml

from components import images
from components.generate import files_of
from moesaic.stages import STAGES
from tests.data_sets import add_sets

FOLDER = Path(__file__).parents[2] / "components"
NAMES = list(STAGES)


def function_of(name: str) -> FunctionType:
    component = getattr(importlib.import_module(f"components.{name}.component"), name)
    return component.python_func


def definition(name: str) -> ast.FunctionDef:
    tree = ast.parse((FOLDER / name / "component.py").read_text())
    return next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)


def test_there_is_one_component_per_stage() -> None:
    folders = {path.parent.name for path in FOLDER.glob("*/component.py")}
    assert folders == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_files_are_what_the_declaration_gives(name: str) -> None:
    committed = {path.name: path.read_text() for path in (FOLDER / name).iterdir() if path.is_file()}
    assert committed == files_of(STAGES[name]), "run `make compile`"


@pytest.mark.parametrize("name", NAMES)
def test_bodies_are_at_most_ten_statements(name: str) -> None:
    body = definition(name).body
    statements = [node for part in body for node in ast.walk(part) if isinstance(node, ast.stmt)]
    assert 2 <= len(statements) <= 10
    assert ast.get_docstring(definition(name))


@pytest.mark.parametrize("name", NAMES)
def test_the_signature_is_the_stages_inputs_and_outputs(name: str) -> None:
    stage = STAGES[name]
    expected = ["config", "version", *stage.required, *stage.output_names, "metrics", *stage.optional]
    assert list(inspect.signature(function_of(name)).parameters) == expected


@pytest.mark.parametrize("name", NAMES)
def test_the_image_and_its_tag_are_named_once(name: str) -> None:
    component = getattr(importlib.import_module(f"components.{name}.component"), name)
    container = component.component_spec.implementation.container
    runtime = yaml.safe_load((FOLDER / name / "metadata.yaml").read_text())["runtime"]
    assert container.image == getattr(images, runtime.upper())
    assert container.image not in (FOLDER / name / "component.py").read_text()
    assert "pip install" not in " ".join(container.command)


@pytest.mark.parametrize("name", NAMES)
def test_the_contract_names_every_input_and_output(name: str) -> None:
    contract = (FOLDER / name / "README.md").read_text()
    stage = STAGES[name]
    missing = [part for part in (*stage.required, *stage.optional, *stage.output_names) if f"`{part}`" not in contract]
    assert missing == []
    assert stage.config.__name__ in contract


@pytest.mark.parametrize("name", NAMES)
def test_the_metadata_is_complete(name: str) -> None:
    metadata = yaml.safe_load((FOLDER / name / "metadata.yaml").read_text())
    assert metadata["name"] == name
    assert set(metadata) == {"name", "stability", "runtime", "tags"}


@pytest.mark.parametrize("name", NAMES)
def test_the_body_calls_its_own_stage_with_all_it_was_given(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr("moesaic.platform.runs.runtime.run_stage", lambda *given, **named: calls.append((given, named)))
    monkeypatch.setattr("moesaic.platform.runs.runtime.baselines_of", lambda path: [path])
    function, stage = function_of(name), STAGES[name]
    given = {key: SimpleNamespace(path=key) for key in inspect.signature(function).parameters}
    returned = function(**given | {"config": "{}", "version": "1"})
    ((positional, named),) = calls
    assert positional == (name, "{}")
    assert named["inputs"] == {key: given[key] for key in (*stage.required, *stage.optional)}
    assert named["outputs"] == {key: given[key] for key in (*stage.output_names, "metrics")}
    assert returned == (["refined"] if name == "refine_architecture" else None)


def test_ingest_runs_as_kubeflow_would_call_it(
    tiny_parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kfp import dsl

    from moesaic.platform.ingest.stage import IngestConfig
    from moesaic.platform.store import Manifest, Store

    store = Store.at(tmp_path / "store")
    model = store.add_directory(tiny_parent, "model", format="safetensors", producer="test").id
    sets = add_sets(store, tmp_path / "data")
    monkeypatch.setenv("MOESAIC_STORE", str(store.directory))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = IngestConfig(parent=model, **sets)
    outputs = {
        name: dsl.Artifact(name=name, uri=str(tmp_path / "out" / name)) for name in STAGES["ingest"].output_names
    }
    metrics = dsl.Metrics(name="metrics", uri=str(tmp_path / "out" / "metrics"))
    function_of("ingest")(config=config.to_json(), version="1", **outputs, metrics=metrics)
    assert Manifest.read(Path(outputs["parent"].path)).id == model
    assert metrics.metadata["parent_layers"] == 4
    assert json.loads(Path(metrics.path).read_text()) == metrics.metadata
