"""Rows that two evaluations hold against different right answers: marks correct them in between."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from tuneloop.artifacts import Artifact
from tuneloop.errors import UserError
from tuneloop.evals.scoring.questions import read_questions
from tuneloop.evals.scoring.results import Evaluation


def changed_references(
    first: Artifact, second: Artifact, datasets: Sequence[Artifact]
) -> frozenset[str]:
    """Return the ids of rows whose scores in two evaluations cannot be compared.

    The datasets that were scored tell what is right. Where one of them is gone, it is what the last
    arms were held against; of several right answers that is the nearest one, so then rows count as
    changed that are not.

    Args:
        first: Opened.
        second: Likewise.
        datasets: Those of the workspace.
    """
    both, key = (first, second), "dataset"
    if first.manifest["config"].get(key) == second.manifest["config"].get(key):
        return frozenset()
    told = [_right_answers(evaluation, datasets) for evaluation in both]
    if not all(told):
        told = [_held_against(evaluation) for evaluation in both]
    before, now = told
    return frozenset(row for row in before.keys() & now.keys() if before[row] != now[row])


def _right_answers(
    evaluation: Artifact, datasets: Sequence[Artifact]
) -> dict[str, tuple[str, ...]]:
    """Return the right answers of each row that was scored; empty where they are not there."""
    config = evaluation.manifest["config"]
    split = config.get("evaluation", {}).get("split", "test")
    scored = next((d for d in datasets if d.fingerprint == config.get("dataset")), None)
    if scored is None:
        return {}
    try:
        rows = read_questions(scored, split=split)
    except (UserError, OSError, pa.ArrowInvalid):
        return {}
    return {row.example_id: (row.reference, *sorted(row.accepted)) for row in rows}


def _held_against(evaluation: Artifact) -> dict[str, tuple[str, ...]]:
    """Return what each answer of the last arm was held against."""
    found = Evaluation.load(evaluation)
    columns = (found.column(name).to_pylist() for name in ("example_id", "arm", "reference"))
    arm = found.candidate["name"]
    return {row: (said,) for row, of, said in zip(*columns, strict=True) if of == arm}
