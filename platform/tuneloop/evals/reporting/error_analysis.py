"""Two arms example by example: what was fixed, what was introduced, and how to look through it."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from tuneloop.evals.reporting.formatting import Piece, format_value, word_diff
from tuneloop.evals.scoring.error_tags import tags_of
from tuneloop.evals.scoring.function_calls import without_accepted
from tuneloop.evals.scoring.pairing import Change, PairedExample, TagChange, count_tag_changes, gain
from tuneloop.evals.scoring.predictions import Prediction
from tuneloop.evals.scoring.results import Evaluation
from tuneloop.records import Message

Against = Literal["reference", "other"]
T = TypeVar("T")

# With less in common, a text with both sides' words mixed into one another cannot be read.
_READABLE_RATIO = 0.3

CHANGE_LABELS: dict[Change, str] = {
    "fixed": "Fixed",
    "introduced": "Introduced",
    "both_wrong": "Wrong in both",
    "both_right": "Right in both",
    "same": "Same score",
    "unscored": "Not scored",
}
TAG_CHANGE_LABELS: dict[TagChange, str] = {
    "fixed": "fixed",
    "introduced": "introduced",
    "both": "in both",
}


@dataclass(frozen=True)
class TagCount:
    """How often an error occurs, over the examples that both arms answered."""

    tag: str
    fixed: int
    introduced: int
    both: int

    @property
    def total(self) -> int:
        return self.fixed + self.introduced + self.both


@dataclass(frozen=True)
class Filter:
    """Which examples to show; an empty field lets everything through.

    Args:
        tag: An error that either answer has.
        tag_change: What became of it.
        text: Words that must all occur in question, reference or answers, in any case.
    """

    change: Change | None = None
    tag: str | None = None
    tag_change: TagChange | None = None
    text: str = ""

    def admits(self, example: PairedExample) -> bool:
        """Return whether an example is to be shown."""
        if self.change is not None and example.change != self.change:
            return False
        if self.tag or self.tag_change:
            tags = {*example.before.error_tags, *example.after.error_tags}
            tag_changes = {example.tag_change(tag) for tag in ([self.tag] if self.tag else tags)}
            if (self.tag and tag_changes == {None}) or (
                self.tag_change and self.tag_change not in tag_changes
            ):
                return False
        if not self.text.strip():
            return True
        texts = (
            *(example.example_id, example.reference, example.question),
            *(example.before.completion, example.after.completion),
        )
        haystack = "\n".join(texts).casefold()
        return all(word in haystack for word in self.text.casefold().split())


def count_tags(examples: Sequence[PairedExample]) -> list[TagCount]:
    """Return the errors that either arm makes, most frequent first."""
    answered = [example for example in examples if example.is_answered]
    tags = tags_of([p for e in answered for p in (e.before, e.after)])
    changes = count_tag_changes(answered, tags)
    counts = [TagCount(tag, **changes[tag]) for tag in tags]
    return sorted((count for count in counts if count.total), key=lambda count: -count.total)


def mark_differences(example: PairedExample, against: Against) -> tuple[list[Piece], list[Piece]]:
    """Return both answers as pieces: `same`, `extra` and `missing` words.

    Args:
        against: `reference` marks what each answer has that the reference has not, and the other
            way round; `other` marks in each answer the words that the other one lacks.
    """
    old, new = example.before.completion, example.after.completion
    if against == "reference":
        said = without_accepted(example.reference)
        return (
            _marked(said, old) or [("extra", old)],
            _marked(said, new) or [("extra", new)],
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


def examples_to_judge(evaluation: Evaluation, arms: Collection[str]) -> list[PairedExample]:
    """Return the examples worth a human's look, in an order that is the same for everybody.

    That is: answered in both arms, and differently. The same order lets two reviewers who each
    judge only some examples judge the same ones.
    """
    first, second = sorted(arms)
    different = [
        example
        for example in evaluation.pair(first, second)
        if example.is_answered
        and not same_text(example.before.completion, example.after.completion)
    ]
    # Row ids are hashes: a random order, in which nothing tells the size of the change.
    return sorted(different, key=lambda example: example.example_id)


def same_text(first: str, second: str) -> bool:
    """Return whether two answers are equal but for white space."""
    return first.split() == second.split()


def metric_preferences(
    evaluation: Evaluation, examples: Sequence[PairedExample], metric: str
) -> Mapping[str, str | None]:
    """Return by example the arm that scores better in a metric, None where they are equal."""
    meaning = evaluation.metric(metric)
    preferred: dict[str, str | None] = {}
    for example in examples:
        gained = gain(example.before, example.after, metric, meaning)
        if gained is not None:
            better = example.after if gained > 0 else example.before
            preferred[example.example_id] = better.arm if gained else None
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
        task: A task of a mixture; the metrics of the other tasks are left out.
    """
    names = [
        name
        for name in evaluation.metrics["metrics"]
        if evaluation.metric(name).better != "neither"
        and (task is None or name.rpartition("/")[0] in ("", task))
    ]
    has_rows = {name for p in evaluation.predictions for name in p.scores}
    return sorted((n for n in names if n in has_rows), key=lambda n: n != evaluation.row_metric)


def prompt_turns(prompt: str) -> list[tuple[str, str]]:
    """Return a stored prompt as (role, text); plain text has the role `text`."""
    try:
        return [(turn["role"], Message.of(turn).text) for turn in json.loads(prompt)]
    except (ValueError, TypeError, KeyError):
        return [("text", prompt)]


def tag_rows(
    counts: Sequence[TagCount], before: str, after: str, meanings: Mapping[str, str]
) -> list[dict[str, str | int]]:
    """Return the tag counts as a table whose columns carry the arms' names."""
    return [
        {
            "error": tag_label(count.tag),
            before: count.fixed + count.both,
            after: count.introduced + count.both,
            "fixed": count.fixed,
            "introduced": count.introduced,
            "in both": count.both,
            "meaning": meanings.get(count.tag, ""),
        }
        for count in counts
    ]


def slice_rows(slices: dict[str, Any]) -> list[dict[str, str]]:
    """Return what `views.show_slices` gives as a table, with the arms' names in its columns."""
    rows = []
    for part in slices["rows"]:
        # One cluster has no interval.
        ends = f" ({part['interval']})" if part["interval"] else ""
        row = {
            "rows": part["name"],
            "": part["rows"],
            slices["arm"]: part["score"] + ends,
            "other rows": part["rest"],
            "p": part["p"],
        }
        if slices["other"]:
            ends = f" ({part['change_interval']})" if part["change_interval"] else ""
            row |= {
                f"against {slices['other']}": part["change"] + ends,
                "p of it": part["change_p"],
            }
        rows.append(row)
    return rows


def describe_slices(slices: dict[str, Any]) -> str:
    """Return in a sentence or two which parts of the rows stand out."""
    worse = "; ".join(slices["worse"])
    words = (
        f"Clearly worse than the other rows: {worse}."
        if worse
        else ("No part of the rows is clearly worse than the others.")
    )
    if slices["lost"]:
        words += f" Clearly worse than {slices['other']}: {'; '.join(slices['lost'])}."
    return f"{words} Worst first; p after Holm for all {len(slices['rows'])} parts."


def tag_label(tag: str) -> str:
    """Return a tag as words."""
    return tag.replace("_", " ")


def _marked(expected: str, text: str) -> list[Piece] | None:
    """Return the differences; None where the texts share too little for them to be readable."""
    pieces = word_diff(expected, text)
    num_same = sum(len(part) for kind, part in pieces if kind == "same")
    return pieces if num_same >= _READABLE_RATIO * max(len(expected), len(text)) else None
