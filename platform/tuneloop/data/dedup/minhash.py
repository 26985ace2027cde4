"""Which rows repeat others: exact copies, and near-duplicates by MinHash-LSH with verification.

Because all rows are compared with all, and ordered by their content, the result depends neither
on how rows are spread over blocks nor on their order in the files. This module decides from small
numbers in the driver; the texts of candidate duplicates are compared in groups, wherever the caller
likes (`distributed` does it in Ray tasks), so that no process has to hold them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

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


def find_duplicates(
    keys: Keys,
    config: DedupConfig,
    compare: Callable[[Sequence[CandidateGroup]], Iterable[ResolvedGroup]],
) -> Duplicates:
    """Return which rows repeat which.

    Every removed near-duplicate has a Jaccard similarity of at least `config.threshold` to the
    row kept in its place: candidates are verified on their full shingle sets. Clusters are found
    whether or not `config` removes anything, so that a split can keep them together.

    Args:
        keys: What is known of all rows.
        config: `exact` and `near`.
        compare: Yields `resolve_group` of each group, in their order.
    """
    num_rows = len(keys.exact)
    first = _first_of_equal(keys)
    unique = np.flatnonzero(first == np.arange(num_rows))
    ranked = unique[np.argsort(keys.preference[unique], kind="stable")]
    # Rows are named by their rank of preference among the unique ones until they are compared.
    pairs = candidate_pairs(keys.bands, ranked)
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


def candidate_pairs(bands: Hashes, rows: Indices) -> Indices:
    """Return the pairs of rows that share a band, shape (P, 2), smaller position first, sorted.

    Args:
        bands: Shape (N, bands), zeros for a row without words.
        rows: Indices of the rows to compare, shape (M,); pairs are positions in it.
    """
    codes = np.zeros(0, dtype=np.int64)
    for column in range(bands.shape[1]):
        values = bands[rows, column]
        places = np.flatnonzero(values)
        places = places[np.argsort(values[places])]
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


def resolve_group(
    pairs: Indices, group: Shingles, scopes: Indices, threshold: float
) -> ResolvedGroup:
    """Return which rows of a group are similar and which of them stay.

    A row is removed only if a row of its scope that stays is similar enough itself: in a chain
    a-b-c with a unlike c, b is removed in favour of a, and c stays.

    Args:
        pairs: Candidates in the group, as in `CandidateGroup`.
        group: Shingles of its rows.
        scopes: Dedup scope of each row.
        threshold: Least Jaccard similarity of duplicates.
    """
    ordered = group.in_order()
    return ResolvedGroup(
        *kernels.resolve_group(ordered.hashes, ordered.offsets, pairs, scopes, threshold)
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
