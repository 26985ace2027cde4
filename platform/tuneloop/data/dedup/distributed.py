"""Deduplication over Ray: keys where the rows are, pairs in the driver, comparison in tasks.

The driver holds some numbers of each row (`KEY_COLUMNS`), never its text. The texts of candidate
duplicates go from their blocks straight to the task that compares them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.data import Dataset

from tuneloop.config import DedupConfig
from tuneloop.data.dedup.minhash import (
    CandidateGroup,
    Duplicates,
    Keys,
    ResolvedGroup,
    find_duplicates,
    resolve_group,
    scoped_hashes,
)
from tuneloop.data.hashing.columns import ComparedSide, Indices, Texts, as_matrix
from tuneloop.data.hashing.content import Content
from tuneloop.data.hashing.signatures import shingles

KEY_COLUMNS = ["content_id", "num_characters", "synthetic", "exact_key", "bands"]
_BLOCKS_PER_TASK = 2
# Tables of texts on their way from tasks to groups: each is an object that the driver tracks.
_MOST_TABLES = 1_000_000


class _WantedTexts(NamedTuple):
    """Rows whose texts are compared: their keys, ascending, and the group each belongs to."""

    keys: Indices
    group: Indices
    content: Content
    on: ComparedSide


class _GroupRows(NamedTuple):
    """The rows of a group, as in `CandidateGroup`."""

    keys: Indices
    scopes: Indices
    pairs: Indices


def find_duplicate_rows(
    table: pa.Table, rows: Dataset, content: Content, config: DedupConfig, scopes: Indices
) -> Duplicates:
    """Return which rows of a table repeat which.

    A row that repeats one of another scope stays, and is in its cluster.

    Args:
        table: `key` and `KEY_COLUMNS` of N rows.
        rows: Materialized dataset of these rows, with `key` and `content.columns` at least.
        content: How to read what they say.
        config: What is compared, and how.
        scopes: Dedup scope of each row of the table. Shape (N,).
    """
    keys = table["key"].to_numpy()
    preference = np.empty(len(keys), dtype=np.int64)
    preference[_by_preference(table)] = np.arange(len(keys))
    bands = as_matrix(table["bands"])
    size = table["num_characters"].to_numpy().astype(np.int64)
    compare = functools.partial(
        _compare, keys=keys, scopes=scopes, rows=rows, content=content, config=config
    )
    exact = scoped_hashes(table["exact_key"].to_numpy(), scopes)
    return find_duplicates(Keys(exact, bands, preference, size), config, compare)


def _by_preference(table: pa.Table) -> Indices:
    """Return row indices: people's rows before generated ones, then the longer; ties by content."""
    order = [("synthetic", "ascending"), ("num_characters", "descending")]
    order += [("content_id", "ascending"), ("key", "ascending")]
    indices: Indices = pc.sort_indices(table, sort_keys=order).to_numpy()
    return indices


def _compare(
    groups: Sequence[CandidateGroup],
    keys: Indices,
    scopes: Indices,
    rows: Dataset,
    content: Content,
    config: DedupConfig,
) -> Iterator[ResolvedGroup]:
    """Yield the duplicates in each group, while the next ones are compared."""
    blocks = rows.to_arrow_refs()
    group_keys = np.concatenate([keys[group.rows] for group in groups])
    number = np.repeat(np.arange(len(groups)), [len(group.rows) for group in groups])
    order = np.argsort(group_keys, kind="stable")
    wanted = ray.put(_WantedTexts(group_keys[order], number[order], content, config.on))
    select = ray.remote(num_cpus=1, num_returns=len(groups))(_texts_by_group)
    step = max(_BLOCKS_PER_TASK, len(blocks) * len(groups) // _MOST_TABLES)
    tables = [
        select.remote(wanted, len(groups), *blocks[start : start + step])
        for start in range(0, len(blocks), step)
    ]
    if len(groups) == 1:
        tables = [[table] for table in tables]
    resolve = ray.remote(num_cpus=1)(_resolve_texts)
    resolved = [
        resolve.remote(
            _GroupRows(keys[group.rows], scopes[group.rows], group.pairs),
            config,
            *[of_groups[place] for of_groups in tables],
        )
        for place, group in enumerate(groups)
    ]
    del tables
    while resolved:
        yield ray.get(resolved.pop(0))


def _texts_by_group(
    wanted: _WantedTexts, num_groups: int, *blocks: pa.Table
) -> pa.Table | list[pa.Table]:
    """Return, for each group, a table of `key` and `compared` text of its rows in some blocks."""
    tables = []
    for block in blocks:
        is_wanted = pc.is_in(block["key"], value_set=pa.array(wanted.keys))
        rows = block.select(["key", *wanted.content.columns]).filter(is_wanted)
        compared = wanted.content.column(rows, wanted.on)
        tables.append(pa.table({"key": rows["key"], "compared": compared}))
    table = pa.concat_tables(tables)
    group = wanted.group[np.searchsorted(wanted.keys, table["key"].to_numpy())]
    by_group = [table.filter(pa.array(group == place)) for place in range(num_groups)]
    return by_group[0] if num_groups == 1 else by_group


def _resolve_texts(group: _GroupRows, config: DedupConfig, *tables: pa.Table) -> ResolvedGroup:
    """Return the duplicates in a group, from tables of `_texts_by_group`."""
    table = pa.concat_tables(tables)
    texts = table["compared"].take(pc.index_in(pa.array(group.keys), value_set=table["key"]))
    of_group = shingles(Texts.of_column(texts), config.ngram_words)
    return resolve_group(group.pairs, of_group, group.scopes, config.threshold)
