"""Numbers and names of an answer that neither its question nor its reference has."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterator

import regex

from tuneloop.spelling import is_known
from tuneloop.words import Span

_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
# Not within a word (`utf8`, `int32`) or after what counts the items of a list.
_NUMBER = re.compile(r"(?<![\w.,])(?<!\w-)\d+(?:[.,]\d+)*")
_ENUMERATOR = re.compile(r"(?:^[ \t>*-]*|(?<=[.:;!?,])\s+)\(?\d+[.):](?=\s)", re.MULTILINE)
_RESULT = re.compile(r"=\s*[$€£]?\s*-?\Z")
_WORD = regex.compile(r"\p{L}[\p{L}\p{M}\p{N}'’]*(?:-\p{L}[\p{L}\p{M}\p{N}'’]*)*")
_PART = regex.compile(r"\p{L}[\p{L}\p{M}]*|\p{N}+")
# Before a word that begins a sentence, a line, a quotation or an item.
_BEGINS = re.compile(r"(?:[.!?:;…\n|/]|[\"“”„«(\[{]|(?:^|\n)\s*[-*•>#]+)\s*[\"“„«(\[*_]*\Z")
_NUMERALS = {
    word: str(number)
    for number, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
        "fifteen sixteen seventeen eighteen nineteen twenty".split()
    )
} | {"thirty": "30", "forty": "40", "fifty": "50", "hundred": "100", "thousand": "1000"}
_NUMERALS |= {"once": "1", "twice": "2", "first": "1", "second": "2", "third": "3", "half": "0.5"}
# Where so many words within sentences have a capital it marks no names: in German, for example.
_MANY_CAPITALS, _FEW_CAPITALS = 0.3, 5
_TITLE = re.compile(r"\b(?:Dr|Mr|Mrs|Ms|Prof|St|vs|No|Inc|Ltd|Co|[A-Z])\.\s*\Z")
_HEADING_WORDS = 2


def find_unsupported(answer: str, sources: str, vocabulary: Collection[str] = ()) -> list[Span]:
    """Return the numbers and names of an answer that its sources do not have, in their order.

    Numbers are compared by value (`1,000` is `1000`, `three` is 3); those in code, those that
    count the items of a list and results after an equals sign are left out. A name is a word with a
    capital within a sentence, or one at its start that no dictionary has. It is supported where
    the sources have the word in any case, in singular or plural, as part of a longer one, or as
    the initials of several words.

    Args:
        answer: What is looked through.
        sources: The question and the reference, as one text.
        vocabulary: Words, in lower case, that are no names here.
    """
    # Blanked and not cut out, so that places stay.
    text = _CODE.sub(lambda match: " " * len(match[0]), answer)
    found = [*_numbers(text, sources), *_names(text, sources, vocabulary)]
    return sorted(found, key=lambda span: span.start)


def _numbers(text: str, sources: str) -> Iterator[Span]:
    known = {_value(match[0]) for match in re.finditer(r"\d+(?:[.,]\d+)*", sources)}
    known |= {part for value in known for part in value.split(".")}
    known |= {_NUMERALS[w] for w in re.findall(r"[a-z]+", sources.lower()) if w in _NUMERALS}
    items = [match.span() for match in _ENUMERATOR.finditer(text)]
    for match in _NUMBER.finditer(text):
        start, end = match.span()
        is_item = any(first <= start < last for first, last in items)
        if is_item or _RESULT.search(text[max(0, start - 4) : start]) or _value(match[0]) in known:
            continue
        yield Span(match[0], start, end)


def _value(number: str) -> str:
    """Return a number without separators of thousands and without zeros that do not count."""
    plain = re.sub(r",(?=\d{3}(?!\d))", "", number).replace(",", ".")
    whole, point, fraction = plain.partition(".")
    fraction = "" if "." in fraction else fraction.rstrip("0")
    whole = whole.lstrip("0") or "0"
    if plain.count(".") > 1:  # a version or a date
        return plain
    return f"{whole}.{fraction}" if point and fraction else whole


def _names(text: str, sources: str, vocabulary: Collection[str]) -> Iterator[Span]:
    words = list(_WORD.finditer(text))
    if not any(match[0][0].isupper() for match in words):
        return
    inner = [
        match
        for match in words
        # From there on, since a pattern with an end is looked for from every place.
        for before in [text[max(0, match.start() - 40) : match.start()]]
        if match.start() and (_TITLE.search(before) or not _BEGINS.search(before))
    ]
    num_capitals = sum(match[0][0].isupper() for match in inner)
    if num_capitals > max(_FEW_CAPITALS, _MANY_CAPITALS * len(inner)):
        return
    given = _PART.findall(sources.casefold())
    known = {_stem(part) for part in given}
    initials = "".join(part[0] for part in given)
    starts = {match.start() for match in inner}
    headings = _headings(text)
    for match in words:
        word = match[0]
        if not word[0].isupper() or len(word) < 2 or word in ("OK",) or word[:2] in ("I'", "I’"):
            continue
        if any(start <= match.start() < end for start, end in headings):
            continue
        is_inner = match.start() in starts
        if not is_inner and (is_known(word.casefold()) or "'" in word or "’" in word):
            continue
        plain = re.sub(r"['’]s?\Z", "", word)
        lowered = plain.casefold()
        if lowered in vocabulary or lowered.removesuffix("s") in vocabulary:
            continue
        parts = [_stem(part) for part in _PART.findall(lowered)]
        if all(part in known for part in parts) or _stem(lowered) in known:
            continue
        is_acronym = plain.rstrip("s").isupper() and plain.rstrip("s").casefold() in initials
        if not is_acronym:
            yield Span(plain, match.start(), match.start() + len(plain))


def _headings(text: str) -> list[tuple[int, int]]:
    """Return where lines stand whose words have nearly all a capital."""
    spans, start = [], 0
    for line in text.splitlines(keepends=True):
        words = [match[0] for match in _WORD.finditer(line)]
        long = [word for word in words if len(word) > 3]
        is_heading = len(words) >= _HEADING_WORDS and all(word[0].isupper() for word in long)
        if is_heading and not line.rstrip().endswith((".", "!", "?")):
            spans.append((start, start + len(line)))
        start += len(line)
    return spans


@functools.lru_cache(maxsize=1 << 16)
def _stem(word: str) -> str:
    """Return a word without the ending of a plural."""
    for ending, rest in (("ies", "y"), ("es", ""), ("s", "")):
        if word.endswith(ending) and len(word) > len(ending) + 2:
            return word.removesuffix(ending) + rest
    return word.removesuffix("e") if len(word) > 3 else word
