"""Let the engine load a bundle, and write its word on it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from moesaic.core.config import Effort
from moesaic.core.errors import ArtifactError
from moesaic.core.progress import track
from moesaic.costs.facts import WIDTH
from moesaic.data.chat import load_tokenizer
from moesaic.data.problems import read_problems, render_prompt, spread_over_tasks
from moesaic.deploy.engines.vllm.engine import LoadedBundle, LoadedLayer, load
from moesaic.deploy.engines.vllm.environment import why_unsupported
from moesaic.deploy.export_engine.bundle_manifest import BundleManifest, check_files
from moesaic.deploy.export_engine.verdict import VERDICT, Verdict
from moesaic.deploy.validate_bundle.conformance import Agreement, JudgedReply, judge
from moesaic.deploy.validate_bundle.stage import ValidateBundleConfig
from moesaic.models import kv_cache
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.generation import check_lengths, read_stop_ids
from moesaic.models.loading import choose_device
from moesaic.models.whole_model import load_model

Prompts = Mapping[Effort, Sequence[Sequence[int]]]
"""Token ids of what is asked, by effort."""


def run(config: ValidateBundleConfig, *, bundle: Path, prompts: Path, output: Path, scratch: Path) -> dict[str, float]:
    """Write ``verdict.json``. What an engine finds wrong is a result, not an error."""
    check_files(bundle, BundleManifest.read(bundle))
    verdict = validate_by_engine(config, bundle, prompts, scratch)
    (output / VERDICT).write_text(verdict.to_json())
    compared = sum(one["replies"] for one in verdict.replies.values())
    metrics = {"loaded": float(verdict.loaded_by is not None), "passed": float(verdict.passed)}
    if compared:
        for share in ("equal", "agreeing"):
            metrics[f"{share}_replies"] = sum(one[share] for one in verdict.replies.values()) / compared
    return metrics


def validate_by_engine(
    config: ValidateBundleConfig, bundle: Path, prompts: Path, scratch: Path, reference: Path | None = None
) -> Verdict:
    """Let the engine that a bundle is for load it and reply; its files are taken as they are.

    Args:
        config: what is asked, and the bars.
        bundle: of ``export_engine``.
        prompts: a set of problems.
        scratch: for the engine's log.
        reference: the bundle that transformers reads; the same unless another is given.

    Raises:
        ConfigError: if a prompt does not fit the bundle's longest request.
        ArtifactError: if the prompts are no set of problems, or the bundle is no checkpoint.
        StageError: if the engine's environment cannot be made, or it takes too long.
    """
    manifest = BundleManifest.read(bundle)
    if why := _why_unloaded(config, manifest):
        return Verdict(passed=True, why_unverified=why)
    asked = _render(config, bundle, prompts)
    everything = [prompt for of_effort in asked.values() for prompt in of_effort]
    check_lengths(everything, config.max_new_tokens, manifest.max_seq_len)
    try:
        loaded = load(
            bundle.absolute(),
            everything,
            sorted(read_stop_ids(bundle)),
            config.max_new_tokens,
            scratch,
            config.timeout_s,
            config.engine_precision,
        )
    except ArtifactError as refusal:
        return Verdict(passed=False, loaded_by="vLLM", problems=(str(refusal),))
    replies = _compare(config, reference or bundle, manifest, asked, loaded) if config.compare_replies else {}
    problems = [*_wrong_layers(config, manifest, loaded.layers), *_disagreements(config, replies)]
    return Verdict(
        passed=not problems,
        loaded_by=loaded.engine,
        problems=tuple(problems),
        replies={effort: asdict(agreement) for effort, agreement in replies.items()},
    )


def _why_unloaded(config: ValidateBundleConfig, manifest: BundleManifest) -> str | None:
    if not config.ask_engine:
        return "no engine was to be asked"
    if manifest.config.target != "vllm":
        return "TensorRT-LLM was not asked: it runs on NVIDIA GPUs alone"
    why = why_unsupported(fp8_cache=manifest.kv_cache.kind != "bf16")
    return f"vLLM was not asked: {why}" if why else None


def _render(config: ValidateBundleConfig, bundle: Path, prompts: Path) -> Prompts:
    tokenizer = load_tokenizer(bundle)
    problems = spread_over_tasks(read_problems(prompts), config.prompts_per_effort)
    return {effort: [render_prompt(problem, tokenizer, effort) for problem in problems] for effort in config.efforts}


def _compare(
    config: ValidateBundleConfig,
    bundle: Path,
    manifest: BundleManifest,
    asked: Prompts,
    loaded: LoadedBundle,
) -> dict[Effort, Agreement]:
    model = load_model(bundle, getattr(torch, config.precision)).to(choose_device())
    kind = manifest.kv_cache.kind
    if kind != "bf16" or config.engine_precision == "bfloat16":
        scales = kv_cache.scales_for(kind, Checkpoint.open(bundle))
        kv_cache.emulate(model, kv_cache.roundings(kind, scales, toward_zero=loaded.on_cpu))
    given = iter(loaded.replies)
    pairs = [(effort, prompt, next(given)) for effort, prompts in asked.items() for prompt in prompts]
    judged: dict[Effort, list[JudgedReply]] = {effort: [] for effort in asked}
    for effort, prompt, reply in track(pairs, len(pairs), "holding replies against the reference"):
        judged[effort].append(judge(model, prompt, reply.token_ids, reply.logprobs))
    return {effort: Agreement.of(of_effort, config.near_tie) for effort, of_effort in judged.items()}


def _wrong_layers(
    config: ValidateBundleConfig, manifest: BundleManifest, layers: Sequence[LoadedLayer]
) -> Iterator[str]:
    """Every layer that is not as the manifest says, in words."""
    if len(layers) != len(manifest.layers):
        yield f"the engine has {len(layers)} layers, the bundle {len(manifest.layers)}"
        return
    for number, (wanted, layer) in enumerate(zip(manifest.layers, layers, strict=True)):
        expected = LoadedLayer(
            num_local_experts=wanted.num_local_experts,
            num_experts_per_tok=wanted.num_experts_per_tok,
            intermediate_size=wanted.intermediate_size,
            sliding_window=wanted.sliding_window,
            cache_bytes=WIDTH[config.engine_precision] if manifest.kv_cache.kind == "bf16" else 1,
            key_scale=wanted.key_scale or 1.0,
            value_scale=wanted.value_scale or 1.0,
        )
        for name, value in asdict(expected).items():
            if (found := getattr(layer, name)) != value:
                yield f"layer {number}: {name} is {found} in the engine, {value} in the bundle"


def _disagreements(config: ValidateBundleConfig, replies: Mapping[Effort, Agreement]) -> Iterator[str]:
    """Every bar that is missed, in words."""
    for effort, agreement in replies.items():
        if agreement.agreeing < config.min_agreeing_replies * agreement.replies:
            yield (
                f"{effort} effort: {agreement.agreeing} of {agreement.replies} replies are the reference's but for "
                f"near ties, fewer than {config.min_agreeing_replies:.1%}; it prefers its own token by up to "
                f"{agreement.largest_gap:.3g} nats"
            )
        if agreement.mean_logprob_difference > config.max_logprob_difference:
            yield (
                f"{effort} effort: log-probabilities differ by {agreement.mean_logprob_difference:.3g} nats on "
                f"average, more than {config.max_logprob_difference:g}"
            )
