"""Two arms over the same examples: what became of each example, and which to show first.

The comparison, the report and the dashboard all read the pairs made here.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from tuneloop.evals.scoring.metrics import Metric
from tuneloop.evals.scoring.predictions import Prediction

Change = Literal["fixed", "introduced", "both_right", "both_wrong", "same", "unscored"]
TagChange = Literal["fixed", "introduced", "both"]

CHANGES: tuple[Change, ...] = (
    "fixed", "introduced", "both_wrong", "both_right", "same", "unscored",
)  # fmt: skip
TAG_CHANGES: tuple[TagChange, ...] = ("fixed", "introduced", "both")


@dataclass(frozen=True)
class PairedExample:
    """One question with the answers of two arms.

    Args:
        gain: How much better `after` is in the metric, in the metric's unit; None when one of
            the two has no score.
        change: What became of the example. Only 0/1 scores are `both_right` or `both_wrong`;
            others that are equal are the `same`.
    """

    before: Prediction
    after: Prediction
    gain: float | None
    change: Change

    @property
    def example_id(self) -> str:
        return self.after.example_id

    @property
    def reference(self) -> str:
        return self.after.reference

    @cached_property
    def question(self) -> str:
        return last_question(self.after.prompt)

    @property
    def is_answered(self) -> bool:
        """Whether both arms gave an answer."""
        return self.before.status == self.after.status == "scored"

    def tag_change(self, tag: str) -> TagChange | None:
        """Return what became of an error from `before` to `after`; None where neither has it."""
        was, now = tag in self.before.error_tags, tag in self.after.error_tags
        if was and now:
            return "both"
        return "fixed" if was else "introduced" if now else None


def pair_arms(
    predictions: Sequence[Prediction], before: str, after: str, name: str, metric: Metric
) -> list[PairedExample]:
    """Return every example that both arms were asked, in the order of the predictions.

    Args:
        predictions: All arms' answers.
        before: Name of the arm to compare with.
        after: Name of the arm that is compared.
        name: The metric that decides what became of an example.
        metric: What it means.
    """
    others = {p.example_id: p for p in predictions if p.arm == before}
    return [
        _pair(others[new.example_id], new, name, metric)
        for new in predictions
        if new.arm == after and new.example_id in others
    ]


def by_change(examples: Sequence[PairedExample]) -> list[PairedExample]:
    """Return examples in the order to show them: largest change first, unscored ones last.

    Equal changes are ordered by row id. Row ids are hashes, so that is a random order which is
    the same every time.
    """
    return sorted(examples, key=lambda e: (e.gain is None, -abs(e.gain or 0.0), e.example_id))


def count_changes(examples: Sequence[PairedExample]) -> dict[Change, int]:
    """Return how many examples have each change, zeros included."""
    return {change: sum(e.change == change for e in examples) for change in CHANGES}


def count_tag_changes(
    examples: Sequence[PairedExample], tags: Sequence[str]
) -> dict[str, dict[TagChange, int]]:
    """Return how often each of these errors went away, came up, or stayed."""
    counts = Counter(
        (tag, example.tag_change(tag))
        for example in examples
        for tag in {*example.before.error_tags, *example.after.error_tags}
    )
    return {tag: {change: counts[tag, change] for change in TAG_CHANGES} for tag in tags}


def gain(before: Prediction, after: Prediction, name: str, metric: Metric) -> float | None:
    """Return how much better the second answer is, None where one of them has no score."""
    old, new = before.scores.get(name), after.scores.get(name)
    if old is None or new is None:
        return None
    return old - new if metric.better == "lower" else new - old


def last_question(prompt: str) -> str:
    """Return the last turn of a stored prompt; a plain text as it is."""
    try:
        return str(json.loads(prompt)[-1]["content"])
    except (ValueError, KeyError, IndexError, TypeError):
        return prompt


def _pair(before: Prediction, after: Prediction, name: str, metric: Metric) -> PairedExample:
    gained = gain(before, after, name, metric)
    if gained is None:
        return PairedExample(before, after, None, "unscored")
    change: Change = "fixed" if gained > 0 else "introduced" if gained < 0 else "same"
    if change == "same" and metric.kind == "binary":
        change = "both_right" if after.scores[name] else "both_wrong"
    return PairedExample(before, after, gained, change)
