"""What rows are compared by: normalised text, shingles and MinHash signatures.

Everything is computed on whole batches in numpy from the UTF-8 bytes; a Python loop over words
is what makes near-deduplication slow.

Legend: B rows, S shingles of all rows together, K signature values of a row.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
ComparedSide = Literal["both", "prompt", "completion"]
_WORD_BASE = np.uint64(0x100000001B3)
_WORD_BASE_INVERSE = np.uint64(pow(0x100000001B3, -1, 2**64))
_SHINGLE_BASE = np.uint64(0x9E3779B97F4A7C15)
_IS_WORD = np.zeros(256, dtype=bool)
_IS_WORD[[*range(ord("0"), ord("9") + 1), *range(ord("a"), ord("z") + 1), ord("_")]] = True
_IS_WORD[128:] = True  # bytes of letters outside ASCII
_MAX_SIGNATURE = 128
_TARGET_RECALL = 0.98


def compared_text(messages: Sequence[dict[str, str]], text: str, on: ComparedSide) -> str:
    """Return the part of a row that `data.dedup.on` compares; a document as it is."""
    if not messages:
        return text
    if on == "prompt":
        messages = messages[:-1]
    elif on == "completion":
        messages = messages[-1:]
    return "\n".join(message["content"] for message in messages)


def normalised_hash(text: str) -> int:
    """Return a signed 64-bit hash of the text without case and with single spaces."""
    normalised = " ".join(text.casefold().split())
    digest = hashlib.blake2b(normalised.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


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
        return [
            np.unique(self.hashes[start:stop])
            for start, stop in zip(self.offsets[:-1], self.offsets[1:], strict=True)
        ]


def shingles(texts: Sequence[str], ngram_words: int) -> Shingles:
    """Return the hashed word n-grams of each text.

    A word is a run of letters, digits and underscores, case ignored. A text with fewer than
    `ngram_words` words is one shingle of all of them; one without words has none.
    """
    # A separator between texts, so that no word spans two of them.
    encoded = [text.lower().encode("utf-8", "replace") + b"\n" for text in texts]
    data = np.frombuffer(b"".join(encoded), dtype=np.uint8)
    ends = np.cumsum([len(item) for item in encoded], dtype=np.int64)
    words, starts = _word_hashes(data)
    first_word = np.searchsorted(starts, np.concatenate([[0], ends]))
    num_words = np.diff(first_word)
    # Each word starts an n-gram unless its text ends too soon; a short text has one, cut short.
    num_shingles = np.where(
        num_words >= ngram_words, num_words - ngram_words + 1, (num_words > 0).astype(np.int64)
    )
    offsets = np.concatenate([[0], np.cumsum(num_shingles)])
    owner = np.repeat(np.arange(len(texts)), num_shingles)
    begin = np.arange(offsets[-1]) - offsets[owner] + first_word[owner]
    length = np.minimum(ngram_words, num_words[owner])
    hashes = np.zeros(len(begin), dtype=np.uint64)
    for position in range(ngram_words):
        inside = position < length
        term = words[np.where(inside, begin + position, 0)] if len(words) else hashes
        hashes = np.where(inside, hashes * _SHINGLE_BASE + term, hashes)
    return Shingles(_mixed(hashes), offsets)


def word_spans(text: str) -> list[tuple[int, int]]:
    """Return (start, stop) of each word in the UTF-8 bytes of the lower-case text."""
    starts, stops = _word_bounds(np.frombuffer(text.lower().encode("utf-8", "replace"), np.uint8))
    return list(zip(starts.tolist(), stops.tolist(), strict=True))


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


def band_hashes(found: Shingles, threshold: float) -> Hashes:
    """Return a hash for each row and band, shape (B, bands); rows without shingles have zeros."""
    bands, rows = band_shape(threshold)
    num_texts = len(found.offsets) - 1
    result = np.zeros((num_texts, bands), dtype=np.uint64)
    filled = np.flatnonzero(np.diff(found.offsets))
    if not len(filled):
        return result
    starts = found.offsets[:-1][filled]
    multipliers, summands = _permutations(bands * rows)
    band = np.zeros(len(filled), dtype=np.uint64)
    for index in range(bands * rows):
        values = found.hashes * multipliers[index]
        values += summands[index]
        values >>= np.uint64(32)
        minima = np.minimum.reduceat(values, starts)
        band = _mixed(band * _SHINGLE_BASE + minima + np.uint64(index + 1))
        if (index + 1) % rows == 0:
            # Zero means "no shingles"; a real hash of zero would be a 2^-64 accident.
            result[filled, index // rows] = band
            band = np.zeros(len(filled), dtype=np.uint64)
    return result


def jaccard(a: Hashes, b: Hashes) -> float:
    """Return the Jaccard similarity of two sorted arrays of distinct hashes."""
    if not len(a) or not len(b):
        return 0.0
    both = np.concatenate([a, b])
    both.sort(kind="stable")
    shared = int(np.count_nonzero(both[1:] == both[:-1]))
    return shared / (len(a) + len(b) - shared)


def _word_hashes(data: NDArray[np.uint8]) -> tuple[Hashes, NDArray[np.int64]]:
    """Return hash and start of each word in the bytes, in order."""
    starts, stops = _word_bounds(data)
    if not len(starts):
        return np.zeros(0, dtype=np.uint64), starts
    # A polynomial in the bytes (mod 2^64) by differences of running sums. The byte at place i
    # counts with the i-th power of a base; the inverse powers take the word's place out again.
    powers = np.full(len(data), _WORD_BASE, dtype=np.uint64)
    powers[0] = 1
    np.multiply.accumulate(powers, out=powers)
    powers *= data
    sums = np.zeros(len(data) + 1, dtype=np.uint64)
    np.cumsum(powers, out=sums[1:])
    inverses = np.full(len(data), _WORD_BASE_INVERSE, dtype=np.uint64)
    inverses[0] = 1
    np.multiply.accumulate(inverses, out=inverses)
    words = (sums[stops] - sums[starts]) * inverses[starts]
    return _mixed(words ^ (stops - starts).astype(np.uint64)), starts


def _word_bounds(data: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where words start and where they stop."""
    inside = np.zeros(len(data) + 2, dtype=bool)
    inside[1:-1] = _IS_WORD[data]
    edges = np.flatnonzero(inside[1:] != inside[:-1])
    return edges[::2], edges[1::2]


@lru_cache(maxsize=4)
def _permutations(count: int) -> tuple[Any, Any]:
    """Return odd multipliers and summands of universal hash functions, always the same."""
    generator = np.random.Generator(np.random.PCG64(20261122))
    numbers = generator.integers(0, 2**64, size=(2, count), dtype=np.uint64)
    return numbers[0] | np.uint64(1), numbers[1]


def _mixed(values: Hashes) -> Hashes:
    """Return SplitMix64's finaliser of each value: every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    result: Hashes = values ^ (values >> np.uint64(31))
    return result
