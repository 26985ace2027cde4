"""Rows of files as they are read, and as they are written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from tuneloop.config import TuneloopConfig
from tuneloop.data.schema import SourceRow
from tuneloop.data.sources.dialect import file_notices
from tuneloop.data.sources.files import find_files
from tuneloop.data.sources.readers import read_source
from tuneloop.data.write.own_columns import (
    merged_shapes,
    own_columns,
    schema_of,
    shapes_of,
)


def config_for(path: Path | str, **more: Any) -> TuneloopConfig:
    data = {"sources": [{"path": str(path), "format": more.pop("format", "question_answer")}]}
    task = more.pop("task", {"type": "generation"})
    return TuneloopConfig.model_validate(
        {"name": "t", "task": task, "model": {"base": "x"}, "data": data | more}
    )


def read(path: Path | str, **more: Any) -> list[SourceRow]:
    config = config_for(path, **more)
    files = find_files(config.data.sources)
    return [row for at, file in enumerate(files) for row in read_source(file, at, config)]


def notices(path: Path) -> list[str]:
    sources = config_for(path).data.sources
    return [notice.what for notice in file_notices(find_files(sources), sources)]


def texts(rows: list[SourceRow]) -> list[tuple[str, ...]]:
    assert all(row["rejection"] is None for row in rows), [row["rejection"] for row in rows]
    return [tuple(message["content"] for message in row["messages"]) for row in rows]


def complaints(rows: list[SourceRow]) -> list[tuple[str, str]]:
    return [(row["source"], row["rejection"].what) for row in rows if row["rejection"]]


def written(rows: list[SourceRow], path: Path, block: int = 3) -> pa.Table:
    """Return the own columns as they come back from Parquet, found and made block by block."""
    extras = [row["extra"] for row in rows]
    blocks = [extras[at : at + block] for at in range(0, len(extras), block)]
    schema = schema_of(merged_shapes(map(shapes_of, blocks)))
    with parquet.ParquetWriter(path, schema) as writer:
        for lines in blocks:
            columns = own_columns(pa.chunked_array([lines], pa.string()), schema)
            table = pa.table([columns[name] for name in schema.names], schema=schema)
            writer.write_table(table)
    return parquet.read_table(path)


def pairs(*more: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"question": f"q{at}", "answer": f"a{at}", **row} for at, row in enumerate(more)]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
