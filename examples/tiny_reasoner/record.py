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
from transformers import GptOssConfig, GptOssForCausalLM, PreTrainedModel

from examples.tiny_reasoner.datasets import PLAN, Plan
from examples.tiny_reasoner.export import checkpoint_weights
from examples.tiny_reasoner.model import WINDOW
from examples.tiny_reasoner.suite import EFFORTS
from examples.tiny_reasoner.train import Recipe
from moesaic.data.chat import load_tokenizer
from moesaic.data.problems import Problem, first_of_each_task, read_problems
from moesaic.measure.evaluate.run import answer_problems, summarize
from moesaic.measure.evaluate.stage import EvaluateConfig
from moesaic.models import attention
from moesaic.models.whole_model import load_model

MAX_NEW_TOKENS = 256
Scores = Mapping[str, Mapping[str, Any]]


def exact_model(config: GptOssConfig, run: Path) -> GptOssForCausalLM:
    """The weights as trained, before MXFP4 and BF16."""
    attention.register()
    model = GptOssForCausalLM(config)
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
    config = EvaluateConfig(name=name, max_new_tokens=MAX_NEW_TOKENS)
    return {
        effort: figures(summarize(answer_problems(model, tokenizer, problems, effort, config))) for effort in efforts
    }


def figures(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The same with each family's number of problems in place of what was solved of them."""
    tasks = {
        name: {key: value for key, value in task.items() if key != "solved"} | {"problems": len(task["solved"])}
        for name, task in summary["tasks"].items()
    }
    return {**summary, "tasks": tasks}


def training_facts(name: str, defaults: Recipe, run: Path) -> dict[str, object]:
    """What was run, and how much of it."""
    payload = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
    values = asdict(defaults)
    changed = [f"--{key.replace('_', '-')} {value}" for key, value in payload["recipe"].items() if value != values[key]]
    shares = payload["curriculum"]["shares"].values()
    learnt = {effort: sum(share[effort] for share in shares) for effort in EFFORTS}
    return {
        "command": " ".join([f"python -m examples.{name}.train --out DIR", *changed]),
        "recipe": payload["recipe"],
        "steps": payload["steps"],
        "tokens": payload["tokens"],
        "training_seconds": round(payload["seconds"]),
        "tokens_per_s": round(payload["tokens"] / payload["seconds"]),
        "percent_of_learnt_tokens": {
            effort: round(100 * count / sum(learnt.values()), 2) for effort, count in learnt.items()
        },
    }


def measured(plan: Plan, parent: Path, run: Path, problems: Sequence[Problem]) -> dict[str, Any]:
    """The three measurements and the bars they are held against."""
    far = [problem for problem in problems if problem.task in plan.suite.far]
    stored = score("stored", load_model(parent), parent, problems, EFFORTS)
    exact = score("exact weights", exact_model(plan.suite.config(), run), parent, problems, ["high"])
    windowed = score("windowed", windowed_model(parent), parent, far, ["high"])
    return {
        "stored": stored,
        "exact_weights": exact,
        "every_layer_windowed": windowed,
        "bars": bars(plan.suite.far, stored, exact, windowed),
    }


def bars(far_families: Sequence[str], stored: Scores, exact: Scores, windowed: Scores) -> dict[str, float]:
    """The numbers the example promises, in points of accuracy except where named otherwise."""
    high, low = stored["high"], stored["low"]
    far = sum(high["tasks"][family]["accuracy"] for family in far_families) / len(far_families)
    numbers = {f"{effort}_mean": 100 * scores["accuracy"] for effort, scores in stored.items()} | {
        "high_minus_low": 100 * (high["accuracy"] - low["accuracy"]),
        "high_tokens_over_low_tokens": high["tokens_per_request"] / low["tokens_per_request"],
        "far_lost_without_full_attention": 100 * (far - windowed["high"]["accuracy"]),
        "lost_by_storing": 100 * (exact["high"]["accuracy"] - high["accuracy"]),
    }
    return {name: round(value, 2) for name, value in numbers.items()}


def main(plan: Plan = PLAN, defaults: Recipe | None = None, example: Path = Path(__file__).parent) -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="the training run's --out")
    parser.add_argument("--parent", type=Path, default=example / "parent")
    parser.add_argument("--problems", type=Path, default=example / "data" / "test.jsonl")
    parser.add_argument("--per-family", type=int, default=200, help="only the first problems of each family")
    parser.add_argument("--note", default="one uninterrupted run", help="what the numbers cannot say about the run")
    parser.add_argument("--out", type=Path, default=example / "record.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    problems = first_of_each_task(read_problems(arguments.problems), arguments.per_family)
    facts = training_facts(plan.suite.name, defaults or Recipe(), arguments.run)
    record = {
        "training": facts | {"note": arguments.note},
        "data_seeds": dict(plan.seeds),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "test_problems": len(problems),
        "decoding": "greedy, float32 on CPU, by the stage `evaluate`",
        "measured": measured(plan, arguments.parent, arguments.run, problems),
    }
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
