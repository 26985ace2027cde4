"""Rows of the user's own to score models on, in place of a test split."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tuneloop.artifacts import Artifact, Published, Workspace, fingerprint
from tuneloop.config import DataConfig, FiltersConfig, SplitConfig, TuneloopConfig
from tuneloop.data.corrections import ACCEPTED_COLUMN, NOT_THERE, corrected, refusal
from tuneloop.data.hashing.content import Content, content_id
from tuneloop.data.sources.bad_rows import BadRow, refuse_bad_rows, refuse_mismatched_formats
from tuneloop.data.sources.files import find_files, identities
from tuneloop.data.sources.readers import read_source
from tuneloop.marks import SCORED_SUFFIX, Mark, decide

CODE_VERSION = 11


def prepare_scored_rows(
    config: TuneloopConfig, workspace: Workspace, marks: Sequence[Mark] = ()
) -> Published:
    """Return `datasets/<config.name>-scored`, whose test split is the rows, made or reused.

    The rows are neither filtered nor deduplicated, and keep their order. Needs no Ray.

    Args:
        config: `task`, `evaluation.sources` and `data.max_bad_rows_ratio` are used.
        marks: What people say about these rows, oldest first.

    Raises:
        DataError: A source leads nowhere, or too many rows are unusable.
    """
    update = {
        "sources": config.evaluation.sources,
        "split": SplitConfig(),
        "filters": FiltersConfig(),
    }
    reading = config.model_copy(update={"data": config.data.model_copy(update=update)})
    refuse_mismatched_formats(reading)
    files = find_files(config.evaluation.sources, "evaluation.sources")
    contents = identities(files)
    parts: dict[str, Any] = {
        "task": config.task.model_dump(),
        # Files count by what is in them, wherever they lie: a job has them in another place.
        "sources": [source.model_dump(exclude={"path"}) for source in config.evaluation.sources],
        "files": contents,
    }
    fixes = decide(marks).fixes
    if fixes:
        parts["fixes"] = [fix.identity() for fix in fixes]
    name = config.name + SCORED_SUFFIX
    identity = fingerprint("scored_rows", CODE_VERSION, **parts)
    existing = workspace.find("datasets", name, identity)
    if existing is not None and _has_few_bad_rows(existing, config.data):
        return Published(existing, reused=True)
    content, seen = Content.of(config.task), Counter[str]()
    by_row = {fix.content_id: [f for f in fixes if f.content_id == fix.content_id] for fix in fixes}
    applied: list[dict[str, Any]] = []
    refused = {mark.uid: NOT_THERE for fix in fixes for mark in fix.marks}
    rows: list[dict[str, Any]] = []
    bad: list[BadRow] = []
    for position, file in enumerate(files):
        for row in read_source(file, position, reading):
            if row["rejection"]:
                bad.append(BadRow(row["source"], row["rejection"]))
                continue
            row_id = content_id(*content.own(row), row["task"])
            # The same question twice is two rows here: what users ask is scored as it is asked.
            seen[row_id] += 1
            extra = json.loads(row["extra"])
            before, accepted, is_dropped = row["messages"], _texts(extra), False
            for fix in by_row.get(row_id, []):
                why = refusal(fix, row["messages"], config.task.of(row["task"]))
                for mark in fix.marks:
                    refused.pop(mark.uid, None)
                if why:
                    refused |= {mark.uid: why for mark in fix.marks}
                    continue
                if fix.action == "correct":
                    row["messages"] = corrected(row["messages"], fix.answers[0])
                accepted += fix.answers if fix.action == "accept" else ()
                is_dropped = is_dropped or fix.action == "drop"
                applied.append(
                    {
                        "row_id": row_id,
                        "source": row["source"],
                        "side": "test",
                        "action": fix.action,
                        "before": before[-1]["content"] if before else row["text"],
                        "after": "\n".join(fix.answers),
                        "reviewers": list(dict.fromkeys(mark.reviewer for mark in fix.marks)),
                        "marks": [mark.uid for mark in fix.marks],
                        "created_at": max(mark.created_at for mark in fix.marks),
                    }
                )
            if is_dropped:
                continue
            own = {
                column: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
                for column, value in extra.items()
                if value is not None and column != ACCEPTED_COLUMN
            }
            rows.append(
                own
                | ({ACCEPTED_COLUMN: list(dict.fromkeys(accepted))} if accepted else {})
                | {
                    "row_id": row_id if seen[row_id] == 1 else f"{row_id}-{seen[row_id]}",
                    "source": row["source"],
                    "synthetic": row["synthetic"],
                    **({"text": row["text"]} if content.is_text else {"messages": row["messages"]}),
                    **({"tools": row["tools"]} if row["tools"] else {}),
                    "num_tokens": 0,
                }
            )
    refuse_bad_rows(bad, len(bad) + len(rows), reading.data)
    names = dict.fromkeys(name for row in rows for name in row)
    table = pa.table({column: [row.get(column) for row in rows] for column in names})
    with workspace.draft("datasets", name, identity) as draft:
        (draft.path / "test").mkdir()
        pq.write_table(table, draft.path / "test" / "part-00000.parquet", compression="zstd")
        if fixes:
            card = {"fixes": {"applied": applied, "refused": refused}}
            text = json.dumps(card, indent=2, ensure_ascii=False)
            (draft.path / "card.json").write_text(text, encoding="utf-8")
        artifact = draft.publish(
            config={**parts, "sources": [s.model_dump() for s in config.evaluation.sources]},
            resources={},
            inputs=[
                f"{file.name} sha256:{digest}"
                for file, (*_, digest) in zip(files, contents, strict=True)
            ],
            metrics={"num_train_rows": 0, "num_test_rows": len(rows), "num_removed": len(bad)},
        )
    return Published(artifact, reused=False)


def _has_few_bad_rows(scored: Artifact, data: DataConfig) -> bool:
    """Return whether as many rows were left out as are tolerated now."""
    metrics = scored.manifest["metrics"]
    num_bad = metrics["num_removed"]
    return bool(num_bad <= data.max_bad_rows_ratio * (num_bad + metrics["num_test_rows"]))


def _texts(extra: dict[str, Any]) -> list[str]:
    """Return what a row's own columns say is right too."""
    given = extra.get(ACCEPTED_COLUMN)
    if isinstance(given, list) and all(isinstance(text, str) for text in given):
        return [*given]
    return []
