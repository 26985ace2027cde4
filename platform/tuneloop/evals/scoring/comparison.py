"""Arms side by side over the same examples: means, paired differences, errors fixed and made.

A request that failed leaves its example unscored in that arm: it is counted, it is not an error,
and a paired comparison uses the examples scored in both arms.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from tuneloop.evals.scoring.clusters import Clusters
from tuneloop.evals.scoring.error_tags import tags_of
from tuneloop.evals.scoring.estimates import (
    adjust_p_values,
    describe_difference,
    describe_mean,
    describe_statistic,
    describe_statistic_over_seeds,
)
from tuneloop.evals.scoring.intervals import Floats, Resampling, Scale
from tuneloop.evals.scoring.metrics import MACRO_F1, OF_ALL_ROWS, Metric, Scorer, in_task
from tuneloop.evals.scoring.pairing import (
    PairedExample,
    count_changes,
    count_tag_changes,
    pair_arms,
)
from tuneloop.evals.scoring.predictions import (
    Prediction,
    are_same_models,
    by_model,
    paired_values,
    values_of,
)

SCHEMA_VERSION = 1


def summarise(
    predictions: Sequence[Prediction],
    scorer: Scorer,
    resampling: Resampling,
    cluster_by: str = "",
) -> dict[str, Any]:
    """Return the content of `metrics.json`: what was measured, and every arm by itself.

    Args:
        predictions: All answers of all arms.
        scorer: Knows the metrics.
        resampling: Level, resamples and seed.
        cluster_by: What the rows of a cluster have in common.
    """
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
        "primary": scorer.decides,
        "row_metric": scorer.primary,
        "confidence": resampling.confidence,
        "num_examples": len({prediction.example_id for prediction in predictions}),
        "num_clusters": len({p.cluster or p.example_id for p in predictions}),
        "cluster_by": cluster_by,
        "metrics": {name: metric.meaning() for name, metric in metrics.items()},
        "arms": [
            _summarise_arm([p for p in predictions if p.arm == arm], scorer, resampling)
            for arm in arms
        ],
    }


def compare(
    predictions: Sequence[Prediction],
    scorer: Scorer,
    resampling: Resampling,
    margin: float | None = None,
    no_opponents: Collection[str] = (),
) -> dict[str, Any]:
    """Return the content of `comparison.json`: each arm against each that comes before it.

    Args:
        predictions: All answers of all arms.
        scorer: Knows the metrics.
        resampling: Level, resamples and seed.
        margin: Loss in the primary metric that does not matter; None where none was set.
        no_opponents: Arms that the last one is not read against.
    """
    arms = list(dict.fromkeys(prediction.arm for prediction in predictions))
    primary = scorer.metrics[scorer.primary]
    pairs = []
    for index, arm in enumerate(arms):
        for other in reversed(arms[:index]):
            examples = pair_arms(predictions, other, arm, scorer.primary, primary)
            answered = [example for example in examples if example.is_answered]
            pair = {"arm": arm, "other": other, "num_both_scored": len(answered)}
            pair |= _compare_pair(answered, scorer, resampling)
            counted = [e for e in examples if all(_counts(p, scorer) for p in (e.before, e.after))]
            if len(answered) < len(examples) and counted and primary.kind != "number":
                pair["worst_case"] = _worst_case(counted, scorer)
            pairs.append(pair)
    tasks = {in_task(name, part.primary) for name, part in scorer.parts.items()}
    read = [p for p in pairs if p["arm"] == arms[-1] and p["other"] not in no_opponents]
    _adjust_pairs(read, scorer.decides, tasks)
    _adjust_pairs([pair for pair in pairs if pair not in read], scorer.decides, tasks)
    return {
        "schema_version": SCHEMA_VERSION,
        "primary": scorer.decides,
        "confidence": resampling.confidence,
        "margin": margin,
        "pairs": pairs,
    }


def _summarise_arm(
    predictions: Sequence[Prediction], scorer: Scorer, resampling: Resampling
) -> dict[str, Any]:
    scored = [p for p in predictions if p.status == "scored"]
    scores = _scores(scored, scorer, resampling)
    extra: dict[str, Any] = {}
    models = by_model(scored)
    if len(models) > 1:
        extra["models"] = [
            {"name": model, "scores": _scores(rows, scorer, resampling)}
            for model, rows in models.items()
        ]
    if scorer.task.type == "classification":
        counts = LabelCounts(scored, scorer)
        extra["label_f1"] = counts.f1_by_label()
        extra["confusion"] = counts.confusion()
    if len(models) == 1 and any(p.samples for p in scored):
        estimate = scores[scorer.primary]
        extra["sampling"] = _sampling_noise(scored, estimate, resampling.confidence)
    # What answers cost is that of one model's.
    answers = [answer for of_model in models.values() for answer in of_model]
    reasons = [p.error for p in predictions if p.status == "unscored"]
    if reasons and scorer.metrics[scorer.primary].kind != "number":
        # As if every missing answer were wrong, and as if every one were right.
        counted = [p for p in predictions if _counts(p, scorer)]
        ends = (_score_of_all(counted, scorer, missing) for missing in (0.0, 1.0))
        extra["worst_case"] = dict(zip(("low", "high"), ends, strict=True))
    return {
        "name": predictions[0].arm,
        "num_scored": len(scored),
        "num_unscored": len(reasons),
        "unscored_reasons": {reason: reasons.count(reason) for reason in dict.fromkeys(reasons)},
        "scores": scores,
        **extra,
        "error_tags": {tag: sum(tag in p.error_tags for p in scored) for tag in tags_of(scored)},
        "mean_prompt_tokens": _mean([p.prompt_tokens for p in answers]),
        "median_completion_tokens": _median([p.completion_tokens for p in answers]),
        "median_latency_s": _median([p.latency_s for p in answers]),
    }


def _scores(
    scored: Sequence[Prediction], scorer: Scorer, resampling: Resampling
) -> dict[str, dict[str, Any]]:
    """Return an arm's score in each metric with its interval.

    Of several trainings of one recipe it is their mean, and the interval is for other trainings as
    well as other rows.
    """
    ids = _cluster_ids(scored)
    scores = {}
    for name, metric in scorer.metrics_of(any(p.samples for p in scored)).items():
        values = values_of(scored, name)
        known = _known(values)
        clusters = Clusters.of(ids[known])
        scores[name] = describe_mean(values[..., known], clusters, metric, resampling)
    if scorer.task.type == "classification":
        scores["macro_f1"] = describe_macro_f1(scored, None, scorer, resampling)
    return scores


def _known(values: Floats) -> NDArray[np.bool_]:
    """Return which rows have a score, shape (n,), of scores of shape (n,) or (S, n)."""
    return np.asarray(~np.isnan(np.atleast_2d(values)).any(axis=0))


def describe_macro_f1(
    rows: Sequence[Prediction],
    others: Sequence[Prediction] | None,
    scorer: Scorer,
    resampling: Resampling,
) -> dict[str, Any]:
    """Return macro-F1 with its interval, or the difference to another arm's on the same rows.

    Args:
        rows: Scored answers.
        others: Those of the other arm, in the same order; None for macro-F1 itself.
        scorer: Knows the labels.
        resampling: Level, resamples and seed.
    """
    clusters = Clusters.of(_cluster_ids(rows))
    first, second = (
        [] if arm is None else [LabelCounts(one, scorer) for one in by_model(arm).values()]
        for arm in (rows, others)
    )
    if len(first) > 1 or len(second) > 1:
        ours, theirs = ([counts.macro_f1 for counts in arm] for arm in (first, second))
        if others is not None and are_same_models(rows, others):
            pairs = zip(first, second, strict=True)
            ours = [partial(_above, one.macro_f1, other.macro_f1) for one, other in pairs]
            theirs = [lambda weights: np.zeros(len(weights))]
        told = describe_statistic_over_seeds(ours, theirs, clusters, resampling.confidence)
        if told is not None:
            return told

    def mean(weights: Floats) -> Floats:
        total = sum(counts.macro_f1(weights) for counts in first) / len(first)
        if second:
            total = total - sum(counts.macro_f1(weights) for counts in second) / len(second)
        return np.asarray(total)

    scale: Scale = "unbounded" if second else "unit"
    return describe_statistic(mean, clusters, first[0].num_effective, scale, resampling)


def _sampling_noise(
    predictions: Sequence[Prediction], estimate: dict[str, Any], confidence: float
) -> dict[str, Any]:
    """Return how uncertain a score is because few answers to a row were sampled.

    Args:
        predictions: Scored rows.
        estimate: Their mean with its interval, which holds this noise and that of the rows.
        confidence: Of that interval.

    Returns:
        `num_samples`; `std_error` of the mean from sampling alone; `share` of the variance that it
        makes up, None where the interval has no width.
    """
    rows = [[s["score"] for s in p.samples if s["score"] is not None] for p in predictions]
    rows = [scores for scores in rows if len(scores) > 1]
    variance = sum(np.var(scores, ddof=1) / len(scores) for scores in rows) / max(1, len(rows)) ** 2
    share = None
    if estimate["low"] is not None and estimate["high"] > estimate["low"]:
        width = float(stats.norm.ppf(0.5 + confidence / 2))
        total = ((estimate["high"] - estimate["low"]) / 2 / width) ** 2
        share = min(1.0, float(variance) / total)
    return {
        "num_samples": max(len(p.samples) for p in predictions),
        "std_error": float(np.sqrt(variance)),
        "share": share,
    }


def _above(
    first: Callable[[Floats], Floats], second: Callable[[Floats], Floats], weights: Floats
) -> Floats:
    return first(weights) - second(weights)


def _compare_pair(
    examples: Sequence[PairedExample], scorer: Scorer, resampling: Resampling
) -> dict[str, Any]:
    first, second = [e.after for e in examples], [e.before for e in examples]
    ids = _cluster_ids(first)
    differences: dict[str, Any] = {}
    for name, metric in scorer.metrics_of(any(p.samples for p in (*first, *second))).items():
        ours, theirs = paired_values(first, second, name)
        both = _known(ours) & _known(theirs)
        differences[name] = describe_difference(
            ours[..., both], theirs[..., both], Clusters.of(ids[both]), metric, resampling
        )
    if scorer.task.type == "classification":
        differences["macro_f1"] = describe_macro_f1(first, second, scorer, resampling)
    return {
        "differences": differences,
        "outcomes": _outcomes(examples, scorer.metrics[scorer.primary]),
        "error_tags": count_tag_changes(
            examples, tags_of([p for e in examples for p in (e.before, e.after)])
        ),
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
        answers = [
            [own if is_right else scorer.label(text) for text, is_right in _answers_of(p)]
            for p, own in zip(predictions, truth, strict=True)
        ]
        self._known = list(scorer.task.labels)
        self._pairs = Counter(
            (label, one) for label, of_row in zip(truth, answers, strict=True) for one in of_row
        )
        self.labels = [label for label in scorer.task.labels if label in truth]
        # Both of shape (n, L), L labels.
        self._truth = np.array([[t == label for label in self.labels] for t in truth], float)
        # Of several answers to a row the share that names the label.
        self._answers = np.array(
            [[of_row.count(label) / len(of_row) for label in self.labels] for of_row in answers]
        ).reshape(self._truth.shape)

    @property
    def num_effective(self) -> float:
        """As many rows of even labels as leave the macro average the same variance."""
        rows = self._truth.sum(axis=0) if self.labels else np.zeros(0)
        return float(len(rows) ** 2 / (1 / rows).sum()) if len(rows) else 1.0

    def macro_f1(self, weights: Floats) -> Floats:
        """Return the mean F1 over the labels for each row of weights, shape (R, n) to (R,)."""
        right = weights @ (self._truth * self._answers)
        either = weights @ (self._truth + self._answers)
        f1 = np.divide(2 * right, either, out=np.zeros_like(right), where=either > 0)
        # A rare label may be missing from a resample; it has no F1 there.
        present = weights @ self._truth > 0
        return np.asarray((f1 * present).sum(axis=1) / present.sum(axis=1))

    def least_macro_f1(self, num_wrong: int) -> float:
        """Return the mean F1 over the labels if so many rows without a label had a wrong one.

        Each names the label whose F1 falls most by it: no wrong answers can do more harm.
        """
        right = (self._truth * self._answers).sum(axis=0)
        either = (self._truth + self._answers).sum(axis=0)
        for _ in range(num_wrong):
            either[np.argmax(right / either - right / (either + 1))] += 1
        return float(np.mean(2 * right / either))

    def confusion(self) -> dict[str, dict[str, int]]:
        """Return how often each reference's label was answered with which; an empty name is an
        answer that names none."""
        return {
            label: {
                answer or "": self._pairs[label, answer]
                for answer in [*self._known, None]
                if self._pairs[label, answer]
            }
            for label in self.labels
        }

    def f1_by_label(self) -> dict[str, float]:
        """Return F1 of each label."""
        if not self.labels:
            return {}
        right = (self._truth * self._answers).sum(axis=0)
        either = (self._truth + self._answers).sum(axis=0)
        return {
            label: float(2 * r / e) for label, r, e in zip(self.labels, right, either, strict=True)
        }


def _answers_of(prediction: Prediction) -> list[tuple[str, bool]]:
    """Return every answer to a row, and whether it is known to be right.

    Where several labels are right the row's reference is the one that its first answer names.
    """
    scores = [sample.get("scores") or {} for sample in prediction.samples] or [prediction.scores]
    is_right = [score.get("accuracy") == 1 for score in scores]
    return list(zip(prediction.completions, is_right, strict=True))


def _counts(prediction: Prediction, scorer: Scorer) -> bool:
    """Return whether a row has a part in the score that decides, or may have: it is missing."""
    is_missing, is_of_all = prediction.status != "scored", scorer.decides == OF_ALL_ROWS
    return is_missing or is_of_all or prediction.scores.get(scorer.primary) is not None


def _worst_case(examples: Sequence[PairedExample], scorer: Scorer) -> dict[str, float]:
    """Return the difference if every missing answer spoke against, or for, the later arm."""

    def score(ours_missing: float, theirs_missing: float) -> float:
        ours = _score_of_all([e.after for e in examples], scorer, ours_missing)
        return ours - _score_of_all([e.before for e in examples], scorer, theirs_missing)

    return {"low": score(0.0, 1.0), "high": score(1.0, 0.0)}


def _score_of_all(predictions: Sequence[Prediction], scorer: Scorer, missing: float) -> float:
    """Return the score that decides if every missing answer scored `missing`, 0 or 1."""
    if scorer.decides == OF_ALL_ROWS:
        filled = [
            p
            if p.status == "scored"
            else replace(p, completion=p.reference if missing else "", samples=[])
            for p in predictions
        ]
        lacking = 0 if missing else sum(p.status != "scored" for p in predictions)
        each = [LabelCounts(rows, scorer) for rows in by_model(filled).values()]
        return float(np.mean([counts.least_macro_f1(lacking) for counts in each]))
    return float(np.mean([p.scores.get(scorer.primary, missing) for p in predictions]))


def _adjust_pairs(pairs: Sequence[dict[str, Any]], primary: str, tasks: Collection[str]) -> None:
    """Adjust p-values where several are read together, each family by itself.

    The headline reads the primary metric of the candidate's pairs, the table of a mixture's tasks
    the primary metric of each. All other metrics are one family.
    """
    families: dict[str, list[dict[str, Any]]] = {}
    for pair in pairs:
        for name, difference in pair["differences"].items():
            kind = "primary" if name == primary else "task" if name in tasks else "other"
            families.setdefault(kind, []).append(difference)
    for family in families.values():
        adjust_p_values(family)


def _cluster_ids(predictions: Sequence[Prediction]) -> NDArray[np.str_]:
    """Return the cluster of each answer, shape (n,); a row without one is its own."""
    return np.array([p.cluster or p.example_id for p in predictions], dtype=np.str_)


def _mean(values: Sequence[float | None]) -> float | None:
    measured = [value for value in values if value is not None]
    return float(np.mean(measured)) if measured else None


def _median(values: Sequence[float | None]) -> float | None:
    measured = [value for value in values if value is not None]
    return float(np.median(measured)) if measured else None
