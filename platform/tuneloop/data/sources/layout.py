"""Finding out how rows are laid out, from the rows themselves."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

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
_BY_HAND = "`tuneloop init` writes a configuration to fill in"
# Answers are labels if they are short and each is the answer of several rows.
LONGEST_LABEL = 60
MOST_LABELS = 1000
FEWEST_ROWS = 10
ROWS_PER_LABEL = 4


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


class Columns(NamedTuple):
    """The columns that go in and come out, as far as they are named."""

    input: str = ""
    output: str = ""


NONE_NAMED = Columns()


class UnknownLayout(DataError):
    """No two columns look like a question and its answer."""


def find_layout(
    records: Iterable[Mapping[str, Any] | RowError], where: str, wanted: Columns = NONE_NAMED
) -> Layout:
    """Return the layout that most rows have.

    Args:
        records: Rows as they stand in their files; those that cannot be parsed count for none.
        where: What they are, for the message.
        wanted: Columns that someone has named; the others are found.

    Raises:
        UnknownLayout: No two columns look like a question and its answer.
        DataError: No row can be parsed, or no row has a column that is wanted.
    """
    votes: Counter[str] = Counter()
    values: Counter[str] = Counter()
    texts: Counter[str] = Counter()
    objects: Counter[str] = Counter()
    values_of: dict[str, _Values] = {}
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
        for name, value in record.items():
            if _is_text(value):
                texts[name] += 1
                values_of.setdefault(name, _Values()).add(value)
        objects.update(name for name, value in record.items() if value and isinstance(value, dict))
        layout = _named_layout(record)
        if layout:
            votes[layout] += 1
            preferences[layout] += is_preference(record, layout)
    for name in filter(None, wanted):
        if num_rows and name not in values:
            raise DataError(_missing(name, list(values), where))
    if not any(wanted) and votes and votes.most_common(1)[0][1] * 2 >= num_rows:
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
        values_of,
        wanted,
    )
    if columns is None and not often:
        raise DataError(_unreadable(where, error))
    if columns is None:
        raise UnknownLayout(_unknown(often, where))
    return columns


class _Values:
    """The texts of a column: how long they are, and how often each comes while they are few."""

    def __init__(self) -> None:
        self.num_rows = self.num_characters = 0
        self.counts: Counter[str] | None = Counter()

    def add(self, text: str) -> None:
        self.num_rows += 1
        self.num_characters += len(text)
        if self.counts is not None:
            self.counts[text.strip()] += 1
            if len(text) > LONGEST_LABEL or len(self.counts) > MOST_LABELS:
                self.counts = None

    @property
    def are_labels(self) -> bool:
        """Whether they look like the labels of a classification."""
        number = len(self.counts or ())
        return number >= 2 and self.num_rows >= max(FEWEST_ROWS, ROWS_PER_LABEL * number)


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


def _columns(
    texts: list[str],
    objects: list[str],
    often: list[str],
    values: Mapping[str, _Values],
    wanted: Columns,
) -> Layout | None:
    """Return the columns that look like question and answer, or a text alone.

    Args:
        texts: Columns whose values are mostly text, as they stand in the rows.
        objects: Columns whose values are mostly objects: what was extracted, if there is one.
        often: Columns that most rows have, numbers too.
        values: Texts of the columns that have any.
        wanted: Columns that are given.
    """
    texts = [name for name in texts if name not in wanted]
    often = [name for name in often if name not in wanted]
    prompt = wanted.input or _first_named(_PROMPTS, texts)
    completion = wanted.output or _first_named(
        _COMPLETIONS, [name for name in often if name != prompt]
    )
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
    if completion is None and (prompt or _DOCUMENT not in texts):
        # Of several columns the only one that repeats few short texts.
        labels = [name for name in texts if name != prompt and values[name].are_labels]
        completion = labels[0] if len(labels) == 1 else None
    if prompt is None and completion is not None:
        rest = [name for name in texts if name != completion]
        lengths = {name: values[name].num_characters for name in rest}
        prompt = max(rest, key=lengths.__getitem__, default=None)
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


def _unreadable(where: str, error: RowError | None) -> Problem:
    """Return why no row can be read."""
    if error is not None:
        return Problem(error.what, where, error.got, error.allowed, error.remedy)
    return Problem("there are no rows", where=where, remedy=_BY_HAND)


def _unknown(columns: Sequence[str], where: str) -> Problem:
    """Return that rows with some columns have no layout."""
    return Problem(
        "no two columns look like a question and its answer",
        where=where,
        got=f"columns {_shown(columns)}",
        allowed="messages, conversations, instruction and output, prompt and completion, question "
        "and answer, or two columns of text",
        remedy="name them by --input COLUMN --output COLUMN",
    )


def _missing(name: str, columns: Sequence[str], where: str) -> Problem:
    close = difflib.get_close_matches(name, columns, 1)
    return Problem(
        "no row has this column",
        where=where,
        got=name,
        allowed=_shown(columns),
        remedy=f"did you mean `{close[0]}`?" if close else "name one of them",
    )


def _shown(columns: Sequence[str]) -> str:
    return ", ".join(columns[:_SHOWN_COLUMNS]) + ", …" * (len(columns) > _SHOWN_COLUMNS)
