"""What a stage would refuse in a parent or in the data sets is told before the first stage begins."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from moesaic.command_line.main import main
from moesaic.command_line.planning_commands import read_tasks
from moesaic.core.errors import ConfigError
from moesaic.costs.workload import Workload
from moesaic.data.inputs import Inputs
from moesaic.data.problems import render_prompt
from moesaic.data.sets import FILES, DataSets
from moesaic.deploy.export_engine.stage import ExportEngineConfig
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.generation import check_lengths
from moesaic.pipelines import example, find_pipeline
from moesaic.pipelines.recipe import Recipe
from moesaic.pipelines.recipes import tiny_cpu
from moesaic.platform.planning.inputs import check_inputs

PARENT, DATA = example() / "parent", example() / "data"
EFFORTS = ("low", "high")
LONG = Workload(name="long", input_tokens=4000, output_tokens=200, concurrency=1)


def check(recipe: Recipe, data: Path = DATA) -> None:
    tasks = read_tasks(find_pipeline("compress", recipe.rounds, recipe.baseline is not None), recipe)
    check_inputs(tasks, PARENT, DataSets.at(data))


def with_a_long_problem(directory: Path, name: str, num_copies: int) -> Path:
    """The example's data sets; the last row of one asks its question so often."""
    shutil.copytree(DATA, directory)
    path = directory / FILES[name]
    row = json.loads(path.read_text().splitlines()[0])
    row["id"] = "too long"
    row["prompt"][-1]["content"] = " ".join([row["prompt"][-1]["content"]] * num_copies)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    return directory


def test_the_example_goes_with_its_recipe() -> None:
    check(tiny_cpu())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"score_blocks": {"space": {"windows": (4096,)}}},
            "score-blocks: window 4096 is not smaller than the parent's",
        ),
        ({"score_blocks": {"space": {"expert_counts": (1,)}}}, "score-blocks: expert count 1 is below the 2 experts"),
        ({"measure_costs": {"workloads": (LONG,)}}, "measure-costs: workload 'long' needs 42.. positions"),
        ({"measure_costs": {"num_gpus": 2}}, "measure-costs: engine 'moesaic' times one device, not num_gpus=2"),
        ({"benchmark": {"workloads": (LONG,)}}, r"benchmark-\d: 4000 input and 200 output tokens do not fit the 4096"),
        (
            {"benchmark_serving": {"workloads": ({"name": "w", "input_tokens": 4000, "output_tokens": 200},)}},
            "'w' do not",
        ),
        ({"export_engine": {"max_seq_len": 5000}}, "max_seq_len 5000 is more than the model's 4096 positions"),
        ({"export_engine": {"max_seq_len": 130}}, "validate-bundle: the prompt .* does not fit .* 130 positions"),
        ({"generate_traces": {"max_new_tokens": 4090}}, "generate-traces: the prompt .* up to 4090 does not fit"),
        ({"evaluate": {"max_new_tokens": 4090}}, "evaluate.*: the prompt .* up to 4090 does not fit"),
    ],
)
def test_what_the_parent_cannot_do_is_told_by_the_task_that_it_concerns(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=rf"recipe and inputs do not go together:\n(.|\n)*{said}"):
        check(tiny_cpu().but(**changes))


def test_a_step_that_cannot_be_shared_is_told() -> None:
    recipe = tiny_cpu()
    policies = tuple(policy.but(replies_per_forward=7) for policy in recipe.policies)
    with pytest.raises(ConfigError, match=r"reinforce\[0\]: replies_per_forward = 7 does not divide the 384 replies"):
        check(recipe.but(policies=policies))


def test_a_bundle_that_serves_less_is_what_counts() -> None:
    """What the parent could answer, but the bundle could not."""
    assert ExportEngineConfig(target="vllm").max_seq_len is None
    check(tiny_cpu().but(export_engine={"max_seq_len": 2048}))


@pytest.mark.parametrize(("name", "task"), [("prompts", "generate-traces"), ("tests", "evaluate")])
def test_a_problem_that_leaves_no_room_for_a_reply_ends_a_run_before_it_begins(
    name: str, task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = with_a_long_problem(tmp_path / "data", name, 1000)
    recipe = tmp_path / "recipe.json"
    everything = tiny_cpu().but(evaluate={"problems_per_task": 10_000}, generate_traces={"max_prompts": None})
    recipe.write_text(everything.to_json())
    given = ["--recipe", str(recipe), "--parent", str(PARENT), "--data", str(data), "--output", str(tmp_path / "run")]
    assert main(["run", "compress", *given]) == 2
    said = capsys.readouterr().err
    assert f"{task}" in said and "the prompt 'too long' of" in said and "drop the long prompts" in said
    assert not (tmp_path / "run" / "store").exists()


def test_rendering_few_finds_what_rendering_all_finds(tmp_path: Path) -> None:
    """At every number of positions around the longest problem's need; the oracle renders all."""
    data = DataSets.at(with_a_long_problem(tmp_path / "data", "tests", 9))
    inputs = Inputs(Checkpoint.open(PARENT), data, 4096)
    some = [*inputs.tests[:40], inputs.tests[-1]]
    prompts = [render_prompt(problem, inputs.tokenizer, effort) for problem in some for effort in EFFORTS]
    longest = max(map(len, prompts))
    refused = []
    for positions in range(longest + 10, longest + 30):
        few = is_refused(partial(inputs.check_lengths, some, EFFORTS, 20, positions))
        assert few == is_refused(partial(check_lengths, prompts, 20, positions)), positions
        refused.append(few)
    assert any(refused) and not all(refused)


def is_refused(check: Callable[[], None]) -> bool:
    try:
        check()
    except ConfigError:
        return True
    return False
