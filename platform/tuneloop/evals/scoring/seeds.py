"""Intervals and tests over several trainings of one recipe: other seeds as well as other rows.

Which estimator was chosen, and the simulation that decided, is in
`docs/adr/0037-several-trainings-are-one-arm.md`.

Shape legend: n rows, G clusters, S and T seeds (trainings), R rows of weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

from tuneloop.evals.scoring.clusters import (
    ClusteredEstimate,
    Clusters,
    estimate_clustered_mean,
    intraclass_correlation,
    mean_with_error,
    satterthwaite_df,
    with_half_width,
    without_each_cluster,
)
from tuneloop.evals.scoring.intervals import Floats, Scale

# p-values below this are not told apart.
_LEAST_TAIL = 1e-12
_NO_VARIANCE = 1e-24


@dataclass(frozen=True)
class SeedsEstimate(ClusteredEstimate):
    """A mean over seeds and rows, or a difference of two, with its interval.

    Args:
        p_value: Two-sided, of "zero"; the interval excludes zero exactly where it is below.
        seed_share: The part of the variance that more seeds would remove, 0 to 1.
    """

    p_value: float = 1.0
    seed_share: float = 0.0


class Seeds(NamedTuple):
    """What several trainings scored.

    Args:
        means: Shape (S,), the score of each.
        parts: Shape (S, G), what each cluster adds to it: over the clusters, the sum of their
            squares is the variance that the rows give the score.
    """

    means: Floats
    parts: Floats

    @classmethod
    def of_rows(cls, values: Floats, clusters: Clusters) -> Seeds:
        """Return them of scores of shape (S, n) of rows in at least two clusters."""
        n, sizes, means = values.shape[1], clusters.sizes, values.mean(axis=1)
        totals = np.stack([clusters.totals(one) for one in values])
        # Weighted as in `cr2_variance`.
        return cls(means, (totals - np.outer(means, sizes)) / n / np.sqrt(1 - sizes / n))

    @classmethod
    def of_statistics(
        cls, statistics: Sequence[Callable[[Floats], Floats]], clusters: Clusters
    ) -> Seeds:
        """Return them of a statistic, such as macro-F1, of each training's answers to the rows."""
        n, num_clusters = len(clusters.index), len(clusters.sizes)
        means = np.array([float(statistic(np.ones((1, n)))[0]) for statistic in statistics])
        without = np.stack([without_each_cluster(one, clusters) for one in statistics])
        factor = math.sqrt((num_clusters - 1) / num_clusters)
        return cls(means, factor * (without.mean(axis=1, keepdims=True) - without))


class SeedScatter(NamedTuple):
    """How far trainings that differ in their seed alone lie apart.

    Args:
        variance: Of the score of one training, beyond what its rows explain.
        df: Its degrees of freedom: trainings less recipes; 0 where nothing is known.
    """

    variance: float
    df: int

    @classmethod
    def of(cls, *recipes: Seeds) -> SeedScatter:
        """Return it of one recipe, or pooled over several that are taken to scatter alike.

        That is the variance of the means, less what the variance of the rows holds already: the
        noise of a seed on a cluster. Where the rest is negative it counts as zero. Of the noise a
        share of (df - 1) / df is taken off. With all of it two seeds of one recipe cover as little
        as 88% and three 92% (`benchmarks/seeds.py`): the variance of few means is often low by
        chance, and then nothing would be left.
        """
        several = [seeds for seeds in recipes if len(seeds.means) > 1]
        df = sum(len(seeds.means) - 1 for seeds in several)
        if not df:
            return cls(0.0, 0)
        between = sum(((seeds.means - seeds.means.mean()) ** 2).sum() for seeds in several)
        noise = sum(((seeds.parts - seeds.parts.mean(axis=0)) ** 2).sum() for seeds in several)
        return cls(max(0.0, float(between - noise * (df - 1) / df) / df), df)


class _Variances(NamedTuple):
    """Independent parts of a variance, each with its degrees of freedom; both of shape (K,).

    The half-width of an interval is the root of the sum of the squared half-widths that each part
    alone would have. It covers at least its level, whichever part is the larger, where one t with
    combined degrees of freedom (Satterthwaite) covers 86% with two seeds.

    Source: Banerjee 1960, "Approximate confidence interval for linear functions of means of k
    populations when the population variances are not equal", Sankhya 22.
    """

    variances: Floats
    df: Floats

    @classmethod
    def of(cls, rows: float, df: float, *several: tuple[SeedScatter, int]) -> _Variances:
        """Return the variance of the rows and, of each arm, that of the mean of so many seeds."""
        each = [(scatter, num_seeds) for scatter, num_seeds in several if scatter.df]
        return cls(
            np.array([rows, *(scatter.variance / num_seeds for scatter, num_seeds in each)]),
            np.array([max(1.0, df), *(scatter.df for scatter, _ in each)]),
        )

    @property
    def vary(self) -> bool:
        """Whether there is more than the rounding of sums."""
        return bool((self.variances > _NO_VARIANCE).any())

    def half_width(self, confidence: float) -> float:
        return self._reach((1 - confidence) / 2)

    def p_value(self, value: float) -> float:
        """Return at which level an interval around this value would end at zero."""
        if self._reach(_LEAST_TAIL) <= abs(value):
            return 2 * _LEAST_TAIL
        if value == 0:
            return 1.0
        found = optimize.brentq(
            lambda tail: self._reach(math.exp(tail)) - abs(value),
            math.log(_LEAST_TAIL),
            math.log(0.5),
        )
        return 2 * math.exp(found)

    def _reach(self, tail: float) -> float:
        return math.sqrt(float((stats.t.isf(tail, self.df) ** 2 * self.variances).sum()))

    def estimate(
        self, described: ClusteredEstimate, scale: Scale, confidence: float
    ) -> SeedsEstimate:
        assert described.value is not None
        total = float(self.variances.sum())
        ended = with_half_width(described, self.half_width(confidence), scale)
        return SeedsEstimate(
            ended.value,
            ended.low,
            ended.high,
            ended.n,
            ended.num_clusters,
            f"{ended.method}, rows and seeds",
            math.sqrt(total),
            described.design_effect,
            self.p_value(described.value),
            float(self.variances[1:].sum()) / total,
        )


def estimate_over_seeds(
    values: Floats,
    clusters: Clusters,
    scale: Scale,
    confidence: float = 0.95,
    scatter: SeedScatter | None = None,
) -> ClusteredEstimate:
    """Return the mean over seeds and rows, for what other seeds and other rows would give.

    The variance has two parts: that of the rows (of the scores averaged over seeds), and that of
    the seeds with S - 1 degrees of freedom. So few seeds give wide intervals if they differ.

    Args:
        values: Shape (S, n): scores, or paired differences, of S models on the same rows.
        clusters: Of the rows.
        scale: Of the values; `unbounded` for differences.
        confidence: Level of the interval.
        scatter: Of the seeds, where more is known of it than these trainings tell.
    """
    estimate = _mean_over_seeds(values, None, clusters, scale, confidence, scatter)
    return estimate or estimate_clustered_mean(values.mean(axis=0), clusters, scale, confidence)


def estimate_difference_over_seeds(
    first: Floats, second: Floats, clusters: Clusters, scale: Scale, confidence: float = 0.95
) -> SeedsEstimate | None:
    """Return the mean of first minus second, for other seeds of both and other rows.

    Args:
        first: Shape (S, n): scores of the models of one arm.
        second: Shape (T, n): of the other arm, for the same rows. The seeds of the two have nothing
            to do with one another. Of one model alone nothing is said of other seeds.
        clusters: Of the rows.
        scale: Of the scores; `binary` and `unit` bound the interval to [-1, 1].
        confidence: Level of the interval.

    Returns:
        None where nothing varies, or with fewer than two clusters: the estimators for one model
        know what to say.
    """
    estimate = _mean_over_seeds(first, second, clusters, "unbounded", confidence)
    if estimate is None or scale == "unbounded":
        return estimate
    assert estimate.low is not None
    assert estimate.high is not None
    return replace(estimate, low=max(-1.0, estimate.low), high=min(1.0, estimate.high))


def _mean_over_seeds(
    first: Floats,
    second: Floats | None,
    clusters: Clusters,
    scale: Scale,
    confidence: float,
    scatter: SeedScatter | None = None,
) -> SeedsEstimate | None:
    """Return the mean, less that of `second`; None for one seed each, or where nothing varies."""
    arms = [first] if second is None else [first, second]
    averaged = first.mean(axis=0) - (0 if second is None else second.mean(axis=0))
    described = mean_with_error(averaged, clusters)
    if described.std_error is None:
        return None
    scatters = [scatter or SeedScatter.of(Seeds.of_rows(one, clusters)) for one in arms]
    if not any(one.df for one in scatters):
        return None
    df = satterthwaite_df(clusters.sizes, intraclass_correlation(averaged, clusters))
    counted = zip(scatters, map(len, arms), strict=True)
    variances = _Variances.of(described.std_error**2, df, *counted)
    if not variances.vary:
        return None
    return variances.estimate(described, scale, confidence)


def estimate_statistic_over_seeds(
    first: Seeds, second: Seeds | None, clusters: Clusters, scale: Scale, confidence: float
) -> SeedsEstimate | None:
    """Return the mean of a statistic of several trainings, less that of others; by the jackknife.

    Args:
        first: Of one arm (`Seeds.of_statistics`).
        second: Of the arm that it is held against, if any.
        clusters: Of the rows.
        scale: `unit` for a statistic in [0, 1], `unbounded` for a difference of two of them.
        confidence: Level of the interval.

    Returns:
        None where nothing varies.
    """
    each = [first] if second is None else [first, second]
    signs = (1, -1)
    value = sum(s * float(one.means.mean()) for s, one in zip(signs, each, strict=False))
    parts = sum(s * one.parts.mean(axis=0) for s, one in zip(signs, each, strict=False))
    n, num_clusters = len(clusters.index), len(clusters.sizes)
    rows = float((np.asarray(parts) ** 2).sum())
    counted = ((SeedScatter.of(one), len(one.means)) for one in each)
    variances = _Variances.of(rows, num_clusters - 1, *counted)
    if not variances.vary:
        return None
    described = ClusteredEstimate(value, None, None, n, num_clusters, "jackknife")
    estimate = variances.estimate(described, scale, confidence)
    return replace(estimate, method="jackknife over clusters, t, rows and seeds")


def detectable_by_seeds(values: Floats, clusters: Clusters, confidence: float) -> float:
    """Return the difference below which these seeds find nothing, however many rows there are.

    It is found in 80% of the cases with infinitely many rows; 0 for one seed.

    Args:
        values: Shape (S, n), scores of one arm's models.
        clusters: Of the rows, at least two.
        confidence: Level of the test.
    """
    if len(values) < 2:
        return 0.0
    quantiles = stats.t.ppf([0.5 + confidence / 2, 0.8], len(values) - 1)
    scatter = SeedScatter.of(Seeds.of_rows(values, clusters))
    return float(quantiles.sum()) * math.sqrt(scatter.variance / len(values))
