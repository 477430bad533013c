"""KV memory of gpt-oss at full size, as vLLM's own planner and manager have it; nothing else of vLLM runs."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from moesaic.core.config import CacheDtype
from moesaic.core.own_environment import own_variables
from moesaic.costs.block_costs import ELEMENT_BYTES, request_kv_bytes
from moesaic.costs.facts import Facts
from moesaic.costs.generation import Requests, generation
from moesaic.costs.hardware import Target
from moesaic.costs.hardware_tables import read_table
from moesaic.costs.kv_allocator import paid_layers
from moesaic.costs.throughput import cache_room
from moesaic.deploy.engines.vllm.environment import vllm_environment, why_unsupported
from moesaic.models.architecture import Architecture, Block
from moesaic.models.families.gpt_oss import GPT_OSS_120B, GPT_OSS_120B_BLOCKS, GPT_OSS_PUZZLE_88B_BLOCKS

PROGRAM = Path(__file__).with_name("vllm_cache_program.py")
H100 = read_table("h100")
SHORT, LONG = 2 * 4096, 2 * 65_536


def mixed(**layers: int) -> Architecture:
    """So many layers of each window, half the experts in each."""
    windows = {"full": None, "w128": 128, "w8192": 8192}
    return Architecture.of(Block(64, 4, 2880, windows[name]) for name, count in layers.items() for _ in range(count))


@dataclass(frozen=True)
class Case:
    model: Architecture
    gpus: int
    longest: int
    cache: CacheDtype

    @property
    def room(self) -> float:
        """Bytes on all GPUs."""
        return cache_room(Target(H100, GPT_OSS_120B, self.gpus, self.cache, "vllm"), self.model)

    def each(self, step_tokens: int) -> int:
        """Bytes of a request of full length."""
        return request_kv_bytes(GPT_OSS_120B, self.model, self.longest, self.cache, "vllm", step_tokens)

    @property
    def fill(self) -> bool:
        """Whether it is few enough requests for vLLM to let them in one by one."""
        return self.gpus == 1

    def question(self) -> dict[str, Any]:
        return {
            "windows": [block.window for block in self.model.blocks],
            "heads": GPT_OSS_120B.num_kv_heads // self.gpus,
            "element_bytes": ELEMENT_BYTES[self.cache],
            "longest": self.longest,
            "room": int(self.room / self.gpus),
            "step_tokens": H100.chunk_tokens,
            "fill": self.fill,
        }


NEARLY_EQUAL = mixed(full=15, w128=21)
CASES = [
    *(
        Case(model, 8, longest, cache)
        for model in (GPT_OSS_120B_BLOCKS, GPT_OSS_PUZZLE_88B_BLOCKS)
        for longest in (SHORT, LONG)
        for cache in ("bf16", "fp8")
    ),
    Case(GPT_OSS_120B_BLOCKS, 1, LONG, "fp8"),
    Case(GPT_OSS_PUZZLE_88B_BLOCKS, 1, LONG, "fp8"),
    Case(GPT_OSS_PUZZLE_88B_BLOCKS, 1, SHORT, "fp8"),
    Case(NEARLY_EQUAL, 1, SHORT, "bf16"),
    Case(NEARLY_EQUAL, 1, LONG, "fp8"),
    Case(mixed(full=9, w8192=9, w128=18), 1, LONG, "bf16"),
    Case(mixed(w8192=16, w128=20), 1, LONG, "fp8"),
]


@pytest.fixture(scope="module")
def answers() -> list[dict[str, Any]]:
    done = subprocess.run(
        [vllm_environment().find_program(), str(PROGRAM)],
        input=json.dumps([case.question() for case in CASES]),
        env=own_variables() | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(why_unsupported() is not None, reason=str(why_unsupported())),
]


def test_layers_are_paid_for_in_vllms_groups(answers: list[dict[str, Any]]) -> None:
    for case, answer in zip(CASES, answers, strict=True):
        groups = answer["groups"]
        assert sum(paid_layers("vllm", case.model.layouts).values()) == len(groups) * max(groups)


def test_a_plan_has_the_requests_that_vllm_says_it_holds_when_it_starts(answers: list[dict[str, Any]]) -> None:
    for case, answer in zip(CASES, answers, strict=True):
        assert case.room / case.each(H100.chunk_tokens) == pytest.approx(answer["promised"], rel=0.001)
        target = Target(H100, GPT_OSS_120B, case.gpus, case.cache, "vllm")
        facts = Facts(GPT_OSS_120B, case.model, True, case.model, target)
        asked = Requests(10**6, case.longest, "vllm", "bfloat16", case.cache, case.gpus)
        assert generation("evaluate", facts, case.model, asked).requests == min(
            int(answer["promised"]), H100.max_requests
        )


def test_requests_in_flight_pay_for_a_steps_tokens_once(answers: list[dict[str, Any]]) -> None:
    """Where each grows to full length before the next, vLLM lets in as many as fit with one prompt being read."""
    filled = [(case, answer) for case, answer in zip(CASES, answers, strict=True) if case.fill]
    expected = [1 + int((case.room - case.each(H100.chunk_tokens)) / case.each(1)) for case, _ in filled]
    assert [answer["held"] for _, answer in filled] == expected
    released = [answer for case, answer in filled if case.model == GPT_OSS_PUZZLE_88B_BLOCKS]
    assert [(int(answer["promised"]), answer["held"]) for answer in released] == [(7, 9), (54, 105)]
