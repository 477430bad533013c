"""Recipes are complete, and what is committed under manifests/ is what the source compiles to, byte for byte."""

import json
import re
from functools import cache
from pathlib import Path

import pytest
import yaml

from components import images
from moesaic.pipelines import COMPILED, compiled, find_pipeline
from moesaic.pipelines.recipe import Recipe
from moesaic.pipelines.recipes import RECIPES
from moesaic.platform.ingest.stage import IngestConfig
from moesaic.platform.runs import local
from moesaic.stages import STAGES
from pipelines.compiling import compile_all

PIPELINES = compiled()
INPUTS = IngestConfig(parent="a", calibration_short="b", calibration_long="c", prompts="d", tests="e")
parameters_of = cache(local.parameters_of)
SINGLE = {f"{name}_config": stage.config for name, stage in STAGES.items()}
"""Config classes by parameter, where the two have one name."""


def test_recompiling_reproduces_the_committed_bytes(tmp_path: Path) -> None:
    written = compile_all(tmp_path)
    assert {path.name for path in written} == {path.name for path in COMPILED.glob("*.yaml")}
    for path in written:
        assert path.read_bytes() == (COMPILED / path.name).read_bytes(), "run `make compile`, and a new version"


@cache
def executors_of(name: str) -> dict[str, dict[str, dict[str, str]]]:
    pipeline = yaml.load(PIPELINES[name].read_text(), Loader=yaml.CSafeLoader)
    executors: dict[str, dict[str, dict[str, str]]] = pipeline["deploymentSpec"]["executors"]
    return executors


@pytest.mark.parametrize("name", list(PIPELINES))
def test_tasks_run_in_our_images_and_install_nothing(name: str) -> None:
    ours = {images.SEARCH, images.TRAIN, images.RL, images.KV, images.SERVE}
    assert {executor["container"]["image"] for executor in executors_of(name).values()} <= ours
    assert "pip install" not in PIPELINES[name].read_text()


def test_compress_runs_every_stage() -> None:
    for name in PIPELINES.keys() - {"search"}:
        stages = {task.removeprefix("exec-").rstrip("-0123456789").replace("-", "_") for task in executors_of(name)}
        assert stages == set(STAGES)


@pytest.mark.parametrize("rounds", [1, 2])
def test_without_a_control_half_of_the_training_is_left_out(rounds: int) -> None:
    """The child's own tasks stay; earlier rounds distil once each, which no control repeats."""

    def num_tasks(control: bool, stage: str) -> int:
        path = find_pipeline("compress", rounds, control)
        tasks = re.findall(r"^ +exec-(\S+?)(?:-\d+)?:$", path.read_text(), re.MULTILINE)
        return tasks.count(stage)

    for stage in ("reinforce", "average-checkpoints", "gather-recovery", "benchmark"):
        assert (num_tasks(True, stage), num_tasks(False, stage)) == (2, 1)
    assert (num_tasks(True, "distill"), num_tasks(False, "distill")) == (rounds + 1, rounds)
    assert (num_tasks(True, "report"), num_tasks(False, "report")) == (1, 1)


def test_a_recipe_without_control_gives_no_config_for_it() -> None:
    recipe = RECIPES["tiny_cpu"]().but(baseline=None)
    parameters = parameters_of(find_pipeline("compress", recipe.rounds, recipe.baseline is not None))
    assert parameters - recipe.arguments(INPUTS, "1", parameters).keys() == {"baseline_config"}
    assert Recipe.parse(recipe.to_json()) == recipe


@pytest.mark.parametrize("name", list(RECIPES))
def test_recipes_give_every_parameter_a_valid_config(name: str) -> None:
    for manifest in PIPELINES.values():
        arguments = RECIPES[name]().arguments(INPUTS, "1", parameters_of(manifest))
        for parameter in arguments.keys() & SINGLE.keys():
            text = arguments[parameter]
            assert isinstance(text, str)
            assert SINGLE[parameter].parse(text).to_json() == text


def test_every_policy_is_a_config_of_its_own() -> None:
    arguments = RECIPES["tiny_cpu"]().arguments(INPUTS, "1", parameters_of(PIPELINES["compress"]))
    policies = [STAGES["reinforce"].config.parse(text) for text in arguments["reinforce_configs"]]
    assert [getattr(policy, "name", None) for policy in policies] == ["high", "mixed"]


@pytest.mark.parametrize("name", list(RECIPES))
def test_recipes_say_what_and_never_where(name: str) -> None:
    text = json.dumps(RECIPES[name]().arguments(INPUTS, "1", parameters_of(PIPELINES["compress"])))
    assert not any(word in text for word in ("/", "://", "runs", "store"))


def test_the_tiny_recipe_asks_for_a_child_worth_having() -> None:
    search = RECIPES["tiny_cpu"]().search_architecture
    assert search.max_experts_ratio is not None
    assert search.max_experts_ratio <= 0.75
    assert search.min_windowed_share >= 1 / 3


def test_the_control_is_a_baseline_that_the_search_makes() -> None:
    with pytest.raises(ValueError, match=r"candidate is 'greedy', search_architecture makes uniform, random-0"):
        RECIPES["tiny_cpu"]().but(baseline={"candidate": "greedy"}, search_architecture={"baselines": ("uniform",)})


def test_a_recipe_has_a_weight_for_every_policy() -> None:
    recipe = RECIPES["tiny_cpu"]()
    with pytest.raises(ValueError, match="weights has 2 numbers for 1 policies; give one each, or none"):
        recipe.but(policies=recipe.policies[:1])
    with pytest.raises(ValueError, match="policies is empty; give one config of reinforce or more"):
        recipe.but(policies=())
