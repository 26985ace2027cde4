"""The headline of an evaluation: whether the candidate is better than each other arm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from tuneloop.evals.reporting.formatting import (
    format_difference,
    format_estimate,
    format_interval,
    join_words,
)
from tuneloop.evals.scoring.metrics import Metric
from tuneloop.evals.scoring.results import Evaluation
from tuneloop.records import BASE, FEW_SHOT, FINETUNED, SIMPLE

Tone = Literal["good", "mixed", "bad", "unclear"]
Direction = Literal["better", "worse", "unclear"]
_ARM_WORDS = {
    BASE: "the base model",
    FEW_SHOT: "few-shot prompting",
    SIMPLE: "the simple arm",
    FINETUNED: "the finetuned model",
}
_ALL_ALIKE: dict[Direction, tuple[Tone, str]] = {
    "better": ("good", "helped"),
    "worse": ("bad", "made it worse"),
    "unclear": ("unclear", "made no clear difference"),
}
_CLAUSES: dict[Direction, str] = {
    "better": "is better than",
    "unclear": "is not clearly different from",
    "worse": "is worse than",
}
_SIGNIFICANT_P = 0.05


@dataclass(frozen=True)
class Headline:
    """What an evaluation says, in a sentence.

    Args:
        title: A few words.
        detail: The differences it rests on, with their intervals.
    """

    tone: Tone
    title: str
    detail: str


def write_headline(evaluation: Evaluation) -> Headline:
    """Return whether the candidate is better than each arm before it."""
    name = evaluation.candidate["name"]
    subject = "Finetuning" if name == FINETUNED else describe_arm(name, capital=True)
    pairs = evaluation.candidate_pairs()
    primary = evaluation.primary
    metric = evaluation.metric(primary)
    if not pairs:
        score = format_estimate(evaluation.candidate["scores"][primary], metric)
        return Headline("unclear", f"{subject}: {score}", "One arm alone: nothing to compare.")
    directions = [direction(pair["differences"][primary], metric) for pair in pairs]
    detail = "; ".join(_difference_in_words(evaluation, pair) for pair in pairs) + "."
    detail += _simple_is_enough(evaluation, pairs)
    if len(set(directions)) == 1:
        tone, words = _ALL_ALIKE[directions[0]]
        return Headline(tone, f"{subject} {words}", detail)
    clauses = []
    for kind, words in _CLAUSES.items():
        others = [p["other"] for p, d in zip(pairs, directions, strict=True) if d == kind]
        if others:
            clauses.append(f"{words} {join_words([describe_arm(other) for other in others])}")
    tone = "mixed" if "better" in directions else "bad"
    return Headline(tone, f"{subject} {join_words(clauses, 'but')}", detail)


def _simple_is_enough(evaluation: Evaluation, pairs: list[dict[str, Any]]) -> str:
    """Return a sentence where the candidate does not beat the simple arm; empty otherwise."""
    metric, kinds = evaluation.metric(evaluation.primary), evaluation.task_types()
    what = "a classifier" if kinds == {"classification"} else "the nearest training row's answer"
    for pair in pairs:
        if pair["other"] == SIMPLE:
            kind = direction(pair["differences"][evaluation.primary], metric)
            if kind == "worse":
                return f" The simple arm needs no model: {what} is enough."
            if kind == "unclear":
                return f" The simple arm needs no model: {what} may be enough."
    return ""


def _difference_in_words(evaluation: Evaluation, pair: dict[str, Any]) -> str:
    difference = pair["differences"][evaluation.primary]
    metric = evaluation.metric(evaluation.primary)
    words = format_difference(difference["value"], metric)
    if interval := format_interval(difference, metric):
        words += f" ({evaluation.metrics['confidence']:.0%} interval {interval})"
    return f"{words} over {describe_arm(pair['other'])}"


def direction(difference: dict[str, Any], metric: Metric) -> Direction:
    """Return what a difference's interval allows to say."""
    low, high = difference["low"], difference["high"]
    if low is None or low <= 0 <= high:
        return "unclear"
    # Equal differences have an interval without width, which says nothing about so few examples.
    if difference["method"] == "all equal" and difference["p_value"] >= _SIGNIFICANT_P:
        return "unclear"
    return "better" if (low > 0) != (metric.better == "lower") else "worse"


def describe_arm(name: str, capital: bool = False) -> str:
    """Return an arm's name in words."""
    words = _ARM_WORDS.get(name, f"`{name}`")
    return words[0].upper() + words[1:] if capital else words
