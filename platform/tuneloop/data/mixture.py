"""How much each source gives to the train split: weights, kept without taking a row twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tuneloop.errors import DataError, Problem

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Mixture:
    """Sources and their weights, over N rows.

    Args:
        source: Number of each row's source. Shape (N,).
        size: What the row counts: 1, or its tokens. Shape (N,).
        weights: Of the sources, in any unit. Shape (S,).
        names: Of the sources. Shape (S,).
    """

    source: Indices
    size: Indices
    weights: Sequence[float]
    names: Sequence[str]

    def order(self, train: Indices) -> Indices:
        """Return the most train rows that keep the weights, such that every beginning keeps them.

        The rows of a source stand at equal distances, the smaller the larger its weight; the order
        ends where the first source ends. So a smaller subset is contained in a larger one.

        Args:
            train: Indices of the train rows in shuffled order.

        Raises:
            DataError: A source has no train row.
        """
        place = np.zeros(len(train))
        ends = []
        for number, weight in enumerate(self.weights):
            own = np.flatnonzero(self.source[train] == number)
            size = self.size[train[own]]
            filled = np.cumsum(size)
            place[own] = (filled - size / 2) / weight
            ends.append(float(filled[-1]) / weight if len(own) else 0.0)
        empty = [number for number, end in enumerate(ends) if not end]
        if empty:
            raise DataError(
                Problem(
                    "a source has no train row to mix",
                    where=", ".join(f"data.sources.{number}" for number in empty),
                    got=", ".join(self.names[number] for number in empty),
                    remedy="leave it out, or look at what removed its rows: without `weight` "
                    "the data set's card tells",
                )
            )
        order = np.argsort(place, kind="stable")
        return train[order[place[order] <= min(ends)]]
