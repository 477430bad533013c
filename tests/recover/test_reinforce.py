"""Reinforcement learning of a random model that is paid for ending its reply: what learns, what stays, what resumes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moesaic.core.errors import ArtifactError, ConfigError, StageError
from moesaic.data.chat import load_tokenizer
from moesaic.data.problems import Problem, read_problems, render_prompt
from moesaic.models import layout
from moesaic.models.checkpoint import Checkpoint, read_recovery
from moesaic.models.whole_model import load_model
from moesaic.recover.reinforce import run as reinforce
from moesaic.recover.reinforce.stage import ReinforceConfig, RewardConfig
from moesaic.recover.training import OptimizerConfig
from tests.closeness import assert_near

if TYPE_CHECKING:  # importing TRL takes seconds, and every process that collects the tests imports this file
    from moesaic.recover.reinforce.trl.curve import Curve
    from moesaic.recover.reinforce.trl.policy_trainer import PolicyTrainer

CONFIG = ReinforceConfig(
    name="mixed",
    efforts=("low", "high"),
    rewards=RewardConfig(length=0.1),
    steps=6,
    prompts_per_step=4,
    generations_per_prompt=4,
    replies_per_forward=8,
    max_new_tokens=12,
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2),
    checkpoint_every_steps=2,
    precision="float32",
)
SUMMARY = {
    "efforts": {
        effort: {"tasks": {task: {"accuracy": 0.5, "tokens_per_request": tokens} for task in ("t0", "t1")}}
        for effort, tokens in (("low", 4.0), ("high", 8.0))
    }
}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = [[f"w{(7 * index + place) % 40}" for place in range(1 + 3 * (index % 3))] for index in range(6)]
    rows = [
        {
            "id": f"p{index}",
            "task": f"t{index % 2}",
            "prompt": [{"role": "user", "content": " ".join(content)}],
            "answer": "w1",
            "verifier": "exact_match",
        }
        for index, content in enumerate(words)
    ]
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("traces")
    (directory / "summary.json").write_text(json.dumps(SUMMARY))
    return directory


@pytest.fixture(scope="module", autouse=True)
def every_ended_reply_is_right() -> Iterator[None]:
    """A random model answers nothing, but ends some of its replies: so it has something to learn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Problem, "is_solved_by", lambda self, final: True)
        yield


def run(config: ReinforceConfig, model: Path, prompts: Path, traces: Path, place: Path) -> dict[str, float]:
    for name in ("output", "scratch"):
        (place / name).mkdir(parents=True, exist_ok=True)
    return reinforce.run(
        config, model=model, prompts=prompts, traces=traces, output=place / "output", scratch=place / "scratch"
    )


def curve_of(place: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (place / "training.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(
    tiny_parent: Path, prompts: Path, traces: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, float]]:
    """A run to its end: its output and what it measured."""
    place = tmp_path_factory.mktemp("finished")
    metrics = run(CONFIG, tiny_parent, prompts, traces, place)
    return place / "output", metrics


def test_the_curve_adds_up(finished: tuple[Path, dict[str, float]]) -> None:
    curve = curve_of(finished[0])
    assert [row["step"] for row in curve] == [1, 2, 3, 4, 5, 6]
    assert [row["learning_rate"] for row in curve[:2]] == pytest.approx([1.5e-3, 3e-3])
    assert curve[-1]["learning_rate"] == pytest.approx(3e-4)
    for row in curve:
        efforts = [effort for effort in CONFIG.efforts if f"reward_{effort}" in row]
        for effort in efforts:
            parts = sum(row[f"reward_{part}_{effort}"] for part in ("correct", "format", "length"))
            assert row[f"reward_{effort}"] == pytest.approx(parts, abs=1e-6)
            assert row[f"accuracy_{effort}"] + row[f"truncated_{effort}"] == pytest.approx(1), "as this file pays"
        lowest, highest = min(row[f"reward_{effort}"] for effort in efforts), max(row[f"reward_{e}"] for e in efforts)
        assert lowest - 1e-6 <= row["reward"] <= highest + 1e-6


def test_the_policy_learns_to_end_its_replies(tiny_parent: Path, prompts: Path, traces: Path, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"steps": 24, "prompts_per_step": 8, "checkpoint_every_steps": 24})
    metrics = run(config, tiny_parent, prompts, traces, tmp_path)
    assert metrics["reward_end"] > metrics["reward_start"] + 0.3
    assert metrics["tokens_per_request_low_end"] < metrics["tokens_per_request_low_start"]


def test_experts_and_router_keep_their_bytes(
    finished: tuple[Path, dict[str, float]], tiny_checkpoint: Checkpoint
) -> None:
    policy = Checkpoint.open(finished[0])
    changed = {
        name for name in tiny_checkpoint.files if not torch.equal(tiny_checkpoint.tensor(name), policy.tensor(name))
    }
    allowed = layout.trainable_names(policy.shape, policy.architecture, CONFIG.trainable)
    assert changed <= set(allowed)
    assert {layout.EMBEDDING, layout.HEAD, layout.FINAL_NORM} <= changed
    assert any(".self_attn.sinks" in name for name in changed)
    for path in set(tiny_checkpoint.files.values()):
        if path.stem.endswith("experts"):
            assert (finished[0] / path.name).read_bytes() == path.read_bytes()
    assert read_recovery(finished[0])[-1] == {"stage": "reinforce", "policy": "mixed", "steps": 6}
    load_tokenizer(finished[0])


def test_a_killed_run_loses_and_repeats_nothing(
    finished: tuple[Path, dict[str, float]],
    tiny_parent: Path,
    prompts: Path,
    traces: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from moesaic.recover.reinforce.trl.curve import Curve

    whole = Curve.on_log

    def die_in_step_5(self: "Curve", *args: object, **kwargs: object) -> None:
        whole(self, *args, **kwargs)  # type: ignore[arg-type]
        if self._path.read_text().count("\n") == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(Curve, "on_log", die_in_step_5)
    with pytest.raises(KeyboardInterrupt):
        run(CONFIG, tiny_parent, prompts, traces, tmp_path)
    assert len(curve_of(tmp_path / "scratch")) == 5
    (tmp_path / "scratch" / "checkpoints" / "checkpoint-5").mkdir()  # one that was never finished
    monkeypatch.setattr(Curve, "on_log", whole)
    run(CONFIG, tiny_parent, prompts, traces, tmp_path)
    expected, found = curve_of(finished[0]), curve_of(tmp_path / "output")
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for row, other in zip(expected, found, strict=True):
        assert other == pytest.approx(row, rel=1e-4, abs=1e-6)
    policy, resumed = Checkpoint.open(finished[0]), Checkpoint.open(tmp_path / "output")
    for name in layout.trainable_names(policy.shape, policy.architecture, CONFIG.trainable):
        assert_near(resumed.tensor(name), policy.tensor(name), 2**-7, name)  # a step of bfloat16


def test_no_steps_hand_the_model_on(
    tiny_parent: Path, tiny_checkpoint: Checkpoint, prompts: Path, traces: Path, tmp_path: Path
) -> None:
    assert run(CONFIG.model_copy(update={"steps": 0}), tiny_parent, prompts, traces, tmp_path) == {}
    policy = Checkpoint.open(tmp_path / "output")
    assert all(policy.files[name].read_bytes() == path.read_bytes() for name, path in tiny_checkpoint.files.items())
    assert curve_of(tmp_path / "output") == []


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"efforts": ("low", "medium")},
            ArtifactError,
            r"task t0 at medium effort \(its efforts: low, high\)",
        ),
        ({"replies_per_forward": 5}, ConfigError, "replies_per_forward = 5 does not divide the 16 replies"),
        ({"max_new_tokens": 510}, ConfigError, "does not fit the model's 512 positions"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(
    changes: dict[str, object],
    error: type[Exception],
    message: str,
    tiny_parent: Path,
    prompts: Path,
    traces: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def nothing(*_: object) -> None:
        raise AssertionError("the model was loaded")

    from moesaic.recover.reinforce.trl import grpo

    monkeypatch.setattr(grpo, "load_model", nothing)
    with pytest.raises(error, match=message):
        run(CONFIG.model_copy(update=changes), tiny_parent, prompts, traces, tmp_path)
    assert not any((tmp_path / "output").iterdir())


def test_divergence_is_an_error_and_writes_nothing(
    tiny_parent: Path, prompts: Path, traces: Path, tmp_path: Path
) -> None:
    wild = OptimizerConfig(learning_rate=1e30, warmup_steps=0, max_gradient_norm=1e30)
    with pytest.raises(StageError, match="the policy has diverged"):
        run(CONFIG.model_copy(update={"optimizer": wild}), tiny_parent, prompts, traces, tmp_path)
    assert not any((tmp_path / "output").iterdir())


def test_prompts_are_those_of_an_evaluation_and_efforts_have_equal_parts(
    tiny_parent: Path, prompts: Path, tmp_path: Path
) -> None:
    problems, tokenizer = read_problems(prompts), load_tokenizer(tiny_parent)
    questions = reinforce.all_questions(CONFIG, problems)
    from moesaic.recover.reinforce.trl import grpo

    rows = grpo.render_rows(questions, tokenizer)
    for row in rows:
        problem, effort = questions[row["question"]]
        assert row["prompt"] == render_prompt(problem, tokenizer, effort) and row["effort"] == effort
    order = grpo.row_order(len(rows), CONFIG)
    assert len(order) == CONFIG.steps * CONFIG.prompts_per_step
    assert sorted(order[:12]) == list(range(12)), "every prompt once at every effort before any comes again"
    assert order == grpo.row_order(len(rows), CONFIG)
    assert order != grpo.row_order(len(rows), CONFIG.model_copy(update={"seed": 1}))


def test_tasks_that_the_parent_solves_too_rarely_or_too_often_are_left_out(prompts: Path, tmp_path: Path) -> None:
    """Task t0 is solved 3 of 4 times at low effort and always at high, t1 1 of 2 times at low and never at high."""
    solved = {"low": {"t0": 0.75, "t1": 0.5}, "high": {"t0": 1.0, "t1": 0.0}}
    summary = {
        effort: {"tasks": {task: {"accuracy": share, "tokens_per_request": 4.0} for task, share in tasks.items()}}
        for effort, tasks in solved.items()
    }
    (tmp_path / "summary.json").write_text(json.dumps({"efforts": summary}))
    asked = reinforce.all_questions(CONFIG, read_problems(prompts))
    replies = reinforce.read_parent_replies(tmp_path / "summary.json", asked)

    def chosen(least: float, most: float) -> set[tuple[str, str]]:
        config = CONFIG.model_copy(update={"min_parent_accuracy": least, "max_parent_accuracy": most})
        questions = reinforce.choose_questions(config, asked, replies)
        assert len(questions) == 3 * len({(problem.task, effort) for problem, effort in questions})
        return {(problem.task, effort) for problem, effort in questions}

    assert chosen(0.5, 1) == {("t0", "low"), ("t0", "high"), ("t1", "low")}
    assert chosen(0.75, 1) == {("t0", "low"), ("t0", "high")}
    assert chosen(0, 0.75) == {("t0", "low"), ("t1", "low"), ("t1", "high")}
    assert reinforce.choose_questions(CONFIG, asked, replies) == asked
    with pytest.raises(ArtifactError, match=r"between min_parent_accuracy 0\.8 and max_parent_accuracy 0\.9 .*widen"):
        chosen(0.8, 0.9)
    del summary["high"]["tasks"]["t1"]
    (tmp_path / "summary.json").write_text(json.dumps({"efforts": summary}))
    with pytest.raises(ArtifactError, match="no reply to task t1 at high effort"):
        reinforce.read_parent_replies(tmp_path / "summary.json", asked)


@pytest.fixture
def trainer(tiny_parent: Path, prompts: Path, tmp_path: Path) -> "PolicyTrainer":
    from moesaic.recover.reinforce.trl import grpo
    from moesaic.recover.reinforce.trl.curve import Curve

    config = CONFIG.model_copy(update={"temperature": 0.7})
    tokenizer = load_tokenizer(tiny_parent)
    questions = reinforce.all_questions(config, read_problems(prompts))
    rows = grpo.render_rows(questions, tokenizer)
    reward = grpo.reward_function(questions, tokenizer, {"low": 4.0, "high": 8.0}, config)
    policy = grpo._load(Checkpoint.open(tiny_parent), config)
    curve = Curve(tmp_path / "training.jsonl", config.name, 0)
    return grpo._trainer(config, policy, tokenizer, rows, reward, tmp_path / "checkpoints", curve)


def padded(rows: list[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
    """Prompts padded left and replies padded right, as TRL has them."""
    prompt, reply = max(len(row[0]) for row in rows), max(len(row[1]) for row in rows)
    return {
        "prompt_ids": torch.tensor([[0] * (prompt - len(p)) + p for p, _ in rows]),
        "prompt_mask": torch.tensor([[0] * (prompt - len(p)) + [1] * len(p) for p, _ in rows]),
        "completion_ids": torch.tensor([r + [0] * (reply - len(r)) for _, r in rows]),
        "completion_mask": torch.tensor([[1] * len(r) + [0] * (reply - len(r)) for _, r in rows]),
    }


ROWS = [([1, 9, 12, 30], [7, 8, 5]), ([1, 9], [40, 41, 42, 43, 5]), ([1, 2, 3, 4, 9, 33, 34], [5])]


def test_packed_log_probabilities_are_those_of_each_row_alone(trainer: "PolicyTrainer", tiny_parent: Path) -> None:
    batch = padded(ROWS)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    with torch.no_grad():
        found, entropies, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, 5, compute_entropy=True
        )
    assert entropies is not None
    plain = load_model(tiny_parent)
    for row, (prompt, reply) in enumerate(ROWS):
        with torch.no_grad():
            logits = plain(torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1]
        expected = (logits / 0.7).log_softmax(-1)
        chosen = expected.gather(1, torch.tensor(reply).unsqueeze(1)).squeeze(1)
        assert_near(found[row, : len(reply)], chosen)
        entropy = -(expected.exp() * expected).sum(-1)
        assert_near(entropies[row, : len(reply)], entropy)


def test_rows_without_advantage_add_nothing_to_the_gradient(trainer: "PolicyTrainer") -> None:
    from trl import GRPOTrainer

    advantages = torch.tensor([1.2, 1e-6, -0.4])
    inputs = padded(ROWS) | {"advantages": advantages, "num_items_in_batch": torch.tensor(9)}
    gradients = []
    for loss in (trainer._compute_loss, lambda *given: GRPOTrainer._compute_loss(trainer, *given)):
        trainer.model.zero_grad()
        trainer.current_gradient_accumulation_steps = 1
        loss(trainer.model, inputs).backward()
        gradients.append({n: p.grad for n, p in trainer.model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert_near(gradient, gradients[1][name], 1e-4, name)  # five times ROUNDING: forward and back


def test_unscaled_advantages_are_not_divided_by_the_spread_of_rewards(
    tiny_parent: Path, prompts: Path, traces: Path, tmp_path: Path
) -> None:
    """One prompt a step, so that one spread divides all of the gradient."""
    first = {}
    for scaled in (True, False):
        config = CONFIG.but(scale_rewards=scaled, steps=1, prompts_per_step=1, generations_per_prompt=32)
        run(config, tiny_parent, prompts, traces, tmp_path / str(scaled))
        first[scaled] = curve_of(tmp_path / str(scaled) / "output")[0]
    assert first[True]["reward_std"] == pytest.approx(first[False]["reward_std"]) != 0
    undivided = first[True]["gradient_norm"] * (first[True]["reward_std"] + 1e-4)
    assert first[False]["gradient_norm"] == pytest.approx(undivided, rel=1e-4)


def test_the_kl_penalty_is_from_where_training_began(
    tiny_parent: Path, prompts: Path, traces: Path, tmp_path: Path
) -> None:
    config = CONFIG.model_copy(update={"kl_weight": 0.05, "steps": 3, "checkpoint_every_steps": 1})
    run(config, tiny_parent, prompts, traces, tmp_path)
    kl = [row["kl"] for row in curve_of(tmp_path / "output")]
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert kl[2] > 1e-5


def test_bfloat16_keeps_learning_weights_in_float32(
    tiny_parent: Path, prompts: Path, traces: Path, tmp_path: Path
) -> None:
    config = CONFIG.model_copy(update={"precision": "bfloat16", "steps": 2})
    run(config, tiny_parent, prompts, traces, tmp_path)
    learned = load_file(tmp_path / "scratch" / "checkpoints" / "checkpoint-2" / "trainable.safetensors")
    assert {weight.dtype for weight in learned.values()} == {torch.float32}
    assert len(curve_of(tmp_path / "output")) == 2


def test_the_curve_goes_to_the_run_that_the_environment_names(
    tiny_parent: Path,
    prompts: Path,
    traces: Path,
    empty_mlflow: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mlflow import MlflowClient

    (tmp_path / "mlflow.db").write_bytes(empty_mlflow)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(uri)
    run_id = client.create_run(client.create_experiment("x")).info.run_id
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    monkeypatch.setenv("MLFLOW_MAX_LOG_PARAMS", "")
    monkeypatch.delenv("MLFLOW_MAX_LOG_PARAMS")  # so that what the engine sets is undone after the test
    run(CONFIG.model_copy(update={"steps": 2}), tiny_parent, prompts, traces, tmp_path)
    logged = {point.step: point.value for point in client.get_metric_history(run_id, "reward")}
    assert logged == pytest.approx({row["step"]: row["reward"] for row in curve_of(tmp_path / "output")})
    assert client.get_run(run_id).data.params == {}
