"""What came of each try: the versions of an evaluation one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import duckdb

from tuneloop.artifacts import Artifact
from tuneloop.errors import ArtifactError, Problem
from tuneloop.evals.reporting.overview import compare_settings
from tuneloop.evals.scoring.results import Evaluation

_MOST_CHANGES = 4


@dataclass(frozen=True)
class Iteration:
    """One version of an evaluation beside the one before.

    Args:
        changed: In words: the dataset, and settings of the training that differ.
        value: Score of the last arm in the primary metric, with the ends of its interval.
        num_fixed: Shared examples that score better than in the version before; None for the first.
        num_introduced: Likewise worse.
        num_shared: Examples that both versions scored.
        took_s: Of the dataset, the model and the evaluation together.
    """

    ref: str
    created_at: str
    arm: str
    metric: str
    changed: str
    value: float | None
    low: float | None
    high: float | None
    num_fixed: int | None
    num_introduced: int | None
    num_shared: int | None
    took_s: float


def history(artifacts: Sequence[Artifact], name: str) -> list[Iteration]:
    """Return the versions of `evaluations/NAME`, oldest first.

    Args:
        artifacts: All of the workspace, opened or not; files are read of the evaluations alone.
        name: Of the evaluation.

    Raises:
        ArtifactError: Predictions of one of them cannot be read.
    """
    versions = [a for a in artifacts if (a.kind, a.name) == ("evaluations", name)]
    by_fingerprint = {a.fingerprint: a for a in artifacts}
    found: list[Iteration] = []
    before: Artifact | None = None
    for version in versions:
        evaluation = Evaluation.load(version, with_predictions=False)
        arm, metric = evaluation.candidate, evaluation.primary
        score = arm["scores"][metric]
        made_of = _made_of(version, by_fingerprint)
        changes = None if before is None else _changes(before, version, metric)
        found.append(
            Iteration(
                version.ref,
                version.manifest["created_at"],
                arm["name"],
                metric,
                _changed(_made_of(before, by_fingerprint) if before else [], made_of),
                score["value"],
                score["low"],
                score["high"],
                changes and changes.num_fixed,
                changes and changes.num_introduced,
                changes and changes.num_shared,
                sum(float(a.manifest["duration_s"]) for a in [*made_of, version]),
            )
        )
        before = version
    return found


def _made_of(evaluation: Artifact, by_fingerprint: dict[str, Artifact]) -> list[Artifact]:
    """Return the dataset of an evaluation and the model of its last arm; none that is gone."""
    config = evaluation.manifest["config"]
    arms = config.get("arms") or [{}]
    names = (config.get("dataset"), arms[-1].get("model"))
    return [by_fingerprint[name] for name in names if name in by_fingerprint]


def _changed(before: Sequence[Artifact], now: Sequence[Artifact]) -> str:
    """Return what differs between two iterations, in words."""
    parts: list[str] = []
    for kind in ("datasets", "models"):
        old, new = (next((a for a in found if a.kind == kind), None) for found in (before, now))
        if new is None or (old is not None and old.ref == new.ref):
            continue
        parts.append(new.ref)
        if kind == "datasets" and (fixed := new.manifest["metrics"].get("num_fixed_rows")):
            parts.append(f"{fixed:,} rows changed by marks")
        if old is not None:
            skipped = ("dataset", "renderer", "train_fingerprint", "fixes", "files")
            rows = [
                row
                for row in compare_settings([old, new])
                if row["setting"].split(".")[0] not in skipped
            ]
            parts += [f"{r['setting']}: {r[old.ref]} → {r[new.ref]}" for r in rows[:_MOST_CHANGES]]
    return "; ".join(parts)


class _Changes(NamedTuple):
    """How many of the shared examples are answered better, and worse, than before."""

    num_fixed: int
    num_introduced: int
    num_shared: int


def _changes(before: Artifact, now: Artifact, metric: str) -> _Changes | None:
    """Return how the last arm's answers differ; None where the earlier ones lack the metric."""
    column = '"' + metric.replace('"', '""') + '"'
    metrics = [Evaluation.load(a, with_predictions=False) for a in (before, now)]
    sign = -1 if metrics[1].metric(metric).better == "lower" else 1
    if metric not in metrics[0].metrics["metrics"]:
        return None
    sides = [
        f"(SELECT example_id, {column} AS score FROM read_parquet(?) WHERE arm = ?)"
        for _ in range(2)
    ]
    values: list[Any] = []
    for artifact, evaluation in zip((before, now), metrics, strict=True):
        values += [str(artifact.path / "predictions.parquet"), evaluation.candidate["name"]]
    query = (
        "SELECT count(*) FILTER ((b.score - a.score) * ? > 0), "
        "count(*) FILTER ((b.score - a.score) * ? < 0), count(*) "
        f"FROM {sides[0]} a JOIN {sides[1]} b USING (example_id) "
        "WHERE a.score IS NOT NULL AND b.score IS NOT NULL"
    )
    try:
        with duckdb.connect() as connection:
            row = connection.execute(query, [sign, sign, *values]).fetchone()
    except duckdb.Error as error:
        raise ArtifactError(
            Problem("predictions cannot be read", where=now.ref, got=str(error).partition("\n")[0])
        ) from error
    return None if row is None else _Changes(*map(int, row))
