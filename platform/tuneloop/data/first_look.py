"""A first look at files that nobody has configured yet: layout, task, and what becomes of rows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from tuneloop.config import MixedSourceConfig, TaskType, TuneloopConfig
from tuneloop.data.schema import SourceRow
from tuneloop.data.sources.bad_rows import BadRow, ChangedRow
from tuneloop.data.sources.files import DOCUMENTS, SourceFile, find_files
from tuneloop.data.sources.formats import used_columns
from tuneloop.data.sources.layout import (
    FEWEST_ROWS,
    LONGEST_LABEL,
    MOST_LABELS,
    NONE_NAMED,
    ROWS_PER_LABEL,
    Columns,
    Layout,
    find_layout,
)
from tuneloop.data.sources.parsing import Record, read_records
from tuneloop.data.sources.readers import read_source
from tuneloop.data.sources.row_errors import RowError
from tuneloop.errors import DataError
from tuneloop.records import Message

_JSON_WITHIN_JSON = "JSON within JSON"
_MOST_FIELDS = 50


@dataclass(frozen=True)
class FirstLook:
    """What is found in files before there is a configuration.

    Args:
        layout: How the rows are laid out.
        task: What their answers look like: `task.type`.
        labels: The answers, if the task is a classification.
        fields: The fields that every answer has, if the task is an extraction.
        num_rows: All rows, those that cannot be read too.
        refused: Rows that cannot be read, and why.
        changed: Rows that are read otherwise than they were written.
        own_columns: Columns that are carried along and not learned.
        has_tools: Whether some row has tools or calls of them.
        has_system: Whether some row brings a system message.
        model: What the rows say made their answers, if all say the same.
    """

    layout: Layout
    task: TaskType
    labels: list[str]
    fields: list[str]
    num_rows: int
    refused: list[BadRow]
    changed: list[ChangedRow]
    own_columns: list[str]
    has_tools: bool
    has_system: bool
    model: str


def look(path: str, wanted: Columns = NONE_NAMED) -> FirstLook:
    """Return what is found in a file, a directory or whatever `data.sources[*].path` takes.

    Args:
        path: Where the rows are.
        wanted: Columns that someone has named.

    Raises:
        DataError: There is no such file, or no layout fits its rows.
    """
    files = _files(path)
    if all(file.suffix in DOCUMENTS for file in files):
        layout, models = Layout("text"), set()
    else:
        layout = find_layout((row.content for row in _records(files)), path, wanted)
        models = _models(files)
    seen = _read(path, layout, "language_modeling" if layout.format == "text" else "generation")
    if layout.format != "text" and 2 * len(seen.refused) > seen.num_rows:
        # Answers that are objects, not text, are those of an extraction.
        records = _read(path, layout, "extraction")
        seen = records if len(records.refused) < len(seen.refused) else seen
    if any(row.rejection.what.endswith(_JSON_WITHIN_JSON) for row in seen.refused):
        layout = replace(layout, mend=[*layout.mend, "json_within_json"])
        seen = _read(path, layout, "generation")
    task = seen.task()
    used = {*used_columns(_source(path, layout)), "synthetic"}
    return FirstLook(
        layout,
        "language_modeling" if layout.format == "text" else task,
        labels=sorted(seen.answers) if task == "classification" else [],
        fields=(seen.fields or [])[:_MOST_FIELDS] if task == "extraction" else [],
        num_rows=seen.num_rows,
        refused=seen.refused,
        changed=seen.changed,
        own_columns=[name for name in seen.own_columns if name not in used],
        has_tools=seen.has_tools,
        has_system=seen.has_system,
        model=models.pop() if len(models) == 1 else "",
    )


def _files(path: str) -> list[SourceFile]:
    """Return the files that a path stands for, by the layout that finds most.

    In a directory, what is a description of the data depends on the columns that are read.

    Raises:
        DataError: No layout finds any.
    """
    found: list[list[SourceFile]] = []
    errors: list[DataError] = []
    for layout in (
        "messages",
        "sharegpt",
        "alpaca",
        "prompt_completion",
        "question_answer",
        "label_studio",
        "text",
    ):
        try:
            found.append(find_files([_source(path, Layout(layout))]))
        except DataError as error:
            errors.append(error)
    if not found:
        raise errors[0]
    return max(found, key=len)


def _source(path: str, layout: Layout) -> MixedSourceConfig:
    return MixedSourceConfig.model_validate({"path": path, **vars(layout)})


def _records(files: list[SourceFile]) -> Iterator[Record]:
    for file in files:
        yield from read_records(file)


def _models(files: list[SourceFile]) -> set[str]:
    """Return what the rows have in a column `model`, two values at most."""
    found: set[str] = set()
    for _, row in _records(files):
        if isinstance(row, RowError):
            continue
        if not isinstance(row.get("model"), str):
            return set()
        found.add(row["model"])
        if len(found) > 1:
            break
    return found


class _Seen:
    """What the rows of some files have in common, as far as they have been read."""

    def __init__(self) -> None:
        self.num_rows = 0
        self.refused: list[BadRow] = []
        self.changed: list[ChangedRow] = []
        self.own_columns: dict[str, None] = {}
        self.answers: Counter[str] = Counter()
        self.fields: list[str] | None = None
        self.has_tools = self.has_system = False
        self.may_be_labels = self.may_be_records = True

    def add(self, row: SourceRow) -> None:
        self.num_rows += 1
        if row["rejection"] is not None:
            self.refused.append(BadRow(row["source"], row["rejection"]))
            return
        changes = row["changes"].split(", ") if row["changes"] else []
        self.changed += [ChangedRow(row["source"], what) for what in changes]
        self.own_columns |= dict.fromkeys(json.loads(row["extra"]))
        messages = [Message.of(turn) for turn in row["messages"]]
        if not messages:
            return
        has_calls = any(message.tool_calls for message in messages)
        self.has_tools = self.has_tools or bool(row["tools"]) or has_calls
        self.has_system = self.has_system or messages[0].role in ("system", "developer")
        num_spoken = sum(message.role not in ("system", "developer") for message in messages)
        self._compare(messages[-1].content, num_spoken == 2 and not has_calls)

    def _compare(self, answer: str, is_single: bool) -> None:
        """Look whether an answer is a label or a record like those before it."""
        is_short = len(answer) <= LONGEST_LABEL and "\n" not in answer
        self.may_be_labels = self.may_be_labels and is_single and is_short
        if self.may_be_labels:
            self.answers[answer] += 1
            self.may_be_labels = len(self.answers) <= MOST_LABELS
        record = _record_of(answer) if is_single and self.may_be_records else None
        self.may_be_records = record is not None
        if record is not None:
            known = list(record) if self.fields is None else self.fields
            self.fields = [name for name in known if name in record]

    def task(self) -> TaskType:
        """Return what the answers look like."""
        num_used = self.num_rows - len(self.refused)
        if self.may_be_records and num_used:
            return "extraction"
        num_labels = len(self.answers)
        is_repeated = num_used >= max(FEWEST_ROWS, ROWS_PER_LABEL * num_labels)
        if self.may_be_labels and num_labels >= 2 and is_repeated:
            return "classification"
        return "generation"


def _record_of(answer: str) -> dict[str, object] | None:
    """Return the JSON object that an answer is; None if it is none."""
    if not answer.startswith("{"):
        return None
    try:
        record = json.loads(answer)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _read(path: str, layout: Layout, task: TaskType) -> _Seen:
    source = _source(path, layout)
    config = TuneloopConfig.model_validate(
        {
            "name": "first-look",
            "task": {"type": task},
            "model": {"base": "none"},
            "data": {"sources": [source.model_dump()]},
        }
    )
    seen = _Seen()
    for position, file in enumerate(find_files([source])):
        for row in read_source(file, position, config):
            seen.add(row)
    return seen
