"""Finding out how rows are laid out, from the rows themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tuneloop.data.sources.mending import is_preference
from tuneloop.data.sources.row_errors import RowError
from tuneloop.data.sources.unfit import is_chat_export, is_prodigy
from tuneloop.errors import DataError, Problem

# Names of columns, the more telling first.
_PROMPTS = (
    *("prompt", "question", "query", "instruction", "input", "user", "utterance", "message"),
    *("sentence", "text", "context", "document", "article", "source", "body", "title", "review"),
)
_COMPLETIONS = (
    *("completion", "answer", "response", "output", "label", "labels", "intent", "category"),
    *("class", "target", "reply", "assistant", "summary", "translation", "sentiment", "chosen"),
    *("extracted", "json", "fields", "result"),
)
_SYSTEMS = ("system", "system_prompt")
# What a question is asked about: never its answer.
_CONTEXTS = frozenset({"context", "passage", "document", "article"})
# Neither question nor answer.
_IDS = frozenset({"id", "uuid", "uid", "guid", "key", "index", "object", "created_at", "timestamp"})
# Documents, unless a column beside them has the name of an answer.
_DOCUMENT = "text"
_SHOWN_COLUMNS = 12


@dataclass(frozen=True)
class Layout:
    """How rows are laid out.

    Args:
        format: `data.sources[*].format`.
        columns: `data.sources[*].columns`, for the format `columns`.
        mend: `data.sources[*].mend` that the rows need.
    """

    format: str
    columns: dict[str, str] = field(default_factory=dict)
    mend: list[str] = field(default_factory=list)


def find_layout(records: Iterable[Mapping[str, Any] | RowError], where: str) -> Layout:
    """Return the layout that most rows have.

    Args:
        records: Rows as they stand in their files; those that cannot be parsed count for none.
        where: What they are, for the message.

    Raises:
        DataError: No row can be parsed, or no two columns look like a question and its answer.
    """
    votes: Counter[str] = Counter()
    values: Counter[str] = Counter()
    texts: Counter[str] = Counter()
    objects: Counter[str] = Counter()
    constants: dict[str, Any] = {}
    preferences: Counter[str] = Counter()
    num_rows = 0
    error: RowError | None = None
    for record in records:
        if isinstance(record, RowError):
            error = error or record
            continue
        constants = _same(constants, record) if num_rows else dict(record)
        num_rows += 1
        if is_chat_export(record):
            raise DataError(_chat_export(where))
        if is_prodigy(record):
            # What the annotator did, no answer to learn.
            record = {name: value for name, value in record.items() if name != "answer"}
        values.update(name for name, value in record.items() if value not in (None, ""))
        texts.update(name for name, value in record.items() if _is_text(value))
        objects.update(name for name, value in record.items() if value and isinstance(value, dict))
        layout = _named_layout(record)
        if layout:
            votes[layout] += 1
            preferences[layout] += is_preference(record, layout)
    if votes and votes.most_common(1)[0][1] * 2 >= num_rows:
        chosen = votes.most_common(1)[0][0]
        return Layout(chosen, mend=["preferences"] if preferences[chosen] else [])
    often = [name for name in values if values[name] * 2 >= num_rows]
    # What is the same in all rows is neither a question nor an answer.
    told = [name for name in often if num_rows == 1 or name not in constants] or often
    told = [name for name in told if name.lower() not in _IDS and not name.endswith("_id")]
    columns = _columns(
        [name for name in told if texts[name] * 2 >= values[name]],
        [name for name in told if objects[name] * 2 >= values[name]],
        told,
    )
    if columns is None:
        raise DataError(_unknown(often, where, error if not num_rows else None))
    return columns


def _same(constants: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in constants.items() if record.get(name) == value}


def _is_text(value: object) -> bool:
    """Return whether a value is a text and no number, as ids are."""
    return isinstance(value, str) and bool(value.strip()) and not value.strip().isdigit()


def _named_layout(row: Mapping[str, Any]) -> str:
    """Return the format whose columns a row has; empty if none."""
    for column, layout in (("messages", "messages"), ("conversations", "sharegpt")):
        turns = row.get(column)
        if isinstance(turns, list) or (isinstance(turns, str) and turns.lstrip().startswith("[")):
            return layout
    if "instruction" in row and row.keys() & {"output", "instances"}:
        return "alpaca"
    if is_preference(row, "alpaca") and "instruction" in row:
        return "alpaca"
    if is_preference(row, "messages"):
        return "messages"
    if {"data", "annotations"} <= row.keys():
        return "label_studio"
    if {"prompt", "completion"} <= row.keys():
        return "prompt_completion"
    if {"question", "answer"} <= row.keys():
        return "question_answer"
    return ""


def _columns(texts: list[str], objects: list[str], often: list[str]) -> Layout | None:
    """Return the columns that look like question and answer, or a text alone.

    Args:
        texts: Columns whose values are mostly text, as they stand in the rows.
        objects: Columns whose values are mostly objects: what was extracted, if there is one.
        often: Columns that most rows have, numbers too.
    """
    prompt = _first_named(_PROMPTS, texts)
    completion = _first_named(_COMPLETIONS, [name for name in often if name != prompt])
    if prompt is None or completion is None:
        rest = [name for name in texts if name not in (prompt, completion)]
        rest = [name for name in rest if prompt is None or name.lower() not in _CONTEXTS]
        if prompt is None and completion is None and len(rest) == 2:
            prompt, completion = rest
        elif prompt is None and completion is not None and len(rest) == 1:
            (prompt,) = rest
        elif completion is None and prompt is not None and len(objects) == 1:
            (completion,) = objects
        elif completion is None and prompt not in (None, _DOCUMENT) and len(rest) == 1:
            (completion,) = rest
    if prompt is not None and completion is not None:
        system = _first_named(_SYSTEMS, texts)
        return Layout(
            "columns",
            {"prompt": prompt, "completion": completion} | ({"system": system} if system else {}),
        )
    return Layout("text") if _DOCUMENT in texts else None


def _first_named(names: Iterable[str], columns: list[str]) -> str | None:
    plain = {column.strip().lower(): column for column in reversed(columns)}
    return next((plain[name] for name in names if name in plain), None)


def _chat_export(where: str) -> Problem:
    return Problem(
        "the file is an export of a chat application: trees or lists of its own messages",
        where=where,
        allowed='a list of turns in each row: {"messages": [{"role": "user", "content": …}, …]}',
        remedy="write the turns of each conversation so, in the order in which they were said",
    )


def _unknown(columns: list[str], where: str, error: RowError | None) -> Problem:
    """Return why rows with some columns have no layout, or why no row can be read."""
    remedy = "`tuneloop init` writes a configuration to fill in"
    if error is not None:
        return Problem(error.what, where, error.got, error.allowed, error.remedy)
    if not columns:
        return Problem("there are no rows", where=where, remedy=remedy)
    shown = ", ".join(columns[:_SHOWN_COLUMNS]) + (", …" if len(columns) > _SHOWN_COLUMNS else "")
    return Problem(
        "no two columns look like a question and its answer",
        where=where,
        got=f"columns {shown}",
        allowed="messages, conversations, instruction and output, prompt and completion, question "
        "and answer, or two columns of text",
        remedy=f"{remedy}: set `format: columns` and name them under `columns`",
    )
