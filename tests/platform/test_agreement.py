"""What recipe, cluster profile and job template say of each other is checked before anything is uploaded."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from moesaic.command_line.main import main
from moesaic.command_line.planning_commands import read_tasks
from moesaic.core.errors import ConfigError
from moesaic.pipelines import find_pipeline
from moesaic.pipelines.recipes import RECIPES
from moesaic.platform.cluster import ClusterProfile, read_profile
from moesaic.platform.cluster.agreement import check_agreement

MANIFESTS = Path(__file__).parents[2] / "manifests"
GPU = {"cpu": 8, "memory": "64Gi", "accelerators": 8}
JOBS = {
    stage: {"template": yaml.safe_load((MANIFESTS / "jobs" / file).read_text()), "node": "cpu", "num_nodes": 2}
    for stage, file in (("distill", "trainjob.yaml"), ("reinforce", "rayjob.yaml"))
}
BASE: dict[str, Any] = {
    "environment": {"MOESAIC_STORE": "/store"},
    "claims": [{"claim": "moesaic-store", "path": "/store"}],
    "default": "cpu",
    "nodes": {"cpu": {"cpu": 1, "memory": "4Gi"}, "gpu": GPU, "five": GPU | {"accelerators": 5}},
}
SERVED = {"images": dict.fromkeys(("evaluate", "generate_traces"), "moesaic/serve:1")}


def check(recipe: str, **changes: Any) -> None:
    made = RECIPES[recipe]()
    tasks = read_tasks(find_pipeline("compress", made.rounds, made.baseline is not None), made)
    check_agreement(tasks, ClusterProfile.model_validate(BASE | changes))


def test_what_goes_together_is_accepted() -> None:
    check("tiny_cpu")
    check("tiny_cpu", default="gpu", stages={"distill": "cpu"})
    made = RECIPES["gpt_oss_120b_h100x8"]()
    tasks = read_tasks(find_pipeline("compress", made.rounds, made.baseline is not None), made)
    for path in (MANIFESTS / "profiles").glob("*.yaml"):
        if any(node.accelerators for node in read_profile(path).nodes.values()):
            check_agreement(tasks, read_profile(path))


@pytest.mark.parametrize(
    ("recipe", "changes", "said"),
    [
        (
            "tiny_cpu",
            {"jobs": {"distill": JOBS["distill"]}},
            "distill: rows_per_step 8 is not a multiple of 2 processes x rows_per_forward 8 = 16",
        ),
        ("tiny_cpu", {"jobs": {"reinforce": JOBS["reinforce"]}}, r"reinforce\[0\]: engine 'trl' trains in one process"),
        (
            "gpt_oss_120b_h100x8",
            {"default": "gpu"},
            "engine 'tensorrt_llm' is not in the image of evaluate",
        ),
        (
            "gpt_oss_120b_h100x8",
            SERVED | {"stages": {"generate_traces": "five"}, "default": "gpu"},
            "needs tensor_parallel_size 8 GPUs, and the node of generate_traces has 5",
        ),
        (
            "gpt_oss_120b_h100x8",
            SERVED | {"stages": {"benchmark_serving": "cpu"}, "default": "gpu"},
            "benchmark-serving: engine 'tensorrt_llm' needs .* has 0",
        ),
        (
            "gpt_oss_120b_h100x8",
            SERVED | {"stages": {"reinforce": "cpu"}, "default": "gpu"},
            "NeMo-RL trains on GPUs, and there is none here",
        ),
        (
            "gpt_oss_120b_h100x8",
            SERVED | {"stages": {"reinforce": "five"}, "default": "gpu"},
            "= 2048 replies cannot be spread evenly over 5 GPUs",
        ),
    ],
)
def test_what_does_not_is_told_with_the_task(recipe: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s)do not go together:.*{said}"):
        check(recipe, **changes)


@pytest.mark.parametrize(
    ("stage", "path", "said"),
    [
        ("distill", "spec.runtimeRef", "lacks spec.runtimeRef.name"),
        ("distill", "metadata", "lacks metadata.name"),
        ("reinforce", "spec.rayClusterSpec.headGroupSpec", "lacks spec.rayClusterSpec.headGroupSpec.template"),
        (
            "reinforce",
            "spec.rayClusterSpec.workerGroupSpecs",
            "lacks one group in spec.rayClusterSpec.worker",
        ),
        (
            "reinforce",
            "spec.rayClusterSpec.headGroupSpec.template.spec.volumes",
            "do not mount the claim moesaic-store at /store",
        ),
    ],
)
def test_a_template_that_lacks_something_is_refused(stage: str, path: str, said: str) -> None:
    template = yaml.safe_load(yaml.safe_dump(JOBS[stage]["template"]))
    *folders, last = path.split(".")
    place = template
    for folder in folders:
        place = place[folder]
    del place[last]
    with pytest.raises(ValueError, match=said):
        ClusterProfile.model_validate(BASE | {"jobs": {stage: JOBS[stage] | {"template": template}}})


def test_a_queue_must_fit_into_a_label() -> None:
    for name in ("a" * 64, "team.moesaic"):
        with pytest.raises(ValueError, match="queue"):
            ClusterProfile.model_validate(BASE | {"queue": name})


def test_plan_checks_a_profile(tiny_parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile = tmp_path / "profile.yaml"
    profile.write_text(yaml.safe_dump(BASE | {"jobs": {"distill": JOBS["distill"]}}))
    given = ["plan", "compress", "--recipe", "tiny_cpu", "--parent", str(tiny_parent), "--profile", str(profile)]
    assert main(given) == 2
    assert "is not a multiple of 2 processes" in capsys.readouterr().err
