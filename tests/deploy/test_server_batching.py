"""The batcher: replies that join and leave a running batch are those generated alone."""

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from moesaic.deploy.server import batching
from moesaic.deploy.server.batching import Batcher, Closed, Event, Full, Reply
from moesaic.deploy.server.limits import ServerLimits
from moesaic.deploy.server.replies import Piece
from moesaic.deploy.server.sampling import SamplingParams
from moesaic.models.generation import Decoding, Sampling, generate
from moesaic.models.whole_model import load_model
from tests.closeness import assert_same_replies

STOPS = frozenset(range(5, 13))


class Numbers:
    """A writer that shows every token as its number."""

    stopped = False

    def add(self, token: int, may_stop: bool) -> list[Piece]:
        return [Piece("text", str(token))]

    def finish(self) -> list[Piece]:
        return []


class Collected:
    """What the batcher hands out, and a way to wait for it."""

    def __init__(self) -> None:
        self.tokens: dict[Reply, list[int]] = {}
        self.finishes: dict[Reply, str] = {}
        self._changed = threading.Condition()

    def __call__(self, events: Sequence[tuple[Reply, Event]]) -> None:
        with self._changed:
            for reply, event in events:
                self.tokens.setdefault(reply, []).extend(int(piece.text) for piece in event.pieces)
                if event.finish is not None:
                    self.finishes[reply] = event.finish
            self._changed.notify_all()

    def wait(self, done: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(done, timeout=60)

    def wait_for_all(self, replies: Sequence[Reply]) -> None:
        self.wait(lambda: all(reply in self.finishes for reply in replies))


@pytest.fixture(scope="module")
def model(tiny_parent: Path) -> PreTrainedModel:
    return load_model(tiny_parent)


@pytest.fixture
def collected() -> Collected:
    return Collected()


@pytest.fixture
def start(model: PreTrainedModel, collected: Collected) -> Iterator[Callable[..., Batcher]]:
    batchers: list[Batcher] = []

    def started(**limits: int) -> Batcher:
        batchers.append(Batcher(model, ServerLimits(**{"max_context": 512, **limits})))
        batchers[-1].start(collected)
        return batchers[-1]

    yield started
    for batcher in batchers:
        batcher.abort()


def ask(prompt: Sequence[int], **sampling: Any) -> Reply:
    return Reply(
        prompt, SamplingParams(**{"max_tokens": 12, "temperature": 0.0, "stop_ids": STOPS, **sampling}), Numbers()
    )


def draw_prompts(count: int) -> list[list[int]]:
    generator = random.Random(1)
    return [[generator.randrange(20, 64) for _ in range(generator.randint(1, 40))] for _ in range(count)]


@pytest.mark.parametrize("limits", [{}, {"max_batch": 3}, {"max_cache_tokens": 120}])
def test_greedy_replies_are_those_generated_alone(
    start: Callable[..., Batcher], collected: Collected, model: PreTrainedModel, limits: dict[str, int]
) -> None:
    prompts = draw_prompts(16)
    batcher = start(**limits)
    replies = [ask(prompt) for prompt in prompts]
    for reply in replies:
        batcher.submit([reply])
        collected.wait(lambda reply=reply: len(collected.tokens) > replies.index(reply) // 3)
    collected.wait_for_all(replies)
    alone = [generate(model, [prompt], Sampling(12, STOPS), 1)[0] for prompt in prompts]
    tokens = [collected.tokens[reply] for reply in replies]
    assert_same_replies(model, prompts, tokens, [one.token_ids for one in alone])
    ends = ["stop" if mine[-1] in STOPS else "length" for mine in tokens]
    assert [collected.finishes[reply] for reply in replies] == ends and set(ends) == {"stop", "length"}
    assert batcher.num_generated == sum(map(len, tokens))
    assert batcher.finished == {
        reason: list(collected.finishes.values()).count(reason) for reason in ("stop", "length")
    }
    assert batcher.is_idle


def test_sampled_replies_depend_on_their_seed_and_not_on_their_batch(
    start: Callable[..., Batcher], collected: Collected
) -> None:
    prompts = draw_prompts(6)
    sampling = {"temperature": 1.0, "top_p": 0.9, "stop_ids": frozenset()}
    together = [ask(prompt, seed=str(place), **sampling) for place, prompt in enumerate(prompts)]
    again = [ask(prompt, seed=str(place), **sampling) for place, prompt in enumerate(prompts)]
    other = [ask(prompt, seed="x", **sampling) for prompt in prompts]
    start().submit([*together, *other])
    start(max_batch=1).submit(again)
    collected.wait_for_all([*together, *again, *other])
    tokens = [[collected.tokens[reply] for reply in replies] for replies in (together, again, other)]
    assert tokens[0] == tokens[1]
    assert all(one != another for one, another in zip(tokens[0], tokens[2], strict=True))


def test_a_reply_is_as_long_as_it_was_asked_to_be(start: Callable[..., Batcher], collected: Collected) -> None:
    prompts = draw_prompts(12)
    endless = [ask(prompt, stop_ids=frozenset(), max_tokens=20) for prompt in prompts]
    least = [ask(prompt, min_tokens=10, max_tokens=20) for prompt in prompts]
    start().submit([*endless, *least])
    collected.wait_for_all([*endless, *least])
    assert {len(collected.tokens[reply]) for reply in endless} == {20}
    assert all(not STOPS & set(collected.tokens[reply][:10]) for reply in least)
    lengths = {len(collected.tokens[reply]) for reply in least}
    assert min(lengths) > 10 and len(lengths) > 1


def test_a_cancelled_reply_leaves_its_place_to_the_next(start: Callable[..., Batcher], collected: Collected) -> None:
    batcher = start(max_batch=1)
    first, second, third = (ask([30], stop_ids=frozenset(), max_tokens=limit) for limit in (500, 500, 5))
    batcher.submit([first, second, third])
    collected.wait(lambda: len(collected.tokens.get(first, [])) > 2)
    assert (batcher.num_running, batcher.num_waiting) == (1, 2)
    batcher.cancel([first, second])
    collected.wait_for_all([third])
    assert collected.finishes == {third: "length"}
    assert second not in collected.tokens
    assert batcher.finished == {"cancelled": 2, "length": 1}


def test_the_queue_is_bounded_and_takes_all_or_none(start: Callable[..., Batcher], collected: Collected) -> None:
    batcher = start(max_batch=1, max_waiting=2)
    running = ask([30], stop_ids=frozenset(), max_tokens=500)
    batcher.submit([running])
    collected.wait(lambda: running in collected.tokens)
    batcher.submit([ask([31])])
    with pytest.raises(Full):
        batcher.submit([ask([32]), ask([33])])
    batcher.submit([ask([34])])
    assert batcher.num_waiting == 2


def test_a_closed_batcher_finishes_what_it_has(start: Callable[..., Batcher], collected: Collected) -> None:
    batcher = start(max_batch=1)
    replies = [ask([30 + place], stop_ids=frozenset()) for place in range(3)]
    batcher.submit(replies)
    batcher.close()
    with pytest.raises(Closed):
        batcher.submit([ask([30])])
    collected.wait_for_all(replies)
    assert set(collected.finishes.values()) == {"length"}


def test_an_aborted_batcher_tells_every_reply(start: Callable[..., Batcher], collected: Collected) -> None:
    batcher = start(max_batch=1)
    replies = [ask([30], stop_ids=frozenset(), max_tokens=500) for _ in range(2)]
    batcher.submit(replies)
    collected.wait(lambda: replies[0] in collected.tokens)
    batcher.abort()
    assert collected.finishes == dict.fromkeys(replies, "closed")


def test_a_failed_step_ends_its_replies_and_not_the_engine(
    start: Callable[..., Batcher], collected: Collected, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(Decoding):
        def __init__(self, *args: Any) -> None:
            raise RuntimeError("out of memory")

    batcher = start()
    with monkeypatch.context() as broken:
        broken.setattr(batching, "read_prompts", Broken)
        lost = ask([30])
        batcher.submit([lost])
        collected.wait_for_all([lost])
    well = ask([30])
    batcher.submit([well])
    collected.wait_for_all([well])
    assert collected.finishes[lost] == "failed"
    assert collected.finishes[well] in ("stop", "length")
