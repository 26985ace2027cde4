"""The way of one row: where it is in every dataset, who was trained on it, what was answered to it,
and what people say of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tuneloop.artifacts import Artifact, Workspace
from tuneloop.errors import DataError
from tuneloop.marks import MARK_LABELS, Mark
from tuneloop.review.fixes import fixes_of
from tuneloop.review.rows import Query, open_rows, quoted
from tuneloop.review.store import ReviewStore, has_store
from tuneloop.review.verdicts import Verdict

_FOLDERS = ("train", "validation", "test", "removed")
_SHORTEST_PREFIX = 6
_DONE = {"correct": "answer corrected", "drop": "dropped", "accept": "more answers accepted"}
_PLACE = re.compile(r".+:\d+")


@dataclass(frozen=True)
class Place:
    """Where a row is in one version of a dataset.

    Args:
        side: `train`, `validation`, `test` or `removed`.
        reason: Why it was removed; empty if it was not.
        kept_row_id: The row it repeats, if it was removed for that.
        answer: What its last turn says, or its text.
        fixes: What marks have changed in it, as the card tells.
        repeated_by: Rows that were removed because they repeat it.
    """

    dataset: str
    side: str
    row_id: str
    source: str
    answer: str
    reason: str = ""
    kept_row_id: str = ""
    fixes: list[dict[str, Any]] = field(default_factory=list)
    repeated_by: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Answer:
    """What an arm answered to the row.

    Args:
        score: In the metric by which single answers are right or wrong; None where there is none.
    """

    evaluation: str
    arm: str
    metric: str
    score: float | None
    completion: str


@dataclass(frozen=True)
class Trace:
    """Everything in a workspace that belongs to one row.

    Args:
        row_id: Of its content, without the number of a copy.
        models: Those that were trained on it, each with its dataset.
    """

    row_id: str
    places: list[Place]
    models: list[dict[str, str]]
    answers: list[Answer]
    marks: list[Mark]
    votes: list[Verdict]

    def as_dict(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return asdict(self)


def trace(workspace: Workspace, identifier: str) -> Trace:
    """Return the way of a row.

    Args:
        identifier: The `row_id` or `example_id`, or how it begins (six characters or more); the
            place in a source, `path:line`, or how that ends; the `uid` of a mark or vote.

    Raises:
        DataError: Nothing or several rows are called so.
        ArtifactError: The workspace's artifacts or marks cannot be read.
    """
    store = ReviewStore(workspace.location) if has_store(workspace.location) else None
    said = store.find(identifier) if store else None
    if said is not None:
        identifier = said.row_id if isinstance(said, Mark) else said.example_id
    datasets = [workspace.open(a.ref) for a in workspace.published("datasets")]
    opened = [
        (dataset, folder, query)
        for dataset in datasets
        for folder in _FOLDERS
        if (query := open_rows(dataset, folder)) is not None
    ]
    row_id = _row_id(identifier, [query for _, _, query in opened])
    places = [place for item in opened for place in _places(*item, row_id)]
    places = [_with_repeats(place, opened) for place in places]
    trained = {p.dataset for p in places if p.side == "train"}
    evaluations = [workspace.open(a.ref) for a in workspace.published("evaluations")]
    return Trace(
        row_id,
        places,
        _models(workspace, [d for d in datasets if d.ref in trained]),
        [answer for evaluation in evaluations for answer in _answers(evaluation, row_id)],
        [m for m in (store.marks() if store else []) if m.content_id == row_id],
        store.all_verdicts(row_id) if store else [],
    )


def trace_lines(found: Trace) -> list[str]:
    """Return the way of a row as lines to read."""
    lines = [f"row {found.row_id}", "", "datasets"]
    for place in found.places:
        lines.append(f"  {place.dataset}  {place.side}  {place.row_id}  from {place.source}")
        lines.append(f"    {' '.join(place.answer.split())}")
        if place.reason:
            lines.append(f"    removed: {place.reason}")
        if place.kept_row_id:
            lines.append(f"    because of row {place.kept_row_id}")
        if place.repeated_by:
            lines.append(f"    removed because of it: {', '.join(place.repeated_by)}")
        for fix in place.fixes:
            who, marks = ", ".join(fix["reviewers"]), ", ".join(fix["marks"])
            lines.append(f"    {_DONE[fix['action']]}, as {who} marked it ({marks})")
    if found.models:
        lines += ["", "models trained on it"]
        lines += [f"  {item['model']}  on {item['dataset']}" for item in found.models]
    if found.answers:
        lines += ["", "answers"]
    for answer in found.answers:
        score = "no score" if answer.score is None else f"{answer.metric} {answer.score:.4g}"
        said = " ".join(answer.completion.split())
        lines.append(f"  {answer.evaluation}  {answer.arm}  {score}  {said}")
    if found.marks:
        lines += ["", "marks"]
    for mark in found.marks:
        says = ": ".join(part for part in (MARK_LABELS[mark.kind], mark.answer, mark.note) if part)
        when = mark.created_at[:16].replace("T", " ")
        lines.append(f"  {when}  {mark.reviewer}  {' '.join(says.split())}  ({mark.uid})")
    if found.votes:
        lines += ["", "votes"]
    for vote in found.votes:
        better = vote.winner or {"tie": "equally good"}.get(vote.choice, "both are bad")
        when = vote.created_at[:16].replace("T", " ")
        lines.append(f"  {when}  {vote.reviewer}  {better}  {vote.comment}  in {vote.evaluation}")
    return lines


def _row_id(identifier: str, queries: Sequence[Query]) -> str:
    """Return the id of the row that is meant."""
    found: dict[str, str] = {}
    base = identifier.partition("-")[0]
    if _PLACE.fullmatch(identifier):
        found = _matching(
            queries, "source = ? OR ends_with(source, ?)", identifier, f"/{identifier}"
        )
    else:
        found = _matching(queries, "row_id = ?", base)
        if not found and len(base) >= _SHORTEST_PREFIX:
            found = _matching(queries, "starts_with(row_id, ?)", base)
        documents = "len(list_filter(document_ids, lambda d: starts_with(d, ?))) > 0"
        packed = [query for query in queries if "document_ids" in query.types]
        if not found and _matching(packed, documents, base):
            return base
    if len(found) == 1:
        return next(iter(found))
    if not found and len(base) < _SHORTEST_PREFIX:
        what, remedy = "too short to name a row", f"give {_SHORTEST_PREFIX} characters or more"
    elif found:
        what, remedy = "several rows are called so", "give more of the id"
    else:
        what = "no row of this workspace is called so"
        remedy = "`tuneloop ls` lists the datasets; ids are in the column row_id of their files"
    named = "; ".join(f"{name} ({source})" for name, source in list(found.items())[:10])
    raise DataError.of(what, got=identifier, allowed=named, remedy=remedy)


def _matching(queries: Sequence[Query], condition: str, *values: object) -> dict[str, str]:
    """Return some of the rows that a condition lets through: their source by content id."""
    found: dict[str, str] = {}
    for query in queries:
        if "source" not in query.types and "source" in condition:
            continue  # rows that an early version removed do not say where they were read
        source = "source" if "source" in query.types else "'removed'"
        sql = f"SELECT row_id, {source} AS place FROM rows WHERE {condition} LIMIT 20"
        for row in query.ask(sql, *values):
            found.setdefault(re.split(r"[-.]", row["row_id"])[0], row["place"])
    return found


def _places(dataset: Artifact, folder: str, query: Query, row_id: str) -> Iterator[Place]:
    condition = "(row_id = ? OR starts_with(row_id, ?) OR starts_with(row_id, ?))"
    values: list[object] = [row_id, f"{row_id}-", f"{row_id}."]
    if "document_ids" in query.types:
        condition += " OR len(list_filter(document_ids, lambda d: starts_with(d, ?))) > 0"
        values.append(row_id)
    names = ("row_id", "source", "messages", "text", "reason", "kept_row_id")
    selected = ", ".join(quoted(name) for name in names if name in query.types)
    fixes = fixes_of(dataset)["applied"]
    for row in query.ask(f"SELECT {selected} FROM rows WHERE {condition}", *values):
        turns = row.get("messages")
        yield Place(
            dataset.ref,
            folder,
            row["row_id"],
            row.get("source") or "",
            turns[-1]["content"] if turns else row.get("text") or "",
            row.get("reason") or "",
            row.get("kept_row_id") or "",
            [item for item in fixes if item["row_id"] == row["row_id"]],
        )


def _with_repeats(place: Place, opened: Sequence[tuple[Artifact, str, Query]]) -> Place:
    for dataset, folder, query in opened:
        if (dataset.ref, folder) == (place.dataset, "removed"):
            found = query.ask("SELECT row_id FROM rows WHERE kept_row_id = ?", place.row_id)
            return Place(**{**vars(place), "repeated_by": [row["row_id"] for row in found]})
    return place


def _models(workspace: Workspace, datasets: Sequence[Artifact]) -> list[dict[str, str]]:
    by_identity = {d.train_fingerprint: d.ref for d in reversed(datasets)}
    by_identity |= {d.fingerprint: d.ref for d in datasets}
    return [
        {"model": model.ref, "dataset": by_identity[model.manifest["config"]["dataset"]]}
        for model in workspace.published("models")
        if model.manifest["config"].get("dataset") in by_identity
    ]


def _answers(evaluation: Artifact, row_id: str) -> Iterator[Answer]:
    file = evaluation.path / "predictions.parquet"
    if not file.is_file():
        return
    query = Query([file])
    metric = str(evaluation.manifest["metrics"].get("primary", ""))
    about = evaluation.path / "metrics.json"
    if metric not in query.types and about.is_file():
        # Of macro-F1 no answer has a score by itself.
        metric = json.loads(about.read_text(encoding="utf-8")).get("row_metric", metric)
    score = quoted(metric) if metric in query.types else "NULL"
    for row in query.ask(
        f"SELECT arm, completion, {score} AS score FROM rows "
        "WHERE example_id = ? OR starts_with(example_id, ?)",
        row_id,
        f"{row_id}-",
    ):
        yield Answer(evaluation.ref, row["arm"], metric, row["score"], row["completion"] or "")
