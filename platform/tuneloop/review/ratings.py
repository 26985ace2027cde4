"""Strength of arms from pairwise preferences: Bradley–Terry on the Elo scale, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ELO_PER_NAT = 400 / np.log(10)
# One virtual draw between each arm and an average opponent: an arm that won all its few
# comparisons gets a finite strength.
_PRIOR_DRAWS = 1.0


@dataclass(frozen=True)
class Preference:
    """One comparison.

    Args:
        score: 1 when `first` won, 0 when `second` won, 0.5 for a tie.
    """

    first: str
    second: str
    score: float


@dataclass(frozen=True)
class Rating:
    """An arm's strength.

    Args:
        elo: 1000 is the average of the arms; 400 more means ten times the odds to win.
        low: Lower end of the bootstrap interval.
        high: Upper end of the bootstrap interval.
    """

    arm: str
    elo: float
    low: float
    high: float
    num_wins: int
    num_losses: int
    num_ties: int


def bradley_terry(
    preferences: Sequence[Preference],
    confidence: float = 0.95,
    num_resamples: int = 500,
    seed: int = 0,
) -> list[Rating]:
    """Return the arms' ratings, strongest first.

    Unlike running Elo updates, the result does not depend on the order of the verdicts. A tie
    counts as half a win for each side.

    Source: Bradley and Terry 1952, Biometrika 39; fitted by Hunter's MM algorithm, Annals of
    Statistics 32 (2004), section 2.
    """
    arms = sorted({name for p in preferences for name in (p.first, p.second)})
    if not arms:
        return []
    index = {arm: i for i, arm in enumerate(arms)}
    first = np.array([index[p.first] for p in preferences])
    second = np.array([index[p.second] for p in preferences])
    score = np.array([p.score for p in preferences])
    elo = _fit(first, second, score, len(arms))
    random = np.random.default_rng(seed)
    samples = np.empty((num_resamples, len(arms)))
    for row in range(num_resamples):
        chosen = random.integers(0, len(preferences), len(preferences))
        samples[row] = _fit(first[chosen], second[chosen], score[chosen], len(arms))
    tail = (1 - confidence) / 2
    low, high = np.quantile(samples, [tail, 1 - tail], axis=0)
    ratings = []
    for arm, i in index.items():
        results = np.concatenate([score[first == i], 1 - score[second == i]])
        counts = [int((results == value).sum()) for value in (1, 0, 0.5)]
        ratings.append(Rating(arm, float(elo[i]), float(low[i]), float(high[i]), *counts))
    return sorted(ratings, key=lambda rating: (-rating.elo, rating.arm))


def _fit(
    first: NDArray[np.int64], second: NDArray[np.int64], score: NDArray[np.float64], num_arms: int
) -> NDArray[np.float64]:
    """Return Elo ratings. Shape (arms,)."""
    wins = np.zeros((num_arms, num_arms))
    np.add.at(wins, (first, second), score)
    np.add.at(wins, (second, first), 1 - score)
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
            "95% interval": f"{rating.low:,.0f} to {rating.high:,.0f}",
            "won": rating.num_wins,
            "lost": rating.num_losses,
            "neither": rating.num_ties,
        }
        for rating in bradley_terry(preferences)
    ]
