"""Text columns as UTF-8 bytes and Arrow columns as arrays, without a Python object for a row."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
Indices = NDArray[np.int64]
ComparedSide = Literal["both", "prompt", "completion"]
_HALF_WIDTH_BYTES = (b"\xef\xbd", b"\xef\xbe")
_HALF_WIDTH_KANA = re.compile("[\uff65-\uff9f]+")


def compared_text(messages: Sequence[dict[str, str]], text: str, on: ComparedSide) -> str:
    """Return the part of a row that `data.dedup.on` compares; a document as it is."""
    if not messages:
        return text
    if on == "prompt":
        messages = messages[:-1]
    elif on == "completion":
        messages = messages[-1:]
    return "\n".join(message["content"] for message in messages)


@dataclass(frozen=True)
class Texts:
    """B texts as UTF-8, in Unicode's form NFC: two spellings of a letter are the same bytes.

    Args:
        data: The bytes, row after row.
        offsets: Shape (B + 1,); row i is `data[offsets[i]:offsets[i + 1]]`.
    """

    data: NDArray[np.uint8]
    offsets: Indices

    @staticmethod
    def of(texts: Sequence[str]) -> Texts:
        """Return the texts, composed; a lone surrogate, which UTF-8 cannot write, counts as `?`."""
        encoded = [_composed(text).encode("utf-8", "replace") for text in texts]
        offsets = np.zeros(len(encoded) + 1, dtype=np.int64)
        np.cumsum([len(item) for item in encoded], out=offsets[1:])
        return Texts(np.frombuffer(b"".join(encoded), dtype=np.uint8), offsets)

    @staticmethod
    def of_column(column: pa.Array | pa.ChunkedArray) -> Texts:
        """Return the texts of an Arrow column of strings, composed.

        They are on the same memory where possible.
        """
        # Cast before it is put together: a string array holds no more than 2 GB.
        large = column.cast(pa.large_string())
        array = one_array(large) if isinstance(large, pa.ChunkedArray) else large
        if array.null_count:
            array = array.fill_null("")
        array = _with_composed(array)
        _, offsets, data = array.buffers()
        # Copied, as the kernels are compiled once more for arrays that cannot be written.
        starts = np.frombuffer(offsets, np.int64, len(array) + 1, array.offset * 8).copy()
        return Texts(np.frombuffer(data if data is not None else b"", np.uint8), starts)


def _composed(text: str) -> str:
    """Return a text in Unicode's form NFC: a letter with its marks is one character."""
    if text.isascii():
        return text
    # Half-width kana compose only in their usual width. Most texts have none: bytes tell so faster.
    data = text.encode("utf-8", "replace")
    if any(start in data for start in _HALF_WIDTH_BYTES):
        text = _HALF_WIDTH_KANA.sub(lambda kana: unicodedata.normalize("NFKC", kana.group()), text)
    if unicodedata.is_normalized("NFC", text):
        return text
    return unicodedata.normalize("NFC", text)


def _with_composed(array: pa.Array) -> pa.Array:
    """Return strings with those composed that are not yet; the same array if all of them are."""
    changed: dict[int, str] = {}
    for place in np.flatnonzero(~pc.string_is_ascii(array).to_numpy(zero_copy_only=False)).tolist():
        text = array[place].as_py()
        if (composed := _composed(text)) != text:
            changed[place] = composed
    if not changed:
        return array
    is_changed = np.zeros(len(array), dtype=bool)
    is_changed[list(changed)] = True
    values = pa.array(changed.values(), pa.large_string())
    return pc.replace_with_mask(array, pa.array(is_changed), values)


def one_array(column: pa.ChunkedArray) -> pa.Array:
    """Return an Arrow column as one array, on the same memory where it is one already."""
    # `combine_chunks` copies a single chunk, too.
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def as_matrix(column: pa.ChunkedArray) -> NDArray[Any]:
    """Return an Arrow column of N lists of equal length as an array, shape (N, length)."""
    array = one_array(column)
    return array.flatten().to_numpy().reshape(len(array), array.type.list_size)
