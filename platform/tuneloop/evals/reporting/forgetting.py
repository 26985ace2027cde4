"""What a model has forgotten, as the report shows it."""

from __future__ import annotations

from typing import Any

from tuneloop.evals.reporting.formatting import (
    format_difference,
    format_estimate,
    format_interval,
    format_p_value,
    format_size,
)
from tuneloop.evals.scoring.metrics import Metric


def show_forgetting(forgetting: dict[str, Any], confidence: float) -> list[dict[str, Any]]:
    """Return a row for each general task: scores before and after, difference, what it says."""
    rows = []
    for task in forgetting.get("tasks", []):
        if not task["is_primary"]:
            continue
        difference = task["difference"]
        # Evaluations of earlier versions take all for better where they are higher.
        metric = Metric(task["metric"], task.get("better", "higher"), task["kind"])
        rows.append(
            {
                "task": task["task"],
                "metric": task["metric"] + ", lower is better" * (metric.better == "lower"),
                "n": difference["n"],
                "before": format_estimate(task["before"], metric),
                "after": format_estimate(task["after"], metric),
                "difference": format_difference(difference["value"], metric),
                "interval": format_interval(difference, metric),
                "p": format_p_value(difference["p_adjusted"]),
                "says": _says(difference, metric, 1 - confidence),
            }
        )
    return rows


def _says(difference: dict[str, Any], metric: Metric, level: float) -> str:
    low, high, p_value = difference["low"], difference["high"], difference["p_adjusted"]
    if low is None or p_value is None:
        return "too few documents"
    if metric.better == "lower":
        low, high = -high, -low
    if p_value <= level and high < 0:
        return "forgotten"
    if p_value <= level and low > 0:
        return "better than before"
    if low > 0:
        return "not clearly changed"
    return f"not clearly changed; a loss of more than {format_size(-low, metric)} is excluded"
