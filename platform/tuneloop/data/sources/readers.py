"""Reading files row by row: a row becomes a conversation or a rejection, never an exception.

A row's place is `path:N`; what N is in a type of file, `parsing` says.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any, NamedTuple

from tuneloop.config import MixedSourceConfig, OneTaskConfig, TaskConfig, TuneloopConfig
from tuneloop.data.filters.quality import apply_filters
from tuneloop.data.schema import SourceRow, row_key
from tuneloop.data.sources.dialect import BYTE_ORDER_MARK
from tuneloop.data.sources.files import SourceFile
from tuneloop.data.sources.formats import (
    NO_VALUES,
    check_answer,
    to_chat,
    to_document,
    used_columns,
)
from tuneloop.data.sources.mending import without_nulls
from tuneloop.data.sources.parsing import ARROW, read_records
from tuneloop.data.sources.row_errors import ParseError, RowError, missing_column
from tuneloop.data.sources.values import as_text
from tuneloop.records import Message

# Columns of the dataset artifact: a user's column of the same name is kept as `original_NAME`.
RESERVED = frozenset(
    {
        *("row_id", "source", "synthetic", "messages", "text", "input_ids", "loss_mask"),
        *("num_tokens", "split_unit", "document_ids", "document_lengths", "tools"),
    }
)
_MADE_BY_US = {"row_id", "input_ids", "loss_mask"}
_KEPT_OF_BAD_ROW = 10_000
_NULLS = (
    "a null in the answer may be a field that is absent: Parquet and Arrow write both alike; "
    "learned as null"
)
# pandas writes 7 as 7.0 where others are missing, in CSV too.
_WHOLE = re.compile(r"^(-?\d+)\.0+$")
_YES, _NO = ("true", "1", "1.0", "yes"), ("false", "0", "0.0", "no", "", "none")


def read_source(file: SourceFile, position: int, config: TuneloopConfig) -> Iterator[SourceRow]:
    """Yield every row of a file, usable or not.

    Args:
        file: What to read.
        position: Index of the file among all; orders rows across files.
        config: Layout of the source, task and split.
    """
    source = config.data.sources[file.source]
    used = set(used_columns(source))
    for number, (line, record) in enumerate(read_records(file)):
        row: SourceRow = {
            "key": row_key(position, number),
            "source": f"{file.name}:{line}",
            "rejection": None,
            "changes": "",
            "task": source.task or "",
            "messages": [],
            "tools": "",
            "text": "",
            "group": "",
            "stratum": source.task or "",
            "synthetic": False,
            "seed_row_id": "",
            "extra": "{}",
        }
        try:
            if isinstance(record, RowError):
                raise record
            record = _without_marks(record, used)
            # Turns; a prompt and a completion may be such, too, as TRL has them.
            is_turns = source.format in ("messages", "sharegpt") or (
                source.format == "prompt_completion" and isinstance(record.get("prompt"), list)
            )
            if file.suffix in ARROW and is_turns:
                of_turns = used | {"tools"}
                record = {
                    name: without_nulls(value) if name in of_turns else value
                    for name, value in record.items()
                }
            _fill(row, record, source, config)
            if file.suffix in ARROW and _answers_with_null(record, source, config.task, row):
                row["changes"] = ", ".join(filter(None, [row["changes"], _NULLS]))
            row["extra"] = _json(_kept_columns(record, used, source.task))
            _refuse_lone_surrogates(row)
        except RowError as error:
            row["messages"], row["extra"], row["rejection"] = [], "{}", error.rejection()
            row["tools"] = ""
            row["group"], row["stratum"] = "", source.task or ""
            raw = error.got if isinstance(record, RowError) else _json(record)
            row["text"] = raw[:_KEPT_OF_BAD_ROW].encode("utf-8", "replace").decode()
        yield row


def _answers_with_null(
    record: Mapping[str, Any], source: MixedSourceConfig, task: TaskConfig, row: SourceRow
) -> bool:
    """Return whether a file that fills objects with nulls may have made one in an answer."""
    if task.of(row["task"]).type != "extraction" or source.format == "label_studio":
        return False
    objects = [record.get(name) for name in used_columns(source)]
    return any(isinstance(one, dict) and without_nulls(one) != one for one in objects)


def _fill(
    row: SourceRow, record: dict[str, Any], source: MixedSourceConfig, config: TuneloopConfig
) -> None:
    """Put what a record says into its row. Raises RowError."""
    task, filters, split = config.task.of(row["task"]), config.data.filters, config.data.split
    changes: list[str] = []
    if config.task.type == "language_modeling":
        filtered = apply_filters([to_document(record)], False, filters)
        row["text"] = filtered.texts[0]
    else:
        chat = to_chat(record, source, task)
        row["tools"] = chat.tools
        parts = [part for index, m in enumerate(chat.messages) for part in _parts(index, m)]
        filtered = apply_filters([part.text for part in parts], True, filters)
        messages = _with_texts(chat.messages, parts, filtered.texts)
        if filtered.changes and not filtered.dropped:
            # A number that was masked leaves no valid JSON, for example.
            check_answer(messages[-1].content, task)
        row["messages"] = [message.as_dict() for message in with_instruction(messages, task)]
        changes += chat.changes
    row["rejection"], row["changes"] = filtered.dropped, ", ".join([*filtered.changes, *changes])
    if split.group_by is not None:
        row["group"] = _label(record, split.group_by, "group_by")
    if split.stratify_by is not None:
        label = _label(record, split.stratify_by, "stratify_by")
        # No name of a task has a comma, so no two strata are called the same.
        row["stratum"] = f"{row['task']}, {label}" if row["task"] else label
    row["synthetic"] = bool(_truth(record.get("synthetic")))
    if row["synthetic"] and isinstance(record.get("seed_row_id"), str):
        row["seed_row_id"] = record["seed_row_id"]


def _without_marks(record: dict[str, Any], used: Set[str]) -> dict[str, Any]:
    """Return a record without the byte-order marks that other programs leave in names and texts."""
    if BYTE_ORDER_MARK in "".join(record):
        record = {name.removeprefix(BYTE_ORDER_MARK): value for name, value in record.items()}
    for name in used:
        value = record.get(name)
        if isinstance(value, str) and value.startswith(BYTE_ORDER_MARK):
            record[name] = value.removeprefix(BYTE_ORDER_MARK)
    return record


def _truth(value: object) -> bool | None:
    """Return what a value says as yes or no; None if it says something else."""
    word = str(value).strip().lower()
    return True if word in _YES else False if word in _NO else None


class _Part(NamedTuple):
    """A text of a conversation that filters read.

    Args:
        turn: Index of its message.
        field: Of the message.
    """

    turn: int
    field: str
    text: str


def _parts(turn: int, message: Message) -> Iterator[_Part]:
    """Yield the texts of a message that are not empty, what it says last."""
    for name in ("reasoning_content", "content", "tool_calls"):
        if text := getattr(message, name):
            yield _Part(turn, name, text.removeprefix(BYTE_ORDER_MARK))


def _with_text(message: Message, field: str, text: str) -> Message:
    if field == "content":
        return replace(message, content=text)
    if field == "tool_calls":
        return replace(message, tool_calls=text)
    return replace(message, reasoning_content=text)


def _with_texts(
    messages: Sequence[Message], parts: Sequence[_Part], texts: Sequence[str]
) -> list[Message]:
    """Return messages with their texts as filters repaired them."""
    repaired = list(messages)
    for (turn, name, _), text in zip(parts, texts, strict=True):
        if name == "tool_calls":
            try:
                for call in json.loads(text):
                    json.loads(call["function"]["arguments"])
            except (ValueError, TypeError, KeyError) as error:
                raise RowError("a tool call is no valid JSON after the filters") from error
        if repaired[turn].role == "assistant":
            text = text.strip()  # what went may have stood behind a space
        repaired[turn] = _with_text(repaired[turn], name, text)
    return repaired


def _kept_columns(record: dict[str, Any], used: Set[str], task: str | None) -> dict[str, Any]:
    """Return the user's own columns under the names that the dataset artifact gives them."""
    # A row of a dataset artifact is made anew: its ids belong to another preparation.
    is_ours = record.keys() >= _MADE_BY_US
    kept = {}
    for name, value in record.items():
        if name in used or (is_ours and name in RESERVED):
            continue
        if name == "synthetic" and _truth(value) is not None:
            continue
        is_taken = name in RESERVED or name.startswith("#") or (task and name == "task")
        kept_as = f"original_{name.removeprefix('#')}" if is_taken else name or "unnamed"
        while kept_as != name and (kept_as in record or kept_as in kept):
            kept_as = f"original_{kept_as}"
        kept[kept_as] = value
    return kept | {"task": task} if task else kept


def with_instruction(messages: list[Message], task: OneTaskConfig) -> list[Message]:
    """Return the messages with `task.instruction` as, or before, the system message, once."""
    instruction = task.instruction.strip()
    if not instruction:
        return messages
    if messages[0].role in ("system", "developer"):
        own = messages[0].content
        # Rows of a dataset of ours have it already, such as those that a larger model wrote.
        if own == instruction or own.startswith(f"{instruction}\n\n"):
            return messages
        # The labels may have been added to what rows and configuration both say.
        is_part = instruction.startswith(f"{own}\n\n")
        text = instruction if is_part else f"{instruction}\n\n{own}"
        return [replace(messages[0], content=text), *messages[1:]]
    return [Message("system", instruction), *messages]


def _label(record: Mapping[str, Any], column: str, key: str) -> str:
    """Return a row's value of the column that `data.split.<key>` names, as text."""
    if column not in record:
        raise missing_column(column, record, f"set data.split.{key} to a column of the rows")
    value = record[column]
    is_json = isinstance(value, bool | int | float | list | dict)
    text = json.dumps(value, sort_keys=True, default=as_text) if is_json else as_text(value)
    if value is None or not text.strip() or text.strip() in NO_VALUES:
        raise RowError(f"`{column}` is empty, and data.split.{key} needs it")
    # Two spellings of a letter are one value: names of files on a Mac are decomposed.
    return _WHOLE.sub(r"\1", unicodedata.normalize("NFC", text.strip()))


def _refuse_lone_surrogates(row: SourceRow) -> None:
    """Raise ParseError for half of a surrogate pair: JSON can escape one, but it is no text."""
    turns = json.dumps(row["messages"], ensure_ascii=False)
    texts = [row["text"], row["group"], row["extra"], row["tools"], turns]
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise ParseError(
            "half of a surrogate pair stands alone",
            got=ascii(error.object[max(0, error.start - 20) : error.start + 20]),
            allowed="text that UTF-8 can hold",
            remedy="fix what wrote the row: it cut a character in two",
        ) from error


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=as_text)
