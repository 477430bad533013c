"""Making a bundle: the checkpoint as an engine reads it, and the engine's files beside it.

Shards of which nothing changes are the child's own bytes, hard-linked where the disk allows. For TensorRT-LLM the
scales of a calibrated FP8 cache are rounded up to powers of two and folded into the projections, which is exact; for
vLLM they stay tensors of the checkpoint.
"""

import dataclasses
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from moesaic.core.errors import ArtifactError, ConfigError
from moesaic.core.json_text import read_json_object
from moesaic.core.version import __version__
from moesaic.deploy.export_engine import tensorrt_llm, vllm
from moesaic.deploy.export_engine.bundle_manifest import (
    BundleManifest,
    Digests,
    KvPolicy,
    Layer,
    Source,
    seal,
    write_files,
)
from moesaic.deploy.export_engine.stage import ExportEngineConfig
from moesaic.models import kv_cache, layout
from moesaic.models.checkpoint import Checkpoint, modelling_files, read_recovery, rewrite_checkpoint
from moesaic.models.families.family import Family
from moesaic.models.kv_cache import UNIT, KvScales

BUNDLED = Path(__file__).with_name("bundled")
_PRUNING = "pruning.json"
_TOKENIZER = "tokenizer_config.json"


def write_bundle(child: Checkpoint, output: Path, config: ExportEngineConfig) -> BundleManifest:
    """Write a bundle; its manifest comes last.

    Args:
        child: what is exported: a child, or a parent, which becomes a child of the same layers.
        output: must not exist yet, or be empty.
        config: the target and how it is to serve.

    Raises:
        ConfigError: if the config does not fit the model, or asks for scales that it does not have.
        StageError: if folding the scales would lose bits of the weights.
    """
    check_servable(child, config)
    scales = kv_cache.read_scales(child) if config.kv_cache == "fp8" else None
    folds = scales is not None and config.target == "tensorrt_llm"
    used = _powers_of_two(scales) if scales is not None and folds else scales
    _write_weights(child, output, config, used, folds)
    digests = Digests()
    manifest = _describe(child, config, used, folds, digests.of_all(child.directory))
    _write_engine_files(output, manifest, child)
    seal(output, manifest, digests)
    return BundleManifest.read(output)


def check_servable(child: Checkpoint, config: ExportEngineConfig) -> None:
    """Refuse what an engine would refuse or get wrong.

    Raises:
        ConfigError: if the config does not fit the model.
        ArtifactError: if the model has constants that the engine does not take.
    """
    family, positions, longest = child.shape.family, child.shape.max_positions, config.max_seq_len
    for program in config.programs:
        family.check_adapter(program)
    if longest is not None and longest > positions:
        raise ConfigError(f"max_seq_len {longest} is more than the model's {positions} positions; lower it")
    counts = sorted({block.num_experts for block in child.architecture.blocks})
    if uneven := [count for count in counts if count % config.expert_parallel_size]:
        raise ConfigError(
            f"expert_parallel_size {config.expert_parallel_size} does not divide the {uneven[0]} experts of some "
            f"layers; the model's layers have {counts}"
        )
    if child.shape.num_heads % config.tensor_parallel_size:
        raise ConfigError(
            f"tensor_parallel_size {config.tensor_parallel_size} does not divide the {child.shape.num_heads} heads"
        )
    widths = sorted({block.expert_width for block in child.architecture.blocks})
    if uneven := [width for width in widths if width % config.tensor_parallel_size]:
        raise ConfigError(
            f"tensor_parallel_size {config.tensor_parallel_size} does not divide the expert width {uneven[0]} of some "
            f"layers; the model's layers have {widths}"
        )
    for key, constant in family.vllm_constants.items() if config.target == "vllm" else ():
        if (given := child.config[key]) != constant:
            raise ArtifactError(f"{child.directory}: {key} is {given}; vllm computes with {constant} always")


def _powers_of_two(scales: Iterable[KvScales]) -> list[KvScales]:
    """Rounded up, so that nothing saturates that did not."""
    rounded = kv_cache.next_power_of_two
    return [KvScales(rounded(scale.key), rounded(scale.value)) for scale in scales]


def _write_weights(
    child: Checkpoint, output: Path, config: ExportEngineConfig, scales: list[KvScales] | None, folds: bool
) -> None:
    as_child = dataclasses.replace(child, config=layout.child_config(child.config, child.architecture))
    unit = config.kv_cache == "fp8_unit" or folds
    rewrite_checkpoint(
        as_child,
        output,
        kv_cache.fold_checkpoint(child, scales) if scales is not None and folds else {},
        {"stage": "export_engine", "target": config.target, "kv_cache": config.kv_cache, "folded": folds},
        added=kv_cache.scale_tensors([UNIT] * child.num_layers) if unit else None,
        added_shard=kv_cache.SHARD,
        extra=modelling_files(child.shape.family),
    )
    _name_special_tokens(output / _TOKENIZER)


def _name_special_tokens(path: Path) -> None:
    """Spell the tokenizer's special tokens as every engine's transformers reads them: 4.57 refuses 5's own spelling."""
    content = read_json_object(path) if path.is_file() else {}
    if isinstance(content.get("extra_special_tokens"), list):
        content["additional_special_tokens"] = content.pop("extra_special_tokens")
        path.write_text(json.dumps(content, indent=2) + "\n")


def _describe(
    child: Checkpoint, config: ExportEngineConfig, scales: list[KvScales] | None, folds: bool, digest: str
) -> BundleManifest:
    pruning = child.directory / _PRUNING
    blocks = child.architecture.blocks
    return BundleManifest(
        moesaic=__version__,
        engine=(tensorrt_llm if config.target == "tensorrt_llm" else vllm).VERSIONS,
        config=config,
        max_seq_len=config.max_seq_len or child.shape.max_positions,
        kv_cache=KvPolicy(
            kind=config.kv_cache, scales="folded" if folds else "none" if config.kv_cache == "bf16" else "tensors"
        ),
        layers=tuple(
            Layer.model_validate(block.as_config() | (_scales_of(scales[layer]) if scales else {}))
            for layer, block in enumerate(blocks)
        ),
        source=Source(
            digest=digest,
            steps=tuple(read_recovery(child.directory)),
            pruning=read_json_object(pruning) if pruning.is_file() else None,
        ),
    )


def _scales_of(scales: KvScales) -> dict[str, float]:
    return {"key_scale": scales.key, "value_scale": scales.value}


def _write_engine_files(output: Path, manifest: BundleManifest, child: Checkpoint) -> None:
    if manifest.config.target == "tensorrt_llm":
        _copy_tree(BUNDLED / tensorrt_llm.MODULES, output / tensorrt_llm.MODULES)
        _copy_config_class(child.shape.family, output / tensorrt_llm.MODULES)
        texts = tensorrt_llm.files(manifest, child.packed)
    else:
        write_vllm_plugin(output, child.shape.family)
        texts = vllm.files(manifest)
    write_files(output, {**texts, "README.md": _readme(manifest, child.shape.family)})


def write_vllm_plugin(output: Path, family: Family) -> Path:
    """Write vLLM's plugin into a new folder of ``output``; with that on ``PYTHONPATH`` an engine finds it."""
    package = output / vllm.PLUGIN / vllm.package(family)
    _copy_tree(BUNDLED / vllm.PLUGIN / package.name, package)
    shutil.copyfile(BUNDLED / vllm.PLUGIN / vllm.SHARED, package / vllm.SHARED)
    _copy_config_class(family, package)
    write_files(output, vllm.installed_plugin(family))
    return package.parent


def _copy_config_class(family: Family, package: Path) -> None:
    config_class, _ = modelling_files(family)
    shutil.copyfile(config_class, package / config_class.name)


def _copy_tree(source: Path, target: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc", "*.egg-info", "build", ".*")
    shutil.copytree(source, target, copy_function=shutil.copyfile, ignore=ignored)


def _readme(manifest: BundleManifest, family: Family) -> str:
    environment = Environment(
        loader=PackageLoader("moesaic.deploy.export_engine", "."), undefined=StrictUndefined, keep_trailing_newline=True
    )
    template = environment.get_template(f"README_{manifest.config.target}.md.j2")
    return template.render(_facts(manifest, family))


def _facts(manifest: BundleManifest, family: Family) -> Mapping[str, Any]:
    scales = {"folded": ", scales folded into the weights", "tensors": ", scales in the checkpoint", "none": ""}
    kinds = {"bf16": "BF16", "fp8_unit": "FP8 at scale 1", "fp8": f"FP8{scales[manifest.kv_cache.scales]}"}
    return {
        "name": f"{family.name}-puzzle",
        "family": family.name,
        "experts": sum(layer.num_local_experts for layer in manifest.layers),
        "layers": manifest.layers,
        "engine": manifest.engine,
        "moesaic": manifest.moesaic,
        "modules": tensorrt_llm.MODULES,
        "plugin": vllm.PLUGIN,
        "input_tokens": manifest.max_seq_len // 2,
        "output_tokens": manifest.max_seq_len // 2,
        "num_requests": 4 * manifest.config.max_batch_size,
        "max_seq_len": manifest.max_seq_len,
        "config": manifest.config,
        "cache": kinds[manifest.config.kv_cache],
    }
