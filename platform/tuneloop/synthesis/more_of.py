"""Train rows that there should be more like: those near people's marks, or in weak slices.

What is marked or weak may be held out; then train rows like it stand for it. No held-out row is
ever shown to the model that writes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
from pyarrow import parquet

from tuneloop.artifacts import Artifact, Workspace
from tuneloop.config import TuneloopConfig
from tuneloop.errors import ConfigError, Problem, UserError
from tuneloop.evals.scoring.pairing import last_question
from tuneloop.evals.scoring.questions import read_solved
from tuneloop.evals.scoring.results import Evaluation
from tuneloop.evals.scoring.simple import most_alike, vectorizer_of_words
from tuneloop.evals.scoring.slices import (
    LABEL,
    LENGTH,
    REFERENCE_LENGTH,
    is_in,
    read_columns,
    weak_parts,
)
from tuneloop.marks import SCORED_SUFFIX
from tuneloop.records import Message
from tuneloop.review.fixes import marks_for
from tuneloop.synthesis.filters import Solved
from tuneloop.words import split_words

logger = logging.getLogger("tuneloop.data")

MARKS = "marks"
# Train rows that stand for a marked row, itself included, and for a slice.
_NEAR_MARK, _NEAR_SLICE = 6, 30
_HELD_OUT = ("test", "validation")


@dataclass(frozen=True)
class Part:
    """Rows that there should be more like.

    Args:
        name: `topic = cards`, or `marked row 00af`.
        row_ids: Train rows that people wrote, the nearest first; at least one.
    """

    name: str
    row_ids: tuple[str, ...]


class Parts(NamedTuple):
    """What there should be more of.

    Args:
        parts: The worst first; at least one.
        evaluation: Reference of the evaluation that they are of; empty for marks.
    """

    parts: tuple[Part, ...]
    evaluation: str = ""


def held_out_rows(dataset: Artifact) -> list[Solved]:
    """Return the test and validation rows of a dataset that end with a question and its answer."""
    rows = []
    files = [file for split in _HELD_OUT for file in (dataset.path / split).glob("*.parquet")]
    for file in sorted(files):
        for row in parquet.read_table(file, columns=["row_id", "messages"]).to_pylist():
            turns = [Message.of(turn) for turn in row["messages"][-2:]]
            if len(turns) == 2:
                rows.append(Solved(turns[0].text, turns[1].text, row["row_id"]))
    return rows


def find_parts(
    config: TuneloopConfig, workspace: Workspace, dataset: Artifact, people: Sequence[Solved]
) -> Parts:
    """Return what `generation.more_of` asks for.

    Args:
        config: Names marks or an evaluation.
        workspace: Where these are.
        dataset: Whose train rows are shown to the model.
        people: Its train rows that people wrote.

    Raises:
        ConfigError: No row is marked, or no slice is shown to be worse.
        ArtifactError: The evaluation, its dataset, or the marks cannot be read.
    """
    assert config.generation is not None, "the caller looked"
    if config.generation.more_of == MARKS:
        return _near_marks(config, workspace, dataset, people)
    return _in_weak_slices(config, workspace, dataset, people)


def _near_marks(
    config: TuneloopConfig, workspace: Workspace, dataset: Artifact, people: Sequence[Solved]
) -> Parts:
    """Return for each row that is marked the train rows most like it, itself first."""
    known = [
        Solved(row.messages[-2].text, row.messages[-1].text, row.row_id)
        for row in read_solved(dataset)
    ]
    known += held_out_rows(dataset)
    scored = workspace.published("datasets", config.name + SCORED_SUFFIX)
    known += held_out_rows(workspace.open(scored[-1].ref)) if scored else []
    marks = [*marks_for(config, workspace), *marks_for(config, workspace, scored=True)]
    wanted = {mark.content_id for mark in marks if mark.kind == "more_like_this"}
    marked = {id_: row for row in known if (id_ := row.row_id.partition("-")[0]) in wanted}
    if lost := len(wanted) - len(marked):
        logger.warning("%d of %d marked rows are no longer there", lost, len(wanted))
    if not marked:
        raise ConfigError(_no_marks(f"{len(wanted)} such marks, on rows that are not there"))
    parts = []
    for content_id, row in sorted(marked.items()):
        fitting = list(people)
        if config.task.type == "classification":
            fitting = [one for one in people if one.answer == row.answer] or fitting
        # Of equal similarity is also a copy of the row: its own comes first.
        near = _nearest_first(fitting, [row.input])
        near.sort(key=lambda one: one.row_id.partition("-")[0] != content_id)
        ids = tuple(one.row_id for one in near[:_NEAR_MARK])
        parts.append(Part(f"marked row {content_id}", ids))
    return Parts(tuple(parts))


def more_of_problems(config: TuneloopConfig, workspace: Workspace) -> list[Problem]:
    """Return why `generation.more_of` names nothing, as far as it can be told before any row."""
    more_of = config.generation.more_of if config.generation is not None else None
    if more_of is None:
        return []
    try:
        if more_of != MARKS:
            _weak(workspace.open(more_of))
        else:
            marks = [*marks_for(config, workspace), *marks_for(config, workspace, scored=True)]
            if not any(mark.kind == "more_like_this" for mark in marks):
                return [_no_marks("no such mark")]
    except UserError as error:
        return list(error.problems)
    return []


def _no_marks(got: str) -> Problem:
    return Problem(
        "no row is marked with `needs more like this`",
        where="generation.more_of",
        got=got,
        remedy="mark rows on the dashboard (`tuneloop dashboard`), or leave generation.more_of out",
    )


class _Weak(NamedTuple):
    """An evaluation, and its slices that are shown to be worse, worst first."""

    evaluation: Evaluation
    slices: list[dict[str, Any]]


def _weak(artifact: Artifact) -> _Weak:
    evaluation = Evaluation.load(artifact)
    arm, metric = evaluation.candidate["name"], evaluation.metric(evaluation.primary)
    slices = weak_parts(evaluation.slices, arm, metric.better)
    if not slices:
        count = evaluation.slices.get("num_slices", 0)
        raise ConfigError.of(
            "no slice is shown to be worse than the other rows",
            where=f"generation.more_of: {artifact.ref}, arm `{arm}`",
            got=f"{count:,} slices, none of them worse after correction for so many",
            remedy="leave generation.more_of out, or mark rows and set it to `marks`",
        )
    return _Weak(evaluation, slices)


def _in_weak_slices(
    config: TuneloopConfig, workspace: Workspace, dataset: Artifact, people: Sequence[Solved]
) -> Parts:
    """Return for each weak slice train rows of it, those most like its test rows first.

    Where no train row is of it (it is a cluster, and all of it is held out) they are the nearest of
    all.
    """
    assert config.generation is not None
    artifact = workspace.open(str(config.generation.more_of))
    evaluation, weak = _weak(artifact)
    scored = workspace.open(artifact.manifest["inputs"][0])
    columns = {split: read_columns(scored, split) for split in _HELD_OUT}
    ours = read_columns(dataset, "train")
    is_own = pc.equal(evaluation.column("arm"), evaluation.candidate["name"])
    prompts, references, ids = (
        evaluation.column(name).filter(is_own).to_pylist()
        for name in ("prompt", "reference", "example_id")
    )
    asked = [Solved(*row) for row in zip(map(last_question, prompts), references, ids, strict=True)]
    parts = []
    for item in weak:
        by, name = item["by"], item["slice"]
        held = columns["test"].get(by, {}) | columns["validation"].get(by, {})
        tested = [row.input for row in asked if is_in(_value(row, by, held), name)]
        own = [row for row in people if is_in(_value(row, by, ours.get(by, {})), name)]
        near = _nearest_first(own or people, tested)[:_NEAR_SLICE]
        parts.append(Part(f"{by} = {name}", tuple(row.row_id for row in near)))
    return Parts(tuple(parts), artifact.ref)


def _value(row: Solved, by: str, column: Mapping[str, Any]) -> Any:
    """Return what a slice is told by: a column's value, a label, or a number of words."""
    if by == LABEL and not column:
        return row.answer
    if by in (LENGTH, REFERENCE_LENGTH):
        return len(split_words(row.input if by == LENGTH else row.answer))
    return column.get(row.row_id)


def _nearest_first(rows: Sequence[Solved], texts: Sequence[str]) -> list[Solved]:
    """Return rows by the largest cosine of their inputs with any of some texts."""
    vectorizer = vectorizer_of_words()
    try:
        vectors = vectorizer.fit_transform([row.input for row in rows])
    except ValueError:  # no word is left
        return list(rows)
    alike = most_alike(vectors, vectorizer.transform(texts)) if texts else np.zeros(len(rows))
    return [rows[index] for index in np.argsort(-alike, kind="stable")]
