"""The thirteen families and the model they train: what the trainer of `examples.tiny_reasoner` is given."""

import random
from collections.abc import Callable

from transformers import GptOssConfig

from examples.reasoner.arithmetic import (
    add_problem,
    chain_problem,
    compare_problem,
    logic_problem,
    mul_problem,
    sort_problem,
)
from examples.reasoner.far import FAR_FAMILIES, far_context, far_question
from examples.reasoner.problem import Problem
from examples.reasoner.search import path_problem, solve_problem, subset_problem
from examples.tiny_reasoner.model import reasoner_config
from examples.tiny_reasoner.suite import Suite

MAKERS: dict[str, Callable[[random.Random, float], Problem]] = {
    "add": add_problem,
    "mul": mul_problem,
    "chain": chain_problem,
    "logic": logic_problem,
    "sort": sort_problem,
    "compare": compare_problem,
    "subset": subset_problem,
    "path": path_problem,
    "solve": solve_problem,
}


def short_problem(rng: random.Random, family: str, level: float) -> Problem:
    """A problem of one of the short families."""
    return MAKERS[family](rng, level)


def config() -> GptOssConfig:
    """10 layers of 24 experts, 4 of them for each token: 8.5M parameters, of which 2M work on a token."""
    return reasoner_config(num_layers=10, hidden=160, num_experts=24, top_k=4)


SUITE = Suite(
    name="reasoner",
    short=tuple(MAKERS),
    far=FAR_FAMILIES,
    make_short=short_problem,
    make_context=far_context,
    make_question=far_question,
    num_facts=(20, 28),
    loss_share={"low": 0.05, "medium": 0.25, "high": 0.70},
    config=config,
)
