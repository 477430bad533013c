"""Near duplicates against the exact Jaccard similarity; problems of a test inside other texts."""

import random

from moesaic.data.prepare.duplicates import NearDuplicates, TestProblems, words


def _text(generator: random.Random, length: int) -> list[str]:
    return [f"word{generator.randrange(10_000)}" for _ in range(length)]


def _jaccard(one: list[str], other: list[str]) -> float:
    first, second = ({tuple(said[i : i + 5]) for i in range(len(said) - 4)} for said in (one, other))
    return len(first & second) / len(first | second)


def test_similarity_is_jaccards() -> None:
    generator = random.Random(0)
    found = {}
    for changed in (0, 1, 2, 5, 10, 20, 60):
        text = _text(generator, 400)
        other = [word if index % (400 // changed if changed else 401) else "new" for index, word in enumerate(text)]
        near = NearDuplicates(0.8)
        near.add(near.signature(" ".join(text)))
        found[_jaccard(text, other)] = near.has_like(near.signature("  ".join(other).upper()))
    assert {similarity: similar for similarity, similar in found.items() if abs(similarity - 0.8) > 0.12} == {
        similarity: similarity > 0.8 for similarity in found if abs(similarity - 0.8) > 0.12
    }
    assert len(found) >= 6 and {True, False} == set(found.values())


def test_a_text_longer_than_what_is_hashed_at_once_is_compared_whole() -> None:
    text = _text(random.Random(1), 10_000)
    near = NearDuplicates(0.8)
    near.add(near.signature(" ".join(text)))
    assert near.has_like(near.signature(" ".join(text[::-1][::-1])))
    assert not near.has_like(near.signature(" ".join(text[:4000])))


def test_words_are_compared_without_case_width_and_spaces() -> None:
    assert words("Was  ist\n2+2?") == words("was ist 2 + 2 ?") == ["was", "ist", "2", "+", "2", "?"]
    assert words("これは何?") == ["こ", "れ", "は", "何", "?"]


def test_problems_are_found_by_what_is_theirs_alone() -> None:
    put = "Solve the problem step by step and end with a line that says Answer followed by a number."
    first, second = ("how many ways are there to seat six guests at a round table in spring", "find x in 2x = 4")
    tests = TestProblems([[f"{put} {first}"], [f"{put} {second}"], ["What is 7 * 6?"]])
    assert tests.are_in([f"I was asked {first}, and failed."])
    assert tests.are_in(["unrelated", "what is 7*6 ?"])
    assert not tests.are_in([f"{put} something else entirely that nobody has ever asked before in any test at all"])
    assert not tests.are_in(["I wonder what is 7 * 6? And why?"])
    assert not TestProblems([]).are_in(["anything"])
