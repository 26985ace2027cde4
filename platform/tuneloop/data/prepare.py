"""From the user's files to a dataset artifact, step by step.

Read, filter and validate, tokenize, deduplicate, split, decontaminate, write, describe. Ray Data
does what is done row by row; what needs all rows at once (clusters, sides) is decided from small
columns in this process. Every row ends in `train/`, `validation/`, `test/` or `removed/`.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from ray.data import Dataset

from tuneloop.artifacts import Draft, Published, Workspace, fingerprint
from tuneloop.cluster import await_cpu
from tuneloop.config import TuneloopConfig
from tuneloop.data import ray_rows
from tuneloop.data.card.card import write_card
from tuneloop.data.card.composition import describe_wording
from tuneloop.data.decontamination.decontaminate import decontaminate
from tuneloop.data.decontamination.held_out import EvaluationRows, read_evaluations
from tuneloop.data.dedup.conflicts import find_conflicts
from tuneloop.data.dedup.deduplicate import deduplicate
from tuneloop.data.dedup.distributed import KEY_COLUMNS
from tuneloop.data.filters.languages import refuse_unknown_languages
from tuneloop.data.hashing.columns import Indices, one_array
from tuneloop.data.hashing.content import Content
from tuneloop.data.ledger import Ledger, Removal
from tuneloop.data.schema import Reason, ReasonCode, Rejection, Side, Stage, file_positions
from tuneloop.data.sources.bad_rows import (
    BadRow,
    LongRow,
    nothing_left_problem,
    refuse_bad_rows,
    refuse_mismatched_formats,
    refuse_too_many_rows,
    too_long_problem,
)
from tuneloop.data.sources.files import SourceFile, find_files
from tuneloop.data.split.assign import assign_sides, split_ledger
from tuneloop.data.split.mixture import find_task_ids
from tuneloop.data.split.split import occurrence
from tuneloop.data.tokenize.batch import render_batch
from tuneloop.data.tokenize.rendering import NUM_VERIFIED, Rendering
from tuneloop.data.write.parquet import write_rows
from tuneloop.errors import DataError
from tuneloop.models.bases.source import BaseModel
from tuneloop.models.chat.tokenizer_backends import BackendChoice
from tuneloop.progress import Progress
from tuneloop.repetition import REPETITION_VERSION

logger = logging.getLogger("tuneloop.data")

CODE_VERSION = 8
_NUM_EXAMPLES, _SHOWN_CHARACTERS = 3, 500
_COLUMNS = [
    "source",
    "rejection",
    "changes",
    "group",
    "stratum",
    "num_tokens",
    "num_target_tokens",
    "prompt_key",
    "answer_key",
    *KEY_COLUMNS,
]


def prepare(config: TuneloopConfig, workspace: Workspace, base: BaseModel) -> Published:
    """Return `datasets/<config.name>`, made or reused. Needs a running Ray.

    Args:
        config: `task`, `data`, `model.chat_template` and `name` are used.
        workspace: Where the artifact goes.
        base: Whose tokenizer and chat template render the rows.

    Raises:
        DataError: A source leads nowhere, too many rows are unusable or too long, or there are
            too few to split.
        ResourceError: The cluster has no CPU for tasks.
    """
    refuse_mismatched_formats(config)
    refuse_unknown_languages(config.data.filters.languages)
    files = find_files(config.data.sources)
    held_out = config.data.decontamination.sources
    evaluation_files = find_files(held_out, "data.decontamination.sources")
    rendering = Rendering(str(base.path), config.model.chat_template)
    contents = {file.name: file.sha256() for file in [*files, *evaluation_files]}
    parts: dict[str, Any] = {
        "task": config.task.model_dump(),
        "data": config.data.model_dump(),
        "renderer": rendering.renderer().hash,
        "files": contents,
    }
    if config.data.filters.repetition:
        parts["repetition"] = REPETITION_VERSION
    identity = fingerprint("prepare", CODE_VERSION, **parts)
    existing = workspace.find("datasets", config.name, identity)
    if existing is not None:
        return Published(existing, reused=True)
    await_cpu()
    with workspace.draft("datasets", config.name, identity) as draft:
        evaluations = read_evaluations(evaluation_files, config)
        metrics = _build(config, (files, evaluations), rendering, draft)
        artifact = draft.publish(
            config={**parts, "chat_template": config.model.chat_template, "files": len(files)},
            resources=config.resources.model_dump(),
            inputs=[f"{path} sha256:{digest}" for path, digest in contents.items()]
            + [f"{base.name} sha256:{base.fingerprint}"],
            metrics=metrics,
        )
    return Published(artifact, reused=False)


def _build(
    config: TuneloopConfig,
    given: tuple[list[SourceFile], list[EvaluationRows]],
    rendering: Rendering,
    draft: Draft,
) -> dict[str, Any]:
    """Write the artifact's files, from files and evaluations, and return its metrics."""
    files, evaluations = given
    content = Content.of(config.task)
    seconds: dict[str, float] = {}
    with _timed("read", seconds):
        warm = ray_rows.warm_up(rendering)
        rows = ray_rows.read_files(files, config)
        refuse_too_many_rows(rows.count())
        readable, num_unreadable = _refuse_unreadable(rows, config)
    total = rows.count()
    logger.info("read %s rows of %s, %s of them unusable", *_counts(total, files, num_unreadable))
    with _timed("tokenize", seconds) as progress:
        rendering, engine = _verified(rendering, rows, readable)
        render = partial(
            render_batch, rendering=rendering, content=content, dedup=config.data.dedup
        )
        rows = ray_rows.render_rows(rows, render, warm, draft.scratch, progress)
        columns = [*_COLUMNS, *([] if content.is_text else ["prompt_bands"])]
        ledger = _ledger(ray_rows.collect(rows, columns), files, config, seconds)
        ledger.backend = engine
        _drop_unusable(ledger, config)
        ledger.filtered = _filtered(ledger, rows, content)
    num_tokens = int(np.sum(ledger.table["num_tokens"].to_numpy()))
    logger.info(
        "tokenized %s tokens, %s a second",
        f"{num_tokens:,}",
        _rate(num_tokens, seconds["tokenize"]),
    )
    with _timed("dedup", seconds):
        ledger.duplicates = deduplicate(ledger, rows, content, config)
    logger.info("removed %s duplicate rows", f"{len(ledger.removed_by(Stage.DEDUP)):,}")
    if not content.is_text:
        with _timed("conflicts", seconds):
            ledger.conflicts = find_conflicts(ledger, rows, content)
    ledger.split = split_ledger(ledger, config)
    with _timed("decontaminate", seconds):
        contamination = decontaminate(ledger, rows, content, config.data, evaluations)
    logger.info("removed %s contaminated train rows", f"{len(contamination.removed):,}")
    ledger.contamination = contamination
    # Nothing is compared from here on.
    ledger.table = ledger.table.select(
        [name for name in ledger.table.column_names if not name.endswith("bands")]
    )
    ledger.split = assign_sides(ledger, config)
    with _timed("describe", seconds):
        ledger.wording = describe_wording(ledger, rows, content)
    with _timed("write", seconds):
        written = write_rows(rows, ledger, rendering, config, draft.path)
    logger.info(
        "wrote %s train, %s test and %s removed rows",
        *(f"{written[side].num_rows:,}" for side in (Side.TRAIN, Side.TEST, Side.REMOVED)),
    )
    write_card(config, ledger, written, draft.path)
    return {
        "num_train_rows": written[Side.TRAIN].num_rows,
        "num_test_rows": written[Side.TEST].num_rows,
        **(
            {"num_validation_rows": written[Side.VALIDATION].num_rows}
            if Side.VALIDATION in written
            else {}
        ),
        "num_removed": written[Side.REMOVED].num_rows,
        "num_train_tokens": sum(written[Side.TRAIN].num_tokens),
        "num_target_tokens": sum(written[Side.TRAIN].num_target_tokens),
        "num_conflicts": ledger.conflicts.num_same_prompt if ledger.conflicts else 0,
        "num_near_conflicts": ledger.conflicts.num_near_prompt if ledger.conflicts else 0,
        "num_contaminated_rows": len(contamination.removed),
        "contamination": {
            origin.name: origin.contamination_ratio for origin in contamination.origins
        },
    }


def _refuse_unreadable(rows: Dataset, config: TuneloopConfig) -> tuple[Indices, int]:
    """Return the keys of the readable rows, and how many are unreadable.

    Raises:
        DataError: Too many are unreadable.
    """
    refuse_bad_rows([], rows.count(), config.data)
    table = ray_rows.collect(rows, ["source", "rejection"])
    stage = pc.struct_field(table["rejection"], "stage")
    is_bad = pc.equal(stage, Stage.READ.value).fill_null(False).to_numpy()
    columns = (table.filter(is_bad)[name].to_pylist() for name in ("source", "rejection"))
    bad = [BadRow(place, Rejection.of(struct)) for place, struct in zip(*columns, strict=True)]
    refuse_bad_rows(bad, table.num_rows, config.data)
    return table["key"].to_numpy()[~is_bad], len(bad)


def _is_nonempty(column: pa.ChunkedArray) -> NDArray[np.bool_]:
    """Return which strings of an Arrow column are not empty. Shape (N,)."""
    return pc.not_equal(column, "").to_numpy()


def _verified(
    rendering: Rendering, rows: Dataset, keys: Indices
) -> tuple[Rendering, BackendChoice]:
    """Return the rendering by the engine that may be trusted with the rows, and tell which.

    Args:
        keys: Of usable rows, some of which the engine is tried on. Shape (N,).
    """
    chosen = keys[:: max(1, -(-len(keys) // NUM_VERIFIED))]
    return rendering.verified(ray_rows.fetch_rows(rows, chosen))


def _ledger(
    table: pa.Table, files: list[SourceFile], config: TuneloopConfig, seconds: dict[str, float]
) -> Ledger:
    count = table.num_rows
    source = np.array([file.source for file in files])[file_positions(table["key"].to_numpy())]
    return Ledger(
        table,
        source,
        find_task_ids(config, source),
        _row_ids(one_array(table["content_id"])),
        side=np.zeros(count, dtype=np.int64),
        rank=np.arange(count, dtype=np.int64),
        seconds=seconds,
    )


def _row_ids(contents: pa.StringArray) -> pa.StringArray:
    """Return what rows are known by, from hashes of what they say; no two are the same."""
    # What a row says identifies it; copies are numbered in the order they are read.
    earlier = occurrence(contents.dictionary_encode().indices.to_numpy())
    is_copy = earlier > 0
    copies = zip(contents.filter(is_copy).to_pylist(), earlier[is_copy].tolist(), strict=True)
    told = pa.array([f"{content}-{count + 1}" for content, count in copies], pa.string())
    return pc.replace_with_mask(contents, pa.array(is_copy), told)


def _drop_unusable(ledger: Ledger, config: TuneloopConfig) -> None:
    """Remove rows that could not be read, rendered, or are too long.

    Raises:
        DataError: More than `max_bad_rows_ratio`, too long with `too_long: error`, or none is left.
    """
    table, data = ledger.table, config.data
    bad, too_long = [], []
    limited = config.task.type != "language_modeling"
    names = ("source", "rejection", "num_tokens")
    is_long = limited & (table["num_tokens"].to_numpy() > data.max_seq_len)
    goes = np.flatnonzero(table["rejection"].is_valid().to_numpy() | is_long)
    columns = [table[name].take(goes).to_pylist() for name in names]
    for index, source, struct, length in zip(goes.tolist(), *columns, strict=True):
        if struct is not None:
            rejection = Rejection.of(struct)
            if rejection.stage is not Stage.FILTER:
                bad.append(BadRow(source, rejection))
            removal = Removal(rejection.stage, rejection.reason)
        else:
            too_long.append(LongRow(source, length))
            text = f"{length} tokens, more than {data.max_seq_len}"
            reason = Reason(ReasonCode.TOO_LONG, text, "more tokens than max_seq_len")
            removal = Removal(Stage.TOKENIZE, reason)
        ledger.remove(index, removal)
    refuse_bad_rows(bad, table.num_rows, data)
    if too_long and (data.too_long == "error" or len(bad) + len(too_long) == table.num_rows):
        raise DataError(too_long_problem(too_long, table.num_rows, data))
    ledger.usable = np.flatnonzero(~ledger.is_on(Side.REMOVED))
    if not len(ledger.usable):
        raise DataError(nothing_left_problem([r.reason.summary for r in ledger.removals.values()]))


def _filtered(ledger: Ledger, rows: Dataset, content: Content) -> dict[str, Any]:
    """Return what filters changed, and the first few rows that they dropped for each reason."""
    changed = ledger.table["changes"].filter(_is_nonempty(ledger.table["changes"]))
    mended = (change.split(", ") for change in changed.to_pylist())
    changes = Counter(name for names in mended for name in names)
    by_reason: dict[str, list[int]] = {}
    for index in ledger.removed_by(Stage.FILTER).tolist():
        by_reason.setdefault(ledger.removals[index].reason.summary, []).append(index)
    chosen = [index for found in by_reason.values() for index in found[:_NUM_EXAMPLES]]
    keys = ledger.table["key"].to_numpy()
    texts = ray_rows.fetch_texts(rows, keys[chosen], content) if chosen else {}
    return {
        "changes": dict(changes.most_common()),
        "num_dropped": {reason: len(found) for reason, found in by_reason.items()},
        "examples": [
            {
                "source": ledger.table["source"][index].as_py(),
                "reason": ledger.removals[index].reason.text,
                "text": texts[int(keys[index])].text[:_SHOWN_CHARACTERS],
            }
            for index in chosen
        ],
    }


@contextmanager
def _timed(stage: str, seconds: dict[str, float]) -> Iterator[Progress]:
    started = time.monotonic()
    with Progress(stage, unit="rows") as progress:
        yield progress
    seconds[stage] = round(time.monotonic() - started, 3)


def _counts(total: int, files: list[SourceFile], num_unreadable: int) -> tuple[str, str, str]:
    number = len(files)
    return f"{total:,}", f"{number:,} file{'s' * (number > 1)}", f"{num_unreadable:,}"


def _rate(amount: int, seconds: float) -> str:
    return f"{amount / max(seconds, 1e-9):,.0f}"
