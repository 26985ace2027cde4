"""Deduplication over Ray: keys where the rows are, pairs in this process, comparison in tasks.

Of each row this process holds some numbers (`KEY_COLUMNS`), never the text. The texts of rows
that may be alike go from their blocks straight to the task that compares them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tuneloop.data.dedup.minhash import (
    Duplicates,
    Group,
    Indices,
    Keys,
    Settled,
    find_duplicates,
    settle,
)
from tuneloop.data.hashing.signatures import Texts, as_matrix, shingles
from tuneloop.data.split.mixture import scoped
from tuneloop.data.tokenize.rendering import Rendering, compared_column, compared_from

KEY_COLUMNS = ["content_id", "num_characters", "synthetic", "exact_key", "bands"]
_BLOCKS_PER_TASK = 2
# Of texts on their way from tasks to groups: each is an object that this process knows.
_MOST_PARTS = 1_000_000


def find_duplicate_rows(table: Any, rows: Any, rendering: Rendering, scopes: Indices) -> Duplicates:
    """Return which rows of a table repeat which.

    What repeats a row of another scope stays, and is in its cluster.

    Args:
        table: Arrow table with `key` and `KEY_COLUMNS`.
        rows: The materialized Ray dataset of these rows, with `key` and `compared_from` at least.
        rendering: Of those; `data.dedup` says what is compared and how.
        scopes: Of the rows of the table, for example the number of their task. Shape (N,).
    """
    keys = table["key"].to_numpy()
    preference = np.empty(len(keys), dtype=np.int64)
    preference[_by_preference(table)] = np.arange(len(keys))
    bands = as_matrix(table["bands"])
    size = table["num_characters"].to_numpy().astype(np.int64)
    compare = functools.partial(_compare, keys=keys, scopes=scopes, rows=rows, rendering=rendering)
    found = Keys(scoped(table["exact_key"].to_numpy(), scopes), bands, preference, size)
    return find_duplicates(found, rendering.data.dedup, compare)


def _by_preference(table: Any) -> Any:
    """Return the rows' places: people's before generated ones, then the longer; ties by content."""
    import pyarrow.compute as pc

    order = [("synthetic", "ascending"), ("num_characters", "descending")]
    order += [("content_id", "ascending"), ("key", "ascending")]
    return pc.sort_indices(table, sort_keys=order).to_numpy()


def _compare(
    groups: Sequence[Group], keys: Indices, scopes: Indices, rows: Any, rendering: Rendering
) -> Iterator[Settled]:
    """Yield what comparing each group shows, while the next ones are compared."""
    import ray

    blocks = [ref for bundle in rows.iter_internal_ref_bundles() for ref in bundle.block_refs]
    wanted = np.concatenate([keys[group.rows] for group in groups])
    number = np.repeat(np.arange(len(groups)), [len(group.rows) for group in groups])
    order = np.argsort(wanted, kind="stable")
    given = ray.put((wanted[order], number[order], rendering))
    select = ray.remote(num_cpus=1, num_returns=len(groups))(_texts_by_group)
    step = max(_BLOCKS_PER_TASK, len(blocks) * len(groups) // _MOST_PARTS)
    parts = [
        select.remote(given, len(groups), *blocks[start : start + step])
        for start in range(0, len(blocks), step)
    ]
    if len(groups) == 1:
        parts = [[part] for part in parts]
    task = ray.remote(num_cpus=1)(_settle_group)
    settled = [
        task.remote(
            (keys[group.rows], scopes[group.rows]),
            group.pairs,
            rendering,
            *[part[place] for part in parts],
        )
        for place, group in enumerate(groups)
    ]
    del parts
    while settled:
        yield ray.get(settled.pop(0))


def _texts_by_group(given: Any, num_groups: int, *blocks: Any) -> Any:
    """Return, for each group, a table of `key` and `compared` text of its rows in some blocks."""
    import pyarrow as pa
    import pyarrow.compute as pc

    wanted, number, rendering = given
    tables = []
    for block in blocks:
        chosen = pc.is_in(block["key"], value_set=pa.array(wanted))
        part = block.select(["key", *compared_from(rendering)]).filter(chosen)
        tables.append(pa.table({"key": part["key"], "compared": compared_column(part, rendering)}))
    table = pa.concat_tables(tables)
    group = number[np.searchsorted(wanted, table["key"].to_numpy())]
    parts = [table.filter(pa.array(group == place)) for place in range(num_groups)]
    return parts[0] if num_groups == 1 else parts


def _settle_group(
    group: tuple[Indices, Indices], pairs: Indices, rendering: Rendering, *parts: Any
) -> Settled:
    """Return what comparing a group shows.

    Args:
        group: Keys and scopes of its rows.
        pairs: Of the group.
        rendering: With the settings of deduplication.
        parts: Tables of `_texts_by_group`.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    keys, scopes = group
    config = rendering.data.dedup
    table = pa.concat_tables(parts)
    texts = table["compared"].take(pc.index_in(pa.array(keys), value_set=table["key"]))
    found = shingles(Texts.of_column(texts), config.ngram_words)
    return settle(pairs, found, scopes, config.threshold)
