"""Writing the finished rows of a dataset artifact as Parquet, in streaming fashion."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tuneloop.data.schema import Side, dataset_schema, removed_schema

_ROWS_PER_FILE = 100_000


@dataclass
class Written:
    """What has been written of one side.

    Args:
        num_tokens: Length of each row, in tokens.
        num_target_tokens: Targets of each row.
        first: The first few rows, for the card.
    """

    num_rows: int = 0
    num_tokens: array[int] = field(default_factory=lambda: array("q"))
    num_target_tokens: array[int] = field(default_factory=lambda: array("q"))
    first: list[dict[str, Any]] = field(default_factory=list)


def write_sides(
    tables: Iterable[Any], columns: Any, is_text: bool, path: Path
) -> dict[Side, Written]:
    """Write `train/`, `test/` and `removed/` under `path` and return what is in them.

    `validation/` is written where rows are meant for it.

    Args:
        tables: Of `finishing.final_rows`, sorted by side.
        columns: Schema of the user's own columns.
        is_text: Rows have `text` in place of `messages`.
    """
    data_schema = dataset_schema(columns, is_text)
    writers = {
        side: _SideWriter(
            path / side.folder, removed_schema() if side is Side.REMOVED else data_schema
        )
        for side in (Side.TRAIN, Side.TEST, Side.REMOVED)
    }
    try:
        for table in tables:
            sides = table["#side"].to_numpy()
            starts = np.flatnonzero(np.diff(sides, prepend=-1))
            for start, stop in itertools.pairwise([*starts.tolist(), len(sides)]):
                side = Side(sides[start])
                if side not in writers:
                    writers[side] = _SideWriter(path / side.folder, data_schema)
                writers[side].write(table.slice(start, stop - start))
    finally:
        for writer in writers.values():
            writer.close()
    return {side: writer.written for side, writer in writers.items()}


class _SideWriter:
    """Parquet files of one side; there is always at least one, if only an empty one."""

    def __init__(self, folder: Path, schema: Any) -> None:
        self.folder, self.schema = folder, schema
        self.written = Written()
        self._num_files = 0
        self._rows_in_file = 0
        folder.mkdir()
        self._open()

    def write(self, table: Any) -> None:
        if self._rows_in_file >= _ROWS_PER_FILE:
            self._file.close()
            self._open()
        # Columns of `removed/`, and a document's text, stand beside the user's with a mark.
        renamed = {name.removeprefix("#"): name for name in table.column_names if name[0] == "#"}
        is_removed = "reason" in self.schema.names
        names = [
            renamed[name] if name in renamed and (is_removed or name == "text") else name
            for name in self.schema.names
        ]
        selected = table.select(names).rename_columns(self.schema.names).cast(self.schema)
        self._file.write_table(selected)
        self._rows_in_file += table.num_rows
        self.written.num_rows += table.num_rows
        if not is_removed:
            lengths = table["num_tokens"].to_numpy().astype(np.int64)
            self.written.num_tokens.frombytes(lengths.tobytes())
            targets = _sums(table["loss_mask"].combine_chunks())
            self.written.num_target_tokens.frombytes(targets.tobytes())
        missing = max(0, 3 - len(self.written.first))
        self.written.first += selected.slice(0, missing).to_pylist()

    def close(self) -> None:
        self._file.close()

    def _open(self) -> None:
        from pyarrow import parquet

        path = self.folder / f"part-{self._num_files:05d}.parquet"
        self._file = parquet.ParquetWriter(path, self.schema, compression="zstd")
        self._num_files += 1
        self._rows_in_file = 0


def _sums(lists: Any) -> Any:
    """Return the sum of each list of an Arrow array."""
    so_far = np.concatenate([[0], np.cumsum(lists.values.to_numpy(), dtype=np.int64)])
    return np.diff(so_far[lists.offsets.to_numpy()])
