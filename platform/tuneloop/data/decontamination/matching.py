"""Train rows with the same text or prompt as a row of an evaluation, or nearly the same.

Train rows are compared as in deduplication. The test and validation splits need no such search: the
split keeps such rows on one side. N-grams, which both are compared by, are in `ngrams`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import numpy as np

from tuneloop.config import DataConfig
from tuneloop.data.decontamination.held_out import EvaluationRows
from tuneloop.data.hashing.columns import Hashes, Indices, Texts
from tuneloop.data.hashing.signatures import band_hashes, jaccard, normalised_hashes, shingles

# As in deduplication: what is in more rows than this, and this part of the rows compared, is no
# row's own; and the share of the shorter own part that two rows have to have in common.
_MANY, _OWN_PART, _ALIKE_OWN = 5, 4, 0.5


class MatchKind(StrEnum):
    """What a train row shares with a held-out row, as the card calls it."""

    SAME_TEXT = "same text"
    SAME_PROMPT = "same prompt"
    NEAR_DUPLICATE = "near-duplicate"
    NGRAMS = "n-grams"


@dataclass(frozen=True)
class HeldOutSet:
    """Rows that are held out for one reason.

    Args:
        name: `test`, `validation`, or the path of an evaluation.
        keys: Keys of the rows, ascending; of an evaluation their positions in it.
        evaluation: Its rows; None if they are rows of the dataset.
    """

    name: str
    keys: Indices
    evaluation: EvaluationRows | None = None


@dataclass(frozen=True)
class Match:
    """A contaminated train row.

    Args:
        key: Key of the train row.
        set_index: Position of the held-out set.
        held_out: Key of the held-out row in its set.
        kind: What the two share.
        similarity: Jaccard similarity, or the share of n-grams, 0 to 1.
        passage: For n-grams: the longest text that both rows have.
    """

    key: int
    set_index: int
    held_out: int
    kind: MatchKind
    similarity: float
    passage: str = ""


@dataclass(frozen=True)
class TrainRows:
    """What the driver knows of the N train rows. Shape (N,) each.

    Args:
        keys: Keys of the rows, ascending.
        exact: Hash of the normalised text that deduplication compares.
        prompt: Hash of the normalised prompt.
        bands: MinHash bands, shape (N, bands).
    """

    keys: Indices
    exact: Indices
    prompt: Indices
    bands: Hashes


class RowMatch(NamedTuple):
    """The row of an evaluation that a train row matches, as its position there."""

    held_out: int
    kind: MatchKind
    similarity: float


class FoundRows(NamedTuple):
    """What train rows and the rows of an evaluation have in common.

    Args:
        matches: For each train row that matches one, the row that it matches best, by its index.
        repeated: All rows of the evaluation that some train row matches, as positions there.
    """

    matches: dict[int, RowMatch]
    repeated: set[int]


def same_rows(train: TrainRows, evaluation: EvaluationRows) -> FoundRows:
    """Return the train rows with the same text or prompt."""
    found = FoundRows({}, set())
    pairs = zip(evaluation.prompts, evaluation.compared, strict=True)
    prompts = [prompt or text for prompt, text in pairs]
    for kind, hashes, texts in (
        (MatchKind.SAME_TEXT, train.exact, evaluation.compared),
        (MatchKind.SAME_PROMPT, train.prompt, prompts),
    ):
        by_hash: dict[int, int] = {}
        held_out = normalised_hashes(Texts.of(texts))
        for position, key in enumerate(held_out.tolist()):
            by_hash.setdefault(key, position)
        for row in np.flatnonzero(np.isin(hashes, held_out)).tolist():
            found.matches.setdefault(row, RowMatch(by_hash[int(hashes[row])], kind, 1.0))
        found.repeated.update(np.flatnonzero(np.isin(held_out, hashes)).tolist())
    return found


def near_pairs(train: TrainRows, evaluation: EvaluationRows, data: DataConfig) -> Indices:
    """Return (train row, held-out row) that share a band, shape (P, 2)."""
    bands = band_hashes(evaluation.compared, data.dedup.ngram_words, data.dedup.threshold)
    pairs: list[Indices] = [np.zeros((0, 2), dtype=np.int64)]
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
            pairs.append(np.stack([np.full(len(others), row), others], axis=1))
    return np.unique(np.concatenate(pairs), axis=0)


def near_duplicates(
    pairs: Indices, sets: dict[int, Hashes], evaluation: EvaluationRows, data: DataConfig
) -> FoundRows:
    """Return the near-duplicates among candidate pairs.

    Args:
        pairs: Result of `near_pairs`.
        sets: Sorted distinct shingle hashes of the train rows in them.
        evaluation: Where the others are.
        data: `dedup.ngram_words` and `dedup.threshold`.
    """
    others = np.unique(pairs[:, 1]).tolist()
    compared = [evaluation.compared[other] for other in others]
    other_sets = dict(zip(others, shingles(compared, data.dedup.ngram_words).sets(), strict=True))
    # What many rows share, a template or an instruction, is no evidence: own parts overlap, too.
    hashes, counts = np.unique(
        np.concatenate([np.zeros(0, np.uint64), *sets.values(), *other_sets.values()]),
        return_counts=True,
    )
    shared = hashes[counts > max(_MANY, (len(sets) + len(other_sets)) // _OWN_PART)]
    own, other_own = (
        {row: np.setdiff1d(of_row, shared, assume_unique=True) for row, of_row in side.items()}
        for side in (sets, other_sets)
    )
    best: dict[int, RowMatch] = {}
    repeated: set[int] = set()
    for row, other in pairs.tolist():
        fewer = min(len(own[row]), len(other_own[other]))
        if fewer and len(np.intersect1d(own[row], other_own[other])) < _ALIKE_OWN * fewer:
            continue
        similarity = jaccard(sets[row], other_sets[other])
        if similarity < data.dedup.threshold:
            continue
        repeated.add(other)
        if row not in best or similarity >= best[row].similarity + 1e-12:
            best[row] = RowMatch(other, MatchKind.NEAR_DUPLICATE, similarity)
    return FoundRows(best, repeated)
