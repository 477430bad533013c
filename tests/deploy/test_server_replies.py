"""From tokens to visible text: channels, stop texts, characters of several tokens, and the choice of tokens."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.data.verifiers import split_reply
from moesaic.deploy.server.harmony import ChatWriter
from moesaic.deploy.server.replies import IncrementalDetokenizer, PlainWriter, StopTextFilter
from moesaic.deploy.server.sampling import Draw, SamplingParams, choose

WORDS = ["<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>", "<|unknown|>"]
MARKERS = {token: word[2:-2] for token, word in enumerate(WORDS)}
WORDS += ["assistant", "analysis", "final", "a", "b", "c"]


def join(ids: list[int]) -> str:
    """As a word-level tokenizer decodes: a space between tokens, none at the ends."""
    return " ".join(WORDS[token] for token in ids)


def write(text: str, stops: tuple[str, ...] = ()) -> tuple[str | None, str | None, bool]:
    """Content, reasoning and whether a stop text came, of a reply written token by token."""
    return write_ids([WORDS.index(word) for word in text.split()], stops)


def write_ids(ids: list[int], stops: tuple[str, ...] = ()) -> tuple[str | None, str | None, bool]:
    writer = ChatWriter(join, MARKERS, stops)
    pieces = []
    for token in ids:
        pieces += writer.add(token, may_stop=True)
        if writer.stopped:
            break
    pieces += writer.finish()
    texts: dict[str, str] = {}
    for piece in pieces:
        texts[piece.kind] = texts.get(piece.kind, "") + piece.text
    return texts.get("content"), texts.get("reasoning"), writer.stopped


@pytest.mark.parametrize(
    ("text", "content", "reasoning"),
    [
        ("<|channel|> final <|message|> a b <|return|>", "a b", None),
        (
            "<|channel|> analysis <|message|> a b <|end|> "
            "<|start|> assistant <|channel|> final <|message|> c <|return|>",
            "c",
            "a b",
        ),
        ("<|channel|> analysis <|message|> a", None, "a"),
        ("<|channel|> final <|message|> a b", "a b", None),
        ("<|channel|> final <|message|> <|return|>", "", None),
        ("<|channel|> final <|message|> a <|end|> <|channel|> final <|message|> b <|end|>", "a", "b"),
        ("<|channel|> analysis <|message|> a <|end|> <|channel|> analysis <|message|> b <|end|>", None, "a\nb"),
        ("a b", None, "a b"),
        ("<|message|> a <|end|>", None, "a"),
        ("", None, None),
    ],
)
def test_a_reply_is_read_by_its_channels(text: str, content: str | None, reasoning: str | None) -> None:
    assert write(text) == (content, reasoning, False)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.integers(0, len(WORDS) - 1), max_size=24))
def test_a_finished_reply_reads_as_it_is_graded(ids: list[int]) -> None:
    """The oracle is the reading of whole texts that evaluation and rewards use."""
    ids = [*ids, WORDS.index("<|return|>")]
    content, reasoning, _ = write_ids(ids)
    graded = split_reply(join(ids))
    assert content == graded.final
    assert set((graded.analysis or "").split()) <= set((reasoning or "").split())


@pytest.mark.parametrize(
    ("stops", "visible"),
    [(("lo w",), "hel"), (("xyz",), "hello world"), (("wo", "llo"), "he"), (("hello world",), ""), ((), "hello world")],
)
def test_text_ends_before_a_stop_text_wherever_it_is_cut(stops: tuple[str, ...], visible: str) -> None:
    for size in range(1, 12):
        text = StopTextFilter(stops, strip=False)
        shown = ""
        for start in range(0, len("hello world"), size):
            if not text.stopped:
                shown += text.add("hello world"[start : start + size], may_stop=True)
        shown += "" if text.stopped else text.finish()
        assert (shown, text.stopped) == (visible, visible != "hello world")


def test_a_stop_text_counts_only_where_it_may() -> None:
    text = StopTextFilter(("b",), strip=False)
    assert text.add("abc", may_stop=False) == "abc"
    assert text.add("abc", may_stop=True) == "a"
    assert text.stopped


def test_a_stop_text_ends_a_chat_reply() -> None:
    assert write("<|channel|> final <|message|> a b c <|return|>", ("b",)) == ("a", None, True)


def test_characters_of_several_tokens_appear_whole() -> None:
    """Tokens are bytes here; a byte that never becomes a character is shown as such."""
    whole = "aé€😀".encode()
    stream = IncrementalDetokenizer(lambda ids: bytes(ids).decode("utf-8", errors="replace"))
    shown = [stream.add(byte) for byte in whole]
    assert "".join(shown) == "aé€😀"
    assert shown[:3] == ["a", "", "é"]
    assert stream.add(0xE2) == ""
    assert stream.finish() == "\ufffd"


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=40))
def test_pieces_make_up_the_text_of_all_tokens(data: bytes) -> None:
    def decode(ids: list[int]) -> str:
        return bytes(ids).decode("latin-1")

    writer = PlainWriter(decode, ())
    pieces = [piece for byte in data for piece in writer.add(byte, True)] + writer.finish()
    assert "".join(piece.text for piece in pieces) == decode(list(data))


def draw(temperature: float, uniform: float, top_p: float = 1.0) -> Draw:
    return Draw(SamplingParams(8, temperature=temperature, top_p=top_p), uniform, 0)


def test_each_row_draws_by_its_own_rule() -> None:
    """Probabilities 1/2, 1/4, 1/8, 1/8: the uniform number's place in their running sum picks the token."""
    logits = torch.tensor([[0.25, 0.5, 0.125, 0.125]]).log()
    uniforms = [0.0, 0.49, 0.51, 0.74, 0.76, 0.99]
    assert choose(logits.expand(6, -1), [draw(1, u) for u in uniforms]).tolist() == [1, 1, 0, 0, 2, 3]
    assert choose(logits.expand(2, -1), [draw(1, 0.99, top_p=0.5), draw(1, 0.99, top_p=0.6)]).tolist() == [1, 0]
    assert choose(logits.expand(3, -1), [draw(0, 0.99), draw(1e-9, 0.99), draw(1, 0.99)]).tolist() == [1, 1, 3]


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]]).expand(4000, -1)
    generator = random.Random(0)
    tokens = choose(logits, [draw(2.0, generator.random()) for _ in range(4000)])
    shares = torch.bincount(tokens, minlength=3) / 4000
    torch.testing.assert_close(shares, (logits[0] / 2).softmax(-1), atol=0.03, rtol=0)


def test_a_stop_token_is_not_drawn_before_the_least_length() -> None:
    logits = torch.tensor([[0.0, 9.0]]).expand(3, -1)
    sampling = SamplingParams(8, min_tokens=2, temperature=0, stop_ids=frozenset({1}))
    assert choose(logits, [Draw(sampling, 0, 0), Draw(sampling, 0, 1), Draw(sampling, 0, 2)]).tolist() == [0, 0, 1]


def test_a_stop_text_ends_the_answer_and_not_the_reasoning_before_it() -> None:
    reasoned = "<|channel|> analysis <|message|> a b c <|end|> <|start|> assistant "
    answered = reasoned + "<|channel|> final <|message|> c b a <|return|>"
    assert write(answered, ("b",)) == ("c", "a b c", True)
    assert write(reasoned, ("b",)) == (None, "a b c", False)
