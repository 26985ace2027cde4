"""Rows whose prompts are the same, or nearly the same, and whose answers differ.

A model cannot learn both answers; where they are many, the task is not clear enough yet. Nothing is
removed for it: which answer is right is for people to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from ray.data import Dataset

from tuneloop.data import ray_rows
from tuneloop.data.dedup.minhash import MANY, OWN_PART, candidate_pairs, connected, scoped_hashes
from tuneloop.data.hashing.columns import Hashes, Indices, as_matrix
from tuneloop.data.hashing.content import ALIKE_PROMPTS, Content
from tuneloop.data.hashing.signatures import jaccard
from tuneloop.data.ledger import Ledger
from tuneloop.data.schema import Side

_NUM_EXAMPLES = 5
_ROWS_SHOWN = 3
_COLUMNS = ["key", "source", "prompt_key", "answer_key", "prompt_bands"]


@dataclass(frozen=True)
class ConflictingRow:
    """A row of an example: its file and line, its prompt and its answer."""

    source: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class ConflictExample:
    """Rows whose answers differ; `kind` is `same prompt` or `near prompt`."""

    kind: str
    similarity: float
    rows: list[ConflictingRow]


@dataclass(frozen=True)
class Conflicts:
    """What the card says of conflicts.

    Args:
        num_same_prompt: Prompts with several answers.
        num_rows_same_prompt: Rows with these prompts.
        num_near_prompt: Pairs of prompts whose words are nearly the same, with different answers.
        near_threshold: Jaccard similarity from which two prompts are nearly the same.
        examples: The largest groups, then the most similar pairs.
    """

    num_same_prompt: int
    num_rows_same_prompt: int
    num_near_prompt: int
    near_threshold: float
    examples: list[ConflictExample]


class _NearPrompts(NamedTuple):
    """Two rows, as indices, whose prompts differ little and whose answers differ."""

    similarity: float
    row: int
    other: int


class OutermostRows(NamedTuple):
    """Two rows of each of P prompts, the same one twice if it has one answer. Shape (P,) each.

    Args:
        lowest: The row whose answer has the lowest hash.
        highest: The row whose answer has the highest.
    """

    lowest: Indices
    highest: Indices


def find_conflicts(ledger: Ledger, rows: Dataset, content: Content) -> Conflicts:
    """Return the conflicts among the rows that are not removed.

    Args:
        ledger: The ledger after deduplication.
        rows: Dataset of tokenized rows.
        content: How to read what they say.
    """
    places = np.flatnonzero(~ledger.is_on(Side.REMOVED))
    table = ledger.table.select(_COLUMNS).take(places)
    task_ids = ledger.task_ids[places]
    # Two tasks may answer one prompt differently.
    prompts = scoped_hashes(table["prompt_key"].to_numpy(), task_ids)
    same = same_prompts(prompts, table["answer_key"].to_numpy())
    near = _near_prompts(table, prompts, task_ids, rows, content)
    near.sort(key=lambda pair: (-pair.similarity, pair.row))
    shown = [("same prompt", 1.0, group[:_ROWS_SHOWN].tolist()) for group in same[:_NUM_EXAMPLES]]
    shown += [("near prompt", pair.similarity, pair[1:]) for pair in near[:_NUM_EXAMPLES]]
    keys = table["key"].to_numpy()
    wanted = sorted({index for *_, indices in shown for index in indices})
    texts = ray_rows.fetch_texts(rows, keys[wanted], content) if wanted else {}

    def row(index: int) -> ConflictingRow:
        _, prompt, answer = texts[int(keys[index])]
        return ConflictingRow(table["source"][index].as_py(), prompt, answer)

    return Conflicts(
        len(same),
        sum(map(len, same)),
        len(near),
        ALIKE_PROMPTS,
        [
            ConflictExample(kind, round(similarity, 4), [row(index) for index in indices])
            for kind, similarity, indices in shown
        ],
    )


def same_prompts(prompts: Indices, answers: Indices) -> list[Indices]:
    """Return the rows of each prompt that has several answers, the largest group first.

    Args:
        prompts: Hash of each row's normalised prompt. Shape (N,).
        answers: Hash of its normalised answer. Shape (N,).
    """
    order = np.lexsort((np.arange(len(prompts)), prompts))
    values = prompts[order]
    starts = np.flatnonzero(values[1:] != values[:-1]) + 1
    groups = [g for g in np.split(order, starts) if len(g) > 1 and len(np.unique(answers[g])) > 1]
    # One row for each answer first, so that the first rows of a group show the difference.
    groups = [g[np.argsort(_repeats(answers[g]), kind="stable")] for g in groups]
    return sorted(groups, key=lambda group: (-len(group), int(group.min())))


def _repeats(values: Indices) -> Indices:
    """Return 0 for the first of equal values and 1 for the others."""
    first = np.unique(values, return_index=True)[1]
    result = np.ones(len(values), dtype=np.int64)
    result[first] = 0
    return result


def _near_prompts(
    table: pa.Table, prompts: Indices, task_ids: Indices, rows: Dataset, content: Content
) -> list[_NearPrompts]:
    answers = table["answer_key"].to_numpy()
    first = outermost_rows(prompts, answers).lowest
    pairs = candidate_pairs(as_matrix(table["prompt_bands"]), first)
    # As they were read, for people.
    rows_of_pairs = np.sort(differing_rows(prompts, answers, pairs), axis=1)
    a, b = rows_of_pairs[:, 0], rows_of_pairs[:, 1]
    differs = (answers[a] != answers[b]) & (task_ids[a] == task_ids[b])
    pairs, rows_of_pairs = pairs[differs], rows_of_pairs[differs]
    if not len(pairs):
        return []
    keys = table["key"].to_numpy()[first]
    by_key = ray_rows.fetch_shingles(rows, keys[np.unique(pairs)], content, "prompt", 1)
    sets = {place: by_key[int(keys[place])] for place in np.unique(pairs).tolist()}
    sets = without_shared_words(sets, pairs)
    found = [
        _NearPrompts(jaccard(sets[a], sets[b]), *own)
        for (a, b), own in zip(pairs.tolist(), rows_of_pairs.tolist(), strict=True)
    ]
    return [pair for pair in found if pair.similarity >= ALIKE_PROMPTS]


def outermost_rows(prompts: Indices, answers: Indices) -> OutermostRows:
    """Return two rows of each different prompt, ascending by its hash.

    Args:
        prompts: Hash of each row's prompt. Shape (N,).
        answers: Hash of its answer. Shape (N,).
    """
    order = np.lexsort((answers, prompts))
    values = prompts[order]
    starts = np.flatnonzero(np.append(True, values[1:] != values[:-1])[: len(order)])
    return OutermostRows(order[starts], order[np.append(starts[1:], len(order)) - 1])


def differing_rows(prompts: Indices, answers: Indices, pairs: Indices) -> Indices:
    """Return a row of each prompt of a pair, with different answers if any two rows have such.

    So it does not depend on which row of a prompt with several answers is read first.

    Args:
        prompts: Hash of each row's prompt. Shape (N,).
        answers: Hash of its answer. Shape (N,).
        pairs: Prompts, as places in `outermost_rows`. Shape (P, 2).

    Returns:
        Shape (P, 2).
    """
    lowest, highest = outermost_rows(prompts, answers)
    a, b = pairs[:, 0], pairs[:, 1]
    differs = answers[lowest[a]] != answers[highest[b]]
    first = np.where(differs, lowest[a], highest[a])
    return np.stack([first, np.where(differs, highest[b], lowest[b])], axis=1)


def without_shared_words(sets: Mapping[int, Hashes], pairs: Indices) -> dict[int, Hashes]:
    """Return words of prompts without those that many prompts like them share: their template.

    Args:
        sets: Distinct words of each prompt, ascending, by its number.
        pairs: Numbers of prompts that may be alike. Shape (P, 2).
    """
    numbers, positions = np.unique(pairs, return_inverse=True)
    component = connected(len(numbers), positions.reshape(-1, 2))
    own = dict(sets)
    for members in np.split(
        np.argsort(component, kind="stable"), np.cumsum(np.bincount(component))[:-1]
    ):
        if len(members) <= MANY:
            continue
        alike = [int(numbers[member]) for member in members]
        words, counts = np.unique(np.concatenate([sets[n] for n in alike]), return_counts=True)
        shared = words[counts > max(MANY, len(alike) // OWN_PART)]
        own |= {n: np.setdiff1d(sets[n], shared, assume_unique=True) for n in alike}
    return own
