"""What is known of the rows that are scored: who was trained on them, who scored them before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from tuneloop.artifacts import Artifact, Workspace
from tuneloop.evals.scoring.predictions import Prediction
from tuneloop.evals.scoring.questions import Question, normalised_prompt
from tuneloop.records import Arm, Conversation


class Looks(NamedTuple):
    """How often the rows of a split were scored before, in this workspace.

    Args:
        evaluations: References of the published evaluations that scored any of them, oldest first.
        arm_identities: Of all arms that were scored there.
    """

    evaluations: list[str]
    arm_identities: frozenset[str]


def find_seen(arms: Sequence[Arm], questions: Sequence[Question]) -> dict[str, set[str]]:
    """Return, by arm, the ids of the questions it was trained on; without arms not known of."""
    by_rows: dict[str, set[str]] = {}
    for arm in arms:
        if arm.find_seen and arm.trained_on not in by_rows:
            by_rows[arm.trained_on] = set(arm.find_seen(questions))
    return {arm.name: by_rows[arm.trained_on] for arm in arms if arm.find_seen}


def is_contaminated(
    question: Question, shots: Sequence[Conversation], seen: set[str] | None
) -> bool | None:
    """Return whether an arm has seen a question: in training, or solved in its own prompt.

    Args:
        question: What is asked.
        shots: Solved examples before it.
        seen: The questions that the arm was trained on; None where that is not known.
    """
    asked = normalised_prompt(question).casefold()
    for shot in shots:
        turns = [message for message in shot.messages[:-1] if message.role == "user"]
        if turns and asked == " ".join(turns[-1].content.split()).casefold():
            return True
    return None if seen is None else question.example_id in seen


def find_looks(workspace: Workspace, dataset: Artifact, split: str) -> Looks:
    """Return which published evaluations have scored rows of a split.

    Datasets that differ in their train rows share test rows: rows are compared, not datasets.
    """
    ours = _row_ids(dataset, split)
    datasets = {a.fingerprint: a for a in workspace.published("datasets")}
    shared: Mapping[tuple[str, str], bool] = {(dataset.fingerprint, split): True}
    evaluations, identities = [], set()
    for artifact in workspace.published("evaluations"):
        config = artifact.manifest["config"]
        scored = config.get("evaluation", {}).get("split", "test")
        key = str(config.get("dataset", "")), scored
        if key not in shared:
            other = datasets.get(key[0])
            rows = _row_ids(workspace.open(other.ref), scored) if other else frozenset()
            shared = {**shared, key: bool(ours & rows)}
        if shared[key]:
            evaluations.append(artifact.ref)
            each = [one for arm in config.get("arms", []) for one in arm.get("models", [arm])]
            identities |= {one["identity"] for one in each if "identity" in one}
    return Looks(evaluations, frozenset(identities))


def describe_contamination(predictions: Sequence[Prediction], metric: str) -> dict[str, Any] | None:
    """Return an arm's score on all rows, on clean ones, and on those it was trained on.

    Returns:
        `all`, `clean` and `flagged`, each with `value` and `n`, and `unknown` where of some rows it
        is not known; None where nothing is known of what the arm was trained on.
    """
    scored = [p for p in predictions if p.status == "scored" and p.scores.get(metric) is not None]
    if all(p.contaminated is None for p in scored):
        return None
    parts = {
        "all": scored,
        "clean": [p for p in scored if p.contaminated is False],
        "flagged": [p for p in scored if p.contaminated],
    }
    if unknown := [p for p in scored if p.contaminated is None]:
        parts["unknown"] = unknown
    return {name: {"value": _mean(rows, metric), "n": len(rows)} for name, rows in parts.items()}


def _mean(predictions: Sequence[Prediction], metric: str) -> float | None:
    values = [p.scores[metric] or 0.0 for p in predictions]
    return sum(values) / len(values) if values else None


def _row_ids(dataset: Artifact, split: str) -> frozenset[str]:
    files = sorted((dataset.path / split).glob("*.parquet"))
    return frozenset(
        str(row_id)
        for file in files
        for row_id in pq.read_table(file, columns=["row_id"])["row_id"].to_pylist()
    )
