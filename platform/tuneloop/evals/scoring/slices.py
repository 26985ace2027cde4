"""Parts of the test: on which rows an arm is worse than on the others, and where it lost ground.

A slice is all rows with one value of a column, of a quarter of the lengths, of a source, a label, a
task or a cluster. What is read from many slices is corrected for how many they are, after Holm: his
correction holds however much slices overlap.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy import stats

from tuneloop.artifacts import Artifact
from tuneloop.evals.scoring.clusters import Clusters
from tuneloop.evals.scoring.estimates import adjust_p_values, describe_difference, describe_mean
from tuneloop.evals.scoring.intervals import Floats, Resampling
from tuneloop.evals.scoring.metrics import Metric, Scorer
from tuneloop.evals.scoring.pairing import last_question, pair_arms
from tuneloop.evals.scoring.predictions import Prediction, paired_values, values_of
from tuneloop.evals.scoring.row_clusters import BY_QUESTION
from tuneloop.words import split_words

SCHEMA_VERSION = 1
# Of fewer rows nothing can be told.
SMALLEST = 5
LENGTH, REFERENCE_LENGTH, LABEL, TASK, SOURCE = (
    "length",
    "reference_length",
    "label",
    "task",
    "source",
)
# What every dataset has beside the columns of the user.
_OF_DATASETS = frozenset(
    {"row_id", "source", "messages", "text", "input_ids", "loss_mask", "num_tokens"}
    | {"task", "tools", "accepted", "split_unit"}
)
_MOST_VALUES = 10
_LONGEST_VALUE = 80
_RANGE = re.compile(r"(?P<low>-?[\d.e+-]+) to (?P<below>below )?(?P<high>-?[\d.e+-]+)\Z")
_LINE_NUMBER = re.compile(r":\d+\Z")
# With fewer rows on a side a normal limit is not to be relied on.
_FEW_ROWS = 30


@dataclass(frozen=True)
class Slice:
    """Rows that have something in common.

    Args:
        by: What it is: a column, `length`, `source`, `label`, `task` or the clusters' name.
        value: Its value.
        example_ids: At least `SMALLEST`, and not all rows.
        is_cluster: Whether the rows are one cluster; they are its sample then.
        also: What else these rows, and no others, have in common, as column and value.
    """

    by: str
    value: str
    example_ids: frozenset[str]
    is_cluster: bool = False
    also: tuple[tuple[str, str], ...] = ()


def read_columns(dataset: Artifact, split: str) -> dict[str, dict[str, Any]]:
    """Return the sources and the user's own columns of a held-out split: by name, by row id."""
    columns: dict[str, dict[str, Any]] = defaultdict(dict)
    for file in sorted((dataset.path / split).glob("*.parquet")):
        schema = pq.read_schema(file)
        own = [
            name
            for name in schema.names
            if name not in _OF_DATASETS and not schema.field(name).type.num_fields
        ]
        sources = ["source"] if "source" in schema.names else []
        for row in pq.read_table(file, columns=["row_id", *sources, *own]).to_pylist():
            row_id = str(row["row_id"])
            if sources:
                columns[SOURCE][row_id] = _LINE_NUMBER.sub("", str(row["source"] or ""))
            for name in own:
                columns[name.removeprefix("original_")][row_id] = row[name]
    return dict(columns)


def weak_parts(slices: Mapping[str, Any], arm: str, better: str) -> list[dict[str, Any]]:
    """Return the parts on which an arm is shown to be worse than on the other rows, worst first.

    Shown is what holds at the evaluation's confidence after correction for all parts.

    Args:
        slices: Content of `slices.json`; empty in an evaluation of an earlier version.
        arm: Name of the arm.
        better: Which direction of the primary metric is better: `higher` or `lower`.
    """
    sign = -1 if better == "lower" else 1
    # Floating point: 1 - 0.95 is a little more than 0.05.
    level = round(1 - slices.get("confidence", 0.95), 9)
    return [
        part
        for part in slices.get("arms", {}).get(arm, [])
        if None not in (part["value"], part["rest"], part["p_adjusted"])
        and part["p_adjusted"] <= level
        and sign * part["value"] < sign * part["rest"]
    ]


def is_in(value: object, name: str) -> bool:
    """Return whether a row with this value of a column is in the slice of this name.

    The ends of a range are rounded to six digits, as its name is.
    """
    if value is None or _name(value) == name:
        return value is not None
    found = _RANGE.match(name)
    if found is None or isinstance(value, bool) or not isinstance(value, int | float):
        return False
    low, high = float(found["low"]), float(found["high"])
    return low <= value < high if found["below"] else low <= value <= high


def find_slices(
    predictions: Sequence[Prediction],
    columns: Mapping[str, Mapping[str, Any]],
    scorer: Scorer,
    cluster_by: str,
    references: Mapping[str, str] | None = None,
) -> list[Slice]:
    """Return the slices of the rows that were answered, without those that hold the same rows.

    Args:
        predictions: All answers of all arms.
        columns: What `read_columns` returns.
        scorer: Knows the labels.
        cluster_by: What the rows of a cluster have in common.
        references: Of each row its own, where several answers are right: predictions name the one
            that an answer is nearest to, and what was answered must not tell which rows are meant.
    """
    rows = {p.example_id: p for p in predictions}
    said = {key: p.reference for key, p in rows.items()} | dict(references or {})
    kinds: dict[str, Mapping[str, Any]] = {
        TASK: {key: p.task for key, p in rows.items()},
        LABEL: {
            key: part.label(said[key])
            for key, p in rows.items()
            if (part := scorer.of(p.task)).task.type == "classification"
        },
        **columns,
        LENGTH: {key: len(split_words(last_question(p.prompt))) for key, p in rows.items()},
        REFERENCE_LENGTH: {
            key: len(split_words(said[key]))
            for key, p in rows.items()
            if scorer.of(p.task).task.type == "generation"
        },
        cluster_by: {key: p.cluster for key, p in rows.items() if cluster_by != BY_QUESTION},
    }
    found: dict[frozenset[str], Slice] = {}
    for by, values in kinds.items():
        for value, ids in _parts({key: values[key] for key in rows if key in values}).items():
            if ids in found:
                also, is_cluster = (*found[ids].also, (by, value)), by == cluster_by
                is_cluster |= found[ids].is_cluster
                found[ids] = replace(found[ids], also=also, is_cluster=is_cluster)
            elif SMALLEST <= len(ids) < len(rows):
                found[ids] = Slice(by, value, ids, by == cluster_by)
    return list(found.values())


def _parts(values: Mapping[str, Any]) -> dict[str, frozenset[str]]:
    """Return the row ids of each value; of many numbers those of each quarter."""
    # What is not a number is not equal to itself.
    known = {k: v for k, v in values.items() if v is not None and v != "" and v == v}
    numbers = [v for v in known.values() if isinstance(v, int | float) and not isinstance(v, bool)]
    named: Callable[[Any], str] = _name
    if len(numbers) == len(known) and len(set(numbers)) > _MOST_VALUES:
        edges = sorted(set(np.quantile(numbers, (0, 0.25, 0.5, 0.75, 1), method="higher").tolist()))
        last = len(edges) - 2
        is_whole = all(isinstance(number, int) for number in numbers)

        def quarter(value: float) -> str:
            index = min(last, int(np.searchsorted(edges, value, side="right")) - 1)
            start, end = edges[index], edges[index + 1]
            if index == last:
                return f"{start:g} to {end:g}"
            return f"{start:g} to {end - 1:g}" if is_whole else f"{start:g} to below {end:g}"

        named = quarter
    ids = defaultdict(set)
    for key, value in known.items():
        ids[named(value)].add(key)
    return {value: frozenset(keys) for value, keys in ids.items() if len(value) <= _LONGEST_VALUE}


def _name(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def describe_slices(
    predictions: Sequence[Prediction],
    slices: Sequence[Slice],
    scorer: Scorer,
    confidence: float,
) -> dict[str, Any]:
    """Return the content of `slices.json`: every arm's score on each slice, worst first.

    Beside the score and its interval stand the score of the other rows and the p-value of "no
    difference between them", and for each pair of the last arm with another one the paired
    difference on the slice. Both have a p-value adjusted for all slices of the arm, or of the pair.
    Worst is what even at the end of its interval is lowest.

    Args:
        predictions: All answers of all arms.
        slices: What `find_slices` returns.
        scorer: Knows the primary metric.
        confidence: Level of the intervals.
    """
    name, metric = scorer.primary, scorer.metrics[scorer.primary]
    # No resampling: there are many slices, and most are small.
    settings = Resampling(confidence, 0)
    arms = list(dict.fromkeys(p.arm for p in predictions))
    by_arm = {}
    for arm in arms:
        rows = [p for p in predictions if p.arm == arm and p.scores.get(name) is not None]
        values = values_of(rows, name)
        scored = _Scored.of(rows)
        missing = {p.example_id for p in predictions if p.arm == arm and p.status != "scored"}
        parts = [
            _describe(part, values, scored, metric, settings)
            | ({"num_unscored": count} if (count := len(part.example_ids & missing)) else {})
            for part in slices
        ]
        by_arm[arm] = _worst_first(parts, metric)
    pairs = []
    for other in reversed(arms[:-1]):
        examples = [
            e for e in pair_arms(predictions, other, arms[-1], name, metric) if e.gain is not None
        ]
        ours, theirs = paired_values(
            [e.after for e in examples], [e.before for e in examples], name
        )
        scored = _Scored.of([e.after for e in examples])
        changes = []
        for part in slices:
            inside = scored.inside(part)
            clusters = scored.clusters(part, inside)
            difference = describe_difference(
                ours[..., inside], theirs[..., inside], clusters, metric, settings
            )
            kept = ("value", "low", "high", "n", "num_clusters", "p_value", "method", "test")
            changes.append(_named(part, {key: difference[key] for key in kept}))
        pairs.append({"arm": arms[-1], "other": other, "slices": _worst_first(changes, metric)})
    return {
        "schema_version": SCHEMA_VERSION,
        "primary": name,
        "confidence": confidence,
        "smallest": SMALLEST,
        "num_slices": len(slices),
        "by": dict(Counter(part.by for part in slices)),
        "arms": by_arm,
        "pairs": pairs,
    }


class _Scored(NamedTuple):
    """Rows with a score: the place of each by its id, and their clusters as numbers, shape (n,)."""

    places: dict[str, int]
    numbers: NDArray[np.intp]

    @classmethod
    def of(cls, rows: Sequence[Prediction]) -> _Scored:
        names = [p.cluster or p.example_id for p in rows]
        return cls({p.example_id: i for i, p in enumerate(rows)}, Clusters.of(names).index)

    def inside(self, part: Slice) -> NDArray[np.bool_]:
        """Return whether each row is in a slice, shape (n,)."""
        inside = np.zeros(len(self.numbers), bool)
        inside[[self.places[key] for key in part.example_ids if key in self.places]] = True
        return inside

    def clusters(self, part: Slice, chosen: NDArray[np.bool_] | None = None) -> Clusters:
        """Return the clusters of the chosen rows; within one cluster each row is its own."""
        index = np.arange(len(self.numbers)) if part.is_cluster else self.numbers
        return Clusters.of(index if chosen is None else index[chosen])


def _describe(
    part: Slice, values: Floats, scored: _Scored, metric: Metric, settings: Resampling
) -> dict[str, Any]:
    inside = scored.inside(part)
    mean = describe_mean(values[..., inside], scored.clusters(part, inside), metric, settings)
    rest = float(values[..., ~inside].mean()) if (~inside).any() else None
    # Of several trainings: these on the part against these on the other rows.
    values = np.atleast_2d(values).mean(axis=0)
    is_binary = metric.kind == "binary"
    p_value = differs_from_rest(values, inside, scored.clusters(part), is_binary)
    kept = ("value", "low", "high", "n", "num_clusters", "method")
    return _named(part, {key: mean[key] for key in kept} | {"rest": rest, "p_value": p_value})


def _named(part: Slice, estimate: dict[str, Any]) -> dict[str, Any]:
    named: dict[str, Any] = {"by": part.by, "slice": part.value}
    if part.also:
        named["also"] = [{"by": by, "slice": value} for by, value in part.also]
    named |= estimate
    return named | ({"num_clusters": 1} if part.is_cluster else {})


def _worst_first(parts: list[dict[str, Any]], metric: Metric) -> list[dict[str, Any]]:
    adjust_p_values(parts)
    far, sign = ("low", -1) if metric.better == "lower" else ("high", 1)

    def order(part: dict[str, Any]) -> tuple[bool, float, float]:
        value = sign * (part["value"] or 0.0)
        end = part[far]
        return end is None, value if end is None else sign * end, value

    return sorted(parts, key=order)


def differs_from_rest(
    values: Floats, inside: NDArray[np.bool_], clusters: Clusters, is_binary: bool
) -> float | None:
    """Return the two-sided p-value that rows of a slice score like the others.

    For 0/1 scores of rows that are clusters of their own it is Fisher's exact test (mid-p).
    Otherwise it is the larger p-value of two: a score test with the clusters' totals and t, which
    fails for a few rows with rare errors (16% false positives at 5%), and Fisher's test, which
    knows no clusters. For scores other than 0/1 the latter takes part only where a side has fewer
    than 30 rows, and looks at which are below the mean.

    Args:
        values: Shape (n,).
        inside: Shape (n,), whether a row is in the slice.
        clusters: Of all rows.
        is_binary: Scores are 0 or 1.
    """
    n, size = len(values), int(inside.sum())
    if not 0 < size < n or np.ptp(values) == 0:
        return None if not 0 < size < n else 1.0
    if is_binary and clusters.singletons:
        return _fisher_mid_p(values >= 1, inside)
    moved = (inside - size / n) * (values - values.mean())
    totals = clusters.totals(moved)
    count = len(totals)
    spread = float((totals**2).sum()) * count / max(1, count - 1)
    p_value = 1.0
    if count > 1 and spread > 0:
        p_value = float(2 * stats.t.sf(abs(totals.sum()) / np.sqrt(spread), count - 1))
    if is_binary or min(size, n - size) < _FEW_ROWS:
        p_value = max(p_value, _fisher_mid_p(values >= (1 if is_binary else values.mean()), inside))
    return min(1.0, p_value)


def _fisher_mid_p(right: NDArray[np.bool_], inside: NDArray[np.bool_]) -> float:
    """Return Fisher's two-sided p-value; what is as likely as the observed counts half."""
    n, size, total = len(right), int(inside.sum()), int(right.sum())
    counts = np.arange(max(0, size + total - n), min(size, total) + 1)
    chances = stats.hypergeom.pmf(counts, n, total, size)
    observed = chances[int((right & inside).sum()) - counts[0]]
    is_tied = np.isclose(chances, observed, rtol=1e-9, atol=0)
    rarer = chances[(chances < observed) & ~is_tied].sum()
    return float(rarer + chances[is_tied].sum() / 2)
