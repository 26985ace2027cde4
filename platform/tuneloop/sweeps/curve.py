"""Learning curves: score against training examples, one curve per model."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from tuneloop.evals.scoring.intervals import Floats
from tuneloop.evals.scoring.metrics import Metric
from tuneloop.sweeps.forecast import CONFIDENCE, BreakEven, SizedScore, fit_law, is_vague, refusal

ROWS_KEY = "data.num_train_examples"
# How far beyond the largest data volume a forecast goes.
_TIMES = (2, 4)
_PATH_POINTS = 33
# More rows than this are no number that anybody labels.
_MOST_ROWS = 1e8


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


class Bar(NamedTuple):
    """The score of an arm that trains no model, to be passed."""

    arm: str
    score: float
    low: float
    high: float


def learning_curves(trials: Sequence[dict[str, Any]], keys: Sequence[str]) -> list[dict[str, Any]]:
    """Return one fitted line for each combination of the other swept keys.

    Args:
        trials: Rows of `trials.parquet`; those without a score are left out.
        keys: The swept dotted keys.
    """
    series: dict[str, list[Point]] = {}
    for trial in trials:
        if trial["score"] is None:
            continue
        point = Point(int(trial["num_train_examples"]), float(trial["score"]))
        series.setdefault(series_of(trial, keys), []).append(point)
    return [asdict(fit_line(label, points)) for label, points in series.items()]


def series_of(values: Mapping[str, Any], keys: Sequence[str]) -> str:
    """Return the name of the curve that a trial is on: the values of the other swept keys."""
    return ", ".join(f"{key}={values[key]}" for key in keys if key != ROWS_KEY)


def describe_forecast(
    cells: Sequence[Mapping[str, Any]],
    metric: Metric,
    confidence: float,
    bars: Sequence[Bar],
    of_rows: Floats | None = None,
) -> dict[str, Any]:
    """Return what more training rows are expected to bring, as `curve.json` keeps it.

    Args:
        cells: Those of one curve: `num_train_examples`, `value`, `low` and `high`.
        metric: Of their scores.
        confidence: Level of their intervals.
        bars: Scores to pass.
        of_rows: Covariance of the cells' scores, then the bars', for they are of the same rows;
            None: each has rows of its own. Shape (K, K).
    """
    width = 2 * NormalDist().inv_cdf((1 + confidence) / 2)
    scored = [
        number
        for number, cell in enumerate(cells)
        if None not in (cell["value"], cell["low"], cell["high"])
    ]
    points = [
        SizedScore(cell["num_train_examples"], cell["value"], (cell["high"] - cell["low"]) / width)
        for cell in (cells[number] for number in scored)
    ]
    reason = refusal(points)
    is_share = metric.kind != "number" and metric.better == "higher"
    if not is_share and (metric.better == "higher" or any(point.score <= 0 for point in points)):
        reason = "a forecast is made for shares, and for losses above 0"
    if reason:
        return {"refused": reason}
    shared: list[Floats | None] = [None] * len(bars)
    covariance = None
    if of_rows is not None:
        kept = np.array([*scored, *range(len(cells), len(cells) + len(bars))])
        of_rows = of_rows[np.ix_(kept, kept)]
        covariance = of_rows[: len(points), : len(points)].copy()
        # The intervals know more than the rows: other seeds.
        errors = np.array([point.std_error**2 for point in points])
        np.fill_diagonal(covariance, np.maximum(errors, covariance.diagonal()))
        shared = list(of_rows[len(points) :, : len(points)])
    law = fit_law(points, is_share, covariance)
    smallest, largest = (pick(point.num_examples for point in points) for pick in (min, max))
    if is_vague(law.at(2 * largest), law):
        return {"refused": "the scores are too uncertain: more rows to score on, or more seeds"}
    path = np.geomspace(smallest, max(_TIMES) * largest, _PATH_POINTS)
    return {
        "refused": "",
        "law": {
            name: float(np.median(getattr(law, name)))
            for name in ("floor", "drop", "half", "exponent")
        },
        "confidence": CONFIDENCE,
        "forecasts": [
            {
                "num_examples": times * largest,
                "times": times,
                **law.at(times * largest)._asdict(),
                "gain": law.gain(largest, times * largest)._asdict(),
                "step": law.gain(before * largest, times * largest)._asdict(),
            }
            for before, times in itertools.pairwise((1, *_TIMES))
        ],
        "path": [{"num_examples": float(size), **law.at(size)._asdict()} for size in path],
        "break_even": [
            _describe_break_even(
                law.break_even(bar.score, (bar.high - bar.low) / width, with_points),
                bar,
                smallest,
                max(_TIMES) * largest,
            )
            for bar, with_points in zip(bars, shared, strict=True)
        ],
    }


def _describe_break_even(rows: BreakEven, bar: Bar, smallest: int, reach: int) -> dict[str, Any]:
    if rows.high <= smallest:
        found = "passed"
    elif rows.low > reach:
        found = "out of reach"
    else:
        found = "found" if rows.is_sharp else "uncertain"
    return {
        "arm": bar.arm,
        "score": bar.score,
        "found": found,
        "num_examples": _finite(rows.value),
        "near": rows.near,
        "low": _finite(rows.low),
        "high": _finite(rows.high),
    }


def _finite(rows: float) -> int | None:
    """Return a number of rows; None where no number is enough."""
    return round(rows) if rows < _MOST_ROWS else None
