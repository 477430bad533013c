"""Memory and runtime of every distinct block under every workload: memory from shapes, runtime measured or modelled."""

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moesaic.core.errors import ConfigError
from moesaic.costs.block_costs import (
    BlockCost,
    CostTable,
    FixedCost,
    Runtime,
    Source,
    WorkloadCost,
    block_bytes,
    block_parameters,
    full_length,
    layer_kv_bytes,
    outer_bytes,
    outer_parameters,
)
from moesaic.costs.hardware import Target, model_blocks
from moesaic.costs.hardware_tables import read_table
from moesaic.deploy.engines.vllm.environment import why_unsupported
from moesaic.models.architecture import Architecture, Block
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.families.family import ModelShape
from moesaic.models.loading import choose_device
from moesaic.search.library import check_storable, distinct_blocks
from moesaic.search.measure_costs.block_timing import time_blocks
from moesaic.search.measure_costs.engine_timing import STEP_TOKENS, time_in_engine
from moesaic.search.measure_costs.stage import MeasureCostsConfig


def run(config: MeasureCostsConfig, *, parent: Path, output: Path, scratch: Path) -> dict[str, float]:
    """Write ``costs.json``.

    Timings are taken in one go and never resumed: blocks are compared with each other, so they share one machine state.
    """
    checkpoint = Checkpoint.open(parent)
    check_costed(config, checkpoint)
    if config.source == "model":
        costs = model_costs(config, checkpoint.shape, checkpoint.architecture, checkpoint.packed)
    elif config.engine == "vllm":
        costs = _time_in_engine(config, checkpoint, scratch)
    else:
        costs = _time_in_process(config, checkpoint)
    (output / "costs.json").write_text(costs.to_json())
    return _metrics(costs)


def _time_in_process(config: MeasureCostsConfig, checkpoint: Checkpoint) -> CostTable:
    device = choose_device()
    dtype: torch.dtype = getattr(torch, config.precision)
    distinct = distinct_blocks(checkpoint.architecture, config.space)
    times = time_blocks(checkpoint, distinct, config.workloads, config.repeats, dtype, device)
    hardware = _describe(device, config)
    return _table(config, checkpoint.shape, checkpoint.architecture, checkpoint.packed, "in_process", hardware, *times)


def _time_in_engine(config: MeasureCostsConfig, checkpoint: Checkpoint, scratch: Path) -> CostTable:
    if config.kv_cache == "fp8" and (why := why_unsupported(fp8_cache=True)):
        raise ConfigError(f"vLLM cannot time an FP8 KV cache here: {why}; choose kv_cache 'bf16' or source 'model'")
    distinct = distinct_blocks(checkpoint.architecture, config.space)
    times = time_in_engine(checkpoint, distinct, config, scratch)
    hardware = {
        "device": times.engine,
        "num_gpus": config.num_gpus,
        "expert_parallel": config.expert_parallel,
        "timed_layers": config.timed_layers,
        "relative_spread": times.relative_spread,
    }
    return _table(
        config,
        checkpoint.shape,
        checkpoint.architecture,
        checkpoint.packed,
        "vllm",
        hardware,
        times.blocks,
        times.fixed,
    )


def model_costs(config: MeasureCostsConfig, shape: ModelShape, parent: Architecture, packed: bool = True) -> CostTable:
    """Costs from a hardware table; they need a model's sizes and blocks, and none of its weights."""
    table = read_table(config.hardware)
    target = Target(table, shape, config.num_gpus, config.kv_cache, config.engine, config.expert_parallel)
    distinct = distinct_blocks(parent, config.space)
    hardware = {
        "device": table.name,
        "date": table.date,
        "num_gpus": config.num_gpus,
        "expert_parallel": config.expert_parallel,
    }
    return _table(
        config, shape, parent, packed, "modelled", hardware, *model_blocks(target, distinct, config.workloads)
    )


def check_costed(config: MeasureCostsConfig, checkpoint: Checkpoint) -> None:
    """Refuse what cannot be costed.

    Raises:
        ConfigError: that says what can.
    """
    names = [workload.name for workload in config.workloads]
    if len(set(names)) < len(names):
        raise ConfigError(f"two workloads have the same name: {names}; limits refer to them by name")
    if config.source == "model":
        read_table(config.hardware).check_num_gpus(config.num_gpus, config.expert_parallel)
    elif config.engine not in ("vllm", "moesaic"):
        raise ConfigError(f"blocks are timed in engine 'vllm' or 'moesaic', not {config.engine!r}; use source 'model'")
    elif config.engine == "moesaic" and config.num_gpus != 1:
        raise ConfigError(
            f"engine 'moesaic' times one device, not num_gpus={config.num_gpus}; use engine 'vllm' or source 'model'"
        )
    for workload in config.workloads:
        if full_length(workload) > checkpoint.shape.max_positions:
            raise ConfigError(
                f"workload {workload.name!r} needs {full_length(workload)} positions, the model has "
                f"{checkpoint.shape.max_positions}; shorten its input or output"
            )
    check_storable(config.space, checkpoint.packed)


def _table(
    config: MeasureCostsConfig,
    shape: ModelShape,
    parent: Architecture,
    packed: bool,
    source: Source,
    hardware: Mapping[str, Any],
    runtimes: Mapping[Block, Mapping[str, Runtime]],
    fixed: Mapping[str, Runtime],
) -> CostTable:
    def cost(block: Block) -> BlockCost:
        workloads = {}
        for workload in config.workloads:
            runtime = runtimes[block][workload.name]
            kept, reading, read = (
                layer_kv_bytes(shape, block.window, tokens, config.kv_cache, config.engine, step_tokens)
                for tokens, step_tokens in (
                    (full_length(workload), 1),
                    (workload.input_tokens, STEP_TOKENS),
                    (workload.input_tokens, 1),
                )
            )
            workloads[workload.name] = WorkloadCost(runtime.prefill_ms, runtime.decode_ms, kept, reading - read)
        return BlockCost(block_parameters(shape, block), block_bytes(shape, block, packed), source, workloads)

    return CostTable(
        parent,
        hardware,
        config.kv_cache,
        config.engine,
        config.workloads,
        FixedCost(outer_parameters(shape), outer_bytes(shape), source, dict(fixed)),
        {block: cost(block) for block in runtimes},
    )


def _describe(device: torch.device, config: MeasureCostsConfig) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": device.type,
        "name": name,
        "num_gpus": config.num_gpus,
        "num_threads": torch.get_num_threads(),
        "precision": config.precision,
        "torch": torch.__version__,
    }


def _metrics(costs: CostTable) -> dict[str, float]:
    """What the parent costs by this table."""
    parent = costs.evaluate(costs.parent)
    metrics = {"num_blocks": float(len(costs.blocks)), "parent_parameters": float(parent.parameters)}
    for workload in costs.workloads:
        metrics[f"parent_memory_mib_{workload.name}"] = parent.memory_mib[workload.name]
        metrics[f"parent_tokens_per_s_{workload.name}"] = parent.throughput_tokens_per_s[workload.name]
        metrics[f"parent_decode_ms_{workload.name}"] = parent.latency_ms[workload.name]
    return metrics
