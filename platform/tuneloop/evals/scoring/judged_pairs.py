"""What a judge says of two arms, corrected by human votes; never the judge alone.

Shape legend: n pairs of answers.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tuneloop.evals.scoring.budget import cost_of, mean_count
from tuneloop.evals.scoring.clusters import Clusters, estimate_clustered_mean
from tuneloop.evals.scoring.corrected import LEAST_VOTES, correct_rate
from tuneloop.evals.scoring.estimates import describe_mean, describe_statistic
from tuneloop.evals.scoring.intervals import Floats, Resampling
from tuneloop.evals.scoring.judging import (
    TIE,
    UNPARSEABLE,
    JudgedPair,
    Judgement,
    Judging,
    against_of,
    pairs_to_judge,
)
from tuneloop.evals.scoring.metrics import Metric, without_thought
from tuneloop.evals.scoring.predictions import Prediction
from tuneloop.evals.scoring.results import Evaluation
from tuneloop.records import Vote

_SHARE = Metric("share")


class Compared(NamedTuple):
    """Two arms by name; the rates are those of the first."""

    arm: str
    other: str


class _Outcome(NamedTuple):
    """What the judge made of a pair: 1 the arm wins, 0.5 a tie, 0 it loses."""

    value: float
    is_flip: bool = False
    first_wins: bool = False
    is_known: bool = True


def describe_judging(
    evaluation: Evaluation, judging: Judging, judgements: Sequence[Judgement], votes: Sequence[Vote]
) -> dict[str, Any]:
    """Return what `comparison.json` keeps of a judge: who it is, and each pair of arms.

    Args:
        evaluation: The answers, and the level, resamples and seed of its intervals.
        judging: Who was asked.
        judgements: What was said.
        votes: On these answers.
    """
    resampling = Resampling(evaluation.metrics["confidence"])
    asked = judging.arm.endpoint
    names = [arm["name"] for arm in evaluation.arms]
    pairs = []
    for other in against_of(judging.config, names):
        compared = Compared(names[-1], other)
        told = describe_pair(evaluation.predictions, judgements, votes, compared, resampling)
        pairs.append(compared._asdict() | told)
    return {
        "model": asked.model,
        "kind": judging.config.kind,
        "criteria": judging.config.criteria,
        "is_arm": judging.is_arm,
        "num_judgements": len(judgements),
        "num_unparseable": sum(j.verdict == UNPARSEABLE for j in judgements),
        "num_missing": sum(bool(j.error) for j in judgements),
        "reasons": dict(Counter(j.error for j in judgements if j.error)),
        "mean_prompt_tokens": mean_count([j.prompt_tokens for j in judgements]),
        "mean_completion_tokens": mean_count([j.completion_tokens for j in judgements]),
        "cost": _cost(judging, judgements),
        "pairs": pairs,
    }


def _cost(judging: Judging, judgements: Sequence[Judgement]) -> float | None:
    """Return what the judgements cost; None without a price, or where tokens were not counted."""
    if judging.arm.price is None:
        return None
    total = 0.0
    for judgement in judgements:
        if not judgement.error:
            if judgement.prompt_tokens is None or judgement.completion_tokens is None:
                return None
            counts = judgement.prompt_tokens, judgement.completion_tokens
            total += cost_of(judging.arm.price, *counts).money
    return total


def describe_pair(
    predictions: Sequence[Prediction],
    judgements: Sequence[Judgement],
    votes: Sequence[Vote],
    compared: Compared,
    resampling: Resampling,
) -> dict[str, Any]:
    """Return what judge and people say of two arms.

    A win rate is the share of the pairs with different answers that the arm wins, ties counting
    half. `corrected` is None with fewer than 10 votes: a judge is not quoted alone.

    Args:
        predictions: All answers of all arms.
        judgements: Of all pairs.
        votes: On these answers.
        compared: The two arms.
        resampling: Level, resamples and seed.
    """
    pairs = pairs_to_judge(predictions, *compared)
    outcomes = [
        _outcome(pair, judgements_of) for pair, judgements_of in _by_pair(pairs, judgements)
    ]
    judged = np.array([outcome.value for outcome in outcomes])
    known = np.array([outcome.is_known for outcome in outcomes], dtype=bool)
    people = _votes_by_pair(pairs, votes)
    lengths = ([len(without_thought(p.completion)) for p in pair] for pair in pairs)
    longer = np.array([(np.sign(ours - theirs) + 1) / 2 for ours, theirs in lengths], dtype=float)
    ids = np.array([p.arm.cluster or p.arm.example_id for p in pairs], dtype=np.str_)
    has_vote = ~np.isnan(people)
    num_votes = int(has_vote.sum())
    described: dict[str, Any] = {
        "num_pairs": len(pairs),
        "num_unknown": int((~known).sum()),
        "num_flips": sum(o.is_flip for o in outcomes),
        "num_first_wins": sum(o.first_wins for o in outcomes),
        "judge_alone": float(judged[known].mean()) if known.any() else None,
        "longer_wins": _longer_wins(judged[known], longer[known], ids[known], resampling),
        "num_voted": num_votes,
        "least_votes": LEAST_VOTES,
        "num_reviewers": len({vote.reviewer for vote in votes if _is_on(vote, compared)}),
        "corrected": None,
    }
    if num_votes < LEAST_VOTES or not known.any():
        return described
    confidence = resampling.confidence
    rate = correct_rate(people, judged, Clusters.of(ids), confidence)
    voted = Clusters.of(ids[has_vote])
    bias = judged[has_vote] - people[has_vote]
    return described | {
        "corrected": dataclasses.asdict(rate.estimate),
        "votes_alone": dataclasses.asdict(rate.votes_alone),
        "weight": rate.weight,
        "gain": rate.gain,
        "bias": dataclasses.asdict(estimate_clustered_mean(bias, voted, "unbounded", confidence)),
        "kappa": _kappa(judged[has_vote], people[has_vote], voted, resampling),
        "kappa_of_longer": _kappa(longer[has_vote], people[has_vote], voted, resampling),
        "people_longer_wins": _longer_wins(
            people[has_vote], longer[has_vote], ids[has_vote], resampling
        ),
    }


def _is_on(vote: Vote, compared: Compared) -> bool:
    return {vote.arm, vote.other} == set(compared)


def _by_pair(
    pairs: Sequence[JudgedPair], judgements: Sequence[Judgement]
) -> list[tuple[JudgedPair, list[Judgement]]]:
    of_example: dict[str, list[Judgement]] = {}
    for judgement in judgements:
        of_example.setdefault(judgement.example_id, []).append(judgement)
    found = []
    for pair in pairs:
        names = {pair.arm.arm, pair.other.arm}
        chosen = [
            j
            for j in of_example.get(pair.arm.example_id, [])
            if (j.arm in names if not j.other else {j.arm, j.other} == names)
        ]
        found.append((pair, chosen))
    return found


def _outcome(pair: JudgedPair, judgements: Sequence[Judgement]) -> _Outcome:
    """Return what a judge made of a pair; a tie that is not known where it did not say."""
    unknown = _Outcome(0.5, is_known=False)
    ratings = {j.arm: j.rating for j in judgements if not j.other}
    if ratings:
        ours, theirs = ratings.get(pair.arm.arm), ratings.get(pair.other.arm)
        if ours is None or theirs is None:
            return unknown
        return _Outcome((np.sign(ours - theirs) + 1) / 2)
    said = [j for j in judgements if j.verdict in (pair.arm.arm, pair.other.arm, TIE)]
    if len(said) < 2:
        return unknown
    winners = {j.verdict for j in said}
    if winners == {pair.arm.arm}:
        return _Outcome(1.0)
    if winners == {pair.other.arm}:
        return _Outcome(0.0)
    if TIE in winners:
        return _Outcome(0.5)
    return _Outcome(0.5, is_flip=True, first_wins=all(j.verdict == j.first for j in said))


def _votes_by_pair(pairs: Sequence[JudgedPair], votes: Sequence[Vote]) -> Floats:
    """Return the mean vote on each pair, shape (n,); NaN where nobody has voted."""
    scores: dict[tuple[str, frozenset[str]], list[float]] = {}
    for vote in votes:
        key = vote.example_id, frozenset((vote.arm, vote.other))
        # By name, so that the same pair is counted from the same side.
        is_first = vote.arm == min(vote.arm, vote.other)
        scores.setdefault(key, []).append(vote.score if is_first else 1 - vote.score)
    values = []
    for pair in pairs:
        names = pair.arm.arm, pair.other.arm
        given = scores.get((pair.arm.example_id, frozenset(names)))
        mean = float(np.mean(given)) if given else np.nan
        values.append(mean if names[0] == min(names) else 1 - mean)
    return np.array(values, dtype=np.float64)


def _longer_wins(
    results: Floats, longer: Floats, ids: NDArray[np.str_], resampling: Resampling
) -> dict[str, Any]:
    """Return how often the longer answer wins, of pairs with a winner and of different length."""
    decided = (results != 0.5) & (longer != 0.5)
    agrees = np.where(longer[decided] == 1, results[decided] > 0.5, results[decided] < 0.5)
    clusters = Clusters.of(ids[decided])
    return describe_mean(agrees.astype(np.float64), clusters, _SHARE, resampling)


def _kappa(
    first: Floats, second: Floats, clusters: Clusters, resampling: Resampling
) -> dict[str, Any]:
    """Return Cohen's kappa of two lists of results, as won, tied or lost, with its interval.

    Where both are of one kind alone it cannot be told from chance: no value.
    """
    ours, theirs = (np.sign(values - 0.5) for values in (first, second))

    def kappa(weights: Floats) -> Floats:
        total = weights.sum(axis=1)
        observed = weights @ (ours == theirs) / total
        chance = sum(
            ((weights @ (ours == kind) / total) * (weights @ (theirs == kind) / total))
            for kind in (-1, 0, 1)
        )
        return np.divide(
            observed - chance, 1 - chance, out=np.zeros_like(total), where=chance < 1 - 1e-12
        )

    estimate = describe_statistic(kappa, clusters, len(ours), "unbounded", resampling)
    if np.ptp([*ours, *theirs]) == 0:
        estimate |= dict.fromkeys(("value", "low", "high", "p_value"))
    return estimate
