"""Our prompts as NeMo-RL's data: a row of the file it reads, and what it trains on for that row.

NeMo-RL's own processors render every row alike; here each has its own reasoning effort, rendered by the same function
as in an evaluation. A row is kept whole in ``extra_env_info``, which NeMo-RL hands to the environment with the reply.
"""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from moesaic.data.problems import Message, Problem, render_prompt


def prompt_row(problem: Problem, effort: str, reference_tokens: float) -> dict[str, Any]:
    """One line of the prompts file; NeMo-RL leaves rows alone that have ``messages``.

    Args:
        problem: what is asked.
        effort: the reasoning effort to ask for.
        reference_tokens: the parent's mean reply length on that task at that effort.
    """
    return {
        "messages": [{"role": message.role, "content": message.content} for message in problem.prompt],
        "id": problem.id,
        "task": problem.task,
        "answer": problem.answer,
        "verifier": problem.verifier,
        "effort": effort,
        "reference_tokens": reference_tokens,
    }


def problem_of(row: Mapping[str, Any]) -> Problem:
    """The problem that a row was made of."""
    messages = tuple(Message(message["role"], message["content"]) for message in row["messages"])
    return Problem(row["id"], row["task"], messages, row["answer"], row["verifier"])


def process(
    datum_dict: Mapping[str, Any],
    task_data_spec: object,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int | None,
    idx: int,
) -> dict[str, Any]:
    """What NeMo-RL trains on for a row: its ``DatumSpec`` (nemo_rl/data/interfaces.py).

    Args:
        datum_dict: the row, with the ``task_name`` that NeMo-RL adds.
        task_data_spec: unused: our prompts need no prompt file.
        tokenizer: of the model.
        max_seq_length: a longer prompt is not trained on; there is none if the config was rendered from these rows.
        idx: the row's place in the set.
    """
    ids = render_prompt(problem_of(datum_dict), tokenizer, datum_dict["effort"])
    fits = max_seq_length is None or len(ids) <= max_seq_length
    kept = ids if fits else ids[:max_seq_length]
    row = {key: value for key, value in datum_dict.items() if key != "task_name"}
    return {
        "message_log": [{"role": "user", "content": tokenizer.decode(kept), "token_ids": torch.tensor(kept)}],
        "length": len(kept),
        "extra_env_info": row,
        "loss_multiplier": 1.0 if fits else 0.0,
        "idx": idx,
        "task_name": datum_dict["task_name"],
    }
