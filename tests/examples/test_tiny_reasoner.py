"""The tiny reasoner: tasks checked by other means, rendering, fast layers against eager ones, recipe, parent."""

import json
import random
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import GptOssForCausalLM

from examples.tiny_reasoner import datasets, export, fast_layers, record, suite, tasks, train
from examples.tiny_reasoner.model import build_model, reasoner_config, use_fast_layers, use_reference_layers
from examples.tiny_reasoner.optimizer import orthogonalize
from examples.tiny_reasoner.quantized import stored_value, stored_weights
from examples.tiny_reasoner.rows import Curriculum, echo_rows, far_rows, short_rows
from examples.tiny_reasoner.suite import EFFORTS
from examples.tiny_reasoner.tasks import SUITE, Problem
from examples.tiny_reasoner.tokenizer import (
    IDS,
    build_tokenizer,
    render_question,
    render_system,
    render_turns,
)
from examples.tiny_reasoner.vocabulary import words
from moesaic.data.chat import load_tokenizer
from moesaic.data.problems import first_of_each_task, read_problems
from moesaic.models.whole_model import load_model
from tests.closeness import assert_near

EXAMPLE = Path(train.__file__).parent
PARENT, DATA = EXAMPLE / "parent", EXAMPLE / "data"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def problems(family: str, count: int = 40) -> list[Problem]:
    rng = random.Random(7)
    return [SUITE.draw_problem(rng, family, "train") for _ in range(count)]


def solve_add(question: str) -> str:
    first, second = question.removeprefix("add ").split(" + ")
    return " ".join(str(int(first.replace(" ", "")) + int(second.replace(" ", ""))))


def solve_chain(question: str) -> str:
    start, *steps = re.split(r" \d\. ", question.removeprefix("chain "))
    expression = start
    for step in steps:
        expression = f"({expression} {step})"
    return str(eval(expression) % 10)


def solve_sort(question: str) -> str:
    return " ".join(sorted(question.split()[1:]))


def solve_logic(question: str) -> str:
    given, work = question.removeprefix("logic ").split(" ; ")
    names = given.split()
    values = {name: value.title() for name, value in zip(names[::2], names[1::2], strict=True)}
    start, *steps = re.split(r" \d\. ", work)
    expression = values[start]
    for step in steps:
        sign, *operand = step.replace("xor", "!=").split()
        operand_text = " ".join(values.get(item, item) for item in operand)
        expression = f"({expression} {sign} ({operand_text}))"
    return str(eval(expression)).lower()


def solve_far(question: str) -> str:
    context, asked = question.rsplit(" ; ", 1)
    links = dict(re.findall(r"> (\w+) (\w+)", context))
    name, hops = (asked.split()[1], 1) if asked.startswith("find") else (asked.split()[1], int(asked.split()[3]))
    for _ in range(hops):
        name = links[name]
    return name


SOLVERS = {
    "add": solve_add, "chain": solve_chain, "sort": solve_sort, "logic": solve_logic,
    "retrieve": solve_far, "hops": solve_far,
}  # fmt: skip


@pytest.mark.parametrize("family", SUITE.families)
def test_answers_follow_from_the_question(family: str) -> None:
    for problem in problems(family):
        assert SOLVERS[family](problem.question) == problem.answer


@pytest.mark.parametrize("family", SUITE.families)
def test_traces_end_in_the_answer_and_grow_with_effort(family: str) -> None:
    for problem in problems(family):
        assert problem.thinking("low") == ""
        assert len(problem.high.split()) > len(problem.medium.split()) > 0
        for trace in (problem.medium, problem.high):
            assert trace_result(family, trace) == problem.answer


def trace_result(family: str, trace: str) -> str:
    """The answer as the trace alone gives it."""
    if family == "add" and "=" not in trace:
        return " ".join(reversed(trace.split()))
    if family == "add":
        columns = [column.split() for column in trace.split(" ; ")]
        digits = [column[-1] for column in columns] + ([columns[-1][-2]] if columns[-1][-2] != "0" else [])
        return " ".join(reversed(digits))
    if family == "sort":
        last = trace.split(" ; ")[-1]
        return last.split(" : ")[1] if " : " in last else " ".join(sorted(trace.replace(";", " ").split()))
    return trace.split()[-1]


def test_every_step_of_a_chain_continues_from_the_last() -> None:
    for problem in problems("chain"):
        steps = re.findall(r"\d\. (\d) ([-+*]) (\d) = (\d)", problem.high)
        assert all(eval(f"{before} {sign} {operand}") % 10 == int(after) for before, sign, operand, after in steps)
        assert [step[3] for step in steps[:-1]] == [step[0] for step in steps[1:]]


def test_far_facts_lie_far() -> None:
    for family in ("retrieve", "hops"):
        for problem in problems(family):
            context, _asked = problem.question.rsplit(" ; ", 1)
            tokens = context.split()
            path = re.findall(r"> (\w+) \w+", problem.high)
            keys = {tokens[place + 1]: place for place, token in enumerate(tokens) if token == ">"}
            assert path and 250 <= len(tokens) <= 400
            assert all(len(tokens) - keys[name] > suite.FAR_TOKENS for name in path)


@pytest.mark.parametrize("family", SUITE.families)
def test_splits_are_disjoint(family: str) -> None:
    rng = random.Random(3)
    seen = {
        split: {SUITE.draw_problem(rng, family, split).identity for _ in range(150)}
        for split in ("train", "calibration", "test")
    }
    assert (
        not seen["train"] & seen["test"]
        and not seen["train"] & seen["calibration"]
        and not seen["calibration"] & seen["test"]
    )


def test_same_sum_in_other_order_stays_in_its_split() -> None:
    rng = random.Random(5)
    for problem in (tasks.add_problem(rng, 1.0) for _ in range(50)):
        first, second = problem.question.removeprefix("add ").replace(" ", "").split("+")
        assert problem.identity == "+".join(sorted((first, second), key=int))


@pytest.mark.parametrize("effort", EFFORTS)
def test_template_equals_the_training_renderer(effort: suite.Effort) -> None:
    tokenizer = build_tokenizer()
    turns = [SUITE.draw_problem(random.Random(seed), family, "train") for seed, family in enumerate(SUITE.families)]
    messages = [message for problem in turns for message in (
        {"role": "user", "content": problem.question},
        {"role": "assistant", "thinking": problem.thinking(effort), "content": problem.answer},
    )]  # fmt: skip
    ids = tokenizer.apply_chat_template(messages, reasoning_effort=effort, return_dict=False)
    rng = random.Random(0)
    assert ids == list(render_turns([(problem, problem.trace(effort, rng)) for problem in turns], effort).ids)
    prompt = tokenizer.apply_chat_template(
        messages[:1], reasoning_effort=effort, add_generation_prompt=True, return_dict=False
    )
    assert prompt == list((render_system(effort) + render_question(turns[0].question)).ids)
    assert tokenizer.unk_token_id not in ids


def test_template_defaults_to_medium_and_refuses_system_messages() -> None:
    tokenizer = build_tokenizer()
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "sort b a"}], tokenize=False, add_generation_prompt=True
    )
    assert (
        text
        == "<|start|>system<|message|>Reasoning: medium<|end|><|start|>user<|message|>sort b a<|end|><|start|>assistant"
    )
    with pytest.raises(Exception, match="reasoning_effort"):
        tokenizer.apply_chat_template([{"role": "system", "content": "true"}], tokenize=False)


def test_vocabulary_is_256_distinct_words() -> None:
    assert len(words()) == len(set(words())) == len(IDS) == 256
    assert build_tokenizer().eos_token_id == IDS["<|return|>"]


@pytest.fixture(scope="module")
def lively_model() -> GptOssForCausalLM:
    """Weights large enough that sinks, windows and the gate's clamps all matter."""
    model = build_model(reasoner_config(), 0, "cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.2)
    return model


def outputs_and_gradients(model: GptOssForCausalLM, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    logits = model(input_ids=ids, use_cache=False).logits
    logits.square().mean().backward()
    return logits.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_fast_layers_equal_eager_ones(lively_model: GptOssForCausalLM) -> None:
    ids = torch.randint(0, 256, (2, 2 * fast_layers.QUERY_BLOCK), generator=torch.Generator().manual_seed(1))
    use_reference_layers(lively_model)
    expected, expected_gradients = outputs_and_gradients(lively_model, ids)
    use_fast_layers(lively_model)
    found, gradients = outputs_and_gradients(lively_model, ids)
    assert_near(found, expected, 2e-4)  # ten times ROUNDING: logits here are sums of larger terms, as weights are large
    for name, gradient in expected_gradients.items():
        assert (gradients[name] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-9, name


@pytest.mark.parametrize("packed", [False, True])
def test_the_flash_kernel_computes_the_definition(packed: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    inputs = [torch.randn(2, 3, 12, 8, generator=generator) for _ in range(3)] + [torch.randn(3, generator=generator)]
    documents = torch.tensor([[0] * 5 + [1] * 7, [0] * 12])
    mask = fast_layers.causal_mask(documents) if packed else None
    found = []
    for attend in (fast_layers.SinkAttention.apply, fast_layers.plain_sink_attention):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        output = attend(*leaves, mask, 0.3)
        found.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    for flash, plain in zip(*found, strict=True):
        assert_near(flash, plain)


def test_window_attention_needs_whole_blocks() -> None:
    query = torch.zeros(1, 1, fast_layers.QUERY_BLOCK + 1, 4)
    with pytest.raises(ValueError, match="multiple"):
        fast_layers.window_attention(
            query, query, query, torch.zeros(1), 1.0, 8, torch.zeros(1, query.shape[2], dtype=torch.long)
        )


def test_packed_conversations_do_not_see_each_other(lively_model: GptOssForCausalLM) -> None:
    rows = short_rows(random.Random(0), Curriculum(SUITE), 256)
    use_fast_layers(lively_model)
    packed, _ = train.learnt_loss(lively_model, rows)
    use_reference_layers(lively_model)
    alone = 0.0
    num_rows, most = len(rows.ids), int(rows.documents.max()) + 1
    for row, number in product(range(num_rows), range(most)):
        own = rows.documents[row] == number
        ids, labels = rows.ids[row, own], rows.labels[row, own]
        if not len(ids):
            continue
        logits = lively_model(input_ids=ids.unsqueeze(0)).logits[0]
        alone += (
            float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").detach())
            if (labels >= 0).any()
            else 0.0
        )
    assert float(packed.detach()) == pytest.approx(alone, rel=1e-4)


def test_orthogonalize_keeps_directions_and_evens_lengths() -> None:
    stack = torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(2))
    values = torch.linalg.svdvals(orthogonalize(stack, 5))
    assert values.min() > 0.3 and values.max() < 1.4
    single = orthogonalize(stack[1], 5)
    assert_near(orthogonalize(stack, 5)[1], single)


def test_stored_weights_are_temporary(lively_model: GptOssForCausalLM) -> None:
    before = lively_model.lm_head.weight.clone()
    with stored_weights(lively_model):
        assert torch.equal(lively_model.lm_head.weight, before.to(torch.bfloat16).float())
    assert torch.equal(lively_model.lm_head.weight, before)


def test_rows_carry_loss_on_answers_only() -> None:
    rng, curriculum = random.Random(4), Curriculum(SUITE)
    for rows in (short_rows(rng, curriculum, 512), far_rows(rng, curriculum, 512), echo_rows(rng, 256)):
        predicted = torch.where(rows.labels[:, :-1] == -100, rows.labels[:, :-1], rows.ids[:, 1:])
        assert torch.equal(predicted, rows.labels[:, :-1])
        assert torch.equal(rows.turn >= 0, rows.labels != -100)
        for index, turn in enumerate(rows.turns):
            assert int((rows.turn == index).sum()) == turn.stop - turn.start
            assert rows.ids[turn.row, turn.stop - 1] == IDS["<|return|>"]


def test_committed_data_is_what_the_code_writes(tmp_path: Path) -> None:
    datasets.write_datasets(datasets.PLAN, tmp_path)
    for name in datasets.PLAN.seeds:
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (DATA / f"{name}.jsonl").read_bytes()


def test_validation_and_test_share_no_problem() -> None:
    """Whichever way it is asked: what is added or sorted in any order, a far context whatever the question."""

    def asked(name: str) -> list[tuple[str, ...]]:
        rows = [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text().splitlines()]
        return [same_problem(row["task"], row["prompt"][0]["content"]) for row in rows]

    def same_problem(family: str, question: str) -> tuple[str, ...]:
        if family in ("retrieve", "hops"):
            return family, question.rsplit(" ; ", 1)[0]
        parts = question.removeprefix(f"{family} ").split(" + " if family == "add" else " ")
        return family, *(sorted(parts) if family in ("add", "sort") else parts)

    validation, test = asked("validation"), asked("test")
    assert len(validation) == datasets.PLAN.num_validation * len(SUITE.families)
    assert not set(validation) & {*test, *asked("prompts")}


def test_committed_rows_fit_their_lengths() -> None:
    tokenizer = build_tokenizer()
    for name, shortest, longest in (("calibration_short", 1, 256), ("calibration_long", 350, 512)):
        for line in (DATA / f"{name}.jsonl").read_text().splitlines():
            row = json.loads(line)
            ids = tokenizer.apply_chat_template(row["messages"], reasoning_effort=row["effort"], return_dict=False)
            assert shortest <= len(ids) <= longest, row["id"]
    test_tasks = [json.loads(line)["task"] for line in (DATA / "test.jsonl").read_text().splitlines()]
    assert all(test_tasks.count(family) == datasets.PLAN.num_test for family in SUITE.families)


def test_parent_is_stored_as_gpt_oss_is() -> None:
    index = json.loads((PARENT / "model.safetensors.index.json").read_text())["weight_map"]
    dtypes = {}
    for file in set(index.values()):
        with safe_open(PARENT / file, "pt") as shard:
            dtypes |= {name: shard.get_tensor(name).dtype for name in shard.keys()}  # noqa: SIM118
    prefix = "model.layers.0.mlp.experts"
    packed = {f"{prefix}.{part}_{kind}" for part in ("gate_up_proj", "down_proj") for kind in ("blocks", "scales")}
    assert packed <= dtypes.keys() and f"{prefix}.gate_up_proj" not in dtypes
    for name, dtype in dtypes.items():
        assert dtype == (torch.uint8 if name.endswith(("_blocks", "_scales")) else torch.bfloat16), name
    config = json.loads((PARENT / "config.json").read_text())
    assert config["rope_parameters"]["rope_theta"] == config["rope_theta"]
    assert config["rope_scaling"]["rope_type"] == "yarn"


def test_export_loads_with_the_stored_values(tmp_path: Path, lively_model: GptOssForCausalLM) -> None:
    export.write_parent(tmp_path, reasoner_config(), lively_model.state_dict())
    loaded = load_model(tmp_path).state_dict()
    for name, value in lively_model.state_dict().items():
        assert torch.equal(loaded[name], stored_value(name, value)), name


def test_a_run_can_begin_with_a_stored_parent(tmp_path: Path) -> None:
    trainer = train.Trainer(train.Recipe(steps=2), SUITE, "cpu", tmp_path)
    trainer.begin_from(PARENT)
    weights = trainer.model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in load_model(PARENT).state_dict().items())
    assert set(trainer.curriculum.level.values()) == {1.0}


def test_parent_reasons() -> None:
    """A handful of problems at high effort, greedily: the committed weights are the trained ones."""
    chosen = first_of_each_task(read_problems(DATA / "test.jsonl"), 4)
    scores = record.score("parent", load_model(PARENT), PARENT, chosen, ["high"])
    assert scores["high"]["accuracy"] >= 0.8
    assert load_tokenizer(PARENT).chat_template == build_tokenizer().chat_template


def test_the_record_keeps_what_the_example_promises() -> None:
    promised = json.loads((DATA.parent / "record.json").read_text())["measured"]["bars"]
    assert promised["high_mean"] >= 90
    assert promised["high_minus_low"] >= 10
    assert promised["high_tokens_over_low_tokens"] >= 2
    assert promised["far_lost_without_full_attention"] >= 30
    assert promised["lost_by_storing"] < 1
