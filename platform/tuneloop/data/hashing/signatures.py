"""What rows are compared by: normalised text, shingles and MinHash signatures.

A word is a run of letters, digits and underscores, case ignored; in a script that is written
without spaces (Han, kana, Thai, Lao, Burmese, Khmer) each letter is a word. The loops over bytes
are in `kernels`, compiled: a Python loop over words is what makes near-deduplication slow.

Legend: B rows, S shingles of all rows together, K signature values of a row.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
ComparedSide = Literal["both", "prompt", "completion"]
_MAX_SIGNATURE = 128
_TARGET_RECALL = 0.98
_WITHOUT_SPACES = [
    *((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF)),  # Thai and Lao, Burmese, Khmer
    *((0x3040, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF)),  # kana, Han
]


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
    """B texts as UTF-8.

    Args:
        data: The bytes, row after row.
        offsets: Shape (B + 1,); row i is `data[offsets[i]:offsets[i + 1]]`.
    """

    data: NDArray[np.uint8]
    offsets: NDArray[np.int64]

    @staticmethod
    def of(texts: Sequence[str]) -> Texts:
        """Return the texts; a lone surrogate, which UTF-8 cannot write, counts as `?`."""
        encoded = [text.encode("utf-8", "replace") for text in texts]
        offsets = np.zeros(len(encoded) + 1, dtype=np.int64)
        np.cumsum([len(item) for item in encoded], out=offsets[1:])
        return Texts(np.frombuffer(b"".join(encoded), dtype=np.uint8), offsets)

    @staticmethod
    def of_column(column: Any) -> Texts:
        """Return the texts of an Arrow column of strings, on the same memory where possible."""
        import pyarrow as pa

        # Cast before it is put together: a string array holds no more than 2 GB.
        large = column.cast(pa.large_string())
        array = one_array(large) if isinstance(large, pa.ChunkedArray) else large
        if array.null_count:
            array = array.fill_null("")
        _, offsets, data = array.buffers()
        # Copied, as the kernels are compiled once more for arrays that cannot be written.
        places = np.frombuffer(offsets, np.int64, len(array) + 1, array.offset * 8).copy()
        return Texts(np.frombuffer(data if data is not None else b"", np.uint8), places)


def one_array(column: Any) -> Any:
    """Return an Arrow column as one array, on the same memory where it is one already."""
    # `combine_chunks` copies a single chunk, too.
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def as_matrix(column: Any) -> Any:
    """Return an Arrow column of N lists of equal length as an array, shape (N, length)."""
    array = one_array(column)
    return array.flatten().to_numpy().reshape(len(array), array.type.list_size)


def normalised_hashes(texts: Texts) -> NDArray[np.int64]:
    """Return a 64-bit hash of each text without case and with single spaces. Shape (B,)."""
    from tuneloop.data.hashing import kernels

    keys: NDArray[np.int64] = kernels.text_keys(texts.data, texts.offsets, _letters()[1])
    return keys


def normalised_hash(text: str) -> int:
    """Return a signed 64-bit hash of the text without case and with single spaces."""
    return int(normalised_hashes(Texts.of([text]))[0])


@dataclass(frozen=True)
class Shingles:
    """The word n-grams of a batch of texts, as 64-bit hashes.

    Args:
        hashes: Shape (S,), row after row.
        offsets: Shape (B + 1,); row i has `hashes[offsets[i]:offsets[i + 1]]`.
    """

    hashes: Hashes
    offsets: NDArray[np.int64]

    def sets(self) -> list[Hashes]:
        """Return each row's distinct hashes, sorted."""
        return [np.unique(self.hashes[start:stop]) for start, stop in pairwise(self.offsets)]

    def in_order(self) -> Shingles:
        """Return the same with each row's hashes ascending; equal ones stay."""
        hashes = self.hashes.copy()
        for start, stop in pairwise(self.offsets.tolist()):
            hashes[start:stop].sort()
        return Shingles(hashes, self.offsets)


def shingles(texts: Sequence[str] | Texts, ngram_words: int) -> Shingles:
    """Return the hashed word n-grams of each text.

    A text with fewer than `ngram_words` words is one shingle of all of them; one without words has
    none.
    """
    from tuneloop.data.hashing import kernels

    given = texts if isinstance(texts, Texts) else Texts.of(texts)
    return Shingles(*kernels.shingle_hashes(given.data, given.offsets, ngram_words, _letters()[0]))


def word_counts(texts: Texts) -> NDArray[np.int64]:
    """Return the number of words in each text. Shape (B,)."""
    from tuneloop.data.hashing import kernels

    counts: NDArray[np.int64] = kernels.word_counts(texts.data, texts.offsets, _letters()[0])
    return counts


def bits_of(hashes: Hashes, per_hash: int) -> Hashes:
    """Return bits that tell most other hashes apart from these, for `marked_shingles`.

    Args:
        hashes: Distinct.
        per_hash: Least number of bits for each; one in so many other hashes is taken for one.
    """
    from tuneloop.data.hashing import kernels

    bits = np.zeros(1 << max(0, (len(hashes) * per_hash - 1).bit_length() - 6), np.uint64)
    kernels.mark(hashes, bits)
    return bits


def marked_shingles(texts: Texts, ngram_words: int, bits: Hashes) -> tuple[Shingles, Any]:
    """Return each text's distinct n-grams whose bit is set, ascending, and how many it has in all.

    The latter, shape (B,), is 0 for a text that has none of them.
    """
    from tuneloop.data.hashing import kernels

    hashes, starts, sizes = kernels.marked_shingles(
        texts.data, texts.offsets, ngram_words, bits, _letters()[0]
    )
    return Shingles(hashes, starts), sizes


def word_spans(text: str) -> NDArray[np.int64]:
    """Return start and stop of each word in the UTF-8 bytes of the text. Shape (words, 2)."""
    from tuneloop.data.hashing import kernels

    return np.stack(kernels.word_bounds(Texts.of([text]).data, _letters()[0]), axis=1)


def band_shape(threshold: float) -> tuple[int, int]:
    """Return (bands, rows per band) that find pairs at the threshold with probability 0.98.

    A pair of Jaccard similarity s shares a band of r rows with probability s^r, and at least
    one of b bands with 1 - (1 - s^r)^b. Of the shapes that reach 0.98 at the threshold with at
    most 128 values, the one with the longest bands proposes the fewest false candidates.

    Source: Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, section 3.4.
    """
    for rows in range(16, 0, -1):
        miss = 1 - threshold**rows
        bands = 1 if miss <= 0 else math.ceil(math.log(1 - _TARGET_RECALL) / math.log(miss))
        if bands * rows <= _MAX_SIGNATURE:
            return bands, rows
    return _MAX_SIGNATURE, 1


def band_hashes(texts: Sequence[str] | Texts, ngram_words: int, threshold: float) -> Hashes:
    """Return a hash for each row and band, shape (B, bands); rows without words have zeros."""
    from tuneloop.data.hashing import kernels

    given = texts if isinstance(texts, Texts) else Texts.of(texts)
    bands, rows = band_shape(threshold)
    shape, numbers = (ngram_words, bands, rows), _permutations(bands * rows)
    found: Hashes = kernels.band_hashes(given.data, given.offsets, shape, numbers, _letters()[0])
    return found


def jaccard(a: Hashes, b: Hashes) -> float:
    """Return the Jaccard similarity of two sorted arrays of distinct hashes."""
    if not len(a) or not len(b):
        return 0.0
    both = np.concatenate([a, b])
    both.sort(kind="stable")
    shared = int(np.count_nonzero(both[1:] == both[:-1]))
    return shared / (len(a) + len(b) - shared)


@lru_cache(maxsize=4)
def _permutations(count: int) -> Any:
    """Return odd multipliers and summands of hash functions mod 2^32, always the same."""
    generator = np.random.Generator(np.random.PCG64(20261122))
    numbers = generator.integers(0, 2**32, size=(2, count), dtype=np.uint32)
    numbers[0] |= np.uint32(1)
    return numbers


@lru_cache(maxsize=1)
def _letters() -> tuple[Any, Any]:
    """Return what each character of the Basic Multilingual Plane counts as: in a word, in a key.

    In a word it is its lower-case form, `kernels.ALONE` or more where it is a word of its own,
    and `kernels.SEPARATOR` where it is part of none. In a key white space is a space.
    """
    from tuneloop.data.hashing.kernels import ALONE, SEPARATOR

    # Characters beyond it count as letters and have no other case.
    in_word, in_key = np.zeros(0x10000, np.uint32), np.zeros(0x10000, np.uint32)
    for point in range(0x10000):
        letter = chr(point)
        form = next((f for f in (letter.casefold(), letter.lower()) if len(f) == 1), letter)
        is_word = letter == "_" or letter.isalnum() or unicodedata.category(letter)[0] == "M"
        in_word[point] = ord(form) if is_word else SEPARATOR
        in_key[point] = ord(" ") if letter.isspace() else ord(form)
    for first, last in _WITHOUT_SPACES:
        part = in_word[first : last + 1]
        part[part != SEPARATOR] += np.uint32(ALONE)
    return in_word, in_key
