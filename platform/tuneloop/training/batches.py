"""Which rows are trained on when: a pure function of seed, epoch and step.

The optimizer sees global batches of `global_batch_size` rows in an order that depends on the seed
and the epoch alone. How a batch is cut into micro-batches and spread over workers changes speed
and memory, never the result.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Rows:
    """All rows of a split, end to end in flat arrays, so that workers share one copy.

    Args:
        row_ids: One id for each row.
        input_ids: int32, shape (all tokens,).
        loss_mask: int8, shape (all tokens,); 1 where the token is a target.
        offsets: int64, shape (rows + 1,); row i is `offsets[i]:offsets[i + 1]`.
        documents: int64, shape (documents + 1,), where documents start, and the end. A row of
            plain text holds several, which do not see each other; any other row is one.
    """

    row_ids: list[str]
    input_ids: np.ndarray
    loss_mask: np.ndarray
    offsets: np.ndarray
    documents: np.ndarray

    def __len__(self) -> int:
        return len(self.row_ids)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row. Shape (rows,)."""
        return np.diff(self.offsets)

    @property
    def num_target_tokens(self) -> np.ndarray:
        """Targets of each row that have a token of their document before them. Shape (rows,)."""
        mask = self.loss_mask.astype(np.int64)
        mask[self.documents[:-1][np.diff(self.documents) > 0]] = 0
        sums = np.concatenate([[0], np.cumsum(mask)])
        return sums[self.offsets[1:]] - sums[self.offsets[:-1]]

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and loss mask of one row. Shapes (T,), (T,)."""
        part = slice(self.offsets[index], self.offsets[index + 1])
        return self.input_ids[part], self.loss_mask[part]

    def document_lengths(self, index: int) -> list[int]:
        """Return the tokens of each document of one row; they add up to the row's."""
        first, last = np.searchsorted(self.documents, self.offsets[index : index + 2])
        return np.diff(self.documents[first : last + 1]).tolist()


def read_rows(dataset: Path, split: str = "train") -> Rows:
    """Return all rows of one split of a dataset artifact, in the order of its files."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted((dataset / split).glob("*.parquet"))
    columns = ["row_id", "input_ids", "loss_mask"]
    if files and "document_lengths" in pq.read_schema(files[0]).names:
        columns.append("document_lengths")
    tables = [pq.read_table(file, columns=columns) for file in files]
    table = pa.concat_tables(tables) if tables else pa.table({name: [] for name in columns})
    return make_rows(*(table.column(name).to_pylist() for name in columns))


def make_rows(
    row_ids: list[str],
    input_ids: list[list[int]],
    loss_mask: list[list[int]],
    document_lengths: list[list[int]] | None = None,
) -> Rows:
    """Return rows in flat arrays.

    Args:
        row_ids: One for each row.
        input_ids: Of each row.
        loss_mask: Of each row, as long as its ids.
        document_lengths: Tokens of the documents of each row. Default: a row is one document.

    Raises:
        ValueError: A row's ids differ in length from its mask or its documents.
    """
    lengths = [len(ids) for ids in input_ids]
    if document_lengths is None:
        document_lengths = [[length] for length in lengths]
    for row_id, length, parts in zip(row_ids, lengths, document_lengths, strict=True):
        if sum(parts) != length:
            raise ValueError(f"row {row_id}: {length} ids but documents of {sum(parts)}")
    for row_id, ids, mask in zip(row_ids, input_ids, loss_mask, strict=True):
        if len(ids) != len(mask):
            raise ValueError(f"row {row_id}: {len(ids)} ids but a mask of {len(mask)}")
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    parts = [part for row in document_lengths for part in row if part]
    documents = np.concatenate([[0], np.cumsum(parts)]).astype(np.int64)
    flat_ids = np.fromiter((token for ids in input_ids for token in ids), np.int32, offsets[-1])
    flat_mask = np.fromiter((bit for mask in loss_mask for bit in mask), np.int8, offsets[-1])
    return Rows(row_ids, flat_ids, flat_mask, offsets, documents)


@dataclass(frozen=True)
class Schedule:
    """The order of global batches over all epochs.

    Args:
        num_rows: Rows in the train split.
        global_batch_size: Rows of one optimizer step; the last of an epoch may have fewer.
        num_epochs: Passes over the rows.
        max_steps: Ends the training earlier.
        seed: Of the order.
    """

    num_rows: int
    global_batch_size: int
    num_epochs: int
    max_steps: int | None
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.num_rows / self.global_batch_size)

    @property
    def num_steps(self) -> int:
        """Optimizer steps in all."""
        total = self.steps_per_epoch * self.num_epochs
        return total if self.max_steps is None else min(total, self.max_steps)

    def epoch(self, step: int) -> int:
        """Return the epoch, from 0, that a step from 0 belongs to."""
        return step // self.steps_per_epoch

    def batch(self, step: int) -> np.ndarray:
        """Return the rows of one step. Shape (at most global_batch_size,)."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(self.num_rows)
        start = position * self.global_batch_size
        return order[start : start + self.global_batch_size]


def split_batch(
    batch: np.ndarray, lengths: np.ndarray, num_bins: int, size: int
) -> list[list[int]]:
    """Cut a global batch into micro-batches with about the same number of tokens.

    Longest first into the lightest micro-batch that has room (Graham 1969, LPT).

    Args:
        batch: Row numbers. Shape (rows,).
        lengths: Tokens of every row of the split.
        num_bins: Micro-batches of one step on all workers together.
        size: Most rows in a micro-batch.

    Returns:
        `num_bins` lists of row numbers; some are empty when the batch is an incomplete one.
    """
    if len(batch) > num_bins * size:
        raise ValueError(f"{len(batch)} rows do not fit {num_bins} micro-batches of {size}")
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    heap = [(0, index) for index in range(num_bins)]
    for row in sorted(batch.tolist(), key=lambda row: (-int(lengths[row]), row)):
        tokens, index = heapq.heappop(heap)
        bins[index].append(row)
        if len(bins[index]) < size:
            heapq.heappush(heap, (tokens + int(lengths[row]), index))
    return bins


def micro_batches(bins: list[list[int]], rank: int, world_size: int) -> list[list[int]]:
    """Return the micro-batches of one worker: the same number on every rank."""
    if len(bins) % world_size:
        raise ValueError(f"{len(bins)} micro-batches cannot be shared by {world_size} workers")
    return bins[rank::world_size]
