"""From the user's files to a dataset artifact, step by step.

Read, filter and validate, tokenize, deduplicate, split, decontaminate, write, describe. Ray Data
does what is done row by row; what needs all rows at once (clusters, sides) is decided from small
columns in the driver. Every row ends in `train/`, `validation/`, `test/` or `removed/`.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from tuneloop.artifacts import Draft, Published, Workspace, fingerprint
from tuneloop.cluster import await_cpu
from tuneloop.config import TuneloopConfig
from tuneloop.data import ray_rows
from tuneloop.data.card.card import write_card
from tuneloop.data.card.composition import (
    describe_filters,
    describe_sources,
    describe_synthetic,
    describe_wording,
)
from tuneloop.data.decontamination.decontaminate import decontaminate
from tuneloop.data.decontamination.held_out import EvaluationRows, read_evaluations
from tuneloop.data.dedup.conflicts import find_conflicts
from tuneloop.data.dedup.deduplicate import deduplicate
from tuneloop.data.fixes import apply_fixes, train_fixes
from tuneloop.data.hashing.content import Content
from tuneloop.data.ledger import Ledger
from tuneloop.data.schema import ReasonCode, Side, Stage
from tuneloop.data.sources.bad_rows import refuse_mismatched_formats
from tuneloop.data.sources.dialect import file_notices
from tuneloop.data.sources.files import SourceFile, find_files, identities
from tuneloop.data.sources.read import read_sources
from tuneloop.data.split.assign import assign_sides, split_ledger
from tuneloop.data.split.passages import link_passages
from tuneloop.data.tokenize.rendering import Rendering
from tuneloop.data.tokenize.tokenize import open_ledger, tokenize_rows
from tuneloop.data.write.parquet import write_rows
from tuneloop.languages import refuse_unknown_languages
from tuneloop.marks import Fix, Mark, decide
from tuneloop.models.bases.source import BaseModel
from tuneloop.progress import Progress
from tuneloop.repetition import REPETITION_VERSION
from tuneloop.text import counted

logger = logging.getLogger("tuneloop.data")

CODE_VERSION = 31


def prepare(
    config: TuneloopConfig, workspace: Workspace, base: BaseModel, marks: Sequence[Mark] = ()
) -> Published:
    """Return `datasets/<config.name>`, made or reused. Needs a running Ray.

    Args:
        config: `task`, `data`, `model.chat_template` and `name` are used.
        workspace: Where the artifact goes.
        base: Whose tokenizer and chat template render the rows.
        marks: What people say about rows of this dataset, oldest first.

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
    contents, evaluation_contents = identities(files), identities(evaluation_files)
    parts: dict[str, Any] = {
        "task": config.task.model_dump(),
        # Files count by what is in them: the same ones lie elsewhere on a cluster.
        "data": config.data.model_dump(
            exclude={
                "sources": {"__all__": {"path"}},
                # What they come to counts, wherever they are stored.
                "fixes": True,
                "train_tasks": True,
                "decontamination": {"sources": {"__all__": {"path"}}},
            }
        ),
        "renderer": rendering.renderer().hash,
        "files": contents,
        "evaluation_files": evaluation_contents,
    }
    if config.data.train_tasks:
        parts["train_tasks"] = sorted(config.data.train_tasks)
    if config.data.filters.repetition:
        parts["repetition"] = REPETITION_VERSION
    fixes = decide(marks).fixes
    identity = _identity(parts, fixes)
    existing = workspace.find("datasets", config.name, identity)
    if existing is not None:
        return Published(existing, reused=True)
    await_cpu()
    with workspace.draft("datasets", config.name, identity) as draft:
        evaluations = read_evaluations(evaluation_files, config)
        ledger, metrics = _build(config, files, evaluations, rendering, draft, marks)
        train_identity = _identity(parts, train_fixes(ledger, fixes))
        if not has_train_rows_of(workspace, config.name, train_identity, draft.path):
            # A train row was left out for what a test row said before.
            train_identity = identity
        artifact = draft.publish(
            config={
                **parts,
                "data": config.data.model_dump(),
                "chat_template": config.model.chat_template,
                "files": len(files),
                **({"fixes": [fix.identity() for fix in fixes]} if fixes else {}),
                **({"train_fingerprint": train_identity} if train_identity != identity else {}),
            },
            resources=config.resources.model_dump(),
            inputs=[
                f"{file.name} sha256:{digest}"
                for file, (*_, digest) in zip(
                    [*files, *evaluation_files], [*contents, *evaluation_contents], strict=True
                )
            ]
            + [f"{base.name} sha256:{base.fingerprint}"],
            metrics=metrics,
        )
    return Published(artifact, reused=False)


def has_train_rows_of(workspace: Workspace, name: str, fingerprint: str, folder: Path) -> bool:
    """Return whether a dataset's train rows are those of the newest that models take for the same.

    Args:
        fingerprint: `train_fingerprint` of such versions of `datasets/NAME`; without any all is
            well.
        folder: Of the dataset.
    """
    same = [a for a in workspace.published("datasets", name) if a.train_fingerprint == fingerprint]
    if not same:
        return True
    earlier, now = (
        pq.read_table(path / "train", columns=["row_id"]).column(0).combine_chunks().sort()
        for path in (workspace.open(same[-1].ref).path, folder)
    )
    return bool(earlier.equals(now))


def _identity(parts: dict[str, Any], fixes: Sequence[Fix]) -> str:
    changed = {"fixes": [fix.identity() for fix in fixes]} if fixes else {}
    return fingerprint("prepare", CODE_VERSION, **parts, **changed)


def _build(
    config: TuneloopConfig,
    files: Sequence[SourceFile],
    evaluations: Sequence[EvaluationRows],
    rendering: Rendering,
    draft: Draft,
    marks: Sequence[Mark],
) -> tuple[Ledger, dict[str, Any]]:
    """Write the artifact's files; return what became of the rows, and the artifact's metrics."""
    content = Content.of(config.task)
    seconds: dict[str, float] = {}
    with _timed("read", seconds):
        warm = ray_rows.warm_up(rendering)
        sources = read_sources(files, config)
    total = len(sources.readable) + sources.num_unreadable
    logger.info(
        f"read {counted(total, 'row')} of {counted(len(files), 'file')}, "
        f"{sources.num_unreadable:,} of them unusable"
    )
    with _timed("tokenize", seconds) as progress:
        rows, rendering, backend = tokenize_rows(
            sources, rendering, warm, config, draft.scratch, progress
        )
        ledger = open_ledger(rows, files, config)
        ledger.backend, ledger.seconds = backend, seconds
        ledger.notices += file_notices(files, config.data.sources)
        ledger.filtered = describe_filters(ledger, rows, content)
    num_tokens = int(np.sum(ledger.table["num_tokens"].to_numpy()))
    rate = num_tokens / max(seconds["tokenize"], 1e-9)
    logger.info(f"tokenized {num_tokens:,} tokens, {rate:,.0f} a second")
    with _timed("dedup", seconds):
        ledger.duplicates = deduplicate(ledger, rows, content, config)
    logger.info(f"removed {counted(len(ledger.removed_by(Stage.DEDUP)), 'duplicate row')}")
    if not content.is_text:
        link_passages(ledger, rows, content, config.data.split.group_by is not None)
    ledger.split = split_ledger(ledger, config)
    if marks:
        with _timed("fixes", seconds):
            rows = apply_fixes(ledger, rows, marks, rendering, config)
        _log_fixes(ledger)
    if not content.is_text:
        with _timed("conflicts", seconds):
            ledger.conflicts = find_conflicts(ledger, rows, content)
    with _timed("decontaminate", seconds):
        ledger.contamination = decontaminate(ledger, rows, content, config.data, evaluations)
    logger.info(f"removed {counted(len(ledger.contamination.removed), 'contaminated train row')}")
    ledger.forget_bands()
    ledger.split = assign_sides(ledger, config)
    _log_synthetic(ledger, config)
    with _timed("describe", seconds):
        ledger.wording = describe_wording(ledger, rows, content)
        ledger.synthetic = describe_synthetic(ledger, rows, content)
    with _timed("write", seconds):
        written = write_rows(rows, ledger, rendering, config, draft.path)
    counts = {side.folder: side_written.num_rows for side, side_written in written.items()}
    logger.info(
        f"wrote {counts['train']:,} train, {counts['test']:,} test and "
        f"{counts['removed']:,} removed rows"
    )
    for notice in ledger.notices:
        logger.info("%s: %s", notice.what, notice.where)
    for source in describe_sources(ledger, config):
        logger.info(
            f"{source['path']}: {source['num_found']:,} rows read, "
            f"{source['num_unreadable']:,} of them unusable, {source['num_removed']:,} removed"
        )
    write_card(config, ledger, written, draft.path)
    return ledger, {
        **{f"num_{split}_rows": n for split, n in counts.items() if split != "removed"},
        "num_removed": counts["removed"],
        "num_train_tokens": sum(written[Side.TRAIN].num_tokens),
        "num_target_tokens": sum(written[Side.TRAIN].num_target_tokens),
        "num_conflicts": ledger.conflicts.num_same_prompt if ledger.conflicts else 0,
        "num_near_conflicts": ledger.conflicts.num_near_prompt if ledger.conflicts else 0,
        "num_contaminated_rows": len(ledger.contamination.removed),
        **({"num_fixed_rows": len(ledger.fixes.applied)} if ledger.fixes else {}),
        "contamination": {
            origin.name: origin.contamination_ratio for origin in ledger.contamination.origins
        },
    }


def _log_synthetic(ledger: Ledger, config: TuneloopConfig) -> None:
    codes = Counter(removal.reason.code for removal in ledger.removals.values())
    if num_of_held_out := codes[ReasonCode.MADE_OF_HELD_OUT]:
        logger.info(f"removed {num_of_held_out:,} synthetic rows that belong with held-out rows")
    if num_beyond := codes[ReasonCode.SYNTHETIC_SURPLUS]:
        logger.warning(
            f"left out {num_beyond:,} synthetic rows: data.max_synthetic_ratio is "
            f"{config.data.max_synthetic_ratio:g}"
        )


def _log_fixes(ledger: Ledger) -> None:
    assert ledger.fixes is not None
    for item in ledger.fixes.applied:
        who = ", ".join(item.reviewers)
        logger.info("%s, a %s row: %s, as %s marked it", item.source, item.side, item.action, who)
    for why in ledger.fixes.refused.values():
        logger.info("a mark is not applied: %s", why)


@contextmanager
def _timed(stage: str, seconds: dict[str, float]) -> Iterator[Progress]:
    started = time.monotonic()
    with Progress(stage, unit="rows") as progress:
        yield progress
    seconds[stage] = round(time.monotonic() - started, 3)
