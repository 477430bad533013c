"""The NeMo-RL engine as far as it runs without NeMo-RL: config and schema, prompts, rewards, freezing, files."""

import abc
import ast
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

import moesaic.recover.reinforce.nemo_rl
from moesaic.core.errors import ConfigError, StageError
from moesaic.data.chat import encode_reply, load_tokenizer
from moesaic.data.problems import Message, Problem, render_prompt
from moesaic.models import layout
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.whole_model import load_model
from moesaic.recover.reinforce.nemo_rl import config as nemo_config
from moesaic.recover.reinforce.nemo_rl import driver, launch, surface
from moesaic.recover.reinforce.nemo_rl.config import Placement, Run, render
from moesaic.recover.reinforce.nemo_rl.graded_replies import Grader, keep_markers
from moesaic.recover.reinforce.nemo_rl.processor import problem_of, process, prompt_row
from moesaic.recover.reinforce.nemo_rl.trainable import PartlyTrainable, freeze_all_but
from moesaic.recover.reinforce.stage import ReinforceConfig, RewardConfig
from moesaic.recover.training import OptimizerConfig

PACKAGE = Path(moesaic.recover.reinforce.nemo_rl.__file__).parent
PROBLEM = Problem("p1", "copy", (Message("user", "w1 w2"),), "w3", "exact_match")
QUESTIONS = [(PROBLEM, "low"), (PROBLEM, "high")]
LENGTHS = {("copy", "low"): 1.0, ("copy", "high"): 1.0}
RIGHT = "<|channel|> final <|message|> w3 <|return|>"
CONFIG = ReinforceConfig(
    engine="nemo_rl",
    efforts=("low", "high"),
    rewards=RewardConfig(correct=1.0, format=0.25, length=0.5),
    steps=10,
    prompts_per_step=2,
    generations_per_prompt=4,
    replies_per_forward=8,
    max_new_tokens=16,
    optimizer=OptimizerConfig(learning_rate=1e-6, warmup_steps=4),
)


def make_run(directory: Path, **changes: Any) -> Run:
    values: dict[str, Any] = {
        "model": Path("/models/child"),
        "prompts": directory / "prompts.jsonl",
        "trainable": directory / "trainable.json",
        "plugin": directory / "vllm_plugin",
        "directory": directory,
        "first_step": 0,
        "num_prompts": 5,
        "longest_prompt_tokens": 30,
        "stop_ids": (5,),
        "log_to_mlflow": False,
    }
    return Run(**(values | changes))


def test_the_rendered_config_says_what_ours_does(tmp_path: Path) -> None:
    rendered = render(CONFIG, Placement(num_nodes=1, gpus_per_node=4), make_run(tmp_path, log_to_mlflow=True))
    assert (rendered["grpo"]["num_prompts_per_step"], rendered["grpo"]["num_generations_per_prompt"]) == (2, 4)
    assert rendered["grpo"]["max_num_steps"] == 10
    assert rendered["grpo"]["max_num_epochs"] * (5 // 2) >= 10  # drop_last: two steps an epoch
    assert (rendered["loss_fn"]["ratio_clip_min"], rendered["loss_fn"]["ratio_clip_max"]) == (0.2, 0.28)
    assert rendered["loss_fn"]["reference_policy_kl_penalty"] == 0
    assert rendered["grpo"]["skip_reference_policy_logprobs_calculation"]
    policy = rendered["policy"]
    assert policy["train_global_batch_size"] == 8  # one optimiser step per batch of rollouts
    assert policy["train_micro_batch_size"] == 2  # 8 replies per forward over 4 GPUs
    assert policy["max_total_sequence_length"] == policy["generation"]["vllm_cfg"]["max_model_len"] == 30 + 16 + 1
    assert policy["generation"]["stop_token_ids"] == [5]
    assert rendered["logger"]["mlflow_enabled"]
    assert rendered["logger"]["mlflow"] == {}  # the run and the server come from the environment
    assert rendered["data"]["train"]["env_name"] in rendered["env"]
    plain = render(CONFIG.but(scale_rewards=False), Placement(), make_run(tmp_path))["grpo"]
    for each, scaled in ((rendered["grpo"], True), (plain, False)):
        assert (each["normalize_rewards"], each["adv_estimator"]["normalize_rewards"]) == (scaled, scaled)


def test_the_config_survives_yaml_and_is_the_same_each_time(tmp_path: Path) -> None:
    rendered = render(CONFIG, Placement(gpus_per_node=2), make_run(tmp_path))
    text = yaml.safe_dump(rendered)
    assert "&id" not in text  # every value written out, none by reference
    again = yaml.safe_load(text)
    assert again == rendered == render(CONFIG, Placement(gpus_per_node=2), make_run(tmp_path))


def learning_rates(config: OptimizerConfig, steps: int) -> list[float]:
    """What NeMo-RL builds of the rendered scheduler (nemo_rl/models/automodel/setup.py), step by step."""
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], **nemo_config._optimizer(config)["kwargs"])
    *parts, last = nemo_config._scheduler(config, steps)
    built = [
        getattr(torch.optim.lr_scheduler, part["name"].split(".")[-1])(optimizer, **part["kwargs"]) for part in parts
    ]
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, built, last["milestones"])
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_the_learning_rate_rises_and_falls(tmp_path: Path) -> None:
    rates = learning_rates(OptimizerConfig(learning_rate=1.0, warmup_steps=4, final_learning_rate_ratio=0.1), 10)
    assert rates[:5] == pytest.approx([0.25, 0.4375, 0.625, 0.8125, 1.0])
    assert rates[7] == pytest.approx(0.55)  # half way down
    assert rates == [*sorted(rates[:5]), *sorted(rates[5:], reverse=True)]
    without = learning_rates(OptimizerConfig(learning_rate=1.0, warmup_steps=0, final_learning_rate_ratio=0.1), 10)
    assert without[0] == 1.0
    assert without[5] == pytest.approx(0.55)


@pytest.mark.parametrize(
    ("placement", "shared", "changes", "complaint"),
    [
        (Placement(gpus_per_node=0), {}, {}, "NeMo-RL trains on GPUs, and there is none here"),
        (Placement(gpus_per_node=3), {}, {}, "8 replies cannot be spread evenly over 3 GPUs"),
        (Placement(gpus_per_node=4), {"expert_parallel": 3}, {}, "expert_parallel 3 does not divide the 4 GPUs"),
        (
            Placement(gpus_per_node=4),
            {"generation_tensor_parallel": 8},
            {},
            "generation_tensor_parallel 8 does not divide the 4 GPUs",
        ),
        (Placement(gpus_per_node=4), {}, {"num_prompts": 1}, "prompts_per_step is 2, but there are 1 prompts"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    placement: Placement, shared: dict[str, int], changes: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        render(CONFIG.but(nemo_rl=shared), placement, make_run(tmp_path, **changes))


def test_how_the_policy_is_shared_out_is_rendered(tmp_path: Path) -> None:
    shared = CONFIG.but(
        nemo_rl={
            "expert_parallel": 4,
            "generation_tensor_parallel": 2,
            "generation_expert_parallel": 4,
            "logprob_chunk_tokens": 512,
        }
    )
    run = make_run(tmp_path, python_path=("/opt/moesaic",))
    policy = render(shared, Placement(gpus_per_node=4), run)["policy"]
    engine = policy["generation"]["vllm_cfg"]
    assert (policy["dtensor_cfg"]["expert_parallel_size"], policy["logprob_chunk_size"]) == (4, 512)
    assert (engine["tensor_parallel_size"], engine["expert_parallel_size"]) == (2, 4)
    assert engine["env_vars"] == {"PYTHONPATH": f"{tmp_path / 'vllm_plugin'}:/opt/moesaic"}
    assert policy["generation"]["vllm_kwargs"] == {"hf_overrides": {"quantization_config": {}}}
    with pytest.raises(ValueError, match="generation_expert_parallel 2 must be 1 or a multiple of"):
        CONFIG.but(nemo_rl={"generation_tensor_parallel": 4, "generation_expert_parallel": 2})


def test_a_row_is_rendered_at_its_own_effort_and_kept_for_the_environment(tiny_parent: Path) -> None:
    tokenizer = load_tokenizer(tiny_parent)
    for effort in ("low", "high"):
        row = json.loads(json.dumps(prompt_row(PROBLEM, effort, 12.5)))
        assert problem_of(row) == PROBLEM
        datum = process(row | {"task_name": "scratch-prompts"}, None, tokenizer, 100, 3)
        expected = render_prompt(PROBLEM, tokenizer, effort)
        assert datum["message_log"][0]["token_ids"].tolist() == expected
        assert (datum["length"], datum["loss_multiplier"], datum["idx"]) == (len(expected), 1.0, 3)
        assert datum["extra_env_info"] == row
        assert datum["task_name"] == "scratch-prompts"


def test_a_prompt_that_is_too_long_is_cut_and_not_learned_from(tiny_parent: Path) -> None:
    row = prompt_row(PROBLEM, "low", 1.0) | {"task_name": "t"}
    datum = process(row, None, load_tokenizer(tiny_parent), 4, 0)
    assert (datum["length"], len(datum["message_log"][0]["token_ids"]), datum["loss_multiplier"]) == (4, 4, 0.0)


def make_grader(tiny_parent: Path, curve: Path, first_step: int = 0) -> Grader:
    tokenizer = load_tokenizer(tiny_parent)
    settings = {
        "tokenizer": str(tiny_parent),
        "stop_ids": [tokenizer.convert_tokens_to_ids("<|return|>")],
        "rewards": CONFIG.rewards.model_dump(mode="json"),
        "curve": str(curve),
        "first_step": first_step,
    }
    return Grader(json.loads(json.dumps(settings)))


@pytest.mark.parametrize(
    ("text", "reference_tokens", "parts", "correct", "num_tokens", "truncated"),
    [
        (RIGHT, 6.0, (1.0, 0.25, 0.0), True, 5, False),  # no longer than the parent's: nothing to pay
        (RIGHT, 2.0, (1.0, 0.25, -0.3), True, 5, False),  # 0.5 * (1 - 2 / 5)
        (RIGHT.replace("w3", "w4"), 2.0, (0.0, 0.25, 0.0), False, 5, False),
        (RIGHT.removesuffix(" <|return|>"), 2.0, (0.0, 0.0, 0.0), False, 4, True),
        ("", 2.0, (0.0, 0.0, 0.0), False, 0, True),
    ],
)
def test_a_reply_earns_what_moesaic_rewards_says(
    text: str,
    reference_tokens: float,
    parts: tuple[float, float, float],
    correct: bool,
    num_tokens: int,
    truncated: bool,
    tiny_parent: Path,
    tmp_path: Path,
) -> None:
    row = prompt_row(PROBLEM, "low", reference_tokens)
    reply = make_grader(tiny_parent, tmp_path / "training.jsonl").grade(text, row)
    assert (reply.reward.correct, reply.reward.format, reply.reward.length) == pytest.approx(parts)
    assert (reply.correct, reply.num_tokens, reply.truncated) == (correct, num_tokens, truncated)


def test_a_step_is_one_line_of_the_curve(tiny_parent: Path, tmp_path: Path) -> None:
    curve = tmp_path / "training.jsonl"
    grader = make_grader(tiny_parent, curve, first_step=7)
    prompt = {"role": "user", "content": "w1 w2"}
    wrong = RIGHT.replace("w3", "w4")
    asked = [(RIGHT, "low"), (wrong, "low"), (RIGHT, "high")]
    conversations = [[prompt, {"role": "assistant", "content": text}] for text, _ in asked]
    rows = [prompt_row(PROBLEM, effort, 2.5) for _, effort in asked]
    assert grader.step(conversations, rows) == pytest.approx([1.0, 0.25, 1.0])
    grader.step(conversations[:1], rows[:1])
    first, second = [json.loads(line) for line in curve.read_text().splitlines()]
    assert (first["step"], second["step"]) == (8, 9)
    assert first["reward"] == pytest.approx(2.25 / 3)
    assert (first["accuracy_low"], first["accuracy_high"], first["tokens_per_request_low"]) == (0.5, 1.0, 5.0)
    assert (first["reward_length_low"], first["reward_length_high"]) == (-0.125, -0.25)
    assert "accuracy_high" not in second


def test_rollouts_keep_their_markers(tiny_parent: Path) -> None:
    """NeMo-RL decodes tensors."""
    tokenizer = load_tokenizer(tiny_parent)
    ids = tokenizer(RIGHT, add_special_tokens=False)["input_ids"]
    assert "<|return|>" not in tokenizer.batch_decode([ids], skip_special_tokens=True)[0]
    (text,) = keep_markers(tokenizer).batch_decode([torch.tensor(ids)], skip_special_tokens=True)
    assert text.replace(" ", "") == RIGHT.replace(" ", "")
    assert encode_reply(text, tokenizer) == ids


def test_only_the_named_tensors_learn(tiny_parent: Path) -> None:
    checkpoint = Checkpoint.open(tiny_parent)
    names = layout.trainable_names(checkpoint.shape, checkpoint.architecture, ("attention", "head"))

    class Loader:
        @staticmethod
        def from_pretrained(directory: Path) -> nn.Module:
            return load_model(directory)

    model = PartlyTrainable(Loader, names).from_pretrained(tiny_parent)
    learns = sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    assert learns == sorted(names)
    assert not any("experts" in name or "router" in name for name in learns)


def test_wrapped_and_renamed_tensors_are_known_by_their_checkpoint_names() -> None:
    class Adapter:
        @staticmethod
        def checkpoint_name(name: str) -> str:
            return name.replace("gate", "router")

    model = nn.ModuleDict({"_checkpoint_wrapped_module": nn.ModuleDict({"gate": nn.Linear(2, 2)})})
    model.state_dict_adapter = Adapter()
    freeze_all_but(model, ["router.weight"])
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, False]
    with pytest.raises(StageError, match=r"no tensor router\.scale"):
        freeze_all_but(model, ["router.weight", "router.scale"])


def test_preparing_writes_what_the_driver_reads(
    tiny_parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", "abc")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "checkpoints" / "step_4").mkdir(parents=True)
    (tmp_path / "checkpoints" / "tmp_step_6").mkdir()
    (tmp_path / "training.jsonl").write_text('{"step": 3}\n{"step": 4}\n{"step": 5}\n{"st')
    lengths = {("copy", "low"): 10.0, ("copy", "high"): 20.0}
    run = launch.prepare(CONFIG, tiny_parent, QUESTIONS, lengths, tmp_path, Placement(gpus_per_node=2))
    rows = [json.loads(line) for line in run.prompts.read_text().splitlines()]
    assert [(row["effort"], row["reference_tokens"]) for row in rows] == [("low", 10.0), ("high", 20.0)]
    rendered = yaml.safe_load((tmp_path / launch.CONFIG).read_text())
    assert not rendered["logger"]["mlflow_enabled"]  # a run without a server
    assert rendered["env"][nemo_config.ENVIRONMENT]["first_step"] == 4
    assert (tmp_path / "training.jsonl").read_text() == '{"step": 3}\n{"step": 4}\n'
    tokenizer = load_tokenizer(tiny_parent)
    data = rendered["data"]
    assert all(
        process(row | {"task_name": "t"}, None, tokenizer, data["max_input_seq_length"], 0)["loss_multiplier"]
        for row in rows
    )
    Grader(rendered["env"][nemo_config.ENVIRONMENT]).step([[{"role": "assistant", "content": RIGHT}]], rows[:1])
    assert json.loads((tmp_path / "training.jsonl").read_text().splitlines()[-1])["step"] == 5


def test_what_does_not_fit_is_refused_before_anything_is_written(tiny_parent: Path, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"max_new_tokens": 10_000})
    with pytest.raises(ConfigError, match="does not fit the model's 512 positions"):
        launch.prepare(config, tiny_parent, [*QUESTIONS, *QUESTIONS], LENGTHS, tmp_path, Placement())
    with pytest.raises(ConfigError, match="layer 0 has 8 experts, which 16"):
        launch.prepare(
            CONFIG.but(nemo_rl={"expert_parallel": 16}), tiny_parent, QUESTIONS, LENGTHS, tmp_path, Placement()
        )
    assert not list(tmp_path.iterdir())


def test_the_trained_tensors_come_back_by_name(tiny_parent: Path, tmp_path: Path) -> None:
    lengths = LENGTHS
    run = launch.prepare(CONFIG, tiny_parent, QUESTIONS, lengths, tmp_path, Placement(gpus_per_node=2))
    tensors = {name: value for path in tiny_parent.glob("*.safetensors") for name, value in load_file(path).items()}
    weights = tmp_path / "pytorch_model.bin"
    torch.save(tensors, weights)
    learned = launch.collect(run, weights)
    checkpoint = Checkpoint.open(tiny_parent)
    assert list(learned) == layout.trainable_names(checkpoint.shape, checkpoint.architecture, CONFIG.trainable)
    assert all(torch.equal(value, tensors[name]) for name, value in learned.items())
    del tensors["lm_head.weight"]
    torch.save(tensors, weights)
    with pytest.raises(StageError, match=r"lacks lm_head\.weight"):
        launch.collect(run, weights)


def test_without_nemo_rl_the_image_is_named_at_once(tiny_parent: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nemo-rl:v0\.8\.0.*or choose engine 'trl'"):
        launch.train(CONFIG, tiny_parent, QUESTIONS, LENGTHS, tmp_path)
    assert not list(tmp_path.iterdir())


class EnvironmentReturn(NamedTuple):
    """The fields of NeMo-RL's, in their order (nemo_rl/environments/interfaces.py)."""

    observations: list[dict[str, str]]
    metadata: list[Any]
    next_stop_strings: list[Any]
    rewards: torch.Tensor
    terminateds: torch.Tensor
    answers: list[str | None] | None


class EnvironmentInterface(abc.ABC):
    """What NeMo-RL wants of an environment (nemo_rl/environments/interfaces.py)."""

    @abc.abstractmethod
    def step(self, message_log_batch: Any, metadata: Any) -> EnvironmentReturn: ...

    @abc.abstractmethod
    def global_post_process_and_metrics(self, batch: Any) -> tuple[Any, dict[str, Any]]: ...


class Runtime(NamedTuple):
    """The field of NeMo-RL's ``RuntimeConfig`` that matters (nemo_rl/models/automodel/config.py)."""

    model_class: Any


class WorkerImpl:
    """The order of NeMo-RL's worker: validate, load, optimiser (nemo_rl/models/policy/workers)."""

    def __init__(self, config: dict[str, Any], weights_path: str | None = None, **options: Any) -> None:
        worker_module = sys.modules["nemo_rl.models.policy.workers.dtensor_policy_worker_v2"]
        runtime = worker_module.validate_and_prepare_config(config=config, processor=None, rank=0)
        self.model = runtime.model_class.from_pretrained(config["model_name"])
        self.optimized = [name for name, weight in self.model.named_parameters() if weight.requires_grad]
        self.weights_path = weights_path


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """Modules of NeMo-RL's and Ray's names with the few things in them that ours lean on, as read in their source."""
    modules = {name: ModuleType(name) for name in ("ray", "nemo_rl")}
    for name in surface.IMPORTED:
        module, _, attribute = name.rpartition(".")
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            modules.setdefault(".".join(parts[:end]), ModuleType(".".join(parts[:end])))
        setattr(modules[module], attribute, None)
    modules["ray"].remote = lambda *found, **_: found[0] if found else lambda decorated: decorated
    interfaces = modules["nemo_rl.environments.interfaces"]
    interfaces.EnvironmentInterface, interfaces.EnvironmentReturn = EnvironmentInterface, EnvironmentReturn
    modules["nemo_rl.models.policy.utils"].get_runtime_env_for_policy_worker = lambda name: {}
    worker = ModuleType("nemo_rl.models.policy.workers.dtensor_policy_worker_v2")
    worker.DTensorPolicyWorkerV2Impl = WorkerImpl
    modules["nemo_rl.models.policy.workers"].dtensor_policy_worker_v2 = modules[worker.__name__] = worker
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    yield modules
    for name in ("environment_actor", "policy_worker"):
        sys.modules.pop(f"moesaic.recover.reinforce.nemo_rl.{name}", None)


def test_the_environment_actor_returns_what_nemo_rl_unpacks(
    stand_ins: dict[str, ModuleType], tiny_parent: Path, tmp_path: Path
) -> None:
    actor = importlib.import_module("moesaic.recover.reinforce.nemo_rl.environment_actor").VerifiedReplies
    run = launch.prepare(
        CONFIG, tiny_parent, QUESTIONS, {question: 10.0 for question in LENGTHS}, tmp_path, Placement(gpus_per_node=2)
    )
    rows = [json.loads(line) for line in run.prompts.read_text().splitlines()]
    settings = yaml.safe_load((tmp_path / launch.CONFIG).read_text())["env"][nemo_config.ENVIRONMENT]
    conversations = [
        [{"role": "user", "content": ""}, {"role": "assistant", "content": text}] for text in (RIGHT, "w3")
    ]
    returned = actor(settings).step(conversations, rows)
    assert isinstance(returned, EnvironmentReturn)
    assert torch.equal(returned.rewards, torch.tensor([1.25, 0.0]))
    assert returned.terminateds.bool().all()
    assert [len(part) for part in returned[:3]] == [2, 2, 2]
    assert returned.metadata == rows


def test_the_policy_worker_freezes_before_its_optimizer_is_built(
    stand_ins: dict[str, ModuleType], tiny_parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered: list[bool] = []
    cluster_model = ModuleType("moesaic.recover.distill.automodel.cluster_model")
    cluster_model.register = lambda: registered.append(True)
    monkeypatch.setitem(sys.modules, cluster_model.__name__, cluster_model)
    monkeypatch.setattr("moesaic.recover.distill.automodel.cluster_model", cluster_model, raising=False)
    loader = SimpleNamespace(from_pretrained=load_model)
    stand_ins["nemo_rl.models.policy.workers.dtensor_policy_worker_v2"].validate_and_prepare_config = (
        lambda config, processor, rank: Runtime(loader)
    )
    checkpoint = Checkpoint.open(tiny_parent)
    names = layout.trainable_names(checkpoint.shape, checkpoint.architecture, ("norms",))
    (tmp_path / "trainable.json").write_text(json.dumps(names))
    monkeypatch.setenv(nemo_config.TRAINABLE_VARIABLE, str(tmp_path / "trainable.json"))
    worker_class = importlib.import_module("moesaic.recover.reinforce.nemo_rl.policy_worker").PolicyWorker
    worker = worker_class({"model_name": tiny_parent}, weights_path="w", init_optimizer=True)
    assert sorted(worker.optimized) == sorted(names)
    assert worker.weights_path == "w"
    assert registered


def test_the_driver_wires_our_parts_into_grpo(
    stand_ins: dict[str, ModuleType], tiny_parent: Path, tmp_path: Path
) -> None:
    calls: list[str] = []
    received: dict[str, Any] = {}

    def stand_in(name: str, function: Any) -> None:
        module, _, attribute = name.rpartition(".")

        def record(*arguments: Any, **options: Any) -> Any:
            calls.append(attribute)
            received[attribute] = (arguments, options)
            return function(*arguments, **options)

        setattr(stand_ins[f"nemo_rl.{module}"], attribute, record)

    tokenizer = load_tokenizer(tiny_parent)
    thirteen = [f"part {number}" for number in range(13)]
    registry: dict[str, str] = {}
    stand_ins["nemo_rl.distributed.ray_actor_environment_registry"].ACTOR_ENVIRONMENT_REGISTRY = registry
    stand_ins["nemo_rl.distributed.virtual_cluster"].PY_EXECUTABLES = SimpleNamespace(SYSTEM="s", AUTOMODEL="a")
    stand_in("algorithms.grpo.MasterConfig", lambda **sections: SimpleNamespace(**sections))
    stand_in("data.processors.register_processor", lambda name, function: None)
    stand_in("environments.utils.register_env", lambda name, actor: None)
    stand_in("distributed.virtual_cluster.init_ray", lambda: None)
    stand_in("algorithms.utils.get_tokenizer", lambda settings: tokenizer)
    stand_in("models.generation.configure_generation_config", lambda settings, tokenizer: settings)
    stand_in("data.utils.setup_response_data", lambda *_: ("data", None, {"task": "environment"}, {}))
    stand_in("algorithms.grpo.setup", lambda *_, **__: tuple(thirteen))
    stand_in("algorithms.grpo.grpo_train", lambda *_: None)
    stand_in("models.policy.lm_policy.Policy", lambda **_: None)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(render(CONFIG, Placement(gpus_per_node=2), make_run(tmp_path))))
    driver.main([str(config)])
    assert received["register_processor"][0] == (nemo_config.PROCESSOR, process)
    assert received["register_env"][0] == (nemo_config.ENVIRONMENT, driver.ENVIRONMENT_ACTOR)
    assert registry == {driver.ENVIRONMENT_ACTOR: "s", driver.POLICY_WORKER: "a"}
    assert calls.index("register_env") < calls.index("setup_response_data") < calls.index("setup")
    received["setup"][1]["policy_factory"](cluster="c")
    assert received["Policy"][1] == {"cluster": "c", "worker_extension_cls_fqn": driver.POLICY_WORKER}
    trained = received["grpo_train"][0]
    # policy, generation, dataloader | validation, tokenizer | loss | environments | logger, checkpointer, state, config
    assert trained[:3] == ("part 0", "part 1", "part 4")
    assert trained[3:5] == (None, tokenizer)
    assert trained[5:8] == ("part 6", {"task": "environment"}, {})
    assert trained[8:] == ("part 7", "part 8", "part 9", "part 10")
    stop = tokenizer.convert_tokens_to_ids("<|return|>")
    assert tokenizer.batch_decode([[stop]], skip_special_tokens=True) == ["<|return|>"]


def foreign_imports(path: Path) -> set[str]:
    """Dotted names that a file takes from NeMo-RL."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "nemo_rl":
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.split(".")[0] == "nemo_rl"}
    return names


def test_every_name_of_nemo_rl_is_in_one_table() -> None:
    used = {path.name: foreign_imports(path) for path in PACKAGE.glob("*.py")}
    assert set().union(*used.values()) == set(surface.IMPORTED)
    assert {name for name, names in used.items() if names} == {
        "driver.py",
        "environment_actor.py",
        "policy_worker.py",
    }
    for name, source in surface.IMPORTED.items():
        assert source.removesuffix(".py").removesuffix("/__init__").replace("/", ".") in (name, name.rpartition(".")[0])


def test_the_driver_imports_nemo_rl_only_when_it_runs_and_names_actors_that_exist() -> None:
    top = [node for node in ast.parse((PACKAGE / "driver.py").read_text()).body if isinstance(node, ast.ImportFrom)]
    assert not any((node.module or "").startswith("nemo_rl") for node in top)
    for actor in (driver.ENVIRONMENT_ACTOR, driver.POLICY_WORKER):
        module, _, name = actor.rpartition(".")
        assert module.rpartition(".")[0] == "moesaic.recover.reinforce.nemo_rl"
        tree = ast.parse((PACKAGE / f"{module.rpartition('.')[2]}.py").read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
