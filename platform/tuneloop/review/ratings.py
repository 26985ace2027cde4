"""Strength of arms from pairwise preferences: Bradley–Terry on the Elo scale, with intervals.

Shape legend: A arms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

Floats = NDArray[np.float64]

_ELO_PER_NAT = 400 / np.log(10)
# One virtual draw between each arm and an average opponent: an arm that won all its few
# comparisons gets a finite strength.
_PRIOR_DRAWS = 1.0
_CONFIDENCE = 0.95
# Beyond this strength in nats (2,084 Elo) the votes set no limit.
_FARTHEST = 12.0
# So weak that it moves no end by one Elo; it keeps the strengths of arms that never lost finite.
_RIDGE = 1e-6


@dataclass(frozen=True)
class Preference:
    """One comparison.

    Args:
        score: 1 when `first` won, 0 when `second` won, 0.5 for a tie.
        example_id: The example that was judged. Votes of several reviewers on one example are one
            comparison; empty: a comparison of its own.
    """

    first: str
    second: str
    score: float
    example_id: str = ""


@dataclass(frozen=True)
class Rating:
    """An arm's strength.

    Args:
        elo: 1000 is the average of the arms; 400 more means ten times the odds to win.
        low: Lower end of the interval; minus infinity where the votes set no limit.
        high: Upper end of the interval; infinity where the votes set no limit.
    """

    arm: str
    elo: float
    low: float
    high: float
    num_wins: int
    num_losses: int
    num_ties: int


def bradley_terry(preferences: Sequence[Preference]) -> list[Rating]:
    """Return the arms' ratings, strongest first.

    Unlike running Elo updates, the result does not depend on the order of the verdicts. A tie
    counts as half a win for each side. The interval has all strengths that the votes do not
    contradict (profile likelihood without a prior, with a t quantile for few votes): after one
    vote that is any, after five of five it is open to one side. Votes on one example and pair
    count together as one comparison with their mean, since reviewers see the same answers.

    Source: Bradley and Terry 1952, Biometrika 39; fitted by Hunter's MM algorithm, Annals of
    Statistics 32 (2004), section 2. Intervals: Venzon and Moolgavkar 1988, Applied Statistics 37.
    """
    arms = sorted({name for p in preferences for name in (p.first, p.second)})
    if not arms:
        return []
    index = {arm: i for i, arm in enumerate(arms)}
    wins = _count_wins(preferences, index)
    elo = _fit(wins)
    best = _maximise(wins)
    # With the normal quantile three votes of three would already tell two arms apart.
    spare = max(1.0, float(wins.sum()) - (len(arms) - 1))
    drop = float(stats.t.ppf(0.5 + _CONFIDENCE / 2, spare)) ** 2 / 2
    ratings = []
    for arm, i in index.items():
        low, high = _profile_ends(wins, i, best, drop)
        results = [
            p.score if p.first == arm else 1 - p.score
            for p in preferences
            if arm in (p.first, p.second)
        ]
        counts = [sum(result == value for result in results) for value in (1, 0, 0.5)]
        ratings.append(Rating(arm, float(elo[i]), min(low, elo[i]), max(high, elo[i]), *counts))
    return sorted(ratings, key=lambda rating: (-rating.elo, rating.arm))


def _count_wins(preferences: Sequence[Preference], index: Mapping[str, int]) -> Floats:
    """Return how often the row's arm beat the column's, shape (A, A): one win for each example."""
    scores: dict[tuple[object, int, int], list[float]] = {}
    for number, p in enumerate(preferences):
        first, second, score = index[p.first], index[p.second], p.score
        if first > second:
            first, second, score = second, first, 1 - score
        scores.setdefault((p.example_id or number, first, second), []).append(score)
    wins = np.zeros((len(index), len(index)))
    for (_, first, second), votes in scores.items():
        wins[first, second] += np.mean(votes)
        wins[second, first] += 1 - np.mean(votes)
    return wins


def _profile_ends(wins: Floats, arm: int, best: Floats, drop: float) -> tuple[float, float]:
    """Return the Elo ratings of an arm at which the log-likelihood has dropped from its maximum."""
    top, start = _log_likelihood(wins, best), float(best[arm])

    def excess(strength: float) -> float:
        return top - _log_likelihood(wins, _maximise(wins, arm, strength)) - drop

    ends = []
    for limit in (-_FARTHEST, _FARTHEST):
        if excess(limit) < 0:
            ends.append(math.copysign(math.inf, limit))
        else:
            end = optimize.brentq(excess, min(start, limit), max(start, limit), xtol=1e-4)
            ends.append(1000 + _ELO_PER_NAT * end)
    return ends[0], ends[1]


def _log_likelihood(wins: Floats, strengths: Floats) -> float:
    return -float((wins * np.logaddexp(0, strengths[None, :] - strengths[:, None])).sum())


def _maximise(wins: Floats, arm: int = 0, strength: float | None = None) -> Floats:
    """Return the strengths, shape (A,), of mean zero with the largest likelihood (Newton's method).

    Args:
        wins: Shape (A, A).
        arm: The arm whose strength is held.
        strength: At this value, in nats; None holds none.
    """
    count = len(wins)
    held = np.array([np.ones(count)] + ([np.eye(count)[arm]] if strength is not None else []))
    strengths = np.zeros(count)
    if strength is not None:
        strengths[:] = -strength / (count - 1)
        strengths[arm] = strength
    for _ in range(200):
        chances = special.expit(strengths[:, None] - strengths[None, :])
        games = wins + wins.T
        gradient = (wins - games * chances).sum(axis=1) - _RIDGE * strengths
        weights = games * chances * (1 - chances)
        curvature = np.diag(weights.sum(axis=1) + _RIDGE) - weights
        system = np.block(
            [[curvature, np.array(held).T], [np.array(held), np.zeros((len(held),) * 2)]]
        )
        step = np.linalg.solve(system, np.r_[gradient, np.zeros(len(held))])[:count]
        step *= min(1.0, 2 / max(1e-12, np.abs(step).max()))
        strengths = strengths + step
        if np.abs(step).max() < 1e-8:
            break
    return strengths


def _fit(wins: Floats) -> Floats:
    """Return Elo ratings, shape (A,), from wins of shape (A, A)."""
    num_arms = len(wins)
    games = wins + wins.T
    total = wins.sum(axis=1) + _PRIOR_DRAWS / 2
    strength = np.ones(num_arms)
    for _ in range(1000):
        pairs = games / (strength[:, None] + strength[None, :])
        updated = total / (pairs.sum(axis=1) + _PRIOR_DRAWS / (strength + 1))
        updated /= np.exp(np.log(updated).mean())
        if np.max(np.abs(np.log(updated / strength))) < 1e-9:
            break
        strength = updated
    return np.asarray(1000 + _ELO_PER_NAT * np.log(strength))


def rate_arms(preferences: Sequence[Preference]) -> list[dict[str, Any]]:
    """Return the arms' ratings as a table, strongest first."""
    return [
        {
            "arm": rating.arm,
            "Elo": f"{rating.elo:,.0f}",
            "95% interval": _describe_interval(rating),
            "won": rating.num_wins,
            "lost": rating.num_losses,
            "neither": rating.num_ties,
        }
        for rating in bradley_terry(preferences)
    ]


def _describe_interval(rating: Rating) -> str:
    if math.isinf(rating.low):
        return "unknown" if math.isinf(rating.high) else f"{rating.high:,.0f} or less"
    if math.isinf(rating.high):
        return f"{rating.low:,.0f} or more"
    return f"{rating.low:,.0f} to {rating.high:,.0f}"
