"""Packing the pieces of documents into training rows, every token kept once.

A document longer than a row is cut into full rows and a rest; rests and short documents are then
put together so that hardly a position of a row stays empty. A packed row names its documents, so
that training lets each attend to itself only.
"""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Places:
    """Where the last piece of each of N documents goes. Shape (N,) each.

    Args:
        leader: Index of the first document of the row that the piece is packed into.
        position: Place of the piece within that row, from 0.
    """

    leader: Indices
    position: Indices


def num_pieces(lengths: Indices, max_seq_len: int) -> Indices:
    """Return into how many pieces documents of some lengths are cut; at least one each."""
    return np.maximum(1, -(-np.asarray(lengths) // max_seq_len))


def rest_lengths(lengths: Indices, max_seq_len: int) -> Indices:
    """Return the tokens of the last piece of each document; at least two of a longer document."""
    lengths = np.asarray(lengths, dtype=np.int64)
    pieces = num_pieces(lengths, max_seq_len)
    rests = lengths - (pieces - 1) * max_seq_len
    return np.where((pieces > 1) & (rests == 1), 2, rests)


def piece_lengths(lengths: Indices, max_seq_len: int) -> Indices:
    """Return the tokens of all pieces of all documents, in order; each is full but the last ones.

    Where a lone token would be left over, the piece before it gives it one: there must be something
    to predict the last token from.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    count, rests = num_pieces(lengths, max_seq_len), rest_lengths(lengths, max_seq_len)
    last = np.cumsum(count) - 1
    result = np.full(int(count.sum()), max_seq_len, dtype=np.int64)
    result[last] = rests
    is_cut = count > 1
    result[last[is_cut] - 1] = (lengths - rests - (count - 2) * max_seq_len)[is_cut]
    return result


def pack(lengths: Indices, capacity: int) -> Indices:
    """Return the row of each item by best-fit-decreasing bin packing. Shape (N,), from 0.

    The longest item goes first, each into the fullest row that still has room. Which rooms exist
    is one bit each of an integer, so that the best one is found without a search.

    Source: Ding et al. 2024, Fewer Truncations Improve Language Modeling, arXiv:2404.10830,
    section 3.2.

    Args:
        lengths: Tokens of each item, 0 to `capacity`. Shape (N,).
        capacity: Tokens that fit a row.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) and int(lengths.max()) > capacity:
        raise ValueError(f"an item of {int(lengths.max())} tokens is longer than {capacity}")
    order = np.argsort(-lengths, kind="stable")
    rows_with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0
    num_rows = 0
    # Arrays of numbers: a list would hold an object for each.
    chosen = array("q")
    for length in array("q", lengths[order].tobytes()):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, num_rows
            num_rows += 1
        left = room - length
        if not rows_with_room[left]:
            rooms |= 1 << left
        rows_with_room[left].append(row)
        chosen.append(row)
    result = np.empty(len(lengths), dtype=np.int64)
    result[order] = chosen
    return result


def place_documents(num_tokens: Indices, max_seq_len: int) -> Places:
    """Return where the last pieces of documents go; all other pieces fill a row of their own.

    Args:
        num_tokens: Tokens of each document, in the order of the split. Shape (N,).
        max_seq_len: Tokens that fit a row.
    """
    rows = pack(rest_lengths(num_tokens, max_seq_len), max_seq_len)
    order = np.argsort(rows, kind="stable")
    values = rows[order]
    is_first = np.concatenate([[True], values[1:] != values[:-1]])[: len(values)]
    starts = np.flatnonzero(is_first)
    group = np.cumsum(is_first) - 1
    leader, position = np.empty_like(rows), np.empty_like(rows)
    leader[order] = order[starts][group]
    position[order] = np.arange(len(order)) - starts[group]
    return Places(leader, position)


def merged_pieces(table: pa.Table) -> pa.Table:
    """Return one row for each run of equal `#order`, in which pieces of documents share a row.

    Args:
        table: Finished rows (`assemble`), sorted by `#order` and `#position`.
    """
    orders = table["#order"].to_numpy()
    starts = np.flatnonzero(np.concatenate([[True], orders[1:] != orders[:-1]])[: len(orders)])
    if len(starts) == len(orders):
        return table
    bounds = np.append(starts, len(orders))
    is_shared = np.diff(bounds) > 1
    shared = np.flatnonzero(is_shared).tolist()
    several = pa.array(np.repeat(is_shared, np.diff(bounds)))
    # Rows of one piece are taken as they are, before those that are put together.
    place = np.where(is_shared, np.sum(~is_shared) + np.cumsum(is_shared), np.cumsum(~is_shared))
    order = pa.array(place - 1)
    lengths = np.diff(bounds)[shared].tolist()
    columns = {}
    for field in table.schema:
        column = table[field.name].combine_chunks()
        if field.name in ("input_ids", "loss_mask", "document_lengths", "document_ids"):
            offsets = column.offsets.to_numpy()[bounds]
            values = column.values
            columns[field.name] = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)
            continue
        values = iter(column.filter(several).to_pylist())
        merge = _MERGERS.get(field.name, _agreed)
        merged = [merge(list(itertools.islice(values, length))) for length in lengths]
        single = column.take(pa.array(starts[~is_shared]))
        both = pa.concat_arrays([single, pa.array(merged, field.type)])
        columns[field.name] = both.take(order)
    return pa.table(columns, schema=table.schema)


def _agreed(values: list[Any]) -> Any:
    """Return the value where all documents of a row have the same, else nothing."""
    return values[0] if all(value == values[0] for value in values) else None


def _one_id(row_ids: list[str]) -> str:
    if len(row_ids) == 1:
        return row_ids[0]
    digest = hashlib.sha256("\0".join(row_ids).encode()).hexdigest()
    return f"pack-{digest[:20]}"


_MERGERS: dict[str, Callable[[list[Any]], Any]] = {
    "row_id": _one_id,
    "source": lambda values: ", ".join(dict.fromkeys(values)),
    "text": "\n\n".join,
    "synthetic": any,
    "num_tokens": sum,
}
