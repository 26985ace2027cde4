"""Several tasks in one data set: who is kept apart, who stays together, and in which parts."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from tuneloop.artifacts import Artifact, Workspace
from tuneloop.config import TuneloopConfig
from tuneloop.data.prepare import prepare
from tuneloop.models.bases.source import BaseModel
from tuneloop.sweeps.tasks import train_rows_of

WORDS = [a + b + c for a in ("ka", "lo", "mi", "ru") for b in ("ta", "ne", "so") for c in "xyzw"]
NUM_DOCUMENTS = 120


def document(number: int) -> str:
    return " ".join(random.Random(number).choices(WORDS, k=40))


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def mixed(folder: Path, weights: tuple[float | None, float | None]) -> TuneloopConfig:
    """Write two tasks over the same documents, and a third of the labels twice."""
    labels = [
        {"question": document(n), "answer": "ab"[n % 2], "task": n} for n in range(NUM_DOCUMENTS)
    ]
    # Said again with one word more: near-duplicates within their task.
    again = [dict(row, question=f"{row['question']} {WORDS[0]}") for row in labels[1::3]]
    # A label of the same document once more, and the other one: a conflict within its task.
    unclear = [dict(labels[0], answer="b")]
    titles = [
        {"question": document(n), "answer": "ab"[n % 2] if n < 10 else document(n)[:12]}
        for n in range(NUM_DOCUMENTS)
    ]
    sources = [
        ("labels.jsonl", [*labels, *again, *unclear], "label"),
        ("titles.jsonl", titles, "title"),
    ]
    return TuneloopConfig.model_validate(
        {
            "name": "mixed",
            "task": {
                "type": "mixture",
                "tasks": {
                    "label": {
                        "type": "classification",
                        "labels": ["a", "b"],
                        "instruction": "Which one?",
                        "weight": weights[0],
                    },
                    "title": {
                        "type": "generation",
                        "instruction": "Give it a title.",
                        "weight": weights[1],
                    },
                },
            },
            "model": {"base": "tiny"},
            "data": {
                "sources": [
                    {
                        "path": write(folder / name, rows),
                        "format": "question_answer",
                        "task": task,
                    }
                    for name, rows, task in sources
                ],
                "split": {"num_test_examples": 24},
            },
        }
    )


def rows_of(artifact: Artifact, side: str) -> list[dict[str, Any]]:
    return parquet.read_table(artifact.path / side).to_pylist()


def documents(rows: list[dict[str, Any]]) -> set[str]:
    return {row["messages"][1]["content"].removesuffix(f" {WORDS[0]}") for row in rows}


@pytest.mark.usefixtures("ray_cluster")
def test_tasks_share_documents_and_neither_lose_nor_leak_them(
    tmp_path: Path, tiny_model: Path
) -> None:
    base = BaseModel("tiny", tiny_model, "0" * 64, "none")
    artifact = prepare(mixed(tmp_path, (None, None)), Workspace(tmp_path / "ws"), base).artifact
    train, test, removed = (rows_of(artifact, side) for side in ("train", "test", "removed"))

    # Only what repeats a row of its own task is removed, though ten rows say the same in both.
    assert {row["stage"] for row in removed} <= {"dedup", "split"}
    duplicates = [row for row in removed if row["stage"] == "dedup"]
    assert len(duplicates) == NUM_DOCUMENTS // 3
    assert all("labels.jsonl" in row["source"] for row in duplicates)
    ids = [row["row_id"] for row in [*train, *test, *removed]]
    assert len(set(ids)) == len(ids) == 2 * NUM_DOCUMENTS + NUM_DOCUMENTS // 3 + 1
    # A document is on one side, whatever is asked about it; each task has its share of the test.
    assert documents(train).isdisjoint(documents(test))
    assert Counter(row["task"] for row in test) == {"label": 12, "title": 12}
    for row in [*train, *test]:
        asked = {"label": "Which one?", "title": "Give it a title."}[row["task"]]
        assert row["messages"][0] == {"role": "system", "content": asked}
        # A user's own column of that name is carried under another.
        assert (row["original_task"] is not None) == (row["task"] == "label")

    card = json.loads((artifact.path / "card.json").read_text())
    # Another answer in another task is no contradiction; another one in the same task is.
    assert card["conflicts"]["num_same_prompt"] == 1
    (conflict,) = card["conflicts"]["examples"]
    assert all("labels.jsonl" in row["source"] for row in conflict["rows"])
    assert [task["name"] for task in card["tasks"]] == ["label", "title"]
    assert sum(task["num_train"] for task in card["tasks"]) == len(train)
    page = (artifact.path / "README.md").read_text()
    assert "a mixture of `label`, `title`" in page
    assert "Stratified by task:" in page

    # Weights change the train rows only.
    weighted = prepare(mixed(tmp_path, (1, 3)), Workspace(tmp_path / "ws"), base).artifact
    parts = Counter(row["task"] for row in rows_of(weighted, "train"))
    assert parts["title"] == 3 * parts["label"]
    assert [r["row_id"] for r in rows_of(weighted, "test")] == [r["row_id"] for r in test]
    left_out = {row["reason"] for row in rows_of(weighted, "removed") if row["stage"] == "split"}
    assert "beyond its task's part of the mixture" in left_out

    # A task alone has the same rows of its own, and the test stays whole.
    config = mixed(tmp_path, (1, 3))
    data = config.data.model_copy(update={"train_tasks": ["title"]})
    config = config.model_copy(update={"data": data})
    alone = prepare(config, Workspace(tmp_path / "ws"), base).artifact
    titles = {row["row_id"] for row in rows_of(weighted, "train") if row["task"] == "title"}
    assert {row["row_id"] for row in rows_of(alone, "train")} == titles
    assert [r["row_id"] for r in rows_of(alone, "test")] == [r["row_id"] for r in test]
    assert train_rows_of(alone) == {"label": 0, "title": len(titles)}
