"""What the lineage knows: rows a model was trained on, and how often a test split was looked at."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow.parquet as pq

from tuneloop.artifacts import Artifact, Workspace
from tuneloop.evals.scoring.predictions import Prediction
from tuneloop.evals.scoring.questions import Question

_BATCH_ROWS = 4096


class TrainedRows:
    """The train rows of a dataset, as what is needed to recognise one.

    A row is recognised by its id, which is made of its content, or by its last question, in any
    case and with any white space.

    Args:
        dataset: Its train split is read.
    """

    def __init__(self, dataset: Artifact) -> None:
        self._ids: set[str] = set()
        self._prompts: set[bytes] = set()
        for file in sorted((dataset.path / "train").glob("*.parquet")):
            source = pq.ParquetFile(file)
            names = [n for n in ("row_id", "messages", "text") if n in source.schema_arrow.names]
            for batch in source.iter_batches(_BATCH_ROWS, columns=names):
                for row in batch.to_pylist():
                    self._ids.add(str(row["row_id"]))
                    asked = [m["content"] for m in row.get("messages") or () if m["role"] == "user"]
                    self._prompts.add(_digest(asked[-1] if asked else row.get("text") or ""))

    def __contains__(self, question: Question) -> bool:
        # Of a row that occurs several times the later ones have a number after their id.
        if question.example_id.partition("-")[0] in self._ids or question.example_id in self._ids:
            return True
        asked = question.messages[-1].content if question.messages else question.text
        return _digest(asked) in self._prompts


def find_contaminated(
    workspace: Workspace, fingerprints: Iterable[str], questions: Sequence[Question]
) -> dict[str, frozenset[str]]:
    """Return the ids of the questions that the train rows of each dataset hold.

    Args:
        fingerprints: Of dataset artifacts. One that the workspace does not have is left out.
    """
    datasets = {a.fingerprint: a for a in workspace.published() if a.kind == "datasets"}
    found: dict[str, frozenset[str]] = {}
    for fingerprint in dict.fromkeys(fingerprints):
        if fingerprint in datasets:
            rows = TrainedRows(workspace.open(datasets[fingerprint].ref))
            found[fingerprint] = frozenset(q.example_id for q in questions if q in rows)
    return found


def count_looks(workspace: Workspace, dataset: Artifact, split: str) -> int:
    """Return how many published evaluations have scored a split of a dataset."""
    count = 0
    for artifact in workspace.published():
        config = artifact.manifest["config"]
        if artifact.kind == "evaluations" and config.get("dataset") == dataset.fingerprint:
            count += config.get("evaluation", {}).get("split", "test") == split
    return count


def describe_contamination(predictions: Sequence[Prediction], metric: str) -> dict[str, Any] | None:
    """Return an arm's score on all rows, on clean ones, and on those it was trained on.

    Returns:
        `all`, `clean` and `flagged`, each with `value` and `n`; None where nothing is known of
        what the arm was trained on.
    """
    scored = [p for p in predictions if p.status == "scored" and p.scores.get(metric) is not None]
    if not scored or any(p.contaminated is None for p in scored):
        return None
    parts = {
        "all": scored,
        "clean": [p for p in scored if not p.contaminated],
        "flagged": [p for p in scored if p.contaminated],
    }
    return {name: {"value": _mean(rows, metric), "n": len(rows)} for name, rows in parts.items()}


def _mean(predictions: Sequence[Prediction], metric: str) -> float | None:
    values = [p.scores[metric] or 0.0 for p in predictions]
    return sum(values) / len(values) if values else None


def _digest(text: str) -> bytes:
    return hashlib.sha256(" ".join(text.casefold().split()).encode()).digest()[:16]
