"""The estimators that fit the rows: those of `clusters` where rows belong together, else those of
`intervals`; and what a paired test can show at all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tuneloop.evals.scoring.clusters import (
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
    estimate_difference,
    estimate_mean,
    estimate_statistic,
    wilson,
)
from tuneloop.evals.scoring.metrics import Metric

# A test that would need more rows than this is not worth the sentence.
_MOST_ROWS = 1_000_000


def scale_of(metric: Metric) -> Scale:
    """Return the scale of a metric's scores."""
    scales: dict[str, Scale] = {"binary": "binary", "ratio": "unit", "number": "unbounded"}
    return scales[metric.kind]


def describe_mean(
    values: Floats, clusters: Clusters, metric: Metric, resampling: Resampling
) -> dict[str, Any]:
    """Return a mean with its interval, as `metrics.json` keeps it.

    Args:
        values: Shape (n,).
        clusters: Of the same rows.
        metric: Whose scores they are.
        resampling: Level, resamples and seed.
    """
    scale = scale_of(metric)
    if clusters.singletons:
        plain = estimate_mean(values, scale, resampling)
        return dataclasses.asdict(plain) | {"num_clusters": plain.n}
    return dataclasses.asdict(
        estimate_clustered_mean(values, clusters, scale, resampling.confidence)
    )


def describe_difference(
    first: Floats, second: Floats, clusters: Clusters, metric: Metric, resampling: Resampling
) -> dict[str, Any]:
    """Return the mean of first minus second, as `comparison.json` keeps it.

    Beside the interval and the p-value it says what a test like this one can show: `detectable`,
    the smallest difference that it finds in 80% of the cases, and `rows_needed` to find the
    measured one as often.

    Args:
        first: Shape (n,), scores of one arm.
        second: Shape (n,), scores of the other arm for the same rows.
        clusters: Of the same rows.
        metric: Whose scores they are.
        resampling: Level, resamples and seed.
    """
    scale = scale_of(metric)
    if clusters.singletons:
        plain = estimate_difference(first, second, scale, resampling)
        described = dataclasses.asdict(plain) | {"num_clusters": plain.n}
    else:
        estimate, p_value, test = estimate_clustered_difference(
            first, second, clusters, scale, resampling.confidence
        )
        described = dataclasses.asdict(estimate) | {"p_value": p_value, "test": test}
    return described | _describe_power(first - second, clusters, scale, resampling.confidence)


def describe_statistic(
    statistic: Callable[[Floats], Floats],
    clusters: Clusters,
    num_effective: float,
    scale: Scale,
    resampling: Resampling,
) -> dict[str, Any]:
    """Return a statistic of weighted rows with its interval.

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
        return dataclasses.asdict(plain) | {"num_clusters": plain.n}
    estimate = estimate_clustered_statistic(statistic, clusters, scale, resampling.confidence)
    low, high, value = estimate.low, estimate.high, estimate.value
    if low is not None and low == high and value is not None:
        # No cluster makes a difference: as much may as a rate of zero leaves possible.
        effective = num_effective * len(clusters.sizes) / max(1, n)
        share = wilson(0, effective, resampling.confidence)[1]
        low = value - share * (value if scale == "unit" else 1 + value)
        high = value + share * (1 - value)
        estimate = dataclasses.replace(
            estimate, low=low, high=high, method="no cluster deviates: Wilson"
        )
    if scale == "unit" and low is not None and high is not None:
        estimate = dataclasses.replace(estimate, low=max(0.0, low), high=min(1.0, high))
    return dataclasses.asdict(estimate)


def adjust_p_values(differences: Sequence[dict[str, Any]]) -> None:
    """Add `p_adjusted`, after Holm, to differences that are read together."""
    p_values = [np.nan if d.get("p_value") is None else d["p_value"] for d in differences]
    for difference, adjusted in zip(differences, holm(np.array(p_values, float)), strict=True):
        difference["p_adjusted"] = None if np.isnan(adjusted) else float(adjusted)


def _describe_power(
    differences: Floats, clusters: Clusters, scale: Scale, confidence: float
) -> dict[str, Any]:
    n = len(differences)
    if n < 2 or len(clusters.sizes) < 2:
        return {"detectable": None, "rows_needed": None}
    # Where no row differs, as many may as a rate of zero leaves possible.
    spread = float((differences**2).mean()) or wilson(0, n, confidence)[1]
    design = dataclasses.replace(
        PairedDesign.of(clusters, spread, intraclass_correlation(differences, clusters)),
        confidence=confidence,
        binary=scale == "binary",
    )
    size = abs(float(differences.mean()))
    needed = None
    if 0 < size <= 1 and detectable_difference(_with_rows(design, _MOST_ROWS)) <= size:
        needed = rows_needed(design, size)
    return {"detectable": detectable_difference(design), "rows_needed": needed}


def _with_rows(design: PairedDesign, num_rows: int) -> PairedDesign:
    return dataclasses.replace(design, num_clusters=num_rows / design.mean_size)
