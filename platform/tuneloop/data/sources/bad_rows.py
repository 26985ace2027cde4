"""Telling all that is wrong with the rows in one message, before any long work."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

from tuneloop.config import DataConfig, TuneloopConfig
from tuneloop.data.schema import Reason, ReasonCode
from tuneloop.errors import DataError, Problem, ResourceError

_PLACES = 3
_KINDS = 5

# Peak of what `prepare` holds in its own process of every row, measured (docs/scaling.md).
_BYTES_PER_ROW = 1500

BadRow = tuple[str, str]  # (place, JSON of what, got, allowed, remedy, fatal; or a plain reason)


def refuse_mismatched_formats(config: TuneloopConfig) -> None:
    """Raise DataError where a source's format does not fit the task."""
    is_text = config.task.type == "language_modeling"
    problems = [
        Problem(
            "format and task do not fit together",
            where=f"data.sources.{index}.format",
            got=f"{source.format} for task.type {config.task.type}",
            allowed="text" if is_text else "any format but text",
            remedy="plain text is learned with task.type language_modeling" if not is_text else "",
        )
        for index, source in enumerate(config.data.sources)
        if (source.format == "text") != is_text
    ]
    if problems:
        raise DataError(*problems)


def refuse_too_many_rows(total: int) -> None:
    """Raise ResourceError if this process cannot hold what is decided from all rows at once."""
    import psutil

    needed, free = total * _BYTES_PER_ROW, psutil.virtual_memory().available
    if needed > free:
        raise ResourceError(
            Problem(
                "the rows are too many for the memory of the process that compares them all",
                where="data.sources",
                got=f"{total:,} rows, about {needed / 1e9:,.1f} GB of small numbers about them",
                allowed=f"{free // _BYTES_PER_ROW:,} rows with the {free / 1e9:,.1f} GB free here",
                remedy="start the command on a node with more memory, or prepare the sources in "
                "parts; texts do not count, they stay with the workers",
            )
        )


def reason_of(problem: str, code: ReasonCode) -> Reason:
    """Return why a bad row is removed, from its `problem`."""
    details = _details(problem)
    what, got = details["what"], details["got"]
    # What a chat template or a tokenizer says has its details after a colon.
    return Reason(code, f"{what}: {got}" if got else what, what.partition(":")[0])


def bad_row_problems(bad: Sequence[BadRow], total: int, data: DataConfig) -> list[Problem]:
    """Return one problem for each kind of mistake in the rows, the most frequent first."""
    by_kind: dict[str, list[BadRow]] = {}
    for row in bad:
        by_kind.setdefault(_details(row[1])["what"], []).append(row)
    problems = []
    ranked = sorted(by_kind.items(), key=lambda item: -len(item[1]))
    for what, rows in ranked[:_KINDS]:
        details = _details(rows[0][1])
        places = ", ".join(place for place, _ in rows[:_PLACES])
        more = f", and {len(rows) - _PLACES:,} more" if len(rows) > _PLACES else ""
        problems.append(
            Problem(what, places + more, details["got"], details["allowed"], details["remedy"])
        )
    rest = sum(len(rows) for _, rows in ranked[_KINDS:])
    if rest:
        problems.append(Problem(f"{rest:,} more rows have other mistakes"))
    share = len(bad) / max(1, total)
    is_fatal = any(_details(problem)["fatal"] for _, problem in bad)
    if share > data.max_bad_rows_ratio and not is_fatal:
        last = problems.pop()
        drop = f" or drop them with data.max_bad_rows_ratio={_ceiling(share):g}"
        advice = (
            f"mend the rows{',' + drop if share < 1 else ''} ({len(bad):,} of {total:,} rows "
            f"cannot be used; {data.max_bad_rows_ratio:g} is allowed)"
        )
        remedy = f"{last.remedy}; or {advice}" if last.remedy else advice
        problems.append(Problem(last.what, last.where, last.got, last.allowed, remedy))
    return problems


def refuse_bad_rows(bad: Sequence[BadRow], total: int, data: DataConfig) -> None:
    """Raise DataError if more rows are bad than allowed, a file is unreadable, or none is left."""
    if total == 0:
        raise DataError(
            Problem(
                "the data set is empty",
                where=", ".join(source.path for source in data.sources),
                got="no rows",
                allowed="at least two",
            )
        )
    fatal = any(_details(problem)["fatal"] for _, problem in bad)
    if fatal or len(bad) == total or len(bad) > data.max_bad_rows_ratio * total:
        raise DataError(*bad_row_problems(bad, total, data))


def nothing_left_problem(reasons: Sequence[str]) -> Problem:
    """Return the problem of filters that leave no row."""
    return Problem(
        "no row is left after the filters",
        where="data.filters",
        got=_counted(reasons),
        remedy="loosen the filter, or mend the rows; data.filters.template_markers=strip and "
        "data.filters.personal_data=mask keep them",
    )


def dropped_problem(reasons: Sequence[str], total: int) -> Problem:
    """Return the notice of rows that filters drop."""
    return Problem(
        f"{len(reasons):,} of {total:,} rows are dropped by filters",
        where="data.filters",
        got=_counted(reasons),
    )


def _counted(reasons: Sequence[str]) -> str:
    counts = Counter(reason.partition(":")[0] for reason in reasons)
    return ", ".join(f"{count:,} × {reason}" for reason, count in counts.most_common(_KINDS))


def too_long_problem(rows: Sequence[tuple[str, int]], total: int, data: DataConfig) -> Problem:
    """Return the problem of rows longer than `max_seq_len`, given as (place, tokens)."""
    longest = max(length for _, length in rows)
    places = ", ".join(f"{place} ({length:,} tokens)" for place, length in rows[:_PLACES])
    more = f", and {len(rows) - _PLACES:,} more" if len(rows) > _PLACES else ""
    return Problem(
        f"{len(rows):,} of {total:,} rows are longer than data.max_seq_len",
        where=places + more,
        got=f"up to {longest:,} tokens",
        allowed=f"at most {data.max_seq_len:,}",
        remedy=f"set data.max_seq_len={longest}, or data.too_long=drop",
    )


def _details(problem: str) -> dict[str, str]:
    if problem.startswith("{"):
        return json.loads(problem)
    return {"what": problem, "got": "", "allowed": "", "remedy": "", "fatal": ""}


def _ceiling(share: float) -> float:
    """Return a share rounded up to two digits, so that it suffices when it is set."""
    return min(1.0, -(-share * 1000 // 1) / 1000)
