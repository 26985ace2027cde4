"""Which train rows say or ask what a row of an evaluation does, or nearly the same.

Train rows are compared as in deduplication. Rows of the test and validation split need it not: the
split keeps such rows on one side. N-grams, which both are compared by, are in `ngrams`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tuneloop.config import DataConfig
from tuneloop.data.dedup.minhash import Indices
from tuneloop.data.hashing.signatures import (
    Hashes,
    Texts,
    band_hashes,
    jaccard,
    normalised_hashes,
    shingles,
)


@dataclass(frozen=True)
class HeldOut:
    """Rows of one evaluation. Lists have one item for each row.

    Args:
        name: The path of its source.
        labels: What a reason calls the row.
        texts: What the row says; prompt and answer of a conversation.
        prompts: The prompt alone; empty for a document.
        compared: What deduplication compares, `data.dedup.on`.
    """

    name: str
    labels: list[str]
    texts: list[str]
    prompts: list[str]
    compared: list[str]


@dataclass(frozen=True)
class TrainRows:
    """What is known of the N train rows in this process. Shape (N,) each.

    Args:
        keys: Of the rows, ascending.
        exact: Hash of the normalised text that deduplication compares.
        prompt: Hash of the normalised prompt.
        bands: Shape (N, bands).
    """

    keys: Indices
    exact: Indices
    prompt: Indices
    bands: Hashes


def same_rows(train: TrainRows, held_out: HeldOut) -> dict[int, tuple[int, str]]:
    """Return (held-out row, kind) of the train rows that say or ask the same, by train row."""
    found: dict[int, tuple[int, str]] = {}
    asked = zip(held_out.prompts, held_out.compared, strict=True)
    prompts = [prompt or text for prompt, text in asked]
    for kind, own, texts in (
        ("same text", train.exact, held_out.compared),
        ("same prompt", train.prompt, prompts),
    ):
        by_hash: dict[int, int] = {}
        for position, key in enumerate(normalised_hashes(Texts.of(texts)).tolist()):
            by_hash.setdefault(key, position)
        known = np.array(list(by_hash), dtype=np.int64)
        for row in np.flatnonzero(np.isin(own, known)).tolist():
            found.setdefault(row, (by_hash[int(own[row])], kind))
    return found


def near_pairs(train: TrainRows, held_out: HeldOut, data: DataConfig) -> Indices:
    """Return (train row, held-out row) that share a band, shape (P, 2)."""
    bands = band_hashes(held_out.compared, data.dedup.ngram_words, data.dedup.threshold)
    found: list[NDArray[np.int64]] = [np.zeros((0, 2), dtype=np.int64)]
    for column in range(bands.shape[1]):
        rows = np.flatnonzero(np.isin(train.bands[:, column], bands[:, column]))
        rows = rows[train.bands[rows, column] != 0]
        order = np.argsort(bands[:, column], kind="stable")
        values = bands[order, column]
        for row in rows.tolist():
            low, high = (
                int(np.searchsorted(values, train.bands[row, column], side=side))
                for side in ("left", "right")
            )
            others = order[low:high]
            found.append(np.stack([np.full(len(others), row), others], axis=1))
    return np.unique(np.concatenate(found), axis=0)


def near_duplicates(
    pairs: Indices, sets: dict[int, Hashes], held_out: HeldOut, data: DataConfig
) -> dict[int, tuple[int, float]]:
    """Return (held-out row, similarity) of the near-duplicates among candidate pairs.

    Args:
        pairs: Of `near_pairs`.
        sets: Sorted distinct shingle hashes of the train rows in them.
        held_out: Where the others are.
        data: `dedup.ngram_words` and `dedup.threshold`.
    """
    others = np.unique(pairs[:, 1]).tolist()
    found = shingles([held_out.compared[other] for other in others], data.dedup.ngram_words).sets()
    theirs = dict(zip(others, found, strict=True))
    best: dict[int, tuple[int, float]] = {}
    for row, other in pairs.tolist():
        similarity = jaccard(sets[row], theirs[other])
        if similarity >= max(data.dedup.threshold, best.get(row, (0, 0.0))[1] + 1e-12):
            best[row] = (other, similarity)
    return best
