"""The H100 cost model against every published figure of parent and released child, and what it does not explain.

Each row says where its constants come from. Those of one H100 hang on the memory overhead, which was chosen with their
published ratios known: they show that the model can explain them, not that it predicts. Those of eight are held out: no
constant was chosen by them.

Prints a table and, with ``--record``, writes everything as JSON. ``--fit`` instead fits a table's constants to
``costs.json`` files that ``measure_costs`` wrote on a GPU, and prints a hardware table.

Run: python benchmarks/cost_model.py [--record FILE]
     python benchmarks/cost_model.py --fit costs.json [costs.json ...] --name NAME
"""

import argparse
import datetime
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import moesaic
from moesaic.costs.block_costs import (
    CostTable,
    full_length,
    request_kv_bytes,
)
from moesaic.costs.fitting import fit
from moesaic.costs.hardware import HardwareTable, Target
from moesaic.costs.hardware_tables import read_table
from moesaic.costs.kv_allocator import TargetEngine
from moesaic.costs.throughput import Throughput, cache_room, estimate_throughput, kv_bytes_mean_and_std
from moesaic.costs.workload import Workload
from moesaic.models.architecture import Architecture, Block
from moesaic.models.families.gpt_oss import GPT_OSS_120B, GPT_OSS_120B_BLOCKS, GPT_OSS_PUZZLE_88B_BLOCKS

H100 = read_table("h100")
PARENT, CHILD = GPT_OSS_120B_BLOCKS, GPT_OSS_PUZZLE_88B_BLOCKS
ENGINE: TargetEngine = "vllm_puzzle"
"""The branch that serves the released child."""
BAR = 0.1
_RULES = ("mean length", "full length", "vLLM's own count")


@dataclass(frozen=True)
class Setting:
    """One row of the paper's table of maximal token throughput."""

    name: str
    num_gpus: int
    tokens: int
    """Of input, and of output."""
    ratio: float
    """Child over parent, as published."""
    held_out: bool
    """Whether no constant of the model was chosen with this ratio known."""
    tokens_per_s: tuple[float, float] | None = None
    """Of parent and child, as published."""

    @property
    def workload(self) -> Workload:
        """The lengths; concurrency follows from memory."""
        return Workload(name=self.name, input_tokens=self.tokens, output_tokens=self.tokens, concurrency=1)


SETTINGS = (
    Setting("1xH100 4K/4K", 1, 4096, 2.44, held_out=False),
    Setting("1xH100 64K/64K", 1, 65_536, 2.82, held_out=False),
    Setting("8xH100 64K/64K", 8, 65_536, 1.63, held_out=True, tokens_per_s=(5_700, 9_300)),
    Setting("8xH100 4K/4K", 8, 4096, 1.22, held_out=True, tokens_per_s=(29_600, 36_100)),
)
SOURCES = {
    "times": "hardware_tables/h100.json: fits to vLLM operation tables of one H100, and the rows it names as assumed",
    "requests": "shapes, the GPU's memory, expert_padding of an engine log, and an assumed overhead of 10 GiB",
    "published": "paper A; tokens per second and 1xH100 4K/4K from a third party's digest",
}


def compare(
    setting: Setting, table: HardwareTable, engine: TargetEngine = ENGINE, expert_parallel: bool = False
) -> tuple[Throughput, Throughput]:
    """Parent and child, experts by tensor parallelism unless said otherwise."""
    parallel = expert_parallel and setting.num_gpus > 1
    target = Target(table, GPT_OSS_120B, setting.num_gpus, "fp8", engine, parallel)
    return estimate_throughput(target, PARENT, setting.workload), estimate_throughput(target, CHILD, setting.workload)


def ratio(
    setting: Setting, table: HardwareTable, engine: TargetEngine = ENGINE, expert_parallel: bool = False
) -> float | None:
    """Child over parent; None where the parent holds no request."""
    parent, child = compare(setting, table, engine, expert_parallel)
    return round(child.tokens_per_s / parent.tokens_per_s, 3) if parent.requests else None


def rows() -> list[dict[str, Any]]:
    """The table."""
    found = []
    for setting in SETTINGS:
        parent, child = compare(setting, H100)
        modelled = child.tokens_per_s / parent.tokens_per_s
        found.append(
            {
                "setting": setting.name,
                "published_ratio": setting.ratio,
                "modelled_ratio": round(modelled, 3),
                "error": round(modelled / setting.ratio - 1, 3),
                "within_10_percent": abs(modelled / setting.ratio - 1) <= BAR,
                "held_out": setting.held_out,
                "published_tokens_per_s": setting.tokens_per_s,
                "tokens_per_s_errors": _errors(setting, parent, child),
                "parent": asdict(parent),
                "child": asdict(child),
            }
        )
    return found


def _errors(setting: Setting, *models: Throughput) -> list[float] | None:
    """By how much modelled tokens per second exceed the published ones, which hold whatever an engine also spends."""
    if setting.tokens_per_s is None:
        return None
    pairs = zip(models, setting.tokens_per_s, strict=True)
    return [round(modelled.tokens_per_s / published - 1, 3) for modelled, published in pairs]


def cache() -> list[dict[str, Any]]:
    """KV cache of one sequence in FP8, as published in GB, and the share of the child's; no constant is involved."""
    published = {8192: (0.153, 0.153), 32_768: (0.606, 0.405), 131_072: (2.418, 1.412)}
    sizes = {
        tokens: [
            request_kv_bytes(GPT_OSS_120B, model, tokens, "fp8", "tensorrt_llm") / 1e9 for model in (PARENT, CHILD)
        ]
        for tokens in published
    }
    return [
        {"tokens": tokens, "published_gb": published[tokens], "computed_gb": [round(size, 3) for size in sizes[tokens]]}
        for tokens in published
    ]


def sensitivity() -> dict[str, dict[str, float | None]]:
    """The ratios when one item of the model is another."""
    tables = {f"overhead {gib:g} GiB": _overhead(gib) for gib in (6, 8, 9, 9.5, 10, 10.5, 11, 12)}
    tables |= {
        "experts not padded": replace(H100, expert_padding=1.0),
        "at most 256 requests": replace(H100, max_requests=256),
        "at most 512 requests": replace(H100, max_requests=512),
        "no limit on requests": replace(H100, max_requests=10**9),
        "2 ms between steps": replace(H100, step_us=2000.0),
    }
    found = {name: {setting.name: ratio(setting, table) for setting in SETTINGS} for name, table in tables.items()}
    found |= {
        "no KV group padding": {setting.name: ratio(setting, H100, "tensorrt_llm") for setting in SETTINGS},
        "stock vLLM's KV groups": {setting.name: ratio(setting, H100, "vllm") for setting in SETTINGS},
        "expert parallelism": {setting.name: ratio(setting, H100, ENGINE, True) for setting in SETTINGS},
    }
    return found | {f"admitted by {rule}": _admitted_by(rule) for rule in _RULES}


def _overhead(gib: float) -> HardwareTable:
    return replace(H100, overhead_mib=gib * 1024)


def _admitted_by(rule: str) -> dict[str, float | None]:
    """The ratios when requests, not rounded to whole ones, are counted without a margin, at their full length, or at
    that and with a whole step's tokens each, as vLLM counts them when it starts."""
    found: dict[str, float | None] = {}
    for setting in SETTINGS:
        target = Target(H100, GPT_OSS_120B, setting.num_gpus, "fp8", ENGINE)
        speeds = [_speed(target, model, setting.workload, rule) for model in (PARENT, CHILD)]
        found[setting.name] = round(speeds[1] / speeds[0], 3)
    return found


def _speed(target: Target, model: Architecture, load: Workload, rule: str) -> float:
    mean = kv_bytes_mean_and_std(target, model, load)[0]
    full, promised = (
        request_kv_bytes(target.shape, model, full_length(load), target.kv_cache, target.engine, step_tokens)
        for step_tokens in (1, H100.chunk_tokens)
    )
    each = dict(zip(_RULES, (mean, full, promised), strict=True))[rule]
    count = min(cache_room(target, model) / each, H100.max_requests)
    runtime = target.model_runtime(model, load.model_copy(update={"concurrency": count}))
    return 1000 * count * load.output_tokens / (runtime.prefill_ms + load.output_tokens * runtime.decode_ms)


def unexplained() -> dict[str, Any]:
    """8xH100 4K/4K: how much a layer with half the experts would have to save, and how much it can."""
    setting = SETTINGS[-1]
    target = Target(H100, GPT_OSS_120B, setting.num_gpus, "fp8")
    halved = sum(block.num_experts == 64 for block in CHILD.blocks)
    by_requests = []
    for requests in (64, 128, 256, 512, 1024, 2048):
        load = setting.workload.model_copy(update={"concurrency": requests})
        parent, child = (target.model_runtime(model, load) for model in (PARENT, CHILD))
        token_ms = [runtime.prefill_ms / load.output_tokens + runtime.decode_ms for runtime in (parent, child)]
        needed = (token_ms[0] - token_ms[0] / setting.ratio) / halved
        by_requests.append(
            {
                "requests": requests,
                "parent_tokens_per_s": round(1000 * requests / token_ms[0]),
                "modelled_ratio": round(token_ms[0] / token_ms[1], 3),
                "saved_us_per_halved_layer": round(1000 * (token_ms[0] - token_ms[1]) / halved, 1),
                "needed_us_per_halved_layer": round(1000 * needed, 1),
                "mixture_us_of_a_full_layer": round(1000 * target.moe_ms(Block(128, 4, 2880), requests), 1),
                "step_without_any_experts_read_ratio": round(
                    token_ms[0] / (token_ms[0] - halved * _streamed_ms(target, Block(128, 4, 2880), requests)), 3
                ),
            }
        )
    return {"halved_layers": halved, "by_requests": by_requests, "analysis": ANALYSIS}


def _streamed_ms(target: Target, block: Block, requests: int) -> float:
    """Of a decode step's mixture, reading experts."""
    free = replace(H100, moe={8: replace(H100.moe[8], launch_us=0.0, pflops=float("inf"))})
    return replace(target, table=free).moe_ms(block, requests)


ANALYSIS = [
    "At 4K/4K no window of 8192 tokens is ever full, so the child can only gain by its experts: 18 layers read 64 "
    "instead of 128. Its freed memory is 3 % of a node's cache and changes nothing.",
    "Published operation tables of one H100 (aiconfigurator-core 0.12, vLLM 0.24, tensor parallel over 8) give the "
    "mixture of 128 and of 32 experts at 512 tokens 171 and 112 us under skewed routing, 142 and 72 us under even: "
    "going to a quarter of the experts saves 59 to 70 us a layer. The model's 64 us agrees; what it says of half the "
    "experts lies between.",
    "Reaching 1.22 needs about three times the saving that the tables allow: at the number of requests whose modelled "
    "speed is the published one (between 256 and 512), 110 to 150 us of the 140 to 160 us that the whole mixture "
    "costs; from 1024 requests on more than all of it. No constant of the mixture within its 10 % error closes the "
    "gap, so none was adjusted.",
    "Expert parallelism does not: its tables give 248 against 154 us for 128 and 32 experts at 512 tokens, a larger "
    "saving of a longer step; the ratio is lower than by tensor parallelism.",
    "What could: (a) each model measured at its own best configuration, such as several replicas of fewer GPUs, for "
    "which the single-GPU rows show a large gain; (b) kernels that pad each expert's tokens to a whole tile, whose "
    "cost at mid batch follows the number of experts and not of tokens, in versions other than those of the tables; "
    "(c) time between steps that depends on the model. The model's absolute throughput here is 1.4 times the published "
    "one, so the measured engine also spends time that no operation table holds.",
    "The single-GPU rows hang on memory: a GPU holds 2 requests of 128K of the parent, and their ratio jumps where one "
    "more or one fewer fits. Both rows are within 10 % for an overhead of 9.5 to 10.5 GiB; 10 GiB is an assumption "
    "inside what engine logs show, chosen with the published ratios known.",
]


def report() -> dict[str, Any]:
    """Everything."""
    return {
        "table": H100.name,
        "table_date": H100.date,
        "sources": SOURCES,
        "rows": rows(),
        "kv_cache_of_one_sequence": cache(),
        "sensitivity": sensitivity(),
        "unexplained": unexplained(),
    }


def fit_table(files: Sequence[Path], name: str) -> HardwareTable:
    """A hardware table out of measured cost tables of one gpt-oss model's shape."""
    costs = [CostTable.from_json(path.read_text()) for path in files]
    found = fit(costs, GPT_OSS_120B, H100)
    print(f"{found.num_times} times, mean error {100 * found.mean_error:.1f} %", file=sys.stderr)
    today = datetime.date.today().isoformat()
    return found.table(H100, name, today, int(costs[0].hardware.get("num_gpus", 1)), costs[0].kv_cache)


def show(found: dict[str, Any]) -> None:
    """Print the tables."""
    print(f"{'setting':17}{'published':>10}{'modelled':>10}{'error':>8}{'requests':>13}{'tokens/s':>16}")
    for row in found["rows"]:
        requests = f"{row['parent']['requests']} -> {row['child']['requests']}"
        speed = f"{row['parent']['tokens_per_s']:.0f} -> {row['child']['tokens_per_s']:.0f}"
        print(
            f"{row['setting']:17}{row['published_ratio']:10.2f}{row['modelled_ratio']:10.2f}{100 * row['error']:+7.1f}%"
            f"{requests:>13}{speed:>16}{'  held out' if row['held_out'] else ''}"
        )
    print("\nThe ratios with one item changed:")
    for name, ratios in found["sensitivity"].items():
        print(f"{name:24}", *(f"{setting}: {value or '-':<8}" for setting, value in ratios.items()))
    print("\n8xH100 4K/4K by requests:")
    for row in found["unexplained"]["by_requests"]:
        print("  " + ", ".join(f"{key} {value}" for key, value in row.items()))
    print("\n" + "\n".join(ANALYSIS))


def main() -> None:
    """Print, and record or fit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path, help="also write everything here")
    parser.add_argument("--fit", type=Path, nargs="+", help="measured costs.json files to fit a table to")
    parser.add_argument("--name", default="fitted", help="what the fitted table is called")
    given = parser.parse_args()
    if given.fit:
        print(fit_table(given.fit, given.name).to_json())
        return
    found = report()
    show(found)
    if given.record:
        command = {"command": "python benchmarks/cost_model.py", "date": datetime.date.today().isoformat()}
        given.record.write_text(json.dumps(command | {"moesaic": moesaic.__version__} | found, indent=1) + "\n")


if __name__ == "__main__":
    main()
