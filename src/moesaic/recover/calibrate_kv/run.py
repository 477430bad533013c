"""Calibrate the scales of an FP8 KV cache, and write them beside the weights or fold them in."""

from collections.abc import Sequence
from pathlib import Path

from moesaic.core.errors import StageError
from moesaic.data.calibration import load_batches
from moesaic.models import kv_cache
from moesaic.models.checkpoint import Checkpoint, rewrite_checkpoint
from moesaic.models.kv_cache import KvScales
from moesaic.recover.calibrate_kv.modelopt import Amax, measure_amax
from moesaic.recover.calibrate_kv.stage import CalibrateKvConfig


def run(config: CalibrateKvConfig, *, model: Path, calibration: Path, output: Path, scratch: Path) -> dict[str, float]:
    """Write a checkpoint with scales; its other weights are the model's own bytes, or folded where config says so."""
    checkpoint = Checkpoint.open(model)
    batches = load_batches(
        calibration,
        model,
        max_sequences=config.max_sequences,
        max_tokens=min(config.max_tokens, checkpoint.shape.max_positions),
        batch_tokens=config.batch_tokens,
    )
    amax = measure_amax(model, batches, config.precision, scratch)
    scales = _scales(amax, config.power_of_two)
    step = {"stage": "calibrate_kv", "power_of_two": config.power_of_two, "folded": config.fold}
    rewrite_checkpoint(
        checkpoint,
        output,
        kv_cache.fold_checkpoint(checkpoint, scales) if config.fold else {},
        step,
        added=kv_cache.scale_tensors([kv_cache.UNIT] * len(scales) if config.fold else scales),
        added_shard=kv_cache.SHARD,
    )
    return _metrics(amax, scales) | {"num_tokens": float(sum(int(batch.is_token.sum()) for batch in batches))}


def _scales(amax: Sequence[Amax], power_of_two: bool) -> list[KvScales]:
    for layer, largest in enumerate(amax):
        if not all(0 <= value < float("inf") for value in largest):
            raise StageError(f"layer {layer}: the largest K and V are {largest}; the model computes no finite numbers")
    return [KvScales.of_amax(key, value, power_of_two) for key, value in amax]


def _metrics(amax: Sequence[Amax], scales: Sequence[KvScales]) -> dict[str, float]:
    keys, values = zip(*amax, strict=True)
    return {
        "largest_key": max(keys),
        "largest_value": max(values),
        "largest_key_scale": max(scale.key for scale in scales),
        "largest_value_scale": max(scale.value for scale in scales),
    }
