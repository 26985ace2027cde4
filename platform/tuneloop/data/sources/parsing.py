"""What stands in a file, row by row: JSON, tables of text, Parquet, Arrow and documents.

A row's line is the line in JSONL, CSV and TSV, the position from 1 in JSON arrays, Parquet and
Arrow, and 1 for a plain text document. A class label of `datasets` is read as its name.
To add a file format: a function that yields its records, and its suffix in `_FORMATS`.
"""

from __future__ import annotations

import csv
import functools
import io
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
from pyarrow import parquet

from tuneloop.data.sources.dialect import (
    BYTE_ORDER_MARK,
    SAMPLE_BYTES,
    encoding_of,
    kind_of_bytes,
    separator_of,
)
from tuneloop.data.sources.files import DOCUMENTS, SourceFile
from tuneloop.data.sources.partitions import PartitionValue, other_value
from tuneloop.data.sources.row_errors import (
    FileError,
    ParseError,
    RepeatedKeyError,
    RowError,
    object_of,
)
from tuneloop.data.sources.values import python_values

# Types of files in which an object has a null for every name that other objects have.
ARROW = (".parquet", ".arrow")
# Of lists and objects in one another: what follows recurses.
_MOST_LEVELS = 100
_UTF8_MARK = b"\xef\xbb\xbf"
# An object of which one key would be lost is refused.
_DECODER = json.JSONDecoder(object_pairs_hook=object_of)
_SHOWN = 80
_TO_UTF8 = "save it as UTF-8, for example with `iconv -f WINDOWS-1252 -t UTF-8`"
_TOO_DEEP = "lists and objects are nested too deep"
_Batches = tuple[pa.Schema, Iterable[pa.RecordBatch]]


class Record(NamedTuple):
    """A row of a file and its line; a row that cannot be parsed is its error."""

    line: int
    content: dict[str, Any] | RowError


def read_records(file: SourceFile) -> Iterator[Record]:
    """Yield what stands in a file, row by row, with the columns that its folders name."""
    for record in _records(file):
        content = record.content
        if file.columns and not isinstance(content, RowError):
            name = other_value(content, file.columns)
            if name is not None:
                yield Record(record.line, _contradiction(name, content[name], file.columns[name]))
                return
            record = Record(record.line, {**content, **file.columns})
        yield record


def _contradiction(name: str, own: object, value: PartitionValue) -> FileError:
    return FileError(
        f"the folder is named for a column `{name}` that the file has with another value",
        got=f"{_shortened(str(own))} in a folder {name}={value}",
        allowed="the same value, or no such column in the file",
        remedy="rename the folder, or the column",
    )


def _records(file: SourceFile) -> Iterator[Record]:
    try:
        with file.open() as stream:
            reader = _FORMATS[file.suffix]
            if file.suffix in ARROW:
                yield from reader(stream)
                return
            buffered = io.BufferedReader(stream, 1 << 20)
            if kind := kind_of_bytes(buffered.peek(16)):
                yield Record(1, _not_text(kind, file.suffix))
                return
            yield from reader(buffered)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        got = f"byte {byte:#04x}"
        yield Record(1, FileError("the file is not UTF-8", got=got, remedy=_TO_UTF8))
    except FileNotFoundError as error:
        remedy = "put it where every node sees it, or send it with `tuneloop submit`"
        yield Record(1, FileError("the file cannot be read", got=str(error), remedy=remedy))
    except OSError as error:
        yield Record(1, FileError("the file cannot be read", got=str(error)))


def _not_text(kind: str, suffix: str) -> FileError:
    return FileError(
        f"the file is no text, as `{suffix}` says, but {kind}",
        allowed=f"text, also compressed and so named: {suffix}.gz, {suffix}.zst",
        remedy="give it the suffix of what it is, or save it as text",
    )


def _text_of(buffered: io.BufferedReader) -> io.TextIOWrapper:
    """Return a stream as text, by its byte-order mark or as UTF-8, with line ends as they are."""
    return io.TextIOWrapper(buffered, encoding_of(buffered.peek(8)), newline="")


def _document(stream: io.BufferedReader) -> Iterator[Record]:
    yield Record(1, {"text": _text_of(stream).read()})


def _json_lines(buffered: io.BufferedReader) -> Iterator[Record]:
    encoding = encoding_of(buffered.peek(8))
    if encoding == "utf-8-sig":
        yield from _parsed_lines(buffered)
    else:
        text = io.TextIOWrapper(buffered, encoding, newline="\n")
        yield from _parsed_lines(line.encode() for line in text)


def _parsed_lines(lines: Iterable[bytes]) -> Iterator[Record]:
    for line, data in enumerate(lines, 1):
        if not data.strip():
            continue
        try:
            text = data.removeprefix(_UTF8_MARK).decode("utf-8", "surrogatepass")
            record = _DECODER.decode(text)
        except RepeatedKeyError as error:
            yield Record(line, error)
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            got = f"byte {byte:#04x}"
            yield Record(line, ParseError("the line is not UTF-8", got=got, remedy=_TO_UTF8))
        except RecursionError:
            yield Record(line, _too_deep(data[:_SHOWN].decode(errors="replace")))
        except ValueError as error:
            text = data.decode(errors="replace").rstrip("\n")
            got = f"{error}: {_shortened(text)}"
            what, allowed = "the line is not valid JSON", "one JSON object, whole, on each line"
            yield Record(line, ParseError(what, got=got, allowed=allowed))
        else:
            # Most rows have too few brackets to be looked into.
            is_flat = data.count(b"[") + data.count(b"{") <= _MOST_LEVELS
            yield Record(line, _object(record, is_flat))


def _json_array(stream: io.BufferedReader) -> Iterator[Record]:
    data = _text_of(stream).read()
    try:
        records = _array(data)
    except RecursionError:
        yield Record(1, FileError(_TOO_DEEP, data[:_SHOWN], f"at most {_MOST_LEVELS} levels"))
        return
    except ValueError as error:
        lines = data.encode("utf-8", "replace").split(b"\n")
        if isinstance(_json_or_none(next((line for line in lines if line.strip()), b"")), dict):
            # As others write it: objects one after the other, called `.json`.
            yield from _parsed_lines(lines)
        elif data.lstrip().startswith("{"):
            yield from _one_after_the_other(data)
        else:
            remedy = "one object per line is `.jsonl`"
            problem = FileError("the file is not valid JSON", got=str(error), remedy=remedy)
            yield Record(getattr(error, "lineno", 1), problem)
        return
    if isinstance(records, dict):
        within = [key for key, value in records.items() if _is_rows(value)]
        if within:
            yield Record(1, _rows_within(within, records))
        else:
            yield Record(1, _object(records))
        return
    if not isinstance(records, list):
        got, allowed = type(records).__name__, "a list of objects"
        yield Record(1, FileError("the file is not a list", got, allowed))
        return
    for number, record in enumerate(records, 1):
        yield Record(number, _object(record))


def _is_rows(value: object) -> bool:
    """Return whether a value of a file's only object is rows, and no turns of one row."""
    return (
        isinstance(value, list)
        and len(value) > 1
        and all(isinstance(part, dict) and not {"role", "from"} & part.keys() for part in value)
    )


def _rows_within(keys: Sequence[str], content: Mapping[str, Any]) -> FileError:
    """Return the error of a file whose rows stand under a key."""
    told = ", ".join(f"`{key}` with {len(content[key]):,} objects" for key in keys)
    return FileError(
        "the file is one object, with rows under a key",
        got=told,
        allowed="a list of objects, or one object on each line of a `.jsonl`",
        remedy=f"write the rows alone, for example with `jq -c '.{keys[0]}[]'`",
    )


def _one_after_the_other(data: str) -> Iterator[Record]:
    """Yield objects that follow one another, each over some lines."""
    place, line, space = 0, 1, " \t\r\n"
    while place < len(data):
        if data[place] in space:
            line, place = line + (data[place] == "\n"), place + 1
            continue
        try:
            record, end = _DECODER.raw_decode(data, place)
        except RepeatedKeyError as error:
            end = json.JSONDecoder().raw_decode(data, place)[1]
            record = error
        except (ValueError, RecursionError) as error:
            got = f"{error}: {_shortened(data[place : place + _SHOWN])}"
            yield Record(line, FileError("the file is not valid JSON", got=got))
            return
        yield Record(line, _object(record))
        line, place = line + data.count("\n", place, end), end


def _array(data: str) -> Any:
    """Return what a file of JSON holds; a row that gives a key twice as its error."""
    try:
        return _DECODER.decode(data)
    except RepeatedKeyError:
        found = json.loads(data, object_pairs_hook=_object_or_error)
        if not isinstance(found, list):
            raise
        return [_error_in(record) or record for record in found]


def _object_or_error(pairs: list[tuple[str, Any]]) -> dict[str, Any] | RepeatedKeyError:
    try:
        return object_of(pairs)
    except RepeatedKeyError as error:
        return error


def _error_in(record: object) -> RepeatedKeyError | None:
    """Return the error that stands somewhere in a record in place of an object, if one does."""
    waiting = [record]
    while waiting:
        part = waiting.pop()
        if isinstance(part, RepeatedKeyError):
            return part
        if isinstance(part, dict | list):
            waiting += part.values() if isinstance(part, dict) else part
    return None


def _json_or_none(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _separated(buffered: io.BufferedReader, delimiter: str) -> Iterator[Record]:
    csv.field_size_limit(1 << 30)
    first = buffered.peek(SAMPLE_BYTES)[:SAMPLE_BYTES]
    encoding = encoding_of(first)
    dialect = separator_of(first.decode(encoding, "ignore"), delimiter)
    text = io.TextIOWrapper(buffered, encoding, newline="")
    lines = _Lines(itertools.islice(text, int(dialect.is_line), None))
    reader = csv.reader(lines, delimiter=dialect.separator, strict=True)
    written: list[str] = []
    header: list[str] = []
    while True:
        line = reader.line_num + 1 + dialect.is_line
        lines.taken.clear()
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield from _swallowed(line, lines.taken, "the line is not valid CSV", str(error))
            continue
        if not header:
            written = [name.strip() for name in values]
            if len(twice := [name for name, n in Counter(written).items() if name and n > 1]):
                yield Record(line, _same_name(twice))
                return
            header = _named(written)
        elif not any(values) and len(lines.taken) == 1:
            # Commas alone: an empty row of a spreadsheet.
            continue
        elif [value.removeprefix(BYTE_ORDER_MARK).strip() for value in values] == written:
            what, remedy = "the line repeats the header", "remove it: files were put together"
            yield Record(line, ParseError(what, got=", ".join(written), remedy=remedy))
        elif len(values) == len(header):
            yield Record(line, dict(zip(header, values, strict=True)))
        elif values:
            what = "the row has another number of columns than the header"
            got = f"{len(values)}, the header {len(header)}"
            yield from _swallowed(line, lines.taken, what, got)


class _Lines:
    """Lines of a text, which remembers those of the record at hand."""

    def __init__(self, lines: Iterable[str]) -> None:
        self.lines = iter(lines)
        self.taken: list[str] = []

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        self.taken.append(next(self.lines))
        return self.taken[-1]


def _swallowed(line: int, lines: Sequence[str], what: str, got: str) -> Iterator[Record]:
    """Yield an error for each line of a bad record: a quote left open takes rows with it."""
    remedy = "put values with separators or line breaks in double quotes, and double each quote"
    if len(lines) > 1:
        last = line + len(lines) - 1
        what = f"{what}, and a quote in it takes further lines along"
        remedy = f"close the quote that is opened in line {line:,}; it reaches to line {last:,}"
    for number, text in enumerate(lines):
        shown = _shortened(text.rstrip("\r\n"))
        yield Record(line + number, ParseError(what, got=f"{got}: {shown}", remedy=remedy))


def _named(header: Sequence[str]) -> list[str]:
    """Return the header with a name for each column that has none, as of an index of pandas."""
    names = []
    for number, name in enumerate(header, 1):
        own = name or f"column_{number}"
        while not name and own in header:
            own += "_"
        names.append(own)
    return names


def _same_name(twice: Sequence[str]) -> FileError:
    remedy = "rename one of them, or leave it out"
    return FileError("two columns have one name", got=", ".join(twice), remedy=remedy)


def _from_arrow(
    stream: pa.NativeFile, name: str, opened: Callable[[pa.NativeFile], _Batches]
) -> Iterator[Record]:
    number = 0
    try:
        for number, record in enumerate(_batch_rows(*opened(stream)), 1):
            yield Record(number, record)
    except FileError as error:
        yield Record(1, error)
    except pa.ArrowException as error:
        yield Record(number + 1, FileError(f"the file is not valid {name}", got=str(error)))


def _parquet_batches(stream: pa.NativeFile) -> _Batches:
    # Parquet is read from its end: a stream that cannot seek is read as a whole.
    file = parquet.ParquetFile(stream if stream.seekable() else pa.BufferReader(stream.read()))
    return file.schema_arrow, file.iter_batches(1024)


def _arrow_batches(stream: pa.NativeFile) -> _Batches:
    buffered = io.BufferedReader(stream, 1 << 20)
    if buffered.peek(6)[:6] != b"ARROW1":
        batches = pa.ipc.open_stream(buffered)
        return batches.schema, batches
    # With its index at the end, as Feather: read as a whole.
    file = pa.ipc.open_file(pa.BufferReader(buffered.read()))
    return file.schema, map(file.get_batch, range(file.num_record_batches))


def _batch_rows(schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> Iterator[dict[str, Any]]:
    """Yield the rows of batches, with the names of the classes that `datasets` keeps as numbers.

    Raises:
        FileError: Two columns have one name.
    """
    if twice := [name for name, number in Counter(schema.names).items() if number > 1]:
        raise _same_name(twice)
    described = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = described.get("info", {}).get("features", {})
    classes = {
        name: feature["names"]
        for name, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
    }
    for batch in batches:
        columns = [python_values(column) for column in batch.columns]
        for values in zip(*columns, strict=True):
            record = dict(zip(schema.names, values, strict=True))
            for column, names in classes.items():
                number = record.get(column)
                if isinstance(number, int):
                    # -1 is a label that is missing.
                    record[column] = names[number] if 0 <= number < len(names) else None
            yield record


def _object(record: object, is_flat: bool = False) -> dict[str, Any] | RowError:
    if isinstance(record, RowError):
        return record
    if isinstance(record, dict):
        is_fine = is_flat or not _is_too_deep(record)
        return record if is_fine else _too_deep(str(next(iter(record))))
    got = type(record).__name__
    return ParseError("the row is not an object", got=got, allowed="a JSON object")


def _is_too_deep(record: dict[str, Any]) -> bool:
    level: list[Any] = [record]
    for _ in range(_MOST_LEVELS):
        inner = [
            part for item in level for part in (item.values() if isinstance(item, dict) else item)
        ]
        level = [part for part in inner if isinstance(part, dict | list)]
        if not level:
            return False
    return True


def _too_deep(got: str) -> ParseError:
    return ParseError(_TOO_DEEP, got=_shortened(got), allowed=f"at most {_MOST_LEVELS} levels")


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "…"


_FORMATS: dict[str, Callable[[Any], Iterator[Record]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_array,
    ".csv": functools.partial(_separated, delimiter=","),
    ".tsv": functools.partial(_separated, delimiter="\t"),
    ".parquet": functools.partial(_from_arrow, name="Parquet", opened=_parquet_batches),
    ".arrow": functools.partial(_from_arrow, name="Arrow", opened=_arrow_batches),
    **dict.fromkeys(DOCUMENTS, _document),
}
