"""Measure the exported parent and write record.json: `python -m examples.tiny_reasoner.record --run DIR`.

Everything the record says is measured here or read from the run: accuracy and generated tokens of every family at every
effort, the same with full attention taken away, and the same with the exact weights before storing.
"""

import argparse
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from transformers import GptOssForCausalLM

from examples.tiny_reasoner import datasets
from examples.tiny_reasoner.evaluate import Score, load_parent, narrow_windows, read_rows, rounded, score_suite
from examples.tiny_reasoner.export import checkpoint_weights
from examples.tiny_reasoner.model import reasoner_config
from examples.tiny_reasoner.tasks import EFFORTS, FAR_FAMILIES
from examples.tiny_reasoner.train import Recipe

EXAMPLE = Path(__file__).parent
Scores = Mapping[str, Mapping[str, Score]]


def exact_model(run: Path) -> GptOssForCausalLM:
    """The weights as trained, before MXFP4 and BF16."""
    model = GptOssForCausalLM(reasoner_config())
    model.load_state_dict(checkpoint_weights(run))
    return model


def training_facts(run: Path) -> dict[str, object]:
    """What was run, and how much of it."""
    payload = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=False)
    recipe, state = Recipe(**payload["recipe"]), payload["state"]
    values = asdict(Recipe())
    changed = [f"--{name.replace('_', '-')} {value}" for name, value in asdict(recipe).items() if value != values[name]]
    return {
        "command": " ".join(["python -m examples.tiny_reasoner.train --out DIR", *changed]),
        "recipe": asdict(recipe),
        "steps": state["step"],
        "tokens": state["tokens"],
        "training_seconds": round(state["seconds"]),
        "tokens_per_s": round(state["tokens"] / state["seconds"]),
    }


def measured(parent: Path, run: Path, rows: list[dict[str, object]]) -> dict[str, object]:
    """The three measurements and the bars they are held against."""
    stored = score_suite(load_parent(parent), rows, EFFORTS)
    exact = score_suite(exact_model(run), rows, ["high"])
    narrow_model = load_parent(parent)
    narrow_windows(narrow_model)
    narrow = score_suite(narrow_model, rows, ["high"], FAR_FAMILIES)
    return {
        "stored": rounded(stored),
        "exact_weights": rounded(exact),
        "every_layer_windowed": rounded(narrow),
        "bars": bars(stored, exact, narrow),
    }


def bars(stored: Scores, exact: Scores, narrow: Scores) -> dict[str, float]:
    """The numbers the example promises, in points of accuracy except where named otherwise."""
    high, low = stored["high"], stored["low"]
    far = sum(high[family].accuracy for family in FAR_FAMILIES) / len(FAR_FAMILIES)
    numbers = {
        "high_mean": high["mean"].accuracy,
        "high_minus_low": high["mean"].accuracy - low["mean"].accuracy,
        "high_tokens_over_low_tokens": high["mean"].tokens / low["mean"].tokens,
        "far_lost_without_full_attention": far - narrow["high"]["mean"].accuracy,
        "lost_by_storing": exact["high"]["mean"].accuracy - high["mean"].accuracy,
    }
    return {name: round(value, 2) for name, value in numbers.items()}


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="the training run's --out")
    parser.add_argument("--parent", type=Path, default=EXAMPLE / "parent")
    parser.add_argument("--per-family", type=int, help="only the first problems of each family")
    parser.add_argument("--note", default="one uninterrupted run", help="what the numbers cannot say about the run")
    parser.add_argument("--out", type=Path, default=EXAMPLE / "record.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = read_rows(EXAMPLE / "data" / "test.jsonl", arguments.per_family)
    record = {
        "training": training_facts(arguments.run) | {"note": arguments.note},
        "data_seeds": datasets.SEEDS,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "test_problems": len(rows),
        "decoding": "greedy, transformers generate, float32 on CPU",
        "measured": measured(arguments.parent, arguments.run, rows),
    }
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
