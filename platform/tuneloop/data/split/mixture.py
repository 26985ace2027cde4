"""How much each source, or each task, gives to the train split, without taking a row twice.

Tasks of a mixture share texts: a summary and a label of the same document are two rows to learn.
So rows are told apart by their task where one could be removed for another, or contradict it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tuneloop.config import OneTaskConfig, TuneloopConfig
from tuneloop.errors import DataError, Problem

Indices = NDArray[np.int64]
# The golden ratio's bits: multiples differ in all places of a hash (Knuth, TAOCP 3, 6.4).
_ODD = np.int64(-7046029254386353131)


@dataclass(frozen=True)
class Mixture:
    """Parts and their weights, over N rows.

    Args:
        part: Number of each row's part, which is its source or its task. Shape (N,).
        size: What the row counts: 1, or its tokens. Shape (N,).
        weights: Of the parts, in any unit. Shape (S,).
        names: Of the parts. Shape (S,).
        what: `source` or `task`.
        where: The key under which they are in the YAML.
    """

    part: Indices
    size: Indices
    weights: Sequence[float]
    names: Sequence[str]
    what: str
    where: str

    def order(self, train: Indices) -> Indices:
        """Return the most train rows that keep the weights, such that every beginning keeps them.

        The rows of a part stand at equal distances, the smaller the larger its weight; the order
        ends where the first part ends. So a smaller subset is contained in a larger one.

        Args:
            train: Indices of the train rows in shuffled order.

        Raises:
            DataError: A part has no train row.
        """
        place = np.zeros(len(train))
        ends = []
        for number, weight in enumerate(self.weights):
            own = np.flatnonzero(self.part[train] == number)
            size = self.size[train[own]]
            filled = np.cumsum(size)
            place[own] = (filled - size / 2) / weight
            ends.append(float(filled[-1]) / weight if len(own) else 0.0)
        empty = [number for number, end in enumerate(ends) if not end]
        if empty:
            raise DataError(
                Problem(
                    f"a {self.what} has no train row to mix",
                    where=self.where,
                    got=", ".join(self.names[number] for number in empty),
                    remedy="leave it out, or look at what removed its rows: without `weight` "
                    "the data set's card tells",
                )
            )
        order = np.argsort(place, kind="stable")
        return train[order[place[order] <= min(ends)]]


def mixture_of(
    config: TuneloopConfig, source: Indices, task_ids: Indices, num_tokens: Indices
) -> Mixture | None:
    """Return the parts of tasks or sources in the train split, or None if none has a weight.

    Args:
        source: Index of each row's source. Shape (N,).
        task_ids: From `find_task_ids`. Shape (N,).
        num_tokens: Of each row. Shape (N,).
    """
    # Conversations count as one each; documents are packed, so what they fill counts.
    is_text = config.task.type == "language_modeling"
    size = num_tokens.astype(np.int64) if is_text else np.ones(len(num_tokens), np.int64)
    tasks, sources = config.task.tasks, config.data.sources
    weights = [task.weight for task in tasks.values() if task.weight is not None]
    if weights:
        return Mixture(task_ids, size, weights, list(tasks), "task", "task.tasks")
    weights = [source.weight for source in sources if source.weight is not None]
    if weights:
        paths = [source.path for source in sources]
        return Mixture(source, size, weights, paths, "source", "data.sources")
    return None


def find_task_ids(config: TuneloopConfig, source: Indices) -> Indices:
    """Return the position of each row's task in `task.tasks`; zeros without a mixture. Shape (N,).

    Args:
        source: Index of each row's source. Shape (N,).
    """
    names = list(config.task.tasks)
    of_source = [names.index(item.task) if item.task else 0 for item in config.data.sources]
    return np.array(of_source, dtype=np.int64)[source]


def dedup_scopes(config: TuneloopConfig, task_ids: Indices, answer_keys: Indices) -> Indices:
    """Return numbers that differ between rows of which none may be removed for the other.

    Rows of two tasks are such rows, and so are two labels of nearly the same text: that is no
    repetition but a contradiction, which `conflicts` lists. Shape (N,).

    Args:
        task_ids: From `find_task_ids`. Shape (N,).
        answer_keys: Hash of each row's answer. Shape (N,).
    """
    tasks: list[OneTaskConfig] = [*config.task.tasks.values()] or [config.task]
    has_labels = np.array([task.type == "classification" for task in tasks])[task_ids]
    if config.data.dedup.on != "both" or not has_labels.any():
        return task_ids
    scopes = np.stack([task_ids, np.where(has_labels, answer_keys, 0)], axis=1)
    return np.unique(scopes, axis=0, return_inverse=True)[1].reshape(-1)


def scoped(keys: Indices, scopes: Indices) -> Indices:
    """Return hashes that are equal where both hash and scope are. Shape (N,)."""
    return keys ^ (scopes * _ODD)
