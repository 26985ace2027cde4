"""Columns whose values stand in the names of folders: `data/lang=en/part.parquet`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote

import pyarrow as pa

PartitionValue = str | int | None
_NO_VALUE = "__HIVE_DEFAULT_PARTITION__"


def partitions_of(paths: Sequence[str]) -> list[dict[str, PartitionValue]]:
    """Return the columns that the folders of each path name, typed alike in all of them.

    A column is whole numbers where all its values are, else text: as pyarrow's hive partitioning.

    Args:
        paths: Paths or URIs of files.

    Source: https://arrow.apache.org/docs/python/dataset.html#reading-partitioned-data
    """
    found = [_named_by_folders(path) for path in paths]
    values: dict[str, list[str | None]] = {}
    for columns in found:
        for name, value in columns.items():
            values.setdefault(name, []).append(value)
    numbers = {name for name, own in values.items() if _are_whole_numbers(own)}
    return [
        {
            name: int(value) if value is not None and name in numbers else value
            for name, value in columns.items()
        }
        for columns in found
    ]


def _named_by_folders(path: str) -> dict[str, str | None]:
    columns: dict[str, str | None] = {}
    for folder in PurePosixPath(path).parts[:-1]:
        name, mark, value = folder.partition("=")
        if mark and name:
            columns.setdefault(unquote(name), None if value == _NO_VALUE else unquote(value))
    return columns


def _are_whole_numbers(values: Sequence[str | None]) -> bool:
    try:
        return pa.array(values, pa.string()).cast(pa.int32()).null_count < len(values)
    except pa.ArrowInvalid:
        return False


def other_value(record: Mapping[str, Any], columns: Mapping[str, PartitionValue]) -> str | None:
    """Return the column in which a row says another value than its folders; None if none does."""
    for name, value in columns.items():
        own = record.get(name)
        if own is not None and own != "" and not _is_same(own, value):
            return name
    return None


def _is_same(own: Any, value: PartitionValue) -> bool:
    if isinstance(value, int):
        try:
            return float(own) == value
        except (TypeError, ValueError):
            return False
    text = str(own)
    # True of JSON is `true` in the name of a folder.
    return text == value or (isinstance(own, bool) and text.lower() == value)
