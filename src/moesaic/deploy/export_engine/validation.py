"""Checks of a bundle's files and layout; the first thing wrong is named. No engine loads the bundle here.

The checks: every file's digest; the shapes of all tensors against ``block_configs``; RoPE in both spellings; the KV
cache's scales; the engine's own files; and, given the child, equal logits in transformers.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from moesaic.core.errors import ArtifactError
from moesaic.core.json_text import read_json_object
from moesaic.deploy.export_engine import tensorrt_llm, vllm
from moesaic.deploy.export_engine.bundle import check_servable
from moesaic.deploy.export_engine.bundle_manifest import BundleManifest, check_files
from moesaic.models import layout
from moesaic.models.architecture import Architecture, Block
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.resolved_config import CONFIG

_ROPE_KEYS = ("rope_theta", "rope_type", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
"""What engines read."""
_ROUNDING = 1e-4
"""Of the largest logit: what float32 leaves of sums that are added in another order."""
_COMPARED_TOKENS = 64


def validate(bundle: Path, child: Path | None = None) -> Iterator[str]:
    """Check a bundle, yielding in words what was checked. It runs nothing that is in the bundle.

    Args:
        bundle: what ``export_engine`` wrote.
        child: the checkpoint that was exported, to compare logits; both are loaded whole.

    Raises:
        ArtifactError: at the first thing that is wrong, with the reason.
    """
    manifest = BundleManifest.read(bundle)
    check_files(bundle, manifest)
    yield f"{len(manifest.files)} files are those of the manifest"
    checkpoint = Checkpoint.open(bundle)
    _check_blocks(checkpoint, manifest)
    yield f"tensors of {checkpoint.num_layers} layers have the shapes of block_configs"
    check_rope(read_json_object(bundle / CONFIG), bundle)
    yield "RoPE is spelt both ways, and the same"
    check_servable(checkpoint, manifest.config)
    _check_scales(checkpoint, manifest)
    yield f"the KV cache is {manifest.config.kv_cache}, its scales: {manifest.kv_cache.scales}"
    if manifest.config.target == "tensorrt_llm":
        tensorrt_llm.check(bundle, manifest, checkpoint.packed)
    else:
        vllm.check(bundle, manifest)
    yield f"the files for {manifest.config.target} {manifest.engine} fit the model"
    if child is not None:
        compare_logits(child, bundle)
        yield "child and bundle have the same logits"


def _check_blocks(checkpoint: Checkpoint, manifest: BundleManifest) -> None:
    expected = [checkpoint.shape.family.child_class]
    if checkpoint.config.get("architectures") != expected:
        raise ArtifactError(f"{checkpoint.directory}: architectures is not {expected}")
    listed = Architecture.of(Block.from_config(layer.model_dump()) for layer in manifest.layers)
    if listed != checkpoint.architecture:
        raise ArtifactError(f"{checkpoint.directory}: block_configs are not the layers of the manifest")


def check_rope(config: Mapping[str, Any], where: object) -> None:
    """Check that RoPE stands in ``config.json`` in both spellings: engines read the one or the other.

    Raises:
        ArtifactError: if one is missing or incomplete; that they do not differ, opening the checkpoint has shown.
    """
    new, scaling = config.get("rope_parameters"), config.get("rope_scaling")
    if new and new.get("rope_type") == "default" and "rope_theta" in config:
        return
    if not new or not scaling or "rope_theta" not in config:
        raise ArtifactError(
            f"{where}: config.json must hold rope_parameters, rope_scaling and rope_theta; "
            "an engine that reads the missing one would take a default without a word"
        )
    old = {**scaling, "rope_theta": config["rope_theta"]}
    for key in _ROPE_KEYS:
        if key not in old or key not in new:
            raise ArtifactError(f"{where}: RoPE has no {key}; engines read {', '.join(_ROPE_KEYS)}")


def _check_scales(checkpoint: Checkpoint, manifest: BundleManifest) -> None:
    if manifest.config.kv_cache == "bf16":
        return
    names = layout.kv_scale_names(checkpoint.num_layers)
    if missing := [name for name in names if name not in checkpoint.files]:
        raise ArtifactError(f"{checkpoint.directory} has no {missing[0]}; the engine would take a scale of 1 there")
    kept = manifest.kv_cache.scales == "tensors" and manifest.config.kv_cache == "fp8"
    listed = [value for layer in manifest.layers for value in (layer.key_scale, layer.value_scale)]
    for name, value in zip(names, listed, strict=True):
        expected = value if kept else 1.0
        if (scale := float(checkpoint.tensor(name))) != expected:
            how = manifest.kv_cache.scales
            raise ArtifactError(f"{checkpoint.directory}: {name} is {scale}; where scales are {how} it is {expected}")


def compare_logits(child: Path, bundle: Path, tokens: int = _COMPARED_TOKENS) -> None:
    """Load both whole in transformers, in float32, and compare the logits of random tokens.

    Threads add in another order from run to run, so equal weights may differ by the rounding of sums.

    Raises:
        ArtifactError: if they differ by more.
    """
    shape = Checkpoint.open(child).shape
    count = min(tokens, shape.max_positions)
    token_ids = torch.randint(shape.vocab_size, (1, count), generator=torch.Generator().manual_seed(0))
    before, after = _logits(child, token_ids), _logits(bundle, token_ids)
    largest, most = float((before - after).abs().max()), _ROUNDING * float(before.abs().max())
    if not largest <= most:
        raise ArtifactError(
            f"{bundle} is not the model in {child}: their logits differ by up to {largest:.3g}, rounding by {most:.3g}"
        )


def _logits(directory: Path, token_ids: torch.Tensor) -> torch.Tensor:
    from moesaic.models.whole_model import load_model

    with torch.inference_mode():
        logits: torch.Tensor = load_model(directory)(token_ids, use_cache=False).logits
    return logits
