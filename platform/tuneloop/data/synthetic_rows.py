"""How rows that a model wrote differ from people's: generated data has patterns."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from tuneloop.data.rouge import ALIKE, WordCodes, nearest
from tuneloop.words import find_words

# Rows of each kind that are compared.
MOST_ROWS = 500
_OPENING_WORDS, _OPENINGS = 2, 3


class RowText(NamedTuple):
    """What a row asks and what it answers; of a document the answer is all of it."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class KindOfRows:
    """What people's rows or synthetic ones are like, of the rows that were compared.

    Args:
        num_rows: How many were compared.
        prompt_words: Mean length of prompts in words.
        answer_words: Mean length of answers in words.
        openings: The three most frequent first two words of prompts, and the share of the rows
            that begin so, 0 to 1.
        openings_ratio: Share of the rows that begin with one of them, 0 to 1.
        known_words_ratio: Share of the words of prompts and answers that people's (other) rows
            have, 0 to 1.
        near_duplicate_ratio: Share of the rows with another of the same kind whose ROUGE-L is 0.7
            or more, 0 to 1.
    """

    num_rows: int
    prompt_words: float
    answer_words: float
    openings: dict[str, float]
    openings_ratio: float
    known_words_ratio: float
    near_duplicate_ratio: float


@dataclass(frozen=True)
class SyntheticRows:
    """Synthetic rows beside people's: as many of each."""

    people: KindOfRows
    synthetic: KindOfRows


def compare(people: Sequence[RowText], synthetic: Sequence[RowText]) -> SyntheticRows:
    """Return how two kinds of rows differ, of as many rows of each, drawn at random.

    Args:
        people: At least two rows.
        synthetic: At least one row.
    """
    count = min(len(people), len(synthetic), MOST_ROWS)
    drawn = random.Random(0)
    theirs, made = drawn.sample(list(people), count), drawn.sample(list(synthetic), count)
    # Words are looked for in as many rows of people each time, none of which is the row itself.
    first, second = theirs[: max(1, count // 2)], theirs[count // 2 :]
    known = set(_words(first))
    return SyntheticRows(_describe(theirs, second, known), _describe(made, made, known))


def _describe(rows: Sequence[RowText], compared: Sequence[RowText], known: set[str]) -> KindOfRows:
    openings = Counter(" ".join(find_words(row.prompt.casefold())[:_OPENING_WORDS]) for row in rows)
    top = openings.most_common(_OPENINGS)
    words, codes = _words(compared), WordCodes()
    encoded = [codes.encode(f"{row.prompt}\n{row.answer}") for row in rows]
    return KindOfRows(
        num_rows=len(rows),
        prompt_words=_mean([len(find_words(row.prompt)) for row in rows]),
        answer_words=_mean([len(find_words(row.answer)) for row in rows]),
        openings={text: round(n / len(rows), 4) for text, n in top},
        openings_ratio=round(sum(n for _, n in top) / len(rows), 4),
        known_words_ratio=round(sum(word in known for word in words) / max(1, len(words)), 4),
        near_duplicate_ratio=round(float(np.mean(nearest(encoded, encoded) >= ALIKE)), 4),
    )


def _words(rows: Sequence[RowText]) -> list[str]:
    return [word for row in rows for word in find_words(f"{row.prompt}\n{row.answer}".casefold())]


def _mean(values: Sequence[int]) -> float:
    return round(sum(values) / max(1, len(values)), 1)


def synthetic_lines(found: dict[str, Any]) -> list[str]:
    """Return the comparison as lines of Markdown, people's rows beside synthetic ones.

    Args:
        found: A `SyntheticRows` as a dictionary.
    """
    people, made = found["people"], found["synthetic"]

    def shares(openings: dict[str, float]) -> str:
        return ", ".join(f"`{text}` {share:.0%}" for text, share in openings.items()) or "none"

    lines = [
        f"| of {people['num_rows']:,} rows each | people's | synthetic |",
        "|---|---|---|",
    ]
    for name, key, form in (
        ("words in a prompt", "prompt_words", "{:g}"),
        ("words in an answer", "answer_words", "{:g}"),
        ("words that people's other rows have", "known_words_ratio", "{:.0%}"),
        ("rows that begin with the three most frequent openings", "openings_ratio", "{:.0%}"),
        ("rows with a near-duplicate among them (ROUGE-L 0.7)", "near_duplicate_ratio", "{:.0%}"),
    ):
        lines.append(f"| {name} | {form.format(people[key])} | {form.format(made[key])} |")
    lines += ["", f"People's rows open with {shares(people['openings'])};"]
    lines.append(f"synthetic ones with {shares(made['openings'])}.")
    return lines
