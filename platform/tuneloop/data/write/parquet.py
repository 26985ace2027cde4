"""Writing the finished rows of a dataset artifact as Parquet, one table after the other."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
from pyarrow import parquet

from tuneloop.config import TuneloopConfig
from tuneloop.data.hashing.columns import Indices, one_array
from tuneloop.data.ledger import Ledger
from tuneloop.data.ray_rows import column_schema
from tuneloop.data.schema import Side, dataset_schema, removed_schema
from tuneloop.data.tokenize.rendering import Rendering
from tuneloop.data.write.assemble import assemble
from tuneloop.data.write.own_columns import json_text_notice

_ROWS_PER_FILE = 100_000
_NUM_FIRST = 3


@dataclass
class Written:
    """What has been written of one side.

    Args:
        num_tokens: Length of each row, in tokens; empty for removed rows.
        num_target_tokens: Targets of each row, likewise.
        first: The first three rows, for the card.
    """

    num_rows: int = 0
    num_tokens: array[int] = field(default_factory=lambda: array("q"))
    num_target_tokens: array[int] = field(default_factory=lambda: array("q"))
    first: list[dict[str, Any]] = field(default_factory=list)


def write_rows(
    rows: ray.data.Dataset,
    ledger: Ledger,
    rendering: Rendering,
    config: TuneloopConfig,
    path: Path,
) -> dict[Side, Written]:
    """Write `train/`, `test/` and `removed/` under `path` and return what is in them.

    `validation/` is written where rows are meant for it.

    Args:
        rows: The materialized dataset of tokenized rows.
        ledger: With the final sides and ranks of these rows; it gets a notice of columns that are
            kept as JSON text.
        rendering: How the rows were rendered.
        config: `task.type` and `data.max_seq_len` are used.
    """
    columns = column_schema(rows)
    ledger.notices += json_text_notice(columns)
    is_text = config.task.type == "language_modeling"
    stays = ~ledger.is_on(Side.REMOVED)
    is_plain = is_text or bool(ledger.table["is_plain"].to_numpy()[stays].all())
    schemas = dict.fromkeys(Side, dataset_schema(columns, is_text, is_plain))
    schemas[Side.REMOVED] = removed_schema()
    writers = {
        side: _SideWriter(path / side.folder, schemas[side])
        for side in (Side.TRAIN, Side.TEST, Side.REMOVED)
    }
    max_seq_len = config.data.max_seq_len if is_text else None
    try:
        for side, table in assemble(rows, ledger, columns, rendering, max_seq_len, is_plain):
            if side not in writers:
                writers[side] = _SideWriter(path / side.folder, schemas[side])
            writers[side].write(table)
    finally:
        for writer in writers.values():
            writer.close()
    return {side: writer.written for side, writer in writers.items()}


class _SideWriter:
    """Parquet files of one side; there is always at least one, if only an empty one."""

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        self.folder, self.schema = folder, schema
        self.written = Written()
        self._num_files = 0
        self._rows_in_file = 0
        folder.mkdir()
        self._open()

    def write(self, table: pa.Table) -> None:
        if self._rows_in_file >= _ROWS_PER_FILE:
            self._file.close()
            self._open()
        self._file.write_table(table)
        self._rows_in_file += table.num_rows
        self.written.num_rows += table.num_rows
        if "loss_mask" in self.schema.names:
            lengths = table["num_tokens"].to_numpy().astype(np.int64)
            self.written.num_tokens.frombytes(lengths.tobytes())
            targets = _sums(one_array(table["loss_mask"]))
            self.written.num_target_tokens.frombytes(targets.tobytes())
        missing = max(0, _NUM_FIRST - len(self.written.first))
        self.written.first += table.slice(0, missing).to_pylist()

    def close(self) -> None:
        self._file.close()

    def _open(self) -> None:
        path = self.folder / f"part-{self._num_files:05d}.parquet"
        self._file = parquet.ParquetWriter(path, self.schema, compression="zstd")
        self._num_files += 1
        self._rows_in_file = 0


def _sums(lists: pa.ListArray) -> Indices:
    """Return the sum of each list of numbers."""
    so_far = np.concatenate([[0], np.cumsum(lists.values.to_numpy(), dtype=np.int64)])
    return np.diff(so_far[lists.offsets.to_numpy()])
