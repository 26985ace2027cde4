"""Which rows repeat others: exact copies, and near-duplicates by MinHash-LSH with verification.

The signatures are computed where the rows are; clustering them is a fraction of a second in one
process. Because all rows are compared with all, and ordered by what they say, the result depends
neither on how rows are spread over blocks nor on their order in the files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tuneloop.config import DedupConfig
from tuneloop.data.signatures import Hashes, jaccard

Indices = NDArray[np.int64]
# Rows that share a band are all compared up to this many; beyond it each is compared with the
# first ones only, which keeps a band full of boilerplate linear.
_ALL_PAIRS_UP_TO = 64
_PIVOTS = 32


@dataclass(frozen=True)
class Keys:
    """What deduplication needs to know of all rows. Shape (N,) each, N rows.

    Args:
        exact: Hash of the normalised text that is compared.
        bands: Shape (N, bands), zeros for a row without shingles.
        preference: Rows in the order in which they are kept: of two duplicates the one with the
            smaller number stays. All different.
    """

    exact: Indices
    bands: Hashes
    preference: Indices


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
    keys: Keys, config: DedupConfig, fetch: Callable[[Indices], Mapping[int, Hashes]]
) -> Duplicates:
    """Return which rows repeat which.

    Every removed near-duplicate has a Jaccard similarity of at least `config.threshold` to the
    row kept in its place: candidates are verified on their full shingle sets. Clusters are found
    whether or not `config` removes anything, so that a split can keep them together.

    Args:
        keys: Of all rows.
        config: `exact`, `near` and `threshold`.
        fetch: Gives the sorted distinct shingle hashes of the rows at some indices.
    """
    num_rows = len(keys.exact)
    everyone = np.arange(num_rows)
    first = _first_of_equal(keys)
    unique = np.flatnonzero(first == everyone)
    # From here on rows are named by their rank of preference among the unique ones.
    ranked = unique[np.argsort(keys.preference[unique], kind="stable")]
    pairs = candidate_pairs(keys.bands[ranked])
    sets = fetch(ranked[np.unique(pairs)]) if len(pairs) else {}
    comparison = _Comparison({rank: sets[int(ranked[rank])] for rank in np.unique(pairs).tolist()})
    alike = np.array([comparison.of(a, b) >= config.threshold for a, b in pairs.tolist()], bool)
    pairs = pairs[alike] if len(pairs) else pairs

    component = connected(len(ranked), pairs)
    rank_of = np.zeros(num_rows, dtype=np.int64)
    rank_of[ranked] = np.arange(len(ranked))
    cluster = component[rank_of[first]]

    kept, similarity = everyone.copy(), np.ones(num_rows)
    if config.near:
        for rank, (keeper, value) in _near_removed(component, comparison, config.threshold).items():
            kept[ranked[rank]], similarity[ranked[rank]] = ranked[keeper], value
    copies = np.flatnonzero(first != everyone)
    # A copy goes when copies go, and also when the row it copies goes.
    gone = copies if config.exact else copies[kept[first[copies]] != first[copies]]
    similarity[gone] = similarity[first[gone]]
    kept[gone] = kept[first[gone]]
    exact = np.zeros(num_rows, dtype=bool)
    exact[gone] = kept[gone] == first[gone]
    return Duplicates(cluster, kept, similarity, exact)


def candidate_pairs(bands: Hashes) -> Indices:
    """Return the pairs of rows that share a band, shape (P, 2), smaller index first, sorted."""
    num_rows, num_bands = bands.shape if bands.ndim == 2 else (0, 0)
    if not num_rows or not num_bands:
        return np.zeros((0, 2), dtype=np.int64)
    found: list[Indices] = []
    for column in range(num_bands):
        rows = np.flatnonzero(bands[:, column])
        rows = rows[np.argsort(bands[rows, column], kind="stable")]
        values = bands[rows, column]
        starts = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))
        lengths = np.diff(np.concatenate([starts, [len(rows)]]))
        for start, length in zip(starts[lengths > 1], lengths[lengths > 1], strict=True):
            bucket = rows[start : start + length]
            pivots = length if length <= _ALL_PAIRS_UP_TO else _PIVOTS
            a, b = np.triu_indices(length, 1) if pivots == length else _with_pivots(length)
            found.append(bucket[a] * num_rows + bucket[b])
    if not found:
        return np.zeros((0, 2), dtype=np.int64)
    codes = np.unique(np.concatenate(found))
    return np.stack([codes // num_rows, codes % num_rows], axis=1)


def connected(num_nodes: int, edges: Indices) -> Indices:
    """Return the number of each node's connected component, shape (num_nodes,)."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not len(edges):
        return np.arange(num_nodes)
    ones = np.ones(len(edges), dtype=np.int8)
    graph = coo_array((ones, (edges[:, 0], edges[:, 1])), shape=(num_nodes, num_nodes))
    return connected_components(graph, directed=False)[1].astype(np.int64)


@dataclass
class _Comparison:
    """Exact similarities, each computed once."""

    sets: Mapping[int, Hashes]
    known: dict[tuple[int, int], float] = field(default_factory=dict)

    def of(self, a: int, b: int) -> float:
        pair = (a, b) if a < b else (b, a)
        if pair not in self.known:
            self.known[pair] = jaccard(self.sets[a], self.sets[b])
        return self.known[pair]


def _near_removed(
    component: Indices, comparison: _Comparison, threshold: float
) -> dict[int, tuple[int, float]]:
    """Return (kept rank, similarity) of each removed rank.

    Within a component a row goes only if a row that is kept is similar enough itself: in a
    chain a-b-c with a unlike c, b goes in favour of a, and c stays.
    """
    order = np.argsort(component, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], np.diff(component[order]) != 0]))
    removed: dict[int, tuple[int, float]] = {}
    for members in np.split(order, starts[1:]):
        if len(members) < 2:
            continue
        keepers: list[int] = []
        for rank in sorted(members.tolist()):
            scored = [(comparison.of(keeper, rank), -keeper) for keeper in keepers]
            value, keeper = max(scored, default=(0.0, 0))
            if value >= threshold:
                removed[rank] = (-keeper, value)
            else:
                keepers.append(rank)
    return removed


def _first_of_equal(keys: Keys) -> Indices:
    """Return for each row the preferred one among those with the same normalised text."""
    order = np.lexsort((keys.preference, keys.exact))
    values = keys.exact[order]
    is_first = np.concatenate([[True], values[1:] != values[:-1]])[: len(order)]
    first = np.zeros(len(order), dtype=np.int64)
    first[order] = order[np.flatnonzero(is_first)][np.cumsum(is_first) - 1]
    return first


def _with_pivots(length: int) -> tuple[Indices, Indices]:
    a, b = np.divmod(np.arange(_PIVOTS * length), length)
    later = b > a
    return a[later], b[later]
