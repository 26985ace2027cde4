"""Which rows repeat others: exact copies, and near-duplicates by MinHash-LSH with verification.

Because all rows are compared with all, and ordered by what they say, the result depends neither
on how rows are spread over blocks nor on their order in the files. Here is what is decided from
small numbers in one process; the texts of rows that may be alike are compared in groups, one after
the other or wherever the caller likes (`comparing`), so that none of it has to hold them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tuneloop.config import DedupConfig
from tuneloop.data.hashing.signatures import Hashes, Shingles

Indices = NDArray[np.int64]
# Rows that share a band are all compared up to this many; beyond it each is compared with the
# first ones only, which keeps a band full of boilerplate linear.
_ALL_PAIRS_UP_TO = 64
_PIVOTS = 32
# Characters of the rows in a group, unless so many hang together.
_GROUP_CHARACTERS = 64 << 20


@dataclass(frozen=True)
class Keys:
    """What deduplication needs to know of all rows. Shape (N,) each, N rows.

    Args:
        exact: Hash of the normalised text that is compared.
        bands: Shape (N, bands), zeros for a row without words.
        preference: Rows in the order in which they are kept: of two duplicates the one with the
            smaller number stays. All different.
        size: Characters.
    """

    exact: Indices
    bands: Hashes
    preference: Indices
    size: Indices


@dataclass(frozen=True)
class Group:
    """Rows to be compared, of which none may be like a row outside. Shape (M,), M rows.

    Args:
        rows: Indices of the rows, the preferred one first.
        pairs: Which may be alike, as positions in `rows`, shape (P, 2).
    """

    rows: Indices
    pairs: Indices


@dataclass(frozen=True)
class Settled:
    """What comparing a group shows, as positions in it. Shape (M,) each.

    Args:
        root: The first row of those that are linked by alike rows.
        keeper: The row that stands for this one; its own where it stays.
        similarity: To the keeper.
    """

    root: Indices
    keeper: Indices
    similarity: NDArray[np.float64]


@dataclass(frozen=True)
class Duplicates:
    """The outcome. Shape (N,) each.

    Args:
        cluster: Number of the row's cluster; rows alike or linked by alike rows share it.
        kept: Index of the row that stands for this one; its own where it stays.
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
    keys: Keys, config: DedupConfig, compare: Callable[[Sequence[Group]], Iterable[Settled]]
) -> Duplicates:
    """Return which rows repeat which.

    Every removed near-duplicate has a Jaccard similarity of at least `config.threshold` to the
    row kept in its place: candidates are verified on their full shingle sets. Clusters are found
    whether or not `config` removes anything, so that a split can keep them together.

    Args:
        keys: Of all rows.
        config: `exact` and `near`.
        compare: Gives `settle` of each group, in their order.
    """
    num_rows = len(keys.exact)
    first = _first_of_equal(keys)
    unique = np.flatnonzero(first == np.arange(num_rows))
    ranked = unique[np.argsort(keys.preference[unique], kind="stable")]
    # Rows are named by their rank of preference among the unique ones until they are compared.
    pairs = candidate_pairs(keys.bands, ranked)
    groups = group_candidates(pairs, keys.size[ranked], _GROUP_CHARACTERS)
    groups = [Group(ranked[group.rows], group.pairs) for group in groups]

    root, kept, similarity = np.arange(num_rows), np.arange(num_rows), np.ones(num_rows)
    for group, settled in zip(groups, compare(groups) if groups else [], strict=True):
        root[group.rows] = group.rows[settled.root]
        if config.near:
            kept[group.rows] = group.rows[settled.keeper]
            similarity[group.rows] = settled.similarity
    copies = np.flatnonzero(first != np.arange(num_rows))
    # A copy goes when copies go, and also when the row it copies goes.
    gone = copies if config.exact else copies[kept[first[copies]] != first[copies]]
    similarity[gone] = similarity[first[gone]]
    kept[gone] = kept[first[gone]]
    exact = np.zeros(num_rows, dtype=bool)
    exact[gone] = kept[gone] == first[gone]
    return Duplicates(root[first], kept, similarity, exact)


def candidate_pairs(bands: Hashes, rows: Indices) -> Indices:
    """Return the pairs of rows that share a band, shape (P, 2), smaller place first, sorted.

    Args:
        bands: Shape (N, bands), zeros for a row without words.
        rows: Which rows, shape (M,); pairs name their places in it.
    """
    from tuneloop.data.hashing import kernels

    limits = (len(rows), _ALL_PAIRS_UP_TO, _PIVOTS)
    codes = np.zeros(0, dtype=np.int64)
    for column in range(bands.shape[1]):
        values = bands[rows, column]
        places = np.flatnonzero(values)
        places = places[np.argsort(values[places])]
        found = kernels.bucket_pairs(places, values[places], limits)
        codes = np.union1d(codes, found)
    return np.stack(np.divmod(codes, max(1, len(rows))), axis=1)


def group_candidates(pairs: Indices, size: Indices, most_characters: int) -> list[Group]:
    """Return the rows of candidate pairs in groups to be compared apart, small enough to hold.

    Args:
        pairs: Of `candidate_pairs`, between rows numbered in the order of preference.
        size: Characters of each row.
        most_characters: From this size on a group gets no further rows. Rows that hang together
            by candidate pairs are never divided, however many they are.
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
        groups.append(Group(rows[members], place[edges[chosen]]))
    return groups


def settle(pairs: Indices, found: Shingles, kinds: Indices, threshold: float) -> Settled:
    """Return which rows of a group are alike and which of them stay.

    A row goes only if a row of its kind that stays is similar enough itself: in a chain a-b-c with
    a unlike c, b goes in favour of a, and c stays.

    Args:
        pairs: Of the group.
        found: Shingles of the group's rows.
        kinds: Of the group's rows, for example the number of their task.
        threshold: Least Jaccard similarity of rows that are alike.
    """
    from tuneloop.data.hashing import kernels

    ordered = found.in_order()
    return Settled(*kernels.settle(ordered.hashes, ordered.offsets, pairs, kinds, threshold))


def connected(num_nodes: int, edges: Indices) -> Indices:
    """Return the number of each node's connected component, shape (num_nodes,).

    Components are numbered in the order of their first nodes.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

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
