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
    assert reward(RIGHT, num_tokens=20) == Reward(1.0, 0.25, pytest.approx(-0.25))
    assert reward(RIGHT, num_tokens=40).total == pytest.approx(1 + 0.25 - 0.375)
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


@st.composite
def allowed_configs(draw: st.DrawFn) -> RewardConfig:
    correct, length = draw(st.floats(0.125, 4)), draw(st.floats(0, 0.9375))
    return RewardConfig(correct=correct, length=length, format=draw(st.floats(0, correct * (1 - length))))


configs = allowed_configs()


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
        assert found.length == 0


@given(right=lengths, wrong=lengths, config=configs)
def test_a_right_reply_always_earns_more_than_a_wrong_one(right: int, wrong: int, config: RewardConfig) -> None:
    """However long it is, and even if it is malformed and the wrong one is not."""
    malformed = reward("noise " + WRONG.replace("5", "4"), right, config=config)
    assert malformed.total > reward(WRONG, wrong, config=config).total or malformed.total == pytest.approx(
        config.format
    )
    assert reward(RIGHT, right, config=config).total > reward(WRONG, wrong, config=config).total


def test_at_four_times_the_parents_length_a_right_reply_is_still_preferred() -> None:
    """Advantages of a group of one right and long reply and three wrong ones: 1.5 / sqrt(3) and -0.5 / sqrt(3) here."""
    config = RewardConfig(length=0.5)
    group = [reward(RIGHT, 40, config=config).total, *[reward(WRONG, 10, config=config).total] * 3]
    mean = sum(group) / 4
    assert group[0] - mean > 0 > group[1] - mean
    assert group[0] == pytest.approx(1 - 0.5 * 0.75)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"length": 1.0}, "less than 1"),
        ({"format": 0.6, "length": 0.5}, "lower format or length"),
        ({"correct": 0}, "0"),
    ],
)
def test_rewards_that_could_prefer_a_wrong_reply_are_refused(values: dict[str, float], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        RewardConfig.model_validate(values)
