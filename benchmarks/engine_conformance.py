"""How far vLLM's greedy replies are those of transformers in float32: a parent and a child of it, BF16 and FP8 caches.

Each model is exported for vLLM by `export_engine` and loaded by vLLM itself; `validate_bundle` asks it 500 prompts at
each effort and holds its replies against the reference. The child is any checkpoint with scales from `calibrate_kv`,
such as the demo's.

The bars: computing in float32, at least 99 % of the replies are the reference's, token for token, at each effort; and
as it serves, in BF16, every difference is a near tie. How many replies are equal in BF16 is recorded without a bar: at
low effort the tiny reasoner guesses among equals, so that rounding decides.

Run: python benchmarks/engine_conformance.py --child runs/demo/child [--parent MODEL] [--prompts 500] [--record FILE]
"""

import argparse
import sys
import tempfile
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

from bars import Bar, conclude

from moesaic.core.config import CacheDtype, Precision
from moesaic.deploy.engines.vllm.environment import why_unsupported
from moesaic.deploy.export_engine.bundle import write_bundle
from moesaic.deploy.export_engine.stage import ExportEngineConfig
from moesaic.deploy.validate_bundle.run import validate_by_engine
from moesaic.deploy.validate_bundle.stage import ValidateBundleConfig
from moesaic.models.checkpoint import Checkpoint
from moesaic.pipelines import example

EQUAL, NEAR_TIE = 0.99, 0.6


def main() -> None:
    """Ask and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", type=Path, required=True)
    parser.add_argument("--parent", type=Path, default=example() / "parent")
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--record", type=Path)
    given = parser.parse_args()
    found: dict[str, Any] = {}
    bars: list[Bar] = []
    precisions: tuple[Precision, ...] = ("float32", "bfloat16")
    caches: tuple[CacheDtype, ...] = ("bf16", "fp8")
    settings = product(("parent", "child"), caches, precisions)
    for name, cache, precision in settings:
        if cache == "fp8" and (why := why_unsupported(fp8_cache=True)):
            print(f"no FP8 here: {why}", file=sys.stderr)
            continue
        config = ValidateBundleConfig(prompts_per_effort=given.prompts, engine_precision=precision)
        with tempfile.TemporaryDirectory() as folder:
            bundle, scratch = Path(folder) / "bundle", Path(folder) / "scratch"
            scratch.mkdir()
            export = ExportEngineConfig(
                target="vllm",
                kv_cache="fp8_unit" if cache == "fp8" and name == "parent" else cache,
                max_batch_size=64,
                compare_outputs=False,
            )
            write_bundle(Checkpoint.open(getattr(given, name)), bundle, export)
            verdict = validate_by_engine(config, bundle, example() / "data" / "prompts.jsonl", scratch)
        title = f"{name}, {cache} cache, computed in {precision}"
        found[title] = {"verdict": verdict.words, **asdict(verdict)}
        print(f"{title}: {verdict.words}", file=sys.stderr, flush=True)
        bars.append(Bar(f"{title}: verified", float(verdict.passed), least=1.0))
        for effort, agreement in verdict.replies.items():
            bars.append(Bar(f"{title}, {effort} effort: largest gap", agreement["largest_gap"], most=NEAR_TIE))
            if precision == "float32":
                share = agreement["equal"] / agreement["replies"]
                bars.append(Bar(f"{title}, {effort} effort: equal replies", share, least=EQUAL))
    conclude(" ".join(["python benchmarks/engine_conformance.py", *sys.argv[1:]]), bars, found, given.record)


if __name__ == "__main__":
    main()
