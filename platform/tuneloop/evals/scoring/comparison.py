"""Arms side by side over the same examples: means, paired differences, errors fixed and made.

A request that failed leaves its example unscored in that arm: it is counted, it is not an error,
and a paired comparison uses the examples scored in both arms.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from tuneloop.evals.scoring.error_tags import ERROR_TAGS
from tuneloop.evals.scoring.intervals import (
    Floats,
    IntervalEstimate,
    Resampling,
    estimate_difference,
    estimate_mean,
    estimate_statistic,
)
from tuneloop.evals.scoring.metrics import MACRO_F1, Metric, Scorer
from tuneloop.evals.scoring.pairing import (
    PairedExample,
    count_changes,
    count_tag_changes,
    pair_arms,
)
from tuneloop.evals.scoring.predictions import Prediction

SCHEMA_VERSION = 1


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
        "metrics": {name: metric.meaning() for name, metric in metrics.items()},
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
    primary = scorer.metrics[scorer.primary]
    pairs = []
    for index, arm in enumerate(arms):
        for other in reversed(arms[:index]):
            examples = pair_arms(predictions, other, arm, scorer.primary, primary)
            answered = [example for example in examples if example.is_answered]
            pairs.append(
                {"arm": arm, "other": other, "num_both_scored": len(answered)}
                | _compare_pair(answered, scorer, resampling)
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
    examples: Sequence[PairedExample], scorer: Scorer, resampling: Resampling
) -> dict[str, Any]:
    first, second = [e.after for e in examples], [e.before for e in examples]
    differences: dict[str, Any] = {}
    for name, metric in scorer.metrics.items():
        ours, theirs = _raw_values(first, name), _raw_values(second, name)
        both = ~(np.isnan(ours) | np.isnan(theirs))
        differences[name] = dataclasses.asdict(
            estimate_difference(ours[both], theirs[both], metric.kind == "binary", resampling)
        )
    if scorer.task.type == "classification":
        differences["macro_f1"] = dataclasses.asdict(
            _macro_f1_difference(first, second, scorer, resampling)
        )
    return {
        "differences": differences,
        "outcomes": _outcomes(examples, scorer.metrics[scorer.primary]),
        "error_tags": {tag: count_tag_changes(examples, tag) for tag in ERROR_TAGS},
    }


def _outcomes(examples: Sequence[PairedExample], primary: Metric) -> dict[str, int]:
    """Return the counts by the names that `comparison.json` has for 0/1 and for other scores."""
    counts = count_changes(examples)
    if primary.kind == "binary":
        return {name: counts[name] for name in ("fixed", "introduced", "both_right", "both_wrong")}
    return {"better": counts["fixed"], "worse": counts["introduced"], "same": counts["same"]}


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
) -> IntervalEstimate:
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
    measured = [value for value in values if value is not None]
    return float(np.mean(measured)) if measured else None


def _median(values: Sequence[float | None]) -> float | None:
    measured = [value for value in values if value is not None]
    return float(np.median(measured)) if measured else None
