"""Putting the rows of the ledger on their sides."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tuneloop.config import TuneloopConfig
from tuneloop.data.hashing.columns import Indices
from tuneloop.data.ledger import Ledger, Removal
from tuneloop.data.schema import Side, Stage
from tuneloop.data.split.mixture import mixture_of
from tuneloop.data.split.shared_texts import MOST_ROWS
from tuneloop.data.split.split import (
    NEAR_DUPLICATES,
    SAME_ANSWER,
    SAME_PASSAGE,
    SAME_PROMPT,
    Split,
    is_stratified,
    limit_train,
    rank_rows,
    split_rows,
)
from tuneloop.data.split.synthetic import add_synthetic, refuse_without_people


def split_ledger(ledger: Ledger, config: TuneloopConfig) -> Split:
    """Return the sides of all rows that deduplication left, before rows are held against them.

    The ids of their units are noted in the ledger.
    """
    assert ledger.duplicates is not None
    stays = np.ones(len(ledger.usable), dtype=bool)
    stays[ledger.duplicates.removed] = False
    rows = ledger.usable[stays]
    is_synthetic = ledger.table["synthetic"].to_numpy(zero_copy_only=False)[rows]
    refuse_without_people(is_synthetic)
    people = np.flatnonzero(~is_synthetic)
    row_ids = ledger.row_ids.take(rows)
    table = ledger.table.select(["group", "stratum", "prompt_key", "source"]).take(rows)
    of_people = table.take(people)
    links = {
        NEAR_DUPLICATES: ledger.duplicates.cluster[stays],
        SAME_PROMPT: table["prompt_key"].to_numpy(),
    }
    if ledger.passages is not None:
        links[SAME_PASSAGE] = ledger.passages[rows]
        answers = ledger.table["answer_key"].to_numpy()[rows]
        is_long = ledger.table["has_long_answer"].to_numpy(zero_copy_only=False)[rows]
        is_compared = is_long & _of_writing_tasks(config, ledger.task_ids[rows])
        links[SAME_ANSWER] = same_answers(answers, is_compared, is_synthetic)
    split = split_rows(
        row_ids.take(people).to_pylist(),
        of_people["group"].to_pylist(),
        {name: labels[people] for name, labels in links.items()},
        config.data,
        of_people["stratum"].to_pylist() if is_stratified(config) else (),
        of_people["source"].to_pylist(),
    )
    if len(people) < len(rows):
        seeds = ledger.table["seed_row_id"].take(rows).to_pylist()
        named = zip(row_ids.to_pylist(), seeds, strict=True)
        # What a row was made from may have gone since, as a duplicate of one that is held out.
        kept = kept_for_duplicates(ledger)
        made_of = [kept.get(seed, seed) or row_id for row_id, seed in named]
        bonds: dict[str, Any] = {**links, "seed": made_of}
        if config.data.split.group_by is not None:
            bonds["group"] = table["group"].to_pylist()
        ranks = rank_rows(config.data.seed, row_ids.to_pylist())
        split = add_synthetic(split, is_synthetic, bonds, ranks)
    ledger.unit_ids = unit_ids(ledger.row_ids, rows, split.unit)
    # From here on the split speaks of all rows.
    unit = np.full(len(ledger.side), -1, dtype=np.int64)
    unit[rows] = split.unit
    return replace(
        split,
        train=rows[split.train],
        test=rows[split.test],
        validation=rows[split.validation],
        surplus={int(rows[index]): reason for index, reason in split.surplus.items()},
        unit=unit,
    )


def kept_for_duplicates(ledger: Ledger) -> dict[str, str]:
    """Return the id of the row that stays in place of each duplicate, by the duplicate's id."""
    gone = ledger.removed_by(Stage.DEDUP)
    kept = (str(ledger.removals[index].kept_row_id) for index in gone.tolist())
    return dict(zip(ledger.row_ids.take(gone).to_pylist(), kept, strict=True))


def same_answers(
    answers: Indices, is_compared: NDArray[np.bool_], is_synthetic: NDArray[np.bool_]
) -> Indices:
    """Return labels, equal for rows with the same answer that few rows have. Shape (N,).

    What many of people's rows are answered with is a stock phrase, such as a refusal.

    Args:
        answers: Hash of each row's answer. Shape (N,).
        is_compared: Whose answers count: long ones of writing tasks. The same label or the same
            record may be right for many texts. Shape (N,).
        is_synthetic: Which rows a model wrote. Shape (N,).
    """
    number = np.unique(answers, return_inverse=True)[1]
    num_people = np.bincount(number[~is_synthetic], minlength=number.max(initial=0) + 1)
    is_linked = is_compared & (num_people[number] <= MOST_ROWS)
    return np.where(is_linked, len(answers) + number, np.arange(len(answers)))


def _of_writing_tasks(config: TuneloopConfig, task_ids: Indices) -> NDArray[np.bool_]:
    """Return which rows are of a task whose answers are written freely. Shape (N,)."""
    names = list(config.task.tasks) or [""]
    return np.array([config.task.of(name).type == "generation" for name in names])[task_ids]


def unit_ids(row_ids: pa.StringArray, rows: Indices, unit: Indices) -> pa.StringArray:
    """Return for every row what all rows of its unit have in common: the first of their ids.

    Args:
        row_ids: Of all rows.
        rows: Those that have been split, with the number of their units. Shape (N,) both.
    """
    leader = np.arange(len(row_ids))
    by_id = np.asarray(pc.sort_indices(row_ids.take(rows)))
    firsts = by_id[np.unique(unit[by_id], return_index=True)[1]]
    leader[rows] = rows[firsts[unit]]
    return row_ids.take(leader)


def _of_other_tasks(config: TuneloopConfig, task_ids: Indices) -> Indices | None:
    """Return the rows of tasks that are not trained on; None where all tasks are."""
    trained = config.data.train_tasks
    if trained is None:
        return None
    numbers = [number for number, name in enumerate(config.task.tasks) if name in trained]
    return np.flatnonzero(~np.isin(task_ids, numbers))


def assign_sides(ledger: Ledger, config: TuneloopConfig) -> Split:
    """Put the rows on their sides, once contaminated rows are known, and return the final split.

    Args:
        ledger: With a split and its contamination; sides, ranks and surplus are noted in it.
        config: Its `data` and `task` say how many train rows stay, in which mixture.
    """
    assert ledger.split is not None
    assert ledger.contamination is not None
    num_tokens = ledger.table["num_tokens"].to_numpy()
    mixture = mixture_of(config, ledger.source, ledger.task_ids, num_tokens)
    removed, other = ledger.contamination.removed, _of_other_tasks(config, ledger.task_ids)
    is_synthetic = ledger.table["synthetic"].to_numpy(zero_copy_only=False)
    split = limit_train(ledger.split, removed, config.data, mixture, other, is_synthetic)
    for side, indices in (
        (Side.TRAIN, split.train),
        (Side.TEST, split.test),
        (Side.VALIDATION, split.validation),
    ):
        ledger.side[indices] = side
        ledger.rank[indices] = np.arange(len(indices))
    for index, reason in split.surplus.items():
        ledger.remove(index, Removal(Stage.SPLIT, reason))
    return split
