"""The script that measures what decides the cost model on a GPU: here all of it at small sizes, on what there is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moesaic.deploy.engines.vllm.environment import why_unsupported

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_costs.py"


@pytest.mark.engine
@pytest.mark.timeout(900)
@pytest.mark.skipif(bool(why_unsupported()), reason=f"no vLLM here: {why_unsupported()}")
def test_all_of_it_at_small_sizes(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    subprocess.run([sys.executable, str(SCRIPT), "--small", "--record", str(record)], check=True)
    found = json.loads(record.read_text())
    assert ("fp8" in found) == (not why_unsupported(fp8_cache=True))
    for cache, blocks in (("bf16", 6), ("fp8", 3)):
        for row in found.get(cache, {"times": {}})["times"].values():
            assert len(row["measured_ms"]) == len(row["modelled_ms"]) == blocks
            assert 0.5 < row["whole_ms"] / row["sum_ms"] < 2
    reading = found["bf16"]["times"]["long, prefill"]["measured_over_base"]
    assert reading["8e/top-2/256w/full"] > reading["8e/top-2/256w/128"] == 1
    assert 1 < found["distill"]["measured_mib"] / found["distill"]["simulated_mib"] < 4, "the libraries' own 100 MiB"
