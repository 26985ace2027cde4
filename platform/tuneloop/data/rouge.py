"""How alike two texts are by ROUGE-L: the longest sequence of words that both have in order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import Indel
from rapidfuzz.process import cdist

from tuneloop.words import split_words

# From here on a new input is too much like a known one, as in Self-Instruct.
ALIKE = 0.7
# A long text is compared by its beginning.
_MOST_WORDS = 400
_FIRST_CODE = 0x10000
_AT_ONCE = 1_000


class WordCodes:
    """Texts as strings with one character for each word, so that they can be compared quickly."""

    def __init__(self) -> None:
        self._codes: dict[str, str] = {}

    def encode(self, text: str) -> str:
        """Return one character for each word or sign, the same for the same word in any case."""
        words = (word.casefold() for word in split_words(text) if any(map(str.isalnum, word)))
        codes = self._codes
        return "".join(
            codes.setdefault(word, chr(_FIRST_CODE + len(codes)))
            for word, _ in zip(words, range(_MOST_WORDS), strict=False)
        )


def rouge_l(first: str, second: str) -> float:
    """Return the F measure of ROUGE-L of two texts, 0 to 1; two texts without words are alike.

    Source: Lin 2004, ROUGE, section 3 (beta = 1). It is the normalised insertion and deletion
    similarity of the two sequences of words.
    """
    codes = WordCodes()
    return float(Indel.normalized_similarity(codes.encode(first), codes.encode(second)))


def similarities(first: Sequence[str], second: Sequence[str]) -> NDArray[np.float32]:
    """Return ROUGE-L of encoded texts, each of the first with each of the second. Shape (N, M)."""
    if not first or not second:
        return np.zeros((len(first), len(second)), dtype=np.float32)
    found: NDArray[np.float32] = cdist(
        first, second, scorer=Indel.normalized_similarity, dtype=np.float32
    )
    return found


def nearest(first: Sequence[str], second: Sequence[str]) -> NDArray[np.float32]:
    """Return for each encoded text ROUGE-L with the most similar of others; 0 without any.

    Args:
        first: Encoded texts. Shape (N,).
        second: Those that they are compared with; text i is not compared with text i of the same
            list.
    """
    best = np.zeros(len(first), dtype=np.float32)
    for start in range(0, len(first), _AT_ONCE):
        part = similarities(first[start : start + _AT_ONCE], second)
        if first is second:
            part[np.arange(len(part)), np.arange(start, start + len(part))] = -1
        best[start : start + len(part)] = part.max(axis=1, initial=0)
    return best
