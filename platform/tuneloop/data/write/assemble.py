"""From tokenized rows and where each goes to tables in the order in which they are written.

The driver knows beforehand where every row goes, so nothing is sorted as a whole. The order of all
rows is cut into output partitions. Tasks finish some blocks each and deal their rows out to the
partitions; further tasks put the pieces of a partition in order. The driver holds one partition at
a time. Rows stay in Arrow: none becomes a Python object on the way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data

from tuneloop.data.hashing.columns import Indices, one_array
from tuneloop.data.ledger import Ledger
from tuneloop.data.schema import Side, dataset_schema, plain_messages, removed_schema
from tuneloop.data.tokenize.rendering import Rendering
from tuneloop.data.write.own_columns import own_columns
from tuneloop.data.write.packing import (
    merged_pieces,
    num_pieces,
    piece_lengths,
    place_documents,
    rest_lengths,
)
from tuneloop.records import Message

# What a row takes beside its text counts as well: ids, names and hashes.
_CHARACTERS_PER_TABLE, _CHARACTERS_PER_ROW = 4 << 20, 500
# Text, its tokens and their mask.
_BYTES_PER_CHARACTER = 4
# Of blocks on their way to tables: each is an object that the driver knows. Those below 100 KB Ray
# keeps in the driver itself.
_MOST_PARTS, _FEW_PARTS, _BYTES_PER_PART = 1_000_000, 100, 256 << 10
# Where a row goes is one number: its side, its rank there, and which piece of a document it is.
_SIDE_SHIFT, _PIECE_SHIFT = 61, 20
# Two columns for sorting; no column of a user's begins with `#` inside.
_PLACE = [("#order", pa.int64()), ("#position", pa.int64())]


class Assignments(NamedTuple):
    """Where each of N rows goes, in the order of `key`. Shape (N,) each.

    Args:
        keys: Ascending.
        row_ids: All different.
        unit_ids: Equal for rows that stay on one side together.
        order: Where the row goes, or the first piece of a document.
        pack: Where the last piece of a packed document goes; -1 for all other rows.
        position: Place of that piece within its row.
        removal: Row of `removals`; -1 for rows that stay.
        removals: `stage`, `reason`, `kept_row_id`, `similarity`, `reason_code` of removed rows.
    """

    keys: Indices
    row_ids: pa.StringArray
    unit_ids: pa.StringArray
    order: Indices
    pack: Indices
    position: Indices
    removal: Indices
    removals: pa.Table


class Partitions(NamedTuple):
    """How the order of all rows is cut.

    Args:
        cuts: Where each partition but the first begins, ascending.
        sides: Side of each partition; none has rows of two sides.
        blocks_per_task: Blocks that a task finishes.
    """

    cuts: Indices
    sides: list[Side]
    blocks_per_task: int


class _Job(NamedTuple):
    """What each task is told, beside its blocks; `max_seq_len` only of plain text."""

    assignments: Assignments
    partitions: Partitions
    columns: pa.Schema
    rendering: Rendering
    max_seq_len: int | None
    is_plain: bool


class OutputTable(NamedTuple):
    """Finished rows of one side, in their order."""

    side: Side
    rows: pa.Table


def assign(ledger: Ledger, max_seq_len: int | None) -> Assignments:
    """Return where each row goes.

    Args:
        ledger: With the final sides and ranks.
        max_seq_len: Tokens of a row that train documents are packed into; None: they are not.
    """
    count = len(ledger.side)
    order = (ledger.side << _SIDE_SHIFT) + (ledger.rank << _PIECE_SHIFT)
    pack, position = np.full(count, -1, np.int64), np.zeros(count, np.int64)
    if max_seq_len is not None:
        train = np.flatnonzero(ledger.is_on(Side.TRAIN))
        train = train[np.argsort(ledger.rank[train], kind="stable")]
        lengths = ledger.table["num_tokens"].to_numpy()[train]
        places = place_documents(lengths, max_seq_len)
        last = order[train] + num_pieces(lengths, max_seq_len) - 1
        pack[train], position[train] = last[places.leader], places.position
    removal = np.full(count, -1, np.int64)
    removed = np.fromiter(ledger.removals, np.int64, len(ledger.removals))
    removal[removed] = np.arange(len(removed))
    found = ledger.removals.values()
    removals = {
        "stage": pa.array([item.stage.value for item in found], pa.string()),
        "reason": pa.array([item.reason.text for item in found], pa.string()),
        "kept_row_id": pa.array([item.kept_row_id for item in found], pa.string()),
        "similarity": pa.array([item.similarity for item in found], pa.float64()),
        "reason_code": pa.array([item.reason.code.value for item in found], pa.string()),
    }
    assert ledger.unit_ids is not None
    return Assignments(
        ledger.table["key"].to_numpy(),
        ledger.row_ids,
        ledger.unit_ids,
        order,
        pack,
        position,
        removal,
        pa.table(removals),
    )


def assemble(
    rows: ray.data.Dataset,
    ledger: Ledger,
    columns: pa.Schema,
    rendering: Rendering,
    max_seq_len: int | None,
    is_plain: bool,
) -> Iterator[OutputTable]:
    """Yield the finished rows in the order to write: train, test, removed, validation.

    Pieces of plain text that share a row are one row of one table.

    Args:
        rows: The materialized dataset of tokenized rows.
        ledger: With the final sides and ranks of these rows.
        columns: The user's own columns, from `ray_rows.column_schema`.
        rendering: How the rows were rendered.
        max_seq_len: Tokens of a row of plain text; None for conversations.
        is_plain: As in `dataset_schema`.
    """
    blocks = rows.to_arrow_refs()
    assignments = assign(ledger, max_seq_len)
    partitions = _partitions(ledger, assignments, len(blocks), rows.size_bytes(), max_seq_len)
    number, step = len(partitions.sides), partitions.blocks_per_task
    job = ray.put(_Job(assignments, partitions, columns, rendering, max_seq_len, is_plain))
    finish = ray.remote(num_cpus=1, num_returns=number)(_finish_blocks)
    parts = [
        finish.remote(job, *blocks[start : start + step]) for start in range(0, len(blocks), step)
    ]
    if number == 1:
        parts = [[part] for part in parts]
    join = ray.remote(num_cpus=1)(_joined)
    waiting: deque[tuple[Side, ray.ObjectRef]] = deque()
    ahead = int(ray.cluster_resources()["CPU"])
    for side in partitions.sides:
        waiting.append((side, join.remote(max_seq_len is not None, *(p.pop(0) for p in parts))))
        if len(waiting) > ahead:
            ready, table = waiting.popleft()
            yield OutputTable(ready, ray.get(table))
    for ready, table in waiting:
        yield OutputTable(ready, ray.get(table))


def _partitions(
    ledger: Ledger,
    assignments: Assignments,
    num_blocks: int,
    num_bytes: int,
    max_seq_len: int | None,
) -> Partitions:
    """Return how to cut the order of all rows, into parts that are neither many nor large.

    Args:
        num_bytes: Size of all tokenized rows.
    """
    order = assignments.order
    size = ledger.table["num_characters"].to_numpy().astype(np.int64)
    # Columns of the user's own, and what an instruction adds.
    more = num_bytes / max(1, len(size)) - _BYTES_PER_CHARACTER * float(np.mean(size))
    size = size + max(_CHARACTERS_PER_ROW, int(more))
    packed = np.flatnonzero(assignments.pack >= 0)
    if max_seq_len is not None:
        # The last piece of a document goes where its row is.
        tokens = ledger.table["num_tokens"].to_numpy()[packed].astype(np.int64)
        rest = rest_lengths(tokens, max_seq_len)
        last = (size[packed] * (rest / np.maximum(1, tokens))).astype(np.int64)
        size[packed] -= last
        order = np.concatenate([order, assignments.pack[packed]])
        size = np.concatenate([size, last])
    by_order = np.argsort(order, kind="stable")
    order, so_far = order[by_order], np.cumsum(size[by_order], dtype=np.int64)
    number = max(1, -(-int(so_far[-1]) // _CHARACTERS_PER_TABLE))
    most = min(_MOST_PARTS, max(_FEW_PARTS, num_bytes // _BYTES_PER_PART))
    too_many = max(1.0, (number * num_blocks / most) ** 0.5)
    number = max(1, int(number / too_many))
    cuts = order[np.searchsorted(so_far, so_far[-1] / number * np.arange(1, number))]
    sides = order >> _SIDE_SHIFT
    starts = order[np.flatnonzero(np.diff(sides, prepend=-1))]
    starts = np.unique(np.concatenate([starts, cuts]))
    return Partitions(
        starts[1:], [Side(start) for start in starts >> _SIDE_SHIFT], int(np.ceil(too_many))
    )


def _finish_blocks(job: _Job, *blocks: pa.Table) -> pa.Table | list[pa.Table]:
    """Return the finished rows of some blocks, a table for each partition."""
    sides = job.partitions.sides
    parts: list[list[pa.Table]] = [[] for _ in sides]
    for block in blocks:
        for table, is_removed in ((_finished(block, job), False), (_removed(block, job), True)):
            order = table["#order"].to_numpy()
            partition = np.searchsorted(job.partitions.cuts, order, side="right")
            by_partition = np.argsort(partition, kind="stable")
            bounds = np.searchsorted(partition[by_partition], np.arange(len(sides) + 1)).tolist()
            for number, side in enumerate(sides):
                if (side is Side.REMOVED) == is_removed:
                    # Copied, as a slice would be sent with all of the table.
                    rows = by_partition[bounds[number] : bounds[number + 1]]
                    parts[number].append(table.take(rows))
    tables = [pa.concat_tables(of_blocks) for of_blocks in parts]
    return tables[0] if len(tables) == 1 else tables


def _joined(is_text: bool, *parts: pa.Table) -> pa.Table:
    """Return the rows of one partition in their order, with pieces that share a row as one."""
    table = pa.concat_tables(parts)
    table = table.sort_by([(name, "ascending") for name, _ in _PLACE])
    if is_text and "document_ids" in table.column_names:
        table = merged_pieces(table)
    return table.drop_columns([name for name, _ in _PLACE])


def _removed(block: pa.Table, job: _Job) -> pa.Table:
    """Return the removed rows of a block."""
    assignments = job.assignments
    index = np.searchsorted(assignments.keys, block["key"].to_numpy())
    is_removed = assignments.removal[index] >= 0
    block, index = block.filter(is_removed), index[is_removed]
    messages = one_array(block["messages"])
    contents = messages.values.field("content")
    if messages.values.field("tool_calls").null_count < len(contents):
        contents = pa.array([Message.of(turn).text for turn in messages.values.to_pylist()])
    contents = pa.ListArray.from_arrays(messages.offsets, contents)
    texts = pc.binary_join(contents, "\n\n")
    columns = {
        "row_id": assignments.row_ids.take(index),
        "text": pc.if_else(pc.equal(texts, ""), one_array(block["text"]), texts),
        "source": block["source"],
    }
    removals = assignments.removals.take(assignments.removal[index])
    columns |= {name: removals[name] for name in removals.column_names}
    columns |= {"#order": assignments.order[index], "#position": np.zeros(len(index), np.int64)}
    return pa.table(columns, schema=_with_place(removed_schema()))


def _finished(block: pa.Table, job: _Job) -> pa.Table:
    """Return the rows of a block that stay; of documents their pieces."""
    assignments = job.assignments
    index = np.searchsorted(assignments.keys, block["key"].to_numpy())
    stays = assignments.removal[index] < 0
    if not stays.all():
        block, index = block.filter(stays), index[stays]
    names = ("source", "synthetic", "num_tokens", "input_ids", "loss_mask")
    columns = {name: block[name] for name in names}
    columns |= {"row_id": assignments.row_ids.take(index), "#order": assignments.order[index]}
    columns["split_unit"] = assignments.unit_ids.take(index)
    columns |= own_columns(block["extra"], job.columns)
    if job.max_seq_len is None:
        messages = one_array(block["messages"])
        columns["messages"] = plain_messages(messages) if job.is_plain else messages
        columns["tools"] = pc.if_else(pc.equal(block["tools"], ""), None, block["tools"])
        columns["#position"] = np.zeros(len(index), np.int64)
    else:
        columns["text"] = block["text"]
        pieces = _pieces(pa.table(columns), index, job)
        columns = {name: pieces[name] for name in pieces.column_names}
    schema = _with_place(dataset_schema(job.columns, job.max_seq_len is not None, job.is_plain))
    return pa.table({name: columns[name] for name in schema.names}, schema)


def _pieces(table: pa.Table, index: Indices, job: _Job) -> pa.Table:
    """Return documents cut into pieces; the last one of each where `assign` puts it.

    Args:
        table: Documents.
        index: Their positions in the assignments.
    """
    assert job.max_seq_len is not None
    assignments = job.assignments
    count = num_pieces(table["num_tokens"], job.max_seq_len)
    sizes = piece_lengths(table["num_tokens"], job.max_seq_len)
    document = np.repeat(np.arange(len(count)), count)
    number = np.arange(len(document)) - np.repeat(np.cumsum(count) - count, count)
    is_cut = count[document] > 1
    is_packed = (number == count[document] - 1) & (assignments.pack[index] >= 0)[document]
    columns = {}
    for name in table.column_names:
        column = one_array(table[name])
        if name in ("input_ids", "loss_mask"):
            # Pieces only put other borders between the tokens.
            offsets = column.offsets[0].as_py() + np.concatenate([[0], np.cumsum(sizes)])
            columns[name] = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), column.values)
        else:
            columns[name] = column.take(pa.array(document, mask=is_cut & (name == "text")))
    row_ids = pc.binary_join_element_wise(
        columns["row_id"], pa.array(number).cast(pa.string()), "."
    )
    columns["row_id"] = pc.if_else(is_cut, row_ids, columns["row_id"])
    texts = _texts_of_cut(table, count, sizes, job.rendering)
    columns["text"] = pc.replace_with_mask(columns["text"], is_cut, pa.array(texts, pa.string()))
    each = pa.array(np.arange(len(document) + 1), pa.int32())
    own = index[document]
    return pa.table(
        columns
        | {
            "num_tokens": sizes,
            "document_ids": pa.ListArray.from_arrays(each, columns["row_id"]),
            "document_lengths": pa.ListArray.from_arrays(each, pa.array(sizes, pa.int32())),
            "#order": np.where(is_packed, assignments.pack[own], assignments.order[own] + number),
            "#position": np.where(is_packed, assignments.position[own], 0),
        }
    )


def _texts_of_cut(
    table: pa.Table, count: Indices, sizes: Indices, rendering: Rendering
) -> Iterator[str]:
    """Yield what each piece of the documents that are cut says.

    Args:
        count: Pieces of each document.
        sizes: Tokens of each piece.
    """
    ends = np.cumsum(count)
    for document in np.flatnonzero(count > 1).tolist():
        ids = table["input_ids"][document].values.to_numpy()
        own = sizes[ends[document] - count[document] : ends[document]]
        pieces = np.split(ids, np.cumsum(own)[:-1])
        yield from rendering.renderer().piece_texts(table["text"][document].as_py(), pieces)


def _with_place(schema: pa.Schema) -> pa.Schema:
    return pa.schema([*schema, *_PLACE])
