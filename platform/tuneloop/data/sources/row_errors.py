"""Why a row cannot be used, and the values of a row as its formats read them."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any, ClassVar

from tuneloop.data.schema import ReasonCode, Rejection, Stage

_NAME_IT = "set `format` to the rows' layout, or map `columns`"


class RowError(ValueError):
    """A row cannot be used.

    Args:
        what: What is wrong, worded alike for all rows with the same mistake.
        got: What this row has.
        allowed: What would have been accepted.
        remedy: What to do.
    """

    code: ClassVar[ReasonCode] = ReasonCode.WRONG_LAYOUT

    def __init__(self, what: str, got: str = "", allowed: str = "", remedy: str = "") -> None:
        super().__init__(what, got, allowed, remedy)
        self.what, self.got, self.allowed, self.remedy = what, got, allowed, remedy

    def rejection(self) -> Rejection:
        """Return why the row is removed."""
        is_fatal = isinstance(self, FileError)
        details = self.what, self.got, self.allowed, self.remedy
        return Rejection(Stage.READ, self.code, *details, is_fatal)


class ParseError(RowError):
    """A row cannot be read as text or parsed."""

    code = ReasonCode.UNREADABLE


class FileError(ParseError):
    """A whole file cannot be used: never tolerated, whatever `data.max_bad_rows_ratio` allows."""


class RepeatedKeyError(ParseError):
    """An object of JSON gives a key twice: parsers keep the last, in silence."""


class AnswerError(RowError):
    """A row's answer is none that the task allows."""

    code = ReasonCode.WRONG_ANSWER


def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON from its keys and values. Raises RepeatedKeyError."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RepeatedKeyError(
            f"an object gives the key `{twice}` twice",
            got=short([value for name, value in pairs if name == twice]),
            allowed="every key once",
            remedy="keep the one that is meant",
        )
    return found


def decoded(value: object, column: str) -> Any:
    """Return a value, or what its JSON holds: CSV has no lists. Raises RowError."""
    if not isinstance(value, str) or not value.strip():
        return value if not isinstance(value, str) else None
    try:
        return json.loads(value, object_pairs_hook=object_of)
    except RowError:
        raise
    except ValueError as error:
        raise RowError(f"`{column}` is not valid JSON", got=short(value)) from error


def missing_column(column: str, row: Mapping[str, Any], remedy: str = _NAME_IT) -> RowError:
    """Return the error for a column that a row lacks, with a suggestion if one is close."""
    close = difflib.get_close_matches(column, list(row), n=1)
    return RowError(
        f"no column `{column}`",
        got="columns " + (", ".join(row) or "none"),
        remedy=f"did you mean `{close[0]}`? Otherwise {remedy}" if close else remedy,
    )


def wrong_type(column: str, value: object) -> RowError:
    """Return the error for a value that is no text."""
    return RowError(
        f"`{column}` is not text",
        got=f"{type(value).__name__} {short(value)}",
        allowed="a string",
    )


def short(value: object) -> str:
    """Return a value as text, or its beginning, as messages show it."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return repr(text if len(text) <= 80 else text[:77] + "…")
