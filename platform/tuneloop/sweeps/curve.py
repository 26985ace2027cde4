"""Learning curves: score against training examples, one line per model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np


class Point(NamedTuple):
    """A finished trial: how many training examples it had, and its score."""

    num_examples: int
    score: float


@dataclass(frozen=True)
class Line:
    """A straight line through score over log2 of the number of training examples.

    Over the range a sweep covers, scores grow about linearly with the logarithm of the data until
    they saturate (Hestness et al. 2017, arXiv:1712.00409, section 2, small-data to power-law
    region). The line says what one doubling of the data bought, and promises nothing beyond
    the points.

    Args:
        series: The other keys of the sweep, `key=value, …`; empty when there are none.
        points: The trials, from the fewest to the most training examples.
        slope: Score per doubling of the data; None with fewer than two sizes.
        intercept: Score at one example, formally.
        residual: Root mean squared distance of the points from the line; None below three sizes.
    """

    series: str
    points: list[Point]
    slope: float | None
    intercept: float | None
    residual: float | None

    def at(self, num_examples: float) -> float | None:
        """Return the line's score at a number of training examples."""
        if self.slope is None or self.intercept is None:
            return None
        return float(self.intercept + self.slope * np.log2(num_examples))


def fit_line(series: str, points: Sequence[Point]) -> Line:
    """Return the least-squares line through the points of one series."""
    ordered = sorted(points)
    sizes = np.array([point.num_examples for point in ordered], dtype=float)
    scores = np.array([point.score for point in ordered])
    if len(set(sizes)) < 2:
        return Line(series, ordered, None, None, None)
    x = np.log2(sizes)
    slope, intercept = np.polyfit(x, scores, 1)
    residual = float(np.sqrt(np.mean((scores - (intercept + slope * x)) ** 2)))
    enough = len(set(sizes)) > 2
    return Line(series, ordered, float(slope), float(intercept), residual if enough else None)


def learning_curves(trials: Sequence[dict[str, Any]], keys: Sequence[str]) -> list[dict[str, Any]]:
    """Return one fitted line for each combination of the other swept keys.

    Args:
        trials: Rows of `trials.parquet`; those without a score are left out.
        keys: The swept dotted keys.
    """
    others = [key for key in keys if key != "data.num_train_examples"]
    series: dict[str, list[Point]] = {}
    for trial in trials:
        if trial["score"] is None:
            continue
        label = ", ".join(f"{key}={trial[key]}" for key in others)
        point = Point(int(trial["num_train_examples"]), float(trial["score"]))
        series.setdefault(label, []).append(point)
    return [asdict(fit_line(label, points)) for label, points in series.items()]
