"""Inputs that have no answer yet: rows as the formats lay them out, without their answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tuneloop.config import GenerationConfig, OneTaskConfig, SourceConfig
from tuneloop.data.sources.bad_rows import BadRow
from tuneloop.data.sources.files import SourceFile, find_files
from tuneloop.data.sources.formats import to_chat, to_document, used_columns
from tuneloop.data.sources.parsing import read_records
from tuneloop.data.sources.readers import with_instruction
from tuneloop.data.sources.row_errors import RowError
from tuneloop.errors import DataError
from tuneloop.records import Message
from tuneloop.text import counted

# Stands where the answer will be while a row is read; it is never seen outside.
_ANSWER = "?"
_ANSWER_COLUMN = "answer"
_COMPLETIONS = {
    "prompt_completion": "completion",
    "question_answer": "answer",
    "alpaca": "output",
}


@dataclass(frozen=True)
class UnlabelledRow:
    """An input, as it is asked.

    Args:
        messages: With the task's instruction; the last is the user's.
        source: Where it was read, `path:line`.
        record: The row as it stands in the file.
        tools: JSON of the tools that may be called; empty for none.
    """

    messages: tuple[Message, ...]
    source: str
    record: Mapping[str, Any] = field(default_factory=dict)
    tools: str = ""

    @property
    def prompt(self) -> str:
        """What its last turn says."""
        return self.messages[-1].text


class UnlabelledRows(NamedTuple):
    """The inputs of some files, and the rows that cannot be read."""

    rows: list[UnlabelledRow]
    refused: list[BadRow]


def answer_column(source: SourceConfig) -> str:
    """Return the column that an answer to a row of this layout stands in; empty for lists."""
    if source.format == "columns":
        return source.columns.get("completion", _ANSWER_COLUMN)
    return _COMPLETIONS.get(source.format, "")


def read_unlabelled(
    files: Sequence[SourceFile], sources: Sequence[SourceConfig], task: OneTaskConfig
) -> UnlabelledRows:
    """Return the inputs of files in order; answers that stand there already are not read.

    Args:
        files: What to read.
        sources: Their layouts, by `SourceFile.source`.
        task: Whose instruction is put before every input.
    """
    # Whatever stands in for the answer need be no label and no JSON.
    free = task.model_copy(update={"type": "generation"})
    found = UnlabelledRows([], [])
    for file in files:
        source = sources[file.source]
        for line, record in read_records(file):
            place = f"{file.name}:{line}"
            try:
                if isinstance(record, RowError):
                    raise record
                found.rows.append(_row(record, source, free, place))
            except RowError as error:
                found.refused.append(BadRow(place, error.rejection()))
    return found


def input_files(generation: GenerationConfig) -> list[SourceFile]:
    """Return the files of `generation.sources`; none for kinds that have none. Raises DataError."""
    if not generation.sources:
        return []
    return find_files(generation.sources, "generation.sources")


def read_all_unlabelled(
    files: Sequence[SourceFile], generation: GenerationConfig, task: OneTaskConfig
) -> list[UnlabelledRow]:
    """Return the inputs of kind `answers`.

    Raises:
        DataError: There is none, or one cannot be read.
    """
    found = read_unlabelled(files, generation.sources, task)
    if found.refused:
        bad = found.refused[0]
        more = f" (and {counted(len(found.refused) - 1, 'more row')})" * (len(found.refused) > 1)
        raise DataError(bad.rejection.problem(bad.place, more))
    if not found.rows:
        raise DataError.of("the sources hold no input", where="generation.sources")
    return found.rows


def _row(
    record: dict[str, Any], source: SourceConfig, task: OneTaskConfig, place: str
) -> UnlabelledRow:
    if source.format == "text":
        messages, tools = [Message("user", to_document(record))], ""
    elif source.format == "label_studio":
        data = record.get("data")
        text = {"text": data.get("text")} if isinstance(data, dict) else record
        messages, tools = [Message("user", to_document(text))], ""
    else:
        chat = to_chat(*_with_answer(record, source), task)
        messages, tools = list(chat.messages[:-1]), chat.tools
    return UnlabelledRow(tuple(with_instruction(messages, task)), place, record, tools)


class _Answered(NamedTuple):
    record: dict[str, Any]
    source: SourceConfig


def _with_answer(record: dict[str, Any], source: SourceConfig) -> _Answered:
    """Return a row with something in place of its answer, and the layout that reads it."""
    if source.format in ("messages", "sharegpt"):
        (column,) = {"messages", "conversations"} & {*used_columns(source)}
        turns = record.get(column)
        if not isinstance(turns, list) or not turns or not isinstance(turns[-1], dict):
            return _Answered(record, source)
        keys = ("from", "value") if "from" in turns[-1] else ("role", "content")
        if turns[-1].get(keys[0]) in ("assistant", "gpt", "model", "chatbot"):
            turns = turns[:-1]
        answer = {keys[0]: "assistant", keys[1]: _ANSWER}
        return _Answered({**record, column: [*turns, answer]}, source)
    name = answer_column(source)
    if source.format == "columns":
        columns = {**source.columns, "completion": name}
        source = source.model_copy(update={"columns": columns})
    if source.format == "alpaca" and isinstance(record.get("instances"), list):
        first = record["instances"][0] if record["instances"] else {}
        record = {**record, "input": first.get("input") if isinstance(first, dict) else None}
    return _Answered({**record, name: _ANSWER}, source)
