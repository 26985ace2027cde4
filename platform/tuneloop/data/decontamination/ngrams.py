"""Which long word n-grams train rows share with held-out rows.

Source: Brown et al. 2020, Language Models are Few-Shot Learners, arXiv:2005.14165, appendix C:
13-grams, or the 5th percentile of the evaluation's lengths where that is smaller, at least 8;
n-grams in more than 10 train rows are taken for boilerplate. There a single shared n-gram decides;
here it is `overlap_threshold`, a share of the n-grams of the shorter row. A frequent n-gram is
boilerplate here only if several held-out rows have it: many train rows that repeat one held-out
row are contaminated.

Held-out rows are looked up slice by slice, train rows block by block: neither is ever in one place,
and how they are cut makes no difference.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuneloop.data.dedup.minhash import Indices
from tuneloop.data.hashing.signatures import (
    Hashes,
    Texts,
    bits_of,
    marked_shingles,
    shingles,
    word_counts,
    word_spans,
)

_LEAST_WORDS = 8
_BOILERPLATE_ABOVE = 10
_SHORTEST_PERCENTILE = 5
_BITS_PER_NGRAM = 16
_QUOTED_CHARACTERS = 160


@dataclass(frozen=True)
class NgramIndex:
    """The n-grams of some held-out rows.

    A unit is a held-out row or its prompt; `rows` says whose.

    Args:
        ngram_words: Words in an n-gram.
        grams: Distinct hashes, ascending. Shape (G,).
        starts: Shape (G + 1,); the units with n-gram g are `units[starts[g]:starts[g + 1]]`.
        units: Ascending for each n-gram. Shape (entries,).
        rows: What the held-out row of each unit is known by. Shape (units,).
        sizes: Distinct n-grams of each unit. Shape (units,).
        bits: Of `grams`, for `marked_shingles`.
    """

    ngram_words: int
    grams: Hashes
    starts: Indices
    units: NDArray[np.int32]
    rows: Indices
    sizes: Indices
    bits: Hashes

    def shared_with(self, texts: Texts) -> SharedNgrams:
        """Return the n-grams that texts share with the held-out rows."""
        found, sizes = marked_shingles(texts, self.ngram_words, self.bits)
        # Looked up in their order, which the caches of a processor like.
        order = np.argsort(found.hashes)
        places = np.empty(len(order), dtype=np.int64)
        places[order] = np.searchsorted(self.grams, found.hashes[order])
        places[places == len(self.grams)] = 0
        is_shared = self.grams[places] == found.hashes if len(self.grams) else places > 0
        counts = np.diff(np.concatenate([[0], np.cumsum(is_shared)])[found.offsets])
        rows = np.flatnonzero(counts)
        grams = places[is_shared].astype(np.int32)
        return SharedNgrams(rows, counts[rows], grams, sizes[rows])

    def has(self, hashes: Hashes) -> NDArray[np.bool_]:
        """Return which n-grams have one of these hashes. Shape (G,)."""
        found = np.zeros(len(self.grams), dtype=bool)
        if len(found):
            places = np.searchsorted(self.grams, hashes)
            places[places == len(found)] = 0
            found[places[self.grams[places] == hashes]] = True
        return found

    def num_rows_of(self, grams: Indices) -> Indices:
        """Return how many held-out rows have each n-gram; a row and its prompt count once."""
        counts = self.starts[grams + 1] - self.starts[grams]
        owner = np.repeat(np.arange(len(grams)), counts)
        rows = self.rows[self.units[_ranges(self.starts[grams], counts)]]
        order = np.lexsort((rows, owner))
        owner, rows = owner[order], rows[order]
        return np.bincount(owner[_is_new(owner, rows)], minlength=len(grams))


@dataclass(frozen=True)
class SharedNgrams:
    """The n-grams that R train rows share with an index; rows that share none are left out.

    Args:
        rows: What the train rows are known by. Shape (R,).
        counts: How many n-grams each shares. Shape (R,).
        grams: Which ones of the index, row after row. Shape (sum of counts,).
        sizes: Distinct n-grams of each. Shape (R,).
    """

    rows: Indices
    counts: Indices
    grams: NDArray[np.int32]
    sizes: Indices


def words_of_ngram(num_words: Indices, wanted: int) -> int | None:
    """Return how many words an n-gram has for held-out rows; None if they have no words.

    Args:
        num_words: Of each held-out row.
        wanted: `data.decontamination.ngram_words`.
    """
    lengths = num_words[num_words > 0]
    if not len(lengths):
        return None
    return min(wanted, max(_LEAST_WORDS, int(np.percentile(lengths, _SHORTEST_PERCENTILE))))


def ngram_index(rows: Indices, texts: Texts, prompts: Texts, ngram_words: int) -> NgramIndex:
    """Return the n-grams of held-out rows.

    Args:
        rows: What they are known by. Shape (B,).
        texts: Of each row: what it says.
        prompts: Of each row: its prompt alone; empty for a document.
        ngram_words: Of `words_of_ngram`, for all rows that are held out for the same reason.
    """
    hashes: list[Hashes] = []
    owners: list[Indices] = []
    number = len(rows)
    # A prompt too short for an n-gram would match whatever else is as short.
    for given, least in ((texts, min(_LEAST_WORDS, ngram_words)), (prompts, ngram_words)):
        found = shingles(given, ngram_words)
        owner = np.repeat(np.arange(number), np.diff(found.offsets))
        keep = word_counts(given)[owner] >= least
        hashes.append(found.hashes[keep])
        owners.append(owner[keep] + len(owners) * number)
    flat, owner = np.concatenate(hashes), np.concatenate(owners)
    order = np.argsort(flat, kind="stable")
    flat, owner = flat[order], owner[order]
    fresh = _is_new(flat, owner)
    flat, owner = flat[fresh], owner[fresh]
    first = _is_new(flat)
    grams = flat[first]
    return NgramIndex(
        ngram_words,
        grams,
        np.append(np.flatnonzero(first), len(flat)),
        owner.astype(np.int32),
        np.concatenate([rows, rows]),
        np.bincount(owner, minlength=2 * number),
        bits_of(grams, _BITS_PER_NGRAM),
    )


def frequent_ngrams(index: NgramIndex, found: Iterable[SharedNgrams]) -> tuple[Hashes, Indices]:
    """Return the n-grams that many train rows share, and how many held-out rows have each.

    Args:
        index: Of some held-out rows.
        found: Of all train rows, block by block.
    """
    frequency = np.zeros(len(index.grams), dtype=np.int64)
    for part in found:
        np.add.at(frequency, part.grams, 1)
    frequent = np.flatnonzero(frequency > _BOILERPLATE_ABOVE)
    return index.grams[frequent], index.num_rows_of(frequent)


def boilerplate(found: Sequence[tuple[Hashes, Indices]]) -> Hashes:
    """Return the frequent n-grams that several held-out rows have.

    Args:
        found: `frequent_ngrams` of each slice of the held-out rows.
    """
    hashes = np.concatenate([hashes for hashes, _ in found])
    counts = np.concatenate([counts for _, counts in found])
    distinct, place = np.unique(hashes, return_inverse=True)
    return distinct[np.bincount(place, weights=counts, minlength=len(distinct)) > 1]


def num_ignored(
    found: Iterable[tuple[NgramIndex, SharedNgrams]], ignored: Hashes
) -> tuple[Indices, Indices]:
    """Return train rows that have ignored n-grams, ascending, and how many each has.

    Args:
        found: The slices of rows that are held out for one reason, and what some train rows share
            with each. An n-gram counts once, in how many slices it may be.
        ignored: Of `boilerplate`.
    """
    rows, hashes = [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)]
    for index, shared in found:
        is_ignored = index.has(ignored)[shared.grams]
        rows.append(np.repeat(shared.rows, shared.counts)[is_ignored])
        hashes.append(index.grams[shared.grams[is_ignored]])
    row, value = np.concatenate(rows), np.concatenate(hashes)
    order = np.lexsort((value, row))
    row, value = row[order], value[order]
    return np.unique(row[_is_new(row, value)], return_counts=True)


def overlapping(
    index: NgramIndex,
    shared: SharedNgrams,
    ignored: tuple[Hashes, tuple[Indices, Indices]],
    threshold: float,
) -> list[tuple[int, int, float]]:
    """Return (train row, held-out row, overlap) of the rows that share enough n-grams.

    A train row is there once at most, with the held-out row that it overlaps most.

    Args:
        index: Of some held-out rows.
        shared: Of some train rows.
        ignored: Of `boilerplate`; and of `num_ignored` for these train rows.
        threshold: Least share of the n-grams of the shorter of two rows.
    """
    hashes, (with_ignored, how_many) = ignored
    is_ignored = index.has(hashes)
    entries = np.repeat(is_ignored, np.diff(index.starts))
    unit_sizes = index.sizes - np.bincount(index.units[entries], minlength=len(index.sizes))
    row_sizes = shared.sizes.copy()
    for_row = np.searchsorted(with_ignored, shared.rows)
    for_row[for_row == len(with_ignored)] = 0
    if len(with_ignored):
        row_sizes -= np.where(with_ignored[for_row] == shared.rows, how_many[for_row], 0)
    owner = np.repeat(np.arange(len(shared.rows)), shared.counts)
    telling = ~is_ignored[shared.grams]

    grams, owner = shared.grams[telling], owner[telling]
    counts = index.starts[grams + 1] - index.starts[grams]
    units = index.units[_ranges(index.starts[grams], counts)]
    codes = np.repeat(owner, counts) * len(index.sizes) + units
    pairs, num_shared = np.unique(codes, return_counts=True)
    row, unit = np.divmod(pairs, max(1, len(index.sizes)))
    overlap = num_shared / np.maximum(1, np.minimum(row_sizes[row], unit_sizes[unit]))
    enough = overlap >= threshold
    found = best_overlaps(shared.rows[row[enough]], index.rows[unit[enough]], overlap[enough])
    return list(zip(*(column.tolist() for column in found), strict=True))


def best_overlaps(rows: Indices, others: Indices, overlap: Any) -> tuple[Indices, Indices, Any]:
    """Return of each train row the held-out row that it overlaps most, the first of equal ones."""
    order = np.lexsort((others, -overlap, rows))
    rows, others, overlap = rows[order], others[order], overlap[order]
    first = _is_new(rows)
    return rows[first], others[first], np.minimum(1.0, overlap[first])


def _is_new(*columns: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which entries of sorted columns differ from the one before. Shape (N,)."""
    changes = np.ones(len(columns[0]), dtype=bool)
    changes[1:] = np.logical_or.reduce([values[1:] != values[:-1] for values in columns])
    return changes


def _ranges(starts: Indices, counts: Indices) -> Indices:
    """Return the places `starts[i]` to `starts[i] + counts[i]`, for all i in turn."""
    ends = np.cumsum(counts)
    return np.arange(int(counts.sum())) + np.repeat(starts - ends + counts, counts)


def matched_text(text: str, other: str, ngram_words: int) -> str:
    """Return the longest passage of a text whose n-grams all occur in the other."""
    theirs, own = shingles([other], ngram_words).hashes, shingles([text], ngram_words).hashes
    inside = np.concatenate([[0], np.isin(own, theirs).astype(np.int8), [0]])
    edges = np.diff(inside)
    starts, stops = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    if not len(starts):
        return ""
    longest = int(np.argmax(stops - starts))
    spans = word_spans(text)
    last = min(int(stops[longest]) + ngram_words - 1, len(spans)) - 1
    passage = text.encode("utf-8", "replace")[spans[starts[longest]][0] : spans[last][1]]
    return quoted(passage.decode("utf-8", "replace"))


def quoted(text: str) -> str:
    """Return a text on one line, cut short."""
    line = " ".join(text.split())
    short = line if len(line) <= _QUOTED_CHARACTERS else line[: _QUOTED_CHARACTERS - 1] + "…"
    return f"“{short}”"
