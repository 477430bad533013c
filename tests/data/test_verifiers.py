"""Channels of replies, well formed and not, and the verifiers of final answers."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.core.errors import ConfigError
from moesaic.data import verifiers
from moesaic.data.verifiers import VERIFIERS, Reply, get_verifier, split_reply

THINKING = "<|channel|>analysis<|message|>3 + 4 = 7<|end|><|start|>assistant"


@pytest.mark.parametrize(
    ("text", "reply"),
    [
        (THINKING + "<|channel|>final<|message|>7<|return|>", Reply("3 + 4 = 7", "7")),
        ("<|channel|> final <|message|> 1 2 <|return|>", Reply(None, "1 2")),
        ("<|channel|>final <|constrain|>json<|message|>{}<|return|>", Reply(None, "{}")),
        (THINKING + "<|channel|>final<|message|>7", Reply("3 + 4 = 7", None)),
        ("<think>\n3 + 4 = 7\n</think>\n\n7<|im_end|>", Reply("3 + 4 = 7", "7")),
        ("7<|im_end|>", Reply(None, "7")),
        ("<think>3 + 4 = 7</think>\n7<|user|>", Reply("3 + 4 = 7", "7")),
        ("<think>\n3 + 4 = 7\n</think>\n\n7", Reply(None, None)),
        (THINKING, Reply("3 + 4 = 7", None)),
        ("<|channel|>analysis<|message|>3 + 4", Reply(None, None)),
        ("<|channel|>final<|return|>", Reply(None, None)),
        ("<|message|>7<|return|>", Reply(None, None)),
        ("<|channel|><|message|>7<|return|>", Reply(None, None)),
        ("<|channel|>final<|message|><|return|>", Reply(None, "")),
        ("7<|return|>", Reply(None, None)),
        ("", Reply(None, None)),
        ("<|channel|>final<|message|>7<|end|><|channel|>final<|message|>8<|end|>", Reply(None, "7")),
    ],
)
def test_channels(text: str, reply: Reply) -> None:
    assert split_reply(text) == reply


def test_exact_match_ignores_white_space_only() -> None:
    verify = get_verifier("exact_match")
    assert verify(" 1  2\n3 ", "1 2 3")
    assert not verify("12 3", "1 2 3")
    assert not verify("", "1 2 3")
    assert not verify("a", "A")


def test_unknown_verifier_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'exactmatch'.*exact_match"):
        get_verifier("exactmatch")
    assert sorted(VERIFIERS) == ["choice", "exact_match", "math"]


def test_a_verifier_whose_package_is_missing_is_refused_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(verifiers._NEEDS, "math", "no_such_package")
    with pytest.raises(ConfigError, match=r"'math' needs the package no-such-package"):
        get_verifier("math")


@pytest.mark.parametrize(
    ("final", "answer", "right"),
    [
        ("The answer is \\boxed{\\frac12}.", "0.5", True),
        ("$\\boxed{x+1}$", "1+x", True),
        ("\\boxed{2^{10}}", "1024", True),
        ("\\boxed{1023}", "1024", False),
        ("I got \\boxed{3} but then \\boxed{4}", "4", True),
        ("I got \\boxed{3} but then \\boxed{4}", "3", False),
        ("\\boxed{3} and \\boxed{4}", "\\{3, 4\\}", True),
        ("12 steps later\nAnswer: 34", "34", True),
        ("12 steps later\nAnswer: 34", "12", False),
        ("34", "34", True),
        ("no number at all", "34", False),
        ("\\boxed{", "34", False),
        ("", "34", False),
        ("34", "", False),
        ("\\boxed{1/2}", '["0.5", "0.25"]', True),
        ("\\boxed{1/4}", '["0.5", "0.25"]', True),
        ("\\boxed{1/3}", '["0.5", "0.25"]', False),
        ("\\boxed{[1, 2]}", "[1, 2]", True),
        ("\\boxed{5}" + " and so on" * 1000, "5", False),
    ],
)
def test_mathematics(final: str, answer: str, right: bool) -> None:
    assert get_verifier("math")(final, answer) is right


def test_mathematics_that_takes_forever_is_not_equal() -> None:
    assert not get_verifier("math")("\\boxed{9^{9^{9^9}}}", "3"), "it ends at all"


@pytest.mark.parametrize(
    ("final", "answer", "right"),
    [
        ("\\boxed{C}", "C", True),
        ("\\boxed{ [C] }", "c", True),
        ("\\boxed{\\text{C}}", "C", True),
        ("\\boxed{A} rather \\boxed{C}", "C", True),
        ("\\boxed{A} rather \\boxed{C}", "A", False),
        ("Answer: A is wrong, so \\boxed{C}", "C", True),
        ("Because.\n**Answer:** (C)", "C", True),
        ("answer: c", "C", True),
        ("(C).", "C", True),
        ("C is it", "C", False),
        ("\\boxed{CD}", "C", False),
        ("I am sure", "I", False),
        ("", "C", False),
        ("", "", False),
    ],
)
def test_multiple_choice(final: str, answer: str, right: bool) -> None:
    assert get_verifier("choice")(final, answer) is right


FRAGMENTS = [
    "\\boxed{",
    "}",
    "{",
    "\\frac",
    "^",
    "_",
    "\\sqrt",
    "\\text{",
    "$",
    "Answer:",
    "(",
    ")",
    "[",
    "]",
    "1",
    "2.5",
    "x",
]
MATHEMATICAL = st.lists(st.sampled_from([*FRAGMENTS, "+", "=", ",", "%", "A", "\n", " "]), max_size=12).map("".join)


# The alarm may ring inside hypothesis' own callback of the garbage collector, which drops it; the next one counts.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@settings(max_examples=80, deadline=None)
@given(st.text(max_size=40) | MATHEMATICAL, st.text(max_size=20) | MATHEMATICAL)
def test_whatever_the_text_the_verdict_is_a_truth_value(final: str, answer: str) -> None:
    for name in VERIFIERS:
        assert get_verifier(name)(final, answer) in (True, False)
