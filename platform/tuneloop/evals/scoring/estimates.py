"""The estimators that fit the rows: those of `clusters` where rows belong together, else those of
`intervals`; and what a paired test can show at all.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import stats

from tuneloop.evals.scoring.clusters import (
    ClusteredEstimate,
    Clusters,
    PairedDesign,
    detectable_difference,
    estimate_clustered_difference,
    estimate_clustered_mean,
    estimate_clustered_statistic,
    holm,
    intraclass_correlation,
    rows_needed,
)
from tuneloop.evals.scoring.intervals import (
    Floats,
    Resampling,
    Scale,
    ends_of_equal,
    estimate_difference,
    estimate_mean,
    estimate_statistic,
    sign_flip_p,
    wilson,
)
from tuneloop.evals.scoring.metrics import Metric
from tuneloop.evals.scoring.seeds import (
    Seeds,
    SeedsEstimate,
    detectable_by_seeds,
    estimate_difference_over_seeds,
    estimate_over_seeds,
    estimate_statistic_over_seeds,
)

# A test that would need more rows than this is not worth the sentence.
_MOST_ROWS = 1_000_000
# With fewer rows the bootstrap covers too little: 87% of scores around 0.4 at 6 rows and 90% at 12,
# where t (in Wilson's form) covers 94 and 95%. From 60 rows on both are equally wide.
_FEW_ROWS = 50
_NO_WIDTH = 1e-12


def scale_of(metric: Metric) -> Scale:
    """Return the scale of a metric's scores."""
    scales: dict[str, Scale] = {"binary": "binary", "ratio": "unit", "number": "unbounded"}
    return scales[metric.kind]


def describe_mean(
    values: Floats, clusters: Clusters, metric: Metric, resampling: Resampling
) -> dict[str, Any]:
    """Return a mean with its interval, as `metrics.json` keeps it.

    Args:
        values: Shape (n,), or (S, n) of S trainings of one recipe: the interval is then one for
            other trainings as well as other rows.
        clusters: Of the same rows.
        metric: Whose scores they are.
        resampling: Level, resamples and seed.
    """
    scale = scale_of(metric)
    if values.ndim == 2:
        over_seeds = estimate_over_seeds(values, clusters, scale, resampling.confidence)
        if isinstance(over_seeds, SeedsEstimate):
            return _described(over_seeds)
        values = values.mean(axis=0)
    if _is_plain(values, clusters, scale, resampling):
        plain = estimate_mean(values, scale, resampling)
        return dataclasses.asdict(plain) | {"num_clusters": plain.n}
    estimate = estimate_clustered_mean(values, clusters, scale, resampling.confidence)
    if _has_no_width(estimate.low, estimate.high):
        estimate = _widened(estimate, scale, 0.0, resampling.confidence)
    return dataclasses.asdict(estimate)


def describe_difference(
    first: Floats, second: Floats, clusters: Clusters, metric: Metric, resampling: Resampling
) -> dict[str, Any]:
    """Return the mean of first minus second, as `comparison.json` keeps it.

    Beside the interval and the p-value it says what a test like this one can show: `detectable`,
    the smallest difference that it finds in 80% of the cases, and `rows_needed` to find the
    measured one as often.

    Args:
        first: Shape (n,), scores of one arm; or (S, n), of S trainings of one recipe.
        second: Likewise of the other arm for the same rows, (n,) or (T, n).
        clusters: Of the same rows.
        metric: Whose scores they are.
        resampling: Level, resamples and seed.
    """
    scale, confidence = scale_of(metric), resampling.confidence
    design = design_of(first, second, clusters, scale, confidence)
    ours, theirs = np.atleast_2d(first), np.atleast_2d(second)
    over_seeds = estimate_difference_over_seeds(ours, theirs, clusters, scale, confidence)
    first, second = ours.mean(axis=0), theirs.mean(axis=0)
    differences = first - second
    if over_seeds is not None:
        described = _described(over_seeds, is_difference=True)
    elif _is_plain(differences, clusters, scale, resampling):
        plain = estimate_difference(first, second, scale, resampling)
        described = dataclasses.asdict(plain) | {"num_clusters": plain.n}
    else:
        estimate, p_value, test = estimate_clustered_difference(
            first, second, clusters, scale, confidence
        )
        if clusters.singletons and resampling.num_resamples:
            p_value, test = sign_flip_p(differences, resampling), "sign-flip permutation"
        if _has_no_width(estimate.low, estimate.high):
            estimate = _widened(estimate, scale, -1.0, confidence)
        described = dataclasses.asdict(estimate) | {"p_value": p_value, "test": test}
    return described | _describe_power(design, differences)


def describe_statistic(
    statistic: Callable[[Floats], Floats],
    clusters: Clusters,
    num_effective: float,
    scale: Scale,
    resampling: Resampling,
) -> dict[str, Any]:
    """Return a statistic of weighted rows with its interval; of a difference also the p-value.

    Args:
        statistic: From weights of shape (R, n) to values of shape (R,), for example macro-F1.
        clusters: Of the rows.
        num_effective: As many independent rows as say the same; for the interval of 0 and 1, where
            no resample differs.
        scale: `unit` for a statistic in [0, 1], `unbounded` for a difference of two of them.
        resampling: Level, resamples and seed.
    """
    n = len(clusters.index)
    if clusters.singletons:
        plain = estimate_statistic(n, statistic, num_effective, scale, resampling)
        described = dataclasses.asdict(plain) | {"num_clusters": plain.n}
        if scale == "unit":
            described = {k: v for k, v in described.items() if k not in ("p_value", "test")}
        return described
    estimate = estimate_clustered_statistic(statistic, clusters, scale, resampling.confidence)
    low, high, value = estimate.low, estimate.high, estimate.value
    least = 0.0 if scale == "unit" else -1.0
    if _has_no_width(low, high) and value is not None:
        # No cluster makes a difference: as much may as a rate of zero leaves possible.
        effective = num_effective * len(clusters.sizes) / max(1, n)
        low, high = ends_of_equal(value, least, effective, resampling.confidence)
        estimate = dataclasses.replace(
            estimate, low=low, high=high, method="no cluster deviates: Wilson"
        )
    if low is not None and high is not None:
        estimate = dataclasses.replace(estimate, low=max(least, low), high=min(1.0, high))
    described = dataclasses.asdict(estimate)
    if scale == "unit" or estimate.value is None:
        return described
    p_value = None
    if error := estimate.std_error:
        df = max(1, len(clusters.sizes) - 1)
        p_value = float(2 * stats.t.sf(abs(estimate.value) / error, df))
    elif len(clusters.sizes) > 1:
        p_value = 1.0
    return described | {"p_value": p_value, "test": "t, jackknife over clusters"}


def describe_statistic_over_seeds(
    first: Sequence[Callable[[Floats], Floats]],
    second: Sequence[Callable[[Floats], Floats]],
    clusters: Clusters,
    confidence: float,
) -> dict[str, Any] | None:
    """Return the mean of a statistic in [0, 1] over trainings, or what it is above that of others.

    Args:
        first: The statistic of each training's answers, as for `describe_statistic`.
        second: Of the arm it is held against; none: the statistic itself is described.
        clusters: Of the rows.
        confidence: Level of the interval.

    Returns:
        None with fewer than two clusters, or where nothing varies.
    """
    if len(clusters.sizes) < 2:
        return None
    ours = Seeds.of_statistics(first, clusters)
    theirs = Seeds.of_statistics(second, clusters) if second else None
    scale: Scale = "unbounded" if second else "unit"
    estimate = estimate_statistic_over_seeds(ours, theirs, clusters, scale, confidence)
    return None if estimate is None else _described(estimate, is_difference=bool(second))


def _described(estimate: SeedsEstimate, is_difference: bool = False) -> dict[str, Any]:
    """Return an estimate over seeds as the files keep it; of a difference with its test."""
    described = dataclasses.asdict(estimate)
    p_value = described.pop("p_value")
    return described | ({"p_value": p_value, "test": "t, rows and seeds"} if is_difference else {})


def _is_plain(values: Floats, clusters: Clusters, scale: Scale, resampling: Resampling) -> bool:
    """Return whether the estimators for independent rows fit."""
    if not clusters.singletons:
        return False
    if scale == "binary" or not resampling.num_resamples:
        return scale == "binary"
    return not 2 <= len(values) < _FEW_ROWS or bool(np.ptp(values) == 0)


def _has_no_width(low: float | None, high: float | None) -> bool:
    """Return whether an interval is a point; equal values may differ by the rounding of sums."""
    return low is not None and high is not None and high - low < _NO_WIDTH


def _widened(
    estimate: ClusteredEstimate, scale: Scale, least: float, confidence: float
) -> ClusteredEstimate:
    """Return an estimate of equal values with the interval that so many clusters leave possible."""
    if scale == "unbounded" or estimate.value is None:
        return dataclasses.replace(estimate, low=None, high=None, method="all equal: no interval")
    low, high = ends_of_equal(estimate.value, least, estimate.num_clusters, confidence)
    return dataclasses.replace(estimate, low=low, high=high, method="all equal: Wilson")


def adjust_p_values(differences: Sequence[dict[str, Any]]) -> None:
    """Add `p_adjusted`, after Holm, to differences that are read together."""
    p_values = [np.nan if d.get("p_value") is None else d["p_value"] for d in differences]
    for difference, adjusted in zip(differences, holm(np.array(p_values, float)), strict=True):
        difference["p_adjusted"] = None if np.isnan(adjusted) else float(adjusted)


def design_of(
    first: Floats, second: Floats, clusters: Clusters, scale: Scale, confidence: float
) -> PairedDesign | None:
    """Return what the scores of two arms say of a test like theirs; None for one cluster.

    Args:
        first: Shape (n,), or (S, n) of S trainings of one recipe.
        second: Likewise, for the same rows.
        clusters: Of the rows.
        scale: Of the scores.
        confidence: Level of the test.
    """
    ours, theirs = np.atleast_2d(first), np.atleast_2d(second)
    differences = ours.mean(axis=0) - theirs.mean(axis=0)
    n = len(differences)
    if n < 2 or len(clusters.sizes) < 2:
        return None
    # Where no row differs, as many may as a rate of zero leaves possible.
    spread = float((differences**2).mean()) or wilson(0, n, confidence)[1]
    by_seeds = [detectable_by_seeds(one, clusters, confidence) for one in (ours, theirs)]
    return dataclasses.replace(
        PairedDesign.of(clusters, spread, intraclass_correlation(differences, clusters)),
        confidence=confidence,
        binary=scale == "binary",
        by_seeds=math.hypot(*by_seeds),
    )


def rows_to_find(design: PairedDesign, size: float) -> int | None:
    """Return the rows that find a difference of this size in 80% of the cases; None for too many.

    Args:
        design: Of the rows that there are.
        size: Above 0 and at most 1.
    """
    if not 0 < size <= 1 or detectable_difference(_with_rows(design, _MOST_ROWS)) > size:
        return None
    return rows_needed(design, size)


def _describe_power(design: PairedDesign | None, differences: Floats) -> dict[str, Any]:
    if design is None:
        return {"detectable": None, "rows_needed": None}
    needed = rows_to_find(design, abs(float(differences.mean())))
    return {"detectable": detectable_difference(design), "rows_needed": needed}


def _with_rows(design: PairedDesign, num_rows: int) -> PairedDesign:
    return dataclasses.replace(design, num_clusters=num_rows / design.mean_size)
