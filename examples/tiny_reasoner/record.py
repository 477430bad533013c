"""Measure the exported parent and write record.json: `python -m examples.tiny_reasoner.record --run DIR`.

Everything the record says is measured here, by the project's own `evaluate` stage, or read from the run: accuracy and
generated tokens of every family at every effort, the same with full attention taken away, and the same with the exact
weights before storing.
"""

import argparse
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GptOssForCausalLM, PreTrainedModel

from examples.tiny_reasoner import datasets
from examples.tiny_reasoner.export import checkpoint_weights
from examples.tiny_reasoner.model import WINDOW, reasoner_config
from examples.tiny_reasoner.tasks import EFFORTS, FAR_FAMILIES
from examples.tiny_reasoner.train import Recipe
from moesaic.data.chat import load_tokenizer
from moesaic.data.problems import Problem, first_of_each_task, read_problems
from moesaic.measure.evaluate.run import answer_problems, summarize
from moesaic.measure.evaluate.stage import EvaluateConfig
from moesaic.models import attention
from moesaic.models.whole_model import load_model

EXAMPLE = Path(__file__).parent
Scores = Mapping[str, Mapping[str, Any]]


def exact_model(run: Path) -> GptOssForCausalLM:
    """The weights as trained, before MXFP4 and BF16."""
    attention.register()
    model = GptOssForCausalLM(reasoner_config())
    model.load_state_dict(checkpoint_weights(run))
    model.set_attn_implementation(attention.NAME)
    return model.eval()


def windowed_model(parent: Path) -> PreTrainedModel:
    """The parent with the sliding window in every layer."""
    model = load_model(parent)
    model.config.layer_types = ["sliding_attention"] * model.config.num_hidden_layers
    for layer in model.model.layers:
        layer.self_attn.sliding_window = WINDOW
    return model


def score(
    name: str, model: PreTrainedModel, parent: Path, problems: Sequence[Problem], efforts: Sequence[str]
) -> Scores:
    """What `evaluate` says of a model at each effort."""
    tokenizer = load_tokenizer(parent)
    config = EvaluateConfig(name=name, max_new_tokens=128)
    return {effort: summarize(answer_problems(model, tokenizer, problems, effort, config)) for effort in efforts}


def training_facts(run: Path) -> dict[str, object]:
    """What was run, and how much of it."""
    payload = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
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


def measured(parent: Path, run: Path, problems: Sequence[Problem]) -> dict[str, Any]:
    """The three measurements and the bars they are held against."""
    far = [problem for problem in problems if problem.task in FAR_FAMILIES]
    stored = score("stored", load_model(parent), parent, problems, EFFORTS)
    exact = score("exact weights", exact_model(run), parent, problems, ["high"])
    windowed = score("windowed", windowed_model(parent), parent, far, ["high"])
    return {
        "stored": stored,
        "exact_weights": exact,
        "every_layer_windowed": windowed,
        "bars": bars(stored, exact, windowed),
    }


def bars(stored: Scores, exact: Scores, windowed: Scores) -> dict[str, float]:
    """The numbers the example promises, in points of accuracy except where named otherwise."""
    high, low = stored["high"], stored["low"]
    far = sum(high["tasks"][family]["accuracy"] for family in FAR_FAMILIES) / len(FAR_FAMILIES)
    numbers = {
        "high_mean": 100 * high["accuracy"],
        "high_minus_low": 100 * (high["accuracy"] - low["accuracy"]),
        "high_tokens_over_low_tokens": high["tokens_per_request"] / low["tokens_per_request"],
        "far_lost_without_full_attention": 100 * (far - windowed["high"]["accuracy"]),
        "lost_by_storing": 100 * (exact["high"]["accuracy"] - high["accuracy"]),
    }
    return {name: round(value, 2) for name, value in numbers.items()}


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="the training run's --out")
    parser.add_argument("--parent", type=Path, default=EXAMPLE / "parent")
    parser.add_argument("--per-family", type=int, default=200, help="only the first problems of each family")
    parser.add_argument("--note", default="one uninterrupted run", help="what the numbers cannot say about the run")
    parser.add_argument("--out", type=Path, default=EXAMPLE / "record.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    problems = first_of_each_task(read_problems(EXAMPLE / "data" / "test.jsonl"), arguments.per_family)
    record = {
        "training": training_facts(arguments.run) | {"note": arguments.note},
        "data_seeds": datasets.SEEDS,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "test_problems": len(problems),
        "decoding": "greedy, float32 on CPU, by the stage `evaluate`",
        "measured": measured(arguments.parent, arguments.run, problems),
    }
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
