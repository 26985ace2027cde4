"""One answer to one question, as `predictions.parquet` keeps it."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tuneloop.records import FinishReason, Status

FILE = "predictions.parquet"
_BATCH_ROWS = 8192
# Groups are read by several threads at once, and none that holds other arms alone.
_ROW_GROUP = 20_000
_SHARED = ("example_id", "arm", "prompt", "reference", "status", "error", "cluster", "task")
_EVIDENCE = pa.struct(
    [("tag", pa.string()), ("detail", pa.string()), ("start", pa.int32()), ("end", pa.int32())]
)
_SAMPLE = [
    ("completion", pa.string()),
    ("finish_reason", pa.string()),
    ("prompt_tokens", pa.int32()),
    ("completion_tokens", pa.int32()),
    ("latency_s", pa.float64()),
    ("error", pa.string()),
    ("score", pa.float64()),
    ("model", pa.string()),
    ("probability", pa.float64()),
]
_COLUMNS = [
    ("example_id", pa.string()),
    ("arm", pa.string()),
    ("prompt", pa.string()),
    ("reference", pa.string()),
    ("completion", pa.string()),
    ("finish_reason", pa.string()),
    ("prompt_tokens", pa.int32()),
    ("completion_tokens", pa.int32()),
    ("latency_s", pa.float64()),
    ("status", pa.string()),
    ("error", pa.string()),
    ("error_tags", pa.list_(pa.string())),
    ("error_evidence", pa.list_(_EVIDENCE)),
    ("cluster", pa.string()),
    ("contaminated", pa.bool_()),
    ("probability", pa.float64()),
]


@dataclass(frozen=True)
class Prediction:
    """One example answered by one arm: a row of `predictions.parquet`.

    Args:
        prompt: The messages that were sent, as JSON; the text itself for language modelling.
        finish_reason: None when unscored.
        latency_s: From sending to the full answer, with the other requests in flight.
        error: Why the row is unscored, empty otherwise.
        scores: Metric by name; empty when unscored.
        error_evidence: For each tag its `tag`, `detail`, and the `start` and `end` of the part of
            the completion that shows it, in characters; None where no part does.
        task: The row's task in a mixture; empty otherwise.
        cluster: Rows of one cluster are right and wrong together. Empty where the row is one of
            its own.
        contaminated: Whether the row is among those that the arm was trained on; None where that
            is not known.
        probability: Of the label among all labels, where they were ranked; None otherwise.
        samples: Where several answers were sampled, or several models answered, all of them: what
            the columns of that name say of the first one, all its `scores`, the `score` in the
            metric that decides, and the `model` where there are several. `scores` of the row are
            then their means, and a row is scored where every answer came.
    """

    example_id: str
    arm: str
    prompt: str
    reference: str
    completion: str
    finish_reason: FinishReason | None
    prompt_tokens: int | None
    completion_tokens: int | None
    latency_s: float | None
    status: Status
    error: str = ""
    error_tags: list[str] = field(default_factory=list)
    scores: dict[str, float | None] = field(default_factory=dict)
    error_evidence: list[dict[str, Any]] = field(default_factory=list)
    task: str = ""
    cluster: str = ""
    contaminated: bool | None = None
    probability: float | None = None
    samples: list[dict[str, Any]] = field(default_factory=list)

    @property
    def completions(self) -> list[str]:
        """Every answer to the question."""
        return [sample["completion"] for sample in self.samples] or [self.completion]

    @property
    def models(self) -> list[str]:
        """The models that answered, where the arm is several trainings; else empty."""
        # The samples of an earlier version do not say.
        return list(dict.fromkeys(s["model"] for s in self.samples if s.get("model")))

    def of(self, model: str) -> Prediction:
        """Return the row as one of the arm's models alone answered it."""
        own = [sample for sample in self.samples if sample["model"] == model]
        if not own or self.status != "scored":
            return self
        fields = ("completion", "finish_reason", "prompt_tokens", "completion_tokens", "latency_s")
        return dataclasses.replace(
            self,
            **{name: own[0][name] for name in (*fields, "probability")},
            scores=mean_scores([sample["scores"] for sample in own]),
            samples=own if len(own) > 1 else [],
        )


def by_model(predictions: Sequence[Prediction]) -> dict[str, list[Prediction]]:
    """Return an arm's rows as each of its models answered them; where it is one, by an empty name.

    A row without answers of its own is the same for all.
    """
    models = dict.fromkeys(model for p in predictions for model in p.models)
    if not models:
        return {"": list(predictions)}
    return {model: [p.of(model) for p in predictions] for model in models}


def values_of(predictions: Sequence[Prediction], name: str) -> NDArray[np.float64]:
    """Return an arm's scores in a metric; NaN where it does not apply to the row.

    Shape (n,), or (S, n) where the arm is S trainings of one recipe. Where it does not apply to the
    answers of some of them, they have the mean of the others.
    """
    of_rows = np.array([p.scores.get(name) for p in predictions], np.float64)
    models = by_model(predictions)
    if len(models) == 1:
        return of_rows
    each = [[p.scores.get(name) for p in rows] for rows in models.values()]
    values = np.array(each, np.float64)
    return np.where(np.isnan(values), of_rows, values)


def are_same_models(first: Sequence[Prediction], second: Sequence[Prediction]) -> bool:
    """Return whether two arms are the same trainings, asked in two ways."""
    models = list(by_model(first))
    return len(models) > 1 and models == list(by_model(second))


def paired_values(
    first: Sequence[Prediction], second: Sequence[Prediction], name: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the scores of two arms on the same rows, as `values_of` does.

    The same trainings, asked in two ways, are paired: they are returned as what the first is above
    the second, and zeros. Their seeds would count twice otherwise.
    """
    ours, theirs = values_of(first, name), values_of(second, name)
    if are_same_models(first, second):
        return ours - theirs, np.zeros(len(first))
    return ours, theirs


def mean_scores(scores: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Return the mean of several answers' scores, by metric, over those that have one."""
    means: dict[str, float | None] = {}
    for name in scores[0]:
        known = [score for one in scores if (score := one.get(name)) is not None]
        means[name] = sum(known) / len(known) if known else None
    return means


def write_predictions(
    predictions: Sequence[Prediction], metrics: Sequence[str], folder: Path
) -> None:
    """Write `predictions.parquet`: one row for each example and arm, one column per metric."""
    task = [("task", pa.string())] if any(p.task for p in predictions) else []
    scores = [(name, pa.float64()) for name in metrics]
    sample = pa.struct([*_SAMPLE, ("scores", pa.struct(scores))])
    sampled = [("samples", pa.list_(sample))] if any(p.samples for p in predictions) else []
    schema = pa.schema([*_COLUMNS, *task, *sampled, *scores])
    rows = []
    for prediction in predictions:
        row = dataclasses.asdict(prediction)
        own = row.pop("scores")
        rows.append(row | {name: own.get(name) for name in metrics})
    table = pa.Table.from_pylist(rows, schema)
    pq.write_table(table, folder / FILE, compression="zstd", row_group_size=_ROW_GROUP)


class ColumnPredictions(Sequence[Prediction]):
    """Rows that are kept as columns; each is made when it is asked for.

    To go over all of them takes a hundred times as long as to read the columns that are needed.
    """

    @abstractmethod
    def column(self, name: str) -> pa.ChunkedArray:
        """Return what `column_of` says."""

    @abstractmethod
    def take(self, numbers: NDArray[np.intp]) -> list[Prediction]:
        """Return what `rows_at` says."""

    @cached_property
    def _rows(self) -> list[Prediction]:
        return self.take(np.arange(len(self)))

    def __len__(self) -> int:
        return len(self.column("arm"))

    @overload
    def __getitem__(self, index: int) -> Prediction: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prediction]: ...
    def __getitem__(self, index: int | slice) -> Prediction | list[Prediction]:
        return self._rows[index]

    def __iter__(self) -> Iterator[Prediction]:
        return iter(self._rows)


class StoredPredictions(ColumnPredictions):
    """The rows of `predictions.parquet`, of which nothing is read before it is asked for.

    Args:
        folder: Of the evaluation.
        metrics: Whose columns are scores.
    """

    def __init__(self, folder: Path, metrics: Sequence[str]) -> None:
        self._folder, self._metrics = folder, metrics
        self._columns: dict[str, pa.ChunkedArray] = {}

    @cached_property
    def _rows(self) -> list[Prediction]:
        # In batches, and with the texts that arms share held once.
        return read_predictions(self._folder, self._metrics)

    @cached_property
    def _names(self) -> list[str]:
        names: list[str] = pq.read_schema(self._folder / FILE).names
        return names

    def column(self, name: str) -> pa.ChunkedArray:
        """Return what `column_of` says; a column is read once."""
        if name not in self._columns:
            if name in self._names:
                with pq.ParquetFile(self._folder / FILE) as file:
                    self._columns[name] = file.read([name]).column(0)
            else:
                default: Any = [] if name == "error_tags" else "" if name in _SHARED else None
                self._columns[name] = _column(name, [default] * len(self))
        return self._columns[name]

    def take(self, numbers: NDArray[np.intp]) -> list[Prediction]:
        """Return what `rows_at` says."""
        fields = [f.name for f in dataclasses.fields(Prediction) if f.name in self._names]
        scored = [name for name in self._metrics if name in self._names]
        found = {
            name: self.column(name).take(pa.array(numbers)).to_pylist()
            for name in [*fields, *scored]
        }
        columns = {name: found[name] for name in fields}
        columns["scores"] = _scores_of(columns["status"], {name: found[name] for name in scored})
        return list(_made_of(columns))


class JoinedPredictions(ColumnPredictions):
    """The rows of two evaluations.

    Args:
        first: Those that come first.
        suffix: What is added to the names of their arms.
        second: The others.
    """

    def __init__(
        self, first: Sequence[Prediction], suffix: str, second: Sequence[Prediction]
    ) -> None:
        self._first, self._suffix, self._second = first, suffix, second

    def column(self, name: str) -> pa.ChunkedArray:
        """Return what `column_of` says."""
        first, second = (column_of(rows, name) for rows in (self._first, self._second))
        if name == "arm":
            first = pc.binary_join_element_wise(first, self._suffix, "")
        return pa.chunked_array([*first.chunks, *second.chunks])

    def take(self, numbers: NDArray[np.intp]) -> list[Prediction]:
        """Return what `rows_at` says."""
        size = len(self._first)
        earlier = rows_at(self._first, numbers[numbers < size])
        firsts = (dataclasses.replace(p, arm=p.arm + self._suffix) for p in earlier)
        seconds = iter(rows_at(self._second, numbers[numbers >= size] - size))
        return [next(firsts if number < size else seconds) for number in numbers.tolist()]


def rows_at(predictions: Sequence[Prediction], numbers: NDArray[np.intp]) -> list[Prediction]:
    """Return some of the rows, by their numbers."""
    if isinstance(predictions, ColumnPredictions):
        return predictions.take(numbers)
    return [predictions[number] for number in numbers.tolist()]


def column_of(predictions: Sequence[Prediction], name: str) -> pa.ChunkedArray:
    """Return a column of the rows: a field of theirs, or else their scores in a metric.

    Nothing but columns is read of stored rows: of a hundred thousand they take tenths of a second,
    and the rows as objects half a minute.
    """
    if isinstance(predictions, ColumnPredictions):
        return predictions.column(name)
    is_field = name in Prediction.__dataclass_fields__
    values = [getattr(p, name) if is_field else p.scores.get(name) for p in predictions]
    return _column(name, values)


def has_tag(tags: pa.ChunkedArray, tag: str) -> NDArray[np.bool_]:
    """Return which rows of the column `error_tags` hold a tag, shape (n,)."""
    lists = tags.combine_chunks()
    found = np.zeros(len(lists), bool)
    found[pc.list_parent_indices(lists).filter(pc.equal(lists.flatten(), tag)).to_numpy()] = True
    return found


def _column(name: str, values: Sequence[Any]) -> pa.ChunkedArray:
    kinds = dict([*_COLUMNS, ("task", pa.string())])
    return pa.chunked_array([pa.array(values, kinds.get(name, pa.float64()))])


def read_predictions(folder: Path, metrics: Sequence[str]) -> list[Prediction]:
    """Return the rows of `predictions.parquet`, with the columns of these metrics as scores."""
    predictions: list[Prediction] = []
    stored = pq.read_schema(folder / FILE).names
    scored = [name for name in metrics if name in stored]
    fields = [field.name for field in dataclasses.fields(Prediction) if field.name in stored]
    # Arms have texts in common: each is held once.
    same: dict[str, str] = {}
    with pq.ParquetFile(folder / FILE) as file:
        # Column by column: a dictionary for each row takes twice as long.
        for batch in file.iter_batches(_BATCH_ROWS, columns=[*fields, *scored]):
            columns = {name: batch[name].to_pylist() for name in fields}
            for name in columns.keys() & set(_SHARED):
                columns[name] = [same.setdefault(text, text) for text in columns[name]]
            scores = {name: batch[name].to_pylist() for name in scored}
            columns["scores"] = _scores_of(columns["status"], scores)
            predictions += _made_of(columns)
    return predictions


def _scores_of(
    statuses: Sequence[str], scores: Mapping[str, Sequence[float | None]]
) -> list[dict[str, float | None]]:
    """Return each row's scores by metric; none where it is unscored."""
    return [
        dict(zip(scores, values, strict=True)) if status == "scored" else {}
        for status, *values in zip(statuses, *scores.values(), strict=True)
    ]


def _made_of(columns: Mapping[str, Sequence[Any]]) -> Iterator[Prediction]:
    """Return a prediction for each row of these columns; what has no column has its default."""
    names = [field.name for field in dataclasses.fields(Prediction) if field.name in columns]
    every = [field.name for field in dataclasses.fields(Prediction)]
    values = [columns[name] for name in names]
    if names == every[: len(names)]:
        return map(Prediction, *values)
    return (Prediction(**dict(zip(names, row, strict=True))) for row in zip(*values, strict=True))
