"""How a text file is written: its encoding, and the separator of its columns."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from typing import NamedTuple

from tuneloop.config import SourceConfig
from tuneloop.data.sources.bad_rows import first_places
from tuneloop.data.sources.files import DOCUMENTS, SourceFile, passed_over
from tuneloop.errors import Problem

BYTE_ORDER_MARK = "\ufeff"
_SEPARATORS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a vertical bar"}
_USUAL = {".csv": ",", ".tsv": "\t"}
_MARKS = {
    # The longer first: it begins with the shorter.
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
# How files begin that are no text, whatever their names say; no text begins so.
_BYTES = {
    rb"\x1f\x8b": "gzip",
    rb"\x28\xb5\x2f\xfd": "zstd",
    rb"BZh[1-9]1AY&SY": "bzip2",
    rb"\xfd7zXZ\x00": "xz",
    rb"PK\x03\x04": "a zip, as spreadsheets are",
    rb"PAR1\x15": "Parquet",
    rb"ARROW1\x00": "Arrow",
    rb"%PDF-\d": "PDF",
    rb"SQLite format 3\x00": "SQLite",
}
SAMPLE_BYTES = 1 << 16


class Dialect(NamedTuple):
    """How a table of text is separated.

    Args:
        is_line: The first line only names the separator, as Excel writes it: `sep=;`.
    """

    separator: str
    is_line: bool


def kind_of_bytes(first: bytes) -> str:
    """Return what a file that begins with some bytes is; empty if it may be text."""
    return next((kind for mark, kind in _BYTES.items() if re.match(mark, first)), "")


def encoding_of(first: bytes) -> str:
    """Return the encoding of a text that begins with some bytes: UTF-8 unless they say otherwise.

    Without a byte-order mark UTF-16 is known by the zeros in every second byte of plain letters.
    """
    for mark, encoding in _MARKS.items():
        if first.startswith(mark):
            return encoding
    pairs = first[:8]
    if len(pairs) == 8:
        if not any(pairs[1::2]) and all(pairs[::2]):
            return "utf-16-le"
        if not any(pairs[::2]) and all(pairs[1::2]):
            return "utf-16-be"
    return "utf-8-sig"


def separator_of(first: str, usual: str) -> Dialect:
    """Return how the columns of a table are separated, from its first record.

    Args:
        first: The table's beginning.
        usual: What is expected; another is taken only if this one leaves a single column.
    """
    if named := re.match(r'"?sep=(.)"?[ \t]*\r?\n', first, re.IGNORECASE):
        return Dialect(named.group(1), True)
    widths = {mark: _width(first, mark) for mark in _SEPARATORS}
    widest = max(widths, key=lambda mark: widths[mark])
    return Dialect(widest if widths[usual] < 2 <= widths[widest] else usual, False)


def _width(first: str, separator: str) -> int:
    """Return how many columns the first record has that is not empty."""
    records = csv.reader(io.StringIO(first, newline=""), delimiter=separator)
    try:
        return len(next((record for record in records if record), []))
    except csv.Error:
        return 0


def file_notices(files: Sequence[SourceFile], sources: Sequence[SourceConfig]) -> list[Problem]:
    """Return what is unusual in how text files are written, and which files are not read."""
    names: dict[str, list[str]] = {}
    for file in files:
        for what in _unusual(file):
            names.setdefault(what, []).append(file.name)
    remedy = "it is read so; nothing has to be done"
    notices = [Problem(what, first_places(own), remedy=remedy) for what, own in names.items()]
    if left := passed_over(sources):
        notices.append(
            Problem(
                f"{len(left):,} file{'s are' if len(left) > 1 else ' is'} passed over",
                where=first_places(left),
                got="hidden, in a hidden folder, behind a link to a folder, a description of the "
                "data, or of a kind that is not read",
                remedy="to read one, name it, or its folder, as a source",
            )
        )
    return notices


def _unusual(file: SourceFile) -> list[str]:
    """Return what is unusual in a text file; nothing of one that cannot be opened."""
    usual = _USUAL.get(file.suffix)
    if usual is None and file.suffix not in (".jsonl", ".ndjson", ".json", *DOCUMENTS):
        return []
    try:
        with file.open() as stream:
            first = stream.read(SAMPLE_BYTES)
        encoding = encoding_of(first)
        text = first.decode(encoding, "ignore")
    except OSError:
        return []
    if not text.strip() and len(first) < SAMPLE_BYTES:
        return ["the file is empty"]
    found = []
    if encoding != "utf-8-sig":
        found.append(f"the file is {encoding.upper()[:6]}")
    if usual is not None:
        separator = separator_of(text, usual).separator
        if separator != usual:
            found.append(f"the separator is {_SEPARATORS.get(separator, separator)}")
    return found
