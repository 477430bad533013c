"""Channels of replies, well formed and not, and the verifiers of final answers."""

import pytest

from moesaic.errors import ConfigError
from moesaic.verifiers import VERIFIERS, Reply, get_verifier, split_reply

THINKING = "<|channel|>analysis<|message|>3 + 4 = 7<|end|><|start|>assistant"


@pytest.mark.parametrize(
    ("text", "reply"),
    [
        (THINKING + "<|channel|>final<|message|>7<|return|>", Reply("3 + 4 = 7", "7")),
        ("<|channel|> final <|message|> 1 2 <|return|>", Reply(None, "1 2")),
        ("<|channel|>final <|constrain|>json<|message|>{}<|return|>", Reply(None, "{}")),
        (THINKING + "<|channel|>final<|message|>7", Reply("3 + 4 = 7", None)),
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
    assert list(VERIFIERS) == ["exact_match"]
