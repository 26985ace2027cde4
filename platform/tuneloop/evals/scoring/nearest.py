"""The training rows most like a question: what a wrong answer may have been learned from."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from tuneloop.config import OneTaskConfig
from tuneloop.evals.scoring.metrics import (
    Scorer,
    find_label,
    parse_object,
    same_value,
    token_f1,
    without_thought,
    words_and_signs,
)
from tuneloop.evals.scoring.predictions import Prediction
from tuneloop.evals.scoring.questions import Question
from tuneloop.evals.scoring.simple import asked_texts, vectorizer_of_words
from tuneloop.records import Conversation

_log = logging.getLogger("tuneloop.evals")
FILE = "nearest.parquet"
NUM_NEAREST = 5
# Rows that are compared at most, and characters of what they ask; of more the first by row id,
# which is a hash.
MOST_ROWS, MOST_CHARACTERS = 100_000, 20_000_000
# Of a longer text the end: what is asked mostly stands there.
_LONGEST_TEXT = 4_000
# From this similarity on two questions ask the same.
SAME_QUESTION = 0.8
# Of a classification so many rows are looked through for labels that their own neighbours deny.
_CANDIDATES, _NEIGHBOURS = 100, 10
# Words that more than a tenth of so many rows have tell nothing and cost most.
_MANY_ROWS, _MOST_COMMON = 1_000, 0.1
_NEGATION = re.compile(
    r"\b(?:not|no|never|cannot|without|none|neither|nor|nothing)\b|n['’]t\b", re.IGNORECASE
)
_YES_NO = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_ALIKE = 0.5
_SCHEMA = pa.schema(
    [
        ("example_id", pa.string()),
        ("rank", pa.int32()),
        *[(name, pa.string()) for name in ("row_id", "source", "question", "answer")],
        *[(name, pa.float64()) for name in ("similarity", "agreement")],
        *[(name, pa.bool_()) for name in ("gives_this_answer", "conflicts")],
    ]
)


@dataclass(frozen=True)
class TrainRow:
    """A training row near a question.

    Args:
        similarity: Cosine of the TF-IDF vectors of both questions, 0 to 1.
        agreement: Of a label: the share of the ten rows most like this one that have its label,
            weighted by similarity; None for other answers.
    """

    row_id: str
    source: str
    question: str
    answer: str
    similarity: float
    agreement: float | None = None


class _Alike(NamedTuple):
    """A row, as its position, and the cosine of its TF-IDF vector with a question's."""

    row: int
    similarity: float


class NearestRows:
    """The training rows of one task, to be looked up by question.

    Args:
        rows: Training rows of the task, at least one; each ends with its answer.
        task: What they are scored by.
    """

    def __init__(self, rows: Sequence[Conversation], task: OneTaskConfig) -> None:
        self._task = task
        texts = [text[-_LONGEST_TEXT:] for text in asked_texts(rows[:MOST_ROWS], ())[0]]
        ends = np.cumsum([len(text) for text in texts])
        count = max(1, int(np.searchsorted(ends, MOST_CHARACTERS, side="right")))
        self._rows, self._texts = rows[:count], texts[:count]
        if count < len(rows):
            _log.info("nearest rows are looked for in %d of %d rows", count, len(rows))
        is_many = len(self._rows) >= _MANY_ROWS
        self._vectorizer = vectorizer_of_words(most_rows=_MOST_COMMON if is_many else 1.0)
        try:
            self._known = self._vectorizer.fit_transform(self._texts).T.tocsr()
        except ValueError:  # no word is left
            self._known = None

    def twins(self, questions: Sequence[Question]) -> dict[str, list[TrainRow]]:
        """Return the rows, at most three, that ask nearly the same as each question."""
        return {
            question.example_id: [
                self._row(one) for one in alike if one.similarity >= SAME_QUESTION
            ]
            for question, alike in zip(questions, self._look_up(questions, 3), strict=True)
        }

    def explain(self, questions: Sequence[Question]) -> dict[str, list[TrainRow]]:
        """Return the five rows that may explain a wrong answer to each question.

        Of a classification these are the nearest one, and of the hundred nearest those whose label
        the rows most like them deny: a row with a wrong label teaches it to questions near it. They
        are ordered by similarity times the cube of that denial. Else they are the five nearest.
        """
        if self._task.type != "classification":
            five = self._look_up(questions, NUM_NEAREST)
            return {
                question.example_id: [self._row(one) for one in alike]
                for question, alike in zip(questions, five, strict=True)
            }
        near = list(self._look_up(questions, _CANDIDATES))
        wanted = sorted({one.row for alike in near for one in alike})
        agreement = dict(zip(wanted, self._agreements(wanted), strict=True))

        def weight(one: _Alike) -> float:
            return one.similarity * (1 - agreement[one.row]) ** 3

        found = {}
        for question, alike in zip(questions, near, strict=True):
            others = sorted(alike[1:], key=weight, reverse=True)[: NUM_NEAREST - 1]
            chosen = sorted([*alike[:1], *others], key=weight, reverse=True)
            found[question.example_id] = [self._row(one, agreement[one.row]) for one in chosen]
        return found

    def _agreements(self, indices: Sequence[int]) -> list[float]:
        texts = [self._texts[index] for index in indices]
        agreements = []
        for index, alike in zip(indices, self._alike(texts, _NEIGHBOURS + 1), strict=True):
            others = [one for one in alike if one.row != index][:_NEIGHBOURS]
            total = sum(one.similarity for one in others)
            same = sum(
                one.similarity
                for one in others
                if says_the_same(self._answer(one.row), self._answer(index), self._task)
            )
            agreements.append(same / total if total else 1.0)
        return agreements

    def _answer(self, index: int) -> str:
        return self._rows[index].messages[-1].text

    def _row(self, alike: _Alike, agreement: float | None = None) -> TrainRow:
        row = self._rows[alike.row]
        asked = row.messages[-2].text if len(row.messages) > 1 else ""
        answer = self._answer(alike.row)
        return TrainRow(row.row_id, row.source, asked, answer, alike.similarity, agreement)

    def _look_up(self, questions: Sequence[Question], count: int) -> Iterator[list[_Alike]]:
        # The rows say whether the system messages count.
        asked = asked_texts(self._rows, questions)[1]
        return self._alike([text[-_LONGEST_TEXT:] for text in asked], count)

    def _alike(self, texts: Sequence[str], count: int) -> Iterator[list[_Alike]]:
        """Yield for each text the rows that share words with it, the most alike first."""
        for start in range(0, len(texts), 256):
            chunk = texts[start : start + 256]
            if self._known is None:
                yield from ([] for _ in chunk)
                continue
            products = (self._vectorizer.transform(chunk) @ self._known).tocsr()
            for row in range(len(chunk)):
                part = slice(products.indptr[row], products.indptr[row + 1])
                values, indices = products.data[part], products.indices[part]
                order = np.lexsort((indices, -values))[:count]
                yield [_Alike(int(indices[i]), min(1.0, float(values[i]))) for i in order]


def says_the_same(first: str, second: str, task: OneTaskConfig) -> bool:
    """Return whether two answers are one: the label, the JSON, or all words, numbers and signs."""
    if task.type == "classification":
        label = find_label(first, task.labels)
        return label is not None and label == find_label(second, task.labels)
    ours, theirs = parse_object(first), parse_object(second)
    if ours is not None and theirs is not None:
        return same_value(ours, theirs)
    return words_and_signs(first) == words_and_signs(second)


def contradicts(first: str, second: str, task: OneTaskConfig) -> bool:
    """Return whether two answers to one question cannot both be right, as far as words tell.

    Two labels; two values of a field; `yes` and `no` at the start; or texts that are alike but for
    a negation, or but for their numbers.
    """
    if task.type == "classification":
        labels = [find_label(text, task.labels) for text in (first, second)]
        return None not in labels and labels[0] != labels[1]
    ours, theirs = parse_object(first), parse_object(second)
    if ours is not None and theirs is not None:
        return any(
            not same_value(value, theirs[name])
            for name, value in ours.items()
            if value is not None and theirs.get(name) is not None
        )
    starts = [match[1].lower() for text in (first, second) if (match := _YES_NO.match(text))]
    if len(starts) == 2 and starts[0] != starts[1]:
        return True
    plain = [_NUMBER.sub(" ", text) for text in (first, second)]
    if token_f1(plain[0], plain[1], task) < _ALIKE:
        return False
    if (len(_NEGATION.findall(first)) + len(_NEGATION.findall(second))) % 2:
        return True
    numbers = [set(_NUMBER.findall(text)) for text in (first, second)]
    return bool(numbers[0] - numbers[1]) and bool(numbers[1] - numbers[0])


def as_nearest(rows: Sequence[Mapping[str, Any]]) -> ds.Dataset:
    """Return rows of `nearest.parquet` that are no file."""
    return ds.dataset(pa.Table.from_pylist(rows, _SCHEMA))


def open_nearest(folder: Path) -> ds.Dataset:
    """Return the rows of `nearest.parquet`, not read yet; none where it is not there."""
    return ds.dataset(folder / FILE, _SCHEMA) if (folder / FILE).exists() else as_nearest([])


def write_nearest(
    rows: Mapping[str, Sequence[TrainRow]],
    wrong: Mapping[str, Prediction],
    scorers: Mapping[str, Scorer],
    folder: Path,
) -> None:
    """Write `nearest.parquet`: the training rows that may explain each wrong answer.

    Args:
        rows: By example id, in the order to show them.
        wrong: The answers.
        scorers: The scorer of each example's task.
    """
    records = [
        {
            "example_id": example_id,
            "rank": rank,
            "row_id": row.row_id,
            "source": row.source,
            "question": row.question,
            "answer": row.answer,
            "similarity": row.similarity,
            "agreement": row.agreement,
            "gives_this_answer": says_the_same(
                row.answer, without_thought(wrong[example_id].completion), task
            ),
            "conflicts": is_conflict(row, wrong[example_id].reference, task),
        }
        for example_id, near in rows.items()
        for task in [scorers[example_id].task]
        for rank, row in enumerate(near, start=1)
    ]
    pq.write_table(pa.Table.from_pylist(records, _SCHEMA), folder / FILE, compression="zstd")


def is_conflict(row: TrainRow, reference: str, task: OneTaskConfig) -> bool:
    """Return whether a training row says something else than the reference of a like question.

    Any other label, since labels are for kinds of questions; other answers only where the questions
    are nearly the same.
    """
    if task.type == "classification":
        return contradicts(row.answer, reference, task)
    is_same = row.similarity >= SAME_QUESTION
    return (
        is_same
        and not says_the_same(row.answer, reference, task)
        and (
            contradicts(row.answer, reference, task)
            or token_f1(row.answer, reference, task) < _ALIKE
        )
    )
