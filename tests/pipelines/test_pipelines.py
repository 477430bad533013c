"""Recipes are complete, and what is committed under manifests/ is what the source compiles to, byte for byte."""

import json
from pathlib import Path

import pytest
import yaml

from components import images
from moesaic.configs import IngestConfig
from moesaic.stages import STAGES
from pipelines import MANIFESTS
from pipelines.compiling import compile_search
from pipelines.recipes import RECIPES
from pipelines.search import VERSION

COMMITTED = MANIFESTS / f"search-{VERSION}.yaml"
INPUTS = IngestConfig(parent="a", calibration_short="b", calibration_long="c", tests="d")


def test_recompiling_reproduces_the_committed_bytes(tmp_path: Path) -> None:
    assert compile_search(tmp_path).read_bytes() == COMMITTED.read_bytes(), "run `make compile`, and a new version"


def specification() -> dict[str, object]:
    return yaml.safe_load(COMMITTED.read_text())


def test_every_stage_is_a_task_with_our_image_and_no_installs() -> None:
    executors = specification()["deploymentSpec"]["executors"]
    stages = {name.removeprefix("exec-").rstrip("-0123456789").replace("-", "_") for name in executors}
    assert stages == set(STAGES)
    assert {executor["container"]["image"] for executor in executors.values()} == {images.SEARCH}
    assert "pip install" not in COMMITTED.read_text()


@pytest.mark.parametrize("name", list(RECIPES))
def test_recipes_give_every_parameter_a_valid_config(name: str) -> None:
    arguments = RECIPES[name]().arguments(INPUTS, version="1")
    assert set(arguments) == set(specification()["root"]["inputDefinitions"]["parameters"])
    for stage in STAGES.values():
        text = arguments[f"{stage.name}_config"]
        assert stage.config.parse(text).to_json() == text


@pytest.mark.parametrize("name", list(RECIPES))
def test_recipes_say_what_and_never_where(name: str) -> None:
    text = json.dumps(RECIPES[name]().arguments(INPUTS, version="1"))
    assert not any(word in text for word in ("/", "://", "runs", "store"))


def test_the_tiny_recipe_asks_for_a_child_worth_having() -> None:
    search = RECIPES["tiny_cpu"]().search_architecture
    assert search.max_experts_ratio is not None
    assert search.max_experts_ratio <= 0.75
    assert search.min_windowed_share >= 1 / 3
    assert len(search.random_seeds) >= 3
