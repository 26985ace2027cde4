"""Which trial wins: chosen on validation rows, then scored once on the test.

The best of several scores is partly luck, so the score that a choice was made by promises too
much. The test split has no part in the choice, and its score of the winner is not biased by it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tuneloop.config import OneTaskConfig
from tuneloop.evals.scoring.clusters import Clusters
from tuneloop.evals.scoring.comparison import LabelCounts, describe_macro_f1
from tuneloop.evals.scoring.estimates import (
    describe_mean,
    describe_statistic_over_seeds,
    scale_of,
)
from tuneloop.evals.scoring.intervals import Floats, Resampling
from tuneloop.evals.scoring.metrics import OF_ALL_ROWS, Scorer
from tuneloop.evals.scoring.results import Evaluation
from tuneloop.evals.scoring.seeds import Seeds, SeedScatter, estimate_over_seeds


@dataclass(frozen=True)
class Score:
    """A score with its interval; None where there is none."""

    value: float | None
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, estimate: dict[str, Any]) -> Score:
        """Return it from what `metrics.json` keeps of a score."""
        return cls(estimate["value"], estimate["low"], estimate["high"])


def score_trial(
    evaluation: Evaluation,
    rows: Collection[str] | None = None,
    metric: str = "",
    task: OneTaskConfig | None = None,
) -> Score:
    """Return the score of a model that was evaluated alone.

    Args:
        rows: Ids of the only rows that count; None: all.
        metric: The primary one if empty.
        task: Whose labels macro-F1 on some of the rows is of.
    """
    (arm,) = evaluation.arms
    return score_arm(evaluation, arm, rows, metric or evaluation.primary, task)


def score_arm(
    evaluation: Evaluation,
    arm: Mapping[str, Any],
    rows: Collection[str] | None,
    metric: str,
    task: OneTaskConfig | None = None,
) -> Score:
    """Return the score of an arm, as `score_trial` does that of the only one."""
    if rows is None:
        return Score.of(arm["scores"][metric])
    resampling = Resampling(float(evaluation.metrics["confidence"]))
    scored = [
        p
        for p in evaluation.predictions
        if p.arm == arm["name"] and p.example_id in rows and p.status == "scored"
    ]
    if metric == OF_ALL_ROWS and task is not None:
        return Score.of(describe_macro_f1(scored, None, Scorer(task, {}), resampling))
    known = [(p, score) for p in scored if (score := p.scores.get(metric)) is not None]
    clusters = Clusters.of([p.cluster or p.example_id for p, _ in known])
    values = np.array([score for _, score in known], np.float64)
    return Score.of(describe_mean(values, clusters, evaluation.metric(metric), resampling))


def scatter_of_seeds(
    cells: Sequence[Sequence[Evaluation]], rows: Collection[str] | None = None, metric: str = ""
) -> SeedScatter:
    """Return how far the seeds of all cells together lie apart.

    Two seeds of one cell tell next to nothing; those of all cells do, as far as combinations
    scatter alike.

    Args:
        cells: Of each cell, the evaluations of its seeds.
        rows: Ids of the only rows that count; None: all.
        metric: The primary one if empty.
    """
    recipes = []
    for evaluations in cells:
        if len(evaluations) < 2:
            continue
        values, clusters = seeds_by_row(evaluations, rows, metric or evaluations[0].primary)
        if values.size and len(clusters.sizes) > 1:
            recipes.append(Seeds.of_rows(values, clusters))
    return SeedScatter.of(*recipes)


def score_seeds(
    evaluations: Sequence[Evaluation],
    rows: Collection[str] | None = None,
    metric: str = "",
    scatter: SeedScatter | None = None,
    task: OneTaskConfig | None = None,
) -> Score:
    """Return the mean of one cell's seeds, with an interval for other seeds and other rows.

    Args:
        evaluations: Of the same rows, one for each seed.
        rows: Ids of the only rows that count; None: all.
        metric: The primary one if empty.
        scatter: Of the seeds of all cells; None: as these show it.
        task: Whose labels macro-F1 on some of the rows is of.
    """
    first = evaluations[0]
    metric = metric or first.primary
    if len(evaluations) == 1 and not (scatter and scatter.df):
        return score_trial(first, rows, metric, task)
    values, clusters = seeds_by_row(evaluations, rows, metric)
    if not values.size:  # a score of all answers together, such as macro-F1
        if metric == OF_ALL_ROWS and task is not None:
            told = _macro_f1_over_seeds(evaluations, rows, task)
            if told is not None:
                return told
        scores = [score_trial(one, rows, metric, task).value for one in evaluations]
        known = [score for score in scores if score is not None]
        return Score(sum(known) / len(known) if known else None)
    estimate = estimate_over_seeds(
        values,
        clusters,
        scale_of(first.metric(metric)),
        float(first.metrics["confidence"]),
        scatter,
    )
    return Score(estimate.value, estimate.low, estimate.high)


def _macro_f1_over_seeds(
    evaluations: Sequence[Evaluation], rows: Collection[str] | None, task: OneTaskConfig
) -> Score | None:
    """Return the mean macro-F1 of seeds over the rows that all answered; None if nothing varies."""
    answered = [
        {
            p.example_id: p
            for p in evaluation.predictions
            if p.status == "scored" and (rows is None or p.example_id in rows)
        }
        for evaluation in evaluations
    ]
    common = [row for row in answered[0] if all(row in of_seed for of_seed in answered)]
    if not common:
        return None
    scorer = Scorer(task, {})
    each = [LabelCounts([of_seed[row] for row in common], scorer) for of_seed in answered]
    clusters = Clusters.of([answered[0][row].cluster or row for row in common])
    confidence = float(evaluations[0].metrics["confidence"])
    told = describe_statistic_over_seeds([one.macro_f1 for one in each], [], clusters, confidence)
    return None if told is None else Score.of(told)


def choose(scores: Sequence[float | None], higher_is_better: bool) -> int | None:
    """Return the number of the best score, the first of equal ones; None where there is none."""
    sign = 1 if higher_is_better else -1
    known = [(sign * score, -number) for number, score in enumerate(scores) if score is not None]
    return -max(known)[1] if known else None


def optimism(chosen_by: Score, test: Score, higher_is_better: bool) -> Score:
    """Return how much better the score that decided looks than the test: luck, mostly.

    Its interval takes the two as independent: they are of different rows.

    Source: Zou and Donner 2008, "Construction of confidence limits about effect measures: a
    general approach", doi:10.1002/sim.3095, equation 8.
    """
    first, second = (chosen_by, test) if higher_is_better else (test, chosen_by)
    if first.value is None or second.value is None:
        return Score(None)
    value = first.value - second.value
    ends = (first.low, first.high, second.low, second.high)
    if any(end is None for end in ends):
        return Score(value)
    assert first.low is not None
    assert first.high is not None
    assert second.low is not None
    assert second.high is not None
    below = math.hypot(first.value - first.low, second.high - second.value)
    above = math.hypot(first.high - first.value, second.value - second.low)
    return Score(value, value - below, value + above)


def row_scores(
    evaluations: Sequence[Evaluation], arm: str | None = None, metric: str = ""
) -> dict[str, float]:
    """Return the score of each row that has one, averaged over evaluations of other seeds.

    Args:
        arm: Whose answers; None: those of the only arm.
        metric: The primary one if empty.
    """
    totals: dict[str, list[float]] = {}
    for evaluation in evaluations:
        names = ("example_id", "arm", metric or evaluation.primary)
        columns = (evaluation.column(name).to_pylist() for name in names)
        for example, of_arm, score in zip(*columns, strict=True):
            if score is not None and arm in (None, of_arm):
                totals.setdefault(example, []).append(score)
    whole = {row: scores for row, scores in totals.items() if len(scores) == len(evaluations)}
    return {row: sum(scores) / len(scores) for row, scores in whole.items()}


def covariance_of_means(
    scores: Sequence[Mapping[str, float]], cluster_of: Mapping[str, str]
) -> Floats | None:
    """Return how the means of models that answered the same rows vary together with the rows.

    Args:
        scores: Of each of K models, by row.
        cluster_of: The cluster of a row; a row that is missing is one of its own.

    Returns:
        Shape (K, K), over the rows that all have a score for; None where they are too few.

    Source: Liang and Zeger 1986, "Longitudinal data analysis using generalized linear models",
    doi:10.1093/biomet/73.1.13, the covariance of equation 3 for a mean.
    """
    rows = sorted(set.intersection(*(set(one) for one in scores)) if scores else ())
    clusters = Clusters.of([cluster_of.get(row) or row for row in rows])
    num_clusters = len(clusters.sizes)
    if num_clusters < 2:
        return None
    values = np.array([[one[row] for row in rows] for one in scores], np.float64)
    centred = values - values.mean(axis=1, keepdims=True)
    totals = np.stack([clusters.totals(one) for one in centred])
    return totals @ totals.T * (num_clusters / (num_clusters - 1) / len(rows) ** 2)


def seeds_by_row(
    evaluations: Sequence[Evaluation], rows: Collection[str] | None, metric: str
) -> tuple[Floats, Clusters]:
    """Return the rows' scores, shape (S, n), of rows that all have one; and their clusters.

    Without any such row the shape is (S, 0).
    """
    of_rows = []
    for evaluation in evaluations:
        scores = {p.example_id: p.scores.get(metric) for p in evaluation.predictions}
        of_rows.append({key: score for key, score in scores.items() if score is not None})
    common = [
        p
        for p in evaluations[0].predictions
        if (rows is None or p.example_id in rows)
        and all(p.example_id in scores for scores in of_rows)
    ]
    values = np.array([[scores[p.example_id] for p in common] for scores in of_rows], np.float64)
    return values, Clusters.of([p.cluster or p.example_id for p in common])
