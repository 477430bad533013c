"""Our config, data, environment, model class and worker against NeMo-RL's own source and the AutoModel that it pins.

Nothing of theirs is retyped or replaced, but for the device: AutoModel's loader assumes a GPU. What needs one is not
here: its policy worker's training loop, vLLM, the weights' way from the one to the other.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from moesaic.core.errors import StageError
from moesaic.core.own_environment import own_variables
from moesaic.data.chat import load_tokenizer
from moesaic.data.problems import render_prompt
from moesaic.models import layout
from moesaic.models.checkpoint import Checkpoint
from moesaic.recover.reinforce.nemo_rl import launch
from moesaic.recover.reinforce.nemo_rl.config import Placement
from tests.recover import nemo_rl_environment, nemo_rl_program
from tests.recover.test_nemo_rl import CONFIG, LENGTHS, PROBLEM, QUESTIONS

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
SHARED = CONFIG.but(
    nemo_rl={"expert_parallel": 2, "generation_tensor_parallel": 2, "generation_expert_parallel": 2}, max_new_tokens=400
)


@pytest.fixture(scope="module")
def found(tiny_parent: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the program says of a prepared training."""
    try:
        sources = nemo_rl_environment.find_sources()
    except StageError as missing:
        pytest.skip(f"NeMo-RL's source cannot be had: {missing}")
    scratch = tmp_path_factory.mktemp("scratch")
    launch.prepare(SHARED, tiny_parent, QUESTIONS, LENGTHS, scratch, Placement(gpus_per_node=2))
    python = nemo_rl_environment.ENVIRONMENT.find_program()
    paths = [ROOT / "src", *sources]  # each has a package `tests`, so the program is a file to it
    done = subprocess.run(
        [python, "-P", nemo_rl_program.__file__, scratch / launch.CONFIG, tiny_parent],
        env=own_variables() | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "CUDA_VISIBLE_DEVICES": ""},
        cwd=scratch,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def test_its_own_classes_take_the_config_and_know_every_key(found: dict[str, Any]) -> None:
    assert found["unknown"] == []
    assert found["lacking"] == []
    assert found["load_format"] == "dummy"  # so that weights may come in parts


def test_its_own_loader_renders_a_row_as_an_evaluation_does(found: dict[str, Any], tiny_parent: Path) -> None:
    assert found["rows"] == len(QUESTIONS)
    assert found["prompt"] == render_prompt(PROBLEM, load_tokenizer(tiny_parent), found["effort"])


def test_our_environment_grades_as_an_actor_of_its_ray(found: dict[str, Any]) -> None:
    assert found["rewards"] == pytest.approx([1.25 - 0.5 * (1 - 1 / 5)])  # 5 tokens where the parent needs 1


def test_its_pinned_automodel_builds_our_class_as_transformers_does(found: dict[str, Any], tiny_parent: Path) -> None:
    assert found["class"] == "moesaic.recover.distill.automodel.cluster_model.GptOssPuzzleForCausalLM"
    assert found["options"]["force_hf"] is False
    assert found["difference"] < 1e-4  # of logits; sums in another order differ by 1e-5 on some processors
    assert found["worker"] == "PolicyWorker"
    checkpoint = Checkpoint.open(tiny_parent)
    names = layout.trainable_names(checkpoint.shape, checkpoint.architecture, CONFIG.trainable)
    assert found["learns"] == sorted(names)


def test_what_learns_is_in_float32_and_frozen_experts_are_not(found: dict[str, Any]) -> None:
    types = {("experts" in name, kind) for name, kind in found["types"].items()}
    assert types == {(True, "torch.bfloat16"), (False, "torch.float32")}


def test_weights_are_sent_under_the_names_and_shapes_of_an_unpacked_checkpoint(
    found: dict[str, Any], tiny_parent: Path
) -> None:
    checkpoint = Checkpoint.open(tiny_parent)
    specs = layout.tensor_specs(checkpoint.shape, checkpoint.architecture, packed=False)
    assert found["sent"] == {name: list(spec.shape) for name, spec in specs.items()}
