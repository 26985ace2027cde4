"""Texts that several prompts share word for word: passages if answers are taken from them.

A passage and a template look alike. What tells them apart is the answers: those to questions about
a passage take their words from it, what a template asks for comes from elsewhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tuneloop.data.dedup.minhash import connected
from tuneloop.data.hashing.columns import Hashes, Indices, Texts
from tuneloop.data.hashing.content import PASSAGE_HASHES, PASSAGE_WORDS
from tuneloop.data.hashing.signatures import lowest_hashes
from tuneloop.errors import Problem
from tuneloop.words import find_words

# What more than these rows, and more than this share of all rows, have is a template.
MOST_ROWS, _MOST_OF_ALL = 20, 4
_HIGHEST = np.iinfo(np.uint64).max
# How many passages are looked into, and rows of each.
NUM_TRIED, ROWS_TRIED = 50, 6
_FEWEST_ANSWERS = 10
# How much more of an answer's words are in its own passage than in another one.
_LEAST_MORE = 0.15


class Pair(NamedTuple):
    """A prompt and its answer."""

    prompt: str
    answer: str


class Undrawn(NamedTuple):
    """Texts that rows share and from which no answer is taken: how many, and two of the rows."""

    num_rows: int
    num_texts: int
    first: int
    second: int


def undrawn_texts(pairs: Sequence[Pair]) -> Undrawn | None:
    """Return the texts that some rows share without drawing on them; None if there is none."""
    prompts = Texts.of([pair.prompt for pair in pairs])
    label = sharing_rows(lowest_hashes(prompts, PASSAGE_WORDS, PASSAGE_HASHES))
    order = np.argsort(label, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(label[order])) + 1)
    clusters = [own.tolist() for own in groups if len(own) > 1]
    tried = [[pairs[row] for row in own[:ROWS_TRIED]] for own in clusters[:NUM_TRIED]]
    if not clusters or is_drawn(tried):
        return None
    return Undrawn(sum(map(len, clusters)), len(clusters), *clusters[0][:2])


def is_drawn(clusters: Sequence[Sequence[Pair]]) -> bool:
    """Return whether the answers of rows that share texts are taken from these.

    Args:
        clusters: Rows that share a text, two or more of each.
    """
    more = drawn_from_shared(clusters)
    return more is not None and more >= _LEAST_MORE


def sharing_rows(bands: Hashes) -> Indices:
    """Return for each row the number of the rows that share a long text with it. Shape (N,).

    Args:
        bands: `passage_bands` of the rows; 0 for none. Shape (N, hashes).
    """
    count, width = bands.shape
    most = max(MOST_ROWS, count // _MOST_OF_ALL)
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


def drawn_from_shared(clusters: Sequence[Sequence[Pair]]) -> float | None:
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


def template_notice(num_rows: int, num_texts: int, places: str) -> Problem:
    """Return the notice of texts that count as templates, though they may be documents."""
    return Problem(
        f"{num_rows:,} rows quote {num_texts:,} texts of {PASSAGE_WORDS} words or more, and their "
        "answers are not taken from there: they count as templates",
        where=places,
        remedy="if they are documents that a test must not share with training, name the column "
        "that tells them apart in data.split.group_by",
    )


def _words(text: str) -> set[str]:
    return set(find_words(text.casefold()))
