"""Costs of the tiny reasoner's blocks, measured in vLLM and in process: the ratio of both, and how far each scatters.

Both are timed at the same lengths and concurrency on the same machine: in vLLM by its own layers (bfloat16 weights, its
KV cache and scheduler), in process by ``moesaic``'s (bfloat16 too). Absolute times differ, since the engines do; the
search needs ratios between blocks, so each block's share of the dearest one is compared as well.

Run: python benchmarks/engine_costs.py [--record FILE]; 5 minutes on two cores. vLLM's environment is made once.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bars import Bar, conclude

from moesaic.costs.block_costs import CostTable
from moesaic.costs.workload import Workload
from moesaic.pipelines import example
from moesaic.search.measure_costs import run as measure_costs
from moesaic.search.measure_costs.stage import MeasureCostsConfig
from moesaic.search.space import SearchSpace

LOADS = (
    Workload(name="long", input_tokens=1024, output_tokens=64, concurrency=8),
    Workload(name="short", input_tokens=64, output_tokens=64, concurrency=16),
)
ASKED = MeasureCostsConfig(
    space=SearchSpace(expert_counts=(16, 8), windows=()), workloads=LOADS, repeats=7, precision="bfloat16"
)


def measured(config: MeasureCostsConfig) -> CostTable:
    """The tiny reasoner's cost table."""
    with TemporaryDirectory() as place:
        output, scratch = Path(place) / "output", Path(place) / "scratch"
        output.mkdir()
        scratch.mkdir()
        measure_costs.run(config, parent=example() / "parent", output=output, scratch=scratch)
        return CostTable.from_json((output / "costs.json").read_text())


def compare(engine: CostTable, here: CostTable) -> list[dict[str, Any]]:
    """A row per block, workload and phase."""
    rows = []
    for load in LOADS:
        for phase in ("prefill_ms", "decode_ms"):
            times = {
                block: [getattr(table.blocks[block].workloads[load.name], phase) for table in (engine, here)]
                for block in engine.blocks
            }
            dearest = [max(each[which] for each in times.values()) for which in range(2)]
            for block, (theirs, ours) in times.items():
                rows.append(
                    {
                        "block": block.label,
                        "workload": load.name,
                        "phase": phase.removesuffix("_ms"),
                        "vllm_ms": theirs,
                        "in_process_ms": ours,
                        "vllm_over_in_process": theirs / ours,
                        "vllm_share_of_dearest": theirs / dearest[0],
                        "in_process_share_of_dearest": ours / dearest[1],
                    }
                )
    return rows


def main() -> None:
    """Measure twice in vLLM and once in process, and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", type=Path, help="file to write")
    options = parser.parse_args()
    engine, again = (measured(ASKED.but(engine="vllm")) for _ in range(2))
    rows = compare(engine, measured(ASKED))
    repeated = [
        getattr(again.blocks[block].workloads[load.name], phase) / getattr(cost.workloads[load.name], phase)
        for block, cost in engine.blocks.items()
        for load in LOADS
        for phase in ("prefill_ms", "decode_ms")
    ]
    spread = max(table.hardware["relative_spread"] for table in (engine, again))
    bars = [
        Bar("relative spread of a number's repeats in vLLM, median", spread, most=0.1),
        Bar("a second run over the first, smallest", min(repeated), least=0.75),
        Bar("a second run over the first, largest", max(repeated), most=1.33),
    ]
    found = {"hardware": dict(engine.hardware), "rows": rows, "second_run_over_first": repeated}
    conclude("python benchmarks/engine_costs.py", bars, found, options.record)


if __name__ == "__main__":
    main()
