"""Training rows whose label is probably wrong: a classifier that has not seen the row denies it.

Source: Northcutt, Jiang and Chuang 2021, Confident learning: Estimating uncertainty in dataset
labels (probabilities out of fold). Rows are ranked by how much more probable another label is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tuneloop.artifacts import Artifact
from tuneloop.config import TaskConfig
from tuneloop.evals.scoring.questions import read_solved
from tuneloop.evals.scoring.simple import (
    MOST_ROWS,
    asked_texts,
    classifier,
    vectorizer_of_words,
)
from tuneloop.records import Conversation

_NUM_FOLDS = 5
# With fewer rows each fold would learn too little to deny anything.
_FEWEST_ROWS = 20


@dataclass(frozen=True)
class DoubtfulLabel:
    """A row whose label is denied.

    Args:
        row: As the dataset has it.
        given: Its label.
        other: The label that is the most probable of the others.
        given_probability: Of the row's own label, 0 to 1.
        other_probability: Of the other label, 0 to 1; larger than the row's own.
    """

    row: Conversation
    given: str
    other: str
    given_probability: float
    other_probability: float


def classification_tasks(task: TaskConfig) -> list[str]:
    """Return the names of the tasks whose answers are labels; the only task has an empty name."""
    return [name for name in task.tasks or ("",) if task.of(name).type == "classification"]


def find_doubtful_labels(dataset: Artifact, task: TaskConfig) -> list[DoubtfulLabel]:
    """Return the train rows of a dataset whose labels are denied, the most doubtful first.

    Args:
        dataset: A dataset artifact. Its first `MOST_ROWS` train rows are looked at.
        task: Its task, or the mixture whose tasks the rows name.
    """
    rows = read_solved(dataset, list(task.tasks), MOST_ROWS)
    found: list[DoubtfulLabel] = []
    for name in classification_tasks(task):
        found += doubtful_labels([row for row in rows if row.task == name])
    return sorted(found, key=_certainty)


def doubtful_labels(rows: Sequence[Conversation]) -> list[DoubtfulLabel]:
    """Return the rows whose labels are denied, the most doubtful first.

    The rows are learned in five parts. Each is judged by the simple arm's classifier (logistic
    regression on TF-IDF of words and pairs of words) that has learned the four others. A row is
    doubted if another label is more probable than its own. A label that none of the four parts
    has cannot be judged.

    Args:
        rows: Of one task, in an order that has nothing to do with their labels; each ends with its
            label.
    """
    if len(rows) < _FEWEST_ROWS:
        return []
    labels = np.array([row.messages[-1].text.strip() for row in rows], dtype=object)
    texts, _ = asked_texts(rows, [])
    try:
        vectors = vectorizer_of_words(min_rows=2).fit_transform(texts)
    except ValueError:  # no word is in two rows
        return []
    fold = np.arange(len(rows)) % _NUM_FOLDS
    found: list[DoubtfulLabel] = []
    for part in range(_NUM_FOLDS):
        learned = fold != part
        if len(set(labels[learned])) < 2:
            continue
        fitted = classifier().fit(vectors[learned], labels[learned].tolist())
        names = [str(name) for name in fitted.classes_]
        place = {name: index for index, name in enumerate(names)}
        judged = np.flatnonzero(fold == part).tolist()
        for index, each in zip(judged, fitted.predict_proba(vectors[judged]), strict=True):
            own = place.get(labels[index])
            best = int(np.argmax(each))
            if own is not None and each[best] > each[own]:
                found.append(
                    DoubtfulLabel(
                        rows[index], names[own], names[best], float(each[own]), float(each[best])
                    )
                )
    return sorted(found, key=_certainty)


def _certainty(found: DoubtfulLabel) -> tuple[float, str]:
    return (found.given_probability - found.other_probability, found.row.row_id)
