"""Scores, differences and texts in the form that people read."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tuneloop.evals.scoring.metrics import Metric

Piece = tuple[str, str]
_P_FLOOR = 0.001
_MOST_PAIRS = 100_000


def format_value(value: float | None, metric: Metric) -> str:
    """Return a score as text: per cent for 0/1 and ratio scores."""
    if value is None:
        return "–"
    return f"{value:.3f}" if metric.kind == "number" else f"{100 * value:.1f}%"


def format_estimate(estimate: dict[str, Any], metric: Metric) -> str:
    """Return a score with its interval as text."""
    if estimate["low"] is None:
        return format_value(estimate["value"], metric)
    ends = " to ".join(
        format_value(estimate[end], metric).removesuffix("%") for end in ("low", "high")
    )
    return f"{format_value(estimate['value'], metric)} ({ends})"


def format_difference(value: float | None, metric: Metric, unit: bool = True) -> str:
    """Return a signed difference as text: in points for 0/1 and ratio scores."""
    if value is None:
        return "–"
    text = f"{value:+.3f}" if metric.kind == "number" else f"{100 * value:+.1f}"
    text = text.replace("-", "−")
    return text + (" points" if unit and metric.kind != "number" else "")


def format_change(estimate: Mapping[str, Any], metric: Metric) -> str:
    """Return a difference with its interval as text."""
    value, low, high = (
        format_difference(estimate[end], metric, unit=False) for end in ("value", "low", "high")
    )
    unit = "" if metric.kind == "number" else " points"
    return value + unit + (f" ({low} to {high})" if estimate["low"] is not None else "")


def format_size(value: float, metric: Metric) -> str:
    """Return how large a difference is, as text: in points for 0/1 and ratio scores."""
    if metric.kind == "number":
        return f"{value:.3g}"
    return f"{100 * value:.2g} points" if value < 0.1 else f"{100 * value:.0f} points"


def format_number(value: float | None, digits: int = 0) -> str:
    """Return a number with thousands separators; a dash when there is none."""
    return "–" if value is None else f"{value:,.{digits}f}"


def format_cost(value: float | None) -> str:
    """Return an amount of money with three significant digits; a dash where it is not known."""
    if value is None:
        return "–"
    return f"{value:,.2f}" if value >= 10 or value == 0 else f"{value:.3g}"


def _num_pairs(expected: Sequence[str], answer: Sequence[str]) -> int:
    """Return how many pairs of equal words there are: what one look for a match costs."""
    counts = Counter(answer)
    return sum(count * counts[word] for word, count in Counter(expected).items())


def format_interval(difference: dict[str, Any], metric: Metric) -> str:
    """Return the ends of a difference's interval as text; empty where it has none."""
    if difference["low"] is None:
        return ""
    ends = (format_difference(difference[end], metric, unit=False) for end in ("low", "high"))
    return " to ".join(ends)


def format_p_value(value: float | None) -> str:
    """Return a p-value as text."""
    if value is None:
        return "–"
    return f"< {_P_FLOOR}" if value < _P_FLOOR else f"{value:.3f}"


def join_words(parts: Sequence[str], word: str = "and") -> str:
    """Return `a, b and c`."""
    if len(parts) < 2:
        return "".join(parts)
    return ", ".join(parts[:-1]) + f" {word} {parts[-1]}"


def word_diff(reference: str, completion: str) -> list[Piece]:
    """Return a completion against its reference as (kind, text) pieces in reading order.

    Kinds: `same`, `extra` (only in the completion) and `missing` (only in the reference). Of long
    texts only whole words are compared, and of those that repeat themselves without end nothing.
    """
    expected, answer = (re.findall(r"\s+|\w+|[^\w\s]", text) for text in (reference, completion))
    if _num_pairs(expected, answer) > _MOST_PAIRS:
        expected, answer = (re.findall(r"\s+|\S+\s*", text) for text in (reference, completion))
        if _num_pairs(expected, answer) > _MOST_PAIRS:
            return [("missing", reference), ("extra", completion)]
    pieces: list[Piece] = []
    for kind, i1, i2, j1, j2 in difflib.SequenceMatcher(
        None, expected, answer, autojunk=False
    ).get_opcodes():
        if kind == "equal":
            pieces.append(("same", "".join(answer[j1:j2])))
            continue
        if i2 > i1:
            pieces.append(("missing", "".join(expected[i1:i2])))
        if j2 > j1:
            pieces.append(("extra", "".join(answer[j1:j2])))
    return pieces
