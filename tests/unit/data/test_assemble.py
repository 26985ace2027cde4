"""Finished rows: each goes where it is assigned, with the user's own columns as they were."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tuneloop.data.schema import Side, row_schema
from tuneloop.data.tokenize.rendering import Rendering
from tuneloop.data.write import assemble
from tuneloop.data.write.own_columns import own_columns


def blocks_of(count: int, size: int) -> list[pa.Table]:
    """Return conversations with the keys 0, 1, …, as tokenized."""
    rows = [
        {
            "key": key,
            "source": f"a.jsonl:{key + 1}",
            "synthetic": key % 2 == 0,
            "text": "",
            "messages": [{"role": "user", "content": f"q{key}"}, {"role": "x", "content": "é"}],
            "extra": json.dumps({"n": key}),
            "input_ids": list(range(key)),
            "loss_mask": [1] * key,
            "num_tokens": key,
        }
        for key in range(count)
    ]
    schema = pa.schema(
        [
            *row_schema(),
            ("input_ids", pa.list_(pa.int32())),
            ("loss_mask", pa.list_(pa.int8())),
            ("num_tokens", pa.int32()),
        ]
    )
    table = pa.Table.from_pylist(rows, schema=schema)
    return [table.slice(start, size) for start in range(0, count, size)]


@pytest.mark.parametrize("size", [1, 3, 10])
@pytest.mark.parametrize("num_cuts", [0, 2, 7])
def test_rows_are_dealt_out_to_partitions_and_come_back_in_order(size: int, num_cuts: int) -> None:
    generator = np.random.default_rng(size + num_cuts)
    sides = generator.permutation([Side.TRAIN] * 5 + [Side.TEST] * 2 + [Side.REMOVED] * 3)
    rank = generator.permutation(10)
    order = (sides.astype(np.int64) << 61) + (rank << 20)
    removed = np.flatnonzero(sides == Side.REMOVED)
    removal = np.full(10, -1, np.int64)
    removal[removed] = np.arange(3)
    removals = pa.table(
        {
            "stage": ["dedup"] * 3,
            "reason": [f"copy {index}" for index in removed],
            "kept_row_id": ["r0"] * 3,
            "similarity": [1.0] * 3,
            "reason_code": ["exact_duplicate"] * 3,
        }
    )
    nothing = np.full(10, -1, np.int64)
    row_ids = pa.array([f"r{key}" for key in range(10)])
    assignments = assemble.Assignments(
        *(np.arange(10), row_ids, row_ids, order, nothing, np.zeros(10, np.int64)),
        *(removal, removals),
    )
    by_order = np.sort(order)
    is_first = np.flatnonzero(np.diff(by_order >> 61, prepend=-1))
    starts = np.unique([*by_order[is_first], *generator.choice(by_order, num_cuts)])
    partitions = assemble.Partitions(starts[1:], [Side(start >> 61) for start in starts], 1)
    columns = pa.schema([("n", pa.int64())])
    job = assemble._Job(assignments, partitions, columns, Rendering("", ""), None, True)
    blocks = blocks_of(10, size)
    parts = [assemble._finish_blocks(job, *blocks[at : at + 2]) for at in range(0, len(blocks), 2)]
    tables = [assemble._joined(False, *(part[n] for part in parts)) for n in range(len(starts))]
    found: list[str] = []
    for side, table in zip(partitions.sides, tables, strict=True):
        for row in table.to_pylist():
            key = int(row["row_id"][1:])
            assert sides[key] == side
            assert row["source"] == f"a.jsonl:{key + 1}"
            if side is Side.REMOVED:
                assert row["text"] == f"q{key}\n\né"
                assert row["reason"] == f"copy {key}"
                assert row["reason_code"] == "exact_duplicate"
            else:
                assert row["n"] == key
                assert row["split_unit"] == f"r{key}"
                assert row["input_ids"] == list(range(key))
                assert row["messages"][0]["content"] == f"q{key}"
            found.append(row["row_id"])
    assert found == [f"r{key}" for key in np.argsort(order)]


ODD: list[tuple[str, pa.DataType, list[Any]]] = [
    ("whole", pa.int64(), [3, None, -(2**62)]),
    ("number", pa.float64(), [3, 1e-7, 2.5]),
    ("not_finite", pa.float64(), [math.inf, 1.0, -math.inf]),
    ("text", pa.string(), ['"\n\u2028 é🙂\\', "", "12"]),
    ("truth", pa.bool_(), [True, None, False]),
    ("list", pa.list_(pa.int64()), [[1, 2], [], None]),
    ("record", pa.struct([("a", pa.int64()), ("b", pa.string())]), [{"a": 1}, {}, None]),
    ("nothing", pa.string(), [None, None, None]),
    ("date", pa.string(), ["2026-11-28", "2026-11-28T10:00:00", ""]),
]


@pytest.mark.parametrize("names", [["not_finite"], [name for name, *_ in ODD if name[:3] != "not"]])
def test_own_columns_are_what_json_holds(names: list[str]) -> None:
    chosen = [item for item in ODD if item[0] in names]
    rows = [
        {name: values[at] for name, _, values in chosen if values[at] is not None or at == 1}
        for at in range(3)
    ]
    mixed = [1, "x", {"a": [None]}]
    lines = [
        json.dumps(row | {"mixed": value}, ensure_ascii=False)
        for row, value in zip(rows, mixed, strict=True)
    ]
    as_json = pa.field("mixed", pa.string(), metadata={"encoding": "json"})
    schema = pa.schema([*[(name, kind) for name, kind, _ in chosen], as_json])
    found = own_columns(pa.chunked_array([lines]), schema)
    for name, kind, values in chosen:
        assert pa.chunked_array([pa.array(values, kind)]).equals(
            found[name]
            if isinstance(found[name], pa.ChunkedArray)
            else pa.chunked_array([found[name]])
        ), name
    assert found["mixed"].to_pylist() == ["1", '"x"', '{"a": [null]}']
