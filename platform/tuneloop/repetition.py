"""Whether a text says the same thing again and again: one definition for data and answers."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from tuneloop.words import CHARACTERS_PER_WORD, PLACED_WORD, Span, is_unspaced, split_words

# Raised when the definition changes. Datasets that were filtered by it are then prepared again.
REPETITION_VERSION = 2

_PHRASE_WORDS = 4
# Of 1,400 reference answers (lamini_docs) this flags 1, of 112 answers of a small base model, most
# of which loop, 38. Gopher's limits (arXiv:2112.11446, table A1) were set on web pages: they flag
# 31 and 48, and from 50 words on 14 and 20.
_LARGEST_RATIO = 0.20
_ITEM = re.compile(r"\s*(?:[-*•|]|\d+[.)])\s+")
_FENCE = re.compile(r"```\w*[ \t]*\n(.*?)\n?[ \t]*```", re.DOTALL)


def is_repetitive(text: str) -> bool:
    """Return whether more than 20% of a text repeats what it said before."""
    return repeated_ratio(text) > _LARGEST_RATIO


def repeated_ratio(text: str) -> float:
    """Return the share of a text's characters that lie in a phrase it has used before, 0 to 1.

    A phrase is four words in a row, or eight characters of a script that puts no spaces between
    words; its first use does not count. The items of a list and the
    rows of a table may be built alike: a phrase of one item is not looked for in another, but an
    item that is there twice is a repetition. JSON repeats its keys by design: in an object or an
    array each string value is judged by itself.
    """
    strings = _json_strings(text)
    counts = [_count(part) for part in ([text] if strings is None else strings)]
    return sum(repeated for _, repeated in counts) / max(1, sum(total for total, _ in counts))


def first_repetition(text: str) -> Span | None:
    """Return the first phrase that a text has used before, with its place; None without one.

    It may lie in an item of a list or a value of JSON whose repetition counts less than here.
    """
    words = [match for match in PLACED_WORD.finditer(text) if any(map(str.isalnum, match[0]))]
    length = _phrase_length([match[0] for match in words])
    seen: set[tuple[str, ...]] = set()
    for start in range(len(words) - length + 1):
        phrase = tuple(match[0] for match in words[start : start + length])
        if phrase in seen:
            begin, end = words[start].start(), words[start + length - 1].end()
            return Span(text[begin:end], begin, end)
        seen.add(phrase)
    return None


def _count(text: str) -> tuple[int, int]:
    """Return the characters in all words, and in those that lie in a phrase used before."""
    prose: list[str] = []
    items: set[str] = set()
    total = repeated = 0
    for line in text.splitlines():
        words = [word for word in split_words(line) if any(map(str.isalnum, word))]
        total += _length(words)
        if not _ITEM.match(line):
            prose += words
        elif (item := _ITEM.sub("", line, count=1).strip()) in items:
            repeated += _length(words)
        else:
            items.add(item)
            repeated += _repeated_characters(words)
    return total, repeated + _repeated_characters(prose)


def _json_strings(text: str) -> list[str] | None:
    """Return the string values of a JSON object or array; None where the text is something else."""
    stripped = text.strip()
    fenced = _FENCE.fullmatch(stripped)
    try:
        waiting = [json.loads(fenced[1] if fenced else stripped)]
    except (ValueError, RecursionError):
        return None
    if not isinstance(waiting[0], (dict, list)):
        return None
    strings = []
    while waiting:
        value = waiting.pop()
        if isinstance(value, (dict, list)):
            waiting += value.values() if isinstance(value, dict) else value
        elif isinstance(value, str):
            strings.append(value)
    return strings


def _repeated_characters(words: Sequence[str]) -> int:
    seen: set[tuple[str, ...]] = set()
    is_repeated = [False] * len(words)
    length = _phrase_length(words)
    for start in range(len(words) - length + 1):
        phrase = tuple(words[start : start + length])
        if phrase in seen:
            is_repeated[start : start + length] = [True] * length
        seen.add(phrase)
    return _length([word for word, repeats in zip(words, is_repeated, strict=True) if repeats])


def _phrase_length(words: Sequence[str]) -> int:
    is_mostly_unspaced = 2 * sum(map(is_unspaced, words)) > len(words)
    return _PHRASE_WORDS * (CHARACTERS_PER_WORD if is_mostly_unspaced else 1)


def _length(words: Sequence[str]) -> int:
    return sum(map(len, words))
