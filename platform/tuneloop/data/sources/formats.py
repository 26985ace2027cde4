"""From a row as the user laid it out to a conversation, or the reason why it is none."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any, ClassVar

from tuneloop.config import OneTaskConfig, SourceConfig
from tuneloop.data.schema import ReasonCode, Rejection, Stage
from tuneloop.records import Message, Role

_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}
_PAIRS = {
    "prompt_completion": ("prompt", "completion"),
    "question_answer": ("question", "answer"),
}


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


class AnswerError(RowError):
    """A row's answer is none that the task allows."""

    code = ReasonCode.WRONG_ANSWER


def used_columns(source: SourceConfig) -> tuple[str, ...]:
    """Return the columns that a format reads; all others are the user's and are kept."""
    if source.format == "columns":
        return tuple(source.columns.values())
    if source.format == "alpaca":
        return ("instruction", "input", "output")
    if source.format in _PAIRS:
        return _PAIRS[source.format]
    return {"messages": ("messages",), "sharegpt": ("conversations",), "text": ("text",)}[
        source.format
    ]


def to_document(row: Mapping[str, Any]) -> str:
    """Return the text of a row of format `text`. Raises RowError."""
    return _text(row, "text").strip("\n")


def to_messages(row: Mapping[str, Any], source: SourceConfig, task: OneTaskConfig) -> list[Message]:
    """Return a row's conversation, checked against the task, without `task.instruction`.

    White space after a prompt, blank lines before it, and white space around an answer are
    dropped: the chat template supplies what stands between them.

    Raises:
        RowError: A column is missing, empty or of the wrong type, the turns are not a
            conversation, or the answer is none that the task allows.
    """
    if source.format in ("messages", "sharegpt"):
        messages = _turns(row, source.format)
    else:
        messages = _pair(row, source, task)
    check_answer(messages[-1].content, task)
    return messages


def _pair(row: Mapping[str, Any], source: SourceConfig, task: OneTaskConfig) -> list[Message]:
    system = ""
    if source.format == "alpaca":
        prompt = _text(row, "instruction")
        more = row.get("input")
        if more is not None and not isinstance(more, str):
            raise _wrong_type("input", more)
        if more and more.strip():
            prompt = f"{prompt.rstrip()}\n\n{more}"
        answer = "output"
    else:
        columns = dict(source.columns)
        if not columns:
            columns["prompt"], columns["completion"] = _PAIRS[source.format]
        prompt, answer = _text(row, columns["prompt"]), columns["completion"]
        if "system" in columns:
            if columns["system"] not in row:
                raise _missing(columns["system"], row)
            if row[columns["system"]]:
                system = _text(row, columns["system"])
    reference = row.get(answer)
    if task.type == "extraction" and isinstance(reference, dict):
        completion = json.dumps(reference, ensure_ascii=False)
    elif isinstance(reference, int) and not isinstance(reference, bool):
        completion = str(reference)  # a label 0 or 1, a count
    else:
        completion = _text(row, answer)
    messages = [Message("system", system.strip())] if system else []
    return [
        *messages,
        Message("user", prompt.rstrip().lstrip("\r\n")),
        Message("assistant", completion.strip()),
    ]


def _turns(row: Mapping[str, Any], layout: str) -> list[Message]:
    column, role_key, text_key = (
        ("messages", "role", "content")
        if layout == "messages"
        else ("conversations", "from", "value")
    )
    if column not in row:
        raise _missing(column, row)
    turns = row[column]
    if isinstance(turns, str):  # CSV has no lists
        try:
            turns = json.loads(turns)
        except ValueError as error:
            raise RowError(f"`{column}` is not valid JSON", got=_short(turns)) from error
    if not isinstance(turns, list) or not turns:
        raise RowError(
            f"`{column}` is not a list of turns", got=_short(turns), allowed="at least two turns"
        )
    messages: list[Message] = []
    for turn in turns:
        if not isinstance(turn, dict) or role_key not in turn or text_key not in turn:
            raise RowError(
                f"a turn has no `{role_key}` and `{text_key}`",
                got=_short(turn),
                allowed=f'{{"{role_key}": …, "{text_key}": …}}',
            )
        role = _ROLES.get(str(turn[role_key]).lower())
        if role is None:
            raise RowError(
                "a turn has a role that is not supported",
                got=_short(turn[role_key]),
                allowed=", ".join(_ROLES),
            )
        content = _content(turn[text_key])
        content = content.strip() if role == "assistant" else content.rstrip().lstrip("\r\n")
        if not content and role != "system":
            raise RowError(f"a turn of the {role} is empty")
        if content:
            messages.append(Message(role, content))
    spoken = [message.role for message in messages if message.role != "system"]
    if any(message.role == "system" for message in messages[1:]):
        raise RowError("a system message is not the first one")
    if len(spoken) < 2 or spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise RowError(
            "the turns do not alternate from user to assistant",
            got=_short(" ".join(spoken)),
            allowed="user assistant, once or more, after an optional system message",
        )
    return messages


def _content(value: Any) -> str:
    """Return a turn's text; a list of text parts, as OpenAI writes it, is joined."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in value
    ):
        return "".join(part["text"] for part in value)
    raise RowError("a turn's content is not text", got=_short(value), allowed="a string")


def check_answer(answer: str, task: OneTaskConfig) -> None:
    """Raise AnswerError if the answer is none that the task allows."""
    if task.type == "classification" and answer not in task.labels:
        close = difflib.get_close_matches(answer.lower(), task.labels, n=1)
        raise AnswerError(
            "the answer is not one of task.labels",
            got=_short(answer),
            allowed=", ".join(task.labels),
            remedy=f"did you mean `{close[0]}`?" if close else "add it to task.labels",
        )
    if task.type == "extraction":
        try:
            record = json.loads(answer, parse_constant=_refuse_constant)
        except ValueError as error:
            raise AnswerError(
                "the answer is not valid JSON", got=_short(answer), allowed="a JSON object"
            ) from error
        if not isinstance(record, dict):
            raise AnswerError(
                "the answer is not a JSON object", got=_short(answer), allowed="a JSON object"
            )
        absent = [name for name in task.fields if name not in record]
        if absent:
            raise AnswerError(
                f"the answer has no field `{absent[0]}`",
                got=", ".join(record),
                allowed="all of task.fields: " + ", ".join(task.fields),
            )


def _refuse_constant(name: str) -> float:
    """Raise ValueError for NaN and Infinity, which Python reads and no other parser of JSON."""
    raise ValueError(name)


def _text(row: Mapping[str, Any], column: str) -> str:
    if column not in row:
        raise _missing(column, row)
    value = row[column]
    if value is None:
        raise RowError(f"`{column}` is empty", got="null", allowed="text")
    if not isinstance(value, str):
        raise _wrong_type(column, value)
    if not value.strip():
        raise RowError(f"`{column}` is empty", got=_short(value), allowed="text")
    return value


def _missing(column: str, row: Mapping[str, Any]) -> RowError:
    return missing_column(column, row, "set `format` to the rows' layout, or map `columns`")


def missing_column(column: str, row: Mapping[str, Any], remedy: str) -> RowError:
    """Return the error for a column that a row lacks, with a suggestion if one is close."""
    close = difflib.get_close_matches(column, list(row), n=1)
    return RowError(
        f"no column `{column}`",
        got="columns " + (", ".join(row) or "none"),
        remedy=f"did you mean `{close[0]}`? Otherwise {remedy}" if close else remedy,
    )


def _wrong_type(column: str, value: Any) -> RowError:
    return RowError(
        f"`{column}` is not text",
        got=f"{type(value).__name__} {_short(value)}",
        allowed="a string",
    )


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return repr(text if len(text) <= 80 else text[:77] + "…")
