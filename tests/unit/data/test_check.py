"""What `check` shows of a row, and what it knows of the split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tuneloop.config import TuneloopConfig
from tuneloop.data.check import _token_sample, check
from tuneloop.models.bases.source import resolve_base
from tuneloop.models.chat.renderer import Renderer
from tuneloop.records import Sample


@pytest.mark.parametrize("text", ["Größe M ✅ 東京は首都です。", "Great! 🎉🎉", "Привет", "ok"])
def test_a_character_of_several_tokens_is_shown_whole(tiny_model: Path, text: str) -> None:
    renderer = Renderer.load(tiny_model)
    ids = renderer.tokenizer.encode(text, add_special_tokens=False)
    shown = _token_sample("rows.jsonl:1", Sample(ids, [1] * len(ids)), renderer).tokens
    assert "".join(piece for piece, _ in shown) == text
    assert not any("\ufffd" in piece for piece, _ in shown)
    # A text that ends within a character is shown as far as it goes.
    cut = _token_sample("rows.jsonl:1", Sample(ids[:-1], [1] * (len(ids) - 1)), renderer).tokens
    assert len(cut) <= len(ids)


@pytest.mark.parametrize(
    ("rows", "data", "told"),
    [
        ([("q", "a")], {}, "the rows cannot be split"),
        ([("q", "a"), ("Q ", "b")], {}, "the rows cannot be split"),
        ([("q", "a"), ("r", "b")], {"split": {"group_by": "same"}}, "the rows cannot be split"),
        ([("q", "a"), ("r", "b")], {"split": {"num_test_examples": 2}}, "not enough rows"),
        ([("q", "a"), ("r", "b")], {"num_train_examples": 2}, "not enough rows"),
        ([("q", "a"), ("r", "b")], {"split": {"validation_ratio": 0.1}}, "not enough rows"),
        ([("q", "a"), ("r", "b")], {"split": {"group_by": "answer"}}, ""),
        ([("q", "a"), ("r", "a"), ("s", "a")], {"split": {"validation_ratio": 0.1}}, ""),
    ],
)
def test_rows_that_cannot_be_split_are_told(
    tmp_path: Path, tiny_model: Path, rows: list[tuple[str, str]], data: dict[str, Any], told: str
) -> None:
    lines = [{"question": q, "answer": a, "same": 1} for q, a in rows]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    sources = [{"path": str(path), "format": "question_answer"}]
    config = TuneloopConfig.model_validate(
        {
            "name": "t",
            "task": {"type": "generation"},
            "model": {"base": str(tiny_model)},
            "data": {"sources": sources, "max_seq_len": 128, **data},
        }
    )
    found = check(config, resolve_base(str(tiny_model)))
    assert [told in problem.what for problem in found.findings] == [True] * bool(told)


def test_a_part_of_the_prompt_that_is_not_read_is_told(tmp_path: Path, tiny_model: Path) -> None:
    rows = [{"question": f"q {i}", "answer": f"a {i}", "context": f"c {i}"} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def told(source: dict[str, Any]) -> list[str]:
        data = {"sources": [{"path": str(tmp_path / "rows.jsonl"), **source}]}
        task = {"type": "generation"}
        model = {"base": str(tiny_model)}
        made = {"name": "t", "task": task, "model": model, "data": data}
        config = TuneloopConfig.model_validate(made)
        return [notice.got for notice in check(config, resolve_base(config.model.base)).notices]

    assert told({"format": "question_answer"}) == ["context"]
    columns = {"prompt": "context", "completion": "answer"}
    assert told({"format": "columns", "columns": columns}) == []


@pytest.mark.parametrize(
    ("answer", "markers", "number"),
    [
        ("a</s>", "keep", 2),
        ("a</s>", "strip", 0),
        ("<s>a</s> b", "keep", 1),
        ("a <s>b</s> c", "keep", 0),
    ],
)
def test_rows_that_a_template_was_put_around_are_told(
    tmp_path: Path, tiny_model: Path, answer: str, markers: str, number: int
) -> None:
    rows = [{"prompt": f"q {i}", "completion": answer} for i in range(number or 2)]
    rows += [{"prompt": f"r {i}", "completion": "plain"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = {"path": str(tmp_path / "rows.jsonl"), "format": "prompt_completion"}
    config = TuneloopConfig.model_validate(
        {
            "name": "t",
            "task": {"type": "generation"},
            "model": {"base": str(tiny_model)},
            "data": {"sources": [source], "filters": {"template_markers": markers}},
        }
    )
    told = [notice.what for notice in check(config, resolve_base(config.model.base)).notices]
    about_markers = [what for what in told if "marks of a chat template" in what]
    expected = [f"{number} of {len(rows)} rows: marks"] if number else []
    assert [what[: len(expected[0])] for what in about_markers] == expected


@pytest.mark.parametrize(("column", "num_findings"), [("unit", 0), ("unti", 1)])
def test_a_column_to_group_by_has_to_be_there(
    tmp_path: Path, tiny_model: Path, column: str, num_findings: int
) -> None:
    rows = [{"question": f"q {i}", "answer": f"a {i}", "unit": f"u{i // 2}"} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = TuneloopConfig.model_validate(
        {
            "name": "grouped",
            "task": {"type": "generation"},
            "model": {"base": str(tiny_model)},
            "data": {
                "sources": [{"path": str(tmp_path / "rows.jsonl"), "format": "question_answer"}]
            },
            "evaluation": {"group_by": column},
        }
    )
    findings = check(config, resolve_base(config.model.base)).findings
    assert [f.where for f in findings] == ["evaluation.group_by"] * num_findings
    assert all("unit" in f.allowed for f in findings)
