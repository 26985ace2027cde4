"""The rows of a split as flat arrays, in memory or in memory-mapped files.

A training reads rows in any order, so a dataset's Parquet files, which are read a row group at a
time, are copied once into files that hold the tokens end to end. Every worker of a node maps the
same files, and the system keeps in memory what is used and fits.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import DTypeLike

# Rows of a Parquet file that are in memory at one time.
_ROWS_AT_A_TIME = 4096
_ARRAYS = {
    "input_ids": np.int32,
    "loss_mask": np.int8,
    "offsets": np.int64,
    "documents": np.int64,
    "num_target_tokens": np.int64,
}
_ROW_IDS = "row_ids.arrow"
# A shorter shared prefix saves hardly anything.
MIN_SHARED_TOKENS = 16


@dataclass(frozen=True)
class Rows:
    """All rows of a split, end to end in flat arrays.

    Args:
        row_ids: One id for each row.
        input_ids: int32, shape (all tokens,).
        loss_mask: int8, shape (all tokens,); 1 where the token is a target.
        offsets: int64, shape (rows + 1,); row i is `offsets[i]:offsets[i + 1]`.
        documents: int64, shape (documents + 1,), where documents start, and the end. A row of
            plain text holds several, which do not see each other; any other row is one.
        num_target_tokens: int64, shape (rows,), targets of each row that have a token of their
            document before them.
    """

    row_ids: Sequence[str]
    input_ids: np.ndarray
    loss_mask: np.ndarray
    offsets: np.ndarray
    documents: np.ndarray
    num_target_tokens: np.ndarray

    def __len__(self) -> int:
        return len(self.row_ids)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each row. Shape (rows,)."""
        return np.diff(self.offsets)

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and loss mask of one row. Shapes (T,), (T,)."""
        part = slice(self.offsets[index], self.offsets[index + 1])
        return self.input_ids[part], self.loss_mask[part]

    def document_lengths(self, index: int) -> list[int]:
        """Return the tokens of each document of one row; they add up to the row's."""
        return np.diff(self._document_bounds(index)).tolist()

    def num_prefix_tokens(self, indices: Sequence[int]) -> int:
        """Return the length of the prefix that all documents of these rows share.

        Mostly an instruction that every row repeats. The token before a target, which predicts it,
        is a document's own, and less than `MIN_SHARED_TOKENS` counts as nothing.
        """
        if not len(indices):
            return 0
        bounds = [self._document_bounds(index) for index in indices]
        begins = np.concatenate([part[:-1] for part in bounds])
        ends = np.concatenate([part[1:] for part in bounds])
        if len(begins) < 2:
            return 0
        size = int((ends - begins).min()) - 1
        first = self.input_ids[begins[0] : begins[0] + size]
        for begin in begins:
            apart = self.input_ids[begin : begin + size] != first[:size]
            apart |= self.loss_mask[begin + 1 : begin + 1 + size] != 0
            if apart.any():
                size = int(apart.argmax())
            if size < MIN_SHARED_TOKENS:
                return 0
        return size

    def _document_bounds(self, index: int) -> np.ndarray:
        """Return where the documents of one row begin, and its end. Shape (documents + 1,)."""
        first, last = np.searchsorted(self.documents, self.offsets[index : index + 2])
        return self.documents[first : last + 1]


def make_rows(
    row_ids: list[str],
    input_ids: list[list[int]],
    loss_mask: list[list[int]],
    document_lengths: list[list[int]] | None = None,
) -> Rows:
    """Return rows in flat arrays.

    Args:
        row_ids: One for each row.
        input_ids: Token ids of each row.
        loss_mask: One for each token id; 1 where the token is a target.
        document_lengths: Tokens of the documents of each row. Default: a row is one document.

    Raises:
        ValueError: A row's ids differ in length from its mask or its documents.
    """
    columns = {
        "row_id": pa.array(row_ids, pa.string()),
        "input_ids": pa.array(input_ids, pa.list_(pa.int32())),
        "loss_mask": pa.array(loss_mask, pa.list_(pa.int8())),
    }
    if document_lengths is not None:
        columns["document_lengths"] = pa.array(document_lengths, pa.list_(pa.int64()))
    return _flat(pa.record_batch(columns))


def store_rows(dataset: Path, split: str, folder: Path) -> Path:
    """Copy one split of a dataset artifact into files to be memory-mapped, in bounded memory.

    Args:
        folder: Directory that holds the splits; one that is there already is left as it is.

    Returns:
        The directory that `open_rows` opens.
    """
    target = folder / split
    if target.is_dir():
        return target
    unfinished = folder / f"{split}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context((unfinished / name).open("wb")) for name in _ARRAYS}
        ids = stack.enter_context(
            pa.ipc.new_file(unfinished / _ROW_IDS, pa.schema([("row_id", pa.string())]))
        )
        for name in ("offsets", "documents"):
            files[name].write(np.zeros(1, np.int64).data)
        start = 0
        for batch in _batches(dataset / split, _columns(dataset / split)):
            part = _flat(batch)
            ids.write_batch(batch.select(["row_id"]))
            for name in ("input_ids", "loss_mask", "num_target_tokens"):
                files[name].write(np.ascontiguousarray(getattr(part, name)).data)
            for name in ("offsets", "documents"):
                files[name].write((getattr(part, name)[1:] + start).data)
            start += int(part.offsets[-1])
    # Renamed when it is complete: a run that was killed here copies again.
    unfinished.rename(target)
    return target


def open_rows(folder: Path) -> Rows:
    """Return stored rows; their tokens stay in the files."""
    arrays = {}
    for name, dtype in _ARRAYS.items():
        file = folder / name
        if file.stat().st_size:
            # A plain view: slices of numpy's own class for mapped files are slow to make.
            arrays[name] = np.memmap(file, dtype, mode="r").view(np.ndarray)
        else:
            arrays[name] = np.zeros(0, dtype)
    return Rows(_RowIds(folder / _ROW_IDS), **arrays)


class _RowIds(Sequence[str]):
    """Ids of stored rows, which stay in their file too."""

    def __init__(self, file: Path) -> None:
        table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
        self.column = table.column("row_id")

    def __len__(self) -> int:
        return len(self.column)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return self.column[index].to_pylist()
        return self.column[index].as_py()


def _columns(folder: Path) -> list[str]:
    columns = ["row_id", "input_ids", "loss_mask"]
    first = next(iter(sorted(folder.glob("*.parquet"))), None)
    if first is not None and "document_lengths" in pq.read_schema(first).names:
        columns.append("document_lengths")
    return columns


def _batches(folder: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a split in the order of its files."""
    for file in sorted(folder.glob("*.parquet")):
        with pq.ParquetFile(file) as opened:
            yield from opened.iter_batches(_ROWS_AT_A_TIME, columns=columns)


def _flat(batch: pa.RecordBatch) -> Rows:
    """Return one record batch in flat arrays.

    Raises:
        ValueError: A row's ids differ in length from its mask or its documents.
    """
    ids, lengths = _values(batch, "input_ids", np.int32)
    mask, mask_lengths = _values(batch, "loss_mask", np.int8)
    row_ids = batch.column("row_id")
    _refuse_unequal(row_ids, lengths, mask_lengths, "a mask")
    if "document_lengths" in batch.schema.names:
        parts, counts = _values(batch, "document_lengths", np.int64)
        sums = np.diff(np.concatenate([[0], np.cumsum(parts)])[_ends(counts)])
        _refuse_unequal(row_ids, lengths, sums, "documents")
    else:
        parts = lengths
    offsets, documents = _ends(lengths), _ends(parts[parts > 0])
    targets = mask.astype(np.int64)
    # The first token of a document has nothing before it to be predicted from.
    targets[documents[:-1]] = 0
    counted = np.concatenate([[0], np.cumsum(targets)])
    num_targets = counted[offsets[1:]] - counted[offsets[:-1]]
    return Rows(row_ids.to_pylist(), ids, mask, offsets, documents, num_targets)


def _values(batch: pa.RecordBatch, name: str, dtype: DTypeLike) -> tuple[np.ndarray, np.ndarray]:
    """Return a list column's values end to end, and how many each row has."""
    column = batch.column(name)
    values = column.flatten().to_numpy(zero_copy_only=False).astype(dtype, copy=False)
    return values, pc.list_value_length(column).to_numpy(zero_copy_only=False).astype(np.int64)


def _ends(lengths: np.ndarray) -> np.ndarray:
    """Return where parts of these lengths start, and the end."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _refuse_unequal(row_ids: pa.Array, lengths: np.ndarray, others: np.ndarray, what: str) -> None:
    odd = np.flatnonzero(lengths != others)
    if len(odd):
        row = int(odd[0])
        raise ValueError(
            f"row {row_ids[row].as_py()}: {lengths[row]} ids but {what} of {others[row]}"
        )
