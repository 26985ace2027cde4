"""Whether an English dictionary knows a word, leniently: for filtering data and tagging errors."""

from __future__ import annotations

import functools
import importlib.resources
import re

# Plain lower-case words: no names, no identifiers, paths, calls, contractions or other scripts.
_WORD = re.compile(r"(?<![\w@/\\.'’-])[a-z]{3,}(?![\w@/\\('’-])(?!\.\w)")
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
_CAPITALISED = re.compile(r"(?<![\w@/\\.'’-])[A-Z][a-z]{4,}(?![\w@/\\('’-])(?!\.\w)")
_SHORTEST_PART = 4
_NUM_COMMON = 20_000
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
# The dictionary has some words in one spelling only, `analyse` and `catalogue` among them.
_SPELLINGS = (("yz", "ys"), ("iz", "is"), ("log", "logue"), ("or", "our"), ("er", "re"))


@functools.cache
def dictionary() -> frozenset[str]:
    """Return 82,000 English words; read once, which takes 0.15 s.

    Source: the dictionary that symspellpy brings (SCOWL words that Google Books Ngrams count).
    """
    return frozenset(words_by_frequency())


@functools.cache
def words_by_frequency() -> tuple[str, ...]:
    """Return the words of `dictionary`, the most frequent one first."""
    file = importlib.resources.files("symspellpy") / "frequency_dictionary_en_82_765.txt"
    text = file.read_text(encoding="utf-8-sig")
    counted = [line.split(" ") for line in text.splitlines()]
    return tuple(word for word, *_ in sorted(counted, key=lambda pair: -int(pair[1])))


def prose_words(text: str) -> list[str]:
    """Return a text's plain lower-case words of three or more letters, without code."""
    return _WORD.findall(_CODE.sub(" ", text))


def capitalised_words(text: str) -> list[str]:
    """Return a text's words of five or more letters with a capital first, without code."""
    return _CAPITALISED.findall(_CODE.sub(" ", text))


@functools.lru_cache(maxsize=1 << 16)
def is_slip(word: str) -> bool:
    """Return whether one letter added, left out, changed or swapped makes a common word of it.

    The first letter is taken as right, as in nearly all slips: without that many names are one
    letter away from a word.
    """
    common = _common_words()
    for cut in range(1, len(word) + 1):
        head, tail = word[:cut], word[cut:]
        if head + tail[1:] in common or any(head + c + tail in common for c in _LETTERS):
            return True
        if tail and any(head + c + tail[1:] in common for c in _LETTERS):
            return True
        if len(tail) > 1 and head + tail[1] + tail[0] + tail[2:] in common:
            return True
    return False


@functools.cache
def _common_words() -> frozenset[str]:
    return frozenset(words_by_frequency()[:_NUM_COMMON])


@functools.lru_cache(maxsize=1 << 16)
def is_known(word: str) -> bool:
    """Return whether a lower-case word is English, in American or British spelling.

    A word made of two dictionary words (`filename`) counts as well.
    """
    words = dictionary()
    return (
        word in words
        or any(word.replace(us, uk) in words for us, uk in _SPELLINGS)
        or any(
            word[:cut] in words and word[cut:] in words
            for cut in range(_SHORTEST_PART, len(word) - _SHORTEST_PART + 1)
        )
    )
