"""From tokenized rows and what became of each to tables in the order in which they are written.

Where a row goes is known to the deciding process beforehand, so nothing has to be sorted as a
whole: blocks are finished and cut by where their rows go, in tasks, and the parts of each stretch
are put together in further ones. The deciding process holds one stretch at a time.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np

from tuneloop.data.ray_rows import batch_size
from tuneloop.data.schema import Side, dataset_schema, document_columns, removed_schema
from tuneloop.data.tokenize.rendering import Rendering, chunks
from tuneloop.data.write.packing import merged_pieces, num_pieces, place_documents, rest_lengths

# What a row takes beside its text counts as well: ids, names and hashes.
_CHARACTERS_PER_TABLE, _CHARACTERS_PER_ROW = 4 << 20, 500
# Text, its tokens and their mask.
_BYTES_PER_CHARACTER = 4
# Of blocks on their way to tables: each is an object that the deciding process knows. Those below
# 100 KB Ray keeps in that process itself.
_MOST_PARTS, _FEW_PARTS, _BYTES_PER_PART = 1_000_000, 100, 256 << 10
_SIDE_SHIFT, _CHUNK_SHIFT = 61, 20
_FINISHED_FROM = [
    *("source", "synthetic", "messages", "text", "extra"),
    "num_tokens",
]
_PER_TOKEN = ("input_ids", "loss_mask")


def final_rows(rows: Any, assignments: Any, columns: Any, rendering: Rendering) -> Iterator[Any]:
    """Yield Arrow tables of finished rows in the order to write; `#side` says where they go.

    Pieces of plain text that share a row are one row of one table.

    Args:
        rows: The materialized Ray dataset of tokenized rows.
        assignments: Arrow table in the order of `key` with side, rank, pack and position (of
            `row_places`), row_id, stage, reason, kept_row_id and similarity, num_characters and
            num_tokens of every row.
        columns: Of `ray_rows.column_schema`.
        rendering: Of the rows.
    """
    import ray

    blocks = [ref for bundle in rows.iter_internal_ref_bundles() for ref in bundle.block_refs]
    step, borders = _stretches(rows, assignments, len(blocks), rendering)
    number = len(borders) + 1
    given = ray.put((assignments, columns, rendering, borders, batch_size(rows)))
    finish = ray.remote(num_cpus=1, num_returns=number)(_finish_blocks)
    parts = [
        finish.remote(given, *blocks[start : start + step]) for start in range(0, len(blocks), step)
    ]
    if number == 1:
        parts = [[part] for part in parts]
    join = ray.remote(num_cpus=1)(_joined)
    is_text = rendering.task.type == "language_modeling"
    waiting: deque[Any] = deque()
    ahead = int(ray.cluster_resources()["CPU"])
    for _ in range(number):
        waiting.append(join.remote(is_text, *(own.pop(0) for own in parts)))
        if len(waiting) > ahead:
            yield ray.get(waiting.popleft())
    while waiting:
        yield ray.get(waiting.popleft())


def _stretches(
    rows: Any, assignments: Any, num_blocks: int, rendering: Rendering
) -> tuple[int, Any]:
    """Return how many blocks to finish in a task, and at which places in the order to cut."""
    rank = assignments["rank"].to_numpy().astype(np.int64)
    side = assignments["side"].to_numpy().astype(np.int64) << _SIDE_SHIFT
    order = side + (rank << _CHUNK_SHIFT)
    size = assignments["num_characters"].to_numpy().astype(np.int64)
    # Columns of the user's own, and what an instruction adds.
    more = rows.size_bytes() / max(1, rows.count()) - _BYTES_PER_CHARACTER * float(np.mean(size))
    size = size + max(_CHARACTERS_PER_ROW, int(more))
    packed = assignments["pack"].is_valid().to_numpy()
    if packed.any():
        # The last piece of a document goes where its row is.
        tokens = assignments["num_tokens"].to_numpy()[packed].astype(np.int64)
        rest = rest_lengths(tokens, rendering.data.max_seq_len)
        last = (size[packed] * (rest / np.maximum(1, tokens))).astype(np.int64)
        size[packed] -= last
        pack = assignments["pack"].filter(assignments["pack"].is_valid()).to_numpy()
        order = np.concatenate([order, side[packed] + pack])
        size = np.concatenate([size, last])
    by_order = np.argsort(order, kind="stable")
    so_far = np.cumsum(size[by_order], dtype=np.int64)
    number = max(1, -(-int(so_far[-1]) // _CHARACTERS_PER_TABLE))
    most = min(_MOST_PARTS, max(_FEW_PARTS, rows.size_bytes() // _BYTES_PER_PART))
    too_many = max(1.0, (number * num_blocks / most) ** 0.5)
    number = max(1, int(number / too_many))
    cuts = np.searchsorted(so_far, so_far[-1] / number * np.arange(1, number))
    return int(np.ceil(too_many)), np.unique(order[by_order[cuts]])


def _finish_blocks(given: Any, *blocks: Any) -> Any:
    """Return the finished rows of some blocks, a table for each stretch."""
    import pyarrow as pa

    assignments, columns, rendering, borders, size = given
    cut: list[list[Any]] = [[] for _ in range(len(borders) + 1)]
    for block in blocks:
        for start in range(0, block.num_rows, size):
            table = _finish_batch(block.slice(start, size), assignments, columns, rendering)
            stretch = np.searchsorted(borders, table["#order"].to_numpy(), side="right")
            for place in np.unique(stretch).tolist():
                cut[place].append(table.filter(pa.array(stretch == place)))
    empty = _finished_schema(columns).empty_table()
    found = [pa.concat_tables([empty, *tables]) for tables in cut]
    return found[0] if len(found) == 1 else found


def _joined(is_text: bool, *parts: Any) -> Any:
    """Return the rows of one stretch in their order, with pieces that share a row as one."""
    import pyarrow as pa

    table = pa.concat_tables(parts)
    table = table.sort_by([("#order", "ascending"), ("#position", "ascending")])
    return merged_pieces(table) if is_text else table


def row_places(num_tokens: Any, ranks: Any, max_seq_len: int) -> tuple[Any, Any]:
    """Return (pack, position) of documents: where the last piece of each one goes.

    Args:
        num_tokens: Of the documents of one split. Shape (N,).
        ranks: Their places within the split, from 0. Shape (N,).
        max_seq_len: Tokens of the longest row.
    """
    order = np.argsort(ranks, kind="stable")
    ordered = np.asarray(num_tokens)[order]
    places = place_documents(ordered, max_seq_len)
    numbers = num_pieces(ordered, max_seq_len) - 1
    pack, position = np.empty(len(order), np.int64), np.empty(len(order), np.int64)
    leader = places.leader
    pack[order] = (np.asarray(ranks)[order][leader] << _CHUNK_SHIFT) + numbers[leader]
    position[order] = places.position
    return pack, position


def _finish_batch(table: Any, assignments: Any, columns: Any, rendering: Rendering) -> Any:
    import pyarrow as pa

    places = np.searchsorted(assignments["key"].to_numpy(), table["key"].to_numpy())
    found = (
        assignments.drop_columns(["num_characters", "num_tokens"])
        .take(pa.array(places))
        .to_pylist()
    )
    is_text = rendering.task.type == "language_modeling"
    # What there is for each token stays in Arrow: pieces only put borders between them.
    tokens = {name: table[name].combine_chunks() for name in _PER_TOKEN}
    ids, starts = tokens["input_ids"].values.to_numpy(), tokens["input_ids"].offsets.to_numpy()
    finished: list[dict[str, Any]] = []
    rows = table.select(_FINISHED_FROM).to_pylist()
    for row, assignment, start in zip(rows, found, starts.tolist(), strict=False):
        own = json.loads(row["extra"])
        contents = [message["content"] for message in row["messages"]]
        row |= {field.name: _value(own.get(field.name), field) for field in columns}
        row |= {f"#{name}": value for name, value in assignment.items()}
        row["row_id"] = assignment["row_id"]
        row["#text"] = "\n\n".join(contents) or row["text"]
        row["#order"] = (assignment["side"] << _SIDE_SHIFT) + (assignment["rank"] << _CHUNK_SHIFT)
        row["#position"] = 0
        if is_text and assignment["side"] != Side.REMOVED:
            finished += _chunk_rows(row, ids[start : start + row["num_tokens"]], rendering)
        else:
            finished.append(row)
    borders = np.concatenate([[0], np.cumsum([row["num_tokens"] for row in finished], dtype=int)])
    schema = _finished_schema(columns)
    small = pa.schema([field for field in schema if field.name not in _PER_TOKEN])
    made = pa.Table.from_pylist(finished, schema=small)
    arrays = {name: made[name] for name in made.column_names}
    for name, column in tokens.items():
        offsets = pa.array(borders + column.offsets[0].as_py(), pa.int32())
        arrays[name] = pa.ListArray.from_arrays(offsets, column.values)
    return pa.table(arrays, schema=schema)


def _chunk_rows(row: dict[str, Any], ids: Any, rendering: Rendering) -> Iterator[dict[str, Any]]:
    """Yield a document's pieces; the last one where `row_places` puts it."""
    pieces = chunks(ids, rendering.data.max_seq_len)
    texts = [row["text"]]
    if len(pieces) > 1:
        texts = rendering.renderer().piece_texts(row["text"], pieces)
    for number, (piece, text) in enumerate(zip(pieces, texts, strict=True)):
        order, position = row["#order"] + number, 0
        if row["#pack"] is not None and number == len(pieces) - 1:
            order = (row["#side"] << _SIDE_SHIFT) + row["#pack"]
            position = row["#position_in_pack"]
        row_id = row["row_id"] if len(pieces) == 1 else f"{row['row_id']}.{number}"
        yield row | {
            "#order": order,
            "#position": position,
            "row_id": row_id,
            "document_ids": [row_id],
            "document_lengths": [len(piece)],
            "#text": text,
            "num_tokens": len(piece),
        }


def _value(value: Any, field: Any) -> Any:
    if field.metadata and value is not None:
        return json.dumps(value, ensure_ascii=False)
    return value


def _finished_schema(columns: Any) -> Any:
    """Return the schema of finished rows; no column of a user's can be called `#…` inside."""
    import pyarrow as pa

    return pa.schema(
        [
            *dataset_schema(columns),
            *[(field.name, field.type) for field in document_columns()],
            ("#order", pa.int64()),
            ("#position", pa.int64()),
            ("#side", pa.int8()),
            *[(f"#{field.name}", field.type) for field in removed_schema()],
        ]
    )
