"""Whatever table is read can be written: tables that a generator makes up."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from source_rows import config_for, read, write_lines, written
from tuneloop.data.sources.bad_rows import BadRow, bad_row_problems

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    write_lines(path, rows)


def write_json(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(rows), encoding="utf-16")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=";" if path.suffix == ".csv" else "\t")
        writer.writerow(names)
        writer.writerows([row.get(name) for name in names] for row in rows)


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], None]] = {
    ".jsonl": write_jsonl,
    ".json": write_json,
    ".csv": write_csv,
    ".tsv": write_csv,
}


TYPES: list[tuple[pa.DataType, st.SearchStrategy[Any]]] = [
    (pa.int64(), st.integers(-(2**63), 2**63 - 1)),
    (pa.uint64(), st.integers(0, 2**64 - 1)),
    (pa.float64(), st.floats()),
    (pa.float16(), st.floats(width=16)),
    (pa.decimal128(20, 3), st.decimals("-99999", "99999", places=3)),
    (pa.string(), st.text(max_size=8)),
    (pa.binary(), st.binary(max_size=8)),
    (pa.bool_(), st.booleans()),
    (pa.date32(), st.integers(-(2**31), 2**31 - 1)),
    (pa.timestamp("s"), st.integers(-(2**63) + 1, 2**63 - 1)),
    (pa.timestamp("us", "UTC"), st.integers(-(2**63) + 1, 2**63 - 1)),
    (pa.timestamp("ns", "Europe/Berlin"), st.integers(-(2**62), 2**62)),
    (pa.duration("ms"), st.integers(-(2**62), 2**62)),
    (pa.time64("us"), st.integers(0, 86_399_999_999)),
    (pa.null(), st.none()),
]


@st.composite
def arrow_columns(draw: st.DrawFn, count: int) -> pa.Array:
    """Return a column of any type, its values also within objects, lists and dictionaries."""
    kind, values = draw(st.sampled_from(TYPES))
    items = draw(st.lists(values | st.none(), min_size=count, max_size=count))
    if pa.types.is_temporal(kind):
        width = pa.int32() if kind == pa.date32() else pa.int64()
        column = pa.array(items, width).view(kind)
    elif pa.types.is_decimal(kind):
        column = pa.array([None if v is None else Decimal(v) for v in items], kind)
    else:
        column = pa.array(items, kind)
    wrapping = draw(st.sampled_from(["none", "object", "list", "map", "dictionary"]))
    if wrapping == "object":
        return pa.StructArray.from_arrays([column, pa.nulls(count)], ["x", "y"])
    if wrapping == "list":
        return pa.ListArray.from_arrays([*range(count), count], column)
    if wrapping == "map":
        keys = pa.array([str(at) for at in range(count)])
        return pa.MapArray.from_arrays([*range(count), count], keys, column)
    if wrapping == "dictionary" and kind == pa.string():
        return column.dictionary_encode()
    return column


def hold(path: Path, count: int) -> None:
    """Assert that rows which are read can be written, all of them, and that none is lost."""
    rows = read(path)
    config = config_for(path, max_bad_rows_ratio=1)
    bad = [BadRow(row["source"], row["rejection"]) for row in rows if row["rejection"]]
    assert bad_row_problems(bad, len(rows), config.data) if bad else True
    if any(item.rejection.is_fatal for item in bad):
        return
    assert len(rows) == count
    usable = [row for row in rows if row["rejection"] is None]
    table = written(usable, path.with_suffix(".out"), 2)
    assert table.num_rows == len(usable) or not table.num_columns
    for row, found in zip(usable, table.to_pylist(), strict=False):
        for name, value in json.loads(row["extra"]).items():
            is_json = bool(table.schema.field(name).metadata) and found[name] is not None
            assert same(value, json.loads(found[name]) if is_json else found[name])


def same(value: Any, found: Any) -> bool:
    """Return whether a value came back; a field that a row lacks comes back as null."""
    if isinstance(value, dict) and isinstance(found, dict):
        return all(same(value.get(name), found[name]) for name in value.keys() | found.keys())
    if isinstance(value, list) and isinstance(found, list):
        return len(value) == len(found) and all(map(same, value, found))
    if isinstance(value, float) and math.isnan(value):
        return isinstance(found, float) and math.isnan(found)
    return bool(value == found)


SETTINGS = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("suffix", WRITERS)
@SETTINGS
@given(extras=st.lists(st.dictionaries(NAMES, JSON_VALUES, max_size=4), min_size=1, max_size=7))
def test_any_table_that_is_read_can_be_written(
    tmp_path: Path, suffix: str, extras: list[dict[str, Any]]
) -> None:
    # Names with commas between semicolons: nobody can tell which of them separate.
    assume(suffix != ".csv" or not any("," in name for row in extras for name in row))
    path = tmp_path / f"a{suffix}"
    rows = [row | {"question": f"q{at}", "answer": f"a{at}"} for at, row in enumerate(extras)]
    WRITERS[suffix](path, rows)
    hold(path, len(rows))


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@SETTINGS
@given(data=st.data())
def test_any_arrow_table_that_is_read_can_be_written(
    tmp_path: Path, suffix: str, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, 5))
    names = data.draw(st.lists(NAMES, max_size=3, unique=True))
    columns = {name: data.draw(arrow_columns(count)) for name in names}
    columns |= {name: pa.array([name[0] * 3] * count) for name in ("question", "answer")}
    table, path = pa.table(columns), tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        try:
            parquet.write_table(table, path)
        except pa.ArrowException:
            return  # a type that Parquet has not
    else:
        with pa.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table)
    hold(path, count)
