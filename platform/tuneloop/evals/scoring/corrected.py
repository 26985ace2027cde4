"""A rate of human votes, made more exact by a judge who has seen all rows.

The judge's own rate is biased by as much as the judge is, so it is never the estimate. Where people
have voted, the judge's error is known; it is subtracted (prediction-powered inference). A judge who
knows nothing leaves the rate of the votes as it is.

Source: Angelopoulos, Duchi and Zrnic 2023, "PPI++: Efficient Prediction-Powered Inference",
arXiv:2311.01453, section 6 for the weight. Why it is written here and how it was tested:
`docs/adr/0023-a-judge-is-corrected-by-votes.md`.

Shape legend: n rows, G clusters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tuneloop.evals.scoring.clusters import (
    ClusteredEstimate,
    Clusters,
    intraclass_correlation,
    satterthwaite_df,
    with_ends,
)
from tuneloop.evals.scoring.intervals import Floats, wilson

# With fewer votes an interval says nothing, and the weight of the judge is not known.
LEAST_VOTES = 10
# What the rounding of sums leaves of none.
_NO_VARIANCE = 1e-24


@dataclass(frozen=True)
class CorrectedRate:
    """A rate of votes, corrected and as it is.

    Args:
        estimate: The mean vote over all rows, votes and judge together, with its interval.
        votes_alone: The mean of the votes, with its interval.
        weight: How far the judge is followed, 0 (not at all) to 1.
        bias: The judge's mean less that of the votes, on the rows that have both.
        gain: As many votes, over those there are, would be needed without a judge: 1.3 is 30%
            more. None where the votes do not differ.
    """

    estimate: ClusteredEstimate
    votes_alone: ClusteredEstimate
    weight: float
    bias: float
    gain: float | None


def correct_rate(
    votes: Floats, judged: Floats, clusters: Clusters, confidence: float = 0.95
) -> CorrectedRate:
    """Return the mean vote that all rows would have, with an interval over clusters.

    The rows with votes have to be a random part of all rows. The variance is that of the
    delete-one-cluster jackknife of the whole estimate, its weight included.

    Args:
        votes: Shape (n,), from 0 to 1; NaN where nobody has voted. At least two are known.
        judged: Shape (n,), the judge's for all rows, from 0 to 1.
        clusters: Of the same rows.
        confidence: Level of the interval.
    """
    has_vote = ~np.isnan(votes)
    follows = _estimate(votes, judged, has_vote, clusters, confidence, is_followed=True)
    alone = _estimate(votes, judged, has_vote, clusters, confidence, is_followed=False)
    gain = None
    if follows.std_error and alone.std_error:
        gain = (alone.std_error / follows.std_error) ** 2
    known, guessed = votes[has_vote], judged[has_vote]
    return CorrectedRate(
        follows, alone, _weight(known, guessed), float((guessed - known).mean()), gain
    )


def _weight(votes: Floats, judged: Floats) -> float:
    """Return the weight of the judge with the least variance, cut to [0, 1]."""
    spread = float(((judged - judged.mean()) ** 2).sum())
    if spread <= 0:
        return 0.0
    shared = float(((judged - judged.mean()) * (votes - votes.mean())).sum())
    return min(1.0, max(0.0, shared / spread))


def _estimate(
    votes: Floats,
    judged: Floats,
    has_vote: np.ndarray,
    clusters: Clusters,
    confidence: float,
    is_followed: bool,
) -> ClusteredEstimate:
    known = np.where(has_vote, votes, 0.0)
    guessed = np.where(has_vote, judged, 0.0)
    # Sums of each cluster, shape (6, G): all rows and the judge's sum over them, then of the rows
    # with votes their number and the sums that the weight is made of.
    sums = np.stack(
        [
            clusters.totals(column)
            for column in (
                np.ones(len(votes)), judged,
                has_vote.astype(float), known, guessed, guessed**2, guessed * known,
            )
        ]
    )  # fmt: skip
    total = sums.sum(axis=1, keepdims=True)
    value = float(_value(total, is_followed)[0])
    voted = sums[2] > 0
    num_voted = int(voted.sum())
    n = int(has_vote.sum())
    described = ClusteredEstimate(value, None, None, n, num_voted, "one cluster")
    if num_voted < 2:
        return described
    without = _value(total - sums, is_followed)
    factor = (num_voted - 1) / num_voted
    variance = float(factor * ((without - value) ** 2).sum())
    value = min(1.0, max(0.0, value))
    described = ClusteredEstimate(value, None, None, n, num_voted, "none", math.sqrt(variance))
    if variance < _NO_VARIANCE:
        # All votes alike: as many may differ as a rate of zero leaves possible.
        share = wilson(0, num_voted, confidence)[1]
        ends = max(0.0, value - share * value), min(1.0, value + share * (1 - value))
        return ClusteredEstimate(value, *ends, n, num_voted, "all votes equal: Wilson", 0.0)
    sizes = sums[2][voted]
    weight = _weight(votes[has_vote], judged[has_vote]) if is_followed else 0.0
    rest = votes[has_vote] - weight * judged[has_vote]
    ids = clusters.index[has_vote]
    df = satterthwaite_df(sizes, intraclass_correlation(rest, Clusters.of(ids))) - is_followed
    ended = with_ends(described, variance, df, "unit", confidence)
    name = "votes corrected by the judge (PPI++), jackknife, t" if is_followed else "jackknife, t"
    return ClusteredEstimate(value, ended.low, ended.high, n, num_voted, name, math.sqrt(variance))


def _value(sums: Floats, is_followed: bool) -> Floats:
    """Return the estimate from sums of shape (7, K), shape (K,)."""
    num_all, all_judged, n, votes, judged, squares, products = sums
    mean_vote, mean_judged = votes / n, judged / n
    if not is_followed:
        return np.asarray(mean_vote)
    spread = squares - n * mean_judged**2
    shared = products - n * mean_judged * mean_vote
    weight = np.divide(shared, spread, out=np.zeros_like(shared), where=spread > 1e-12)
    return np.asarray(mean_vote - weight.clip(0, 1) * (mean_judged - all_judged / num_all))
