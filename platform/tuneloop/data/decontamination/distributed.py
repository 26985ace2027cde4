"""Comparing train rows with held-out rows by n-grams over Ray: all texts stay where the rows are.

The driver knows keys, numbers of words, and the overlaps. The rows of the test and validation split
are taken from their blocks into tables, tables into slices with an index each; then every block of
train rows is looked up in every slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import ray
from ray import ObjectRef
from ray.data import Dataset

from tuneloop.config import DecontaminationConfig
from tuneloop.data.decontamination.matching import HeldOutSet, Match, MatchKind
from tuneloop.data.decontamination.ngrams import (
    NgramCounts,
    NgramIndex,
    Overlaps,
    SharedNgrams,
    best_overlaps,
    count_common,
    count_ngrams,
    joined_counts,
    matched_text,
    ngram_index,
    ngram_length,
    overlapping,
)
from tuneloop.data.hashing.columns import Indices, Texts
from tuneloop.data.hashing.content import CONTENT_COLUMNS, Content, rows_with_keys, texts_of_rows
from tuneloop.data.hashing.signatures import word_counts

# The index of a slice takes some 30 bytes a word, and twice that while it is made.
_WORDS_PER_SLICE = 8_000_000
# A text counts at least one word for so many bytes; there are texts without spaces.
_BYTES_PER_WORD = 16


class NgramMatches(NamedTuple):
    """Train rows that share enough n-grams with a held-out row.

    Args:
        ngram_words: Words of an n-gram for each held-out set; None for one without words.
        matches: At most one for each train row, ascending by its key.
        repeated: Keys of all rows of each held-out set that some train row overlaps.
    """

    ngram_words: list[int | None]
    matches: list[Match]
    repeated: list[Indices]


class _SetOverlaps(NamedTuple):
    """What rows of a block overlap of a held-out set: the best of each, and the keys of all."""

    best: Overlaps
    held_out: Indices


class _HeldOutTable(NamedTuple):
    """A table of `key`, `text` and `prompt` of held-out rows: what is in it, and where it is."""

    keys: Indices
    num_words: Indices
    num_bytes: int
    table: ObjectRef | None = None

    @staticmethod
    def of(keys: Indices, texts: Texts) -> _HeldOutTable:
        return _HeldOutTable(keys, word_counts(texts), len(texts.data))


class _WantedRows(NamedTuple):
    """Keys of rows to take from the blocks, ascending for each split; how to read them."""

    keys: list[Indices]
    content: Content


class _Slice(NamedTuple):
    """The index of some rows of a held-out set."""

    set_index: int
    index: ObjectRef


class _Place(NamedTuple):
    """A held-out row: position of its table, its key there, and the words of an n-gram."""

    table: int
    key: int
    ngram_words: int


class _WantedPassages(NamedTuple):
    """Keys of train rows, ascending, and the held-out row that each overlaps."""

    keys: Indices
    places: list[_Place]
    content: Content


def find_overlaps(
    keys: Indices,
    held_out: Sequence[HeldOutSet],
    rows: Dataset,
    content: Content,
    settings: DecontaminationConfig,
) -> NgramMatches:
    """Return which train rows overlap with held-out rows by n-grams.

    A train row matches once at most: the first set that it overlaps, and of that the row that it
    overlaps most.

    Args:
        keys: Keys of the train rows, ascending.
        held_out: What they are compared with.
        rows: Materialized dataset of all rows, with `key` and their contents.
        content: How to read what they say.
        settings: What is enough.
    """
    blocks = rows.to_arrow_refs()
    tables = _held_out_tables(held_out, blocks, content)
    lengths = [
        np.concatenate([np.zeros(0, int), *(table.num_words for table in of_set)])
        for of_set in tables
    ]
    ngram_words = [ngram_length(num_words, settings.ngram_words) for num_words in lengths]
    make = ray.remote(num_cpus=1)(_index)
    slices = [
        _Slice(set_index, make.remote(length, *(table.table for table in of_slice)))
        for set_index, length in enumerate(ngram_words)
        if length is not None
        for of_slice in _slices(tables[set_index])
    ]
    repeated = [np.zeros(0, np.int64) for _ in held_out]
    if not slices:
        return NgramMatches(ngram_words, [], repeated)
    indices = [of_slice.index for of_slice in slices]
    # A task that waits for what it asks for gives its CPU away, and Ray starts one more worker.
    ray.wait(indices, num_returns=len(indices), fetch_local=False)
    look_up = ray.remote(num_cpus=1, num_returns=len(slices))(_shared)
    train = ray.put(_WantedRows([keys], content))
    shared = [look_up.remote(train, indices, block) for block in blocks]
    if len(slices) == 1:
        shared = [[of_slice] for of_slice in shared]
    count, join = ray.remote(num_cpus=1)(_counts), ray.remote(num_cpus=1)(_joined_counts)
    counts = [
        count.remote(of_slice.index, *(of_block[place] for of_block in shared))
        for place, of_slice in enumerate(slices)
    ]
    of_sets = {
        set_index: join.remote(
            *(
                ngrams
                for of_slice, ngrams in zip(slices, counts, strict=True)
                if of_slice.set_index == set_index
            )
        )
        for set_index in {of_slice.set_index for of_slice in slices}
    }
    ray.wait(list(of_sets.values()), num_returns=len(of_sets), fetch_local=False)
    compare = ray.remote(num_cpus=1)(_overlaps)
    threshold = settings.overlap_threshold
    tasks = [compare.remote(slices, of_sets, threshold, *of_block) for of_block in shared]
    del shared
    by_block = [ray.get(task) for task in tasks]
    matches: dict[int, Match] = {}
    for set_index in sorted(of_sets):
        of_set = [overlaps[set_index] for overlaps in by_block]
        repeated[set_index] = np.unique(np.concatenate([part.held_out for part in of_set]))
        best = best_overlaps(_joined([part.best for part in of_set]))
        for key, other, share in zip(*(column.tolist() for column in best), strict=True):
            matches.setdefault(key, Match(key, set_index, other, MatchKind.NGRAMS, share))
    ordered = [match for _, match in sorted(matches.items())]
    matched = _with_passages(ordered, tables, ngram_words, blocks, content)
    return NgramMatches(ngram_words, matched, repeated)


def _held_out_tables(
    held_out: Sequence[HeldOutSet], blocks: Sequence[ObjectRef], content: Content
) -> list[list[_HeldOutTable]]:
    """Return the tables with the rows of each held-out set."""
    splits = [place for place, of_set in enumerate(held_out) if of_set.evaluation is None]
    take = ray.remote(num_cpus=1, num_returns=len(splits) + 1)(_held_out_rows)
    wanted = ray.put(_WantedRows([held_out[place].keys for place in splits], content))
    tables: list[list[_HeldOutTable]] = [[] for _ in held_out]
    if splits:
        for *refs, contents in [take.remote(wanted, block) for block in blocks]:
            for place, ref, table in zip(splits, refs, ray.get(contents), strict=True):
                tables[place].append(table._replace(table=ref))
    for place, of_set in enumerate(held_out):
        if (rows := of_set.evaluation) is not None:
            columns = {"key": of_set.keys, "text": rows.texts, "prompt": rows.prompts}
            table = _HeldOutTable.of(of_set.keys, Texts.of(rows.texts))
            tables[place].append(table._replace(table=ray.put(pa.table(columns))))
    return tables


def _slices(tables: Sequence[_HeldOutTable]) -> list[list[_HeldOutTable]]:
    """Return the tables in groups that are neither many nor large."""
    sizes = [max(t.num_words.sum(), t.num_bytes // _BYTES_PER_WORD) for t in tables]
    groups: dict[int, list[_HeldOutTable]] = {}
    for table, so_far in zip(tables, np.cumsum(sizes).tolist(), strict=True):
        if len(table.keys):
            groups.setdefault(so_far // _WORDS_PER_SLICE, []).append(table)
    return list(groups.values())


def _held_out_rows(
    wanted: _WantedRows, block: pa.Table
) -> tuple[pa.Table | list[_HeldOutTable], ...]:
    """Return a table of each split's rows in a block; at the end what is in them all."""
    contents = block.select(["key", *CONTENT_COLUMNS])
    tables = [
        texts_of_rows(contents, keys, wanted.content).select(["key", "text", "prompt"])
        for keys in wanted.keys
    ]
    return *tables, [
        _HeldOutTable.of(table["key"].to_numpy(), Texts.of_column(table["text"]))
        for table in tables
    ]


def _index(ngram_words: int, *tables: pa.Table) -> NgramIndex:
    table = pa.concat_tables(tables)
    texts, prompts = Texts.of_column(table["text"]), Texts.of_column(table["prompt"])
    return ngram_index(table["key"].to_numpy(), texts, prompts, ngram_words)


def _shared(
    wanted: _WantedRows, indices: Sequence[ObjectRef], block: pa.Table
) -> SharedNgrams | list[SharedNgrams]:
    """Return what the train rows of a block share with each index."""
    (train_keys,), content = wanted
    chosen = rows_with_keys(block.select(["key", *content.columns]), train_keys)
    texts = Texts.of_column(content.column(chosen, "both"))
    keys = chosen["key"].to_numpy()
    by_index = []
    for index in indices:
        shared = ray.get(index).shared_with(texts)
        by_index.append(replace(shared, rows=keys[shared.rows]))
    return by_index[0] if len(by_index) == 1 else by_index


def _counts(index: NgramIndex, *shared: SharedNgrams) -> NgramCounts:
    return count_ngrams(index, shared)


def _joined_counts(*counts: NgramCounts) -> NgramCounts:
    return joined_counts(counts)


def _overlaps(
    slices: Sequence[_Slice],
    counts: dict[int, ObjectRef],
    threshold: float,
    *shared: SharedNgrams,
) -> dict[int, _SetOverlaps]:
    """Return the overlaps of a block's rows by held-out set.

    Args:
        slices: Indices of the held-out rows.
        counts: Reference to the counts of each held-out set.
        threshold: Least share of n-grams.
        shared: What the block's rows share with each slice.
    """
    overlaps = {}
    for set_index, reference in counts.items():
        of_set = [
            (of_slice.index, ngrams)
            for of_slice, ngrams in zip(slices, shared, strict=True)
            if of_slice.set_index == set_index
        ]
        of_ngrams: NgramCounts = ray.get(reference)
        # One index at a time: together they may not fit.
        num_common = count_common(
            ((ray.get(index), ngrams) for index, ngrams in of_set), of_ngrams.common
        )
        best, held_out = [], []
        for index, ngrams in of_set:
            found = overlapping(ray.get(index), ngrams, of_ngrams, num_common, threshold)
            best.append(best_overlaps(found))
            held_out.append(np.unique(found.held_out))
        overlaps[set_index] = _SetOverlaps(_joined(best), np.concatenate(held_out))
    return overlaps


def _joined(overlaps: Sequence[Overlaps]) -> Overlaps:
    return Overlaps(*(np.concatenate(column) for column in zip(*overlaps, strict=True)))


def _with_passages(
    matches: Sequence[Match],
    tables: Sequence[Sequence[_HeldOutTable]],
    ngram_words: Sequence[int | None],
    blocks: Sequence[ObjectRef],
    content: Content,
) -> list[Match]:
    """Return matches, ascending by key, each with the passage that the two rows share.

    Args:
        matches: Without their passages.
        tables: Tables of each held-out set.
        ngram_words: Words of an n-gram for each.
        blocks: Blocks of all rows.
        content: How to read what they say.
    """
    if not matches:
        return []
    held_out = {(match.set_index, match.held_out) for match in matches}
    needed: list[ObjectRef] = []
    places: dict[tuple[int, int], _Place] = {}
    for set_index, of_set in enumerate(tables):
        words = ngram_words[set_index] or 0
        for table in of_set:
            keys = [key for key in table.keys.tolist() if (set_index, key) in held_out]
            places |= {(set_index, key): _Place(len(needed), key, words) for key in keys}
            needed += [table.table] * bool(keys)
    wanted = ray.put(
        _WantedPassages(
            np.array([match.key for match in matches]),
            [places[match.set_index, match.held_out] for match in matches],
            content,
        )
    )
    quote = ray.remote(num_cpus=1)(_passages)
    passages: dict[int, str] = {}
    for task in [quote.remote(wanted, needed, block) for block in blocks]:
        passages |= ray.get(task)
    return [replace(match, passage=passages[match.key]) for match in matches]


def _passages(
    wanted: _WantedPassages, tables: Sequence[ObjectRef], block: pa.Table
) -> dict[int, str]:
    """Return, by key, the passages that train rows of a block share with held-out rows."""
    content = wanted.content
    chosen = rows_with_keys(block.select(["key", *content.columns]), wanted.keys)
    texts = content.column(chosen, "both").to_pylist()
    keys = chosen["key"].to_pylist()
    by_table: dict[int, list[tuple[int, str, _Place]]] = {}
    for key, text, index in zip(
        keys, texts, np.searchsorted(wanted.keys, keys).tolist(), strict=True
    ):
        place = wanted.places[index]
        by_table.setdefault(place.table, []).append((key, text, place))
    passages = {}
    for number, rows in by_table.items():
        table = ray.get(tables[number])
        row_of = {key: row for row, key in enumerate(table["key"].to_pylist())}
        for key, text, place in rows:
            held_out = table["text"][row_of[place.key]].as_py()
            passages[key] = matched_text(text, held_out, place.ngram_words)
    return passages
