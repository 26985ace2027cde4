"""Two arms over the same examples: what became of each example, and which to show first.

The comparison, the report and the dashboard all read the pairs made here.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, cast, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tuneloop.evals.scoring.metrics import Metric
from tuneloop.evals.scoring.predictions import Prediction, column_of, has_tag, rows_at

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


class Between(NamedTuple):
    """Two arms, by name, and the only one of a mixture's tasks to look at; empty for all."""

    before: str
    after: str
    task: str = ""


@dataclass(frozen=True)
class Pairs(Sequence[PairedExample]):
    """The examples that two arms were asked, in columns; each is made when it is looked at.

    The largest change comes first, and the unscored last. Equal changes are ordered by row id. Row
    ids are hashes, so that is a random order which is the same every time.

    Args:
        predictions: All arms' answers.
        before: The numbers of one arm's rows among them, shape (n,).
        after: Those of the other's, shape (n,).
        gain: As in `PairedExample`, shape (n,); NaN for none.
        change: Likewise, shape (n,).
    """

    predictions: Sequence[Prediction]
    before: NDArray[np.intp]
    after: NDArray[np.intp]
    gain: NDArray[np.float64]
    change: NDArray[np.str_]

    @classmethod
    def of(
        cls, predictions: Sequence[Prediction], between: Between, name: str, metric: Metric
    ) -> Pairs:
        """Return the examples of two arms.

        Args:
            predictions: All arms' answers.
            between: The arms.
            name: The metric that decides what became of an example.
            metric: What it means.
        """
        ids, scores, arms = (column_of(predictions, n) for n in ("example_id", name, "arm"))
        first, second = (pc.equal(arms, arm).to_numpy() for arm in between[:2])
        if between.task:
            is_asked = pc.equal(column_of(predictions, "task"), between.task).to_numpy()
            first, second = first & is_asked, second & is_asked
        old, new = np.flatnonzero(first), np.flatnonzero(second)
        at = pc.index_in(ids.take(pa.array(new)), value_set=ids.take(pa.array(old)))
        is_shared = pc.is_valid(at).to_numpy()
        old, new = old[at.drop_null().to_numpy()], new[is_shared]
        was, now = (scores.take(pa.array(rows)).to_numpy() for rows in (old, new))
        gain = was - now if metric.better == "lower" else now - was
        change = np.select(
            [np.isnan(gain), gain > 0, gain < 0], ["unscored", "fixed", "introduced"], "same"
        )
        if metric.kind == "binary":
            change[change == "same"] = np.where(now, "both_right", "both_wrong")[change == "same"]
        keys = {"none": np.isnan(gain), "size": -np.abs(np.nan_to_num(gain))}
        table = pa.table({**keys, "id": ids.take(pa.array(new))})
        order = pc.sort_indices(table, [(key, "ascending") for key in table.column_names])
        return cls(predictions, old, new, gain, change).where(order.to_numpy())

    def where(self, chosen: NDArray[Any]) -> Pairs:
        """Return the chosen examples, shape (n,) of truths, or these numbers in their order."""
        rows = (self.before[chosen], self.after[chosen])
        return Pairs(self.predictions, *rows, self.gain[chosen], self.change[chosen])

    def sides(self, name: str) -> list[pa.ChunkedArray]:
        """Return what both arms have in a column, see `column_of`."""
        column = column_of(self.predictions, name)
        return [column.take(pa.array(rows)) for rows in (self.before, self.after)]

    @property
    def is_answered(self) -> NDArray[np.bool_]:
        """Whether both arms gave an answer, shape (n,)."""
        first, second = (pc.equal(said, "scored").to_numpy() for said in self.sides("status"))
        found: NDArray[np.bool_] = first & second
        return found

    def tag_changes(self, tag: str) -> dict[TagChange, NDArray[np.bool_]]:
        """Return what became of an error: which examples each is true of, shape (n,)."""
        was, now = (has_tag(tags, tag) for tags in self._tags)
        return {"fixed": was & ~now, "introduced": now & ~was, "both": was & now}

    @cached_property
    def _tags(self) -> list[pa.ChunkedArray]:
        return self.sides("error_tags")

    @property
    def tags(self) -> list[str]:
        """The errors that answers have."""
        flat = [pc.unique(tags.combine_chunks().flatten()) for tags in self._tags]
        return list(dict.fromkeys(tag for some in flat for tag in some.to_pylist()))

    @cached_property
    def text(self) -> pa.ChunkedArray:
        """All that the examples say and are called, in lower case."""
        questions = [last_question(prompt) for prompt in self.sides("prompt")[1].to_pylist()]
        parts = [self.sides(name)[1] for name in ("example_id", "reference")]
        texts = [pa.chunked_array([pa.array(questions, pa.string())]), *self.sides("completion")]
        joined = pc.binary_join_element_wise(
            *parts, *texts, "\n", null_handling="replace", null_replacement=""
        )
        return pc.utf8_lower(joined)

    def __len__(self) -> int:
        return len(self.after)

    @overload
    def __getitem__(self, index: int) -> PairedExample: ...
    @overload
    def __getitem__(self, index: slice) -> list[PairedExample]: ...
    def __getitem__(self, index: int | slice) -> PairedExample | list[PairedExample]:
        if isinstance(index, int):
            return self[slice(index, index + 1 or None)][0]
        sides = [rows_at(self.predictions, rows[index]) for rows in (self.before, self.after)]
        gains = [None if np.isnan(gain) else gain for gain in self.gain[index].tolist()]
        return [
            PairedExample(before, after, gain, cast(Change, change))
            for before, after, gain, change in zip(
                *sides, gains, self.change[index].tolist(), strict=True
            )
        ]

    def __iter__(self) -> Iterator[PairedExample]:
        return iter(self[:])


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
