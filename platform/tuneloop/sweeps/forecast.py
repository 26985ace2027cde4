"""What more training rows would bring: a law fitted to the scores of a sweep, with its doubt.

Finetuning first changes little, then follows a power law, then saturates (the rectified scaling
law of Lin et al. 2024, arXiv:2402.02314, equation 3). Written with parameters that mean something,
the error with D training rows is

    floor + drop / (1 + (D / half) ** exponent)

where `half` is the number of rows that brings half of the drop. Few and noisy points fit many such
curves, which agree where the points are and part beyond them. So not the best curve is reported but
all that fit, each by how well it fits: the forecast is their median and its interval leaves out the
outer 5% on each side.

Shape legend: K points, P curves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tuneloop.evals.scoring.intervals import Floats

CONFIDENCE = 0.9
_MIN_SIZES = 3
_MIN_RATIO = 4
# An interval wider than this share of the scale says nothing.
_MOST_DOUBT = 0.5
# A break-even point is named if so much of the doubt is within this factor of it.
NEAR = 1.5
_SURE = 0.6
_NUM_CANDIDATES = 201
# What a curve may be before anything was measured, see `_curves`.
# Up to 2.5: at a fixed number of epochs more rows are more steps, and the error falls the faster.
_EXPONENT = (0.25, 2.5)
_HALF_BEYOND = 20
# Scatter of trainings that the intervals of the scores do not know: other seeds, other subsets.
_SCATTER = (0.004, 0.04)
_NUM_CURVES = 4096
_STEPS_PER_TEMPERATURE = 6
_SEED = 0


class SizedScore(NamedTuple):
    """The score of a cell: how many training rows it had, and how sure it is."""

    num_examples: int
    score: float
    std_error: float


class Estimate(NamedTuple):
    """A median with its interval; infinite where it lies beyond all reach."""

    value: float
    low: float
    high: float


class BreakEven(NamedTuple):
    """A number of training rows with its interval; infinite where no number is enough.

    Attributes:
        value: That which most of the doubt is near.
        near: The share of the doubt that is within a factor of 1.5 of it.
    """

    value: float
    low: float
    high: float
    near: float

    @property
    def is_sharp(self) -> bool:
        """Whether it is known well enough to be named."""
        return self.near >= _SURE


@dataclass(frozen=True)
class Law:
    """All curves that fit, as equally likely draws.

    Args:
        floor: Error with any number of rows. Shape (P,).
        drop: By which the error falls to there from that of few rows. Shape (P,).
        half: Rows that bring half of the drop. Shape (P,).
        exponent: How fast it then falls. Shape (P,).
        best: Score without any error: 1 for shares, 0 for a loss.
        scale: Of the errors: 1 for shares, the largest of the points for a loss.
        scatter: Of trainings, beyond the intervals of the points. Shape (P,).
        residuals: By which the points lie above the curves. Shape (P, K).
        covariance: Of the points' noise. Shape (K, K).
    """

    floor: Floats
    drop: Floats
    half: Floats
    exponent: Floats
    best: float
    scale: float
    scatter: Floats
    residuals: Floats
    covariance: Floats

    def scores(self, num_examples: float) -> Floats:
        """Return every curve's score at a number of training rows. Shape (P,)."""
        error = self.floor + self.drop / (1 + (num_examples / self.half) ** self.exponent)
        return self.best - error * self.scale if self.best else error * self.scale

    def at(self, num_examples: float) -> Estimate:
        """Return the forecast at a number of training rows."""
        return _estimate(self.scores(num_examples))

    def gain(self, before: float, after: float) -> Estimate:
        """Return by how much the score rises between two numbers of training rows."""
        return _estimate(self.scores(after) - self.scores(before))

    def break_even(self, score: float, std_error: float, shared: Floats | None = None) -> BreakEven:
        """Return the number of training rows at which the curves pass a score.

        Args:
            score: To pass, for example that of the few-shot prompt.
            std_error: Of it.
            shared: Covariance of its noise with that of each point: they may be of the same rows.
                Shape (K,).
        """
        generator = np.random.default_rng(_SEED)
        noise, variance = np.zeros_like(self.floor), np.full_like(self.floor, std_error**2)
        if shared is not None:
            # What the points are too high by, the bar is too high by as well.
            values, vectors = np.linalg.eigh(self.covariance)
            weights = (shared @ vectors) / (values + self.scatter[:, None] ** 2)
            noise = (weights * (self.residuals @ vectors)).sum(axis=1)
            variance = np.maximum(variance - (weights * (shared @ vectors)).sum(axis=1), 0)
        bar = score - noise + np.sqrt(variance) * generator.standard_normal(len(self.floor))
        error = (self.best - bar if self.best else bar) / self.scale
        above = error - self.floor
        with np.errstate(divide="ignore", invalid="ignore"):
            rows = self.half * np.maximum(self.drop / above - 1, 0) ** (1 / self.exponent)
        rows = np.where(above > 0, rows, np.inf)
        _, low, high = _estimate(rows)
        value, near = _densest(rows)
        return BreakEven(value, low, high, near)


def _densest(rows: Floats) -> tuple[float, float]:
    """Return the number that the draws lie densest around, and the share within 1.5 of it.

    Where no draw is a number above 0, it is the median, and the share is 0.
    """
    finite = rows[(rows > 0) & np.isfinite(rows)]
    if not len(finite):
        return float(np.sort(rows)[len(rows) // 2]), 0.0
    logs = np.log(finite)
    candidates = np.quantile(logs, np.linspace(0, 1, _NUM_CANDIDATES))
    distances = np.abs(candidates[:, None] - logs) / math.log(NEAR)
    best = int(np.maximum(1 - distances, 0).sum(axis=1).argmax())
    return float(np.exp(candidates[best])), float((distances[best] <= 1).sum() / len(rows))


def refusal(points: Sequence[SizedScore]) -> str:
    """Return why points bear no law; empty where they do."""
    sizes = sorted({point.num_examples for point in points})
    if len(sizes) < _MIN_SIZES:
        return (
            f"{len(sizes)} data volume{'s' * (len(sizes) != 1)}: at least {_MIN_SIZES} are needed"
        )
    if sizes[-1] < _MIN_RATIO * sizes[0]:
        return (
            f"the largest data volume is {sizes[-1] / sizes[0]:.1f} times the smallest: at least "
            f"{_MIN_RATIO} times are needed"
        )
    return ""


def is_vague(estimate: Estimate, law: Law) -> bool:
    """Return whether a forecast is so wide that it says nothing."""
    return estimate.high - estimate.low > _MOST_DOUBT * law.scale


def fit_law(points: Sequence[SizedScore], is_share: bool, covariance: Floats | None = None) -> Law:
    """Return the curves that fit.

    Args:
        points: Those that `refusal` has nothing against.
        is_share: Scores are shares, and higher is better; otherwise they are losses above 0.
        covariance: Of the points' noise, where they are of the same rows; None: each has its own.
            Shape (K, K).

    Source: for the sampling Del Moral, Doucet and Jasra 2006, "Sequential Monte Carlo samplers",
    section 3.3.2.3.
    """
    sizes = np.array([point.num_examples for point in points], float)
    scores = np.array([point.score for point in points])
    best, scale = (1.0, 1.0) if is_share else (0.0, float(scores.max()))
    errors = (best - scores if is_share else scores) / scale
    if covariance is None:
        covariance = np.diag([point.std_error**2 for point in points])
    values, vectors = np.linalg.eigh(covariance / scale**2)
    noise = Noise(np.maximum(values, 0), vectors)
    places = np.random.default_rng(_SEED).random((_NUM_CURVES, 5))
    # The bounds of the prior know the sizes that were tried, not the scores.
    places = _sample(places, lambda at: _log_likelihood(_curves(at, sizes), sizes, errors, noise))
    curves = _curves(places, sizes)
    floor, drop, half, exponent, scatter = curves
    above = (errors - _expected(curves, sizes)) * scale * (-1 if is_share else 1)
    return Law(
        floor, drop, half, exponent, best, scale, scatter * scale, above, np.asarray(covariance)
    )


class Noise(NamedTuple):
    """A covariance by its eigenvalues, shape (K,), and eigenvectors, shape (K, K)."""

    values: Floats
    vectors: Floats


class Curves(NamedTuple):
    """Learning curves by their parameters, each of shape (P,)."""

    floor: Floats
    drop: Floats
    half: Floats
    exponent: Floats
    scatter: Floats


def _curves(places: Floats, sizes: Floats) -> Curves:
    """Return the curves at places in the unit cube, shape (P, 5)."""
    low, high = math.log(sizes.min() / _HALF_BEYOND), math.log(sizes.max() * _HALF_BEYOND)
    floor = places[:, 0] ** 2  # more often low than high
    drop = places[:, 1] * (1 - floor)
    half = np.exp(low + places[:, 2] * (high - low))
    exponent = _EXPONENT[0] + places[:, 3] * (_EXPONENT[1] - _EXPONENT[0])
    scatter = _SCATTER[0] * (_SCATTER[1] / _SCATTER[0]) ** places[:, 4]
    return Curves(floor, drop, half, exponent, scatter)


def _expected(curves: Curves, sizes: Floats) -> Floats:
    """Return the errors of the curves at the sizes. Shape (P, K)."""
    floor, drop, half, exponent, _ = (value[:, None] for value in curves)
    return floor + drop / (1 + (sizes / half) ** exponent)


def _log_likelihood(
    curves: Curves,
    sizes: Floats,
    errors: Floats,
    noise: Noise,
) -> Floats:
    variance = noise.values + curves.scatter[:, None] ** 2
    residuals = (errors - _expected(curves, sizes)) @ noise.vectors
    return -0.5 * (residuals**2 / variance + np.log(variance)).sum(axis=1)


def _sample(places: Floats, log_likelihood: Callable[[Floats], Floats]) -> Floats:
    """Return places distributed by the likelihood over the unit cube.

    Args:
        places: Uniform in the cube. Shape (P, 5).
    """
    generator = np.random.default_rng(_SEED + 1)
    count, dimensions = places.shape
    fit, temperature = log_likelihood(places), 0.0
    while temperature < 1:
        step = _next_step(fit, 1 - temperature)
        temperature += step
        weights = np.exp(step * (fit - fit.max()))
        chosen = generator.choice(count, count, p=weights / weights.sum())
        places, fit = places[chosen], fit[chosen]
        spread = np.linalg.cholesky(np.cov(places.T) + 1e-10 * np.eye(dimensions))
        for size in np.geomspace(1.2, 0.2, _STEPS_PER_TEMPERATURE):
            moved = places + size * generator.standard_normal(places.shape) @ spread.T
            moved = np.abs(moved)  # reflected at the walls of the cube
            moved = np.clip(np.where(moved > 1, 2 - moved, moved), 0, 1)
            moved_fit = log_likelihood(moved)
            taken = np.log(generator.random(count)) < temperature * (moved_fit - fit)
            places = np.where(taken[:, None], moved, places)
            fit = np.where(taken, moved_fit, fit)
    return places


def _next_step(fit: Floats, most: float) -> float:
    """Return how far the temperature may rise, so that half of the places still count."""
    step = most
    while True:
        weights = np.exp(step * (fit - fit.max()))
        if weights.sum() ** 2 >= 0.5 * len(fit) * (weights**2).sum():
            return step
        step *= 0.8


def _estimate(values: Floats) -> Estimate:
    # Not interpolated, for some may be infinite.
    ends = [0.5, (1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    return Estimate(*(float(value) for value in np.quantile(values, ends, method="nearest")))
