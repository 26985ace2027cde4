from __future__ import annotations

import json
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from tuneloop.config import TuneloopConfig
from tuneloop.data.schema import SourceRow
from tuneloop.data.sources.files import find_files
from tuneloop.data.sources.readers import read_source
from tuneloop.data.sources.values import python_values


def read(path: Path, task: str = "generation", layout: str = "question_answer") -> list[SourceRow]:
    config = TuneloopConfig.model_validate(
        {
            "name": "t",
            "task": {"type": task},
            "model": {"base": "x"},
            "data": {"sources": [{"path": str(path), "format": layout}]},
        }
    )
    return [row for file in find_files(config.data.sources) for row in read_source(file, 0, config)]


def answers(rows: list[SourceRow]) -> list[str]:
    assert not any(row["rejection"] for row in rows)
    return [row["messages"][-1]["content"] for row in rows]


def stored(path: Path, **columns: Any) -> Path:
    parquet.write_table(pa.table({"question": ["a", "b"], **columns}), path)
    return path


def test_numbers_of_32_bits_are_those_that_were_written(tmp_path: Path) -> None:
    scores = pa.array([3.8, 5.0], pa.float32())
    rows = read(stored(tmp_path / "a.parquet", answer=scores, share=scores))
    assert answers(rows) == ["3.8", "5"]
    assert [json.loads(row["extra"]) for row in rows] == [{"share": 3.8}, {"share": 5.0}]


@pytest.mark.parametrize("of", [pa.list_, pa.large_list, lambda kind: pa.struct([("x", kind)])])
def test_numbers_of_32_bits_in_others_too(of: Any) -> None:
    inner = {"x": 0.1} if pa.types.is_struct(of(pa.float32())) else [0.1, None]
    kind = pa.struct([("many", pa.list_(of(pa.float32()))), ("name", pa.string())])
    values = [{"many": [inner, None], "name": "n"}, {"many": None, "name": None}, None]
    assert python_values(pa.array(values, kind)) == values


def test_dates_and_decimals_in_an_answer_are_what_json_has(tmp_path: Path) -> None:
    kind = pa.struct([("day", pa.date32()), ("sum", pa.decimal128(9, 2)), ("id", pa.decimal128(9))])
    records = [{"day": date(2024, 1, 31), "sum": Decimal("19.90"), "id": Decimal(7)}, {"id": None}]
    rows = read(stored(tmp_path / "a.parquet", answer=pa.array(records, kind)), "extraction")
    assert answers(rows) == [
        '{"day": "2024-01-31", "sum": 19.9, "id": 7}',
        '{"day": null, "sum": null, "id": null}',
    ]


def test_a_call_of_a_parquet_file_may_have_a_date(tmp_path: Path) -> None:
    call = {"function": {"name": "f", "arguments": {"day": date(2024, 1, 31)}}}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]}]
    path = stored(tmp_path / "a.parquet", messages=[turns, turns])
    for row in read(path, layout="messages"):
        found = row["messages"][-1]["tool_calls"][0]["function"]["arguments"]
        assert json.loads(found) == {"day": "2024-01-31"}


def test_a_whole_number_may_be_larger_than_any_float(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"question": "a", "answer": 1{"0" * 400}}}\n')
    assert answers(read(path)) == [f"1{'0' * 400}"]


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_names_that_arrow_fills_in_are_no_arguments_of_a_completion(
    tmp_path: Path, suffix: str
) -> None:
    kinds = ({"city": {"type": "string"}}, {"unit": {"type": "string"}})
    names = [{"city": "Oslo"}, {"unit": "C"}]
    columns = {
        "prompt": [[{"role": "user", "content": name}] for name in "ab"],
        "completion": [
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": own}}]}]
            for own in names
        ],
        "tools": [[{"name": "f", "parameters": {"properties": own}}] for own in kinds],
    }
    path, table = tmp_path / f"a.{suffix}", pa.table(columns)
    if suffix == "parquet":
        parquet.write_table(table, path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    rows = read(path, layout="prompt_completion")
    assert [row["rejection"] for row in rows] == [None, None]
    calls = [row["messages"][-1]["tool_calls"][0]["function"]["arguments"] for row in rows]
    assert [json.loads(call) for call in calls] == names
