"""The configuration of every stage: frozen, checked, each default written once.

A config says *what* is built. Where things lie (paths, stores, devices, servers) never enters one: the same config,
and so the same digest, runs on a laptop and on a cluster.
"""

import hashlib
import json
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from moesaic.errors import ConfigError

Effort = Literal["low", "medium", "high"]
Criterion = Literal["removal_difference", "ranked_choice", "reap", "frequency", "random"]
DamageMetric = Literal["hidden_mse", "kl", "lm_loss", "cosine", "top1"]
Precision = Literal["float32", "bfloat16"]
CacheDtype = Literal["bf16", "fp8"]
EmulatedCache = Literal["bf16", "fp8_unit", "fp8"]
ExportTarget = Literal["tensorrt_llm", "vllm"]
ServingEngine = Literal["moesaic", "tensorrt_llm", "vllm", "running"]
GeneratingEngine = Literal["in_process", "moesaic", "tensorrt_llm", "vllm", "running"]
Balance = Literal["token", "trace"]
Trainable = Literal["attention", "norms", "router", "embedding", "head"]
Efforts = Annotated[tuple[Effort, ...], Field(min_length=1)]
Positive = Annotated[int, Field(ge=1)]
Amount = Annotated[float, Field(gt=0)]
Window = Annotated[int, Field(ge=2)]


class Config(BaseModel):
    """What all configs share: they cannot change, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a config from JSON; a ConfigError lists every problem with its place, its value and what is allowed."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as invalid:
            raise ConfigError(f"{cls.__name__} is not valid:\n" + "\n".join(_explain(invalid))) from invalid

    def to_json(self) -> str:
        """Canonical JSON: every value, keys in order."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True)

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def _explain(invalid: ValidationError) -> list[str]:
    lines = []
    for problem in invalid.errors():
        place = ".".join(str(part) for part in problem["loc"]) or "(the whole)"
        lines.append(f"  {place} = {problem['input']!r}: {problem['msg']}")
    return lines


class Workload(Config):
    """A kind of request the child must serve, and how many of them at once."""

    name: str
    """What limits and plots call it, such as ``long`` or ``short``."""
    input_tokens: Positive
    """Prompt tokens of one request."""
    output_tokens: Positive
    """Generated tokens of one request."""
    concurrency: Positive
    """Requests in flight."""


class SearchSpace(Config):
    """The variants each block may be replaced by (paper A: expert counts and window attention)."""

    expert_counts: tuple[Positive, ...]
    """Expert counts on offer, to the layers that have more; a layer's own always is."""
    windows: tuple[Window, ...] = ()
    """Windows on offer, in tokens, to the layers that are full in the parent; staying full always is."""
    expert_parallel_size: Positive = 1
    """Every expert count must be divisible by this."""

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        for count in self.expert_counts:
            if count % self.expert_parallel_size:
                raise ValueError(
                    f"expert count {count} is not divisible by expert_parallel_size {self.expert_parallel_size}"
                )
        return self


class IngestConfig(Config):
    """Which inputs a pipeline run starts from, by the digests of their manifests in the store."""

    parent: str
    """The model to compress."""
    calibration_short: str
    """Conversations that rank experts and score blocks."""
    calibration_long: str
    """Conversations whose answers depend on far context."""
    prompts: str
    """Problems the parent answers for distillation, and the policies are trained on."""
    tests: str
    """Problems to evaluate on."""


class RankExpertsConfig(Config):
    """The order in which a layer's experts matter."""

    criterion: Criterion = "removal_difference"
    """The importance formula, see ``moesaic.ranking``."""
    max_sequences: Positive = 128
    """Calibration sequences to use, from the start of the set."""
    max_tokens: Positive = 8192
    """Longer sequences are cut here."""
    batch_tokens: Positive = 16384
    """Padded tokens that go through a layer at once."""
    precision: Precision = "float32"
    """What layers compute in; sums are always float64."""
    seed: int = 0
    """For the random criterion."""


class ScoreBlocksConfig(Config):
    """Replace-one-block damage of every variant."""

    space: SearchSpace
    """The variants to score."""
    metric: DamageMetric = "hidden_mse"
    """The metric that becomes the damage; all of them are recorded."""
    long_weight: Annotated[float, Field(ge=0)] = 1.0
    """Damage = short score + long_weight * long score, each normalised as ``moesaic.scoring`` says."""
    max_sequences: Positive = 128
    """Sequences to use of each calibration set, from its start."""
    max_tokens: Positive = 8192
    """Longer sequences are cut here."""
    batch_tokens: Positive = 16384
    """Padded tokens that go through a layer at once."""
    variants_per_batch: Positive = 4
    """Variants whose hidden states go through the later layers together."""
    precision: Precision = "float32"
    """What layers compute in; damage is summed in float64."""


class MeasureCostsConfig(Config):
    """Memory and runtime of every variant under every workload."""

    space: SearchSpace
    """The variants to cost."""
    workloads: tuple[Workload, ...]
    """What the child will serve."""
    source: Literal["measure", "model"] = "measure"
    """Time blocks on this device, or compute them from a hardware table."""
    hardware: str = "h100"
    """Hardware table for ``source: model``."""
    num_gpus: Positive = 1
    """GPUs the model is spread over by tensor parallelism."""
    kv_cache: CacheDtype = "bf16"
    """Element type of the KV cache."""
    repeats: Positive = 5
    """Timings of each block; the median counts."""
    precision: Precision = "float32"
    """What timed blocks compute in."""


class Limits(Config):
    """Upper or lower bounds on one assembly. Each is absolute, or relative to the parent where its name says so."""

    memory_mib: Amount | None = None
    """Weights plus KV cache of the workload's concurrent requests, at most."""
    memory_ratio: Amount | None = None
    """The same, as a share of the parent's."""
    throughput_tokens_per_s: Amount | None = None
    """Output tokens per second, at least."""
    throughput_ratio: Amount | None = None
    """The same, as a multiple of the parent's."""
    latency_ms: Amount | None = None
    """Time of one decode step, at most."""
    latency_ratio: Amount | None = None
    """The same, as a share of the parent's."""


class SearchArchitectureConfig(Config):
    """The MIP: least damage under every workload's limits at once."""

    limits: dict[str, Limits] = {}
    """Per workload name."""
    max_parameters: Positive | None = None
    """Parameters of the child, at most."""
    max_parameters_ratio: Amount | None = None
    """The same, as a share of the parent's."""
    max_experts_ratio: Amount | None = None
    """Experts of the child, at most, as a share of the parent's."""
    max_layouts: Positive | None = None
    """Different attention windows (full counts as one), at most."""
    kv_group_size: Positive | None = None
    """Layers that the serving engine's KV allocator groups; memory then pays for unfilled groups. None: no padding."""
    min_windowed_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the parent's full layers that must become windows, at least."""
    num_solutions: Positive = 3
    """Diverse solutions to return, best first."""
    diversity: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Share of blocks that a further solution may have in common with each earlier one, at most."""
    frontier_points: Positive = 12
    """Points of the damage-against-speed frontier."""
    random_seeds: tuple[int, ...] = (0, 1, 2)
    """One random baseline per seed."""
    time_limit_s: Amount = 60.0
    """For each solve; status, bound and gap are always reported."""
    relative_gap: Annotated[float, Field(ge=0)] = 1e-6
    """Stop when proven within this of the optimum."""


class PruneModelConfig(Config):
    """Which of the architectures found becomes a checkpoint."""

    candidate: str = "puzzle"
    """``puzzle`` is the search's best; baselines have their names, see ``moesaic.search``."""


class ExportEngineConfig(Config):
    """A deployment bundle: the checkpoint as a serving engine reads it, and how that engine is started."""

    target: ExportTarget
    """The engine."""
    kv_cache: EmulatedCache = "fp8"
    """What the engine's KV cache stores: BF16, FP8 at scale 1, or FP8 by the scales that ``calibrate_kv`` found."""
    max_seq_len: Positive | None = None
    """Prompt and reply of one request, in tokens, at most. None: the model's positions."""
    max_batch_size: Positive = 256
    """Requests that the engine works on at once, at most."""
    max_num_tokens: Positive = 8192
    """Tokens of one engine step, prompts and replies of all requests together."""
    tensor_parallel_size: Positive = 1
    """GPUs that share every layer."""
    expert_parallel_size: Positive = 1
    """Groups of those GPUs that share out whole experts; vLLM knows only 1 and all."""
    gpu: Literal["hopper", "blackwell"] = "hopper"
    """Whose expert kernels TensorRT-LLM is told to use: it chooses well by itself only for models that it knows."""
    memory_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.9
    """For TensorRT-LLM the share of free GPU memory that the KV cache takes; for vLLM the share of all that it uses."""
    prefix_reuse: bool = False
    """Whether requests reuse the KV cache of a common start."""
    compare_outputs: bool = True
    """Load child and bundle whole and compare their logits; False where they do not fit into memory twice."""

    @model_validator(mode="after")
    def _servable(self) -> Self:
        if self.max_num_tokens < self.max_batch_size:
            raise ValueError(
                f"max_num_tokens {self.max_num_tokens} is less than max_batch_size {self.max_batch_size}; "
                "a step needs a token of every request"
            )
        allowed = (1, self.tensor_parallel_size) if self.target == "vllm" else range(1, self.tensor_parallel_size + 1)
        if self.expert_parallel_size not in allowed or self.tensor_parallel_size % self.expert_parallel_size:
            raise ValueError(
                f"expert_parallel_size {self.expert_parallel_size} does not go with tensor_parallel_size "
                f"{self.tensor_parallel_size}; TensorRT-LLM takes a divisor of it, vLLM 1 or all of it"
            )
        return self


class EvaluateConfig(Config):
    """Accuracy and generated tokens on verifiable problems."""

    name: str | None = None
    """What the report calls the model. None: the candidate that the checkpoint says it is, or ``parent``."""
    engine: GeneratingEngine = "in_process"
    """What replies: this process, which holds the whole model unpacked, or a server: ``moesaic serve``;
    ``trtllm-serve`` or ``vllm serve`` on an export bundle; or one that is running."""
    bundle: ExportEngineConfig | None = None
    """How a checkpoint becomes the bundle that the engine serves, where the model is no bundle already."""
    efforts: Efforts = ("low", "medium", "high")
    """Reasoning efforts to ask for."""
    problems_per_task: Positive = 100
    """Problems of each task, from the start of the set."""
    epochs: Positive = 1
    """Replies to each problem at each effort."""
    max_new_tokens: Positive = 512
    """Generation stops here; a truncated answer is wrong."""
    batch_size: Positive = 128
    """Requests generated together; with a server, those in flight at once."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 decodes greedily; otherwise tokens are sampled at this temperature."""
    kv_cache: EmulatedCache | None = None
    """Round what the KV cache stores: to BF16, to FP8 as it is, or to FP8 by the checkpoint's scales. None: not so.
    ``in_process`` and ``moesaic`` emulate it, an export bundle must have been made for it, and a running server must
    have been set up so."""
    seed: int = 0
    """For sampling."""
    precision: Precision = "float32"
    """What the model computes in, in process or under ``moesaic``."""
    startup_timeout_s: Amount = 1800.0
    """A server must answer within this."""
    reply_timeout_s: Amount = 7200.0
    """A server must be done with one reply within this."""

    @model_validator(mode="after")
    def _different_epochs(self) -> Self:
        if self.epochs > 1 and self.temperature == 0:
            raise ValueError("epochs above 1 need a temperature: greedy answers are all the same")
        return self

    @model_validator(mode="after")
    def _cache_is_named(self) -> Self:
        if self.engine == "moesaic" and self.kv_cache is None:
            raise ValueError("engine 'moesaic' always rounds what its KV cache stores; say how, such as kv_cache bf16")
        if self.bundle is not None and self.bundle.kv_cache != self.kv_cache:
            raise ValueError(f"the bundle's kv_cache is {self.bundle.kv_cache!r}, this kv_cache {self.kv_cache!r}")
        return self

    def with_kv_cache(self, kind: EmulatedCache) -> Self:
        """The same with another KV cache, its bundle's included."""
        bundle = self.bundle and self.bundle.model_copy(update={"kv_cache": kind})
        return self.model_copy(update={"kv_cache": kind, "bundle": bundle})


class GenerateTracesConfig(Config):
    """The parent's own answers, which distillation learns from (paper A: prompts answered by the parent)."""

    engine: GeneratingEngine = "in_process"
    """What replies: this process, which holds the whole model unpacked, or a server: ``moesaic serve``;
    ``trtllm-serve`` or ``vllm serve`` on an export bundle; or one that is running."""
    bundle: ExportEngineConfig | None = None
    """How a checkpoint becomes the bundle that the engine serves, where the model is no bundle already."""
    efforts: Efforts = ("low", "medium", "high")
    """Reasoning efforts to answer every prompt at."""
    max_prompts: Positive | None = None
    """Prompts to use, spread evenly over the tasks. None: all."""
    samples_per_prompt: Positive = 1
    """Answers to each prompt at each effort."""
    max_new_tokens: Positive = 512
    """Generation stops here; a truncated trace is recorded as such."""
    keep_truncated: bool = False
    """Whether truncated traces are handed on; their share is recorded either way."""
    held_out_share: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the prompts whose traces are kept for evaluation, never trained on."""
    batch_size: Positive = 128
    """Requests generated together; with a server, those in flight at once."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 decodes greedily; otherwise tokens are sampled at this temperature."""
    seed: int = 0
    """For sampling and for the choice of held-out prompts."""
    precision: Precision = "float32"
    """What the model computes in, in process or under ``moesaic``."""
    startup_timeout_s: Amount = 1800.0
    """A server must answer within this."""
    reply_timeout_s: Amount = 7200.0
    """A server must be done with one reply within this."""

    @model_validator(mode="after")
    def _different_samples(self) -> Self:
        if self.samples_per_prompt > 1 and self.temperature == 0:
            raise ValueError("samples_per_prompt above 1 needs a temperature: greedy answers are all the same")
        return self


class OptimizerConfig(Config):
    """AdamW with a linear warm-up and a cosine decay."""

    learning_rate: Amount = 1e-4
    """At the end of the warm-up."""
    final_learning_rate_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Learning rate of the last step, as a share of the highest."""
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    """Steps over which the learning rate rises from nothing."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the gradient's first and second moments."""
    max_gradient_norm: Amount = 1.0
    """Gradients are scaled down to this norm."""


class DistillConfig(Config):
    """Global knowledge distillation from the parent, experts and router frozen (paper A, 84B tokens at 128K)."""

    kl_weight: Annotated[float, Field(ge=0)] = 1.0
    """Of KL(parent || child) over the vocabulary, per response token."""
    hidden_weight: Annotated[float, Field(ge=0)] = 1.0
    """Of 1 - cosine of the hidden states, averaged over layers and response tokens."""
    lm_weight: Annotated[float, Field(ge=0)] = 0.0
    """Of the cross entropy with the traces' own tokens (paper B: it hurts)."""
    temperature: Amount = 1.0
    """Both distributions of the KL are softened by it; its gradient is scaled by its square."""
    balance: Balance = "token"
    """Whether every response token counts alike, or every trace: then short replies, as at low effort, weigh more."""
    logits_chunk_tokens: Positive = 1024
    """Tokens whose logits are held at once."""
    trainable: tuple[Trainable, ...] = ("attention", "norms", "embedding", "head")
    """What learns. Experts never do; without ``router`` neither does it."""
    efforts: Efforts = ("low", "medium", "high")
    """Traces of these efforts are used."""
    sequence_tokens: Positive = 131072
    """Traces are packed into rows of this length; those longer are left out and counted."""
    rows_per_step: Positive = 32
    """Rows of one optimiser step, over all ranks."""
    rows_per_forward: Positive = 1
    """Rows of one rank that go through the model at once; the rest is gradient accumulation."""
    steps: Annotated[int, Field(ge=0)] = 1000
    """Optimiser steps. 0 hands the child on as it is."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """How weights move."""
    evaluate_every_steps: Positive = 100
    """The loss on held-out traces is computed this often, and at the end."""
    checkpoint_every_steps: Positive = 100
    """A killed run resumes from the last of these."""
    divergence_ratio: Annotated[float, Field(gt=1)] = 3.0
    """Stop with an error when the running loss exceeds the lowest one by this factor."""
    seed: int = 0
    """For the order of the data."""
    precision: Precision = "bfloat16"
    """What the models compute in; weights and optimiser are float32."""


class DistillBlocksConfig(Config):
    """Block-wise local distillation (paper B): each changed block alone learns its parent block's output."""

    trainable: tuple[Trainable, ...] = ("attention", "norms", "router")
    """What learns inside a block; experts never do."""
    steps: Annotated[int, Field(ge=0)] = 0
    """Optimiser steps of each block. 0 hands the child on as it is."""
    max_sequences: Positive = 128
    """Calibration sequences to learn from."""
    max_tokens: Positive = 8192
    """Longer sequences are cut here."""
    batch_tokens: Positive = 8192
    """Tokens of one step."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """How weights move."""
    checkpoint_every_steps: Positive = 100
    """A killed run resumes from the last of these."""
    layers_in_parallel: Positive = 1
    """Blocks trained at the same time, each in a process of its own."""
    seed: int = 0
    """For the order of the data."""
    precision: Precision = "float32"
    """What blocks compute in."""


class RewardConfig(Config):
    """What a reply earns, see ``moesaic.rewards``."""

    correct: float = 1.0
    """For an answer that its verifier accepts."""
    format: float = 0.0
    """For a reply that ends its reasoning and gives a final answer, right or wrong."""
    length: Annotated[float, Field(ge=0)] = 0.0
    """Subtracted from a correct reply's reward for every time its length exceeds the parent's mean at that effort."""


class ReinforceConfig(Config):
    """One policy trained by GRPO on verifiable rewards, experts and router frozen (paper A trains two)."""

    name: str = "high"
    """What the report calls the policy."""
    engine: Literal["trl", "nemo_rl"] = "trl"
    """TRL on CPU or a few GPUs; NeMo-RL on a cluster."""
    efforts: Efforts = ("high",)
    """Efforts every prompt is rendered at; one that is named twice counts twice."""
    min_parent_accuracy: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Leave out a task at an effort at which the parent solves less than this share of it: there a right answer is
    mostly a guess, and its reward noise."""
    max_parent_accuracy: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Leave out a task at an effort at which the parent solves more than this share: there is little to win."""
    rewards: RewardConfig = RewardConfig()
    """What a reply earns."""
    max_prompts: Positive | None = None
    """Prompts to use, spread evenly over the tasks. None: all."""
    steps: Annotated[int, Field(ge=0)] = 1000
    """Optimiser steps. 0 hands the child on as it is."""
    prompts_per_step: Positive = 32
    """Different prompts of one step."""
    generations_per_prompt: Annotated[int, Field(ge=2)] = 8
    """Replies to each prompt; their mean reward is the baseline."""
    replies_per_forward: Positive = 32
    """Replies that go through the model at once when it learns; the rest is gradient accumulation."""
    batch_size: Positive = 256
    """Replies generated together."""
    max_new_tokens: Positive = 512
    """Generation stops here; a truncated reply earns nothing."""
    temperature: Amount = 1.0
    """Of the rollouts."""
    clip_low: Amount = 0.2
    """The probability ratio is clipped below at 1 - clip_low; acts where one rollout serves several steps."""
    clip_high: Amount = 0.28
    """The probability ratio is clipped above at 1 + clip_high; acts where one rollout serves several steps."""
    kl_weight: Annotated[float, Field(ge=0)] = 0.0
    """Of the KL divergence from the checkpoint that training began with."""
    trainable: tuple[Trainable, ...] = ("attention", "norms", "embedding", "head")
    """What learns. Experts never do; without ``router`` neither does it."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-6)
    """How weights move."""
    checkpoint_every_steps: Positive = 20
    """A killed run resumes from the last of these."""
    seed: int = 0
    """For the order of prompts and the rollouts."""
    precision: Precision = "bfloat16"
    """What the model computes in."""


class AverageCheckpointsConfig(Config):
    """The weighted mean of policies (paper A: of two)."""

    weights: tuple[Amount, ...] | None = None
    """One per policy; they are divided by their sum. None: all equal."""


class CalibrateKvConfig(Config):
    """FP8 scales of what the KV cache stores: K after RoPE, and V, per layer."""

    max_sequences: Positive = 128
    """Calibration sequences to use, from the start of the set."""
    max_tokens: Positive = 8192
    """Longer sequences are cut here."""
    batch_tokens: Positive = 16384
    """Padded tokens that go through the model at once."""
    power_of_two: bool = False
    """Round scales up to powers of two, which fold into weights without rounding."""
    fold: bool = False
    """Fold the scales into the projections, for engines that ignore scale tensors; needs ``power_of_two``."""
    precision: Precision = "bfloat16"
    """What the model computes in."""

    @model_validator(mode="after")
    def _foldable(self) -> Self:
        if self.fold and not self.power_of_two:
            raise ValueError("fold needs power_of_two: other scales would round the folded weights")
        return self


class GatherRecoveryConfig(Config):
    """What one model's recovery was, stage by stage."""


class BenchmarkConfig(Config):
    """Decode and prefill speed of parent and child, interleaved on this device."""

    batch_sizes: tuple[Positive, ...] = (1, 8, 32)
    """Concurrent requests."""
    input_tokens: tuple[Positive, ...] = (128, 2048)
    """Context lengths."""
    output_tokens: Positive = 32
    """Generated tokens of each request."""
    workloads: tuple[Workload, ...] = ()
    """Further points: the workloads the search was limited by, so that its predictions can be held against timings."""
    repeats: Positive = 5
    """Timings of each point; the median counts, the spread is kept."""
    precision: Precision = "float32"
    """What the models compute in."""
    by_block: bool = False
    """Time each distinct block by itself and add up, as ``measure_costs`` does: for models that do not fit the device
    unpacked. Medians without a spread."""


class SweptWorkload(Config):
    """A kind of request, and the numbers of users that send it."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
    """What plots call it, such as ``long`` or ``short``."""
    input_tokens: Positive
    """Prompt tokens of one request."""
    output_tokens: Annotated[int, Field(ge=2)]
    """Generated tokens of one request; between one token and the next lies the user's speed."""
    concurrencies: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1, 2, 4, 8)
    """Users, each with one request in flight."""


class BenchmarkServingConfig(Config):
    """Throughput and latency of parent and child through an OpenAI-compatible server (paper A, figures 4 and 5)."""

    engine: ServingEngine = "moesaic"
    """``moesaic serve``; ``trtllm-serve`` or ``vllm serve`` on export bundles; or servers that are running."""
    workloads: Annotated[tuple[SweptWorkload, ...], Field(min_length=1)] = (
        SweptWorkload(name="short", input_tokens=128, output_tokens=32),
        SweptWorkload(name="long", input_tokens=2048, output_tokens=32),
    )
    """What is sent."""
    requests_per_user: Positive = 4
    """Requests that every user sends at a point, one after another."""
    warmup_requests_per_user: Annotated[int, Field(ge=0)] = 1
    """Before those, unmeasured."""
    repeats: Annotated[int, Field(ge=2)] = 3
    """Sweeps of each model, each on a fresh server, in turns: parent, child, parent, child."""
    parent_kv_cache: EmulatedCache = "bf16"
    """What the parent's KV cache holds: ``moesaic`` emulates it; any other server must have been set up so."""
    child_kv_cache: EmulatedCache = "bf16"
    """What the child's holds."""
    precision: Precision = "float32"
    """What the models compute in under ``moesaic``."""
    startup_timeout_s: Amount = 1800.0
    """A server must answer within this."""
    point_timeout_s: Amount = 7200.0
    """The client must be done with one point within this."""
    seed: int = 0
    """For the prompts."""

    @model_validator(mode="after")
    def _each_point_once(self) -> Self:
        names = [workload.name for workload in self.workloads]
        if len(set(names)) < len(names):
            raise ValueError(f"workloads have the names {names}; each needs its own")
        for workload in self.workloads:
            if len(set(workload.concurrencies)) < len(workload.concurrencies):
                raise ValueError(f"workload {workload.name!r} names a concurrency twice: {workload.concurrencies}")
        return self


class ReportConfig(Config):
    """The report page."""

    title: str = "Moesaic report"
    """Its heading."""


class PromoteConfig(Config):
    """What a child must show to become the champion of the model registry, see ``moesaic.promotion``."""

    model: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")] = "moesaic"
    """Name of the registered model whose versions are children of one parent."""
    min_retention: dict[Effort, Amount] = {"low": 0.98, "medium": 0.98, "high": 0.98}
    """Least share of the parent's accuracy, by effort."""
    min_request_efficiency: dict[Effort, Amount] = {"low": 1.0, "medium": 1.0, "high": 1.0}
    """Least request rate over the parent's at equal effort."""
    max_kv_accuracy_loss: Annotated[float, Field(ge=0)] | None = 0.02
    """Accuracy that the FP8 KV cache may cost, of 1, at the effort where it costs most. None: not asked."""
    require_export: bool = True
    """Whether an exported engine must have passed its validation."""
    pipeline: str = ""
    """Name and version of the pipeline that made the child, for the version's tags."""
    recipe: str = ""
    """Name of the recipe it was made with, for the version's tags."""
