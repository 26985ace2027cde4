"""Rows whose prompts are the same, or nearly the same, and whose answers differ.

A model cannot learn both answers; where they are many, the task is not clear enough yet. Nothing is
removed for it: which answer is right is for people to say.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from ray.data import Dataset

from tuneloop.data import ray_rows
from tuneloop.data.dedup.minhash import candidate_pairs
from tuneloop.data.dedup.scopes import scoped_hashes
from tuneloop.data.hashing.columns import Indices, as_matrix
from tuneloop.data.hashing.signatures import jaccard
from tuneloop.data.ledger import Ledger
from tuneloop.data.schema import Side
from tuneloop.data.tokenize.rendering import ALIKE_PROMPTS, Rendering

_NUM_EXAMPLES = 5
_ROWS_SHOWN = 3
_COLUMNS = ["key", "source", "prompt_key", "answer_key", "prompt_bands"]


class _NearPrompts(NamedTuple):
    """Two rows, as indices, whose prompts differ little and whose answers differ."""

    similarity: float
    row: int
    other: int


def find_conflicts(ledger: Ledger, rows: Dataset, rendering: Rendering) -> dict[str, Any]:
    """Return what the card says of conflicts among the rows that are not removed.

    Args:
        ledger: The ledger after deduplication.
        rows: Dataset of tokenized rows.
        rendering: How they were rendered.

    Returns:
        `num_same_prompt` and `num_rows_same_prompt`: prompts with several answers, and their rows;
        `num_near_prompt`: pairs of prompts whose words are nearly the same, with different answers;
        `near_threshold` and `examples`, each with `kind`, `similarity` and `rows`.
    """
    places = np.flatnonzero(~ledger.is_on(Side.REMOVED))
    table = ledger.table.select(_COLUMNS).take(places)
    task_ids = ledger.task_ids[places]
    # Two tasks may answer one prompt differently.
    prompts = scoped_hashes(table["prompt_key"].to_numpy(), task_ids)
    same = same_prompts(prompts, table["answer_key"].to_numpy())
    near = _near_prompts(table, prompts, task_ids, rows, rendering)
    near.sort(key=lambda pair: (-pair.similarity, pair.row))
    shown = [("same prompt", 1.0, group[:_ROWS_SHOWN].tolist()) for group in same[:_NUM_EXAMPLES]]
    shown += [("near prompt", pair.similarity, pair[1:]) for pair in near[:_NUM_EXAMPLES]]
    keys = table["key"].to_numpy()
    wanted = sorted({index for *_, indices in shown for index in indices})
    texts = ray_rows.fetch_texts(rows, keys[wanted], rendering) if wanted else {}
    return {
        "num_same_prompt": len(same),
        "num_rows_same_prompt": sum(map(len, same)),
        "num_near_prompt": len(near),
        "near_threshold": ALIKE_PROMPTS,
        "examples": [
            {
                "kind": kind,
                "similarity": round(similarity, 4),
                "rows": [
                    {
                        "source": table["source"][index].as_py(),
                        "prompt": texts[int(keys[index])][1],
                        "answer": texts[int(keys[index])][2],
                    }
                    for index in indices
                ],
            }
            for kind, similarity, indices in shown
        ],
    }


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
    table: pa.Table, prompts: Indices, task_ids: Indices, rows: Dataset, rendering: Rendering
) -> list[_NearPrompts]:
    answers = table["answer_key"].to_numpy()
    # One row stands for all with its prompt.
    first = np.sort(np.unique(prompts, return_index=True)[1])
    pairs = candidate_pairs(as_matrix(table["prompt_bands"]), first)
    a, b = first[pairs[:, 0]], first[pairs[:, 1]]
    pairs = pairs[(answers[a] != answers[b]) & (task_ids[a] == task_ids[b])]
    if not len(pairs):
        return []
    keys = table["key"].to_numpy()[first]
    sets = ray_rows.fetch_shingles(rows, keys[np.unique(pairs)], rendering, "prompt", 1)
    found = [
        _NearPrompts(jaccard(sets[int(keys[a])], sets[int(keys[b])]), int(first[a]), int(first[b]))
        for a, b in pairs.tolist()
    ]
    return [pair for pair in found if pair.similarity >= ALIKE_PROMPTS]
