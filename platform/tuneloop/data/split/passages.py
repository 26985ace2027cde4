"""Rows that quote the same passage: questions about one text belong to one side of the split.

A passage and a template look alike, a text that several rows share word for word. What tells them
apart is the answers: those to questions about a passage take their words from it, what a template
asks for comes from elsewhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from ray.data import Dataset

from tuneloop.data import ray_rows
from tuneloop.data.dedup.minhash import connected
from tuneloop.data.hashing.columns import Hashes, Indices, as_matrix
from tuneloop.data.hashing.content import PASSAGE_WORDS, Content
from tuneloop.data.ledger import Ledger
from tuneloop.data.ray_rows import RowTexts
from tuneloop.data.schema import Side
from tuneloop.errors import Problem
from tuneloop.words import find_words

# What more than these rows, and more than this share of all rows, have is a template.
_MOST_ROWS, _MOST_OF_ALL = 20, 4
_HIGHEST = np.iinfo(np.uint64).max
# How many passages of a source are looked into, and rows of each.
_NUM_TRIED, _ROWS_TRIED = 50, 6
_FEWEST_ANSWERS = 10
# How much more of an answer's words are in its own passage than in another one.
_LEAST_MORE = 0.15


def link_passages(
    ledger: Ledger, rows: Dataset, content: Content, is_grouped: bool = False
) -> None:
    """Note in the ledger which rows quote the same passage, and tell it.

    Args:
        ledger: After deduplication; `passages` and `notices` are set.
        rows: Materialized dataset of tokenized rows.
        content: How to read what they say.
        is_grouped: `data.split.group_by` is set.
    """
    left = np.flatnonzero(~ledger.is_on(Side.REMOVED))
    bands = as_matrix(ledger.table["passage_bands"].take(left))
    is_synthetic = ledger.table["synthetic"].to_numpy(zero_copy_only=False)[left]
    # What people wrote is split as if nothing else were there.
    people = left[~is_synthetic]
    by_source: dict[int, list[Indices]] = {}
    for own in _clusters(people, sharing_rows(bands[~is_synthetic]), ledger.row_ids):
        by_source.setdefault(int(ledger.source[own[0]]), []).append(own)
    texts = _texts(by_source, ledger, rows, content)
    ledger.passages = np.arange(len(ledger.side))
    for clusters in by_source.values():
        tried = [
            [texts[row] for row in own[:_ROWS_TRIED].tolist()] for own in clusters[:_NUM_TRIED]
        ]
        more = drawn_from_shared(tried)
        is_drawn = more is not None and more >= _LEAST_MORE
        if is_drawn:
            for own in clusters:
                ledger.passages[own] = own[0]
        # With groups of the user's own it is said what a test must not share.
        if is_drawn or not is_grouped:
            ledger.notices.append(_notice(clusters, is_drawn, ledger))
    if is_synthetic.any():
        _join_synthetic(ledger.passages, left, is_synthetic, sharing_rows(bands))


def _join_synthetic(
    passages: Indices, rows: Indices, is_synthetic: NDArray[np.bool_], label: Indices
) -> None:
    """Give synthetic rows the passage of people's rows that share it.

    Args:
        passages: Of all rows; changed.
        rows: Those that are left, with whether they are synthetic, and their label among all.
    """
    is_quoting = ~is_synthetic & np.isin(passages[rows], passages[rows[passages[rows] != rows]])
    known = dict(zip(label[is_quoting].tolist(), passages[rows[is_quoting]].tolist(), strict=True))
    for row, own in zip(rows[is_synthetic].tolist(), label[is_synthetic].tolist(), strict=True):
        passages[row] = known.get(own, row)


def sharing_rows(bands: Hashes) -> Indices:
    """Return for each row the number of the rows that share a long text with it. Shape (N,).

    Args:
        bands: `passage_bands` of the rows; 0 for none. Shape (N, hashes).
    """
    count, width = bands.shape
    most = max(_MOST_ROWS, count // _MOST_OF_ALL)
    hashes, owner = bands.reshape(-1), np.repeat(np.arange(count), width)
    order = np.argsort(hashes, kind="stable")
    hashes, owner = hashes[order], owner[order]
    distinct, group, sizes = np.unique(hashes, return_inverse=True, return_counts=True)
    # A row may have a hash without showing it, where its lowest ones are all lower.
    highest = np.sort(np.where(bands[:, -1] == 0, _HIGHEST, bands[:, -1]))
    num_showing = count - np.searchsorted(highest, distinct)
    is_few = (sizes * count <= most * num_showing)[group] & (hashes != 0)
    follows = (group[1:] == group[:-1]) & is_few[1:]
    edges = np.stack([owner[:-1][follows], owner[1:][follows]], axis=1)
    label = connected(count, edges)
    # Through rows that share one text with some and another with others, all may hang together.
    is_many = np.bincount(label)[label] > most
    return np.unique(np.where(is_many, count + np.arange(count), label), return_inverse=True)[1]


def _clusters(rows: Indices, label: Indices, row_ids: pa.StringArray) -> list[Indices]:
    """Return the rows with an equal label, where there are several, in an order of their ids.

    It does not depend on where the rows were read.
    """
    is_shared = np.bincount(label)[label] > 1
    rows, label = rows[is_shared], label[is_shared]
    order = np.asarray(pc.sort_indices(row_ids.take(rows)))
    order = order[np.argsort(label[order], kind="stable")]
    starts = np.flatnonzero(np.diff(label[order])) + 1
    found = [own for own in np.split(rows[order], starts) if len(own)]
    return sorted(found, key=lambda own: row_ids[int(own[0])].as_py())


def drawn_from_shared(clusters: Sequence[Sequence[RowTexts]]) -> float | None:
    """Return how much more of the answers' words are in their own shared text than in another.

    Args:
        clusters: Rows that share a text, two or more of each.

    Returns:
        A mean difference of shares, -1 to 1; None if too few answers say anything: labels and
        other answers that rows of a cluster have in common do not.
    """
    prompts = [[_words(row.prompt) for row in cluster] for cluster in clusters]
    shared = [set.intersection(*words) for words in prompts]
    differences = []
    for number, cluster in enumerate(clusters):
        answers = [_words(row.answer) for row in cluster]
        frequent = Counter(word for words in answers for word in words)
        repeated = Counter(row.answer for row in cluster)
        other = shared[number - 1]
        for row, words in zip(cluster, answers, strict=True):
            own = {word for word in words if 2 * frequent[word] <= len(cluster)}
            if own and repeated[row.answer] == 1:
                more = len(own & shared[number]) - len(own & other)
                differences.append(more / len(own))
    if len(clusters) < 2 or len(differences) < _FEWEST_ANSWERS:
        return None
    # Where most answers are labels, the others are rare labels.
    if 2 * len(differences) < sum(map(len, clusters)):
        return None
    return float(np.mean(differences))


def _words(text: str) -> set[str]:
    return set(find_words(text.casefold()))


def _texts(
    by_source: Mapping[int, Sequence[Indices]], ledger: Ledger, rows: Dataset, content: Content
) -> dict[int, RowTexts]:
    """Return what the rows that are looked into say, by their index."""
    tried = [
        row
        for clusters in by_source.values()
        for own in clusters[:_NUM_TRIED]
        for row in own[:_ROWS_TRIED].tolist()
    ]
    if not tried:
        return {}
    keys = ledger.table["key"].to_numpy()
    found = ray_rows.fetch_texts(rows, keys[tried], content)
    return {row: found[int(keys[row])] for row in tried}


def _notice(clusters: Sequence[Indices], is_drawn: bool, ledger: Ledger) -> Problem:
    number = sum(map(len, clusters))
    places = ", ".join(ledger.table["source"].take(clusters[0][:2]).to_pylist())
    what = f"{number:,} rows quote {len(clusters):,} texts of {PASSAGE_WORDS} words or more"
    if is_drawn:
        return Problem(
            f"{what}, from which their answers are taken",
            where=places,
            remedy="rows that quote the same one are on one side of the split",
        )
    return Problem(
        f"{what}, and their answers are not taken from there: they count as templates",
        where=places,
        remedy="if they are documents that a test must not share with training, name the column "
        "that tells them apart in data.split.group_by",
    )
