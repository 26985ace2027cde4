"""Two arms example by example: what was fixed, what was introduced, and how to look through it."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow.compute as pc

from tuneloop.evals.reporting.formatting import Piece, format_value, word_diff
from tuneloop.evals.scoring.error_tags import ERROR_TAGS
from tuneloop.evals.scoring.function_calls import without_accepted
from tuneloop.evals.scoring.metrics import without_thought
from tuneloop.evals.scoring.pairing import (
    TAG_CHANGES,
    Change,
    PairedExample,
    Pairs,
    TagChange,
    gain,
)
from tuneloop.evals.scoring.predictions import Prediction
from tuneloop.evals.scoring.results import Evaluation
from tuneloop.records import Message
from tuneloop.text import ALIKE_IN_SEARCHES

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

    def choose(self, examples: Pairs) -> Pairs:
        """Return the examples that are to be shown."""
        chosen = np.ones(len(examples), bool)
        if self.change is not None:
            chosen &= examples.change == self.change
        if self.tag or self.tag_change:
            found = np.zeros(len(examples), bool)
            for tag in [self.tag] if self.tag else examples.tags:
                became = examples.tag_changes(tag)
                for change in [self.tag_change] if self.tag_change else TAG_CHANGES:
                    found |= became[change]
            chosen &= found
        for word in self.text.split():
            said, asked = examples.text, pc.utf8_lower(word)
            for letter, plain in ALIKE_IN_SEARCHES:
                if plain in word.casefold():
                    said, asked = (pc.replace_substring(t, letter, plain) for t in (said, asked))
            chosen &= pc.match_substring(said, asked.as_py()).to_numpy()
        return examples.where(chosen)


def count_tags(examples: Pairs) -> list[TagCount]:
    """Return the errors that either arm makes, most frequent first."""
    answered = examples.where(examples.is_answered)
    counts = []
    for tag in [*ERROR_TAGS, *(tag for tag in answered.tags if tag not in ERROR_TAGS)]:
        changes = answered.tag_changes(tag)
        counts.append(TagCount(tag, **{k: int(of.sum()) for k, of in changes.items()}))
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


def examples_to_judge(evaluation: Evaluation, arms: Collection[str]) -> Pairs:
    """Return the examples worth a human's look, in an order that is the same for everybody.

    That is: answered in both arms, and differently. The same order lets two reviewers who each
    judge only some examples judge the same ones.
    """
    examples = evaluation.pair(*sorted(arms))
    examples = examples.where(examples.is_answered)
    sides = [texts.to_pylist() for texts in examples.sides("completion")]
    said = [[without_thought(text) for text in texts] for texts in sides]
    differ = [old != new and not same_text(old, new) for old, new in zip(*said, strict=True)]
    different = examples.where(np.array(differ, bool))
    # Row ids are hashes: a random order, in which nothing tells the size of the change.
    return different.where(pc.sort_indices(different.sides("example_id")[1]).to_numpy())


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
        sides = (example.before, example.after)
        old, new = (len(without_thought(side.completion)) for side in sides)
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
    columns = {name: evaluation.column(name) for name in names}
    of_rows = [name for name, scores in columns.items() if scores.null_count < len(scores)]
    return sorted(of_rows, key=lambda name: name != evaluation.row_metric)


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
    # Macro-F1 is of all rows together.
    words += f" Parts are scored by {slices['metric']}." if slices["metric"] else ""
    return f"{words} Worst first; p after Holm for all {len(slices['rows'])} parts."


def tag_label(tag: str) -> str:
    """Return a tag as words."""
    return tag.replace("_", " ")


def _marked(expected: str, text: str) -> list[Piece] | None:
    """Return the differences; None where the texts share too little for them to be readable."""
    pieces = word_diff(expected, text)
    num_same = sum(len(part) for kind, part in pieces if kind == "same")
    return pieces if num_same >= _READABLE_RATIO * max(len(expected), len(text)) else None
