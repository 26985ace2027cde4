"""The words of a text in any script."""

from __future__ import annotations

import unicodedata
from typing import NamedTuple

import regex

# Scripts that put no spaces between words. A character of theirs, with its marks, counts as a
# word, as in the multilingual version of the SQuAD score (Lewis et al. 2019, arXiv:1910.07475).
_UNSPACED = (
    r"\p{Han}\p{Hiragana}\p{Katakana}ー\p{Bopomofo}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
)
_CHARACTER = regex.compile(rf"[{_UNSPACED}]\p{{M}}*", regex.V1)
# A word: such a character, or a run of other letters, marks and digits (needs `regex.V1`).
WORD_PATTERN = rf"(?:[{_UNSPACED}]\p{{M}}*|[[\p{{L}}\p{{M}}\p{{N}}_]--[{_UNSPACED}]]+)"
_WORD = regex.compile(WORD_PATTERN, regex.V1)
# What `split_words` gives, to be found with its place.
PLACED_WORD = regex.compile(rf"[{_UNSPACED}]\p{{M}}*|[\S--[{_UNSPACED}]]+", regex.V1)
# A word of a script without spaces is about two characters long.
CHARACTERS_PER_WORD = 2


class Span(NamedTuple):
    """A part of a text: its words and where they stand, in characters."""

    text: str
    start: int
    end: int


def split_words(text: str) -> list[str]:
    """Return what stands between white space, and each character of a script without spaces."""
    if text.isascii():
        return text.split()
    return str(_CHARACTER.sub(r" \g<0> ", text)).split()


def find_words(text: str) -> list[str]:
    """Return the runs of letters and digits, and each character of a script without spaces."""
    return [str(word) for word in _WORD.findall(unicodedata.normalize("NFC", text))]


def is_unspaced(word: str) -> bool:
    """Return whether a word is a character of a script without spaces."""
    return _CHARACTER.match(word) is not None
