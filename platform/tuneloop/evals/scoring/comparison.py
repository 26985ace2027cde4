"""Arms side by side over the same examples: means, paired differences, errors fixed and made.

A request that failed leaves its example unscored in that arm: it is counted, it is not an error,
and a paired comparison uses the examples scored in both arms.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tuneloop.evals.scoring.error_tags import ERROR_TAGS
from tuneloop.evals.scoring.intervals import (
    Estimate,
    Floats,
    Resampling,
    estimate_difference,
    estimate_mean,
    estimate_statistic,
)
from tuneloop.evals.scoring.metrics import MACRO_F1, Metric, Scorer
from tuneloop.records import FinishReason, Status

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Prediction:
    """One example answered by one arm: a row of `predictions.parquet`.

    Args:
        prompt: The messages that were sent, as JSON; the text itself for language modelling.
        finish_reason: None when unscored.
        latency_s: From sending to the full answer, with the other requests in flight.
        error: Why the row is unscored, empty otherwise.
        scores: Metric by name; empty when unscored.
        task: Of a mixture; empty otherwise.
    """

    example_id: str
    arm: str
    prompt: str
    reference: str
    completion: str
    finish_reason: FinishReason | None
    prompt_tokens: int | None
    completion_tokens: int | None
    latency_s: float | None
    status: Status
    error: str = ""
    error_tags: list[str] = field(default_factory=list)
    scores: dict[str, float | None] = field(default_factory=dict)
    task: str = ""


def summarise(
    predictions: Sequence[Prediction], scorer: Scorer, resampling: Resampling
) -> dict[str, Any]:
    """Return the content of `metrics.json`: what was measured, and every arm by itself."""
    arms = list(dict.fromkeys(prediction.arm for prediction in predictions))
    metrics = dict(scorer.metrics)
    if scorer.task.type == "classification":
        metrics["macro_f1"] = MACRO_F1
    return {
        "schema_version": SCHEMA_VERSION,
        "task_type": scorer.task.type,
        "tasks": {
            name: {"type": part.task.type, "primary": part.primary}
            for name, part in scorer.parts.items()
        },
        "primary": scorer.primary,
        "confidence": resampling.confidence,
        "num_examples": len({prediction.example_id for prediction in predictions}),
        "metrics": {name: dataclasses.asdict(metric) for name, metric in metrics.items()},
        "arms": [
            _summarise_arm([p for p in predictions if p.arm == arm], scorer, resampling)
            for arm in arms
        ],
    }


def compare(
    predictions: Sequence[Prediction], scorer: Scorer, resampling: Resampling
) -> dict[str, Any]:
    """Return the content of `comparison.json`: each arm against each that comes before it."""
    arms = list(dict.fromkeys(prediction.arm for prediction in predictions))
    scored = {
        arm: {p.example_id: p for p in predictions if p.arm == arm and p.status == "scored"}
        for arm in arms
    }
    pairs = []
    for index, arm in enumerate(arms):
        for other in reversed(arms[:index]):
            shared = [example for example in scored[arm] if example in scored[other]]
            first = [scored[arm][example] for example in shared]
            second = [scored[other][example] for example in shared]
            pairs.append(
                {"arm": arm, "other": other, "num_both_scored": len(shared)}
                | _compare_pair(first, second, scorer, resampling)
            )
    return {
        "schema_version": SCHEMA_VERSION,
        "primary": scorer.primary,
        "confidence": resampling.confidence,
        "pairs": pairs,
    }


def _summarise_arm(
    predictions: Sequence[Prediction], scorer: Scorer, resampling: Resampling
) -> dict[str, Any]:
    scored = [p for p in predictions if p.status == "scored"]
    scores = {
        name: estimate_mean(_values(scored, name), metric.kind == "binary", resampling)
        for name, metric in scorer.metrics.items()
    }
    extra: dict[str, Any] = {}
    if scorer.task.type == "classification":
        counts = LabelCounts(scored, scorer)
        scores["macro_f1"] = estimate_statistic(len(scored), counts.macro_f1, resampling)
        extra["label_f1"] = counts.f1_by_label()
    reasons = [p.error for p in predictions if p.status == "unscored"]
    return {
        "name": predictions[0].arm,
        "num_scored": len(scored),
        "num_unscored": len(reasons),
        "unscored_reasons": {reason: reasons.count(reason) for reason in dict.fromkeys(reasons)},
        "scores": {name: dataclasses.asdict(value) for name, value in scores.items()},
        **extra,
        "error_tags": {tag: sum(tag in p.error_tags for p in scored) for tag in ERROR_TAGS},
        "mean_prompt_tokens": _mean([p.prompt_tokens for p in scored]),
        "median_completion_tokens": _median([p.completion_tokens for p in scored]),
        "median_latency_s": _median([p.latency_s for p in scored]),
    }


def _compare_pair(
    first: Sequence[Prediction],
    second: Sequence[Prediction],
    scorer: Scorer,
    resampling: Resampling,
) -> dict[str, Any]:
    differences: dict[str, Any] = {}
    for name, metric in scorer.metrics.items():
        ours, theirs = _raw_values(first, name), _raw_values(second, name)
        both = ~(np.isnan(ours) | np.isnan(theirs))
        estimate, p_value, test = estimate_difference(
            ours[both], theirs[both], metric.kind == "binary", resampling
        )
        differences[name] = dataclasses.asdict(estimate) | {"p_value": p_value, "test": test}
    if scorer.task.type == "classification":
        differences["macro_f1"] = dataclasses.asdict(
            _macro_f1_difference(first, second, scorer, resampling)
        )
    primary = scorer.metrics[scorer.primary]
    return {
        "differences": differences,
        "outcomes": _outcomes(
            _raw_values(first, scorer.primary), _raw_values(second, scorer.primary), primary
        ),
        "error_tags": {tag: _tag_changes(first, second, tag) for tag in ERROR_TAGS},
    }


def _outcomes(first: Floats, second: Floats, metric: Metric) -> dict[str, int]:
    """Count examples by what became of them; for other than 0/1 scores, by direction."""
    gain = second - first if metric.better == "lower" else first - second
    up, down, same = int((gain > 0).sum()), int((gain < 0).sum()), gain == 0
    if metric.kind == "binary":
        return {
            "fixed": up,
            "introduced": down,
            "both_right": int((same & (first == 1)).sum()),
            "both_wrong": int((same & (first == 0)).sum()),
        }
    return {"better": up, "worse": down, "same": int(same.sum())}


def _tag_changes(
    first: Sequence[Prediction], second: Sequence[Prediction], tag: str
) -> dict[str, int]:
    """Count the examples where an error went away, came up, or stayed."""
    now = [tag in prediction.error_tags for prediction in first]
    before = [tag in prediction.error_tags for prediction in second]
    pairs = list(zip(before, now, strict=True))
    return {
        "fixed": pairs.count((True, False)),
        "introduced": pairs.count((False, True)),
        "both": pairs.count((True, True)),
    }


class LabelCounts:
    """Right and wrong labels of an arm's answers, for F1 by label.

    Args:
        predictions: Scored answers.
        scorer: Knows the labels. Those that no reference carries have no F1 and are left out.
    """

    def __init__(self, predictions: Sequence[Prediction], scorer: Scorer) -> None:
        truth = [scorer.label(p.reference) for p in predictions]
        answers = [scorer.label(p.completion) for p in predictions]
        self.labels = [label for label in scorer.task.labels if label in truth]
        # Both of shape (n, L), L labels.
        self._truth = np.array([[t == label for label in self.labels] for t in truth], float)
        self._answers = np.array([[a == label for label in self.labels] for a in answers], float)

    def macro_f1(self, weights: Floats) -> Floats:
        """Return the mean F1 over the labels for each row of weights, shape (R, n) to (R,)."""
        right = weights @ (self._truth * self._answers)
        either = weights @ (self._truth + self._answers)
        f1 = np.divide(2 * right, either, out=np.zeros_like(right), where=either > 0)
        # A rare label may be missing from a resample; it has no F1 there.
        present = weights @ self._truth > 0
        return np.asarray((f1 * present).sum(axis=1) / present.sum(axis=1))

    def f1_by_label(self) -> dict[str, float]:
        """Return F1 of each label."""
        if not self.labels:
            return {}
        right = (self._truth * self._answers).sum(axis=0)
        either = (self._truth + self._answers).sum(axis=0)
        return {
            label: float(2 * r / e) for label, r, e in zip(self.labels, right, either, strict=True)
        }


def _macro_f1_difference(
    first: Sequence[Prediction],
    second: Sequence[Prediction],
    scorer: Scorer,
    resampling: Resampling,
) -> Estimate:
    ours, theirs = LabelCounts(first, scorer), LabelCounts(second, scorer)
    return estimate_statistic(
        len(first), lambda weights: ours.macro_f1(weights) - theirs.macro_f1(weights), resampling
    )


def _raw_values(predictions: Sequence[Prediction], name: str) -> Floats:
    """Return scores of shape (n,); NaN where the metric does not apply to the row."""
    return np.array([p.scores.get(name) for p in predictions], dtype=np.float64)


def _values(predictions: Sequence[Prediction], name: str) -> Floats:
    values = _raw_values(predictions, name)
    return values[~np.isnan(values)]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None
