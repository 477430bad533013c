"""What outside harnesses write, by hand from their sources: small directories of results of one model."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def write_lm_eval(
    directory: Path,
    solved: Mapping[str, Sequence[float]],
    *,
    model: str = "child",
    samples: bool = True,
    error: float | str = 0.1,
    group: str = "",
    **changes: Any,
) -> Path:
    """Tasks by name with the accuracy of every problem; ``changes`` go into the results file as they are."""
    date, place = f"2026-01-02T03-04-05.{len(model):06}", directory / model
    place.mkdir(parents=True)
    means = {task: sum(of) / len(of) for task, of in solved.items()}
    results: dict[str, Any] = {
        task: {"name": task, "alias": task, "sample_len": len(of), "acc,none": means[task], "acc_stderr,none": error}
        for task, of in solved.items()
    }
    every = [share for of in solved.values() for share in of]
    whole = {"alias": group, "name": group, "acc,none": sum(every) / len(every), "acc_stderr,none": error}
    content = {
        "results": results | ({group: whole} if group else {}),
        **({"groups": {group: whole}} if group else {}),
        "group_subtasks": {group: [*solved]} if group else {},
        "configs": {
            task: {
                "task": task,
                "dataset_path": "sums",
                "num_fewshot": 2,
                "generation_kwargs": {"temperature": 0.0, "until": ["\n"]},
                "metadata": {"version": 1.0, "pretrained": model},
            }
            for task in solved
        },
        "versions": dict.fromkeys(solved, 1.0),
        "n-shot": dict.fromkeys(solved, 2),
        "higher_is_better": {task: {"acc": True} for task in [*solved, *([group] if group else [])]},
        "n-samples": {task: {"original": len(of), "effective": len(of)} for task, of in solved.items()},
        "config": {
            "model": "local-completions",
            "model_args": f"model={model},base_url=http://{model}:8000/v1,max_length=4096",
            "gen_kwargs": {"reasoning_effort": "high"},
            "limit": None,
            "fewshot_seed": 1234,
        },
        "lm_eval_version": "0.4.12",
        "model_name": model,
        "chat_template_sha": None,
        **changes,
    }
    (place / f"results_{date}.json").write_text(json.dumps(content, indent=2))
    for task, of in solved.items() if samples else ():
        rows = [lm_eval_sample(task, place, share) for place, share in enumerate(of)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (place / f"samples_{task}_{date}.jsonl").write_text(lines)
    return directory


def lm_eval_sample(task: str, doc_id: int, accuracy: float, prompt: str = "few-shots") -> dict[str, Any]:
    """A row of samples; what a document holds may be anything, NaN too."""
    doc = {"question": f"{task} {doc_id}", "weight": float("nan")}
    return {
        "doc_id": doc_id,
        "doc": doc,
        "target": "1",
        "arguments": {"gen_args_0": {"arg_0": prompt, "arg_1": " 1"}},
        "resps": [[["-0.5", "True"]]],
        "filtered_resps": [["-0.5", "True"]],
        "filter": "none",
        "metrics": ["acc"],
        "doc_hash": _hash(str(doc)),
        "prompt_hash": _hash(f"{prompt} {task} {doc_id}"),
        "target_hash": _hash("1"),
        "acc": accuracy,
    }


def write_nemo_yaml(
    directory: Path,
    value: float,
    error: float | None = 0.03,
    *,
    model: str = "child",
    effort: str = "high",
    name: str = "gpqa_diamond",
    metric: tuple[str, str] = ("score", "micro"),
    **params: Any,
) -> Path:
    """The ``results.yml`` of a container."""
    directory.mkdir(parents=True)
    score = {"stats": {} if error is None else {"stddev": 0.4, "stderr": error}, "value": value}
    added = {"params_to_add": {"reasoning_effort": effort}}
    content = {
        "command": "simple_evals ...",
        "config": {
            "output_dir": f"/results/{model}",
            "params": {"temperature": 1.0, "top_p": 1.0, "parallelism": len(model), "extra": {}} | params,
            "type": name,
        },
        "git_hash": "",
        "metadata": {"versioning": {"nemo_evaluator": "0.2.6"}},
        "results": {"groups": {}, "tasks": {name: {"metrics": {metric[0]: {"scores": {metric[1]: score}}}}}},
        "target": {
            "api_endpoint": {
                "model_id": model,
                "type": "chat",
                "url": f"http://{model}:8000/v1/chat/completions",
                "adapter_config": {
                    "interceptors": [
                        {"name": "caching", "enabled": True, "config": {"cache_dir": f"/{model}"}},
                        {"name": "payload_modifier", "enabled": True, "config": added},
                    ]
                },
            }
        },
    }
    (directory / "results.yml").write_text(yaml.dump(content))
    return directory


def write_nemo_skills(directory: Path, replies: Sequence[Sequence[bool]], **changes: Any) -> Path:
    """``results.yml`` in percent without a standard error, and a file of replies for each repeat."""
    percent = 100 * sum(map(sum, replies)) / sum(map(len, replies))
    metric = (f"pass@1[avg-of-{len(replies)}]", "symbolic_correct")
    write_nemo_yaml(directory, round(percent, 2), None, name="aime25", metric=metric, **changes)
    place = directory / "eval-results" / "aime25"
    place.mkdir(parents=True)
    for repeat, of in enumerate(replies):
        rows = [
            {"problem": f"sum {number}", "expected_answer": number, "generation": "...", "symbolic_correct": correct}
            for number, correct in enumerate(of)
        ]
        (place / f"output-rs{repeat}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def write_nemo_bundle(
    directory: Path,
    rewards: Sequence[Sequence[float]],
    *,
    model: str = "child",
    temperature: float | None = 1.0,
    **config: Any,
) -> Path:
    """The bundle of a benchmark of NeMo Evaluator's own: of every problem the rewards of its repeats."""
    place = directory / "gsm8k"
    place.mkdir(parents=True)
    rows = [
        {"problem_idx": number, "repeat": repeat, "reward": reward, "prompt": f"sum {number}", "expected_answer": "1"}
        for number, of in enumerate(rewards)
        for repeat, reward in enumerate(of)
    ]
    mean = sum(sum(of) / len(of) for of in rewards) / len(rewards)
    bundle = {
        "run_id": "eval-20260102T030405Z-gsm8k",
        "sdk_version": "0.4.0",
        "config": {"benchmark": "gsm8k", "model": model, "base_url": f"http://{model}", "max_problems": None} | config,
        "benchmark": {
            "name": "gsm8k",
            "samples": len(rewards),
            "repeats": len(rewards[0]),
            "scores": {"pass@1": {"value": round(mean, 4)}, "summary": {"mean": mean}, "runtime": {}},
        },
        "n_results": len(rows),
    }
    (place / "eval-20260102T030405Z-gsm8k.json").write_text(json.dumps(bundle, indent=2))
    (place / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if temperature is not None:
        run = {
            "services": {model: {"type": "api", "url": f"http://{model}", "generation": {"temperature": temperature}}},
            "benchmarks": [
                {"name": "gsm8k", "max_concurrent": len(model), "solver": {"type": "simple", "service": model}}
            ],
        }
        (directory / "full_config.yaml").write_text("# run_id: 1\n" + yaml.dump(run))
    return directory
