import json
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import yaml

from moesaic.core.errors import ConfigError, StageError
from moesaic.core.training_curve import read_curve
from moesaic.models import layout
from moesaic.models.architecture import Architecture, Block
from moesaic.models.families.gpt_oss import GPT_OSS_20B
from moesaic.recover.distill.automodel.curve import WINDOW_STEPS, Curve, DivergenceCheck
from moesaic.recover.distill.automodel.rows import Rows, TrainingRows
from moesaic.recover.distill.automodel.settings import Job, expert_parallel_size, render
from moesaic.recover.distill.packing import rows_of_step
from moesaic.recover.distill.stage import DistillConfig, check_batch
from moesaic.recover.distill.trace_table import TraceTable
from moesaic.recover.generate_traces.traces import Trace
from moesaic.recover.training import OptimizerConfig

CONFIG = DistillConfig(
    steps=11,
    rows_per_step=4,
    optimizer=OptimizerConfig(learning_rate=3e-4, final_learning_rate_ratio=0.5, warmup_steps=2, betas=(0.8, 0.9)),
)


def job(on_gpus: bool = False, **changes: object) -> Job:
    values = {"num_processes": 2, "driver_pid": 7, "expert_parallel_size": 2 if on_gpus else 1, **changes}
    return Job(Path("/c"), Path("/p"), Path("/t"), Path("/s"), on_gpus=on_gpus, **values)  # type: ignore[arg-type]


def test_settings_survive_yaml_and_carry_the_config_unchanged() -> None:
    settings = yaml.safe_load(yaml.safe_dump(render(CONFIG, job())))
    assert settings == render(CONFIG, job())
    assert DistillConfig.model_validate(settings["distillation"]["config"]) == CONFIG
    assert Job.from_plain(settings["distillation"]["job"]) == job()
    assert settings["optimizer"] == {
        "_target_": "torch.optim.AdamW",
        "lr": 3e-4,
        "betas": [0.8, 0.9],
        "weight_decay": 0.0,
    }


def test_the_schedule_warms_up_from_above_nothing_and_ends_at_the_final_rate() -> None:
    schedule = render(CONFIG, job())["lr_scheduler"]
    assert schedule["init_lr"] == pytest.approx(1e-4)  # steps 1, 2, 3 learn at 1/3, 2/3, 3/3 of the highest
    assert (schedule["lr_warmup_steps"], schedule["lr_decay_steps"]) == (2, 10)  # counted from the first step on
    assert schedule["min_lr"] == pytest.approx(1.5e-4)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_run_shorter_than_the_warm_up_still_has_a_schedule(steps: int) -> None:
    schedule = render(CONFIG.model_copy(update={"steps": steps}), job())["lr_scheduler"]
    assert 0 <= schedule["lr_warmup_steps"] < schedule["lr_decay_steps"]


def test_devices_choose_the_backend_the_model_class_and_the_sharding() -> None:
    on_cpu, on_gpu = render(CONFIG, job()), render(CONFIG, job(on_gpus=True))
    assert (on_cpu["dist_env"]["backend"], on_gpu["dist_env"]["backend"]) == ("gloo", "nccl")
    assert on_cpu["model"]["_target_"].endswith("models.load_child")
    assert on_gpu["model"]["_target_"] == "nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained"
    assert on_gpu["model"]["force_hf"] is False
    assert on_gpu["model"]["torch_dtype"] == "float32"
    assert on_gpu["teacher_model"]["torch_dtype"] == "bfloat16"
    assert on_gpu["distributed"]["ep_size"] == 2
    assert on_gpu["distributed"]["activation_checkpointing"] and not on_cpu["distributed"]["activation_checkpointing"]
    kept = render(CONFIG.model_copy(update={"activation_checkpointing": False}), job(on_gpus=True))
    assert not kept["distributed"]["activation_checkpointing"]
    assert on_gpu["distributed"]["reshard_after_forward"]  # else the gathered parent would stay on every GPU
    assert on_cpu["distributed"]["mp_policy"]["param_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    "words",
    [(), ("attention",), ("norms", "head"), ("router", "embedding"), ("attention", "norms", "embedding", "head")],
)
def test_on_gpus_exactly_what_does_not_learn_is_frozen(words: tuple[str, ...]) -> None:
    frozen = render(CONFIG.model_copy(update={"trainable": words}), job(on_gpus=True))["freeze_config"][
        "freeze_modules"
    ]
    shape, blocks = GPT_OSS_20B, Architecture.of([Block(8, 4, 2880, None), Block(4, 4, 2880, 16)])
    learning = set()
    for name in layout.tensor_specs(shape, blocks, packed=False):
        module = name.replace(".mlp.router.", ".mlp.gate.").rpartition(".")[0]
        parents = [module.rsplit(".", count)[0] for count in range(module.count(".") + 1)]
        if not any(fnmatchcase(parent, entry["glob"]) for parent in parents for entry in frozen):
            learning.add(name)
    assert learning == set(layout.trainable_names(shape, blocks, words))


def test_mlflow_is_only_configured_for_a_run_that_is_open() -> None:
    assert "mlflow" not in render(CONFIG, job(log_to_mlflow=True))  # the recipe itself logs, as AutoModel would fail


def test_rows_of_a_step_must_be_whole_forward_passes_of_all_ranks() -> None:
    check_batch(CONFIG, 4)
    with pytest.raises(ConfigError, match="rows_per_step 4 is not a multiple of 3 processes"):
        check_batch(CONFIG, 3)
    with pytest.raises(ConfigError, match="rows_per_forward 4 = 8"):
        check_batch(CONFIG.model_copy(update={"rows_per_forward": 4}), 2)


def test_as_many_gpus_share_experts_as_every_layer_of_both_models_allows() -> None:
    parent, child = (
        Architecture.of([Block(128, 4, 2880, None)] * 2),
        Architecture.of([Block(64, 4, 2880, None), Block(96, 4, 2880, None)]),
    )
    assert expert_parallel_size(8, parent, child) == 8
    assert expert_parallel_size(64, parent, child) == 32
    assert expert_parallel_size(6, parent, child) == 2


def traces() -> list[Trace]:
    return [
        Trace(f"p{number}", "task", "low", (1, 2), tuple([3] * (number % 5 + 1)), True, False, held_out=number % 4 == 0)
        for number in range(20)
    ]


def test_ranks_together_take_the_rows_of_every_step(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"sequence_tokens": 8, "efforts": ("low",), "seed": 3})
    table = TraceTable.write(traces(), tmp_path)
    rows = TrainingRows(str(tmp_path), config.model_dump(mode="json"))
    items = [rows[item] for item in range(len(rows))]
    assert len(items) == 44
    for step in range(11):
        expected = [rows.rows[number] for number in rows_of_step(len(rows.rows), 4, step, seed=3)]
        dealt = [items[item] for rank in (0, 1) for item in range(rank, len(items), 2) if item // 4 == step]
        assert sorted(row.labels.tolist() for row in dealt) == sorted(row.labels.tolist() for row in expected)
    for held_out in (False, True):
        learned = sum(int((row.labels == 3).sum()) for row in Rows(table, config, held_out))
        assert learned == sum(len(trace.reply_ids) for trace in traces() if trace.held_out == held_out)


def test_a_resumed_curve_forgets_the_steps_after_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "training.jsonl"
    curve = Curve(path, 3.0, resumed_step=0, writes=True)
    curve.add(0, {"held_out_loss": 2.0})
    for step in (1, 2, 3):
        curve.add(step, {"loss": 1.0 / step})
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    Curve(path, 3.0, resumed_step=2, writes=False)
    assert [row["step"] for row in read_curve(path)] == [0, 1, 2, 3]
    resumed = Curve(path, 3.0, resumed_step=2, writes=True)
    resumed.add(3, {"loss": 0.5})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 0, "held_out_loss": 2.0},
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 0.5},
        {"step": 3, "loss": 0.5},
    ]
    Curve(path, 3.0, resumed_step=0, writes=True)
    assert read_curve(path) == []


def test_a_run_has_diverged_when_its_running_loss_is_a_multiple_of_the_lowest() -> None:
    check = DivergenceCheck(3.0)
    for step in range(1, WINDOW_STEPS + 1):
        check.add({"step": step, "loss": 1.0})
    check.add({"step": 11, "loss": 20.0})  # the mean of ten is now 2.9
    with pytest.raises(StageError, match=r"step 12 the mean loss of the last 10 steps is 4.8, more than 3 times .* 1;"):
        check.add({"step": 12, "loss": 20.0})


def test_a_run_that_diverges_from_its_first_step_on_is_held_against_the_loss_before_it() -> None:
    check = DivergenceCheck(3.0)
    check.add({"step": 0, "held_out_loss": 1.0})
    for step in range(1, WINDOW_STEPS):
        check.add({"step": step, "loss": 4.0})
    with pytest.raises(StageError, match="training diverges"):
        check.add({"step": WINDOW_STEPS, "loss": 4.0})


@pytest.mark.parametrize("name", ["loss", "held_out_loss"])
def test_a_loss_that_is_no_number_ends_the_run(name: str) -> None:
    with pytest.raises(StageError, match="the loss at step 5 is nan; lower"):
        DivergenceCheck(3.0).add({"step": 5, name: float("nan")})
