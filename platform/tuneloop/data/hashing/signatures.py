"""What rows are compared by: normalised text, shingles and MinHash signatures.

A word is a run of letters, digits and underscores, case ignored; in a script that is written
without spaces (Han, kana, Thai, Lao, Burmese, Khmer) each letter is a word. Operators and signs
(`+ - * / % = < > & | ^ ~ # @ $` and the like) are part of the word that follows, so that `a + b`
differs from `a - b` and `-5` from `5` while a text has as many words as without them. Full-width
letters are the plain ones, and invisible characters are not there. The loops over bytes are in
`kernels`, compiled: a Python loop over words is what makes near-deduplication slow.

Legend: B rows, S shingles of all rows together, K signature values of a row.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tuneloop.data.hashing import kernels
from tuneloop.data.hashing.columns import Hashes, Indices, Texts

_MAX_SIGNATURE = 128
_TARGET_RECALL = 0.98
_ALIKE_OWN_PARTS = 0.6
# Own words in a row, from which they are no changes here and there.
_WORDS_OF_A_PLACE = 2
_WITHOUT_SPACES = [
    *((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF)),  # Thai and Lao, Burmese, Khmer
    *((0x3040, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF)),  # kana, Han
]
# Signs that change what a text says; mathematical and currency signs do, too.
_OPERATORS = frozenset("+-*/%=<>&|^~#@$\\")
# Variation selectors: how the character before is drawn.
_VARIATIONS = frozenset(map(chr, range(0xFE00, 0xFE10)))


def normalised_hashes(texts: Texts) -> Indices:
    """Return a 64-bit hash of each text without case and with single spaces. Shape (B,)."""
    keys: Indices = kernels.text_keys(texts.data, texts.offsets, _letters().in_key)
    return keys


@dataclass(frozen=True)
class Shingles:
    """The word n-grams of a batch of texts, as 64-bit hashes.

    Args:
        hashes: Shape (S,), row after row.
        offsets: Shape (B + 1,); row i has `hashes[offsets[i]:offsets[i + 1]]`.
    """

    hashes: Hashes
    offsets: Indices

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
    texts = texts if isinstance(texts, Texts) else Texts.of(texts)
    letters = _letters().in_word
    return Shingles(*kernels.shingle_hashes(texts.data, texts.offsets, ngram_words, letters))


def lowest_hashes(texts: Texts, ngram_words: int, number: int) -> Hashes:
    """Return the lowest hashes of each text's word n-grams; 0 for those that are missing.

    Texts that share most of their n-grams have one of them in common, nearly always: of 8 hashes
    where half are shared, in 99.6% of the cases. A text shorter than an n-gram has none.

    Returns:
        Shape (B, number), ascending.

    Source: Broder, "On the resemblance and containment of documents", 1997.
    """
    ngrams = shingles(texts, ngram_words)
    found: Hashes = kernels.lowest(ngrams.hashes, ngrams.offsets, number)
    found[word_counts(texts) < ngram_words] = 0
    return found


def word_counts(texts: Texts) -> Indices:
    """Return the number of words in each text. Shape (B,)."""
    counts: Indices = kernels.word_counts(texts.data, texts.offsets, _letters().in_word)
    return counts


def bloom_filter(hashes: Hashes, bits_per_hash: int) -> Hashes:
    """Return a Bloom filter with one hash function that holds these hashes, for `bloom_hits`.

    Args:
        hashes: Distinct hashes; their first bits say which bit each of them sets.
        bits_per_hash: Least size of the filter. One in so many other hashes is a false positive.

    Returns:
        2^k words of 64 bits.
    """
    words = np.zeros(1 << max(0, (len(hashes) * bits_per_hash - 1).bit_length() - 6), np.uint64)
    kernels.fill_bloom_filter(hashes, words)
    return words


class BloomHits(NamedTuple):
    """The shingles of B texts that a Bloom filter may hold.

    Args:
        shingles: Distinct for each text, ascending.
        num_distinct: All distinct shingles of each text, shape (B,); 0 for a text without a hit.
    """

    shingles: Shingles
    num_distinct: Indices


def bloom_hits(texts: Texts, ngram_words: int, bloom: Hashes) -> BloomHits:
    """Return the word n-grams of each text that a `bloom_filter` may hold."""
    hashes, starts, num_distinct = kernels.bloom_hits(
        texts.data, texts.offsets, ngram_words, bloom, _letters().in_word
    )
    return BloomHits(Shingles(hashes, starts), num_distinct)


def word_spans(text: str) -> Indices:
    """Return start and stop of each word in the UTF-8 bytes of the text. Shape (words, 2)."""
    return np.stack(kernels.word_bounds(Texts.of([text]).data, _letters().in_word), axis=1)


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
    texts = texts if isinstance(texts, Texts) else Texts.of(texts)
    bands, rows = band_shape(threshold)
    numbers, letters = _permutations(bands * rows), _letters().in_word
    hashes: Hashes = kernels.band_hashes(
        texts.data, texts.offsets, ngram_words, bands, numbers, letters
    )
    return hashes


def bands_of_own_parts(own: Shingles) -> Hashes:
    """Return a hash for each row and band, of own parts that are candidates when they overlap."""
    bands, rows = band_shape(_ALIKE_OWN_PARTS)
    hashes: Hashes = kernels.bands_of_shingles(
        own.hashes, own.offsets, bands, _permutations(bands * rows)
    )
    return hashes


class OwnParts(NamedTuple):
    """What B rows have that is not in many rows.

    Args:
        has_own: Whether a row has more of its own than changed words here and there. Shape (B,).
        shingles: The shingles that are not in many rows, of two words in a row or more.
    """

    has_own: NDArray[np.bool_]
    shingles: Shingles


def own_parts(rows: Shingles, num_rows: Indices, limits: Indices, ngram_words: int) -> OwnParts:
    """Return what rows have of their own.

    A template has places in which rows say something. A page that was copied often and changed a
    little looks alike: all but few of its shingles are in many rows. The difference is the length
    of what is between: a changed word leaves as many shingles as a shingle has words.

    Args:
        rows: Shingles of the rows, in the order of their words.
        num_rows: In how many rows each of these shingles is. Shape (S,).
        limits: The most rows that a row's own shingle is in. Shape (B,).
        ngram_words: Words of a shingle.
    """
    count = len(limits)
    row = np.repeat(np.arange(count), np.diff(rows.offsets))
    is_own = num_rows <= limits[row]
    is_new = np.ones(len(row), dtype=bool)
    is_new[1:] = (is_own[1:] != is_own[:-1]) | (row[1:] != row[:-1])
    starts = np.flatnonzero(is_new)
    stops = np.append(starts[1:], len(row))
    starts, lengths = starts[is_own[starts]], (stops - starts)[is_own[starts]]
    run_row = row[starts]
    at_edge = (starts == rows.offsets[run_row]) | (starts + lengths == rows.offsets[run_row + 1])
    num_words = np.maximum(0, lengths - np.where(at_edge, 0, ngram_words - 1))
    total = np.bincount(run_row, weights=num_words, minlength=count)
    num_runs = np.bincount(run_row, minlength=count)
    has_own = (num_runs > 0) & (total >= _WORDS_OF_A_PLACE * num_runs)
    has_own[run_row[num_words > ngram_words]] = True
    # Single words that differ are no part of a place.
    kept = np.repeat(num_words >= _WORDS_OF_A_PLACE, lengths)
    hashes, sizes = rows.hashes[is_own][kept], np.bincount(row[is_own][kept], minlength=count)
    return OwnParts(has_own, Shingles(hashes, np.concatenate([[0], np.cumsum(sizes)])))


def jaccard(a: Hashes, b: Hashes) -> float:
    """Return the Jaccard similarity of two sorted arrays of distinct hashes."""
    if not len(a) or not len(b):
        return 0.0
    both = np.concatenate([a, b])
    both.sort(kind="stable")
    shared = int(np.count_nonzero(both[1:] == both[:-1]))
    return shared / (len(a) + len(b) - shared)


@lru_cache(maxsize=4)
def _permutations(count: int) -> NDArray[np.uint32]:
    """Return odd multipliers and summands of hash functions mod 2^32, always the same."""
    generator = np.random.Generator(np.random.PCG64(20261122))
    numbers = generator.integers(0, 2**32, size=(2, count), dtype=np.uint32)
    numbers[0] |= np.uint32(1)
    return numbers


class _LetterTables(NamedTuple):
    """What each character of the Basic Multilingual Plane counts as; the index is its code point.

    Args:
        in_word: Its lower-case form, plus `kernels.ALONE` where it is a word of its own and
            `kernels.OPERATOR` where it counts with the word after it; `kernels.SEPARATOR` where it
            is part of no word.
        in_key: Its lower-case form; white space is a space. In both, `kernels.INVISIBLE` stands
            for a character that does not count.
    """

    in_word: NDArray[np.uint32]
    in_key: NDArray[np.uint32]


@lru_cache(maxsize=1)
def _letters() -> _LetterTables:
    # Characters beyond the plane count as letters and have no other case.
    in_word, in_key = np.zeros(0x10000, np.uint32), np.zeros(0x10000, np.uint32)
    for point in range(0x10000):
        letter = _plain(chr(point))
        category = unicodedata.category(letter)
        if category == "Cf" or letter in _VARIATIONS:
            in_word[point] = in_key[point] = kernels.INVISIBLE
            continue
        form = next((f for f in (letter.casefold(), letter.lower()) if len(f) == 1), letter)
        in_key[point] = ord(" ") if letter.isspace() else ord(form)
        if letter == "_" or letter.isalnum() or category[0] == "M":
            is_alone = any(first <= ord(letter) <= last for first, last in _WITHOUT_SPACES)
            in_word[point] = ord(form) + kernels.ALONE * is_alone
        elif letter in _OPERATORS or category in ("Sm", "Sc"):
            in_word[point] = ord(form) + kernels.OPERATOR
    return _LetterTables(in_word, in_key)


def _plain(letter: str) -> str:
    """Return the usual form of a full-width or half-width letter, and of a minus sign."""
    if letter == "\N{MINUS SIGN}":
        return "-"
    plain = unicodedata.normalize("NFKC", letter)
    is_width = unicodedata.decomposition(letter).startswith(("<wide>", "<narrow>"))
    return plain if is_width and len(plain) == 1 else letter
