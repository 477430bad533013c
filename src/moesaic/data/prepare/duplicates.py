"""Texts that say the same: nearly, by MinHash, and problems of a test inside other texts, by sequences of words.

A text is compared as its words: lower case, compatibility forms unified (NFKC), every sign and every Chinese, Japanese
or Korean character a word of its own, white space nothing.

*Near duplicates.* ``J(A, B) = |A & B| / |A | B|`` of the sets of sequences of five words, estimated by 128 minima of
random hash functions (Broder 1997; standard error at most 0.045), looked up by 32 bands of 4.

*Test problems.* A text holds a problem of a test if it has one of its sequences of 13 words (the length that GPT-3's
authors used) that is in no other problem of the test: what several problems share is how they are put. A problem of
fewer words is held by a text one of whose messages says nothing else.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

_WORD = re.compile(r"[぀-ヿ㐀-鿿豈-﫿가-힯]|[^\W぀-ヿ㐀-鿿豈-﫿가-힯]+|[^\w\s]")
_SHINGLE, _GRAM = 5, 13
_NUM_HASHES, _BAND = 128, 4
_AT_ONCE = 4096

Signature = NDArray[np.uint32]


def words(text: str) -> list[str]:
    """The words of a text."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


class NearDuplicates:
    """The texts so far; memory is about a kilobyte for each, whatever its length."""

    def __init__(self, similarity: float) -> None:
        self._similarity = similarity
        self._signatures: list[Signature] = []
        self._bands: dict[tuple[int, bytes], list[int]] = {}
        random = np.random.default_rng(0)
        self._factors = random.integers(1, 2**63, _NUM_HASHES, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        self._offsets = random.integers(0, 2**63, _NUM_HASHES, dtype=np.uint64)

    def signature(self, text: str) -> Signature:
        """What a text is compared by."""
        hashes = np.fromiter(set(_hashes(words(text), _SHINGLE)), dtype=np.uint64)
        minima = np.full(_NUM_HASHES, 2**32 - 1, dtype=np.uint64)
        for start in range(0, len(hashes), _AT_ONCE):
            some = hashes[start : start + _AT_ONCE, None] * self._factors + self._offsets
            minima = np.minimum(minima, (some >> np.uint64(32)).min(axis=0))
        return minima.astype(np.uint32)

    def has_like(self, signature: Signature) -> bool:
        """Whether one of the texts so far is similar."""
        near = {index for band in self._of(signature) for index in self._bands.get(band, ())}
        return any(np.mean(self._signatures[index] == signature) >= self._similarity for index in near)

    def add(self, signature: Signature) -> None:
        """Add a text."""
        for band in self._of(signature):
            self._bands.setdefault(band, []).append(len(self._signatures))
        self._signatures.append(signature)

    def _of(self, signature: Signature) -> Iterator[tuple[int, bytes]]:
        for start in range(0, _NUM_HASHES, _BAND):
            yield start, signature[start : start + _BAND].tobytes()


class TestProblems:
    """The problems of a test, for finding them in other texts."""

    __test__ = False

    def __init__(self, problems: Iterable[Sequence[str]]) -> None:
        """Take the problems, each as the texts in which it is put."""
        self._whole: set[int] = set()
        counts: dict[int, int] = {}
        for messages in problems:
            asked = [words(message) for message in messages]
            self._whole |= {whole for said in asked for whole in _hashes(said, len(said))}
            for gram in {gram for said in asked if len(said) >= _GRAM for gram in _hashes(said, _GRAM)}:
                counts[gram] = counts.get(gram, 0) + 1
        self._grams = {gram for gram, count in counts.items() if count == 1}

    def are_in(self, messages: Iterable[str]) -> bool:
        """Whether a text, given as its messages, holds one of the problems."""
        for message in messages:
            said = words(message)
            if not self._whole.isdisjoint(_hashes(said, len(said))):
                return True
            if len(said) >= _GRAM and not self._grams.isdisjoint(_hashes(said, _GRAM)):
                return True
        return False


def _hashes(said: Sequence[str], length: int) -> Iterator[int]:
    """A number of 64 bits for each sequence of so many words; for a shorter text one for the whole."""
    for start in range(max(1, len(said) - length + 1)) if said else ():
        piece = " ".join(said[start : start + length]).encode()
        yield int.from_bytes(hashlib.blake2b(piece, digest_size=8).digest(), "little")
