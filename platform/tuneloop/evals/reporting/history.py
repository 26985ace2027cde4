"""What came of each try: the versions of an evaluation one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tuneloop.artifacts import Artifact
from tuneloop.config import TaskConfig
from tuneloop.errors import ArtifactError
from tuneloop.evals.reporting.overview import compare_settings
from tuneloop.evals.scoring.clusters import Clusters
from tuneloop.evals.scoring.comparison import describe_macro_f1
from tuneloop.evals.scoring.estimates import describe_difference
from tuneloop.evals.scoring.intervals import Resampling
from tuneloop.evals.scoring.metrics import OF_ALL_ROWS, Scorer
from tuneloop.evals.scoring.predictions import FILE, paired_values, read_predictions
from tuneloop.evals.scoring.references import changed_references
from tuneloop.evals.scoring.results import Evaluation
from tuneloop.text import counted

_MOST_CHANGES = 4
# Resamples times rows: a page that lists many versions has no seconds for each.
_MOST_DRAWS, _MOST_RESAMPLES, _FEWEST_RESAMPLES = 5_000_000, 1_000, 100


@dataclass(frozen=True)
class Iteration:
    """One version of an evaluation beside the one before.

    Args:
        changed: In words: the dataset, and settings of training and evaluation that differ, and how
            many examples are not compared since marks have changed what is right.
        value: Score of the last arm in the primary metric, with the ends of its interval.
        change: Score less that of the version before, over the examples that both scored, with its
            95% interval, paired: `value`, `low`, `high`; None for the first, and where the version
            before has no such metric or no example in common.
        made_of: Dataset of the evaluation and model of its last arm; what is gone is missing.
        num_fixed: Shared examples that score better than in the version before; None for the first.
        num_introduced: Likewise worse.
        num_shared: Examples that both versions scored against the same right answers.
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
    change: dict[str, Any] | None
    made_of: list[Artifact]


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
    datasets = [a for a in artifacts if a.kind == "datasets"]
    found: list[Iteration] = []
    before: Artifact | None = None
    for version in versions:
        evaluation = Evaluation.load(version)
        arm, metric = evaluation.candidate, evaluation.primary
        score = arm["scores"][metric]
        parts = made_of(version, by_fingerprint)
        changes = None if before is None else _changes(before, version, metric, datasets)
        changed = _changed(
            [*made_of(before, by_fingerprint), before] if before else [], [*parts, version]
        )
        if changes and changes.num_left_out:
            told = f"{counted(changes.num_left_out, 'row')} not compared: right answers differ"
            changed = "; ".join(filter(None, (changed, told)))
        found.append(
            Iteration(
                version.ref,
                version.manifest["created_at"],
                arm["name"],
                metric,
                changed,
                score["value"],
                score["low"],
                score["high"],
                changes and changes.num_fixed,
                changes and changes.num_introduced,
                changes and changes.num_shared,
                sum(float(a.manifest["duration_s"]) for a in [*parts, version]),
                changes and changes.difference,
                parts,
            )
        )
        before = version
    return found


def made_of(evaluation: Artifact, by_fingerprint: dict[str, Artifact]) -> list[Artifact]:
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
            parts.append(f"{counted(fixed, 'row')} changed by marks")
        if old is not None:
            skipped = ("dataset", "renderer", "train_fingerprint", "fixes", "files")
            rows = [
                row
                for row in compare_settings([old, new])
                if row["setting"].split(".")[0] not in skipped
            ]
            parts += [f"{r['setting']}: {r[old.ref]} → {r[new.ref]}" for r in rows[:_MOST_CHANGES]]
    asked = [a for a in (*before, *now) if a.kind == "evaluations"]
    if len(asked) == 2:
        rows = [r for r in compare_settings(asked) if r["setting"].startswith("evaluation.")]
        first, second = (a.ref for a in asked)
        arms = [(a.manifest["config"].get("arms") or [{}])[-1].get("name") for a in asked]
        if None not in arms and arms[0] != arms[1]:
            parts.append(f"arm: {arms[0]} → {arms[1]}")
        parts += [f"{r['setting']}: {r[first]} → {r[second]}" for r in rows[:_MOST_CHANGES]]
    return "; ".join(parts)


class _Changes(NamedTuple):
    """How the answers to the shared examples differ from those before."""

    num_fixed: int
    num_introduced: int
    num_shared: int
    num_left_out: int
    difference: dict[str, Any] | None


def _changes(
    before: Artifact, now: Artifact, name: str, datasets: Sequence[Artifact]
) -> _Changes | None:
    """Return how the last arm's answers differ; None where the earlier ones lack the metric.

    An answer that is right since a mark has corrected the reference is no error that was fixed.
    """
    earlier, newer = (Evaluation.load(a) for a in (before, now))
    # Single answers are better or worse by the metric of rows, also where macro-F1 decides.
    by_row = newer.row_metric
    if not {name, by_row} <= earlier.metrics["metrics"].keys():
        return None
    metric = newer.metric(by_row)
    if metric.kind == "binary":  # with several answers to a row the earlier ones are shares
        metric = earlier.metric(by_row)
    values: list[Any] = []
    for artifact, evaluation in ((now, newer), (before, earlier)):
        values += [str(artifact.path / FILE), evaluation.candidate["name"]]
    column = '"' + by_row.replace('"', '""') + '"'
    side = f"(SELECT *, {column} AS score FROM read_parquet(?) WHERE arm = ?)"
    try:
        # Predictions of the first versions know no clusters.
        known = "cluster" in pq.read_schema(values[0]).names
        cluster = f"{'b.cluster' if known else repr('')} AS cluster"
        with duckdb.connect() as connection:
            shared = connection.execute(
                f"SELECT example_id, {cluster}, b.score AS now, a.score AS before "
                f"FROM {side} b JOIN {side} a USING (example_id) "
                "WHERE a.score IS NOT NULL AND b.score IS NOT NULL",
                values,
            ).fetchnumpy()
    except (duckdb.Error, OSError, pa.ArrowInvalid) as error:
        raise ArtifactError.of(
            "predictions cannot be read", where=now.ref, got=str(error).partition("\n")[0]
        ) from error
    changed = changed_references(before, now, datasets)
    left_out = np.isin(shared["example_id"].astype(str), [*changed])
    shared = {name: values[~left_out] for name, values in shared.items()}
    scores = [np.asarray(shared[key], float) for key in ("now", "before")]
    gains = (scores[0] - scores[1]) * (-1 if metric.better == "lower" else 1)
    difference = None
    if len(gains):
        both = []
        # Macro-F1 is of the answers. Several trainings: the interval is for others as well.
        is_of_all = name == OF_ALL_ROWS
        if is_of_all or any("models" in e.candidate for e in (newer, earlier)):
            for artifact, evaluation in ((now, newer), (before, earlier)):
                arm, rows = evaluation.candidate["name"], read_predictions(artifact.path, [by_row])
                by_id = {p.example_id: p for p in rows if p.arm == arm}
                both.append([by_id[key] for key in shared["example_id"]])
        if is_of_all:
            task = TaskConfig.model_validate(now.manifest["config"]["task"])
            scorer = Scorer(task, {p.example_id: p.reference for p in both[0]}, primary=name)
            num = min(_MOST_RESAMPLES, max(_FEWEST_RESAMPLES, _MOST_DRAWS // len(gains)))
            resampling = Resampling(num_resamples=num)
            difference = describe_macro_f1(both[0], both[1], scorer, resampling)
        else:
            if both:
                scores = list(paired_values(both[0], both[1], name))
            ids = np.where(shared["cluster"] == "", shared["example_id"], shared["cluster"])
            clusters = Clusters.of(ids.astype(str))
            # Without resamples, which take as long again for each version.
            resampling = Resampling(num_resamples=0)
            difference = describe_difference(scores[0], scores[1], clusters, metric, resampling)
    counts = (int((gains > 0).sum()), int((gains < 0).sum()), len(gains), int(left_out.sum()))
    return _Changes(*counts, difference)
