"""Runtime of a block on hardware that is not at hand, from a dated table of fitted constants.

Every term is additive, launch plus bytes over bandwidth plus operations over rate (no maximum of the two: the fits are
to whole operations). For ``T`` tokens in one pass over ``g`` GPUs::

    pass(T)   = dense + dense_bytes / g / stream + 2 T dense_parameters / g / dense_rate
              + moe(T) + 2 all_reduce(T)                                               all_reduce only for g > 1
    moe(T)    = launch_g + touched(T) expert_bytes / g / bandwidth_g + 2 T k expert_parameters / g / rate_g
    touched   = E (1 - (1 - k/E)^T), the distinct experts that T tokens read
                moe's constants are fitted for tensor and for expert parallelism apart
    all_reduce= launch + 2 T hidden / bandwidth                                         BF16 activations

A decode step of ``B`` requests at context ``s`` is ``pass(B)`` and reading the cache,
``max(floor, launch + B min(s, window) kv_bytes / g / bandwidth)``. Reading prompts of ``n`` tokens is one pass per
chunk and attention's ``4 heads head_dim sum_i min(i, window)`` operations per prompt. The fixed part is the head's
bytes and operations, and ``step_us``, what the engine spends between steps.

What fits beside the weights, and so how many requests are served at once, is in ``moesaic.costs.throughput``; constants
for another GPU come out of its measured cost tables by ``moesaic.costs.fitting``.

Source: fits to published vLLM operation tables, see the table's own ``source`` and ``assumed``. They are not the
paper's numbers, and every row made here says ``modelled``.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moesaic.core.config import CacheDtype
from moesaic.core.errors import ConfigError
from moesaic.costs.block_costs import (
    Runtime,
    block_bytes,
    block_parameters,
    expected_experts,
    layer_kv_bytes,
    mean_context,
    of_one_expert,
)
from moesaic.costs.kv_allocator import TargetEngine
from moesaic.costs.workload import Workload
from moesaic.models.architecture import Architecture, Block
from moesaic.models.families.family import ModelShape
from moesaic.models.layout import BF16_BYTES

_TB_PER_S = 1e12 / 1e3
"""Bytes per millisecond of one TB/s."""
_PFLOPS = 1e15 / 1e3
"""Operations per millisecond of one PFLOP/s."""


@dataclass(frozen=True)
class MoeFit:
    """The mixture-of-experts kernel on a number of GPUs."""

    launch_us: float
    tb_per_s: float
    pflops: float


@dataclass(frozen=True)
class HardwareTable:
    """The constants of one kind of GPU; units are in the names."""

    name: str
    date: str
    moe: Mapping[int, MoeFit]
    """By number of GPUs that share each expert by tensor parallelism."""
    expert_parallel_moe: Mapping[int, MoeFit]
    """By number of GPUs that each hold a share of the experts whole."""
    attention_launch_us: float
    attention_floor_us: float
    attention_tb_per_s: Mapping[CacheDtype, float]
    all_reduce_us: float
    all_reduce_gb_per_s: float
    dense_us: float
    stream_tb_per_s: float
    dense_pflops: float
    prefill_attention_pflops: float
    chunk_tokens: int
    step_us: float
    memory_mib: float
    """Of one GPU, as its driver reports it."""
    overhead_mib: float
    """Of one GPU, what an engine uses for neither weights nor KV cache."""
    expert_padding: float
    """Bytes of packed expert weights in an engine's memory, over those on disk."""
    max_requests: int
    """Requests that an engine runs at once, at most."""

    @classmethod
    def from_json(cls, text: str) -> "HardwareTable":
        """Read a table from the text of its JSON file."""
        content: dict[str, Any] = json.loads(text)
        attention, all_reduce = content["decode_attention"], content["all_reduce"]
        return cls(
            name=content["name"],
            date=content["date"],
            moe=_read_fits(content["moe"]),
            expert_parallel_moe=_read_fits(content["expert_parallel_moe"]),
            attention_launch_us=attention["launch_us"],
            attention_floor_us=attention["floor_us"],
            attention_tb_per_s=attention["tb_per_s"],
            all_reduce_us=all_reduce["launch_us"],
            all_reduce_gb_per_s=all_reduce["gb_per_s"],
            **{key: content[key] for key in _PLAIN},
            **{key: content["memory"][key] for key in _MEMORY},
        )

    def to_json(self) -> str:
        """The text of the table's JSON file."""
        content = {
            "name": self.name,
            "date": self.date,
            "moe": _write_fits(self.moe),
            "expert_parallel_moe": _write_fits(self.expert_parallel_moe),
            "decode_attention": {
                "launch_us": self.attention_launch_us,
                "floor_us": self.attention_floor_us,
                "tb_per_s": dict(self.attention_tb_per_s),
            },
            "all_reduce": {"launch_us": self.all_reduce_us, "gb_per_s": self.all_reduce_gb_per_s},
            **{key: getattr(self, key) for key in _PLAIN},
            "memory": {key: getattr(self, key) for key in _MEMORY},
        }
        return json.dumps(content, indent=1) + "\n"

    def check_num_gpus(self, num_gpus: int, expert_parallel: bool = False) -> None:
        """Raise ConfigError unless the table has a fit for this many GPUs."""
        fits, how = (self.expert_parallel_moe, "expert") if expert_parallel else (self.moe, "tensor")
        if num_gpus not in fits:
            raise ConfigError(
                f"table {self.name} has fits of {how} parallelism for {sorted(fits)} GPUs, got num_gpus={num_gpus}"
            )


def _read_fits(content: Mapping[str, Mapping[str, float]]) -> dict[int, MoeFit]:
    return {int(num_gpus): MoeFit(**fit) for num_gpus, fit in content.items()}


def _write_fits(fits: Mapping[int, MoeFit]) -> dict[str, dict[str, float]]:
    return {str(num_gpus): asdict(fit) for num_gpus, fit in fits.items()}


_PLAIN = ("dense_us", "stream_tb_per_s", "dense_pflops", "prefill_attention_pflops", "chunk_tokens", "step_us")
_MEMORY = ("memory_mib", "overhead_mib", "expert_padding", "max_requests")


@dataclass(frozen=True)
class Target:
    """A number of GPUs, the sizes of the model that runs on them, and the engine; its methods give runtimes."""

    table: HardwareTable
    shape: ModelShape
    num_gpus: int
    kv_cache: CacheDtype
    engine: TargetEngine = "tensorrt_llm"
    """Decides how KV memory is allocated; times do not depend on it."""
    expert_parallel: bool = False
    """Whether every GPU holds a share of the experts whole, instead of a share of every expert."""

    def moe_ms(self, block: Block, num_tokens: float) -> float:
        """The mixture of one layer for so many tokens; nothing if it has none."""
        if block.is_dense:
            return 0.0
        fits = self.table.expert_parallel_moe if self.expert_parallel else self.table.moe
        fit = fits[self.num_gpus]
        top_k = block.experts_per_token
        touched = expected_experts(block.num_experts, top_k, num_tokens)
        num_bytes = touched * of_one_expert(block_bytes, self.shape, block)
        flops = 2 * num_tokens * top_k * of_one_expert(block_parameters, self.shape, block)
        streamed = num_bytes / self.num_gpus / (fit.tb_per_s * _TB_PER_S)
        return fit.launch_us / 1e3 + streamed + flops / self.num_gpus / (fit.pflops * _PFLOPS)

    def dense_ms(self, num_parameters: float, num_tokens: float) -> float:
        """Reading BF16 matrices once and multiplying so many tokens with them."""
        streamed = num_parameters * BF16_BYTES / self.num_gpus / (self.table.stream_tb_per_s * _TB_PER_S)
        return streamed + 2 * num_tokens * num_parameters / self.num_gpus / (self.table.dense_pflops * _PFLOPS)

    def all_reduce_ms(self, num_tokens: float) -> float:
        """Summing one BF16 activation per token over the GPUs; nothing on a single one."""
        if self.num_gpus == 1:
            return 0.0
        num_bytes = num_tokens * self.shape.hidden_size * BF16_BYTES
        return self.table.all_reduce_us / 1e3 + num_bytes / (self.table.all_reduce_gb_per_s * 1e9 / 1e3)

    def pass_ms(self, block: Block, num_tokens: float) -> float:
        """Everything of a block but attention over the cache, for so many tokens at once."""
        experts = block.num_experts * of_one_expert(block_parameters, self.shape, block)
        others = block_parameters(self.shape, block) - experts
        dense = self.table.dense_us / 1e3 + self.dense_ms(others, num_tokens)
        return dense + self.moe_ms(block, num_tokens) + 2 * self.all_reduce_ms(num_tokens)

    def cache_ms(self, block: Block, num_requests: int, context: int) -> float:
        """Attention of one decode step."""
        num_bytes = num_requests * layer_kv_bytes(self.shape, block.window, context, self.kv_cache) / self.num_gpus
        rate = self.table.attention_tb_per_s[self.kv_cache] * _TB_PER_S
        return max(self.table.attention_floor_us / 1e3, self.table.attention_launch_us / 1e3 + num_bytes / rate)

    def prompt_attention_ms(self, block: Block, num_tokens: int) -> float:
        """Attention of one prompt."""
        seen = num_tokens if block.window is None else min(block.window, num_tokens)
        pairs = seen * (seen + 1) / 2 + (num_tokens - seen) * seen
        flops = 4 * self.shape.num_heads * self.shape.head_dim * pairs
        return flops / self.num_gpus / (self.table.prefill_attention_pflops * _PFLOPS)

    def block_runtime(self, block: Block, workload: Workload) -> Runtime:
        """Prefill and decode of one block under a workload."""
        tokens = workload.concurrency * workload.input_tokens
        chunk = min(tokens, self.table.chunk_tokens)
        prompts = workload.concurrency * self.prompt_attention_ms(block, workload.input_tokens)
        prefill_ms = tokens / chunk * self.pass_ms(block, chunk) + prompts
        step_ms = self.pass_ms(block, workload.concurrency)
        return Runtime(prefill_ms, step_ms + self.cache_ms(block, workload.concurrency, mean_context(workload)))

    def model_runtime(self, architecture: Architecture, workload: Workload) -> Runtime:
        """Prefill and decode of a whole model; equal blocks are computed once."""
        total = self.fixed_runtime(workload)
        for block, count in Counter(architecture.blocks).items():
            runtime = self.block_runtime(block, workload)
            total = Runtime(total.prefill_ms + count * runtime.prefill_ms, total.decode_ms + count * runtime.decode_ms)
        return total

    def fixed_runtime(self, workload: Workload) -> Runtime:
        """The head of one step and what the engine spends between steps; a prompt needs the head once."""
        head_ms = self.dense_ms(self.shape.vocab_size * self.shape.hidden_size, workload.concurrency)
        chunks = math.ceil(workload.concurrency * workload.input_tokens / self.table.chunk_tokens)
        return Runtime(chunks * self.table.step_us / 1e3 + head_ms, self.table.step_us / 1e3 + head_ms)


def model_blocks(
    target: Target, distinct: Sequence[Block], workloads: Sequence[Workload]
) -> tuple[dict[Block, dict[str, Runtime]], dict[str, Runtime]]:
    """Modelled runtime of every block and of the fixed part on a target, by workload name."""
    runtimes = {
        block: {workload.name: target.block_runtime(block, workload) for workload in workloads} for block in distinct
    }
    return runtimes, {workload.name: target.fixed_runtime(workload) for workload in workloads}
