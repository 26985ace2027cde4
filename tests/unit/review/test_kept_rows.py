"""Test rows kept from the playground."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tuneloop.errors import ArtifactError
from tuneloop.review.kept_rows import KeptRow, keep_row, kept_rows_file


def test_a_row_is_kept_once_and_lines_end_with_it(tmp_path: Path) -> None:
    file = kept_rows_file(f"file://{tmp_path}", "faq: read/../it")
    assert file.parent == tmp_path / "review" / "test-rows"
    assert file.name == "faq-read-..-it.jsonl"
    assert keep_row(file, KeptRow("Wo?\u2028", "Zürich", "ann"))
    assert not keep_row(file, KeptRow("Wo?\u2028", "Zürich", "bob"))
    assert keep_row(file, KeptRow("When?", "At noon", "bob"))
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]
    assert [(row["question"], row["answer"], row["reviewer"]) for row in rows] == [
        ("Wo?\u2028", "Zürich", "ann"),
        ("When?", "At noon", "bob"),
    ]


def test_two_right_answers_and_a_damaged_line_are_refused(tmp_path: Path) -> None:
    file = kept_rows_file(tmp_path, "")
    keep_row(file, KeptRow("Where?", "Here", "ann"))
    with pytest.raises(ArtifactError, match="another right answer"):
        keep_row(file, KeptRow("Where?", "There", "ann"))
    file.write_text(file.read_text() + "{broken\n")
    before = file.read_text()
    with pytest.raises(ArtifactError, match="not a test row"):
        keep_row(file, KeptRow("Why?", "So", "ann"))
    assert file.read_text() == before
