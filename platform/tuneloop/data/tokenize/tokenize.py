"""Tokenizing all rows, and opening the ledger of what becomes of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ray import ObjectRef
from ray.data import Dataset

from tuneloop.config import TuneloopConfig
from tuneloop.data import ray_rows
from tuneloop.data.dedup.distributed import KEY_COLUMNS
from tuneloop.data.hashing.columns import one_array
from tuneloop.data.hashing.content import Content
from tuneloop.data.ledger import Ledger, Removal
from tuneloop.data.schema import Reason, ReasonCode, Rejection, Side, Stage, file_positions
from tuneloop.data.sources.bad_rows import (
    BadRow,
    LongRow,
    nothing_left_problem,
    refuse_bad_rows,
    too_long_problem,
)
from tuneloop.data.sources.files import SourceFile
from tuneloop.data.sources.read import SourceRows
from tuneloop.data.split.mixture import find_task_ids
from tuneloop.data.split.split import occurrence
from tuneloop.data.tokenize.batch import render_batch
from tuneloop.data.tokenize.rendering import NUM_VERIFIED, Rendering
from tuneloop.errors import DataError
from tuneloop.models.chat.tokenizer_backends import BackendChoice
from tuneloop.progress import Progress

_COLUMNS = [
    *("source", "rejection", "changes", "group", "stratum", "num_tokens", "num_target_tokens"),
    *("prompt_key", "answer_key", "has_long_answer", "is_plain", "cut", "seed_row_id"),
    *KEY_COLUMNS,
]


class TokenizedRows(NamedTuple):
    """All rows with their tokens, by `rendered_schema`, and how they were rendered."""

    rows: Dataset
    rendering: Rendering
    backend: BackendChoice


def tokenize_rows(
    sources: SourceRows,
    rendering: Rendering,
    warm: ObjectRef,
    config: TuneloopConfig,
    scratch: Path,
    progress: Progress,
) -> TokenizedRows:
    """Return the tokenized rows, by the fastest backend that gives the same ids on some of them.

    Args:
        rendering: By the tokenizer itself.
        warm: What `ray_rows.warm_up` returned.
        config: Its `task` and `data.dedup` say which keys the rows get.
        scratch: Where the blocks of a large corpus are kept for a run that has to go on.
        progress: Shows how many rows of a large corpus are done.
    """
    keys = sources.readable
    tried = keys[:: max(1, -(-len(keys) // NUM_VERIFIED))]
    rendering, backend = rendering.verified(ray_rows.fetch_rows(sources.rows, tried))
    render = partial(
        render_batch,
        rendering=rendering,
        content=Content.of(config.task),
        dedup=config.data.dedup,
        max_tokens=config.data.max_seq_len if config.data.too_long == "truncate" else None,
    )
    rows = ray_rows.render_rows(sources.rows, render, warm, scratch, progress)
    return TokenizedRows(rows, rendering, backend)


def open_ledger(rows: Dataset, files: Sequence[SourceFile], config: TuneloopConfig) -> Ledger:
    """Return a ledger of tokenized rows, in which those that cannot be used are removed.

    Raises:
        DataError: More than `max_bad_rows_ratio`, too long with `too_long: error`, or none is left.
    """
    is_text = config.task.type == "language_modeling"
    table = ray_rows.collect(
        rows, _COLUMNS if is_text else [*_COLUMNS, "prompt_bands", "passage_bands"]
    )
    source = np.array([file.source for file in files])[file_positions(table["key"].to_numpy())]
    ledger = Ledger(
        table,
        source,
        find_task_ids(config, source),
        _row_ids(one_array(table["content_id"])),
        side=np.zeros(table.num_rows, dtype=np.int64),
        rank=np.arange(table.num_rows, dtype=np.int64),
    )
    _remove_unusable(ledger, config)
    ledger.usable = np.flatnonzero(~ledger.is_on(Side.REMOVED))
    if not len(ledger.usable):
        raise DataError(nothing_left_problem([r.reason.summary for r in ledger.removals.values()]))
    return ledger


def _row_ids(content_ids: pa.StringArray) -> pa.StringArray:
    """Return the rows' ids: their content's, and numbers for copies, in the order of reading."""
    earlier = occurrence(content_ids.dictionary_encode().indices.to_numpy())
    is_copy = earlier > 0
    copies = zip(content_ids.filter(is_copy).to_pylist(), earlier[is_copy].tolist(), strict=True)
    numbered = pa.array([f"{content}-{count + 1}" for content, count in copies], pa.string())
    return pc.replace_with_mask(content_ids, pa.array(is_copy), numbered)


def _remove_unusable(ledger: Ledger, config: TuneloopConfig) -> None:
    """Remove rows that could not be read or rendered, that a filter drops, or that are too long."""
    table, data = ledger.table, config.data
    bad, too_long = [], []
    is_long = table["num_tokens"].to_numpy() > data.max_seq_len
    if config.task.type == "language_modeling":
        is_long[:] = False  # documents are cut
    goes = np.flatnonzero(table["rejection"].is_valid().to_numpy() | is_long)
    columns = [table[name].take(goes).to_pylist() for name in ("source", "rejection", "num_tokens")]
    for index, place, struct, length in zip(goes.tolist(), *columns, strict=True):
        if struct is not None:
            rejection = Rejection.of(struct)
            if rejection.stage is not Stage.FILTER:
                bad.append(BadRow(place, rejection))
            removal = Removal(rejection.stage, rejection.reason)
        else:
            too_long.append(LongRow(place, length))
            text = f"{length} tokens, more than {data.max_seq_len}"
            reason = Reason(ReasonCode.TOO_LONG, text, "more tokens than max_seq_len")
            removal = Removal(Stage.TOKENIZE, reason)
        ledger.remove(index, removal)
    refuse_bad_rows(bad, table.num_rows, data)
    if too_long and (data.too_long == "error" or len(bad) + len(too_long) == table.num_rows):
        raise DataError(too_long_problem(too_long, table.num_rows, data))
