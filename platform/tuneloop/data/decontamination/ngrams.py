"""Which long word n-grams train rows share with held-out rows.

Source: Brown et al. 2020, Language Models are Few-Shot Learners, arXiv:2005.14165, appendix C:
13-grams, or the 5th percentile of the evaluation's lengths where that is smaller, at least 8;
n-grams in more than 10 train rows are ignored. There a single shared n-gram decides; here it is
`overlap_threshold`, a share of the n-grams of the shorter row.

What many rows share (a template, a licence, an instruction) is no evidence of a leak. So of a
held-out row only those n-grams count that are its own: in at most three other rows, or in hardly
more than its rarest one. By the second, many train rows that repeat a whole held-out row are found:
all of its n-grams are as frequent then. One that more than ten train rows and several held-out rows
have is nobody's own.

Held-out rows are looked up slice by slice, train rows block by block: neither is ever in one
process as a whole, and how they are cut makes no difference.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tuneloop.data.hashing.columns import Hashes, Indices, Texts
from tuneloop.data.hashing.signatures import (
    bloom_filter,
    bloom_hits,
    shingles,
    word_counts,
    word_spans,
)
from tuneloop.text import shorten

_LEAST_WORDS = 8
_FREQUENT_ABOVE = 10
# An n-gram is a held-out row's own in so many other rows, or in so many times those of its rarest.
_OWN_UP_TO, _OWN_TO_RAREST = 3, 1.5
# A share is one of at least so many n-grams, where a row has them.
_LEAST_OWN = 4
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
        units: Units with each n-gram, ascending for each. Shape (entries,).
        rows: Key of the held-out row of each unit. Shape (units,).
        sizes: Number of distinct n-grams of each unit. Shape (units,).
        sequence: The n-grams of all units as they stand in them, unit after unit.
        sequence_units: Unit of each of these.
        bloom: Bloom filter that holds `grams`.
    """

    ngram_words: int
    grams: Hashes
    starts: Indices
    units: NDArray[np.int32]
    rows: Indices
    sizes: Indices
    sequence: NDArray[np.int32]
    sequence_units: NDArray[np.int32]
    bloom: Hashes

    def shared_with(self, texts: Texts) -> SharedNgrams:
        """Return the n-grams that texts share with the held-out rows."""
        hits, sizes = bloom_hits(texts, self.ngram_words, self.bloom)
        # Looked up in ascending order, which is kind to the processor's caches.
        order = np.argsort(hits.hashes)
        places = np.empty(len(order), dtype=np.int64)
        places[order] = np.searchsorted(self.grams, hits.hashes[order])
        places[places == len(self.grams)] = 0
        is_shared = self.grams[places] == hits.hashes if len(self.grams) else places > 0
        counts = np.diff(np.concatenate([[0], np.cumsum(is_shared)])[hits.offsets])
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
        rows: Number or key of each train row. Shape (R,).
        counts: How many n-grams each shares. Shape (R,).
        grams: Places of these n-grams in the index, row after row. Shape (sum of counts,).
        sizes: Number of distinct n-grams of each row. Shape (R,).
    """

    rows: Indices
    counts: Indices
    grams: NDArray[np.int32]
    sizes: Indices


class NgramCounts(NamedTuple):
    """In how many rows n-grams are. Shape (F,) each.

    Args:
        hashes: The n-grams, ascending.
        num_train: How many train rows have each.
        num_held_out: How many held-out rows have each.
    """

    hashes: Hashes
    num_train: Indices
    num_held_out: Indices

    @property
    def common(self) -> Hashes:
        """The n-grams that many train rows and several held-out rows have. Ascending."""
        return self.hashes[(self.num_train > _FREQUENT_ABOVE) & (self.num_held_out > 1)]

    def others_with(self, grams: Hashes) -> Indices:
        """Return how many rows other than one held-out row have each n-gram, about.

        Args:
            grams: Distinct, ascending. One that is not among these counts is in no other row.
        """
        result = np.zeros(len(grams), dtype=np.int64)
        if len(self.hashes):
            places = np.searchsorted(self.hashes, grams)
            places[places == len(self.hashes)] = 0
            found = self.hashes[places] == grams
            result[found] = (self.num_train + self.num_held_out - 1)[places[found]]
        return result


class CommonCounts(NamedTuple):
    """How many common n-grams each train row has; rows without any are left out. Shape (R,) each.

    Args:
        rows: Train rows, ascending.
        counts: Number of common n-grams of each.
    """

    rows: Indices
    counts: Indices


class Overlaps(NamedTuple):
    """Pairs of a train row and a held-out row that share n-grams. Shape (P,) each.

    Args:
        rows: Train row of each pair.
        held_out: Key of its held-out row.
        shares: Share of the n-grams of the shorter of the two, 0 to 1.
    """

    rows: Indices
    held_out: Indices
    shares: NDArray[np.float64]


def ngram_length(num_words: Indices, longest: int) -> int | None:
    """Return how many words an n-gram has for held-out rows; None if they have no words.

    Args:
        num_words: Words of each held-out row.
        longest: `data.decontamination.ngram_words`.
    """
    lengths = num_words[num_words > 0]
    if not len(lengths):
        return None
    return min(longest, max(_LEAST_WORDS, int(np.percentile(lengths, _SHORTEST_PERCENTILE))))


def ngram_index(rows: Indices, texts: Texts, prompts: Texts, ngram_words: int) -> NgramIndex:
    """Return the n-grams of held-out rows.

    Args:
        rows: Their keys. Shape (B,).
        texts: Whole text of each row.
        prompts: Prompt of each row alone; empty for a document.
        ngram_words: Result of `ngram_length` for all rows of the same held-out set.
    """
    hashes: list[Hashes] = []
    owners: list[Indices] = []
    number = len(rows)
    # A prompt too short for an n-gram would match whatever else is as short.
    for side, least in ((texts, min(_LEAST_WORDS, ngram_words)), (prompts, ngram_words)):
        ngrams = shingles(side, ngram_words)
        owner = np.repeat(np.arange(number), np.diff(ngrams.offsets))
        keep = word_counts(side)[owner] >= least
        hashes.append(ngrams.hashes[keep])
        owners.append(owner[keep] + len(owners) * number)
    flat, owner = np.concatenate(hashes), np.concatenate(owners)
    order = np.argsort(flat, kind="stable")
    flat, in_order, owner = flat[order], owner.astype(np.int32), owner[order]
    sequence = np.empty(len(flat), dtype=np.int32)
    sequence[order] = np.cumsum(_is_new(flat)) - 1
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
        sequence,
        in_order,
        bloom_filter(grams, _BITS_PER_NGRAM),
    )


def count_ngrams(index: NgramIndex, shared: Iterable[SharedNgrams]) -> NgramCounts:
    """Return in how many rows the n-grams of an index are that train rows share.

    Args:
        index: N-grams of some held-out rows.
        shared: What all train rows share with it, block by block.
    """
    frequency = np.zeros(len(index.grams), dtype=np.int64)
    for of_block in shared:
        np.add.at(frequency, of_block.grams, 1)
    found = np.flatnonzero(frequency)
    return NgramCounts(index.grams[found], frequency[found], index.num_rows_of(found))


def joined_counts(counts: Sequence[NgramCounts]) -> NgramCounts:
    """Return the counts over all slices of the held-out rows.

    Args:
        counts: `count_ngrams` of each slice.
    """
    hashes = np.concatenate([of_slice.hashes for of_slice in counts])
    distinct, first, place = np.unique(hashes, return_index=True, return_inverse=True)
    # Every slice is compared with all train rows.
    num_train = np.concatenate([of_slice.num_train for of_slice in counts])[first]
    num_held_out = np.concatenate([of_slice.num_held_out for of_slice in counts])
    sums = np.bincount(place, weights=num_held_out, minlength=len(distinct)).astype(np.int64)
    return NgramCounts(distinct, num_train, sums)


def count_common(shared: Iterable[tuple[NgramIndex, SharedNgrams]], common: Hashes) -> CommonCounts:
    """Return which train rows have common n-grams, and how many.

    Args:
        shared: The slices of a held-out set, and what some train rows share with each. An n-gram
            counts once, in however many slices it is.
        common: `NgramCounts.common` of the held-out set.
    """
    rows, hashes = [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)]
    for index, of_slice in shared:
        is_common = index.has(common)[of_slice.grams]
        rows.append(np.repeat(of_slice.rows, of_slice.counts)[is_common])
        hashes.append(index.grams[of_slice.grams[is_common]])
    row, value = np.concatenate(rows), np.concatenate(hashes)
    order = np.lexsort((value, row))
    row, value = row[order], value[order]
    return CommonCounts(*np.unique(row[_is_new(row, value)], return_counts=True))


def overlapping(
    index: NgramIndex,
    shared: SharedNgrams,
    counts: NgramCounts,
    num_common: CommonCounts,
    threshold: float,
) -> Overlaps:
    """Return all pairs of a train row and a held-out row that share enough n-grams.

    Args:
        index: N-grams of some held-out rows.
        shared: What some train rows share with it.
        counts: Result of `joined_counts` for their held-out set.
        num_common: Result of `count_common` for these train rows.
        threshold: Least share of the own n-grams of the shorter of two rows, 0 to 1.
    """
    # An entry is an n-gram of a unit, in the order of `index.units`.
    others = counts.others_with(index.grams)
    is_common = index.has(counts.common)
    per_gram = np.diff(index.starts)
    rarest = np.full(len(index.sizes), np.iinfo(np.int64).max)
    of_entries = np.repeat(others, per_gram)
    counted = np.repeat(~is_common, per_gram)
    np.minimum.at(rarest, index.units[counted], of_entries[counted])
    most = np.maximum(_OWN_UP_TO, np.minimum(rarest, 1 << 40) * _OWN_TO_RAREST)
    is_own = counted & (of_entries <= most[index.units])
    unit_sizes = _sizes_of_own(index, ~is_common, others, most)
    row_sizes = shared.sizes.copy()
    if len(num_common.rows):
        place = np.searchsorted(num_common.rows, shared.rows)
        place[place == len(num_common.rows)] = 0
        has_common = num_common.rows[place] == shared.rows
        row_sizes -= np.where(has_common, num_common.counts[place], 0)
    owner = np.repeat(np.arange(len(shared.rows)), shared.counts)

    grams = shared.grams
    lengths = index.starts[grams + 1] - index.starts[grams]
    entries = _ranges(index.starts[grams], lengths)
    owner = np.repeat(owner, lengths)[is_own[entries]]
    codes = owner * len(index.sizes) + index.units[entries[is_own[entries]]]
    pairs, num_shared = np.unique(codes, return_counts=True)
    row, unit = np.divmod(pairs, max(1, len(index.sizes)))
    share = num_shared / np.maximum(1, np.minimum(row_sizes[row], unit_sizes[unit]))
    enough = share >= threshold
    return Overlaps(shared.rows[row[enough]], index.rows[unit[enough]], share[enough])


def _sizes_of_own(
    index: NgramIndex, counts: NDArray[np.bool_], others: Indices, most: NDArray[np.float64]
) -> Indices:
    """Return how many n-grams each unit has of its own words alone. Shape (units,).

    Where own words border on shared ones, the n-grams with words of both are nobody else's, but a
    row that quotes the own words does not have them. If all are of this kind, all count.

    Args:
        index: N-grams of some held-out rows.
        counts: Which n-grams count. Shape (G,).
        others: How many other rows have each. Shape (G,).
        most: The most other rows that have an n-gram which is a unit's own. Shape (units,).
    """
    unit, number = index.sequence_units, len(index.sizes)
    is_own = counts[index.sequence] & (others[index.sequence] <= most[unit])
    borders = (is_own[1:] != is_own[:-1]) & (unit[1:] == unit[:-1])
    own = np.bincount(unit[is_own], minlength=number)
    num_borders = np.bincount(unit[1:][borders], minlength=number)
    pure = own - (index.ngram_words - 1) * num_borders
    return np.where(pure > 0, np.maximum(pure, np.minimum(own, _LEAST_OWN)), own)


def best_overlaps(pairs: Overlaps) -> Overlaps:
    """Return for each train row the held-out row that it overlaps most, the first of equal ones."""
    order = np.lexsort((pairs.held_out, -pairs.shares, pairs.rows))
    best = order[_is_new(pairs.rows[order])]
    return Overlaps(pairs.rows[best], pairs.held_out[best], np.minimum(1.0, pairs.shares[best]))


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
    ngrams, others = (shingles([side], ngram_words).hashes for side in (text, other))
    inside = np.concatenate([[0], np.isin(ngrams, others).astype(np.int8), [0]])
    edges = np.diff(inside)
    starts, stops = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    if not len(starts):
        return ""
    longest = int(np.argmax(stops - starts))
    spans = word_spans(text)
    last = min(int(stops[longest]) + ngram_words - 1, len(spans)) - 1
    passage = Texts.of([text]).data[spans[starts[longest]][0] : spans[last][1]]
    return quoted(passage.tobytes().decode("utf-8", "replace"))


def quoted(text: str) -> str:
    """Return a text on one line, cut short."""
    return f"“{shorten(' '.join(text.split()), _QUOTED_CHARACTERS)}”"
