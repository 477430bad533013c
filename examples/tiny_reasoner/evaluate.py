"""Greedy accuracy of a checkpoint directory: `python -m examples.tiny_reasoner.evaluate --model DIR`.

A small measurement for this example's record; batches are left-padded and decoded with transformers' own layers.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GptOssForCausalLM

from examples.tiny_reasoner.model import WINDOW, use_reference_layers
from examples.tiny_reasoner.tasks import EFFORTS, FAMILIES, Effort
from examples.tiny_reasoner.tokenizer import IDS, PAD_ID, RETURN_ID, render_question, render_system

MAX_NEW_TOKENS = 120
FINAL = (IDS["final"], IDS["<|message|>"])
WORDS = {index: word for word, index in IDS.items()}


@dataclass(frozen=True)
class Score:
    """Accuracy in percent and mean generated tokens over one cell or several."""

    accuracy: float
    tokens: float


def final_text(generated: Sequence[int]) -> str:
    """The words of the final channel; empty when the answer never ends or has no final channel."""
    if RETURN_ID not in generated:
        return ""
    ids = list(generated[: list(generated).index(RETURN_ID)])
    starts = [index + 2 for index in range(len(ids) - 1) if tuple(ids[index : index + 2]) == FINAL]
    return " ".join(WORDS[token] for token in ids[starts[-1] :]) if starts else ""


@torch.no_grad()
def generate(model: GptOssForCausalLM, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Greedy continuations up to and including `<|return|>`."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[PAD_ID] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    output = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=MAX_NEW_TOKENS, do_sample=False,
        eos_token_id=RETURN_ID, pad_token_id=PAD_ID,
    )  # fmt: skip
    continuations = output[:, width:].tolist()
    return [row[: row.index(RETURN_ID) + 1] if RETURN_ID in row else row for row in continuations]


def score_cell(model: GptOssForCausalLM, rows: Sequence[dict[str, object]], effort: Effort, batch: int) -> Score:
    """One family at one effort."""
    prompts = [(render_system(effort) + render_question(str(row["prompt"][0]["content"]))).ids for row in rows]  # type: ignore[index]
    outputs: list[list[int]] = []
    for start in range(0, len(prompts), batch):
        outputs += generate(model, prompts[start : start + batch])
    right = sum(final_text(output) == row["answer"] for output, row in zip(outputs, rows, strict=True))
    return Score(100 * right / len(rows), sum(map(len, outputs)) / len(rows))


def mean_score(cells: Sequence[Score]) -> Score:
    """Every family counts the same."""
    count = len(cells)
    return Score(sum(cell.accuracy for cell in cells) / count, sum(cell.tokens for cell in cells) / count)


def score_suite(
    model: GptOssForCausalLM,
    rows: Sequence[dict[str, object]],
    efforts: Sequence[Effort],
    families: Sequence[str] = FAMILIES,
    batch: int = 100,
) -> dict[str, dict[str, Score]]:
    """Scores by effort, then family, with their `mean`."""
    use_reference_layers(model)
    model.eval()
    scores: dict[str, dict[str, Score]] = {}
    for effort in efforts:
        by_family = {family: [row for row in rows if row["task"] == family] for family in families}
        cells = {family: score_cell(model, chosen, effort, batch) for family, chosen in by_family.items()}
        scores[effort] = cells | {"mean": mean_score(list(cells.values()))}
    return scores


def narrow_windows(model: GptOssForCausalLM, window: int = WINDOW) -> None:
    """The ablation: give every layer the sliding window."""
    model.config.layer_types = ["sliding_attention"] * model.config.num_hidden_layers
    for layer in model.model.layers:
        layer.self_attn.layer_type = "sliding_attention"
        layer.self_attn.sliding_window = window


def read_rows(path: Path, per_family: int | None = None) -> list[dict[str, object]]:
    """The test rows, or the first few of each family."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    chosen = [[row for row in rows if row["task"] == family][:per_family] for family in FAMILIES]
    return [row for family_rows in chosen for row in family_rows]


def load_parent(path: Path) -> GptOssForCausalLM:
    """The stored checkpoint in float32; transformers de-quantises experts to BF16 whatever `dtype` says (exactly)."""
    model: GptOssForCausalLM = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).float()
    return model


def rounded(scores: dict[str, dict[str, Score]]) -> dict[str, dict[str, dict[str, float]]]:
    """Scores as plain numbers with two decimals."""
    return {
        effort: {name: {key: round(value, 2) for key, value in asdict(cell).items()} for name, cell in cells.items()}
        for effort, cells in scores.items()
    }


def main() -> None:
    """Print the scores of one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(__file__).parent / "parent")
    parser.add_argument("--data", type=Path, default=Path(__file__).parent / "data" / "test.jsonl")
    parser.add_argument("--efforts", nargs="+", choices=EFFORTS, default=list(EFFORTS))
    parser.add_argument("--per-family", type=int, help="only the first problems of each family")
    parser.add_argument("--all-windows", action="store_true", help="ablation: every layer sees the sliding window only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = load_parent(arguments.model)
    if arguments.all_windows:
        narrow_windows(model)
    rows = read_rows(arguments.data, arguments.per_family)
    print(json.dumps(rounded(score_suite(model, rows, arguments.efforts)), indent=2))


if __name__ == "__main__":
    main()
