"""Deduplication over Ray: keys where the rows are, pairs in the driver, comparison in tasks.

The driver holds some numbers of each row (`KEY_COLUMNS`), never its text. The texts of candidate
duplicates go from their blocks straight to the task that compares them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.data import Dataset

from tuneloop.config import DedupConfig
from tuneloop.data.dedup.minhash import (
    MANY,
    OWN_PART,
    CandidateGroup,
    Duplicates,
    GroupTexts,
    Keys,
    OwnBands,
    ResolvedGroup,
    find_duplicates,
    resolve_group,
    scoped_hashes,
)
from tuneloop.data.hashing import kernels
from tuneloop.data.hashing.columns import ComparedSide, Hashes, Indices, Texts, as_matrix
from tuneloop.data.hashing.content import Content
from tuneloop.data.hashing.signatures import (
    Shingles,
    bands_of_own_parts,
    normalised_hashes,
    own_parts,
    shingles,
)

KEY_COLUMNS = ["content_id", "num_characters", "synthetic", "exact_key", "bands"]
_BLOCKS_PER_TASK = 2
# Shingles of crowded rows are counted in so many tasks, each some of the hashes.
_COUNTING_TASKS = 8
# An answer with one of these is code, a formula or JSON, where each sign counts; others may differ
# a little as long as their numbers are the same.
_CODE = re.compile(r"[{}\[\]<>=+*/\\|^&%$#@~`]")
_NUMBER = re.compile(r"(?<!\w)-?\d+(?:[.,:]\d+)*")
_LAST_PUNCTUATION = re.compile(r"[\s.,;:!?…。！？]+$")
# Tables of texts on their way from tasks to groups: each is an object that the driver tracks.
_MOST_TABLES = 1_000_000


class _CrowdedRows(NamedTuple):
    """Rows that share a part with many: keys, ascending, and the most rows with an own shingle."""

    keys: Indices
    limits: Indices
    content: Content
    config: DedupConfig


class _ShingleCounts(NamedTuple):
    """In how many crowded rows shingles are that are in many; hashes ascending. Shape (F,)."""

    hashes: Hashes
    num_rows: Indices

    def of(self, hashes: Hashes) -> Indices:
        """Return in how many rows each of these is, 0 if not in many."""
        if not len(self.hashes):
            return np.zeros(len(hashes), dtype=np.int64)
        places = np.searchsorted(self.hashes, hashes)
        places[places == len(self.hashes)] = 0
        return np.where(self.hashes[places] == hashes, self.num_rows[places], 0)


class _WantedTexts(NamedTuple):
    """Rows whose texts are compared: their keys, ascending, and the group each belongs to."""

    keys: Indices
    group: Indices
    content: Content
    on: ComparedSide


class _GroupRows(NamedTuple):
    """The rows of a group, as in `CandidateGroup`; `limits` as in `_CrowdedRows`, or 0."""

    keys: Indices
    scopes: Indices
    pairs: Indices
    limits: Indices


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
    comparison = _Comparison(keys, scopes, rows, content, config, np.zeros_like(keys))
    exact = scoped_hashes(table["exact_key"].to_numpy(), scopes)
    return find_duplicates(
        Keys(exact, bands, preference, size), config, comparison.compare, comparison.find_own
    )


def _by_preference(table: pa.Table) -> Indices:
    """Return row indices: people's rows before generated ones, then the longer; ties by content."""
    order = [("synthetic", "ascending"), ("num_characters", "descending")]
    order += [("content_id", "ascending"), ("key", "ascending")]
    indices: Indices = pc.sort_indices(table, sort_keys=order).to_numpy()
    return indices


@dataclass
class _Comparison:
    """Compares rows in tasks.

    Args:
        keys: Key of each row. Shape (N,).
        scopes: Dedup scope of each. Shape (N,).
        rows: Materialized dataset of these rows.
        content: How to read what they say.
        config: What is compared, and how.
        limits: The most rows that a row's own shingle is in; 0 for rows that share no part with
            many. Shape (N,).
        counts: Reference to the `_ShingleCounts`, once they are known.
    """

    keys: Indices
    scopes: Indices
    rows: Dataset
    content: Content
    config: DedupConfig
    limits: Indices
    counts: ray.ObjectRef = field(
        default_factory=lambda: ray.put(_ShingleCounts(np.zeros(0, np.uint64), np.zeros(0, int)))
    )

    def find_own(self, rows: Indices, crowds: Indices) -> OwnBands:
        """Return the own parts of rows that share a part with many; see `find_duplicates`."""
        self.limits[rows] = np.maximum(MANY, crowds // OWN_PART)
        order = rows[np.argsort(self.keys[rows])]
        wanted = ray.put(
            _CrowdedRows(self.keys[order], self.limits[order], self.content, self.config)
        )
        blocks = self.rows.to_arrow_refs()
        chunks = [blocks[i : i + _BLOCKS_PER_TASK] for i in range(0, len(blocks), _BLOCKS_PER_TASK)]
        count = ray.remote(num_cpus=1, num_returns=_COUNTING_TASKS)(_count_shingles)
        counted = [count.remote(wanted, *chunk) for chunk in chunks]
        join = ray.remote(num_cpus=1)(_in_many_rows)
        joined = [join.remote(*(part[i] for part in counted)) for i in range(_COUNTING_TASKS)]
        hashes, num_rows = zip(*ray.get(joined), strict=True)
        self.counts = ray.put(_ShingleCounts(np.concatenate(hashes), np.concatenate(num_rows)))
        find = ray.remote(num_cpus=1)(_own_bands)
        tables = ray.get([find.remote(wanted, self.counts, *chunk) for chunk in chunks])
        table = pa.concat_tables(tables)
        place = np.searchsorted(self.keys[order], table["key"].to_numpy())
        return OwnBands(order[place], as_matrix(table["bands"]))

    def compare(self, groups: Sequence[CandidateGroup]) -> Iterator[ResolvedGroup]:
        """Yield the duplicates in each group, while the next ones are compared."""
        blocks = self.rows.to_arrow_refs()
        group_keys = np.concatenate([self.keys[group.rows] for group in groups])
        number = np.repeat(np.arange(len(groups)), [len(group.rows) for group in groups])
        order = np.argsort(group_keys, kind="stable")
        wanted = ray.put(
            _WantedTexts(group_keys[order], number[order], self.content, self.config.on)
        )
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
                _GroupRows(
                    self.keys[group.rows],
                    self.scopes[group.rows],
                    group.pairs,
                    self.limits[group.rows],
                ),
                self.config,
                self.counts,
                *[of_groups[place] for of_groups in tables],
            )
            for place, group in enumerate(groups)
        ]
        del tables
        while resolved:
            yield ray.get(resolved.pop(0))


def _crowded_shingles(
    wanted: _CrowdedRows, blocks: Sequence[pa.Table]
) -> tuple[Indices, Shingles, Indices]:
    """Return the crowded rows in some blocks: keys, shingles and limits."""
    keys, columns = [], []
    for block in blocks:
        chosen = block.select(["key", *wanted.content.columns]).filter(
            pc.is_in(block["key"], value_set=pa.array(wanted.keys))
        )
        keys.append(chosen["key"].to_numpy())
        compared = wanted.content.column(chosen, wanted.config.on)
        columns.append(pa.table({"compared": compared}))
    key = np.concatenate(keys)
    texts = Texts.of_column(pa.concat_tables(columns)["compared"])
    found = shingles(texts, wanted.config.ngram_words)
    return key, found, wanted.limits[np.searchsorted(wanted.keys, key)]


def _count_shingles(wanted: _CrowdedRows, *blocks: pa.Table) -> list[_ShingleCounts]:
    """Return in how many crowded rows of some blocks shingles are, by the first bits of hashes."""
    _, found, _ = _crowded_shingles(wanted, blocks)
    sets = found.sets()
    hashes, num_rows = np.unique(
        np.concatenate([np.zeros(0, np.uint64), *sets]), return_counts=True
    )
    bounds = [np.uint64(part * (2**64 // _COUNTING_TASKS)) for part in range(1, _COUNTING_TASKS)]
    cuts = [0, *np.searchsorted(hashes, bounds).tolist(), len(hashes)]
    return [_ShingleCounts(hashes[a:b], num_rows[a:b]) for a, b in pairwise(cuts)]


def _in_many_rows(*counts: _ShingleCounts) -> _ShingleCounts:
    """Return the shingles that are in many rows of all blocks."""
    hashes, place = np.unique(np.concatenate([part.hashes for part in counts]), return_inverse=True)
    weights = np.concatenate([part.num_rows for part in counts])
    num_rows = np.bincount(place, weights=weights, minlength=len(hashes)).astype(np.int64)
    is_many = num_rows > MANY
    return _ShingleCounts(hashes[is_many], num_rows[is_many])


def _own_bands(wanted: _CrowdedRows, counts: _ShingleCounts, *blocks: pa.Table) -> pa.Table:
    """Return `key` and `bands` of the crowded rows in some blocks that have a part of their own."""
    keys, found, limits = _crowded_shingles(wanted, blocks)
    own = own_parts(found, counts.of(found.hashes), limits, wanted.config.ngram_words)
    bands = bands_of_own_parts(own.shingles)[own.has_own]
    flat = pa.array(bands.reshape(-1), pa.uint64())
    lists = pa.FixedSizeListArray.from_arrays(flat, bands.shape[1])
    return pa.table({"key": keys[own.has_own], "bands": lists})


def _texts_by_group(
    wanted: _WantedTexts, num_groups: int, *blocks: pa.Table
) -> pa.Table | list[pa.Table]:
    """Return, for each group, a table of its rows in some blocks: `key`, `compared`, `answer`.

    Documents have no answer, and it counts only where both sides are compared: all of its turns.
    """
    tables = []
    for block in blocks:
        is_wanted = pc.is_in(block["key"], value_set=pa.array(wanted.keys))
        rows = block.select(["key", *wanted.content.columns]).filter(is_wanted)
        compared = wanted.content.column(rows, wanted.on)
        columns = {"key": rows["key"], "compared": compared}
        if wanted.on == "both" and not wanted.content.is_text:
            columns["answer"] = wanted.content.answers(rows)
        tables.append(pa.table(columns))
    table = pa.concat_tables(tables)
    group = wanted.group[np.searchsorted(wanted.keys, table["key"].to_numpy())]
    by_group = [table.filter(pa.array(group == place)) for place in range(num_groups)]
    return by_group[0] if num_groups == 1 else by_group


def _resolve_texts(
    group: _GroupRows, config: DedupConfig, counts: _ShingleCounts, *tables: pa.Table
) -> ResolvedGroup:
    """Return the duplicates in a group, from tables of `_texts_by_group`."""
    table = pa.concat_tables(tables)
    table = table.take(pc.index_in(pa.array(group.keys), value_set=table["key"]))
    of_rows = shingles(Texts.of_column(table["compared"]), config.ngram_words)
    texts = GroupTexts.plain(of_rows)
    if group.limits.any():
        own = own_parts(of_rows, counts.of(of_rows.hashes), group.limits, config.ngram_words)
        kinds = np.where(own.has_own, kernels.OWN, kernels.NOTHING_OWN)
        kinds[group.limits == 0] = kernels.WHOLE
        parts = own.shingles.in_order()
        kinds = kinds.astype(np.int8)
        texts = texts._replace(own=kernels.OwnParts(kinds, parts.hashes, parts.offsets))
    if "answer" in table.column_names:
        texts = texts._replace(answers=compared_answers(table["answer"].to_pylist()))
    return resolve_group(group.pairs, texts, group.scopes, config.threshold)


def compared_answers(answers: Sequence[str]) -> kernels.Answers:
    """Return what is compared of answers.

    They are the same if they differ in case, space and punctuation at the end only, and nearly so
    if they are prose with the same numbers in which few words differ.
    """
    bare = ["".join(_LAST_PUNCTUATION.sub("", answer).split()) for answer in answers]
    numbers: dict[tuple[str, ...], int] = {}
    signs = [
        -1 if _CODE.search(a) else numbers.setdefault(tuple(_NUMBER.findall(a)), len(numbers))
        for a in answers
    ]
    words = shingles(answers, 2).in_order()
    keys = normalised_hashes(Texts.of(bare))
    return kernels.Answers(keys, np.array(signs, np.int64), words.hashes, words.offsets)
