"""Two arms example by example: what was fixed, what was introduced, and how to look through it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeVar

from tuneloop.evals.reporting.findings import Evaluation, format_value, last_question, word_diff
from tuneloop.evals.scoring.comparison import Prediction
from tuneloop.evals.scoring.error_tags import ERROR_TAGS

Outcome = Literal["fixed", "introduced", "both_right", "both_wrong", "same", "unscored"]
TagChange = Literal["fixed", "introduced", "both"]
Against = Literal["reference", "other"]
Pieces = list[tuple[str, str]]
T = TypeVar("T")

# With less in common, a text with both sides' words mixed into one another cannot be read.
_READABLE_RATIO = 0.3

OUTCOMES: dict[Outcome, str] = {
    "fixed": "Fixed",
    "introduced": "Introduced",
    "both_wrong": "Wrong in both",
    "both_right": "Right in both",
    "same": "Same score",
    "unscored": "Not scored",
}
TAG_CHANGES: dict[TagChange, str] = {
    "fixed": "fixed",
    "introduced": "introduced",
    "both": "in both",
}


@dataclass(frozen=True)
class PairedExample:
    """One question with the answers of two arms.

    Args:
        gain: How much better `after` is in the chosen metric; None when one is not scored.
    """

    example_id: str
    reference: str
    before: Prediction
    after: Prediction
    outcome: Outcome
    gain: float | None

    @cached_property
    def question(self) -> str:
        return last_question(self.after.prompt)

    def tag_change(self, tag: str) -> TagChange | None:
        """Return what became of an error from `before` to `after`; None where neither has it."""
        was, now = tag in self.before.error_tags, tag in self.after.error_tags
        if was and now:
            return "both"
        return "fixed" if was else "introduced" if now else None


@dataclass(frozen=True)
class TagCount:
    """How often an error occurs, over the examples that both arms answered."""

    tag: str
    meaning: str
    before: int
    after: int
    fixed: int
    introduced: int
    both: int


@dataclass(frozen=True)
class Filter:
    """Which examples to show; an empty field lets everything through.

    Args:
        tag: An error that either answer has.
        tag_change: What became of it.
        text: Words that must all occur in question, reference or answers, in any case.
    """

    outcome: Outcome | None = None
    tag: str | None = None
    tag_change: TagChange | None = None
    text: str = ""

    def admits(self, example: PairedExample) -> bool:
        """Return whether an example is to be shown."""
        if self.outcome is not None and example.outcome != self.outcome:
            return False
        changes = {tag: example.tag_change(tag) for tag in ([self.tag] if self.tag else ERROR_TAGS)}
        found = {change for change in changes.values() if change is not None}
        if (self.tag and not found) or (self.tag_change and self.tag_change not in found):
            return False
        if not self.text.strip():
            return True
        haystack = "\n".join(
            (
                example.example_id,
                example.question,
                example.reference,
                example.before.completion,
                example.after.completion,
            )
        ).casefold()
        return all(word in haystack for word in self.text.casefold().split())


def pair_examples(
    evaluation: Evaluation, before: str, after: str, metric: str, task: str | None = None
) -> list[PairedExample]:
    """Return every example of two arms, largest change first; unscored ones come last.

    Among equal changes the order is that of a hash, the same every time.

    Args:
        task: The only one of a mixture's tasks to look at.
    """
    rows = {
        arm: {p.example_id: p for p in evaluation.predictions if p.arm == arm}
        for arm in (before, after)
    }
    meaning = evaluation.metric(metric)
    examples = []
    for example_id, new in rows[after].items():
        old = rows[before].get(example_id)
        if old is None:
            continue
        then, now = old.scores.get(metric), new.scores.get(metric)
        # In a mixture a metric may be that of one task alone.
        wanted = task or (new.task and metric.rpartition("/")[0])
        if wanted and new.task != wanted:
            continue
        gain: float | None = None
        outcome: Outcome = "unscored"
        if then is not None and now is not None:
            gain = _gain(then, now, meaning.better)
            outcome = _outcome(gain, now, meaning.kind == "binary")
        examples.append(PairedExample(example_id, new.reference, old, new, outcome, gain))
    return sorted(
        examples,
        key=lambda e: (e.gain is None, -abs(e.gain or 0.0), _shuffled(e.example_id), e.example_id),
    )


def count_outcomes(examples: Sequence[PairedExample]) -> dict[Outcome, int]:
    """Return how many examples have each outcome, those that occur only."""
    counts = {outcome: sum(e.outcome == outcome for e in examples) for outcome in OUTCOMES}
    return {outcome: count for outcome, count in counts.items() if count}


def count_tags(examples: Sequence[PairedExample]) -> list[TagCount]:
    """Return the errors that either arm makes, most frequent first."""
    scored = [e for e in examples if e.before.status == e.after.status == "scored"]
    counts = []
    for tag, meaning in ERROR_TAGS.items():
        changes = [example.tag_change(tag) for example in scored]
        fixed, introduced, both = (changes.count(change) for change in TAG_CHANGES)
        if fixed + introduced + both:
            counts.append(
                TagCount(tag, meaning, fixed + both, introduced + both, fixed, introduced, both)
            )
    return sorted(counts, key=lambda count: -(count.fixed + count.introduced + count.both))


def differences(example: PairedExample, against: Against) -> tuple[Pieces, Pieces]:
    """Return both answers as pieces: `same`, `extra` and `missing` words.

    Args:
        against: `reference` marks what each answer has that the reference has not, and the other
            way round; `other` marks in each answer the words that the other one lacks.
    """
    old, new = example.before.completion, example.after.completion
    if against == "reference":
        return (
            _marked(example.reference, old) or [("extra", old)],
            _marked(example.reference, new) or [("extra", new)],
        )
    changed = _marked(old, new)
    if changed is None:
        return [("extra", old)], [("extra", new)]
    first = [("extra" if kind == "missing" else kind, text) for kind, text in changed]
    return (
        [piece for piece, (kind, _) in zip(first, changed, strict=True) if kind != "extra"],
        [piece for piece in changed if piece[0] != "missing"],
    )


def describe_score(evaluation: Evaluation, prediction: Prediction, metric: str) -> str:
    """Return one answer's score in words."""
    if prediction.status != "scored":
        return "not scored"
    value, meaning = prediction.scores.get(metric), evaluation.metric(metric)
    if value is not None and meaning.kind == "binary":
        return "right" if value else "wrong"
    return format_value(value, meaning)


def paginate(items: Sequence[T], page: int, page_size: int) -> tuple[list[T], int]:
    """Return the items of a page, counted from 1, and the number of pages, at least 1.

    A page beyond the last one shows the last one.
    """
    num_pages = max(1, math.ceil(len(items) / page_size))
    start = (min(max(page, 1), num_pages) - 1) * page_size
    return list(items[start : start + page_size]), num_pages


def examples_to_judge(evaluation: Evaluation, arms: tuple[str, str]) -> list[PairedExample]:
    """Return the examples worth a human's look, in an order that is the same for everybody.

    That is: answered in both arms, and differently. The same order lets two reviewers who each
    judge only some examples judge the same ones.
    """
    first, second = sorted(arms)
    examples = pair_examples(evaluation, first, second, evaluation.primary)
    different = [
        example
        for example in examples
        if example.before.status == example.after.status == "scored"
        and not same_text(example.before.completion, example.after.completion)
    ]
    return sorted(different, key=lambda example: _shuffled(example.example_id))


def same_text(first: str, second: str) -> bool:
    """Return whether two answers are equal but for white space."""
    return first.split() == second.split()


def metric_preferences(
    evaluation: Evaluation, examples: Sequence[PairedExample], metric: str
) -> Mapping[str, str | None]:
    """Return by example the arm that scores better in a metric, None where they are equal."""
    better = evaluation.metric(metric).better
    preferred: dict[str, str | None] = {}
    for example in examples:
        then, now = example.before.scores.get(metric), example.after.scores.get(metric)
        if then is None or now is None:
            continue
        gain = _gain(then, now, better)
        preferred[example.example_id] = (
            None if gain == 0 else (example.after if gain > 0 else example.before).arm
        )
    return preferred


def length_preferences(examples: Sequence[PairedExample]) -> Mapping[str, str | None]:
    """Return by example the arm with the longer answer, None where they are equally long."""
    preferred: dict[str, str | None] = {}
    for example in examples:
        old, new = len(example.before.completion), len(example.after.completion)
        longer = example.after if new > old else example.before
        preferred[example.example_id] = None if new == old else longer.arm
    return preferred


def judged_metrics(evaluation: Evaluation, task: str | None = None) -> list[str]:
    """Return the metrics that can prefer an answer, the primary one first.

    Args:
        task: Of a mixture; the metrics of its other tasks are left out.
    """
    names = [
        name
        for name in evaluation.metrics["metrics"]
        if evaluation.metric(name).better != "neither"
        and (task is None or name.rpartition("/")[0] in ("", task))
    ]
    has_rows = {name for p in evaluation.predictions for name in p.scores}
    return sorted((n for n in names if n in has_rows), key=lambda n: n != evaluation.primary)


def prompt_turns(prompt: str) -> list[tuple[str, str]]:
    """Return a stored prompt as (role, text); plain text has the role `text`."""
    try:
        return [(str(turn["role"]), str(turn["content"])) for turn in json.loads(prompt)]
    except (ValueError, TypeError, KeyError):
        return [("text", prompt)]


def tag_rows(counts: Sequence[TagCount], before: str, after: str) -> list[dict[str, str | int]]:
    """Return the tag counts as a table whose columns carry the arms' names."""
    rows: list[dict[str, str | int]] = []
    for count in counts:
        values = dataclasses.asdict(count)
        rows.append(
            {
                "error": tag_label(count.tag),
                before: values["before"],
                after: values["after"],
                "fixed": values["fixed"],
                "introduced": values["introduced"],
                "in both": values["both"],
                "meaning": values["meaning"],
            }
        )
    return rows


def tag_label(tag: str) -> str:
    """Return a tag as words."""
    return tag.replace("_", " ")


def _marked(expected: str, text: str) -> Pieces | None:
    """Return the differences; None where the texts share too little for them to be readable."""
    pieces = word_diff(expected, text)
    num_same = sum(len(part) for kind, part in pieces if kind == "same")
    return pieces if num_same >= _READABLE_RATIO * max(len(expected), len(text)) else None


def _gain(then: float, now: float, better: str) -> float:
    return then - now if better == "lower" else now - then


def _outcome(gain: float, now: float, binary: bool) -> Outcome:
    if gain:
        return "fixed" if gain > 0 else "introduced"
    if not binary:
        return "same"
    return "both_right" if now else "both_wrong"


def _shuffled(example_id: str) -> str:
    return hashlib.sha256(example_id.encode()).hexdigest()
