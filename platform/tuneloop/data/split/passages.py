"""Rows that quote the same passage: questions about one text belong to one side of the split.

A passage and a template look alike, a text that several rows share word for word. What tells them
apart is the answers: those to questions about a passage take their words from it, what a template
asks for comes from elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from ray.data import Dataset

from tuneloop.data import ray_rows
from tuneloop.data.hashing.columns import Indices, as_matrix
from tuneloop.data.hashing.content import PASSAGE_WORDS, Content
from tuneloop.data.ledger import Ledger
from tuneloop.data.schema import Side
from tuneloop.data.split.shared_texts import (
    NUM_TRIED,
    ROWS_TRIED,
    Pair,
    is_drawn,
    sharing_rows,
    template_notice,
)
from tuneloop.errors import Problem


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
        tried = [[texts[row] for row in own[:ROWS_TRIED].tolist()] for own in clusters[:NUM_TRIED]]
        are_drawn = is_drawn(tried)
        if are_drawn:
            for own in clusters:
                ledger.passages[own] = own[0]
        # With groups of the user's own it is said what a test must not share.
        if are_drawn or not is_grouped:
            ledger.notices.append(_notice(clusters, are_drawn, ledger))
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


def _texts(
    by_source: Mapping[int, Sequence[Indices]], ledger: Ledger, rows: Dataset, content: Content
) -> dict[int, Pair]:
    """Return what the rows that are looked into say, by their index."""
    tried = [
        row
        for clusters in by_source.values()
        for own in clusters[:NUM_TRIED]
        for row in own[:ROWS_TRIED].tolist()
    ]
    if not tried:
        return {}
    keys = ledger.table["key"].to_numpy()
    found = ray_rows.fetch_texts(rows, keys[tried], content)
    said = {row: found[int(keys[row])] for row in tried}
    return {row: Pair(texts.prompt, texts.answer) for row, texts in said.items()}


def _notice(clusters: Sequence[Indices], are_drawn: bool, ledger: Ledger) -> Problem:
    number = sum(map(len, clusters))
    places = ", ".join(ledger.table["source"].take(clusters[0][:2]).to_pylist())
    if are_drawn:
        return Problem(
            f"{number:,} rows quote {len(clusters):,} texts of {PASSAGE_WORDS} words or more, from "
            "which their answers are taken",
            where=places,
            remedy="rows that quote the same one are on one side of the split",
        )
    return template_notice(number, len(clusters), places)
