"""What a model has forgotten: general tasks before and after, document by document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tuneloop.evals.scoring.clusters import Clusters
from tuneloop.evals.scoring.estimates import adjust_p_values, describe_difference, describe_mean
from tuneloop.evals.scoring.harness import DocumentScore, Models
from tuneloop.evals.scoring.intervals import Floats, Resampling
from tuneloop.evals.scoring.metrics import Better, Metric

# What a task is judged by if it has it; else its first metric.
_PREFERRED = ("acc_norm", "acc", "exact_match")


def describe_forgetting(
    scores: Sequence[DocumentScore], models: Models, resampling: Resampling
) -> dict[str, Any]:
    """Return both models' scores on each task and the paired difference, for `comparison.json`.

    Documents that only one of the two has are left out. Where a task reads answers in several ways,
    by filters, each is a metric of its own: `exact_match,strict-match`. p-values are adjusted for
    the number of tasks (Holm).

    Args:
        scores: Of both models.
        models: Before and after.
        resampling: Level, resamples and seed.
    """
    before, after = models.before.name, models.after.name
    values: dict[tuple[str, str, str], dict[str, float]] = {}
    filters: dict[str, dict[str, None]] = {}
    for score in scores:
        filters.setdefault(score.task, {})[score.doc.partition("/")[2]] = None
    names: dict[str, dict[str, Better]] = {}
    for score in scores:
        doc, _, way = score.doc.partition("/")
        name = f"{score.metric},{way}" if len(filters[score.task]) > 1 else score.metric
        names.setdefault(score.task, {})[name] = score.better
        values.setdefault((score.task, name, score.arm), {})[doc] = score.value
    tasks: list[dict[str, Any]] = []
    for task, found in names.items():
        metrics = list(found)
        for name in metrics:
            old, new = (values.get((task, name, arm), {}) for arm in (before, after))
            if docs := sorted(old.keys() & new.keys()):
                first, second = (np.array([arm[doc] for doc in docs]) for arm in (old, new))
                metric = _meaning(name, found[name], np.concatenate([first, second]))
                rows = Clusters.of(docs)
                told = {
                    "task": task,
                    "metric": name,
                    "kind": metric.kind,
                    "better": metric.better,
                    "is_primary": name == _primary(metrics),
                    "before": describe_mean(first, rows, metric, resampling),
                    "after": describe_mean(second, rows, metric, resampling),
                    "difference": describe_difference(second, first, rows, metric, resampling),
                }
                tasks.append(told)
    adjust_p_values([task["difference"] for task in tasks if task["is_primary"]])
    return {
        "before": before,
        "after": after,
        "fingerprints": {arm.name: arm.model_fingerprint for arm in models},
        "tasks": tasks,
    }


def _meaning(name: str, better: Better, values: Floats) -> Metric:
    if np.isin(values, [0, 1]).all():
        return Metric(name, better, kind="binary")
    is_ratio = values.min() >= 0 and values.max() <= 1
    return Metric(name, better, kind="ratio" if is_ratio else "number")


def _primary(metrics: Sequence[str]) -> str:
    plain = [name.partition(",")[0] for name in metrics]
    place = next((plain.index(name) for name in _PREFERRED if name in plain), 0)
    return metrics[place]
