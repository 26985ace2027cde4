"""Rows that a dataset trains on are found among any rows, however they were copied."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tuneloop.artifacts import Artifact, Workspace
from tuneloop.config import TaskConfig
from tuneloop.data.decontamination.seen import datasets_of, find_seen

VOCABULARY = [f"w{i}" for i in range(3000)]
TEMPLATE = "Read the text below with care, then answer the question about it in one short sentence."
TASK = {"type": "generation", "instruction": "Answer in one sentence, and only from what you know."}


def words(seed: object, count: int) -> str:
    return " ".join(random.Random(str(seed)).choices(VOCABULARY, k=count))


def row(row_id: str, question: str, answer: str) -> dict[str, Any]:
    turns = [("system", TASK["instruction"]), ("user", question), ("assistant", answer)]
    messages = [{"role": role, "content": content} for role, content in turns]
    return {"row_id": row_id, "messages": messages}


def publish(
    workspace: Workspace, rows: list[dict[str, Any]], name: str = "d", **data: Any
) -> Artifact:
    with workspace.draft("datasets", name, name * 64) as draft:
        (draft.path / "train").mkdir()
        for number in range(0, len(rows), 100):
            file = draft.path / "train" / f"part-{number:05}.parquet"
            pq.write_table(pa.Table.from_pylist(rows[number : number + 100]), file)
        config = {"task": TASK, "data": data}
        return draft.publish(config=config, resources={}, inputs=[], metrics={})


def test_planted_leaks_are_found_and_shared_templates_are_not(tmp_path: Path) -> None:
    # Long and short questions; every second one stands in a template that all rows share.
    asked = [
        row(
            f"test{i}",
            f"{TEMPLATE}\n\n" * (i % 2) + words(("q", i), (5, 12, 40)[i % 3]),
            words(("a", i), 6),
        )
        for i in range(240)
    ]
    clean = [
        row(f"train{i}", f"{TEMPLATE}\n\n" * (i % 2) + words(("t", i), 30), words(("b", i), 6))
        for i in range(400)
    ]
    copies: dict[str, dict[str, Any]] = {}
    for number, one in enumerate(asked[:120]):
        question, answer = (turn["content"] for turn in one["messages"][1:])
        if number % 4 == 0:
            leak = row(one["row_id"], question, answer)
        elif number % 4 == 1:
            leak = row(f"x{number}", f"  {question.upper()} ", "another answer")
        elif number % 4 == 2 and len(question.split()) > 8:
            leak = row(f"x{number}", f"Good morning! {question}, please?", answer)
        else:
            before, after = words(("c", number), 60), words(("d", number), 60)
            leak = row(f"x{number}", "Go on.", f"{before} {question} {answer} {after}")
        copies[one["row_id"]] = leak
    # One train row that quotes many.
    many = asked[120:130]
    quoted = "\n".join(turn["content"] for one in many for turn in one["messages"][1:])
    train = [*clean[:200], *copies.values(), row("list", "Go on.", quoted), *clean[200:]]
    found = find_seen(publish(Workspace(tmp_path), train), asked, TaskConfig(**TASK))
    planted = {*copies, *(one["row_id"] for one in many)}
    assert found >= planted, sorted(planted - found)
    assert found <= planted
    # The instruction is nobody's own, also where it is not known whose it is.
    assert find_seen(publish(Workspace(tmp_path), clean, "e"), asked, TaskConfig(**TASK)) == set()


def test_rows_to_score_are_compared_as_the_filters_have_mended_the_train_rows(
    tmp_path: Path,
) -> None:
    workspace, train = Workspace(tmp_path), [row("t", "Is the café open?", "Yes")]
    asked = [row("a", "Is the cafÃ© open?", "No"), row("b", "Is the café shut?", "No")]
    task = TaskConfig(**TASK)
    assert find_seen(publish(workspace, train), asked, task) == set()
    mended = publish(workspace, train, "e", filters={"repair_text": True, "min_characters": 99})
    assert find_seen(mended, asked, task) == {"a"}


def test_what_a_base_was_trained_on_counts(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    first, second = (publish(workspace, [row(n, n, n)], n) for n in ("a", "b"))
    folders = []
    for number, dataset in enumerate((first, second)):
        folder = tmp_path / f"model-{number}"
        folder.mkdir()
        config = {"dataset": dataset.fingerprint, "base": str(folders[-1]) if folders else "tiny"}
        (folder / "artifact.json").write_text(json.dumps({"config": config}))
        folders.append(folder)
    assert [d.ref for d in datasets_of(workspace, folders[1]) or []] == [second.ref, first.ref]
    assert datasets_of(workspace, tmp_path) is None
    lost = {"config": {"dataset": "0" * 64, "base": str(folders[0])}}
    (folders[1] / "artifact.json").write_text(json.dumps(lost))
    assert datasets_of(workspace, folders[1]) is None


@pytest.mark.parametrize("train", [[], [{"row_id": "t", "text": words("t", 50)}]])
def test_documents_and_empty_splits(tmp_path: Path, train: list[dict[str, Any]]) -> None:
    asked = [{"row_id": f"r{i}", "text": words(i, 60)} for i in range(3)]
    if train:
        train[0]["text"] += " " + asked[1]["text"]
    task = TaskConfig(type="language_modeling")
    found = find_seen(publish(Workspace(tmp_path), train), asked, task)
    assert found == ({"r1"} if train else set())
