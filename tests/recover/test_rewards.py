"""Rewards by hand, and the properties every reward has."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.data.verifiers import split_reply
from moesaic.recover.reinforce.rewards import Reward, grade_reply, is_well_formed
from moesaic.recover.reinforce.stage import RewardConfig

RIGHT = "<|channel|>analysis<|message|>2 and 2<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>"
WRONG = "<|channel|>final<|message|>5<|return|>"
CONFIG = RewardConfig(correct=1.0, format=0.25, length=0.5)


def reward(text: str, num_tokens: int = 10, truncated: bool = False, config: RewardConfig = CONFIG) -> Reward:
    correct = not truncated and split_reply(text).final == "4"
    return grade_reply(text, num_tokens, truncated, correct, 10.0, config).reward


def test_parts_by_hand() -> None:
    assert reward(RIGHT) == Reward(correct=1.0, format=0.25, length=0.0)
    assert reward(RIGHT, num_tokens=5) == Reward(1.0, 0.25, 0.0), "shorter than the parent earns no more"
    assert reward(RIGHT, num_tokens=14) == Reward(1.0, 0.25, pytest.approx(-0.2))
    assert reward(RIGHT, num_tokens=14).total == pytest.approx(1.05)
    assert reward(WRONG, num_tokens=14) == Reward(0.0, 0.25, 0.0)
    assert reward("<|message|>4<|return|>") == Reward(0.0, 0.0, 0.0)
    assert reward("4") == Reward(0.0, 0.0, 0.0)


def test_a_right_answer_in_a_malformed_reply_is_right_and_malformed() -> None:
    assert reward("noise " + WRONG.replace("5", "4")) == Reward(1.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (RIGHT, True),
        (WRONG, True),
        (" <|channel|> final <|message|> w1 <|return|> ", True),
        ("<|channel|>final<|message|><|return|>", True),
        ("<|channel|>commentary to=user<|message|>so<|end|><|start|>assistant" + WRONG, True),
        ("<|channel|>final<|message|>4", False),
        ("<|channel|>analysis<|message|>4<|return|>", False),
        ("<|channel|>analysis<|message|>2<|end|>" + WRONG, False),
        ("<|channel|>analysis<|channel|>final<|message|>4<|return|>", False),
        (WRONG + "4", False),
        (WRONG + "<|start|>assistant" + WRONG, False),
        ("<|channel|>final<|message|>4<|message|>4<|return|>", False),
        ("4", False),
        ("", False),
    ],
)
def test_the_form_of_a_reply(text: str, expected: bool) -> None:
    assert is_well_formed(text) is expected


texts = st.sampled_from([RIGHT, WRONG, "4", ""])
lengths = st.integers(1, 10_000)
configs = st.builds(RewardConfig, correct=st.floats(0, 4), format=st.floats(0, 4), length=st.floats(0, 4))


@given(text=texts, num_tokens=lengths, config=configs)
def test_a_truncated_reply_earns_nothing(text: str, num_tokens: int, config: RewardConfig) -> None:
    assert reward(text, num_tokens, truncated=True, config=config).total == 0


@given(text=texts, shorter=lengths, further=lengths, config=configs)
def test_a_longer_reply_never_earns_more(text: str, shorter: int, further: int, config: RewardConfig) -> None:
    assert reward(text, shorter + further, config=config).total <= reward(text, shorter, config=config).total


@given(text=texts, num_tokens=lengths, config=configs)
def test_bounds(text: str, num_tokens: int, config: RewardConfig) -> None:
    found = reward(text, num_tokens, config=config)
    assert found.length <= 0 <= found.correct
    assert found.total <= config.correct + config.format
    if not found.correct:
        assert found.length == 0 or config.correct == 0
