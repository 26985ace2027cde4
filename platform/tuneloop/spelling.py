"""Whether an English dictionary knows a word, leniently: for filtering data and tagging errors."""

from __future__ import annotations

import functools
import importlib.resources
import re

# Plain lower-case words: no names, no identifiers, paths, calls, contractions or other scripts.
_WORD = re.compile(r"(?<![\w@/\\.'’-])[a-z]{3,}(?![\w@/\\('’-])(?!\.\w)")
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
_SHORTEST_PART = 4
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
