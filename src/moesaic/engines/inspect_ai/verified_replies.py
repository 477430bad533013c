"""The task, as inspect-ai reads it from this file; it runs in inspect-ai's own environment, which has no torch.

Prompts are token ids, so that every server reads the same ones whatever it would make of a chat. Of Moesaic only the
verifiers are imported, from behind all packages of that environment.
"""

import json
import sys
from pathlib import Path
from typing import Any

from inspect_ai import Epochs, Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ChatMessageUser, GenerateConfig
from inspect_ai.scorer import CORRECT, INCORRECT, Score, Scorer, Target, accuracy, grouped, scorer
from inspect_ai.solver import Generate, Solver, TaskState, solver

sys.path.append(str(Path(__file__).parents[3]))

from moesaic.verifiers import get_verifier, split_reply


@task
def verified_replies(request: str) -> Task:
    """The problems of one effort.

    Args:
        request: a JSON file, see :class:`moesaic.engines.inspect_ai.asking.Inspect`.
    """
    asked = json.loads(Path(request).read_text())
    return Task(
        dataset=MemoryDataset([_sample(question) for question in asked["questions"]]),
        solver=seeded_reply(),
        scorer=verified(),
        epochs=Epochs(asked["epochs"], "mean"),
        config=GenerateConfig(**asked["generation"]),
        name=asked["name"],
    )


def _sample(question: dict[str, Any]) -> Sample:
    prompt = ChatMessageUser(content=question["text"], metadata={"prompt_token_ids": question["prompt_ids"]})
    metadata = {name: question[name] for name in ("task", "verifier", "seeds")}
    return Sample(id=question["id"], input=[prompt], target=question["answer"], metadata=metadata)


@solver
def seeded_reply() -> Solver:
    """One reply, drawn with a seed that only this problem has, and only in this epoch."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        return await generate(state, seed=state.metadata["seeds"][state.epoch - 1])

    return solve


@scorer(metrics=[grouped(accuracy(), "task")])
def verified() -> Scorer:
    """Whether a whole reply's final channel is the answer."""

    async def score(state: TaskState, target: Target) -> Score:
        final = split_reply(state.output.completion).final
        is_whole = state.output.stop_reason == "stop"
        verify = get_verifier(state.metadata["verifier"])
        correct = is_whole and final is not None and verify(final, target.text)
        return Score(value=CORRECT if correct else INCORRECT, answer=final)

    return score
