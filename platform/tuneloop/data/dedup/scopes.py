"""Dedup scopes: which rows may be removed in favour of which, or contradict one another.

Tasks of a mixture share texts: a summary and a label of the same document are two rows to learn.
"""

from __future__ import annotations

import numpy as np

from tuneloop.config import OneTaskConfig, TuneloopConfig
from tuneloop.data.hashing.columns import Indices

# The golden ratio's bits: multiples differ in all places of a hash (Knuth, TAOCP 3, 6.4).
_ODD = np.int64(-7046029254386353131)


def dedup_scopes(config: TuneloopConfig, task_ids: Indices, answer_keys: Indices) -> Indices:
    """Return the scope of each row: a row is removed only in favour of one of its scope.

    Rows of two tasks differ in it, and so do two labels of nearly the same text: that is no
    repetition but a contradiction, which `conflicts` lists. Shape (N,).

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


def scoped_hashes(hashes: Indices, scopes: Indices) -> Indices:
    """Return hashes that are equal where both hash and scope are. Shape (N,)."""
    return hashes ^ (scopes * _ODD)
