"""Intervals and tests for rows that come in clusters, and what they decide.

Rows of one cluster (a module, a conversation, a set of near-duplicates) succeed and fail together.
Counting them as independent makes intervals too short. Which estimator was chosen, and the
simulation that decided, is in `docs/adr/0020-intervals-know-their-clusters.md`.

Where every row is a cluster of its own (`Clusters.singletons`) use the intervals for independent
rows: they are a little shorter.

Shape legend: n rows, G clusters, R rows of weights, K intraclass correlations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

from tuneloop.evals.scoring.intervals import Floats, Scale

# The prior of the intraclass correlation: 30% that rows are as good as independent, the rest
# uniform in the square root, from 0.0002 to 0.98.
ICC_GRID = np.r_[1e-5, ((np.arange(40) + 0.5) / 40) ** 2]
ICC_PRIOR = np.r_[0.3, np.full(40, 0.7 / 40)]
_CHUNK_CELLS = 4_000_000
# Rates nearer to 0 or 1 are numerically the same.
_EDGE = 1e-9
# Beyond this many clusters the normal limit with its kurtosis term is right to 1e-5.
_MAX_EXACT_FLIPS = 500
_FLIP_UNITS = 20_000


@dataclass(frozen=True)
class Clusters:
    """The cluster of each row.

    Args:
        index: Shape (n,), values 0 to G - 1.
        sizes: Shape (G,), rows of each cluster.
    """

    index: NDArray[np.intp]
    sizes: Floats

    @classmethod
    def of(cls, ids: Sequence[object] | NDArray) -> Clusters:
        """Return the clusters of rows with these ids, shape (n,)."""
        _, index, counts = np.unique(np.asarray(ids), return_inverse=True, return_counts=True)
        return cls(index.astype(np.intp), counts.astype(np.float64))

    @property
    def singletons(self) -> bool:
        """Whether every row is a cluster of its own."""
        return len(self.sizes) == len(self.index)

    def totals(self, values: Floats) -> Floats:
        """Return the sum over each cluster, shape (G,), of values of shape (n,)."""
        totals = np.bincount(self.index, weights=values, minlength=len(self.sizes))
        return totals.astype(np.float64)


@dataclass(frozen=True)
class ClusteredEstimate:
    """A mean, or a difference of means, with its interval.

    Args:
        value: The mean over rows; None without rows.
        low: Lower end; None with fewer than two clusters.
        high: Upper end.
        n: Rows.
        num_clusters: Clusters of these rows.
        method: How the interval was computed.
        std_error: Cluster-robust standard error of the mean (CR2).
        design_effect: Variance of the mean over what independent rows would give.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    num_clusters: int
    method: str
    std_error: float | None = None
    design_effect: float | None = None


def estimate_clustered_mean(
    values: Floats, clusters: Clusters, scale: Scale, confidence: float = 0.95
) -> ClusteredEstimate:
    """Return the mean over rows with its interval.

    Args:
        values: Shape (n,).
        clusters: Of the same rows.
        scale: `binary` for 0 or 1, `unit` for scores in [0, 1], `unbounded` otherwise.
        confidence: Level of the interval, for example 0.95.
    """
    described = mean_with_error(values, clusters)
    if described.value is None or described.std_error is None:
        return described
    edge = scale != "unbounded" and described.value in (0.0, 1.0)
    if scale == "binary" or edge:
        low, high = _beta_binomial_ends(clusters.totals(values), clusters.sizes, confidence)
        return replace(described, low=low, high=high, method="Wilson, ICC averaged")
    variance = described.std_error**2
    df = satterthwaite_df(clusters.sizes, intraclass_correlation(values, clusters))
    return with_ends(described, variance, df, scale, confidence)


def estimate_clustered_difference(
    first: Floats, second: Floats, clusters: Clusters, scale: Scale, confidence: float = 0.95
) -> tuple[ClusteredEstimate, float | None, str]:
    """Return the mean of first minus second over the same rows, with a two-sided p-value.

    Args:
        first: Shape (n,), scores of one arm.
        second: Shape (n,), scores of the other arm for the same rows.
        clusters: Of the same rows.
        scale: Of the scores; `binary` and `unit` bound the interval to [-1, 1].
        confidence: Level of the interval.

    Returns:
        The estimate, the p-value of "no difference", and the test's name. The interval and the
        test are made differently and may disagree close to the level.
    """
    differences = first - second
    described = mean_with_error(differences, clusters)
    if described.value is None:
        return described, None, "none"
    p_value = sign_flip_p(clusters.totals(differences))
    test = "sign-flip of clusters, mid-p"
    if described.std_error is None:
        return described, p_value, test
    centre = described.value
    if np.ptp(differences) == 0 and scale != "unbounded":
        # No row deviates: as many may deviate as a rate of zero leaves possible, as far as it goes.
        _, share = _beta_binomial_ends(np.zeros_like(clusters.sizes), clusters.sizes, confidence)
        low, high = centre - share * (1 + centre), centre + share * (1 - centre)
        return (
            replace(described, low=low, high=high, method="no row deviates: Wilson, ICC averaged"),
            p_value,
            test,
        )
    df = satterthwaite_df(clusters.sizes, intraclass_correlation(differences, clusters))
    estimate = with_ends(described, described.std_error**2, df, "unbounded", confidence)
    if scale != "unbounded" and estimate.low is not None and estimate.high is not None:
        estimate = replace(estimate, low=max(-1.0, estimate.low), high=min(1.0, estimate.high))
    return estimate, p_value, test


def estimate_clustered_statistic(
    statistic: Callable[[Floats], Floats],
    clusters: Clusters,
    scale: Scale,
    confidence: float = 0.95,
) -> ClusteredEstimate:
    """Return a statistic of weighted rows with the interval of the delete-one-cluster jackknife.

    Args:
        statistic: From weights of shape (R, n) to values of shape (R,), for example macro-F1.
        clusters: Of the rows.
        scale: `unit` for a statistic in [0, 1], `unbounded` otherwise (differences).
        confidence: Level of the interval.

    Source: Cameron, Gelbach and Miller 2008, "Bootstrap-based improvements for inference with
    clustered errors", section III (the jackknife is CR3).
    """
    n, num_clusters = len(clusters.index), len(clusters.sizes)
    if n == 0:
        return ClusteredEstimate(None, None, None, 0, 0, "no rows")
    value = float(statistic(np.ones((1, n)))[0])
    if num_clusters < 2:
        return ClusteredEstimate(value, None, None, n, num_clusters, "one cluster")
    without = without_each_cluster(statistic, clusters)
    factor = (num_clusters - 1) / num_clusters
    variance = float(factor * ((without - without.mean()) ** 2).sum())
    described = ClusteredEstimate(
        value, None, None, n, num_clusters, "jackknife", math.sqrt(variance)
    )
    estimate = with_ends(described, variance, num_clusters - 1, scale, confidence)
    return replace(estimate, method="jackknife over clusters")


def without_each_cluster(statistic: Callable[[Floats], Floats], clusters: Clusters) -> Floats:
    """Return a statistic of weighted rows without each of the clusters, shape (G,)."""
    n, num_clusters = len(clusters.index), len(clusters.sizes)
    size = max(1, _CHUNK_CELLS // n)
    return np.concatenate(
        [
            statistic((np.arange(start, stop)[:, None] != clusters.index).astype(np.float64))
            for start in range(0, num_clusters, size)
            for stop in [min(start + size, num_clusters)]
        ]
    )


def intraclass_correlation(values: Floats, clusters: Clusters) -> float:
    """Return the ANOVA estimate of the intraclass correlation, cut to [0, 1].

    Source: Donner 1986, "A review of inference procedures for the intraclass correlation
    coefficient in the one-way random effects model".
    """
    sizes, n, num_clusters = clusters.sizes, len(values), len(clusters.sizes)
    if num_clusters < 2 or num_clusters == n:
        return 0.0
    totals = clusters.totals(values)
    explained = float((totals**2 / sizes).sum())
    between = (explained - n * float(values.mean()) ** 2) / (num_clusters - 1)
    within = (float((values**2).sum()) - explained) / (n - num_clusters)
    typical = (n - float((sizes**2).sum()) / n) / (num_clusters - 1)
    spread = between + (typical - 1) * within
    return min(1.0, max(0.0, (between - within) / spread)) if spread > 0 else 0.0


def cr2_variance(totals: Floats, sizes: Floats) -> float:
    """Return the cluster-robust variance of a mean over rows, unbiased for independent rows.

    Args:
        totals: Shape (G,), sum of each cluster's values.
        sizes: Shape (G,), rows of each cluster; at least two clusters.

    Source: Bell and McCaffrey 2002, "Bias reduction in standard errors for linear regression
    with multi-stage samples".
    """
    n = sizes.sum()
    residuals = totals - sizes * (totals.sum() / n)
    return float((residuals**2 / (1 - sizes / n)).sum() / n**2)


def satterthwaite_df(sizes: Floats, icc: float) -> float:
    """Return the degrees of freedom of `cr2_variance` for rows with one intraclass correlation.

    They are G - 1 for equal sizes, and fewer when a few clusters hold most of the rows.

    Source: Bell and McCaffrey 2002; here in closed form, with the covariance of the residuals of
    clusters g and h under exchangeable rows, c = v_g [g = h] - (n_g v_h + n_h v_g - n_g n_h V/n)/n.
    """
    n = sizes.sum()
    weights = 1 / (1 - sizes / n)
    spread = sizes * (1 + (sizes - 1) * icc)
    total = spread.sum()
    shared = (2 * sizes * spread - sizes**2 * total / n) / n
    diagonal = spread - shared

    def mix(left: Floats, right: Floats) -> float:
        return float((weights * left * right).sum())

    own, cross, other = mix(sizes, sizes), mix(sizes, spread), mix(spread, spread)
    # The sum of squares of the rank-two part over all pairs, from three sums.
    pairs = 2 * (own * other + cross**2) - 4 * cross * own * total / n + (own * total / n) ** 2
    squares = pairs / n**2 + float((weights**2 * (diagonal**2 - shared**2)).sum())
    return float((weights * diagonal).sum()) ** 2 / squares


def sign_flip_p(totals: Floats) -> float:
    """Return the two-sided mid-p-value that cluster totals are symmetric about zero.

    The distribution over all 2**G sign patterns is exact up to 500 clusters that differ from zero
    (totals that are not whole numbers are rounded to 1/20,000 of their sum), its normal limit with
    the kurtosis term beyond. Ties with what was observed count half: for clusters of one row this
    is McNemar's mid-p test.

    Args:
        totals: Shape (G,), sum of the paired differences in each cluster.

    Source: Hemerik, Goeman and Finos 2020, "Robust testing in generalized linear models by
    sign-flipping score contributions"; Fagerland, Lydersen and Laake 2013, on the mid-p test.
    """
    moved = totals[totals != 0]
    if len(moved) == 0:
        return 1.0
    if len(moved) > _MAX_EXACT_FLIPS:
        power = float((moved**2).sum())
        z = abs(float(moved.sum())) / math.sqrt(power)
        kurtosis = -2 * float((moved**4).sum()) / power**2
        density = math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
        tail = float(special.ndtr(-z)) + density * kurtosis / 24 * (z**3 - 3 * z)
        return min(1.0, max(0.0, 2 * tail))
    sizes = np.abs(moved)
    scale = 1.0 if _are_small_integers(sizes) else _FLIP_UNITS / sizes.sum()
    units = np.rint(sizes * scale).astype(np.int64)
    chances = np.zeros(int(units.sum()) + 1)
    chances[0] = 1.0
    reach = 0
    for unit in units.tolist():
        reach += unit
        flipped = chances[: reach + 1].copy()
        flipped[unit:] += chances[: reach + 1 - unit]
        chances[: reach + 1] = flipped / 2
    excess = np.abs(2 * np.arange(reach + 1) - reach)
    observed = abs(2 * int(units[moved > 0].sum()) - reach)
    return min(1.0, float(chances[excess > observed].sum() + chances[excess == observed].sum() / 2))


def holm(p_values: Floats) -> Floats:
    """Return p-values adjusted for how many there are, shape unchanged; NaN stays NaN.

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    adjusted = np.full(len(p_values), np.nan)
    known = np.flatnonzero(~np.isnan(p_values))
    order = known[np.argsort(p_values[known], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p_values[order] * factors))
    return adjusted


@dataclass(frozen=True)
class PairedDesign:
    """What is known of a paired test before it is run.

    Args:
        num_clusters: Clusters of the test, at least 2; of uneven ones as many as would count the
            same if they were even (`PairedDesign.of`).
        mean_size: Rows of a cluster; of uneven ones the mean over rows, so that the product of
            both is the number of rows.
        discordance: Variance of a row's difference if both arms are equally good; for 0/1 scores
            the share of rows that one arm alone gets right, in (0, 1].
        icc: Intraclass correlation of the differences, 0 to 1.
        confidence: Level of the test.
        power: Chance of finding the difference.
        binary: Scores are 0 or 1.
        by_seeds: The difference that would be detectable with infinitely many rows, where an arm is
            several trainings.
    """

    num_clusters: float
    mean_size: float
    discordance: float
    icc: float = 0.0
    confidence: float = 0.95
    power: float = 0.8
    binary: bool = True
    by_seeds: float = 0.0

    @classmethod
    def of(cls, clusters: Clusters, discordance: float, icc: float) -> PairedDesign:
        """Return the design of a test on these rows."""
        mean_size = float((clusters.sizes**2).sum() / clusters.sizes.sum())
        return cls(float(clusters.sizes.sum()) / mean_size, mean_size, discordance, icc)

    @property
    def design_effect(self) -> float:
        """By how much the correlation inflates the variance (Kish 1965, "Survey sampling")."""
        return 1 + (self.mean_size - 1) * self.icc


def detectable_difference(design: PairedDesign) -> float:
    """Return the smallest true difference that the test finds with its power.

    For 0/1 scores the variance of a row's difference is the discordance less the squared
    difference. Where the difference would be larger than the discordance, the rows that differ all
    differ one way.
    """
    df = max(1.0, design.num_clusters - 1)
    quantiles = stats.t.ppf([0.5 + design.confidence / 2, design.power], df)
    rows = design.num_clusters * design.mean_size
    ratio = float(quantiles.sum()) ** 2 * design.design_effect / rows
    if not design.binary:
        return math.hypot(math.sqrt(ratio * design.discordance), design.by_seeds)
    difference = math.sqrt(ratio * design.discordance / (1 + ratio))
    return difference if difference <= design.discordance else ratio / (1 + ratio)


def rows_needed(design: PairedDesign, difference: float) -> int:
    """Return how many rows the test needs to find a difference, in clusters as uneven as now.

    Args:
        design: As for `detectable_difference`; its number of clusters is ignored.
        difference: Above 0 and at most 1.

    Raises:
        ValueError: The difference is not above 0 and at most 1.
    """
    if not 0 < difference <= 1:
        raise ValueError(f"A difference of {difference} is not above 0 and at most 1.")

    def misses(num_clusters: float) -> bool:
        return detectable_difference(replace(design, num_clusters=num_clusters)) > difference

    high = 2
    while misses(high):
        high *= 2
    low = max(2, high // 2)
    while low < high:
        middle = (low + high) // 2
        if misses(middle):
            low = middle + 1
        else:
            high = middle
    return math.ceil(high * design.mean_size)


def mean_with_error(values: Floats, clusters: Clusters) -> ClusteredEstimate:
    """Return the mean, its standard error and design effect, still without an interval."""
    n, num_clusters = len(values), len(clusters.sizes)
    if n == 0:
        return ClusteredEstimate(None, None, None, 0, 0, "no rows")
    mean = float(values.mean())
    if num_clusters < 2:
        return ClusteredEstimate(mean, None, None, n, num_clusters, "one cluster")
    variance = cr2_variance(clusters.totals(values), clusters.sizes)
    plain = float(values.var(ddof=1)) / n
    effect = variance / plain if plain > 0 else None
    return ClusteredEstimate(mean, None, None, n, num_clusters, "none", math.sqrt(variance), effect)


def with_ends(
    described: ClusteredEstimate, variance: float, df: float, scale: Scale, confidence: float
) -> ClusteredEstimate:
    """Return the estimate with a t interval, in Wilson's form where scores end at 0 and 1."""
    quantile = float(stats.t.ppf(0.5 + confidence / 2, max(1.0, df)))
    return with_half_width(described, quantile * math.sqrt(variance), scale)


def with_half_width(described: ClusteredEstimate, half: float, scale: Scale) -> ClusteredEstimate:
    """Return the estimate with an interval of this half-width, in Wilson's form likewise."""
    mean = described.value
    assert mean is not None
    if scale == "unbounded" or not 0 < mean < 1:
        return replace(described, low=mean - half, high=mean + half, method="CR2, t")
    # Wilson's interval for as many rows as would give a proportion this variance.
    ratio = half**2 / (mean * (1 - mean))
    centre = (mean + ratio / 2) / (1 + ratio)
    half = math.sqrt(ratio * mean * (1 - mean) + ratio**2 / 4) / (1 + ratio)
    low, high = min(centre - half, mean), max(centre + half, mean)
    return replace(described, low=max(0.0, low), high=min(1.0, high), method="Wilson, CR2, t")


def _beta_binomial_ends(totals: Floats, sizes: Floats, confidence: float) -> tuple[float, float]:
    """Return Wilson's interval, averaged over the intraclass correlations that fit the data.

    A rate is rejected where the mean over K correlations of Wilson's one-sided p-value, with that
    correlation's design effect, is below the level. A correlation weighs its prior times the
    beta-binomial likelihood it gives the clusters, at the rate half-way between the observed and
    the tested one. At the observed rate alone a low rate hides its correlation and the interval is
    too short; at the tested rate alone it is up to three times too long.
    """
    n = sizes.sum()
    rate = float(totals.sum() / n)
    angle = math.asin(math.sqrt(rate))
    (wins, rows), counts = _distinct_pairs(totals, sizes)
    effects = 1 + ((sizes**2).sum() / n - 1) * ICC_GRID
    precision = (1 / ICC_GRID - 1)[:, None]
    df = len(sizes) - 1

    def level(tested: float) -> float:
        """Return the chance of a lower rate than the observed one."""
        between = math.sin((angle + math.asin(math.sqrt(tested))) / 2) ** 2
        alpha, beta = between * precision, (1 - between) * precision
        fits = special.betaln(wins + alpha, rows - wins + beta) - special.betaln(alpha, beta)
        fit = fits @ counts
        weights = ICC_PRIOR * np.exp(fit - fit.max())
        errors = np.sqrt(tested * (1 - tested) / n * effects)
        return float(weights @ special.stdtr(df, (tested - rate) / errors) / weights.sum())

    tail = (1 - confidence) / 2
    ends, rate = [0.0, 1.0], min(max(rate, _EDGE), 1 - _EDGE)
    if totals.any():
        ends[0] = optimize.brentq(lambda p: level(p) - tail, _EDGE, rate, xtol=1e-6)
    if (totals < sizes).any():
        ends[1] = optimize.brentq(lambda p: level(p) - 1 + tail, rate, 1 - _EDGE, xtol=1e-6)
    return ends[0], ends[1]


def _distinct_pairs(totals: Floats, sizes: Floats) -> tuple[Floats, Floats]:
    """Return the distinct (total, size) pairs, shape (2, P), and how often each occurs, (P,)."""
    pairs, counts = np.unique(np.stack([totals, sizes]), axis=1, return_counts=True)
    return pairs, counts.astype(np.float64)


def _are_small_integers(sizes: Floats) -> bool:
    return bool((sizes == np.rint(sizes)).all()) and float(sizes.sum()) <= 2 * _FLIP_UNITS
