"""Costs of the tiny reasoner's blocks, measured in vLLM and in process: the ratio of both, and how far each scatters.

Both are timed at the same lengths and concurrency on the same machine: in vLLM by its own layers (bfloat16 weights, its
KV cache and scheduler), in process by ``moesaic``'s (bfloat16 too). Absolute times differ, since the engines do, and of
one engine between two runs where a machine is slower for minutes. The search only asks how much slower one block is
than another, so the bars hold a block's time relative to the mean of all blocks of its run, workload and phase.

Run: python benchmarks/engine_costs.py [--record FILE]; 5 minutes on two cores. vLLM's environment is made once.
"""

import argparse
from pathlib import Path
from statistics import fmean
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


PHASES = ("prefill", "decode")
Where = tuple[str, str, str]
"""A block, a workload and a phase."""


def measured(config: MeasureCostsConfig) -> CostTable:
    """The tiny reasoner's cost table."""
    with TemporaryDirectory() as place:
        output, scratch = Path(place) / "output", Path(place) / "scratch"
        output.mkdir()
        scratch.mkdir()
        measure_costs.run(config, parent=example() / "parent", output=output, scratch=scratch)
        return CostTable.from_json((output / "costs.json").read_text())


def times(table: CostTable) -> dict[Where, float]:
    """Every time of a table, in ms."""
    return {
        (block.label, load.name, phase): getattr(cost.workloads[load.name], f"{phase}_ms")
        for block, cost in table.blocks.items()
        for load in LOADS
        for phase in PHASES
    }


def relative(table: CostTable) -> dict[Where, float]:
    """Every time over the mean of all blocks in its workload and phase."""
    found = times(table)
    return {
        where: time / fmean(other for its, other in found.items() if its[1:] == where[1:])
        for where, time in found.items()
    }


def compare(engine: CostTable, here: CostTable) -> list[dict[str, Any]]:
    """A row per block, workload and phase."""
    theirs, ours = times(engine), times(here)
    shares = relative(engine), relative(here)
    return [
        {
            **dict(zip(("block", "workload", "phase"), where, strict=True)),
            "vllm_ms": theirs[where],
            "in_process_ms": ours[where],
            "vllm_over_in_process": theirs[where] / ours[where],
            "vllm_over_mean": shares[0][where],
            "in_process_over_mean": shares[1][where],
        }
        for where in theirs
    ]


def main() -> None:
    """Measure twice in vLLM and once in process, and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", type=Path, help="file to write")
    options = parser.parse_args()
    engine, again = (measured(ASKED.but(engine="vllm")) for _ in range(2))
    rows = compare(engine, measured(ASKED))
    first, second = relative(engine), relative(again)
    repeated = {where: second[where] / first[where] for where in first}
    spread = max(table.hardware["relative_spread"] for table in (engine, again))
    bars = [
        Bar("relative spread of a number's repeats in vLLM, median", spread, most=0.1),
        Bar("relative times, a second run over the first, smallest", min(repeated.values()), least=0.75),
        Bar("relative times, a second run over the first, largest", max(repeated.values()), most=1.33),
    ]
    before, after = times(engine), times(again)
    found = {
        "hardware": dict(engine.hardware),
        "rows": rows,
        "second_run_over_first": {
            ", ".join(where): {"time": after[where] / before[where], "relative": repeated[where]} for where in before
        },
    }
    conclude("python benchmarks/engine_costs.py", bars, found, options.record)


if __name__ == "__main__":
    main()
