"""Marks applied to rows: answers corrected, rows dropped, more answers accepted.

Until every row has its side, rows are what the files say. Only then are marks applied, so none of
them moves a row, or one that stays with it, from training to the test or back. A row keeps its id
when its answer is corrected.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ray.data import Dataset

from tuneloop.config import TuneloopConfig
from tuneloop.data import ray_rows
from tuneloop.data.corrections import ACCEPTED_COLUMN, NOT_THERE, corrected, refusal
from tuneloop.data.hashing.columns import Indices, one_array
from tuneloop.data.hashing.content import Content
from tuneloop.data.ledger import Ledger, Removal
from tuneloop.data.schema import Reason, ReasonCode, Side, Stage, row_schema
from tuneloop.data.tokenize.batch import render_batch
from tuneloop.data.tokenize.rendering import Rendering
from tuneloop.marks import Fix, Mark, decide
from tuneloop.records import Message

_HELD_OUT = (Side.TEST, Side.VALIDATION)


@dataclass(frozen=True)
class AppliedFix:
    """What marks have changed in one row.

    Args:
        side: Where the row is, or was.
        before: Its answer as the files have it.
        after: Its answer now; what is right too, one on each line; empty for a dropped row.
        reviewers: Who asked for it.
        marks: By their `uid`.
    """

    row_id: str
    source: str
    side: str
    action: str
    before: str
    after: str
    reviewers: list[str]
    marks: list[str]
    created_at: str


@dataclass
class Fixes:
    """What has become of the marks on the rows of a dataset.

    Args:
        applied: In the order of the rows.
        refused: By `uid` of a mark, why its row could not be changed.
    """

    applied: list[AppliedFix] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


class _Row(NamedTuple):
    """A row that marks ask to change: its place in the ledger, its side and what it holds."""

    place: int
    side: Side
    content: dict[str, Any]

    @property
    def answer(self) -> str:
        messages = self.content["messages"]
        return Message.of(messages[-1]).text if messages else str(self.content["text"])


def apply_fixes(
    ledger: Ledger,
    rows: Dataset,
    marks: Sequence[Mark],
    rendering: Rendering,
    config: TuneloopConfig,
) -> Dataset:
    """Return the tokenized rows with what marks ask for; the ledger's `fixes` say what was done.

    Args:
        ledger: With a split. Dropped rows are removed from it, columns of corrected ones renewed.
        rows: Dataset of tokenized rows.
        marks: On rows of this dataset, oldest first.
        rendering: How rows become tokens.
        config: Its `task` says which answers are allowed.
    """
    decided = decide(marks)
    fixes = ledger.fixes = Fixes()
    content_ids = one_array(ledger.table["content_id"])
    wanted = pa.array([fix.content_id for fix in decided.fixes], pa.string())
    places = np.flatnonzero(pc.is_in(content_ids, wanted).to_numpy(zero_copy_only=False))
    by_id: dict[str, list[int]] = {}
    for place, name in zip(places.tolist(), content_ids.take(places).to_pylist(), strict=True):
        by_id.setdefault(name, []).append(place)
    on_side = _sides(ledger, [place for found in by_id.values() for place in found])
    keys = ledger.table["key"].to_numpy()
    tables = ray_rows.fetch_whole(rows, keys[places]) if len(places) else None
    contents = {row["key"]: row for row in tables.to_pylist()} if tables is not None else {}
    changed: dict[int, _Row] = {}
    for fix in decided.fixes:
        uids = [mark.uid for mark in fix.marks]
        staying = [place for place in by_id.get(fix.content_id, []) if place in on_side]
        if not staying:
            gone = by_id.get(fix.content_id)
            why = _why_gone(ledger, gone[0]) if gone else NOT_THERE
            fixes.refused |= dict.fromkeys(uids, why)
            continue
        for place in staying:
            row = changed.get(place) or _Row(place, on_side[place], contents[int(keys[place])])
            done = _apply(fix, row, rendering, config)
            if isinstance(done, str):
                fixes.refused |= dict.fromkeys(uids, done)
                continue
            changed[place] = done
            fixes.applied.append(_described(fix, row, done, ledger))
    dropped = [
        place
        for fix in decided.fixes
        if fix.action == "drop"
        for place in by_id.get(fix.content_id, [])
        if place in on_side
    ]
    _drop(ledger, dropped, fixes)
    rewritten = [row.content for place, row in changed.items() if place not in dropped]
    if not rewritten:
        return rows
    fresh = _rendered(rewritten, rendering, config)
    _renew(ledger, fresh)
    replace_rows = functools.partial(_with_rows, fresh=fresh)
    return rows.map_batches(replace_rows, batch_format="pyarrow").materialize()


def train_fixes(ledger: Ledger, fixes: Sequence[Fix]) -> list[Fix]:
    """Return the fixes on which what is trained on depends: all but those of test rows alone.

    Args:
        ledger: After decontamination. A train row that repeats a changed test row was removed for
            it, so then all count.
        fixes: All that were asked for.
    """
    if ledger.fixes is None:
        return list(fixes)
    of_test = {
        item.row_id.partition("-")[0]
        for item in ledger.fixes.applied
        if item.side == Side.TEST.folder
    }
    repeated = {
        str(ledger.removals[index].kept_row_id).partition("-")[0]
        for index in ledger.removed_by(Stage.DECONTAMINATION).tolist()
    }
    if of_test & repeated:
        return list(fixes)
    refused = ledger.fixes.refused
    return [
        fix
        for fix in fixes
        if fix.content_id not in of_test and not all(mark.uid in refused for mark in fix.marks)
    ]


def _apply(fix: Fix, row: _Row, rendering: Rendering, config: TuneloopConfig) -> _Row | str:
    """Return a row as marks ask for it, or why it stays as it is."""
    content = row.content
    if why := refusal(fix, content["messages"], config.task.of(content["task"])):
        return why
    if fix.action == "drop":
        return row
    if fix.action == "accept":
        if row.side not in _HELD_OUT:
            return "the row is trained on; more right answers count only where answers are scored"
        extra = json.loads(content["extra"])
        accepted = extra.get(ACCEPTED_COLUMN) or []
        if not isinstance(accepted, list):
            return f"the row has a column `{ACCEPTED_COLUMN}` that is no list"
        extra[ACCEPTED_COLUMN] = list(dict.fromkeys([*accepted, *fix.answers]))
        return row._replace(content=content | {"extra": json.dumps(extra, ensure_ascii=False)})
    if fix.answers[0] == row.answer:
        return "the row has this answer already"
    content = content | {"messages": corrected(content["messages"], fix.answers[0])}
    rendered = _rendered([content], rendering, config).to_pylist()[0]
    if rendered["rejection"] is not None:
        return f"with this answer the row cannot be used: {rendered['rejection']['what']}"
    if rendered["num_tokens"] > config.data.max_seq_len:
        return (
            f"with this answer the row has {rendered['num_tokens']:,} tokens, more than "
            f"data.max_seq_len ({config.data.max_seq_len:,})"
        )
    return row._replace(content=content)


def _described(fix: Fix, before: _Row, after: _Row, ledger: Ledger) -> AppliedFix:
    new = {"correct": after.answer, "accept": "\n".join(fix.answers), "drop": ""}[fix.action]
    return AppliedFix(
        ledger.row_ids[before.place].as_py(),
        before.content["source"],
        before.side.folder,
        fix.action,
        before.answer,
        new,
        list(dict.fromkeys(mark.reviewer for mark in fix.marks)),
        [mark.uid for mark in fix.marks],
        max(mark.created_at for mark in fix.marks),
    )


def _sides(ledger: Ledger, places: Sequence[int]) -> dict[int, Side]:
    """Return the sides of those of some rows that are on one."""
    assert ledger.split is not None
    found: dict[int, Side] = {}
    for side in (Side.TRAIN, Side.TEST, Side.VALIDATION):
        on_side = np.intersect1d(getattr(ledger.split, side.folder), places)
        found |= dict.fromkeys(on_side.tolist(), side)
    return found


def _why_gone(ledger: Ledger, place: int) -> str:
    assert ledger.split is not None
    removal = ledger.removals.get(place)
    reason = removal.reason if removal else ledger.split.surplus[place]
    return f"the row is in no split: {reason.text}"


def _drop(ledger: Ledger, places: Sequence[int], fixes: Fixes) -> None:
    """Remove rows that people want out."""
    assert ledger.split is not None
    who = {item.row_id: item for item in fixes.applied if item.action == "drop"}
    for place in places:
        item = who[ledger.row_ids[place].as_py()]
        text = f"marked as a bad row by {', '.join(item.reviewers)}"
        reason = Reason(ReasonCode.MARKED, text, "marked as a bad row")
        ledger.remove(place, Removal(Stage.MARKS, reason))

    def without(indices: Indices) -> Indices:
        return indices[~np.isin(indices, places)]

    split = ledger.split
    ledger.split = replace(
        split,
        train=without(split.train),
        test=without(split.test),
        validation=without(split.validation),
    )


def _rendered(
    contents: Sequence[dict[str, Any]], rendering: Rendering, config: TuneloopConfig
) -> pa.Table:
    """Return rows tokenized again, in the order of `key`, with the ids and cuts that they had."""
    ordered = sorted(contents, key=lambda row: int(row["key"]))
    fields = row_schema()
    table = pa.Table.from_pylist(
        [{name: row[name] for name in fields.names} for row in ordered], fields
    )
    fresh = render_batch(table, rendering, Content.of(config.task), config.data.dedup, None)
    for name in ("content_id", "cut"):
        kept = pa.array([row[name] for row in ordered], pa.string())
        fresh = fresh.set_column(fresh.schema.get_field_index(name), name, kept)
    return fresh


def _renew(ledger: Ledger, fresh: pa.Table) -> None:
    """Put the columns of rows that were tokenized again into the ledger."""
    table = ledger.table
    order = np.arange(table.num_rows)
    order[np.searchsorted(table["key"].to_numpy(), fresh["key"].to_numpy())] = (
        table.num_rows + np.arange(fresh.num_rows)
    )
    both = pa.concat_tables([table, fresh.select(table.column_names).cast(table.schema)])
    ledger.table = both.take(pa.array(order)).combine_chunks()


def _with_rows(block: pa.Table, fresh: pa.Table) -> pa.Table:
    """Return a block with those of its rows replaced that were tokenized again."""
    is_new = pc.is_in(block["key"], one_array(fresh["key"]))
    if not pc.any(is_new).as_py():
        return block
    new = fresh.filter(pc.is_in(fresh["key"], one_array(block["key"])))
    both = [block.filter(pc.invert(is_new)), new.select(block.column_names).cast(block.schema)]
    return pa.concat_tables(both).sort_by("key")
