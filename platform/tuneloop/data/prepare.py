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
from pathlib import Path
from typing import Any

import numpy as np

from tuneloop.artifacts import Draft, Published, Workspace, fingerprint
from tuneloop.cluster import await_cpu
from tuneloop.config import TuneloopConfig
from tuneloop.data import ray_rows
from tuneloop.data.card.card import write_card
from tuneloop.data.card.composition import describe_wording
from tuneloop.data.decontamination.decontaminate import decontaminate, read_evaluations
from tuneloop.data.decontamination.matching import HeldOut
from tuneloop.data.dedup.conflicts import find_conflicts
from tuneloop.data.dedup.distributed import KEY_COLUMNS, find_duplicate_rows
from tuneloop.data.filters.languages import refuse_unknown_languages
from tuneloop.data.hashing.signatures import one_array
from tuneloop.data.ledger import Outcome
from tuneloop.data.sources.bad_rows import (
    nothing_left_problem,
    reason_of,
    refuse_bad_rows,
    refuse_mismatched_formats,
    refuse_too_many_rows,
    too_long_problem,
)
from tuneloop.data.sources.files import SourceFile, find_evaluation_files, find_files
from tuneloop.data.sources.readers import file_positions
from tuneloop.data.split.mixture import kinds_of, kinds_to_remove, mixture_of
from tuneloop.data.split.split import Split, is_stratified, limit_train, occurrence, split_rows
from tuneloop.data.tokenize.rendering import NUM_PROVED, Rendering, tell_engine
from tuneloop.data.write.assemble import final_rows, row_places
from tuneloop.data.write.parquet import write_sides
from tuneloop.errors import DataError
from tuneloop.models.bases.source import BaseModel
from tuneloop.models.chat.tokenizer_backends import BackendChoice
from tuneloop.repetition import REPETITION_VERSION

logger = logging.getLogger("tuneloop.data")

CODE_VERSION = 8
_NUM_EXAMPLES, _SHOWN_CHARACTERS = 3, 500
_COLUMNS = [
    "source",
    "problem",
    "dropped",
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
    files = find_files(config.data)
    evaluation_files = find_evaluation_files(config.data)
    rendering = Rendering(str(base.path), config.model.chat_template, config.task, config.data)
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
    given: tuple[list[SourceFile], list[HeldOut]],
    rendering: Rendering,
    draft: Draft,
) -> dict[str, Any]:
    """Write the artifact's files, from files and evaluations, and return its metrics."""
    files, evaluations = given
    is_text = config.task.type == "language_modeling"
    seconds: dict[str, float] = {}
    with _timed("read", seconds):
        warm = ray_rows.warm_up(rendering)
        rows = ray_rows.read_files(files, config)
        refuse_too_many_rows(rows.count())
        readable, unreadable = _refuse_unreadable(rows, config)
    total = rows.count()
    logger.info("read %s rows of %s, %s of them unusable", *_counts(total, files, unreadable))
    with _timed("tokenize", seconds):
        rendering, engine = _proved(rendering, rows, readable)
        rows = ray_rows.render_rows(rows, rendering, warm, draft.scratch)
        columns = [*_COLUMNS, *([] if is_text else ["prompt_bands"])]
        outcome = _outcome(ray_rows.collect(rows, columns), files, config, seconds)
        outcome.engine = engine
        _drop_unusable(outcome, unreadable, config)
        outcome.filtered = _filtered(outcome, rows, rendering)
    num_tokens = int(np.sum(outcome.table["num_tokens"].to_numpy()))
    logger.info(
        "tokenized %s tokens, %s a second",
        f"{num_tokens:,}",
        _rate(num_tokens, seconds["tokenize"]),
    )
    with _timed("dedup", seconds):
        _drop_duplicates(outcome, rows, rendering, config)
    logger.info("removed %s duplicate rows", f"{outcome.stage.count('dedup'):,}")
    if not is_text:
        with _timed("conflicts", seconds):
            outcome.conflicts = find_conflicts(outcome, rows, rendering)
    _split(outcome, config)
    with _timed("decontaminate", seconds):
        contamination = decontaminate(outcome, rows, rendering, evaluations)
    logger.info("removed %s contaminated train rows", f"{len(contamination.removed):,}")
    outcome.contamination = contamination
    # Nothing is compared from here on.
    outcome.table = outcome.table.select(
        [name for name in outcome.table.column_names if not name.endswith("bands")]
    )
    _limit_train(outcome, config)
    with _timed("describe", seconds):
        outcome.wording = describe_wording(outcome, rows, rendering)
    with _timed("write", seconds):
        columns = ray_rows.column_schema(rows)
        tables = final_rows(rows, _fates(outcome, config), columns, rendering)
        written = write_sides(tables, columns, is_text, Path(draft.path))
    logger.info(
        "wrote %s train, %s test and %s removed rows",
        *(f"{written[name].num_rows:,}" for name in ("train", "test", "removed")),
    )
    write_card(config, outcome, written, draft.path)
    return {
        "num_train_rows": written["train"].num_rows,
        "num_test_rows": written["test"].num_rows,
        **(
            {"num_validation_rows": written["validation"].num_rows}
            if "validation" in written
            else {}
        ),
        "num_removed": written["removed"].num_rows,
        "num_train_tokens": sum(written["train"].num_tokens),
        "num_target_tokens": sum(written["train"].num_target_tokens),
        "num_conflicts": outcome.conflicts.get("num_same_prompt", 0),
        "num_near_conflicts": outcome.conflicts.get("num_near_prompt", 0),
        "num_contaminated_rows": len(contamination.removed),
        "contamination": {
            origin["name"]: origin["contamination_ratio"] for origin in contamination.origins
        },
    }


def _refuse_unreadable(rows: Any, config: TuneloopConfig) -> tuple[Any, set[int]]:
    """Return the keys of the usable and the unusable rows.

    Raises:
        DataError: Too many are unusable.
    """
    problems = ray_rows.collect(rows, ["source", "problem"])
    if problems is None:
        refuse_bad_rows([], 0, config.data)
    is_bad = _is_told(problems["problem"])
    bad = problems.filter(is_bad)
    told = zip(bad["source"].to_pylist(), bad["problem"].to_pylist(), strict=True)
    refuse_bad_rows(list(told), problems.num_rows, config.data)
    return problems["key"].to_numpy()[~is_bad], set(bad["key"].to_pylist())


def _is_told(column: Any) -> Any:
    """Return which strings of an Arrow column are not empty. Shape (N,)."""
    import pyarrow.compute as pc

    return pc.not_equal(column, "").to_numpy()


def _proved(rendering: Rendering, rows: Any, keys: Any) -> tuple[Rendering, BackendChoice]:
    """Return the rendering by the engine that may be trusted with the rows, and tell which.

    Args:
        keys: Of usable rows, some of which the engine is tried on. Shape (N,).
    """
    chosen = keys[:: max(1, -(-len(keys) // NUM_PROVED))]
    rendering, choice = rendering.proved(ray_rows.fetch_rows(rows, chosen))
    tell_engine(choice)
    return rendering, choice


def _outcome(
    table: Any, files: list[SourceFile], config: TuneloopConfig, seconds: dict[str, float]
) -> Outcome:
    count = table.num_rows
    source = np.array([file.source for file in files])[file_positions(table["key"].to_numpy())]
    return Outcome(
        table,
        source,
        kinds_of(config, source),
        _row_ids(one_array(table["content_id"])),
        side=np.zeros(count, dtype=np.int64),
        rank=np.arange(count, dtype=np.int64),
        stage=[""] * count,
        reason=[""] * count,
        seconds=seconds,
    )


def _row_ids(contents: Any) -> Any:
    """Return what rows are known by, from hashes of what they say; no two are the same."""
    import pyarrow as pa
    import pyarrow.compute as pc

    # What a row says identifies it; copies are numbered in the order they are read.
    earlier = occurrence(contents.dictionary_encode().indices.to_numpy())
    is_copy = earlier > 0
    copies = zip(contents.filter(is_copy).to_pylist(), earlier[is_copy].tolist(), strict=True)
    told = pa.array([f"{content}-{count + 1}" for content, count in copies], pa.string())
    return pc.replace_with_mask(contents, pa.array(is_copy), told)


def _drop_unusable(outcome: Outcome, unreadable: set[int], config: TuneloopConfig) -> None:
    """Remove rows that could not be read, rendered, or are too long.

    Raises:
        DataError: More than `max_bad_rows_ratio`, too long with `too_long: error`, or none is left.
    """
    table, data = outcome.table, config.data
    bad, too_long = [], []
    limited = config.task.type != "language_modeling"
    names = ("key", "source", "problem", "dropped", "num_tokens")
    is_long = limited & (table["num_tokens"].to_numpy() > data.max_seq_len)
    goes = np.flatnonzero(_is_told(table["problem"]) | _is_told(table["dropped"]) | is_long)
    columns = [table[name].take(goes).to_pylist() for name in names]
    for index, key, source, problem, dropped, length in zip(goes.tolist(), *columns, strict=True):
        if problem:
            bad.append((source, problem))
            outcome.remove(index, "read" if key in unreadable else "tokenize", reason_of(problem))
        elif dropped:
            outcome.remove(index, "filter", dropped)
        else:
            too_long.append((source, length))
            outcome.remove(index, "tokenize", f"{length} tokens, more than {data.max_seq_len}")
    refuse_bad_rows(bad, table.num_rows, data)
    if too_long and (data.too_long == "error" or len(bad) + len(too_long) == table.num_rows):
        raise DataError(too_long_problem(too_long, table.num_rows, data))
    outcome.usable = np.flatnonzero(outcome.side != ray_rows.REMOVED)
    if not len(outcome.usable):
        raise DataError(nothing_left_problem(outcome.reason))


def _filtered(outcome: Outcome, rows: Any, rendering: Rendering) -> dict[str, Any]:
    """Return what filters changed, and the first few rows that they dropped for each reason."""
    changed = outcome.table["changes"].filter(_is_told(outcome.table["changes"]))
    mended = (change.split(", ") for change in changed.to_pylist())
    changes = Counter(name for names in mended for name in names)
    by_reason: dict[str, list[int]] = {}
    for index in (place for place, stage in enumerate(outcome.stage) if stage == "filter"):
        by_reason.setdefault(outcome.reason[index].partition(":")[0], []).append(index)
    chosen = [index for found in by_reason.values() for index in found[:_NUM_EXAMPLES]]
    keys = outcome.table["key"].to_numpy()
    texts = ray_rows.fetch_texts(rows, keys[chosen], rendering) if chosen else {}
    return {
        "changes": dict(changes.most_common()),
        "num_dropped": {reason: len(found) for reason, found in by_reason.items()},
        "examples": [
            {
                "source": outcome.table["source"][index].as_py(),
                "reason": outcome.reason[index],
                "text": texts[int(keys[index])][0][:_SHOWN_CHARACTERS],
            }
            for index in chosen
        ],
    }


def _drop_duplicates(
    outcome: Outcome, rows: Any, rendering: Rendering, config: TuneloopConfig
) -> None:
    table = outcome.table.select(["key", *KEY_COLUMNS])
    if len(outcome.usable) < table.num_rows:
        table = table.take(outcome.usable)
    answers = outcome.table["answer_key"].to_numpy()
    kinds = kinds_to_remove(config, outcome.kinds, answers)[outcome.usable]
    duplicates = find_duplicate_rows(table, rows, rendering, kinds)
    outcome.duplicates = duplicates
    for index in duplicates.removed.tolist():
        kept = outcome.row_ids[int(outcome.usable[duplicates.kept[index]])].as_py()
        kind = "exact" if duplicates.exact[index] else "near"
        similarity = float(duplicates.similarity[index])
        place = int(outcome.usable[index])
        outcome.remove(place, "dedup", f"{kind} duplicate of {kept}", kept, similarity)


def _split(outcome: Outcome, config: TuneloopConfig) -> None:
    assert outcome.duplicates is not None
    stays = np.ones(len(outcome.usable), dtype=bool)
    stays[outcome.duplicates.removed] = False
    rows = outcome.usable[stays]
    table = outcome.table.select(["group", "stratum", "prompt_key"]).take(rows)
    split = split_rows(
        outcome.row_ids.take(rows).to_pylist(),
        table["group"].to_pylist(),
        [outcome.duplicates.cluster[stays], table["prompt_key"].to_numpy()],
        config.data,
        table["stratum"].to_pylist() if is_stratified(config) else (),
    )
    # From here on the split speaks of all rows.
    outcome.split = Split(
        rows[split.train],
        rows[split.test],
        rows[split.validation],
        {int(rows[index]): reason for index, reason in split.surplus.items()},
        split.num_groups,
    )


def _limit_train(outcome: Outcome, config: TuneloopConfig) -> None:
    """Put the rows on their sides, once it is known which ones may be trained on."""
    assert outcome.split is not None
    assert outcome.contamination is not None
    num_tokens = outcome.table["num_tokens"].to_numpy()
    mixture = mixture_of(config, outcome.source, outcome.kinds, num_tokens)
    split = limit_train(outcome.split, outcome.contamination.removed, config.data, mixture)
    for side, indices in (
        (ray_rows.TRAIN, split.train),
        (ray_rows.TEST, split.test),
        (ray_rows.VALIDATION, split.validation),
    ):
        outcome.side[indices] = side
        outcome.rank[indices] = np.arange(len(indices))
    for index, reason in split.surplus.items():
        outcome.remove(index, "split", reason)
    outcome.split = split


def _fates(outcome: Outcome, config: TuneloopConfig) -> Any:
    import pyarrow as pa

    pack = np.zeros(len(outcome.row_ids), dtype=np.int64)
    position = np.zeros(len(outcome.row_ids), dtype=np.int64)
    is_packed = (outcome.side == ray_rows.TRAIN) & (config.task.type == "language_modeling")
    train = np.flatnonzero(is_packed)
    lengths = outcome.table["num_tokens"].to_numpy()[train]
    pack[train], position[train] = row_places(lengths, outcome.rank[train], config.data.max_seq_len)
    kept: list[str | None] = [None] * len(pack)
    similarity: list[float | None] = [None] * len(pack)
    for index, twin in outcome.twin.items():
        kept[index], similarity[index] = twin
    return pa.table(
        {
            "key": outcome.table["key"],
            "side": pa.array(outcome.side, pa.int8()),
            "rank": outcome.rank,
            "pack": pa.array(pack, mask=~is_packed),
            "position_in_pack": position,
            "row_id": outcome.row_ids,
            "source": outcome.table["source"],
            "stage": outcome.stage,
            "reason": outcome.reason,
            "kept_row_id": pa.array(kept, pa.string()),
            "similarity": pa.array(similarity, pa.float64()),
            "num_characters": outcome.table["num_characters"],
            "num_tokens": outcome.table["num_tokens"],
        }
    )


@contextmanager
def _timed(stage: str, seconds: dict[str, float]) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[stage] = round(time.monotonic() - started, 3)


def _counts(total: int, files: list[SourceFile], unreadable: set[int]) -> tuple[str, str, str]:
    number = len(files)
    return f"{total:,}", f"{number:,} file{'s' * (number > 1)}", f"{len(unreadable):,}"


def _rate(amount: int, seconds: float) -> str:
    return f"{amount / max(seconds, 1e-9):,.0f}"
