"""Comparing train rows with held-out rows by n-grams over Ray: all texts stay where the rows are.

This process knows keys and numbers of words, and what was found. The rows of the test and
validation split are taken from their blocks into tables, tables into slices with an index each;
then every block of train rows is looked up in every slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tuneloop.data.decontamination.matching import HeldOut
from tuneloop.data.decontamination.ngrams import (
    NgramIndex,
    SharedNgrams,
    best_overlaps,
    boilerplate,
    frequent_ngrams,
    matched_text,
    ngram_index,
    num_ignored,
    overlapping,
    words_of_ngram,
)
from tuneloop.data.dedup.minhash import Indices
from tuneloop.data.hashing.signatures import Hashes, Texts, word_counts
from tuneloop.data.tokenize.rendering import (
    SAID_IN,
    Rendering,
    compared_from,
    rows_with_keys,
    said_column,
    texts_of_rows,
)

# The index of a slice takes some 30 bytes a word, and twice that while it is made.
_WORDS_PER_SLICE = 8_000_000
# What a word counts for at least; there are texts without spaces.
_BYTES_PER_WORD = 16


@dataclass(frozen=True)
class Origin:
    """Rows that are held out for one reason.

    Args:
        name: `test`, `validation`, or the path of an evaluation.
        keys: What the rows are known by, ascending: their key, or their place in the evaluation.
        evaluation: What they say; None if they are rows of the dataset.
    """

    name: str
    keys: Indices
    evaluation: HeldOut | None = None


@dataclass(frozen=True)
class Overlap:
    """A train row that shares enough n-grams with a held-out row.

    Args:
        key: Of the train row.
        origin: Number of the held-out row's origin.
        held_out: What the held-out row is known by.
        share: Of the n-grams of the shorter one.
        passage: Longest text of the train row that is in the held-out one.
    """

    key: int
    origin: int
    held_out: int
    share: float
    passage: str


@dataclass(frozen=True)
class _Part:
    """Where a table of `key`, `text`, `prompt` of held-out rows is; keys; words, bytes of texts."""

    table: Any
    keys: Indices
    num_words: Indices
    num_bytes: int


def find_overlaps(
    keys: Indices, origins: Sequence[Origin], rows: Any, rendering: Rendering
) -> tuple[list[int | None], list[Overlap]]:
    """Return the words of an n-gram for each origin, and which train rows overlap.

    A train row is there once at most: with the first origin that it overlaps, and of that with the
    row that it overlaps most.

    Args:
        keys: Of the train rows, ascending.
        origins: In this order.
        rows: The materialized Ray dataset of all rows, with `key` and what they say.
        rendering: Of those; `data.decontamination` says what is enough.
    """
    import ray

    settings = rendering.data.decontamination
    blocks = [ref for bundle in rows.iter_internal_ref_bundles() for ref in bundle.block_refs]
    parts = _parts(origins, blocks, rendering)
    lengths = [np.concatenate([np.zeros(0, int), *(p.num_words for p in own)]) for own in parts]
    words = [words_of_ngram(found, settings.ngram_words) for found in lengths]
    make = ray.remote(num_cpus=1)(_index)
    slices = [
        (origin, make.remote(length, *(part.table for part in own)))
        for origin, length in enumerate(words)
        if length is not None
        for own in _slices(parts[origin])
    ]
    if not slices:
        return words, []
    indices = [index for _, index in slices]
    # A task that waits for what it asks for gives its CPU away, and Ray starts one more worker.
    ray.wait(indices, num_returns=len(indices), fetch_local=False)
    look_up = ray.remote(num_cpus=1, num_returns=len(slices))(_shared)
    given = ray.put((keys, rendering))
    shared = [look_up.remote(given, indices, block) for block in blocks]
    if len(slices) == 1:
        shared = [[found] for found in shared]
    count, join = ray.remote(num_cpus=1)(_frequent), ray.remote(num_cpus=1)(_boilerplate)
    frequent = [
        (origin, count.remote(index, *(of_block[place] for of_block in shared)))
        for place, (origin, index) in enumerate(slices)
    ]
    ignored = {
        origin: join.remote(*(found for other, found in frequent if other == origin))
        for origin in {origin for origin, _ in slices}
    }
    ray.wait(list(ignored.values()), num_returns=len(ignored), fetch_local=False)
    compare = ray.remote(num_cpus=1)(_overlaps)
    threshold = settings.overlap_threshold
    tasks = [compare.remote(slices, ignored, threshold, *of_block) for of_block in shared]
    del shared
    found = np.concatenate([ray.get(task) for task in tasks])
    overlaps: list[tuple[int, int, int, float]] = []
    for origin in range(len(origins)):
        own = found[found["origin"] == origin]
        best = best_overlaps(own["key"], own["held_out"], own["share"])
        known = {key for key, *_ in overlaps}
        new = zip(*(column.tolist() for column in best), strict=True)
        overlaps += [(key, origin, other, share) for key, other, share in new if key not in known]
    return words, _with_passages(sorted(overlaps), (parts, words), blocks, rendering)


def _parts(origins: Sequence[Origin], blocks: Sequence[Any], rendering: Rendering) -> Any:
    """Return the tables of each origin's rows, a list of `_Part` for each."""
    import pyarrow as pa
    import ray

    splits = [place for place, origin in enumerate(origins) if origin.evaluation is None]
    take = ray.remote(num_cpus=1, num_returns=len(splits) + 1)(_held_out_rows)
    given = ray.put(([origins[place].keys for place in splits], rendering))
    parts: list[list[_Part]] = [[] for _ in origins]
    if splits:
        made = [take.remote(given, block) for block in blocks]
        for *tables, facts in made:
            for place, table, fact in zip(splits, tables, ray.get(facts), strict=True):
                parts[place].append(_Part(table, *fact))
    for place, origin in enumerate(origins):
        if (own := origin.evaluation) is not None:
            texts = Texts.of(own.texts)
            said = {"key": origin.keys, "text": own.texts, "prompt": own.prompts}
            facts = word_counts(texts), len(texts.data)
            parts[place].append(_Part(ray.put(pa.table(said)), origin.keys, *facts))
    return parts


def _slices(parts: Sequence[_Part]) -> list[list[_Part]]:
    """Return the parts in groups that are neither many nor large."""
    sizes = [max(part.num_words.sum(), part.num_bytes // _BYTES_PER_WORD) for part in parts]
    groups: dict[int, list[_Part]] = {}
    for part, so_far in zip(parts, np.cumsum(sizes).tolist(), strict=True):
        if len(part.keys):
            groups.setdefault(so_far // _WORDS_PER_SLICE, []).append(part)
    return list(groups.values())


def _held_out_rows(given: Any, block: Any) -> Any:
    """Return a table of each split's rows in a block; at the end keys and words of them all."""
    of_splits, rendering = given
    said = block.select(["key", *SAID_IN])
    tables = [
        texts_of_rows(said, keys, rendering).select(["key", "text", "prompt"]) for keys in of_splits
    ]
    texts = [Texts.of_column(table["text"]) for table in tables]
    facts = [
        (table["key"].to_numpy(), word_counts(own), len(own.data))
        for table, own in zip(tables, texts, strict=True)
    ]
    return *tables, facts


def _index(ngram_words: int, *tables: Any) -> NgramIndex:
    import pyarrow as pa

    table = pa.concat_tables(tables)
    texts, prompts = Texts.of_column(table["text"]), Texts.of_column(table["prompt"])
    return ngram_index(table["key"].to_numpy(), texts, prompts, ngram_words)


def _shared(given: Any, indices: Sequence[Any], block: Any) -> Any:
    """Return what the train rows of a block share with each index."""
    import ray

    keys, rendering = given
    chosen = rows_with_keys(block.select(["key", *compared_from(rendering)]), keys)
    texts = Texts.of_column(said_column(chosen, rendering, "both"))
    own = chosen["key"].to_numpy()
    found = []
    for index in indices:
        shared = ray.get(index).shared_with(texts)
        found.append(SharedNgrams(own[shared.rows], shared.counts, shared.grams, shared.sizes))
    return found[0] if len(found) == 1 else found


def _frequent(index: NgramIndex, *shared: SharedNgrams) -> tuple[Hashes, Indices]:
    return frequent_ngrams(index, shared)


def _boilerplate(*found: tuple[Hashes, Indices]) -> Hashes:
    return boilerplate(found)


def _overlaps(
    slices: Sequence[tuple[int, Any]], ignored: Any, threshold: float, *shared: SharedNgrams
) -> Any:
    """Return the overlaps of a block's rows, best of each row and slice.

    Args:
        slices: Number of the origin and index of each.
        ignored: What is boilerplate, by origin.
        threshold: Least share.
        shared: Of the block's rows with each slice.
    """
    import ray

    found = []
    for origin, reference in ignored.items():
        own = [
            (index, part)
            for (number, index), part in zip(slices, shared, strict=True)
            if number == origin
        ]
        hashes = ray.get(reference)
        counts = num_ignored(((ray.get(index), part) for index, part in own), hashes)
        for index, part in own:
            overlaps = overlapping(ray.get(index), part, (hashes, counts), threshold)
            found += [(key, origin, other, share) for key, other, share in overlaps]
    kinds = [("key", np.int64), ("origin", np.int64), ("held_out", np.int64), ("share", float)]
    return np.array(found, dtype=kinds)


def _with_passages(
    overlaps: Sequence[tuple[int, int, int, float]],
    held_out: tuple[Any, Sequence[int | None]],
    blocks: Sequence[Any],
    rendering: Rendering,
) -> list[Overlap]:
    """Return the overlaps, sorted by key, each with the passage that the two rows share.

    Args:
        held_out: Parts, and words of an n-gram, of each origin.
    """
    import ray

    if not overlaps:
        return []
    parts, words = held_out
    tables: list[Any] = []
    place_of: dict[tuple[int, int], int] = {}
    wanted = {(origin, other) for _, origin, other, _ in overlaps}
    for origin, own in enumerate(parts):
        for part in own:
            here = [(origin, key) for key in part.keys.tolist() if (origin, key) in wanted]
            if here:
                place_of |= dict.fromkeys(here, len(tables))
                tables.append(part.table)
    given = ray.put(
        (
            np.array([key for key, *_ in overlaps]),
            [(place_of[origin, other], other, words[origin]) for _, origin, other, _ in overlaps],
            rendering,
        )
    )
    quote = ray.remote(num_cpus=1)(_passages)
    tasks = [quote.remote(given, tables, block) for block in blocks]
    passages: dict[int, str] = {}
    for task in tasks:
        passages |= ray.get(task)
    return [Overlap(*overlap, passages[overlap[0]]) for overlap in overlaps]


def _passages(given: Any, tables: Sequence[Any], block: Any) -> dict[int, str]:
    """Return, by key, the passages that rows of a block share with held-out rows.

    Args:
        given: Keys of train rows, ascending; for each the number of the held-out row's table, its
            key there, and the words of an n-gram; and how rows are rendered.
        tables: Where they are.
    """
    import ray

    keys, matches, rendering = given
    chosen = rows_with_keys(block.select(["key", *compared_from(rendering)]), keys)
    texts = said_column(chosen, rendering, "both").to_pylist()
    own = chosen["key"].to_pylist()
    by_table: dict[int, list[tuple[int, str, int, int]]] = {}
    for key, text, place in zip(own, texts, np.searchsorted(keys, own).tolist(), strict=True):
        table, other, words = matches[place]
        by_table.setdefault(table, []).append((key, text, other, words))
    passages = {}
    for number, found in by_table.items():
        table = ray.get(tables[number])
        row_of = {key: row for row, key in enumerate(table["key"].to_pylist())}
        for key, text, other, words in found:
            theirs = table["text"][row_of[other]].as_py()
            passages[key] = matched_text(text, theirs, words)
    return passages
