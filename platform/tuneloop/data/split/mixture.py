"""How many rows each source, or each task, gives to the train split; none is taken twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tuneloop.config import TuneloopConfig
from tuneloop.data.hashing.columns import Indices
from tuneloop.errors import DataError


@dataclass(frozen=True)
class Mixture:
    """S weighted parts, sources or tasks, over N rows.

    Args:
        part: Number of each row's part. Shape (N,).
        size: What each row counts: 1, or its tokens. Shape (N,).
        weights: Weight of each part, in any unit. Shape (S,).
        names: Name of each part. Shape (S,).
        what: `source` or `task`.
        where: Key of the parts in the YAML.
    """

    part: Indices
    size: Indices
    weights: Sequence[float]
    names: Sequence[str]
    what: str
    where: str

    def order(self, train: Indices) -> Indices:
        """Return as many train rows as keep the weights, in an order whose prefixes keep them too.

        The rows of a part stand at equal distances, the smaller the larger its weight; the order
        ends where the first part is used up. So a smaller subset is contained in a larger one.

        Args:
            train: Indices of the train rows in shuffled order.

        Raises:
            DataError: A part has no train row.
        """
        place = np.zeros(len(train))
        ends = []
        for number, weight in enumerate(self.weights):
            members = np.flatnonzero(self.part[train] == number)
            size = self.size[train[members]]
            filled = np.cumsum(size)
            place[members] = (filled - size / 2) / weight
            ends.append(float(filled[-1]) / weight if len(members) else 0.0)
        empty = [number for number, end in enumerate(ends) if not end]
        if empty:
            raise DataError.of(
                f"a {self.what} has no train row to mix",
                where=self.where,
                got=", ".join(self.names[number] for number in empty),
                remedy="leave it out, or prepare once without `weight`: then the data set's "
                "card says what removed its rows",
            )
        order = np.argsort(place, kind="stable")
        return train[order[place[order] <= min(ends)]]


def mixture_of(
    config: TuneloopConfig, source: Indices, task_ids: Indices, num_tokens: Indices
) -> Mixture | None:
    """Return the parts of tasks or sources in the train split, or None if none has a weight.

    Args:
        config: Its `task.tasks` and `data.sources` have the weights.
        source: Index of each row's source. Shape (N,).
        task_ids: Task of each row, as its place in `task.tasks`. Shape (N,).
        num_tokens: Tokens of each row. Shape (N,).
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
    """Return the place of each row's task in `task.tasks`; zeros without a mixture. Shape (N,).

    Args:
        config: Its `task.tasks` and `data.sources`.
        source: Index of each row's source. Shape (N,).
    """
    names = list(config.task.tasks)
    of_source = [names.index(source.task) if source.task else 0 for source in config.data.sources]
    return np.array(of_source, dtype=np.int64)[source]
