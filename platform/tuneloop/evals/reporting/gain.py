"""How much of a gain is form, and how much is content."""

from __future__ import annotations

from typing import Any, NamedTuple

from tuneloop.evals.reporting.formatting import format_difference, format_interval
from tuneloop.evals.scoring.metrics import Metric
from tuneloop.evals.scoring.results import Evaluation


class SplitGain(NamedTuple):
    """The two steps from a model with free answers to the candidate's with constrained ones.

    Args:
        form: The other model's constrained answers against its free ones.
        content: The candidate model's constrained answers against those of the other model.
    """

    form: dict[str, Any]
    content: dict[str, Any]


def split_gain(evaluation: Evaluation) -> SplitGain | None:
    """Return the steps, as pairs of the comparison; None where an arm for them is missing."""
    # By the arm with free answers.
    bound = {a["free_arm"]: a["name"] for a in evaluation.arms if a.get("free_arm")}
    candidate = evaluation.candidate
    free = candidate.get("free_arm") or candidate["name"]
    other = next((name for name in bound if name != free), None)
    if free not in bound or other is None:
        return None
    pairs = {(pair["arm"], pair["other"]): pair for pair in evaluation.comparison["pairs"]}
    form, content = (bound[other], other), (bound[free], bound[other])
    if form not in pairs or content not in pairs:
        return None
    return SplitGain(pairs[form], pairs[content])


def describe_gain(evaluation: Evaluation) -> str:
    """Return in a sentence how a gain is split; empty where it is not known."""
    split = split_gain(evaluation)
    if split is None:
        return ""
    metric = evaluation.metric(evaluation.primary)
    form, content = (_in_words(evaluation, pair, metric) for pair in split)
    return (
        f" Form: `{split.form['arm']}` has {form} over `{split.form['other']}`. Content: of the "
        f"two bound to that form, `{split.content['arm']}` has {content} over "
        f"`{split.content['other']}`."
    )


def _in_words(evaluation: Evaluation, pair: dict[str, Any], metric: Metric) -> str:
    difference = pair["differences"][evaluation.primary]
    words = format_difference(difference["value"], metric)
    interval = format_interval(difference, metric)
    return f"{words} ({interval})" if interval else words
