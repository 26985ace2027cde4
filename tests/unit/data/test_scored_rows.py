"""Rows of the user's own to score: marks change what is right for them too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tuneloop.artifacts import Published, Workspace
from tuneloop.config import TuneloopConfig
from tuneloop.data.scored_rows import prepare_scored_rows
from tuneloop.errors import DataError
from tuneloop.evals.scoring.questions import read_questions
from tuneloop.marks import Mark


def make_config(tmp_path: Path, rows: list[dict[str, Any]], layout: str) -> TuneloopConfig:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [{"path": str(file), "format": layout}]
    return TuneloopConfig.model_validate(
        {
            "name": "faq",
            "task": {"type": "generation"},
            "model": {"base": "x"},
            "data": {"sources": sources},
            "evaluation": {"sources": sources},
        }
    )


def test_rows_are_asked_with_the_tools_that_they_list(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}
    call = {"type": "function", "function": {"name": "now", "arguments": "{}"}}
    asked = {"role": "user", "content": "What time is it?"}
    rows = [
        {"messages": [asked, {"role": "assistant", "tool_calls": [call]}], "tools": [tool]},
        {"messages": [asked, {"role": "assistant", "content": "I cannot know."}]},
    ]
    config = make_config(tmp_path, rows, "messages")
    scored = prepare_scored_rows(config, Workspace(tmp_path / "ws")).artifact
    first, second = read_questions(scored)
    assert json.loads(first.tools) == [tool]
    assert second.tools == ""


def test_a_moved_file_is_the_same_rows_and_fewer_bad_ones_may_be_tolerated(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"question": "q?", "answer": "a"}, {"question": "r?"}]
    config = make_config(tmp_path, rows, "question_answer")
    workspace = Workspace(tmp_path / "ws")

    def prepared(file: Path, ratio: float) -> Published:
        source = config.evaluation.sources[0].model_copy(update={"path": str(file)})
        changed = {"evaluation": config.evaluation.model_copy(update={"sources": [source]})}
        changed["data"] = config.data.model_copy(update={"max_bad_rows_ratio": ratio})
        return prepare_scored_rows(config.model_copy(update=changed), workspace)

    first = prepared(tmp_path / "rows.jsonl", 0.5)
    (tmp_path / "elsewhere").mkdir()
    moved = (tmp_path / "rows.jsonl").rename(tmp_path / "elsewhere" / "rows.jsonl")
    again = prepared(moved, 0.6)
    assert (again.reused, again.artifact.ref) == (True, first.artifact.ref)
    with pytest.raises(DataError, match="answer"):
        prepared(moved, 0.4)


def test_marks_correct_accept_and_drop(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"question": f"q {i}?", "answer": f"a {i}"} for i in range(4)]
    # A column of the user's own says so as well.
    rows[3] |= {"accepted_answers": ["mine"]}
    config = make_config(tmp_path, rows, "question_answer")
    workspace = Workspace(tmp_path / "ws")
    first = prepare_scored_rows(config, workspace).artifact
    ids = [question.example_id for question in read_questions(first)]
    assert [question.accepted for question in read_questions(first)] == [(), (), (), ("mine",)]

    def mark(kind: str, row_id: str, answer: str = "") -> Mark:
        return Mark(kind, row_id, first.ref, "ann", answer, created_at="2026-11-28")  # type: ignore[arg-type]

    marks = [
        mark("bad_reference", ids[0], "right"),
        mark("accept", ids[1], "also"),
        mark("bad_row", ids[2]),
        mark("bad_row", "0" * 20),
        mark("accept", ids[3], "too"),
    ]
    second = prepare_scored_rows(config, workspace, marks).artifact
    assert second.ref == "datasets/faq-scored@v2"
    assert [(q.reference, q.accepted) for q in read_questions(second)] == [
        ("right", ()), ("a 1", ("also",)), ("a 3", ("mine", "too")),
    ]  # fmt: skip
    fixes = json.loads((second.path / "card.json").read_text())["fixes"]
    assert [item["action"] for item in fixes["applied"]] == ["correct", "accept", "drop", "accept"]
    assert fixes["applied"][0]["before"] == "a 0"
    assert list(fixes["refused"]) == [marks[3].uid]
    assert prepare_scored_rows(config, workspace, marks).reused
    assert prepare_scored_rows(config, workspace).artifact.ref == first.ref
