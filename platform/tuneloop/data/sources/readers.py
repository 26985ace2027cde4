"""Reading files row by row: every row becomes a conversation or a reason, never an exception.

A row's place is `path:N`. N is the line in JSONL, CSV and TSV, the position from 1 in JSON arrays,
Parquet and Arrow, and 1 for a plain text document. A class label of `datasets` is read as its name.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Set
from typing import Any

from tuneloop.config import OneTaskConfig, TuneloopConfig
from tuneloop.data.filters.quality import apply_filters, filter_messages
from tuneloop.data.schema import row_key
from tuneloop.data.sources.files import DOCUMENTS, SourceFile
from tuneloop.data.sources.formats import (
    FileError,
    RowError,
    check_answer,
    missing_column,
    to_document,
    to_messages,
    used_columns,
)
from tuneloop.records import Message

# Columns of the dataset artifact: a user's column of the same name is carried as `original_NAME`.
RESERVED = frozenset(
    {
        *("row_id", "source", "synthetic", "messages", "text", "input_ids", "loss_mask"),
        *("num_tokens", "document_ids", "document_lengths"),
    }
)
_MADE_BY_US = {"row_id", "input_ids", "loss_mask"}
_KEPT_OF_BAD_ROW = 10_000


def read_rows(file: SourceFile, position: int, config: TuneloopConfig) -> Iterator[dict[str, Any]]:
    """Yield every row of a file, usable or not, with the columns of `row_schema`.

    Args:
        file: What to read.
        position: Index of the file among all; orders rows across files.
        config: Layout of the source, task and split.
    """
    source = config.data.sources[file.source]
    split = config.data.split
    name = source.task or ""
    task = config.task.of(name)
    used = used_columns(source)
    for number, (line, record) in enumerate(_records(file)):
        row = {
            "key": row_key(position, number),
            "source": f"{file.name}:{line}",
            "problem": "",
            "dropped": "",
            "changes": "",
            "task": name,
            "messages": [],
            "text": "",
            "group": "",
            "stratum": name,
            "synthetic": False,
            "extra": "{}",
        }
        try:
            if isinstance(record, RowError):
                raise record
            if config.task.type == "language_modeling":
                found = apply_filters([to_document(record)], False, config.data.filters)
                row["text"] = found.texts[0]
            else:
                messages = to_messages(record, source, task)
                messages, found = filter_messages(messages, config.data.filters)
                if found.changes and not found.dropped:
                    # A number that was masked leaves no valid JSON, for example.
                    check_answer(messages[-1].content, task)
                row["messages"] = [
                    {"role": message.role, "content": message.content}
                    for message in with_instruction(messages, task)
                ]
            row["dropped"], row["changes"] = found.dropped, ", ".join(found.changes)
            if split.group_by is not None:
                row["group"] = _told_by(record, split.group_by, "group_by")
            if split.stratify_by is not None:
                value = _told_by(record, split.stratify_by, "stratify_by")
                # No name of a task has a comma, so no two strata are called the same.
                row["stratum"] = f"{name}, {value}" if name else value
            row["synthetic"] = record.get("synthetic") is True
            # A row of a dataset artifact is made anew: its ids belong to another preparation.
            is_ours = record.keys() >= _MADE_BY_US
            reserved = RESERVED | {"task"} if name else RESERVED
            extra = {
                own_name(column, reserved): value
                for column, value in record.items()
                if column not in used
                and column != "synthetic"
                and not (is_ours and column in RESERVED)
            }
            if name:
                extra["task"] = name
            row["extra"] = json.dumps(extra, ensure_ascii=False, default=str)
            _refuse_lone_surrogates(row)
        except RowError as error:
            row |= {"messages": [], "group": "", "stratum": name, "extra": "{}"}
            row["problem"] = json.dumps(
                {**vars(error), "fatal": isinstance(error, FileError)}, ensure_ascii=False
            )
            raw = _raw(record, error)[:_KEPT_OF_BAD_ROW]
            row["text"] = raw.encode("utf-8", "replace").decode()
        yield row


def own_name(column: str, reserved: Set[str] = RESERVED) -> str:
    """Return the name under which a user's column is carried."""
    is_taken = column in reserved or column.startswith("#")
    return f"original_{column.removeprefix('#')}" if is_taken else column


def with_instruction(messages: list[Message], task: OneTaskConfig) -> list[Message]:
    """Return the messages with `task.instruction` as, or before, the system message."""
    instruction = task.instruction.strip()
    if not instruction:
        return messages
    if messages[0].role == "system":
        text = f"{instruction}\n\n{messages[0].content}"
        return [Message("system", text), *messages[1:]]
    return [Message("system", instruction), *messages]


def without_instruction(
    messages: list[dict[str, str]], task: OneTaskConfig
) -> list[dict[str, str]]:
    """Return what a row itself says: `with_instruction` undone, for comparing rows."""
    instruction = task.instruction.strip()
    if not instruction:
        return messages
    own = messages[0]["content"][len(instruction) :].strip()
    return [{"role": "system", "content": own}] * bool(own) + list(messages[1:])


def _records(file: SourceFile) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
    """Yield (line, row) of a file; a row that cannot be parsed is its error."""
    try:
        with file.open() as stream:
            if file.suffix in (".jsonl", ".ndjson"):
                yield from _json_lines(stream)
            elif file.suffix == ".json":
                yield from _json_array(stream)
            elif file.suffix in (".csv", ".tsv"):
                yield from _separated(stream, "\t" if file.suffix == ".tsv" else ",")
            elif file.suffix == ".parquet":
                yield from _parquet(stream)
            elif file.suffix == ".arrow":
                yield from _arrow(stream)
            elif file.suffix in DOCUMENTS:
                yield 1, {"text": stream.read().decode()}
    except UnicodeDecodeError as error:
        yield 1, FileError("the file is not UTF-8", got=f"byte {error.object[error.start]:#04x}")
    except OSError as error:
        yield 1, FileError("the file cannot be read", got=str(error))


def _json_lines(stream: Any) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
    for line, data in enumerate(io.BufferedReader(stream, 1 << 20), 1):
        if not data.strip():
            continue
        try:
            record = json.loads(data.removeprefix(b"\xef\xbb\xbf"))
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            yield line, RowError("the line is not UTF-8", got=f"byte {byte:#04x}")
        except ValueError as error:
            text = data.decode(errors="replace").rstrip("\n")
            got = f"{error}: {text if len(text) <= 80 else text[:77] + '…'}"
            yield line, RowError("the line is not valid JSON", got=got, allowed="one JSON object")
        else:
            yield line, _object(record)


def _json_array(stream: Any) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
    try:
        records = json.loads(stream.read())
    except UnicodeDecodeError:
        raise
    except ValueError as error:
        line = getattr(error, "lineno", 1)
        yield (
            line,
            FileError(
                "the file is not valid JSON",
                got=str(error),
                remedy="one object per line is `.jsonl`",
            ),
        )
        return
    if not isinstance(records, list):
        yield (
            1,
            FileError(
                "the file is not a list",
                got=type(records).__name__,
                allowed="a list of objects",
                remedy="one object per line is `.jsonl`",
            ),
        )
        return
    for number, record in enumerate(records, 1):
        yield number, _object(record)


def _separated(stream: Any, delimiter: str) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
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
            yield line, RowError("the line is not valid CSV", got=str(error))
            continue
        if not header:
            header = [name.strip() for name in values]
        elif len(values) == len(header):
            yield line, dict(zip(header, values, strict=True))
        elif values:
            yield (
                line,
                RowError(
                    "the row has another number of columns than the header",
                    got=str(len(values)),
                    allowed=str(len(header)),
                    remedy="put values with separators or line breaks in double quotes",
                ),
            )


def _parquet(stream: Any) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
    import pyarrow as pa
    from pyarrow import parquet

    number = 0
    try:
        # Parquet is read from its end: a stream that cannot seek is taken as a whole.
        seekable = stream if stream.seekable() else pa.BufferReader(stream.read())
        file = parquet.ParquetFile(seekable)
        classes = _class_names(file.schema_arrow)
        for batch in file.iter_batches(1024):
            for record in batch.to_pylist():
                number += 1
                yield number, _with_names(record, classes)
    except pa.ArrowInvalid as error:
        yield number + 1, FileError("the file is not valid Parquet", got=str(error))


def _arrow(stream: Any) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
    import pyarrow as pa

    number = 0
    try:
        reader = pa.ipc.open_stream(stream)
        classes = _class_names(reader.schema)
        for batch in reader:
            for record in batch.to_pylist():
                number += 1
                yield number, _with_names(record, classes)
    except pa.ArrowInvalid as error:
        yield number + 1, FileError("the file is not a valid Arrow stream", got=str(error))


def _class_names(schema: Any) -> dict[str, list[str]]:
    """Return the names of the classes that `datasets` keeps as numbers, by column."""
    described = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = described.get("info", {}).get("features", {})
    return {
        name: feature["names"]
        for name, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
    }


def _with_names(record: dict[str, Any], classes: Mapping[str, list[str]]) -> dict[str, Any]:
    for column, names in classes.items():
        number = record.get(column)
        if isinstance(number, int) and 0 <= number < len(names):  # -1 is a label that is missing
            record[column] = names[number]
    return record


def _object(record: Any) -> dict[str, Any] | RowError:
    if isinstance(record, dict):
        return record
    return RowError("the row is not an object", got=type(record).__name__, allowed="a JSON object")


def _told_by(record: Mapping[str, Any], column: str, key: str) -> str:
    if column not in record:
        raise missing_column(column, record, f"set data.split.{key} to a column of the rows")
    value = record[column]
    if value is None or value == "":
        raise RowError(f"`{column}` is empty, and data.split.{key} needs it")
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def _refuse_lone_surrogates(row: dict[str, Any]) -> None:
    """Raise RowError for half of a surrogate pair: JSON can escape one, but it is no text."""
    said = [row["text"], row["group"], row["extra"], *(m["content"] for m in row["messages"])]
    try:
        "".join(said).encode()
    except UnicodeEncodeError as error:
        raise RowError(
            "half of a surrogate pair stands alone",
            got=ascii(error.object[max(0, error.start - 20) : error.start + 20]),
            allowed="text that UTF-8 can hold",
            remedy="mend what wrote the row: it cut a character in two",
        ) from error


def _raw(record: dict[str, Any] | RowError, error: RowError) -> str:
    if isinstance(record, RowError):
        return error.got
    return json.dumps(record, ensure_ascii=False, default=str)
