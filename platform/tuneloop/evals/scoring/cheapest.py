"""Which arm is enough: the cheapest that is not worse than the best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tuneloop.config import NO_DIFFERENCE
from tuneloop.evals.scoring.metrics import Metric
from tuneloop.records import Arm


def find_cheapest(
    arms: Sequence[Arm],
    measured: Sequence[Mapping[str, Any]],
    comparison: Mapping[str, Any],
    metric: Metric,
) -> dict[str, Any] | None:
    """Return the best arm and the cheapest that is shown not to be worse by the margin or more.

    What needs no model is cheapest, then models of our own: those as they come before those that
    were trained, the fewest tokens first, and then endpoints by their price. Answers made elsewhere
    and endpoints without a price are never the cheapest.

    Args:
        measured: Each arm of `metrics.json`.
        comparison: Content of `comparison.json`.
        metric: The primary one. Without a margin nothing can be said in a unit of its own.
    """
    primary, margin = comparison["primary"], comparison["margin"]
    if margin is None:
        if metric.kind == "number":
            return None
        margin = NO_DIFFERENCE
    sign = -1 if metric.better == "lower" else 1
    scores = {
        about["name"]: sign * about["scores"][primary]["value"]
        for about in measured
        if about["scores"][primary]["value"] is not None
    }
    if len(scores) < 2:
        return None
    best = max(scores, key=scores.__getitem__)
    pairs = {frozenset((pair["arm"], pair["other"])): pair for pair in comparison["pairs"]}
    costs = {arm.name: _cost(arm, about) for arm, about in zip(arms, measured, strict=True)}
    enough = [
        name
        for name in scores
        if math.isfinite(costs[name][0])
        and (name == best or _loss(pairs[frozenset((name, best))], name, primary, sign) < margin)
    ]
    return {
        "best": best,
        "cheapest": min(enough, key=costs.__getitem__) if enough else None,
        "margin": margin,
    }


def _cost(arm: Arm, about: Mapping[str, Any]) -> list[float]:
    """Return what orders arms by cost."""
    if arm.endpoint.url and not arm.model_fingerprint:
        price = about["cost_per_1000_requests"]
        return [3.0, price] if price is not None else [math.inf]
    if arm.answer:
        return [math.inf] if arm.endpoint.url else [0.0]
    tokens = sum(about[name] or 0 for name in ("mean_prompt_tokens", "mean_completion_tokens"))
    return [2.0 if arm.trained_on else 1.0, tokens]


def _loss(pair: Mapping[str, Any], name: str, primary: str, sign: int) -> float:
    """Return the largest loss of an arm against the other that the interval leaves possible."""
    difference = pair["differences"][primary]
    worst = pair.get("worst_case")
    is_later = (pair["arm"] == name) == (sign > 0)
    ends = [one["low"] if is_later else one["high"] for one in (difference, worst) if one]
    if any(end is None for end in ends):
        return math.inf
    return max(-end if is_later else end for end in ends)
