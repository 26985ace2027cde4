"""Reading files row by row: a row becomes a conversation or a rejection, never an exception.

A row's place is `path:N`. N is the line in JSONL, CSV and TSV, the position from 1 in JSON arrays,
Parquet and Arrow, and 1 for a plain text document. A class label of `datasets` is read as its name.
To add a file format: a function that yields its records, and its suffix in `_FORMATS`.
"""

from __future__ import annotations

import csv
import functools
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from typing import Any, NamedTuple

import pyarrow as pa
from pyarrow import parquet

from tuneloop.config import MixedSourceConfig, OneTaskConfig, TuneloopConfig
from tuneloop.data.filters.quality import apply_filters
from tuneloop.data.schema import SourceRow, row_key
from tuneloop.data.sources.files import DOCUMENTS, SourceFile
from tuneloop.data.sources.formats import (
    FileError,
    ParseError,
    RowError,
    check_answer,
    missing_column,
    to_document,
    to_messages,
    used_columns,
)
from tuneloop.records import Message

# Columns of the dataset artifact: a user's column of the same name is kept as `original_NAME`.
RESERVED = frozenset(
    {
        *("row_id", "source", "synthetic", "messages", "text", "input_ids", "loss_mask"),
        *("num_tokens", "document_ids", "document_lengths"),
    }
)
_MADE_BY_US = {"row_id", "input_ids", "loss_mask"}
_KEPT_OF_BAD_ROW = 10_000


class _Record(NamedTuple):
    """A row of a file and its line; a row that cannot be parsed is its error."""

    line: int
    content: dict[str, Any] | RowError


def read_source(file: SourceFile, position: int, config: TuneloopConfig) -> Iterator[SourceRow]:
    """Yield every row of a file, usable or not.

    Args:
        file: What to read.
        position: Index of the file among all; orders rows across files.
        config: Layout of the source, task and split.
    """
    source = config.data.sources[file.source]
    used = {*used_columns(source), "synthetic"}
    for number, (line, record) in enumerate(_records(file)):
        row: SourceRow = {
            "key": row_key(position, number),
            "source": f"{file.name}:{line}",
            "rejection": None,
            "changes": "",
            "task": source.task or "",
            "messages": [],
            "text": "",
            "group": "",
            "stratum": source.task or "",
            "synthetic": False,
            "extra": "{}",
        }
        try:
            if isinstance(record, RowError):
                raise record
            _fill(row, record, source, config)
            row["extra"] = _json(_kept_columns(record, used, source.task))
            _refuse_lone_surrogates(row)
        except RowError as error:
            row["messages"], row["extra"], row["rejection"] = [], "{}", error.rejection()
            row["group"], row["stratum"] = "", source.task or ""
            raw = error.got if isinstance(record, RowError) else _json(record)
            row["text"] = raw[:_KEPT_OF_BAD_ROW].encode("utf-8", "replace").decode()
        yield row


def _fill(
    row: SourceRow, record: dict[str, Any], source: MixedSourceConfig, config: TuneloopConfig
) -> None:
    """Put what a record says into its row. Raises RowError."""
    task, filters, split = config.task.of(row["task"]), config.data.filters, config.data.split
    if config.task.type == "language_modeling":
        filtered = apply_filters([to_document(record)], False, filters)
        row["text"] = filtered.texts[0]
    else:
        messages = to_messages(record, source, task)
        filtered = apply_filters([message.content for message in messages], True, filters)
        if filtered.changes and not filtered.dropped:
            # A number that was masked leaves no valid JSON, for example.
            check_answer(filtered.texts[-1], task)
        texts = zip(messages, filtered.texts, strict=True)
        messages = [Message(message.role, text) for message, text in texts]
        row["messages"] = [vars(message) for message in with_instruction(messages, task)]
    row["rejection"], row["changes"] = filtered.dropped, ", ".join(filtered.changes)
    if split.group_by is not None:
        row["group"] = _label(record, split.group_by, "group_by")
    if split.stratify_by is not None:
        label = _label(record, split.stratify_by, "stratify_by")
        # No name of a task has a comma, so no two strata are called the same.
        row["stratum"] = f"{row['task']}, {label}" if row["task"] else label
    row["synthetic"] = record.get("synthetic") is True


def _kept_columns(record: dict[str, Any], used: Set[str], task: str | None) -> dict[str, Any]:
    """Return the user's own columns under the names that the dataset artifact gives them."""
    # A row of a dataset artifact is made anew: its ids belong to another preparation.
    is_ours = record.keys() >= _MADE_BY_US
    kept = {}
    for name, value in record.items():
        if name in used or (is_ours and name in RESERVED):
            continue
        is_taken = name in RESERVED or name.startswith("#") or (task and name == "task")
        kept[f"original_{name.removeprefix('#')}" if is_taken else name] = value
    return kept | {"task": task} if task else kept


def with_instruction(messages: list[Message], task: OneTaskConfig) -> list[Message]:
    """Return the messages with `task.instruction` as, or before, the system message."""
    instruction = task.instruction.strip()
    if not instruction:
        return messages
    if messages[0].role == "system":
        text = f"{instruction}\n\n{messages[0].content}"
        return [Message("system", text), *messages[1:]]
    return [Message("system", instruction), *messages]


def _records(file: SourceFile) -> Iterator[_Record]:
    try:
        with file.open() as stream:
            yield from _FORMATS[file.suffix](stream)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        yield _Record(1, FileError("the file is not UTF-8", got=f"byte {byte:#04x}"))
    except OSError as error:
        yield _Record(1, FileError("the file cannot be read", got=str(error)))


def _document(stream: pa.NativeFile) -> Iterator[_Record]:
    yield _Record(1, {"text": stream.read().decode()})


def _json_lines(stream: pa.NativeFile) -> Iterator[_Record]:
    for line, data in enumerate(io.BufferedReader(stream, 1 << 20), 1):
        if not data.strip():
            continue
        try:
            record = json.loads(data.removeprefix(b"\xef\xbb\xbf"))
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            yield _Record(line, ParseError("the line is not UTF-8", got=f"byte {byte:#04x}"))
        except ValueError as error:
            text = data.decode(errors="replace").rstrip("\n")
            got = f"{error}: {text if len(text) <= 80 else text[:77] + '…'}"
            problem = ParseError("the line is not valid JSON", got=got, allowed="one JSON object")
            yield _Record(line, problem)
        else:
            yield _Record(line, _object(record))


def _json_array(stream: pa.NativeFile) -> Iterator[_Record]:
    remedy = "one object per line is `.jsonl`"
    try:
        records = json.loads(stream.read())
    except UnicodeDecodeError:
        raise
    except ValueError as error:
        problem = FileError("the file is not valid JSON", got=str(error), remedy=remedy)
        yield _Record(getattr(error, "lineno", 1), problem)
        return
    if not isinstance(records, list):
        got, allowed = type(records).__name__, "a list of objects"
        yield _Record(1, FileError("the file is not a list", got, allowed, remedy))
        return
    for number, record in enumerate(records, 1):
        yield _Record(number, _object(record))


def _separated(stream: pa.NativeFile, delimiter: str) -> Iterator[_Record]:
    csv.field_size_limit(1 << 30)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield _Record(line, ParseError("the line is not valid CSV", got=str(error)))
            continue
        if not header:
            header = [name.strip() for name in values]
        elif len(values) == len(header):
            yield _Record(line, dict(zip(header, values, strict=True)))
        elif values:
            problem = ParseError(
                "the row has another number of columns than the header",
                got=str(len(values)),
                allowed=str(len(header)),
                remedy="put values with separators or line breaks in double quotes",
            )
            yield _Record(line, problem)


def _parquet(stream: pa.NativeFile) -> Iterator[_Record]:
    number = 0
    try:
        # Parquet is read from its end: a stream that cannot seek is read as a whole.
        seekable = stream if stream.seekable() else pa.BufferReader(stream.read())
        file = parquet.ParquetFile(seekable)
        for record in _batch_rows(file.schema_arrow, file.iter_batches(1024)):
            number += 1
            yield _Record(number, record)
    except pa.ArrowInvalid as error:
        yield _Record(number + 1, FileError("the file is not valid Parquet", got=str(error)))


def _arrow(stream: pa.NativeFile) -> Iterator[_Record]:
    number = 0
    try:
        reader = pa.ipc.open_stream(stream)
        for record in _batch_rows(reader.schema, reader):
            number += 1
            yield _Record(number, record)
    except pa.ArrowInvalid as error:
        yield _Record(number + 1, FileError("the file is not a valid Arrow stream", got=str(error)))


def _batch_rows(schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> Iterator[dict[str, Any]]:
    """Yield the rows of batches, with the names of the classes that `datasets` keeps as numbers."""
    described = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = described.get("info", {}).get("features", {})
    classes = {
        name: feature["names"]
        for name, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
    }
    for batch in batches:
        for record in batch.to_pylist():
            for column, names in classes.items():
                number = record.get(column)
                # -1 is a label that is missing.
                if isinstance(number, int) and 0 <= number < len(names):
                    record[column] = names[number]
            yield record


_FORMATS: dict[str, Callable[[pa.NativeFile], Iterator[_Record]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_array,
    ".csv": functools.partial(_separated, delimiter=","),
    ".tsv": functools.partial(_separated, delimiter="\t"),
    ".parquet": _parquet,
    ".arrow": _arrow,
    **dict.fromkeys(DOCUMENTS, _document),
}


def _object(record: Any) -> dict[str, Any] | RowError:
    if isinstance(record, dict):
        return record
    got = type(record).__name__
    return ParseError("the row is not an object", got=got, allowed="a JSON object")


def _label(record: Mapping[str, Any], column: str, key: str) -> str:
    """Return a row's value of the column that `data.split.<key>` names, as text."""
    if column not in record:
        raise missing_column(column, record, f"set data.split.{key} to a column of the rows")
    value = record[column]
    if value is None or value == "":
        raise RowError(f"`{column}` is empty, and data.split.{key} needs it")
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def _refuse_lone_surrogates(row: SourceRow) -> None:
    """Raise ParseError for half of a surrogate pair: JSON can escape one, but it is no text."""
    texts = [row["text"], row["group"], row["extra"], *(m["content"] for m in row["messages"])]
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise ParseError(
            "half of a surrogate pair stands alone",
            got=ascii(error.object[max(0, error.start - 20) : error.start + 20]),
            allowed="text that UTF-8 can hold",
            remedy="fix what wrote the row: it cut a character in two",
        ) from error


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
