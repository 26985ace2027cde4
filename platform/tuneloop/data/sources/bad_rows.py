"""Saying all that is wrong with the rows in one message, before any long work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import psutil

from tuneloop.config import DataConfig, TuneloopConfig
from tuneloop.data.schema import Rejection
from tuneloop.errors import DataError, Problem, ResourceError
from tuneloop.text import counted

_PLACES = 3
_KINDS = 5

# Peak of what `prepare` holds in the driver of every row, measured (docs/scaling.md).
_BYTES_PER_ROW = 1500


class BadRow(NamedTuple):
    """A row that cannot be used, and its file and line."""

    place: str
    rejection: Rejection


class ChangedRow(NamedTuple):
    """A row that is used otherwise than it was written: its file and line, and what is changed."""

    place: str
    what: str


class LongRow(NamedTuple):
    """A row longer than `data.max_seq_len`, and its file and line."""

    place: str
    num_tokens: int


def refuse_mismatched_formats(config: TuneloopConfig) -> None:
    """Raise DataError where a source's format does not fit the task."""
    is_text = config.task.type == "language_modeling"
    DataError.refuse(
        Problem(
            "format and task do not fit together",
            where=f"data.sources.{index}.format",
            got=f"{source.format} for task.type {config.task.type}",
            allowed="text" if is_text else "any format but text",
            remedy="plain text is learned with task.type language_modeling" if not is_text else "",
        )
        for index, source in enumerate(config.data.sources)
        if (source.format == "text") != is_text
    )


def refuse_too_many_rows(total: int) -> None:
    """Raise ResourceError if the driver cannot hold the keys of all rows, which it compares."""
    needed, free = total * _BYTES_PER_ROW, psutil.virtual_memory().available
    if needed > free:
        raise ResourceError.of(
            "too many rows for the memory of the driver, which compares the keys of all rows",
            where="data.sources",
            got=f"{total:,} rows, whose keys take about {needed / 2**30:,.1f} GiB",
            allowed=f"{free // _BYTES_PER_ROW:,} rows in the {free / 2**30:,.1f} GiB free",
            remedy="start the command on a node with more memory, or prepare the sources in "
            "parts; the length of the texts does not matter, they stay with the workers",
        )


def bad_row_problems(bad: Sequence[BadRow], total: int, data: DataConfig) -> list[Problem]:
    """Return one problem for each kind of mistake in the rows, the most frequent first."""
    by_kind: dict[str, list[BadRow]] = {}
    for row in bad:
        by_kind.setdefault(row.rejection.what, []).append(row)
    problems = []
    ranked = sorted(by_kind.items(), key=lambda item: -len(item[1]))
    for what, rows in ranked[:_KINDS]:
        first = rows[0].rejection
        where = first_places([row.place for row in rows])
        problems.append(Problem(what, where, first.got, first.allowed, first.remedy))
    rest = sum(len(rows) for _, rows in ranked[_KINDS:])
    if rest:
        problems.append(Problem(f"other mistakes in {counted(rest, 'more row')}"))
    share = len(bad) / max(1, total)
    if share > data.max_bad_rows_ratio and not _has_fatal(bad):
        last = problems.pop()
        drop = f" or drop them with data.max_bad_rows_ratio={_ceiling(share):g}"
        advice = (
            f"fix the rows{',' + drop if share < 1 else ''} ({len(bad):,} of {total:,} rows "
            f"cannot be used; {data.max_bad_rows_ratio:g} is allowed)"
        )
        remedy = f"{last.remedy}; or {advice}" if last.remedy else advice
        problems.append(Problem(last.what, last.where, last.got, last.allowed, remedy))
    return problems


def first_places(names: Sequence[str]) -> str:
    """Return the first of these places, and how many there are besides."""
    more = f", and {len(names) - _PLACES:,} more" if len(names) > _PLACES else ""
    return ", ".join(names[:_PLACES]) + more


def changed_problems(rows: Sequence[ChangedRow], total: int) -> list[Problem]:
    """Return one notice for each kind of change, the most frequent first."""
    by_kind: dict[str, list[ChangedRow]] = {}
    for row in rows:
        by_kind.setdefault(row.what, []).append(row)
    ranked = sorted(by_kind.items(), key=lambda item: -len(item[1]))
    return [
        Problem(f"{len(own):,} of {total:,} rows: {what}", first_places([row.place for row in own]))
        for what, own in ranked
    ]


def refuse_bad_rows(bad: Sequence[BadRow], total: int, data: DataConfig) -> None:
    """Raise DataError if more rows are bad than allowed, a file is unreadable, or none is left."""
    if total == 0:
        raise DataError.of(
            "the data set is empty",
            where=", ".join(source.path for source in data.sources),
            got="no rows",
            allowed="at least two",
        )
    if _has_fatal(bad) or len(bad) == total or len(bad) > data.max_bad_rows_ratio * total:
        raise DataError(*bad_row_problems(bad, total, data))


def nothing_left_problem(summaries: Sequence[str]) -> Problem:
    """Return the problem of filters that leave no row.

    Args:
        summaries: Why each row was dropped, `Reason.summary`.
    """
    return Problem(
        "no row is left after the filters",
        where="data.filters",
        got=_counted(summaries),
        remedy="loosen the filter, or fix the rows; data.filters.template_markers=strip and "
        "data.filters.personal_data=mask keep them",
    )


def dropped_problem(summaries: Sequence[str], total: int) -> Problem:
    """Return the notice of rows that filters drop, from why each was dropped."""
    return Problem(
        f"{len(summaries):,} of {total:,} rows are dropped by filters",
        where="data.filters",
        got=_counted(summaries),
    )


def too_long_problem(rows: Sequence[LongRow], total: int, data: DataConfig) -> Problem:
    """Return the problem of rows longer than `max_seq_len`."""
    longest = max(row.num_tokens for row in rows)
    return Problem(
        f"{len(rows):,} of {total:,} rows are longer than data.max_seq_len",
        where=_long_places(rows),
        got=f"up to {longest:,} tokens",
        allowed=f"at most {data.max_seq_len:,}",
        remedy=f"set data.max_seq_len={longest}" + _OTHER_WAYS[data.too_long],
    )


_OTHER_WAYS = {
    "error": ", or data.too_long=truncate (parts of the prompt go) or drop",
    "drop": " to keep them, or data.too_long=truncate; as it is, they are dropped",
    "truncate": "; the answer and the system prompt alone are longer: these rows are dropped",
}


def truncated_problem(rows: Sequence[LongRow], total: int, data: DataConfig) -> Problem:
    """Return the notice of rows of which parts of the prompt are left out."""
    return Problem(
        f"{len(rows):,} of {total:,} rows are cut to data.max_seq_len",
        where=_long_places(rows),
        got=f"up to {max(row.num_tokens for row in rows):,} tokens",
        allowed=f"at most {data.max_seq_len:,}",
        remedy="their oldest turns or the middle of their prompts are left out; the card says "
        "of which rows what",
    )


def _long_places(rows: Sequence[LongRow]) -> str:
    return first_places([f"{row.place} ({row.num_tokens:,} tokens)" for row in rows])


def _counted(summaries: Sequence[str]) -> str:
    counts = Counter(summaries).most_common(_KINDS)
    return ", ".join(f"{count:,} × {summary}" for summary, count in counts)


def _has_fatal(bad: Sequence[BadRow]) -> bool:
    return any(row.rejection.is_fatal for row in bad)


def _ceiling(share: float) -> float:
    """Return a share rounded up to three digits, so that it suffices when it is set."""
    return min(1.0, -(-share * 1000 // 1) / 1000)
