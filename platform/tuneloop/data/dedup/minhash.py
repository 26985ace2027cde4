"""Which rows repeat others: exact copies, and near-duplicates by MinHash-LSH with verification.

Because all rows are compared with all, and ordered by their content, the result depends neither
on how rows are spread over blocks nor on their order in the files. This module decides from small
numbers in the driver; the texts of candidate duplicates are compared in groups, wherever the caller
likes (`distributed` does it in Ray tasks), so that no process has to hold them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from tuneloop.config import DedupConfig
from tuneloop.data.hashing import kernels
from tuneloop.data.hashing.columns import Hashes, Indices
from tuneloop.data.hashing.signatures import Shingles

# Rows that share a band are all compared up to this many; beyond it each is compared with the
# first ones only, which keeps a band full of common phrases linear.
_ALL_PAIRS_UP_TO = 64
_PIVOTS = 32
# What more rows than this share, and more than this part of the rows that are like a row, is not
# the row's own.
MANY, OWN_PART = 5, 4
# The golden ratio's bits: multiples differ in all places of a hash (Knuth, TAOCP 3, 6.4).
_ODD = np.int64(-7046029254386353131)
# Characters of the rows in a group, unless more are linked.
_GROUP_CHARACTERS = 64 << 20


@dataclass(frozen=True)
class Keys:
    """What deduplication needs to know of all rows. Shape (N,) each, N rows.

    Args:
        exact: Hash of the normalised text that is compared.
        bands: MinHash bands, shape (N, bands); zeros for a row without words.
        preference: Rank of the row: of two duplicates the one with the smaller rank stays. All
            different.
        size: Length in characters.
    """

    exact: Indices
    bands: Hashes
    preference: Indices
    size: Indices


@dataclass(frozen=True)
class CandidateGroup:
    """M rows to be compared; none of them can duplicate a row outside.

    Args:
        rows: Indices of the rows, the preferred one first. Shape (M,).
        pairs: Candidate duplicates, as positions in `rows`. Shape (P, 2).
    """

    rows: Indices
    pairs: Indices


@dataclass(frozen=True)
class ResolvedGroup:
    """The duplicates in a group of M rows, as positions in it. Shape (M,) each.

    Args:
        root: First row of the cluster that similar rows link.
        keeper: The row kept in place of this one; its own position where it stays.
        similarity: Jaccard similarity to the keeper.
    """

    root: Indices
    keeper: Indices
    similarity: NDArray[np.float64]


@dataclass(frozen=True)
class Duplicates:
    """Which of N rows repeat which. Shape (N,) each.

    Args:
        cluster: Number of the row's cluster; similar rows, and rows linked by them, share it.
        kept: Index of the row kept in place of this one; its own index where it stays.
        similarity: Jaccard similarity to the kept row; 1 for exact copies and rows that stay.
        exact: Whether a removed row is an exact copy.
    """

    cluster: Indices
    kept: Indices
    similarity: NDArray[np.float64]
    exact: NDArray[np.bool_]

    @property
    def removed(self) -> Indices:
        """Indices of the removed rows."""
        return np.flatnonzero(self.kept != np.arange(len(self.kept)))


class OwnBands(NamedTuple):
    """The M rows that have a part of their own beside what many rows share.

    Args:
        rows: Their indices. Shape (M,).
        bands: MinHash bands of these parts. Shape (M, bands).
    """

    rows: Indices
    bands: Hashes


def find_duplicates(
    keys: Keys,
    config: DedupConfig,
    compare: Callable[[Sequence[CandidateGroup]], Iterable[ResolvedGroup]],
    find_own: Callable[[Indices, Indices], OwnBands],
) -> Duplicates:
    """Return which rows repeat which.

    Every removed near-duplicate has a Jaccard similarity of at least `config.threshold` to the
    row kept in its place: candidates are verified on their full shingle sets. Clusters are found
    whether or not `config` removes anything, so that a split can keep them together.

    A part that many rows share shows in their bands: many rows have the same. Their own parts are
    looked at, and those are what makes them candidates.

    Args:
        keys: What is known of all rows.
        config: `exact` and `near`.
        compare: Yields `resolve_group` of each group, in their order.
        find_own: Returns the own parts of rows, given their indices and how many rows at least
            share a part with each.
    """
    num_rows = len(keys.exact)
    first = _first_of_equal(keys)
    unique = np.flatnonzero(first == np.arange(num_rows))
    ranked = unique[np.argsort(keys.preference[unique], kind="stable")]
    # Rows are named by their rank of preference among the unique ones until they are compared.
    crowds = crowd_sizes(keys.bands, ranked)
    has_own = np.zeros(len(ranked), dtype=bool)
    own_pairs = np.zeros((0, 2), dtype=np.int64)
    if (crowded := np.flatnonzero(crowds)).size:
        own = find_own(ranked[crowded], crowds[crowded])
        rank = np.empty(num_rows, dtype=np.int64)
        rank[ranked] = np.arange(len(ranked))
        order = np.argsort(rank[own.rows])
        places = rank[own.rows[order]]
        has_own[places] = True
        own_pairs = places[candidate_pairs(own.bands, order)]
    pairs = candidate_pairs(keys.bands, ranked, has_own)
    if len(own_pairs):
        pairs = np.unique(np.concatenate([pairs, own_pairs]), axis=0)
    groups = group_candidates(pairs, keys.size[ranked], _GROUP_CHARACTERS)
    groups = [CandidateGroup(ranked[group.rows], group.pairs) for group in groups]

    root, kept, similarity = np.arange(num_rows), np.arange(num_rows), np.ones(num_rows)
    for group, resolved in zip(groups, compare(groups) if groups else [], strict=True):
        root[group.rows] = group.rows[resolved.root]
        if config.near:
            kept[group.rows] = group.rows[resolved.keeper]
            similarity[group.rows] = resolved.similarity
    copies = np.flatnonzero(first != np.arange(num_rows))
    # A copy goes when copies go, and also when the row it copies goes.
    gone = copies if config.exact else copies[kept[first[copies]] != first[copies]]
    similarity[gone] = similarity[first[gone]]
    kept[gone] = kept[first[gone]]
    exact = np.zeros(num_rows, dtype=bool)
    exact[gone] = kept[gone] == first[gone]
    return Duplicates(root[first], kept, similarity, exact)


def scoped_hashes(hashes: Indices, scopes: Indices) -> Indices:
    """Return hashes that are equal where both hash and dedup scope are. Shape (N,)."""
    return hashes ^ (scopes * _ODD)


def crowd_sizes(bands: Hashes, rows: Indices) -> Indices:
    """Return how many rows share a band with each row, 0 if they are not many. Shape (M,).

    Args:
        bands: Shape (N, bands), zeros for a row without words.
        rows: Indices of the rows to look at, none of them a copy of another. Shape (M,).
    """
    result = np.zeros(len(rows), dtype=np.int64)
    for column in range(bands.shape[1]):
        places, sizes = _buckets(bands[rows, column])
        result[places] = np.maximum(result[places], sizes)
    result[result <= MANY] = 0
    return result


def _buckets(values: Hashes) -> tuple[Indices, Indices]:
    """Return the places of values other than 0, ascending by value, and how many have its value."""
    places = np.flatnonzero(values)
    places = places[np.argsort(values[places], kind="stable")]
    ordered = values[places]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])[: len(ordered)])
    sizes = np.diff(np.append(starts, len(ordered)))
    return places, np.repeat(sizes, sizes)


def candidate_pairs(
    bands: Hashes, rows: Indices, has_own: NDArray[np.bool_] | None = None
) -> Indices:
    """Return the pairs of rows that share a band, shape (P, 2), smaller position first, sorted.

    Args:
        bands: Shape (N, bands), zeros for a row without words.
        rows: Indices of the rows to compare, shape (M,); pairs are positions in it.
        has_own: Rows that are no candidates for a band that many rows have. Shape (M,).
    """
    codes = np.zeros(0, dtype=np.int64)
    for column in range(bands.shape[1]):
        values = bands[rows, column]
        places, sizes = _buckets(values)
        if has_own is not None:
            places = places[(sizes <= MANY) | ~has_own[places]]
        pairs = kernels.bucket_pairs(places, values[places], len(rows), _ALL_PAIRS_UP_TO, _PIVOTS)
        codes = np.union1d(codes, pairs)
    return np.stack(np.divmod(codes, max(1, len(rows))), axis=1)


def group_candidates(pairs: Indices, size: Indices, most_characters: int) -> list[CandidateGroup]:
    """Return the rows of candidate pairs in groups that are small enough to hold.

    Args:
        pairs: Result of `candidate_pairs`, between rows numbered in the order of preference.
        size: Length of each row in characters.
        most_characters: A group of this size gets no further rows. Rows that candidate pairs link
            are never divided, however many they are.
    """
    rows, positions = np.unique(pairs, return_inverse=True)
    if not len(rows):
        return []
    edges = positions.reshape(-1, 2)
    component = connected(len(rows), edges)
    weight = np.bincount(component, weights=size[rows]).astype(np.int64)
    of_component = (np.cumsum(weight) - weight) // most_characters
    of_row = of_component[component]
    of_pair = of_row[edges[:, 0]]
    row_order = np.argsort(of_row, kind="stable")
    pair_order = np.argsort(of_pair, kind="stable")
    place = np.empty(len(rows), dtype=np.int64)
    groups = []
    for number in np.unique(of_component):
        members = row_order[slice(*np.searchsorted(of_row[row_order], [number, number + 1]))]
        chosen = pair_order[slice(*np.searchsorted(of_pair[pair_order], [number, number + 1]))]
        place[members] = np.arange(len(members))
        groups.append(CandidateGroup(rows[members], place[edges[chosen]]))
    return groups


class GroupTexts(NamedTuple):
    """What is compared of the M rows of a group.

    Args:
        shingles: Their shingles.
        own: What they have of their own, where many rows share a part.
        answers: Their answers; those of documents are all the same.
    """

    shingles: Shingles
    own: kernels.OwnParts
    answers: kernels.Answers

    @staticmethod
    def plain(of_rows: Shingles) -> GroupTexts:
        """Return rows that share no part with many others and have the same answers."""
        number = len(of_rows.offsets) - 1
        no_hashes, offsets = np.zeros(0, np.uint64), np.zeros(number + 1, np.int64)
        zeros = np.zeros(number, np.int64)
        return GroupTexts(
            of_rows,
            kernels.OwnParts(np.zeros(number, np.int8), no_hashes, offsets),
            kernels.Answers(zeros, zeros, no_hashes, offsets),
        )


def resolve_group(
    pairs: Indices, group: GroupTexts, scopes: Indices, threshold: float
) -> ResolvedGroup:
    """Return which rows of a group are similar and which of them stay.

    A row is removed only if a row of its scope with its answer that stays is similar enough itself:
    in a chain a-b-c with a unlike c, b is removed in favour of a, and c stays.

    Args:
        pairs: Candidates in the group, as in `CandidateGroup`.
        group: What is compared of its rows.
        scopes: Dedup scope of each row.
        threshold: Least Jaccard similarity of duplicates.
    """
    ordered = group.shingles.in_order()
    return ResolvedGroup(
        *kernels.resolve_group(
            ordered.hashes, ordered.offsets, group.own, group.answers, pairs, scopes, threshold
        )
    )


def connected(num_nodes: int, edges: Indices) -> Indices:
    """Return the number of each node's connected component, shape (num_nodes,).

    Components are numbered in the order of their first nodes.
    """
    if not len(edges):
        return np.arange(num_nodes)
    ones = np.ones(len(edges), dtype=np.int8)
    graph = coo_array((ones, (edges[:, 0], edges[:, 1])), shape=(num_nodes, num_nodes))
    return connected_components(graph, directed=False)[1].astype(np.int64)


def _first_of_equal(keys: Keys) -> Indices:
    """Return for each row the preferred one among those with the same normalised text."""
    order = np.lexsort((keys.preference, keys.exact))
    values = keys.exact[order]
    is_first = np.concatenate([[True], values[1:] != values[:-1]])[: len(order)]
    first = np.zeros(len(order), dtype=np.int64)
    first[order] = order[np.flatnonzero(is_first)][np.cumsum(is_first) - 1]
    return first
