"""Removing the rows that repeat others."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from ray.data import Dataset

from tuneloop.config import OneTaskConfig, TuneloopConfig
from tuneloop.data.dedup.distributed import KEY_COLUMNS, find_duplicate_rows
from tuneloop.data.dedup.minhash import Duplicates, scoped_hashes
from tuneloop.data.hashing.columns import Indices
from tuneloop.data.hashing.content import Content
from tuneloop.data.ledger import Ledger, Removal
from tuneloop.data.schema import Reason, ReasonCode, Stage


def deduplicate(
    ledger: Ledger, rows: Dataset, content: Content, config: TuneloopConfig
) -> Duplicates:
    """Remove the usable rows that repeat others, and return which repeat which.

    Args:
        ledger: The removed rows are noted in it.
        rows: Materialized dataset of tokenized rows.
        content: How to read what they say.
        config: Its `task` and `data.dedup`.
    """
    table, usable = ledger.table.select(["key", *KEY_COLUMNS]), ledger.usable
    if len(usable) < table.num_rows:
        table = table.take(usable)
    answer_keys = ledger.table["answer_key"].to_numpy()
    scopes = _dedup_scopes(config, ledger.task_ids, answer_keys)[usable]
    if config.data.dedup.on == "both":
        exact = exact_keys(table["exact_key"].to_numpy(), answer_keys[usable])
        place = table.column_names.index("exact_key")
        table = table.set_column(place, "exact_key", pa.array(exact))
    duplicates = find_duplicate_rows(table, rows, content, config.data.dedup, scopes)
    for index in duplicates.removed.tolist():
        kept = ledger.row_ids[int(usable[duplicates.kept[index]])].as_py()
        summary, code = "near duplicate", ReasonCode.NEAR_DUPLICATE
        if duplicates.exact[index]:
            summary, code = "exact duplicate", ReasonCode.EXACT_DUPLICATE
        reason = Reason(code, f"{summary} of {kept}", summary)
        similarity = float(duplicates.similarity[index])
        ledger.remove(int(usable[index]), Removal(Stage.DEDUP, reason, kept, similarity))
    return duplicates


def exact_keys(texts: Indices, answers: Indices) -> Indices:
    """Return keys that are equal for copies: a text cut elsewhere has another answer to learn.

    Args:
        texts: Hash of each row's normalised text, prompt and answer together. Shape (N,).
        answers: Hash of its normalised answer. Shape (N,).
    """
    return scoped_hashes(texts, answers)


def _dedup_scopes(config: TuneloopConfig, task_ids: Indices, answer_keys: Indices) -> Indices:
    """Return the dedup scope of each row: it is removed only in favour of one of its scope.

    Tasks of a mixture share texts: a summary and a label of the same document are two rows to
    learn. Two labels of nearly the same text are no repetition but a contradiction, which
    `conflicts` lists. Shape (N,).

    Args:
        config: Its `task` and `data.dedup`.
        task_ids: Task of each row, as its place in `task.tasks`. Shape (N,).
        answer_keys: Hash of each row's answer. Shape (N,).
    """
    tasks: list[OneTaskConfig] = [*config.task.tasks.values()] or [config.task]
    has_labels = np.array([task.type == "classification" for task in tasks])[task_ids]
    if config.data.dedup.on != "both" or not has_labels.any():
        return task_ids
    labels = np.stack([task_ids, np.where(has_labels, answer_keys, 0)], axis=1)
    return np.unique(labels, axis=0, return_inverse=True)[1].reshape(-1)
