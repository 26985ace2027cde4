"""Which train rows repeat what a model will be evaluated on.

Held out are the test and validation split and any evaluation files. A train row is contaminated
by a held-out row if it says the same, asks the same, is a near-duplicate (Jaccard similarity over
word shingles, as in deduplication), or shares enough long word n-grams with the row or with its
prompt alone. The first three cannot happen between the splits, which keep such rows on one side.

Source: Brown et al. 2020, Language Models are Few-Shot Learners, arXiv:2005.14165, appendix C:
13-grams, or the 5th percentile of the evaluation's lengths where that is smaller, at least 8;
n-grams in more than 10 train rows are taken for boilerplate. There a single shared n-gram decides;
here it is `overlap_threshold`, a share of the n-grams of the shorter row. A frequent n-gram is
boilerplate here only if several held-out rows have it: many train rows that repeat one held-out
row are contaminated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tuneloop.config import DataConfig
from tuneloop.data.dedup import Indices
from tuneloop.data.signatures import (
    Hashes,
    Texts,
    band_hashes,
    jaccard,
    normalised_hashes,
    shingles,
    word_spans,
)

_LEAST_NGRAM_WORDS = 8
_BOILERPLATE_ABOVE = 10
_SHORTEST_PERCENTILE = 5
_QUOTED_CHARACTERS = 160


@dataclass(frozen=True)
class HeldOut:
    """Rows of one origin that may not be trained on. Lists have one item for each row.

    Args:
        name: `test`, `validation`, or a source's path.
        labels: What a reason calls the row.
        texts: What the row says; prompt and answer of a conversation.
        prompts: The prompt alone; empty for a document.
        compared: What deduplication compares, `data.dedup.on`.
        is_split: Whether equal and near-duplicate rows are known to be elsewhere.
    """

    name: str
    labels: list[str]
    texts: list[str]
    prompts: list[str]
    compared: list[str] = field(default_factory=list)
    is_split: bool = False


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


@dataclass(frozen=True)
class Match:
    """A contaminated train row.

    Args:
        row: Index of the train row.
        origin: Index of the held-out origin.
        held_out: Index of the row there.
        kind: `same text`, `same prompt`, `near-duplicate` or `n-grams`.
        similarity: Jaccard similarity, or the share of n-grams.
    """

    row: int
    origin: int
    held_out: int
    kind: str
    similarity: float


@dataclass(frozen=True)
class NgramIndex:
    """The n-grams of held-out rows, small enough to send to every worker.

    A unit is a held-out row or its prompt; `rows` says which.

    Args:
        ngram_words: Words in an n-gram.
        grams: Distinct hashes, sorted. Shape (G,).
        starts: Shape (G + 1,); the units with n-gram g are `units[starts[g]:starts[g + 1]]`.
        units: Shape (entries,).
        rows: Shape (units,), the held-out row of each.
        sizes: Shape (units,), distinct n-grams of each.
    """

    ngram_words: int
    grams: Hashes
    starts: Indices
    units: Indices
    rows: Indices
    sizes: Indices

    def common(self, texts: Sequence[str]) -> dict[int, tuple[Indices, int]]:
        """Return, of the texts that share n-grams, which (as indices) and how many they have."""
        found = shingles(texts, self.ngram_words)
        if not len(found.hashes) or not len(self.grams):
            return {}
        places = np.searchsorted(self.grams, found.hashes)
        places[places == len(self.grams)] = 0
        hits = np.concatenate([[0], np.cumsum(self.grams[places] == found.hashes)])
        counts = hits[found.offsets[1:]] - hits[found.offsets[:-1]]
        result = {}
        for row in np.flatnonzero(counts).tolist():
            part = slice(found.offsets[row], found.offsets[row + 1])
            distinct = np.unique(found.hashes[part])
            own = np.searchsorted(self.grams, distinct)
            own[own == len(self.grams)] = 0
            result[row] = own[self.grams[own] == distinct], len(distinct)
        return result


def ngram_index(held_out: HeldOut, ngram_words: int) -> NgramIndex | None:
    """Return the n-grams of held-out rows; None if they have no words."""
    lengths = np.diff(shingles(held_out.texts, 1).offsets)
    if not lengths.any():
        return None
    shortest = int(np.percentile(lengths[lengths > 0], _SHORTEST_PERCENTILE))
    words = min(ngram_words, max(_LEAST_NGRAM_WORDS, shortest))
    rows = np.arange(len(held_out.texts))
    with_prompt = np.array([bool(prompt) for prompt in held_out.prompts], dtype=bool)
    texts = [*held_out.texts, *(prompt for prompt in held_out.prompts if prompt)]
    rows = np.concatenate([rows, rows[with_prompt]])
    # A prompt too short for an n-gram would match whatever else is as short.
    long_enough = np.diff(shingles(texts, 1).offsets) >= words
    long_enough[: len(held_out.texts)] |= lengths >= _LEAST_NGRAM_WORDS
    sets = [
        values if keep else values[:0]
        for values, keep in zip(shingles(texts, words).sets(), long_enough, strict=True)
    ]
    sizes = np.array([len(values) for values in sets], dtype=np.int64)
    flat = np.concatenate(sets)
    owner = np.repeat(np.arange(len(texts)), sizes)
    order = np.argsort(flat, kind="stable")
    grams, counts = np.unique(flat, return_counts=True)
    starts = np.concatenate([[0], np.cumsum(counts)])
    return NgramIndex(words, grams, starts, owner[order], rows, sizes)


def overlapping(
    index: NgramIndex, shared: Sequence[Indices], sizes: Sequence[int], threshold: float
) -> list[tuple[int, int, float]]:
    """Return (row, held-out row, overlap) of the rows that share enough n-grams.

    Args:
        index: Of the held-out rows.
        shared: Of each train row, indices of the n-grams it shares.
        sizes: Of each train row, its distinct n-grams.
        threshold: Least share of the n-grams of the shorter of two rows.
    """
    grams = np.concatenate([*shared, np.zeros(0, dtype=np.int64)]).astype(np.int64)
    owner = np.repeat(np.arange(len(shared)), [len(found) for found in shared])
    frequency = np.bincount(grams, minlength=len(index.grams))
    num_held_out = _held_out_rows_of_gram(index)
    boilerplate = (frequency > _BOILERPLATE_ABOVE) & (num_held_out > 1)
    row_sizes = np.array(sizes, dtype=np.int64)
    row_sizes -= np.bincount(owner, weights=boilerplate[grams], minlength=len(sizes)).astype(int)
    entries = np.repeat(boilerplate, np.diff(index.starts))
    unit_sizes = index.sizes - np.bincount(
        index.units, weights=entries, minlength=len(index.sizes)
    ).astype(int)

    telling = ~boilerplate[grams]
    grams, owner = grams[telling], owner[telling]
    counts = np.diff(index.starts)[grams]
    ends = np.cumsum(counts)
    place = np.arange(int(counts.sum())) - np.repeat(ends - counts, counts)
    units = index.units[np.repeat(index.starts[grams], counts) + place]
    codes = np.repeat(owner, counts) * len(index.sizes) + units
    pairs, num_shared = np.unique(codes, return_counts=True)
    row, unit = np.divmod(pairs, len(index.sizes))
    overlap = num_shared / np.maximum(1, np.minimum(row_sizes[row], unit_sizes[unit]))
    enough = np.flatnonzero(overlap >= threshold)
    best: dict[int, tuple[int, float]] = {}
    for at in enough[np.argsort(-overlap[enough], kind="stable")].tolist():
        best.setdefault(int(row[at]), (int(index.rows[unit[at]]), float(min(1.0, overlap[at]))))
    return [(row, *found) for row, found in sorted(best.items())]


def _held_out_rows_of_gram(index: NgramIndex) -> Indices:
    """Return how many held-out rows have each n-gram; a row and its prompt count once."""
    gram = np.repeat(np.arange(len(index.grams)), np.diff(index.starts))
    pairs = np.unique(gram * (len(index.sizes) + 1) + index.rows[index.units])
    return np.bincount(pairs // (len(index.sizes) + 1), minlength=len(index.grams))


def same_rows(train: TrainRows, held_out: HeldOut) -> dict[int, tuple[int, str]]:
    """Return (held-out row, kind) of the train rows that say or ask the same, by train row."""
    found: dict[int, tuple[int, str]] = {}
    for kind, own, texts in (
        ("same text", train.exact, held_out.compared),
        ("same prompt", train.prompt, [p or t for p, t in _prompts_and_texts(held_out)]),
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


def matched_text(text: str, held_out: Sequence[str], ngram_words: int) -> str:
    """Return the longest passage of a text whose n-grams all occur in one of the others."""
    theirs = np.concatenate(shingles(held_out, ngram_words).sets())
    own = shingles([text], ngram_words).hashes
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


def _prompts_and_texts(held_out: HeldOut) -> list[tuple[str, str]]:
    return list(zip(held_out.prompts, held_out.compared, strict=True))
