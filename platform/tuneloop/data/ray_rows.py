"""The steps that Ray Data runs over the rows, and the small tables that come back from them."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray import ObjectRef
from ray.data import Dataset

from tuneloop.config import TuneloopConfig
from tuneloop.data.hashing.columns import ComparedSide, Hashes, Indices
from tuneloop.data.hashing.content import (
    CONTENT_COLUMNS,
    Content,
    rows_with_keys,
    shingles_of_rows,
    texts_of_rows,
)
from tuneloop.data.schema import SourceRow, rendered_schema, row_schema
from tuneloop.data.sources.files import SourceFile
from tuneloop.data.sources.readers import read_source
from tuneloop.data.tokenize.block_cache import KEPT_FROM_ROWS, kept_blocks, make_or_read
from tuneloop.data.tokenize.rendering import Rendering
from tuneloop.data.write.own_columns import Shape, merged_shapes, schema_of, shapes_of
from tuneloop.progress import Progress

logger = logging.getLogger("tuneloop.data")

# What a task or the driver holds at once: fewer rows where they are long.
_ROWS_PER_BLOCK, _BYTES_PER_BLOCK = 2000, 16 << 20
_TASKS_PER_CPU, _BYTES_PER_TASK = 4, 32 << 20


def warm_up(rendering: Rendering) -> ObjectRef:
    """Let a worker load the tokenizer while the files are read; return the reference to wait for.

    Rendering before it is done would make a second worker load it as well.
    """
    return ray.remote(num_cpus=1)(_load_renderer).remote(rendering)


def read_files(files: Sequence[SourceFile], config: TuneloopConfig) -> Dataset:
    """Return a Ray dataset of all rows by `row_schema`: one read task for each file."""
    items = [{"position": position} for position in range(len(files))]
    dataset = ray.data.from_items(items, override_num_blocks=len(items))
    read = functools.partial(_read_batch, files=ray.put(files), config=config)
    blocks = dataset.map_batches(read, batch_size=1, batch_format="pyarrow")
    return blocks.materialize()


def render_rows(
    rows: Dataset,
    render: Callable[[pa.Table], pa.Table],
    warm: ObjectRef,
    scratch: Path,
    progress: Progress,
) -> Dataset:
    """Return the Ray dataset of tokenized rows by `rendered_schema`, once `warm` is done.

    Args:
        render: Makes the tokenized rows of a batch.
        warm: What `warm_up` returned.
        scratch: Where the blocks of a large corpus are kept for a run that has to go on.
        progress: Shows how many rows of a large corpus are done.
    """
    ray.get(warm)
    num_rows = rows.count()
    # Each task costs the driver ten milliseconds and its worker a wait for the next one.
    wanted = max(
        _TASKS_PER_CPU * int(ray.cluster_resources()["CPU"]),
        rows.size_bytes() // _BYTES_PER_TASK,
    )
    size = batch_size(rows)
    num_blocks = min(wanted, -(-num_rows // size))
    if rows.num_blocks() < num_blocks:
        rows = rows.repartition(num_blocks)
    if num_rows < KEPT_FROM_ROWS:
        return rows.map_batches(render, batch_size=size, batch_format="pyarrow").materialize()
    folder = scratch / "tokenized"
    if number := kept_blocks(folder):
        logger.info("%s blocks of tokenized rows are there from an earlier run", f"{number:,}")
    # How many bands a row has is configured, so the draft's fingerprint tells it.
    schema = rendered_schema(1, 1, 1)
    render = functools.partial(make_or_read, make=render, schema=schema, folder=folder)
    num_batches = num_blocks * -(-num_rows // (num_blocks * size))

    def rows_done() -> int:
        number = sum(1 for _ in folder.glob("*.arrow"))
        return min(num_rows, round(number / num_batches * num_rows))

    progress.total = num_rows
    with progress.following(rows_done, logger):
        return rows.map_batches(render, batch_size=size, batch_format="pyarrow").materialize()


def collect(rows: Dataset, columns: Sequence[str]) -> pa.Table:
    """Return some columns of all rows as one table in the order of `key`; there must be a row."""
    wanted = list(dict.fromkeys(["key", *columns]))
    batches = rows.select_columns(wanted).iter_batches(batch_size=None, batch_format="pyarrow")
    tables = [batch.select(wanted) for batch in batches if batch.num_rows]
    # Blocks come in any order, the rows of one in theirs: sorting all would copy them twice.
    tables.sort(key=lambda table: table["key"][0].as_py())
    found = pa.concat_tables(tables)
    keys = found["key"].to_numpy()
    # A copy of its own, so that the object store need not keep the blocks.
    return found.combine_chunks() if (keys[1:] > keys[:-1]).all() else found.sort_by("key")


def fetch_rows(rows: Dataset, keys: Indices) -> list[dict[str, Any]]:
    """Return the columns of `CONTENT_COLUMNS` of the rows with some keys."""
    select = functools.partial(rows_with_keys, keys=np.sort(keys))
    return [row for batch in map_contents(rows, select) for row in batch.to_pylist()]


def fetch_whole(rows: Dataset, keys: Indices) -> pa.Table:
    """Return all columns of the rows with some keys."""
    select = functools.partial(rows_with_keys, keys=np.sort(keys))
    chosen = rows.map_batches(select, batch_format="pyarrow")
    return pa.concat_tables(chosen.iter_batches(batch_size=None, batch_format="pyarrow"))


def fetch_shingles(
    rows: Dataset, keys: Indices, content: Content, on: ComparedSide, ngram_words: int
) -> dict[int, Hashes]:
    """Return the sorted distinct shingle hashes of the rows with some keys, by key."""
    select = functools.partial(
        shingles_of_rows, keys=np.sort(keys), content=content, on=on, ngram_words=ngram_words
    )
    found: dict[int, Hashes] = {}
    for batch in map_contents(rows, select):
        for key, values in zip(batch["key"].to_pylist(), batch["shingles"], strict=True):
            found[key] = values.values.to_numpy(zero_copy_only=False).astype(np.uint64)
    return found


class RowTexts(NamedTuple):
    """What a row says; a document has neither prompt nor answer."""

    text: str
    prompt: str
    answer: str


def fetch_texts(rows: Dataset, keys: Indices, content: Content) -> dict[int, RowTexts]:
    """Return what the rows with some keys say, by key."""
    select = functools.partial(texts_of_rows, keys=np.sort(keys), content=content)
    found: dict[int, RowTexts] = {}
    for batch in map_contents(rows, select):
        columns = [batch[name].to_pylist() for name in ("key", "text", "prompt", "answer")]
        found |= {key: RowTexts(*texts) for key, *texts in zip(*columns, strict=True)}
    return found


def map_contents(rows: Dataset, select: Callable[[pa.Table], pa.Table]) -> Iterator[pa.Table]:
    """Yield what a function makes, in tasks, of each block's `key` and `CONTENT_COLUMNS`."""
    columns = rows.select_columns(["key", *CONTENT_COLUMNS])
    chosen = columns.map_batches(select, batch_format="pyarrow")
    yield from chosen.iter_batches(batch_size=None, batch_format="pyarrow")


def column_schema(rows: Dataset) -> pa.Schema:
    """Return the Arrow schema of the user's own columns, over all rows."""
    extras = rows.select_columns(["key", "extra"])
    blocks = extras.map_batches(_column_shapes, batch_format="pyarrow")
    found = [
        row
        for block in blocks.iter_batches(batch_size=None, batch_format="pyarrow")
        for row in block.to_pylist()
    ]
    # Blocks come in any order; the first row says in which one the fields of an object stand.
    found.sort(key=lambda row: row["key"])
    parsed = (json.loads(row["shapes"]) for row in found)
    named = ({name: Shape.from_json(own) for name, own in shapes.items()} for shapes in parsed)
    return schema_of(merged_shapes(named))


def _load_renderer(rendering: Rendering) -> None:
    rendering.renderer()


def _read_batch(table: pa.Table, files: ObjectRef, config: TuneloopConfig) -> Iterator[pa.Table]:
    sources = ray.get(files)
    schema = row_schema()
    for position in table["position"].to_pylist():
        for chunk in _chunked(read_source(sources[position], position, config)):
            plain = [
                row | {"rejection": row["rejection"] and row["rejection"]._asdict()}
                for row in chunk
            ]
            yield pa.Table.from_pylist(plain, schema=schema)
    yield schema.empty_table()


def _chunked(rows: Iterator[SourceRow]) -> Iterator[list[SourceRow]]:
    """Yield rows in lists that are neither too long nor too large."""
    chunk: list[SourceRow] = []
    size = 0
    for row in rows:
        chunk.append(row)
        size += len(row["text"]) + len(row["extra"])
        size += sum(len(message["content"]) for message in row["messages"])
        if len(chunk) >= _ROWS_PER_BLOCK or size >= _BYTES_PER_BLOCK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def batch_size(rows: Dataset) -> int:
    """Return how many rows of a dataset to hold at once."""
    mean = rows.size_bytes() / max(1, rows.count())
    return int(min(_ROWS_PER_BLOCK, max(1, _BYTES_PER_BLOCK // max(1, mean))))


def _column_shapes(table: pa.Table) -> pa.Table:
    shapes = json.dumps(shapes_of(table["extra"].to_pylist())) if table.num_rows else "{}"
    keys = table["key"].slice(0, 1).to_pylist() or [0]
    return pa.table({"key": keys, "shapes": [shapes]})
