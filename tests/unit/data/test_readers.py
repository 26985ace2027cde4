from __future__ import annotations

import bz2
import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest

from tuneloop.config import SourceConfig, TaskConfig, TuneloopConfig
from tuneloop.data.hashing.content import Content
from tuneloop.data.schema import Rejection, SourceRow
from tuneloop.data.sources.bad_rows import (
    BadRow,
    refuse_bad_rows,
    refuse_mismatched_formats,
    refuse_too_many_rows,
)
from tuneloop.data.sources.files import find_files
from tuneloop.data.sources.readers import read_source
from tuneloop.errors import DataError, ResourceError


def config_for(path: Path | str, layout: str, **more: Any) -> TuneloopConfig:
    source = {"path": str(path), "format": layout, **more.pop("source", {})}
    return TuneloopConfig.model_validate(
        {
            "name": "t",
            "task": more.pop("task", {"type": "generation"}),
            "model": {"base": "x"},
            "data": {"sources": [source], **more},
        }
    )


def read(config: TuneloopConfig) -> list[SourceRow]:
    files = find_files(config.data.sources)
    return [row for i, file in enumerate(files) for row in read_source(file, i, config)]


def turns(row: SourceRow) -> list[tuple[str, str]]:
    assert row["rejection"] is None, row["rejection"]
    return [(message["role"], message["content"]) for message in row["messages"]]


def rejection(row: SourceRow) -> Rejection:
    assert row["rejection"] is not None
    return row["rejection"]


def bad_rows(rows: list[SourceRow]) -> list[BadRow]:
    return [BadRow(row["source"], rejection(row)) for row in rows]


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


ROWS = {
    "alpaca": {"instruction": "Add.", "input": "1 1", "output": "2"},
    "prompt_completion": {"prompt": "Add.\n\n1 1", "completion": " 2\n"},
    "question_answer": {"question": "Add.\n\n1 1 \n", "answer": "2"},
    "messages": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Add.\n\n1 1"}]},
            {"role": "assistant", "content": "2"},
        ]
    },
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": "Add.\n\n1 1"},
            {"from": "gpt", "value": "2"},
        ]
    },
}


@pytest.mark.parametrize("layout", ROWS)
def test_every_format_gives_the_same_conversation(layout: str, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", ROWS[layout])
    (row,) = read(config_for(path, layout))
    assert turns(row) == [("user", "Add.\n\n1 1"), ("assistant", "2")]
    assert row["source"] == f"{path}:1"


def test_every_file_type_gives_the_same_rows(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    rows = [{"question": f"q{i}", "answer": f'a "{i}", ä\nx'} for i in range(3)]
    lines(tmp_path / "a.jsonl", *rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    quoted = [f'{r["question"]},"{r["answer"].replace(chr(34), chr(34) * 2)}"' for r in rows]
    (tmp_path / "a.csv").write_text("\n".join(["question,answer", *quoted]) + "\n")
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink:
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    plain = (tmp_path / "a.jsonl").read_bytes()
    with pa.CompressedOutputStream(str(tmp_path / "c.jsonl.zst"), "zstd") as sink:
        sink.write(plain)
    (tmp_path / "d.jsonl.bz2").write_bytes(bz2.compress(plain))
    expected = [[("user", r["question"]), ("assistant", r["answer"])] for r in rows]
    names = ("a.jsonl", "a.json", "b.jsonl.gz", "c.jsonl.zst", "d.jsonl.bz2")
    for name in (*names, "a.csv", "a.parquet", "a.arrow"):
        found = read(config_for(tmp_path / name, "question_answer"))
        assert [turns(row) for row in found] == expected, name
        assert len({row["key"] for row in found}) == 3
    everything = read(config_for(tmp_path, "question_answer"))
    assert len(everything) == 24
    assert len({row["key"] for row in everything}) == 24
    assert len(read(config_for(tmp_path / "*.jsonl*", "question_answer"))) == 12


def test_a_null_that_parquet_may_have_made_of_an_absent_field_is_told(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    rows = [{"question": "q", "answer": {"a": 1, "b": [{"c": 2}]}},
            {"question": "r", "answer": {"a": 1}}]  # fmt: skip
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    task = {"type": "extraction"}
    for name, answer, told in (
        (lines(tmp_path / "a.jsonl", *rows), '{"a": 1}', ""),
        (tmp_path / "a.parquet", '{"a": 1, "b": null}', "may be a field that is absent"),
    ):
        whole, short = read(config_for(name, "question_answer", task=task))
        assert json.loads(turns(whole)[1][1]) == rows[0]["answer"]
        assert turns(short)[1][1] == answer
        assert whole["changes"] == ""
        assert told in short["changes"]
        assert bool(told) == bool(short["changes"])
        assert ", " not in short["changes"]


def test_a_saved_dataset_is_read_and_one_of_several_splits_has_to_be_named(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    rows = [{"question": f"q{i}", "answer": f"a{i}", "level": i} for i in range(5)]
    dataset = Dataset.from_list(rows)
    dataset.save_to_disk(tmp_path / "one", num_shards=2)
    found = read(config_for(tmp_path / "one", "question_answer"))
    assert [turns(row)[0][1] for row in found] == [f"q{i}" for i in range(5)]
    assert json.loads(found[4]["extra"]) == {"level": 4}

    DatasetDict({"train": dataset, "extra": dataset}).save_to_disk(tmp_path / "many")
    with pytest.raises(DataError, match="several splits") as caught:
        read(config_for(tmp_path / "many", "question_answer"))
    assert caught.value.problems[0].allowed == "extra, train"
    assert len(read(config_for(tmp_path / "many" / "train", "question_answer"))) == 5


@pytest.mark.parametrize("layout", ["messages", "sharegpt"])
def test_conversations_of_several_turns_keep_them_all(layout: str, tmp_path: Path) -> None:
    said = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello."), ("user", "And?")]
    said.append(("assistant", "Bye."))
    if layout == "messages":
        row = {"messages": [{"role": role, "content": text} for role, text in said]}
    else:
        names = {"user": "human", "assistant": "gpt", "system": "system"}
        row = {"conversations": [{"from": names[role], "value": text} for role, text in said]}
    path = lines(tmp_path / "a.jsonl", row)
    (found,) = read(config_for(path, layout))
    assert turns(found) == said
    task = {"type": "generation", "instruction": "Answer."}
    (found,) = read(config_for(path, layout, task=task))
    assert turns(found) == [("system", "Answer.\n\nBe brief."), *said[1:]]


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        (["user", "user", "assistant"], "do not alternate"),
        (["user", "assistant", "user"], "do not alternate"),
        (["assistant", "user", "assistant"], "do not alternate"),
        (["user", "system", "assistant"], "not the first"),
        (["user", "tool", "assistant"], "do not alternate"),
        (["user", "critic", "assistant"], "a role that is not supported"),
        (["system"], "do not alternate"),
    ],
)
def test_turns_that_are_no_conversation_are_refused(
    roles: list[str], expected: str, tmp_path: Path
) -> None:
    row = {"messages": [{"role": role, "content": "x"} for role in roles]}
    (found,) = read(config_for(lines(tmp_path / "a.jsonl", row), "messages"))
    assert expected in rejection(found).what


def test_csv_rows_name_their_first_line(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('question,answer\nq,"two\nlines"\nonly one\nq2,a2\n')
    first, bad, last = read(config_for(path, "question_answer"))
    assert first["source"].endswith(":2")
    assert bad["source"].endswith(":4")
    assert "another number of columns" in rejection(bad).what
    assert last["source"].endswith(":5")


def test_malformed_line_has_file_and_line_and_spares_the_others(tmp_path: Path) -> None:
    good = {"question": "q", "answer": "a"}
    path = lines(tmp_path / "a.jsonl", *[good] * 16, '{"question": "q', *[good] * 3)
    rows = read(config_for(path, "question_answer"))
    bad = [row for row in rows if row["rejection"]]
    assert [row["source"] for row in bad] == [f"{path}:17"]
    with pytest.raises(DataError) as caught:
        refuse_bad_rows(
            bad_rows(bad),
            len(rows),
            config_for(path, "question_answer").data,
        )
    (problem,) = caught.value.problems
    assert problem.what == "the line is not valid JSON"
    assert problem.where == f"{path}:17"
    assert "data.max_bad_rows_ratio=0.05" in problem.remedy
    allowed = config_for(path, "question_answer", max_bad_rows_ratio=0.05).data
    refuse_bad_rows(bad_rows(bad), len(rows), allowed)


@pytest.mark.parametrize(
    ("row", "layout", "expected"),
    [
        ({"question": "q", "answer": " \n"}, "question_answer", "`answer` is empty"),
        ({"question": "q", "answer": None}, "question_answer", "`answer` is empty"),
        ({"question": "q", "answer": " \u200b\ufeff\x07"}, "question_answer", "`answer` is empty"),
        ({"question": "q", "answer": [3]}, "question_answer", "`answer` is not text"),
        ({"question": "q"}, "question_answer", "no column `answer`"),
        ([1], "question_answer", "the row is not an object"),
        ({"messages": []}, "messages", "`messages` is not a list of turns"),
        ({"messages": [{"role": "user", "content": "x"}]}, "messages", "do not alternate"),
        ({"messages": [{"role": "critic", "content": "x"}]}, "messages", "role that is not"),
        ({"messages": [{"role": "user"}]}, "messages", "no `role` and `content`"),
    ],
)
def test_bad_rows_say_what_is_wrong(row: Any, layout: str, expected: str, tmp_path: Path) -> None:
    (found,) = read(config_for(lines(tmp_path / "a.jsonl", row), layout))
    assert expected in rejection(found).what


def test_half_a_surrogate_pair_is_a_bad_row(tmp_path: Path) -> None:
    whole = {"question": "who? \U0001f600", "answer": "me", "note": "x"}
    path = lines(
        tmp_path / "a.jsonl", whole, {**whole, "note": "\ud83d"}, {**whole, "question": "a \udfff"}
    )
    good, *bad = read(config_for(path, "question_answer"))
    assert turns(good)[0] == ("user", "who? \U0001f600")
    for row, half in zip(bad, (r"\ud83d", r"\udfff"), strict=True):
        assert rejection(row).what == "half of a surrogate pair stands alone"
        assert half in rejection(row).got
        json.dumps(row, ensure_ascii=False).encode()  # what is kept of it can be written


def test_wrong_column_suggests_the_right_one_once(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", *[{"question": f"q{i}", "anwser": "a"} for i in range(50)])
    config = config_for(path, "question_answer")
    bad = bad_rows(read(config))
    with pytest.raises(DataError) as caught:
        refuse_bad_rows(bad, 50, config.data)
    (problem,) = caught.value.problems
    assert "did you mean `anwser`?" in problem.remedy
    assert "and 47 more" in problem.where


def test_instruction_joins_the_rows_own_system_message(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"q": "x", "a": "y", "s": "Be brief."})
    config = config_for(
        path,
        "columns",
        task={"type": "generation", "instruction": "Answer."},
        source={"columns": {"prompt": "q", "completion": "a", "system": "s"}},
    )
    (row,) = read(config)
    assert turns(row)[0] == ("system", "Answer.\n\nBe brief.")


def test_rows_that_have_the_instruction_already_do_not_get_it_twice(tmp_path: Path) -> None:
    # As the rows of a dataset have it, which `generate` says to name as a source.
    def row(system: str) -> dict[str, Any]:
        said = [("system", system), ("user", "Which box?"), ("assistant", "The second.")]
        return {"messages": [{"role": role, "content": text} for role, text in said]}

    told = ["Answer.", "Answer.\n\nBe brief.", "Answer. In Latin.", "answer."]
    path = lines(tmp_path / "a.jsonl", *map(row, told))
    task = {"type": "generation", "instruction": " Answer.\n"}
    found = read(config_for(path, "messages", task=task))
    assert [turns(one)[0][1] for one in found] == [
        *told[:2],
        "Answer.\n\nAnswer. In Latin.",
        "Answer.\n\nanswer.",
    ]
    task["instruction"] = "Answer.\n\nOne of these only: a, b"
    (first, *_) = read(config_for(path, "messages", task=task))
    assert turns(first)[0] == ("system", task["instruction"])
    task["instruction"] = "Answer."
    own = Content.of(TaskConfig.model_validate(task)).own
    assert [len(own(one).messages) for one in found] == [2, 3, 3, 3]


def test_answers_are_held_against_the_task(tmp_path: Path) -> None:
    labels = {"type": "classification", "labels": ["good", "bad"]}
    path = lines(
        tmp_path / "a.jsonl",
        {"prompt": "x", "completion": "good "},
        {"prompt": "x", "completion": "Good"},
    )
    first, second = read(config_for(path, "prompt_completion", task=labels))
    assert turns(first)[-1] == ("assistant", "good")
    assert "not one of task.labels" in rejection(second).what
    assert "did you mean `good`?" in rejection(second).remedy

    path = lines(
        tmp_path / "b.jsonl",
        {"prompt": "x", "completion": '{"name": "n"}'},
        {"prompt": "x", "completion": {"name": "ä"}},
        {"prompt": "x", "completion": '{"nam": "n"}'},
        {"prompt": "x", "completion": "name"},
        {"prompt": "x", "completion": "[]"},
    )
    task = {"type": "extraction", "fields": ["name"]}
    rows = read(config_for(path, "prompt_completion", task=task))
    assert turns(rows[1])[-1][1] == '{"name": "ä"}'
    assert [bool(row["rejection"]) for row in rows] == [False, False, True, True, True]
    assert rejection(rows[2]).what == "the answer has no field `name`"


def test_a_mended_answer_is_held_against_the_task_again(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "a.jsonl",
        {"question": "q", "answer": '{"card": "4111 1111 1111 1111"}'},
        {"question": "q", "answer": '{"card": 4111111111111111}'},
    )
    config = config_for(
        path,
        "question_answer",
        task={"type": "extraction"},
        filters={"personal_data": "mask"},
    )
    quoted, bare = read(config)
    assert turns(quoted)[-1][1] == '{"card": "[CARD]"}'
    assert quoted["changes"] == "personal data masked"
    assert rejection(bare).what == "the answer is not valid JSON"


def test_no_white_space_is_left_around_a_repaired_answer(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"question": "q \u200b", "answer": "Yes \u200b"})
    (row,) = read(config_for(path, "question_answer", filters={"repair_text": True}))
    assert turns(row)[1] == ("assistant", "Yes")


def test_the_users_columns_are_carried_and_grouped_by(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "a.jsonl",
        {"question": "q", "answer": "a", "topic": "t", "source": "mine", "n": 1, "synthetic": True},
        {"question": "q", "answer": "a"},
    )
    rows = read(config_for(path, "question_answer", split={"group_by": "topic"}))
    assert json.loads(rows[0]["extra"]) == {"topic": "t", "original_source": "mine", "n": 1}
    assert rows[0]["group"] == "t"
    assert rows[0]["synthetic"] is True
    assert rejection(rows[1]).what == "no column `topic`"


def test_rows_of_one_group_are_one_however_the_value_is_written(tmp_path: Path) -> None:
    values = [7, 7.0, "7.0", " 7 ", math.nan, " ", "nan", True, [1], 7.5]
    path = lines(tmp_path / "a.jsonl", *({"question": "q", "answer": "a", "n": v} for v in values))
    rows = read(config_for(path, "question_answer", split={"group_by": "n"}))
    assert [row["group"] for row in rows] == ["7"] * 4 + [""] * 3 + ["true", "[1]", "7.5"]
    lines(path, *({"question": "q", "answer": "a", "n": v} for v in ("Zo\u00eb", "Zoe\u0308")))
    named = read(config_for(path, "question_answer", split={"group_by": "n"}))
    assert [row["group"] for row in named] == ["Zo\u00eb"] * 2
    assert {rejection(row).what for row in rows[4:7]} == {
        "`n` is empty, and data.split.group_by needs it"
    }


def test_sources_that_lead_nowhere_are_told_all_at_once(tmp_path: Path) -> None:
    lines(tmp_path / "faq.jsonl", ROWS["question_answer"])
    config = TuneloopConfig.model_validate(
        {
            "name": "t",
            "task": {"type": "generation"},
            "model": {"base": "x"},
            "data": {
                "sources": [
                    {"path": f"{tmp_path}/fag.jsonl", "format": "question_answer"},
                    {"path": f"{tmp_path}/*.csv", "format": "question_answer"},
                    {"path": "docstrings:numpy", "format": "question_answer"},
                ]
            },
        }
    )
    with pytest.raises(DataError) as caught:
        find_files(config.data.sources)
    told = [(problem.what, problem.where) for problem in caught.value.problems]
    assert told == [
        ("no such file", "data.sources.0.path"),
        ("a glob matches no file", "data.sources.1.path"),
        ("no such source", "data.sources.2.path"),
    ]
    assert "faq.jsonl" in caught.value.problems[0].remedy


@pytest.mark.parametrize(
    ("path", "what", "remedy"),
    [
        ("", "the path of a source is empty", ""),
        (" ", "the path of a source is empty", ""),
        ("C:\\data\\rows.jsonl", "no such file", "folders are separated by `/`"),
        ("https://example.org/rows.jsonl", "cannot open a data source", "download the file"),
        ("rows [1]/*.jsonl", "a glob matches no file", "`[[]` stands for a bracket"),
    ],
)
def test_paths_that_are_none_say_what_to_write(path: str, what: str, remedy: str) -> None:
    source = SourceConfig.model_validate({"path": path, "format": "question_answer"})
    with pytest.raises(DataError) as caught:
        find_files([source])
    (problem,) = caught.value.problems
    assert problem.what == what
    assert remedy in problem.remedy


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.json", b'[{"a": 1}', "the file is not valid JSON"),
        ("a.json", b"3", "the file is not a list"),
        ("a.parquet", b"no parquet", "the file is not valid Parquet"),
        ("a.jsonl.gz", b"no gzip", "the file cannot be read"),
        ("a.csv", b"question,answer\n\xff,b\n", "the file is not UTF-8"),
    ],
)
def test_a_broken_file_is_never_tolerated(
    name: str, content: bytes, expected: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    config = config_for(tmp_path / name, "question_answer", max_bad_rows_ratio=1)
    bad = bad_rows([row for row in read(config) if row["rejection"]])
    with pytest.raises(DataError, match=expected):
        refuse_bad_rows(bad, len(bad) + 100, config.data)


def test_empty_data_and_mismatched_format_are_refused(tmp_path: Path) -> None:
    config = config_for(lines(tmp_path / "a.jsonl"), "question_answer")
    assert read(config) == []
    with pytest.raises(DataError, match="the data set is empty"):
        refuse_bad_rows([], 0, config.data)
    with pytest.raises(DataError, match="format and task do not fit"):
        refuse_mismatched_formats(config_for(tmp_path, "text"))


def test_text_files_are_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    lines(tmp_path / "b.jsonl", {"text": "three"})
    rows = read(config_for(tmp_path, "text", task={"type": "language_modeling"}))
    assert [row["text"] for row in rows] == ["one\n\ntwo", "three"]


def test_rows_that_this_process_cannot_hold_are_refused_before_the_work() -> None:
    refuse_too_many_rows(1000)
    with pytest.raises(ResourceError, match="too many rows for the memory") as caught:
        refuse_too_many_rows(10**12)
    problem = caught.value.problems[0]
    assert problem.got.startswith("1,000,000,000,000 rows")
    assert problem.allowed
    assert problem.remedy


def test_a_row_that_gives_a_key_twice_is_refused_alone(tmp_path: Path) -> None:
    good, twice = '{"question": "q", "answer": "a"}', '{"question": "r", "answer": "b", "x": %s}'
    nested = twice % '[{"k": 1, "k": 2}]'
    lines(tmp_path / "a.jsonl", good, '{"question": "r", "answer": "b", "answer": "c"}', nested)
    (tmp_path / "b.json").write_text(f"[{nested}, {good}, {twice % '{}'}]")
    (tmp_path / "c.json").write_text(f"{good}\n{nested}\n")
    rows = read(config_for(tmp_path, "question_answer"))
    refused = [row["rejection"].what if row["rejection"] else "" for row in rows]
    key = "an object gives the key `{}` twice"
    assert refused == ["", key.format("answer"), key.format("k"), key.format("k"), "", "", ""] + [
        key.format("k")
    ]
    assert "c.json:2" in rows[-1]["source"]
