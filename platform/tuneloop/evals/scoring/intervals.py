"""Intervals and tests for one mean and for the mean of paired differences.

Shape legend: n scored examples, R resamples.

0/1 scores get closed-form score intervals, which stay honest at the edges: when five of five
answers are right, a bootstrap would claim certainty. Other scores get the BCa bootstrap.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]
# `binary` is 0 or 1, `unit` lies in [0, 1].
Scale = Literal["binary", "unit", "unbounded"]
_CHUNK_CELLS = 4_000_000
# Of at most two bytes each below 65,536 rows: 200 MB.
_KEPT_CELLS = 100_000_000
_MAX_ENUMERATED_FLIPS = 14


@dataclass(frozen=True)
class Resampling:
    """How intervals are computed.

    Args:
        confidence: Level of every interval, for example 0.95.
        num_resamples: Bootstrap resamples and random sign flips; 0 for none: every interval and
            test is then computed from the spread of the rows.
        seed: Seed of both.
    """

    confidence: float = 0.95
    num_resamples: int = 10_000
    seed: int = 0


@dataclass(frozen=True)
class IntervalEstimate:
    """A mean with its interval.

    Args:
        value: The mean; None without examples.
        low: Lower end; None where there are too few examples to tell.
        high: Upper end.
        n: Examples it was computed from.
        method: How the interval was computed.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    method: str


@dataclass(frozen=True)
class DifferenceEstimate(IntervalEstimate):
    """The mean of paired differences.

    Args:
        p_value: Two-sided, of "no difference"; None without examples.
        test: Name of the test.
    """

    p_value: float | None
    test: str


class PairedCounts(NamedTuple):
    """Examples by where they are right."""

    both: int
    first_only: int
    second_only: int
    neither: int


def wilson(num_right: float, n: float, confidence: float) -> tuple[float, float]:
    """Return the score interval of a proportion.

    Args:
        num_right: Need not be whole: a sum of scores in [0, 1].
        n: Above 0; need not be whole: as many independent rows as say the same.
        confidence: For example 0.95.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    z = _quantile(0.5 + confidence / 2)
    rate = num_right / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    low = 0.0 if num_right == 0 else max(0.0, centre - half)
    return low, 1.0 if num_right == n else min(1.0, centre + half)


def newcombe_paired(counts: PairedCounts, confidence: float) -> tuple[float, float]:
    """Return the interval of the difference of two proportions over the same examples.

    Args:
        counts: Examples by where they are right.
        confidence: For example 0.95.

    Returns:
        Lower and upper end of first minus second.

    Source: Newcombe 1998, "Improved confidence intervals for the difference between binomial
    proportions based on paired data", method 10.
    """
    both, first_only, second_only, neither = counts
    n = sum(counts)
    p1, p2 = (both + first_only) / n, (both + second_only) / n
    low1, high1 = wilson(both + first_only, n, confidence)
    low2, high2 = wilson(both + second_only, n, confidence)
    margins = math.prod(
        (both + first_only, second_only + neither, both + second_only, first_only + neither)
    )
    phi = 0.0
    if margins:
        product = both * neither - first_only * second_only
        # The continuity correction Newcombe applies to a positive association.
        phi = (max(product - n / 2, 0) if product > 0 else product) / math.sqrt(margins)
    down1, up1, down2, up2 = p1 - low1, high1 - p1, p2 - low2, high2 - p2
    below = math.sqrt(max(0.0, down1**2 - 2 * phi * down1 * up2 + up2**2))
    above = math.sqrt(max(0.0, up1**2 - 2 * phi * up1 * down2 + down2**2))
    return max(-1.0, p1 - p2 - below), min(1.0, p1 - p2 + above)


def bca(values: Floats, resampling: Resampling) -> tuple[float, float]:
    """Return the bias-corrected and accelerated bootstrap interval of a mean.

    `scipy.stats.bootstrap` gives the same ends to 1e-15 from the same seed, but recomputes the
    jackknife row by row: 10,000 resamples of 10,000, 30,000 and 100,000 rows took it 5.9, 32 and
    181 s and up to 1.4 GB, this 1.8, 5.5 and 21 s and 160 MB (two cores, otherwise busy).

    Args:
        values: Shape (n,), n at least 2 and not all equal.
        resampling: Level, resamples and seed.

    Source: Efron 1987, "Better bootstrap confidence intervals", section 3.
    """
    means = np.concatenate(
        [values[chunk].mean(axis=1) for chunk in _resamples(len(values), resampling)]
    )
    mean = values.mean()
    share_below = ((means < mean).sum() + 0.5 * (means == mean).sum()) / len(means)
    bias = _quantile(min(max(float(share_below), 1 / len(means)), 1 - 1 / len(means)))
    # Jackknife means of a mean have a closed form, and so has their skewness.
    deviations = (values - mean) / (len(values) - 1)
    acceleration = float((deviations**3).sum() / (6 * (deviations**2).sum() ** 1.5))
    tail = _quantile(0.5 + resampling.confidence / 2)
    ends = []
    for z in (bias - tail, bias + tail):
        ends.append(_normal_cdf(bias + z / (1 - acceleration * z)))
    low, high = np.quantile(means, ends)
    return float(low), float(high)


def estimate_mean(values: Floats, scale: Scale, resampling: Resampling) -> IntervalEstimate:
    """Return a mean with its interval: Wilson for 0/1 scores, BCa bootstrap otherwise.

    Scores in [0, 1] that are all equal get the interval that a rate of zero leaves possible:
    equal scores of so many rows do not say that the next one is equal too.
    """
    n = len(values)
    if n == 0:
        return IntervalEstimate(None, None, None, 0, "no examples")
    mean = float(values.mean())
    if scale == "binary":
        ends = wilson(int(values.sum()), n, resampling.confidence)
        return IntervalEstimate(mean, *ends, n, "Wilson")
    return IntervalEstimate(mean, *_bootstrap(values, resampling, _floor(scale, 0.0)))


def estimate_difference(
    first: Floats, second: Floats, scale: Scale, resampling: Resampling
) -> DifferenceEstimate:
    """Return the mean of first minus second over the same examples.

    Args:
        first: Shape (n,), scores of one arm.
        second: Shape (n,), scores of the other arm for the same examples.
        scale: Of the scores.
        resampling: Level, resamples and seed.
    """
    n = len(first)
    if n == 0:
        return DifferenceEstimate(None, None, None, 0, "no examples", None, "none")
    differences = first - second
    mean = float(differences.mean())
    if scale == "binary":
        fixed, introduced = int((differences > 0).sum()), int((differences < 0).sum())
        both = int(((first == 1) & (second == 1)).sum())
        counts = PairedCounts(both, fixed, introduced, n - both - fixed - introduced)
        ends = newcombe_paired(counts, resampling.confidence)
        p_value = mcnemar_p(fixed, introduced)
        return DifferenceEstimate(mean, *ends, n, "Newcombe, paired", p_value, "McNemar, exact")
    p_value = sign_flip_p(differences, resampling)
    return DifferenceEstimate(
        mean,
        *_bootstrap(differences, resampling, _floor(scale, -1.0)),
        p_value,
        "sign-flip permutation",
    )


def estimate_statistic(
    n: int,
    statistic: Callable[[Floats], Floats],
    num_effective: float,
    scale: Scale,
    resampling: Resampling,
) -> DifferenceEstimate:
    """Return a statistic of weighted examples with its percentile bootstrap interval.

    Of a difference the p-value is that of a normal test with the spread of the resamples.

    Args:
        n: Number of examples.
        statistic: From weights of shape (R, n), how often each example is drawn, to shape (R,).
        num_effective: As many independent rows as say the same, for the interval where no
            resample differs.
        scale: `unit` for a statistic in [0, 1], else that of a difference of two of them.
        resampling: Level, resamples and seed.
    """
    if n == 0:
        return DifferenceEstimate(None, None, None, 0, "no examples", None, "none")
    value = float(statistic(np.ones((1, n)))[0])
    draws = []
    for chunk in _resamples(n, resampling):
        rows = np.arange(len(chunk))[:, None]
        weights = np.zeros((len(chunk), n))
        np.add.at(weights, (rows, chunk), 1.0)
        draws.append(statistic(weights))
    tail = (1 - resampling.confidence) / 2
    drawn = np.concatenate(draws)
    if np.ptp(drawn) == 0:
        least = 0.0 if scale == "unit" else -1.0
        ends = ends_of_equal(value, least, num_effective, resampling.confidence)
        return DifferenceEstimate(value, *ends, n, "all equal: Wilson", 1.0, "none")
    low, high = np.quantile(drawn, (tail, 1 - tail))
    p_value = 2 * _normal_cdf(-abs(value) / float(drawn.std()))
    method, test = "percentile bootstrap", "normal, bootstrap spread"
    return DifferenceEstimate(value, float(low), float(high), n, method, p_value, test)


def mcnemar_p(fixed: int, introduced: int) -> float:
    """Return the exact two-sided p-value that fixes and new errors are equally likely.

    Source: McNemar 1947; exact form: the binomial test over the discordant pairs.
    """
    total = fixed + introduced
    return float(stats.binomtest(fixed, total).pvalue) if total else 1.0


def sign_flip_p(differences: Floats, resampling: Resampling) -> float:
    """Return the two-sided p-value that differences are symmetric about zero.

    All sign patterns are tried up to 14 non-zero differences, random ones above.
    `scipy.stats.permutation_test` draws other patterns and doubles the smaller tail instead of
    counting both: on 60 differences 0.351 where this has 0.373. For 10,000 resamples of 10,000
    rows it took 5.1 s and 350 MB, this 0.6 s and 140 MB.
    """
    moved = differences[differences != 0]
    if len(moved) == 0:
        return 1.0
    observed = abs(moved.sum()) * (1 - 1e-12)
    if len(moved) <= _MAX_ENUMERATED_FLIPS:
        patterns = np.arange(2 ** len(moved))[:, None] >> np.arange(len(moved)) & 1
        return float((np.abs((1 - 2 * patterns) @ moved) >= observed).mean())
    generator = np.random.default_rng(resampling.seed)
    hits = 0
    for size in _chunks(resampling.num_resamples, len(moved)):
        signs = generator.integers(0, 2, (size, len(moved)), dtype=np.int8) * 2 - 1
        hits += int((np.abs(signs @ moved) >= observed).sum())
    return (hits + 1) / (resampling.num_resamples + 1)


def _bootstrap(
    values: Floats, resampling: Resampling, least: float | None
) -> tuple[float | None, float | None, int, str]:
    """Return the ends of the interval of a mean, the number of values and the method.

    Args:
        least: Lowest value there can be, the largest being 1; None without such bounds.
    """
    n = len(values)
    if n < 2:
        return None, None, n, "one example"
    if np.ptp(values) == 0:
        if least is None:
            return None, None, n, "all equal: no interval"
        ends = ends_of_equal(float(values[0]), least, n, resampling.confidence)
        return *ends, n, "all equal: Wilson"
    return *bca(values, resampling), n, "BCa bootstrap"


def _floor(scale: Scale, least: float) -> float | None:
    return None if scale == "unbounded" else least


def ends_of_equal(value: float, least: float, n: float, confidence: float) -> tuple[float, float]:
    """Return the interval of a mean of equal values.

    As many may deviate as a rate of zero leaves possible, as far as they can.

    Args:
        value: The mean.
        least: Lowest value there can be; the largest is 1.
        n: Independent rows.
        confidence: For example 0.95.
    """
    share = wilson(0, n, confidence)[1]
    return value - share * (value - least), value + share * (1 - value)


def _resamples(n: int, resampling: Resampling) -> Iterator[NDArray[np.integer]]:
    """Yield indices of shape (R, n) in chunks that bound the memory."""
    if n * resampling.num_resamples <= _KEPT_CELLS:
        yield from _kept_resamples(n, resampling.num_resamples, resampling.seed)
    else:
        yield from _draw(n, resampling.num_resamples, resampling.seed)


@functools.lru_cache(maxsize=1)
def _kept_resamples(n: int, num_resamples: int, seed: int) -> list[NDArray[np.integer]]:
    # Every metric of an arm has them: drawing them takes longer than all the means.
    small = np.min_scalar_type(n)
    return [chunk.astype(small) for chunk in _draw(n, num_resamples, seed)]


def _draw(n: int, num_resamples: int, seed: int) -> Iterator[NDArray[np.integer]]:
    generator = np.random.default_rng(seed)
    for size in _chunks(num_resamples, n):
        yield generator.integers(0, n, (size, n))


def _chunks(total: int, n: int) -> Iterator[int]:
    size = max(1, _CHUNK_CELLS // n)
    for start in range(0, total, size):
        yield min(size, total - start)


def _quantile(p: float) -> float:
    return NormalDist().inv_cdf(p)


def _normal_cdf(z: float) -> float:
    return 0.5 * math.erfc(-z / math.sqrt(2))
