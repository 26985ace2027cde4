"""Files as people and programs write them: what is read is also written, and told beforehand."""

from __future__ import annotations

import gzip
import json
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import dataset, parquet

from source_rows import complaints, config_for, notices, pairs, read, texts, write_lines, written
from tuneloop.config import DataConfig
from tuneloop.data.sources.bad_rows import BadRow, refuse_bad_rows
from tuneloop.data.sources.files import SourceFile, find_files, identities
from tuneloop.data.sources.readers import read_source
from tuneloop.data.write.own_columns import (
    json_text_notice,
    schema_of,
    shapes_of,
)
from tuneloop.errors import DataError

DATA = DataConfig.model_validate({"sources": [{"path": "a", "format": "text"}]})


# --- the user's own columns ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([{"u": None, "l": "en"}] * 2, "struct<u: string, l: string>", None),
        ([{}, {}], "string", ["{}", "{}"]),
        ([{"a": {}}, {"a": {"b": 1}}], "struct<a: struct<b: int64>>", None),
        ([[], [None]], "list<element: string>", None),
        ([1, "one"], "string", ["1", '"one"']),
        ([True, 1], "string", ["true", "1"]),
        ([1, 0.5], "double", [1.0, 0.5]),
        ([2**60 + 1, 0.5], "string", [str(2**60 + 1), "0.5"]),
        ([2**63, 1], "string", [str(2**63), "1"]),
        ([[1], ["x"]], "string", ["[1]", '["x"]']),
        ([{"a": 1}, {"a": "x"}], "string", ['{"a": 1}', '{"a": "x"}']),
        ([[[1]], None], "list<element: list<element: int64>>", None),
        ([math.inf, -1.5], "double", [math.inf, -1.5]),
        ([None, None], "string", [None, None]),
        ([{str(at): at for at in range(1001)}], "string", None),
    ],
)
@pytest.mark.parametrize("block", [1, 5])
def test_an_own_column_is_carried_by_a_type_that_holds_all_its_values(
    tmp_path: Path, values: list[Any], kind: str, expected: list[Any] | None, block: int
) -> None:
    """Whichever rows are in a block: the types of two blocks are brought together."""
    path = write_lines(tmp_path / "a.jsonl", pairs(*({"own": value} for value in values)))
    table = written(read(path), tmp_path / "own.parquet", block)
    assert str(table.schema.field("own").type) == kind
    if expected is not None:
        assert table["own"].to_pylist() == expected
    is_json = bool(json_text_notice(schema_of(shapes_of(row["extra"] for row in read(path)))))
    assert is_json == (kind == "string" and values != [None, None])


def test_two_columns_never_get_one_name(tmp_path: Path) -> None:
    row = {"row_id": 1, "original_row_id": 2, "#row_id": 3, "": 4}
    (found,) = read(write_lines(tmp_path / "a.jsonl", pairs(row)))
    kept = json.loads(found["extra"])
    assert sorted(kept.values()) == [1, 2, 3, 4]
    assert kept["original_row_id"] == 2
    assert kept["unnamed"] == 4


def test_a_synthetic_column_of_text_is_the_users_own(tmp_path: Path) -> None:
    values = [True, "True", 1, "yes", "false", "", None, "by hand"]
    rows = read(write_lines(tmp_path / "a.jsonl", pairs(*({"synthetic": v} for v in values))))
    assert [row["synthetic"] for row in rows] == [True] * 4 + [False] * 4
    assert [row["extra"] for row in rows[:-1]] == ["{}"] * 7
    assert json.loads(rows[-1]["extra"]) == {"original_synthetic": "by hand"}


# --- CSV ----------------------------------------------------------------------------------------


def test_columns_of_a_csv_without_a_name_get_one(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(",question,answer,,column_4\n0,q,a,x,y\n")
    (row,) = read(path)
    assert json.loads(row["extra"]) == {"column_1": "0", "column_4_": "x", "column_4": "y"}


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("question,answer,answer\nq,a,b\n")
    table = pa.Table.from_arrays([pa.array(["q"])] * 3, names=["question", "answer", "answer"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    for name in ("a.csv", "a.parquet", "a.arrow"):
        (row,) = read(tmp_path / name)
        assert row["rejection"] is not None
        assert row["rejection"].what == "two columns have one name"
        assert row["rejection"].got == "answer"
        assert row["rejection"].is_fatal


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.csv", "question;answer\nWhat, when?;This\n", "the separator is a semicolon"),
        ("a.csv", "question\tanswer\nWhat, when?\tThis\n", "the separator is a tab"),
        ("a.tsv", "question,answer\n'What, when?',This\n".replace("'", '"'), "is a comma"),
        ("a.csv", 'sep=;\nquestion;answer\n"What, when?";This\n', "the separator is a semicolon"),
        ("a.csv", '"question","answer"\n"What, when?",This\n', ""),
    ],
)
def test_the_separator_is_found_and_told(tmp_path: Path, name: str, text: str, told: str) -> None:
    (tmp_path / name).write_text(text)
    rows = read(tmp_path / name)
    assert texts(rows) == [("What, when?", "This")]
    assert rows[0]["source"].endswith(f":{text.count(chr(10))}")
    assert [told in what for what in notices(tmp_path / name)] == [True] * bool(told)


def test_rows_that_an_open_quote_takes_along_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    lines = ["question,answer", *(f"q{at},a{at}" for at in range(10)), '"broken,a']
    path.write_text("\n".join([*lines, *(f"r{at},b{at}" for at in range(100))]) + "\n")
    rows = read(path)
    bad = complaints(rows)
    assert len(rows) == 111
    assert [place for place, _ in bad] == [f"{path}:{line}" for line in range(12, 113)]
    config = config_for(path, max_bad_rows_ratio=0.5)
    found = [BadRow(row["source"], row["rejection"]) for row in rows if row["rejection"]]
    with pytest.raises(DataError, match="close the quote that is opened in line 12"):
        refuse_bad_rows(found, len(rows), config.data)
    # Another quote ends it: rows in between count all the same, and those after it are read.
    path.write_text("\n".join([*lines, "r,b", 'x,"hello"', "last,one"]) + "\n")
    rows = read(path)
    assert [row["source"].rpartition(":")[2] for row in rows if row["rejection"]] == [
        "12",
        "13",
        "14",
    ]
    assert texts(rows[-1:]) == [("last", "one")]


# --- encodings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv"])
def test_text_in_other_encodings_is_read(tmp_path: Path, name: str, encoding: str) -> None:
    rows = [{"question": "Où\u2028est-il\u0085?", "answer": "là 🙂"}] * 2
    mark = {".csv": ",", ".tsv": "\t"}.get(Path(name).suffix)
    if mark is not None:
        text = "".join(mark.join(row) + "\n" for row in (rows[0], *(r.values() for r in rows)))
    elif name == "a.json":
        text = json.dumps(rows, ensure_ascii=False)
    else:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / name).write_bytes(text.encode(encoding))
    found = read(tmp_path / name)
    assert texts(found) == [("Où\u2028est-il\u0085?", "là 🙂")] * 2
    assert bool(notices(tmp_path / name)) == encoding.startswith("utf-16")


def test_marks_in_names_and_texts_go(tmp_path: Path) -> None:
    row = {"\ufeffquestion": "\ufeffq", "answer": "\ufeff1"}
    rows = read(
        write_lines(tmp_path / "a.jsonl", [row]),
        task={"type": "classification", "labels": ["1", "2"]},
    )
    assert texts(rows) == [("q", "1")]
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfA document.\n")
    (row,) = read(tmp_path / "a.txt", format="text", task={"type": "language_modeling"})
    assert row["text"] == "A document."
    # The line ends of Windows stay within a text, and end it no more than others do.
    (tmp_path / "a.txt").write_bytes(b"One.\r\n\r\nTwo.\r\n")
    (row,) = read(tmp_path / "a.txt", format="text", task={"type": "language_modeling"})
    assert row["text"] == "One.\r\n\r\nTwo."


def test_another_encoding_is_named_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("question,answer\nSüß?,ja\n".encode("cp1252"))
    (row,) = read(tmp_path / "a.csv")
    assert row["rejection"] is not None
    assert row["rejection"].is_fatal
    assert "iconv" in row["rejection"].remedy


# --- JSON, Parquet, Arrow -----------------------------------------------------------------------


@pytest.mark.parametrize("levels", [99, 101, 5000])
def test_a_row_that_is_nested_too_deep_is_a_bad_row(tmp_path: Path, levels: int) -> None:
    deep = '{"question": "r", "answer": "b", "x": ' + "[" * levels + "]" * levels + "}"
    (tmp_path / "a.jsonl").write_text('{"question": "q", "answer": "a"}\n' + deep + "\n")
    rows = read(tmp_path / "a.jsonl")
    told = [] if levels == 99 else [(f"{tmp_path}/a.jsonl:2", "nested too deep")]
    assert [(place, what[-15:]) for place, what in complaints(rows)] == told
    if levels == 99:
        (column,) = written(rows, tmp_path / "own.parquet").to_pydict().values()
        assert column == [None, "[" * 99 + "]" * 99]


def test_json_lines_that_are_called_json_are_read(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.json", pairs({}, {}))
    assert texts(read(path)) == [("q0", "a0"), ("q1", "a1")]


def test_numbers_are_answers_and_nan_is_no_json(tmp_path: Path) -> None:
    rows = [{"question": "q", "answer": value} for value in (0, 1.0, "1", 2, True, math.nan)]
    path = write_lines(tmp_path / "a.jsonl", rows)
    found = read(path, task={"type": "classification", "labels": [0, 1]})
    assert texts(found[:3]) == [("q", "0"), ("q", "1"), ("q", "1")]
    assert [row["rejection"] is None for row in found] == [True] * 3 + [False] * 3
    assert [texts([row])[0][1] for row in read(path)[:5]] == ["0", "1", "1", "2", "true"]
    rows = [{"question": "q", "answer": {"x": value}} for value in (1, math.nan, math.inf)]
    found = read(write_lines(path, rows), task={"type": "extraction", "fields": ["x"]})
    assert [row["rejection"] is None for row in found] == [True, False, False]


def test_times_that_python_cannot_hold_are_text(tmp_path: Path) -> None:
    far = pa.array([2**60, 0, None]).cast(pa.timestamp("us"))
    columns = {
        "question": pa.array(["a", "b", "c"]),
        "answer": pa.array(["x", "y", "z"]),
        "until": far,
        "zone": far.cast(pa.timestamp("us", "Europe/Berlin")),
        "inside": pa.StructArray.from_arrays([far], ["t"]),
        "many": pa.ListArray.from_arrays([0, 2, 3, 3], far),
        "lasts": pa.array([2**60, 1, None]).cast(pa.duration("s")),
    }
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    rows = read(tmp_path / "a.parquet")
    table = written(rows, tmp_path / "own.parquet").to_pydict()
    assert table["until"] == ["38504-08-17 21:30:06.846976", "1970-01-01 00:00:00", None]
    assert table["inside"][0] == {"t": "38504-08-17 21:30:06.846976"}
    assert table["many"] == [["38504-08-17 21:30:06.846976", "1970-01-01 00:00:00"], [None], []]
    assert table["lasts"][0] == f"{2**60} s"
    assert table["zone"][0].startswith("38504")


def test_an_arrow_file_is_read_like_a_stream(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(pairs({}, {}))
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    assert texts(read(tmp_path / "a.arrow")) == [("q0", "a0"), ("q1", "a1")]


def test_empty_rows_of_a_spreadsheet_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("question,answer,\nq0,a0,\n,,\nq1,a1,\n,,\n")
    assert texts(read(tmp_path / "a.csv")) == [("q0", "a0"), ("q1", "a1")]


def test_a_header_in_the_middle_is_no_row(tmp_path: Path) -> None:
    table = "\ufeffquestion, answer\nq0,a0\n"
    (tmp_path / "a.csv").write_text(table + table)
    rows = read(tmp_path / "a.csv")
    assert complaints(rows) == [(f"{tmp_path / 'a.csv'}:3", "the line repeats the header")]
    assert texts([rows[0], rows[2]]) == [("q0", "a0")] * 2


def test_a_file_without_anything_in_it_is_told(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", pairs({}))
    (tmp_path / "b.jsonl").write_text("\n")
    assert notices(tmp_path) == ["the file is empty"]


# --- folders and places -------------------------------------------------------------------------


def test_hidden_folders_and_descriptions_are_passed_over_and_told(tmp_path: Path) -> None:
    for name in (".ipynb_checkpoints/a-checkpoint.jsonl", "_old/a.jsonl", "deep/.git/a.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_lines(tmp_path / name, pairs({}))
    write_lines(tmp_path / "deep" / "a.jsonl", pairs({}))
    (tmp_path / "dataset_info.json").write_text('{"description": "x", "splits": {}}')
    (tmp_path / "one.json").write_text('{"question": "q", "answer": "a"}')
    found = find_files(config_for(tmp_path).data.sources)
    assert [Path(file.name).name for file in found] == ["a.jsonl", "one.json"]
    assert notices(tmp_path) == ["4 files are passed over"]
    # What is behind a link to a folder is not read, nor twice, and told as well.
    (tmp_path / "latest").symlink_to(tmp_path / "deep")
    assert len(find_files(config_for(tmp_path).data.sources)) == 2
    assert notices(tmp_path) == ["6 files are passed over"]
    # So are rows in a file that is not read; a README holds none.
    for name in ("README.md", "more.xlsx", "rows.jsonl.xz", "ROWS.JSONL.GZ"):
        (tmp_path / "deep" / name).write_bytes(b"")
    assert len(find_files(config_for(tmp_path).data.sources)) == 2
    assert notices(tmp_path) == ["9 files are passed over"]
    assert notices(tmp_path / "deep" / "*") == ["3 files are passed over"]


def test_a_glob_passes_over_what_is_hidden_unless_it_names_it(tmp_path: Path) -> None:
    names = [
        "a.jsonl",
        "b/a.jsonl",
        "_temporary/0/a.jsonl",
        "b/_delta_log/a.jsonl",
        "b/.old/a.jsonl",
    ]
    names += ["_part=1/_a.jsonl", "_part=1/a.jsonl"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_lines(tmp_path / name, pairs({}))

    def found(pattern: str, root: str = str(tmp_path)) -> set[str]:
        files = find_files(config_for(f"{root}/{pattern}").data.sources)
        return {file.name.removeprefix(f"{root}/") for file in files}

    # `_part=1` is a column, not hidden.
    plain = {"a.jsonl", "b/a.jsonl", "_part=1/a.jsonl"}
    assert found("**/*.jsonl") == found("") == plain
    assert found("**/*.jsonl", f"file://{tmp_path}") == found("", f"file://{tmp_path}") == plain
    assert notices(tmp_path / "**" / "*.jsonl") == ["4 files are passed over"]
    assert found("**/_delta_log/*.jsonl") == {"b/_delta_log/a.jsonl"}
    assert found("**/_delta_log/*.jsonl", f"file://{tmp_path}") == {"b/_delta_log/a.jsonl"}
    assert found("_temporary/*/*.jsonl") == {"_temporary/0/a.jsonl"}
    assert found("_part=1/_*.jsonl") == {"_part=1/_a.jsonl"}
    assert found("b/.old") == {"b/.old/a.jsonl"}
    with pytest.raises(DataError, match="a glob matches no file"):
        found("b/_*/../*/_a.jsonl")


# --- columns in the names of folders -----------------------------------------------------------


def write_partitions(root: Path, *folders: str, **more: Any) -> None:
    for number, folder in enumerate(folders):
        (root / folder).mkdir(parents=True, exist_ok=True)
        rows = [{"question": f"q{number}", "answer": f"a{number}", **more}]
        write_lines(root / folder / "a.jsonl", rows)


def test_the_columns_of_folders_are_those_of_pyarrow(tmp_path: Path) -> None:
    folders = [
        "lang=en/month=01",
        "lang=d%20e=/month=11",
        "lang=__HIVE_DEFAULT_PARTITION__/month=2",
    ]
    write_partitions(tmp_path, *folders)
    rows = read(tmp_path, split={"stratify_by": "month"})
    expected = dataset.dataset(tmp_path, format="json", partitioning="hive").to_table().to_pylist()
    own = [json.loads(row["extra"]) for row in rows]
    assert own == [{name: row[name] for name in ("lang", "month")} for row in expected]
    assert {row["month"] for row in own} == {1, 2, 11}
    # One that is no whole number makes all of them text.
    write_partitions(tmp_path, "lang=fr/month=May")
    months = {json.loads(row["extra"])["month"] for row in read(tmp_path)}
    assert months == {"01", "11", "2", "May"}


def test_rows_are_grouped_and_answered_by_the_columns_of_folders(tmp_path: Path) -> None:
    write_partitions(tmp_path, "label=0/site=a", "label=1/site=b")
    rows = read(
        tmp_path / "*" / "*" / "*.jsonl", split={"group_by": "site", "stratify_by": "label"}
    )
    assert [(row["group"], row["stratum"]) for row in rows] == [("a", "0"), ("b", "1")]
    columns = {"prompt": "question", "completion": "label"}
    source = {"path": str(tmp_path), "format": "columns", "columns": columns}
    config = config_for(tmp_path, sources=[source])
    files = find_files(config.data.sources)
    found = [row for at, file in enumerate(files) for row in read_source(file, at, config)]
    assert texts(found) == [("q0", "0"), ("q1", "1")]
    # Where rows lie is what they say: the same files in other folders are other data.
    before = identities(files)
    (tmp_path / "label=0").rename(tmp_path / "label=2")
    assert identities(find_files(config.data.sources)) != before


def test_folders_that_name_splits_are_splits(tmp_path: Path) -> None:
    write_partitions(tmp_path, "split=train", "split=test", "env=dev")
    source = {"path": str(tmp_path), "format": "question_answer"}
    with pytest.raises(DataError, match="several splits") as caught:
        find_files(config_for(tmp_path).data.sources)
    assert caught.value.problems[0].allowed == "test, train"
    chosen = find_files(config_for(tmp_path, sources=[{**source, "split": "train"}]).data.sources)
    assert [file.columns for file in chosen] == [{"split": "train"}]


@pytest.mark.parametrize(("value", "is_same"), [("en", True), (None, True), ("de", False)])
def test_a_column_that_contradicts_its_folder_is_refused(
    value: Any, is_same: bool, tmp_path: Path
) -> None:
    write_partitions(tmp_path, "lang=en", lang=value)
    (row,) = read(tmp_path)
    if is_same:
        assert json.loads(row["extra"]) == {"lang": "en"}
    else:
        assert row["rejection"] is not None
        assert row["rejection"].is_fatal
        assert row["rejection"].got == "de in a folder lang=en"


@pytest.mark.parametrize("own", [7, 7.0, "07", "7"])
def test_a_number_in_a_file_and_in_its_folder_are_the_same(own: Any, tmp_path: Path) -> None:
    write_partitions(tmp_path, "month=07", month=own)
    assert json.loads(read(tmp_path)[0]["extra"]) == {"month": 7}


def test_workers_in_another_directory_open_relative_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    write_lines(tmp_path / "here" / "a.jsonl", pairs({}))
    monkeypatch.chdir(tmp_path / "here")
    config = config_for("a.jsonl")
    (file,) = find_files(config.data.sources)
    monkeypatch.chdir(tmp_path / "there")
    (row,) = read_source(file, 0, config)
    assert (row["rejection"], row["source"]) == (None, "a.jsonl:1")
    # A job's files, unpacked on another node.
    monkeypatch.chdir(tmp_path / "here")
    elsewhere = SourceFile(str(tmp_path / "gone" / "a.jsonl"), 0, name="a.jsonl")
    (row,) = read_source(elsewhere, 0, config)
    assert row["rejection"] is None


def test_files_are_identified_by_content_wherever_they_lie(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write_lines(tmp_path / folder / "a.jsonl", pairs({}))
    first, second = (
        identities(find_files(config_for(tmp_path / folder / name).data.sources))
        for folder, name in (("one", "a.jsonl"), ("two", "*.jsonl"))
    )
    assert first == second
    write_lines(tmp_path / "two" / "a.jsonl", pairs({"x": 1}))
    assert identities(find_files(config_for(tmp_path / "two").data.sources)) != first


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.jsonl", gzip.compress(b'{"question": "q"}\n', mtime=0), "gzip"),
        ("a.csv", b"PK\x03\x04" + bytes(range(256)), "a zip"),
        ("a.json", b"PAR1\x15" + bytes(40), "Parquet"),
        ("a.txt", b"%PDF-1.7\n", "PDF"),
    ],
    ids=["gzip", "zip", "parquet", "pdf"],
)
def test_what_is_no_text_is_told_by_what_it_is(
    tmp_path: Path, name: str, content: bytes, kind: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    is_text = name.endswith(".txt")
    more = {"format": "text", "task": {"type": "language_modeling"}} if is_text else {}
    ((_, what),) = complaints(read(path, **more))
    assert f"but {kind}" in what


@pytest.mark.parametrize("text", ["SQLite is small.", "PAR1 is a gene.", "BZh is a name.", "PK"])
def test_a_text_may_begin_with_any_word(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text(text)
    (row,) = read(path, format="text", task={"type": "language_modeling"})
    assert (row["rejection"], row["text"]) == (None, text)


def test_objects_of_a_json_file_that_is_no_list(tmp_path: Path) -> None:
    one, two = pairs({"n": 1}, {"n": 2})
    path = tmp_path / "a.json"
    path.write_text(json.dumps(one))
    assert texts(read(path)) == [("q0", "a0")]
    path.write_text(f"{json.dumps(one, indent=1)}\n{json.dumps(two, indent=1)}\n")
    assert [row["source"] for row in read(path)] == [f"{path}:1", f"{path}:6"]
    path.write_text(json.dumps({"version": 1, "data": [one, two]}))
    ((_, what),) = complaints(read(path))
    assert what == "the file is one object, with rows under a key"
    with pytest.raises(DataError, match=r"jq -c '\.data\[\]'"):
        refuse_bad_rows([BadRow("a", row["rejection"]) for row in read(path)], 1, DATA)
    # One row with its turns is a row.
    chat = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    path.write_text(json.dumps(chat))
    assert texts(read(path, format="messages")) == [("q", "a")]


def test_names_that_arrow_fills_in_are_no_arguments(tmp_path: Path) -> None:
    def asked(arguments: dict[str, Any]) -> list[dict[str, Any]]:
        call = {"function": {"name": "f", "arguments": arguments}}
        return [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]}]

    rows = [asked({"city": "Oslo"}), asked({"number": 3, "more": {"unit": "m"}})]
    tools = [[{"name": "f", "parameters": {"city": {}}}], [{"name": "f", "parameters": {"n": {}}}]]
    path = tmp_path / "a.parquet"
    meta = [{"a": 1}, {"b": 2}]
    for tool in tools:  # no Parquet type for an object without fields
        tool[0]["parameters"][next(iter(tool[0]["parameters"]))] = {"type": "string"}
    table = {"messages": rows, "tools": tools, "meta": meta}
    parquet.write_table(pa.table(table), path)
    found = read(path, format="messages")
    calls = [row["messages"][-1]["tool_calls"][0]["function"]["arguments"] for row in found]
    assert [json.loads(text) for text in calls] == [
        {"city": "Oslo"},
        {"number": 3, "more": {"unit": "m"}},
    ]
    told = [json.loads(row["tools"])[0]["function"]["parameters"] for row in found]
    assert told == [{"city": {"type": "string"}}, {"n": {"type": "string"}}]
    assert [json.loads(row["extra"]) for row in found] == [
        {"meta": {"a": 1, "b": None}},
        {"meta": {"a": None, "b": 2}},
    ]


def test_decimals_are_answers(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    answers = pa.array([Decimal("1.50"), Decimal(2), None], pa.decimal128(10, 2))
    parquet.write_table(pa.table({"question": ["q", "r", "s"], "answer": answers}), path)
    rows = read(path)
    assert texts(rows[:2]) == [("q", "1.50"), ("r", "2.00")]
    assert complaints(rows) == [(f"{path}:3", "`answer` is empty")]


def test_a_directory_without_rows_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the directory has no file with rows"):
        read(tmp_path)
    (tmp_path / "about.json").write_text('{"version": 1}')
    with pytest.raises(DataError, match="the directory has no file with rows"):
        read(tmp_path)
