"""Compiled loops over bytes and hashes: no Python object for a row, a word or a shingle.

Texts are UTF-8 bytes, row after row: row i is `data[offsets[i]:offsets[i + 1]]`. Everything here is
compiled by numba at its first call and kept on disk beside this file (or in numba's own cache
where that cannot be written). `signatures` says what words and hashes mean.

Legend: B rows, S shingles of all rows together, K MinHash values of a row, P pairs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Integers = NDArray[np.int64]
Hashes = NDArray[np.uint64]
Letters = NDArray[np.uint32]

# Values of a letter table: part of no word; a word of its own; an operator, which counts with the
# word after it; a character that is not there at all. 32 is white space in a text's key.
SEPARATOR, ALONE, OPERATOR, INVISIBLE = 0, 1 << 24, 1 << 25, 1 << 26
_SPACE = 32
_CHUNK_WORDS = 256
# Two answers say nearly the same from this Jaccard similarity of their pairs of words; two rows
# from this share of what is the own part of the one with less of it.
_ALIKE_ANSWERS, _ALIKE_OWN = 0.8, 0.5
_FNV_PRIME = np.uint64(0x100000001B3)
_FNV_START = np.uint64(0xCBF29CE484222325)
_SHINGLE_BASE = np.uint64(0x9E3779B97F4A7C15)
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_MIX_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))
_HALF = np.uint64(32)
# A bit's number says which word of 64 bits it is in, and where in that word.
_WORD, _IN_WORD = np.uint64(6), np.uint64(63)


class Span(NamedTuple):
    """Bytes from `start` up to `stop`."""

    start: int
    stop: int


@njit(cache=True)
def mixed(value: np.uint64) -> np.uint64:
    """Return SplitMix64's finaliser: every input bit reaches every output bit."""
    value = (value ^ (value >> _MIX_SHIFTS[0])) * _MIX[0]
    value = (value ^ (value >> _MIX_SHIFTS[1])) * _MIX[1]
    return value ^ (value >> _MIX_SHIFTS[2])


@njit(cache=True)
def _letter(data: Bytes, at: int) -> Any:
    """Return (code point, bytes) of the character at an offset in valid UTF-8."""
    first = np.int64(data[at])
    if first < 0x80:
        return first, 1
    if first < 0xE0:
        return (first & 0x1F) << 6 | np.int64(data[at + 1] & 0x3F), 2
    second, third = np.int64(data[at + 1] & 0x3F), np.int64(data[at + 2] & 0x3F)
    if first < 0xF0:
        return (first & 0x0F) << 12 | second << 6 | third, 3
    return (first & 0x07) << 18 | second << 12 | third << 6 | np.int64(data[at + 3] & 0x3F), 4


@njit(cache=True)
def _next_words(
    data: Bytes, span: Span, words: Hashes, count: int, letters: Letters
) -> tuple[int, int]:
    """Put hashes of words into `words[count:]` until it is full or the bytes of `span` end.

    Returns:
        The offset after the last word, and the new count.
    """
    at, stop = span
    table_size = len(letters)
    value, has_operator = _FNV_START, False
    while at < stop and count < len(words):
        point, width = _letter(data, at)
        letter = np.int64(letters[point]) if point < table_size else point
        at += width
        if letter in (SEPARATOR, INVISIBLE):
            continue
        value = (value ^ np.uint64(letter)) * _FNV_PRIME
        if letter >= OPERATOR:
            has_operator = True
            continue
        while letter < ALONE and at < stop:
            point, width = _letter(data, at)
            letter = np.int64(letters[point]) if point < table_size else point
            if letter == SEPARATOR or letter >= ALONE:
                if letter != INVISIBLE:
                    break
                letter = np.int64(0)
                at += width
                continue
            value = (value ^ np.uint64(letter)) * _FNV_PRIME
            at += width
        words[count] = mixed(value)
        count += 1
        value, has_operator = _FNV_START, False
    if has_operator:  # at the end of a text, with no word after them
        words[count] = mixed(value)
        count += 1
    return at, count


@njit(cache=True)
def _next_shingles(
    data: Bytes, span: Span, words: Hashes, carried: int, chunk: Hashes, letters: Letters
) -> tuple[int, int, int]:
    """Put hashes of the next shingles into `chunk`.

    `words` is as much longer than `chunk` as a shingle is longer than a word: it starts with the
    `carried` last words of the call before.

    Returns:
        The offset to go on from, how many words are carried on, and the number of shingles.
    """
    length = len(words) - len(chunk) + 1
    at, count = _next_words(data, span, words, carried, letters)
    number = count - length + 1
    if number <= 0:
        return at, count, 0
    for start in range(number):
        chunk[start] = _shingle(words, start, length)
    for place in range(length - 1):
        words[place] = words[number + place]
    return at, length - 1, number


@njit(cache=True)
def _shingle(words: Hashes, start: int, length: int) -> np.uint64:
    value = np.uint64(0)
    for place in range(start, start + length):
        value = value * _SHINGLE_BASE + words[place]
    return mixed(value)


@njit(cache=True)
def shingle_hashes(
    data: Bytes, offsets: Integers, length: int, letters: Letters
) -> tuple[Hashes, Integers]:
    """Return the hashes of all shingles, shape (S,), and where each row's start, shape (B + 1,)."""
    starts = np.zeros(len(offsets), np.int64)
    words, chunk = np.empty(_CHUNK_WORDS + length - 1, np.uint64), np.empty(_CHUNK_WORDS, np.uint64)
    for row in range(len(offsets) - 1):
        number = count_words(data, offsets[row], offsets[row + 1], letters)
        starts[row + 1] = starts[row] + max(number - length + 1, min(number, 1))
    hashes = np.empty(starts[-1], np.uint64)
    for row in range(len(offsets) - 1):
        at, stop, place, carried = offsets[row], offsets[row + 1], starts[row], 0
        while place < starts[row + 1]:
            at, carried, number = _next_shingles(
                data, Span(at, stop), words, carried, chunk, letters
            )
            if number == 0:  # a text shorter than a shingle
                chunk[0], number = _shingle(words, 0, carried), 1
            hashes[place : place + number] = chunk[:number]
            place += number
    return hashes, starts


@njit(cache=True)
def lowest(hashes: Hashes, offsets: Integers, number: int) -> Hashes:
    """Return the lowest distinct hashes of each row, ascending, 0 after them. Shape (B, number)."""
    found = np.zeros((len(offsets) - 1, number), np.uint64)
    for row in range(len(offsets) - 1):
        kept = 0
        for value in hashes[offsets[row] : offsets[row + 1]]:
            if kept == number and value >= found[row, kept - 1]:
                continue
            place = 0
            while place < kept and found[row, place] < value:
                place += 1
            if place < kept and found[row, place] == value:
                continue
            kept = min(kept + 1, number)
            for at in range(kept - 1, place, -1):
                found[row, at] = found[row, at - 1]
            found[row, place] = value
    return found


@njit(cache=True)
def fill_bloom_filter(hashes: Hashes, bloom: Hashes) -> None:
    """Set the bit of each hash, numbered by its first bits, in a filter of 2^k words of 64 bits."""
    shift = _bit_shift(bloom)
    for value in hashes:
        bit = value >> shift
        bloom[bit >> _WORD] |= np.uint64(1) << (bit & _IN_WORD)


@njit(cache=True)
def _bit_shift(bloom: Hashes) -> np.uint64:
    size, shift = len(bloom), 58
    while size > 1:
        size >>= 1
        shift -= 1
    return np.uint64(shift)


@njit(cache=True)
def _may_hold(bloom: Hashes, bit: np.uint64) -> Any:
    return bloom[bit >> _WORD] >> (bit & _IN_WORD) & np.uint64(1)


@njit(cache=True)
def bloom_hits(
    data: Bytes, offsets: Integers, length: int, bloom: Hashes, letters: Letters
) -> tuple[Hashes, Integers, Integers]:
    """Return the distinct shingles of each row that a Bloom filter may hold, ascending.

    Returns:
        The hashes, row after row, shape (F,); where each row's start, shape (B + 1,); and how many
        distinct shingles each row has that has one of them, else 0, shape (B,).
    """
    shift = _bit_shift(bloom)
    starts, sizes = np.zeros(len(offsets), np.int64), np.zeros(len(offsets) - 1, np.int64)
    hits, count, bounds = np.empty(1024, np.uint64), 0, np.zeros(2, np.int64)
    for row in range(len(offsets) - 1):
        bounds[1] = offsets[row + 1] - offsets[row]
        hashes, _ = shingle_hashes(data[offsets[row] : offsets[row + 1]], bounds, length, letters)
        has_hit: Any = False
        for value in hashes:
            if _may_hold(bloom, value >> shift):
                has_hit = True
                break
        if has_hit:
            hashes.sort()
            for place in range(len(hashes)):
                value = hashes[place]
                if place and value == hashes[place - 1]:
                    continue
                sizes[row] += 1
                if _may_hold(bloom, value >> shift):
                    if count == len(hits):
                        more = np.empty(2 * count, np.uint64)
                        more[:count] = hits
                        hits = more
                    hits[count] = value
                    count += 1
        starts[row + 1] = count
    return hits[:count], starts, sizes


@njit(cache=True)
def word_counts(data: Bytes, offsets: Integers, letters: Letters) -> Integers:
    """Return the number of words in each row. Shape (B,)."""
    counts = np.empty(len(offsets) - 1, np.int64)
    for row in range(len(counts)):
        counts[row] = count_words(data, offsets[row], offsets[row + 1], letters)
    return counts


@njit(cache=True)
def count_words(data: Bytes, at: int, stop: int, letters: Letters) -> int:
    """Return the number of words between two offsets."""
    table_size = len(letters)
    count: Any = 0
    inside: Any = False
    has_operator: Any = False
    while at < stop:
        point, width = _letter(data, at)
        letter = np.int64(letters[point]) if point < table_size else point
        at += width
        if letter == INVISIBLE:
            continue
        if letter >= OPERATOR:
            has_operator, inside = True, False
            continue
        starts = letter != SEPARATOR and not inside
        inside = letter != SEPARATOR and letter < ALONE
        if starts or letter >= ALONE:
            count += 1
            has_operator = False
    return count + has_operator


@njit(cache=True)
def word_bounds(data: Bytes, letters: Letters) -> tuple[Integers, Integers]:
    """Return where the words of one text start and stop, in bytes."""
    number = count_words(data, 0, len(data), letters)
    starts, stops = np.empty(number, np.int64), np.empty(number, np.int64)
    one, at = np.empty(1, np.uint64), 0
    for word in range(number):
        before = at
        at, _ = _next_words(data, Span(at, len(data)), one, 0, letters)
        stops[word] = at
        while True:
            point, width = _letter(data, before)
            if point >= len(letters) or letters[point] not in (SEPARATOR, INVISIBLE):
                break
            before += width
        starts[word] = before
    return starts, stops


@njit(cache=True)
def band_hashes(
    data: Bytes,
    offsets: Integers,
    length: int,
    num_bands: int,
    numbers: NDArray[np.uint32],
    letters: Letters,
) -> Hashes:
    """Return a hash for each row and band, shape (B, bands); zeros for rows without words.

    Nothing is kept of a row but its K minima, however long it is.

    Args:
        data: Bytes of all rows.
        offsets: Shape (B + 1,).
        length: Words of a shingle.
        num_bands: Bands of a row, K // num_bands MinHash values in each.
        numbers: Odd multipliers and summands, shape (2, K).
        letters: What each character counts as in a word.
    """
    num_rows = numbers.shape[1] // num_bands
    words, chunk = np.empty(_CHUNK_WORDS + length - 1, np.uint64), np.empty(_CHUNK_WORDS, np.uint64)
    short = np.empty(_CHUNK_WORDS, np.uint32)
    minima = np.empty(num_bands * num_rows, np.uint32)
    result = np.zeros((len(offsets) - 1, num_bands), np.uint64)
    for row in range(len(offsets) - 1):
        minima[:] = np.uint32(0xFFFFFFFF)
        at, stop, carried, any_found = offsets[row], offsets[row + 1], 0, False
        while True:
            at, carried, number = _next_shingles(
                data, Span(at, stop), words, carried, chunk, letters
            )
            if number == 0 and carried and not any_found:
                chunk[0], number = _shingle(words, 0, carried), 1
            if number == 0:
                break
            any_found = True
            for place in range(number):
                short[place] = np.uint32(chunk[place] >> _HALF)
            _lower(minima, short[:number], numbers)
        if not any_found:
            continue
        _bands_of(minima, result[row])
    return result


@njit(cache=True)
def bands_of_shingles(
    hashes: Hashes, offsets: Integers, num_bands: int, numbers: NDArray[np.uint32]
) -> Hashes:
    """Return what `band_hashes` returns, of rows whose shingles are given row after row."""
    result = np.zeros((len(offsets) - 1, num_bands), np.uint64)
    minima = np.empty(numbers.shape[1], np.uint32)
    for row in range(len(offsets) - 1):
        if offsets[row] == offsets[row + 1]:
            continue
        minima[:] = np.uint32(0xFFFFFFFF)
        short = np.empty(offsets[row + 1] - offsets[row], np.uint32)
        for place in range(len(short)):
            short[place] = np.uint32(hashes[offsets[row] + place] >> _HALF)
        _lower(minima, short, numbers)
        _bands_of(minima, result[row])
    return result


@njit(cache=True)
def _bands_of(minima: NDArray[np.uint32], bands: Hashes) -> None:
    """Put the hash of each band of minima into `bands`."""
    num_rows = len(minima) // len(bands)
    for band in range(len(bands)):
        value = np.uint64(band + 1)
        for index in range(band * num_rows, (band + 1) * num_rows):
            value = mixed(value * _SHINGLE_BASE + np.uint64(minima[index]))
        # Zero means "no shingles"; a real hash of zero would be a 2^-64 accident.
        bands[band] = value


@njit(cache=True)
def _lower(
    minima: NDArray[np.uint32], values: NDArray[np.uint32], numbers: NDArray[np.uint32]
) -> None:
    """Lower each minimum to the least of its linear function (mod 2^32) over the values."""
    for index in range(len(minima)):
        multiplier, summand, least = numbers[0, index], numbers[1, index], minima[index]
        for place in range(len(values)):
            least = min(least, np.uint32(values[place] * multiplier + summand))
        minima[index] = least


@njit(cache=True)
def text_keys(data: Bytes, offsets: Integers, letters: Letters) -> Integers:
    """Return a hash of each text without case and with single spaces. Shape (B,)."""
    table_size = len(letters)
    result = np.empty(len(offsets) - 1, np.int64)
    for row in range(len(offsets) - 1):
        value, started, space = _FNV_START, False, False
        at = offsets[row]
        while at < offsets[row + 1]:
            point, width = _letter(data, at)
            letter = np.int64(letters[point]) if point < table_size else point
            at += width
            if letter == INVISIBLE:
                continue
            if letter == _SPACE:
                space = started
                continue
            if space:
                value = (value ^ np.uint64(_SPACE)) * _FNV_PRIME
            value = (value ^ np.uint64(letter)) * _FNV_PRIME
            started, space = True, False
        result[row] = np.int64(mixed(value))
    return result


@njit(cache=True)
def similarity(values: Hashes, offsets: Integers, a: int, b: int) -> float:
    """Return the Jaccard similarity of two rows' sorted hashes, which may repeat."""
    shared, only_a, only_b = _compared(values, offsets, a, b)
    return shared / max(1, shared + only_a + only_b)


@njit(cache=True)
def _overlap(values: Hashes, offsets: Integers, a: int, b: int) -> float:
    """Return which share of the row with fewer distinct hashes the other row has."""
    shared, only_a, only_b = _compared(values, offsets, a, b)
    return shared / max(1, shared + min(only_a, only_b))


@njit(cache=True)
def _compared(values: Hashes, offsets: Integers, a: int, b: int) -> tuple[int, int, int]:
    """Return how many distinct hashes both rows have, only the first, and only the second."""
    left, right = offsets[a], offsets[b]
    left_stop, right_stop = offsets[a + 1], offsets[b + 1]
    shared, only_a, only_b = 0, 0, 0
    while left < left_stop or right < right_stop:
        if right == right_stop or (left < left_stop and values[left] < values[right]):
            value = values[left]
            only_a += 1
        else:
            value = values[right]
            if left < left_stop and values[left] == value:
                shared += 1
            else:
                only_b += 1
        while left < left_stop and values[left] == value:
            left += 1
        while right < right_stop and values[right] == value:
            right += 1
    return shared, only_a, only_b


@njit(cache=True)
def _root(parents: Integers, node: int) -> int:
    while parents[node] != node:
        parents[node] = parents[parents[node]]
        node = parents[node]
    return node


class OwnParts(NamedTuple):
    """What rows have of their own, where many rows share a part. B rows.

    Args:
        kinds: `WHOLE` for rows that are compared as a whole, `NOTHING_OWN`, `OWN`. Shape (B,).
        values: Sorted hashes of the shingles of each row's own part, row after row.
        offsets: Shape (B + 1,).
    """

    kinds: NDArray[np.int8]
    values: Hashes
    offsets: Integers


class Answers(NamedTuple):
    """What is compared of the answers of B rows.

    Args:
        keys: Equal for answers that differ in noise only. Shape (B,).
        signs: Equal for answers that may differ a little; negative for one that may not. Shape
            (B,).
        values: Sorted hashes of each answer's pairs of words, row after row.
        offsets: Shape (B + 1,).
    """

    keys: Integers
    signs: Integers
    values: Hashes
    offsets: Integers


WHOLE, NOTHING_OWN, OWN = 0, 1, 2


@njit(cache=True)
def _same_answer(answers: Answers, a: int, b: int) -> Any:
    if answers.keys[a] == answers.keys[b]:
        return True
    if answers.signs[a] < 0 or answers.signs[a] != answers.signs[b]:
        return False
    return similarity(answers.values, answers.offsets, a, b) >= _ALIKE_ANSWERS


@njit(cache=True)
def _likeness(
    values: Hashes, offsets: Integers, own: OwnParts, answers: Answers, a: int, b: int
) -> float:
    """Return the Jaccard similarity of two rows; 0 if only what many rows share is alike."""
    if own.kinds[a] != WHOLE and own.kinds[b] != WHOLE:
        if own.kinds[a] != own.kinds[b]:
            return 0.0
        if own.kinds[a] == NOTHING_OWN and not _same_answer(answers, a, b):
            return 0.0
        if own.kinds[a] == OWN and _overlap(own.values, own.offsets, a, b) < _ALIKE_OWN:
            return 0.0
    return similarity(values, offsets, a, b)


@njit(cache=True)
def resolve_group(
    values: Hashes,
    offsets: Integers,
    own: OwnParts,
    answers: Answers,
    pairs: Integers,
    scopes: Integers,
    threshold: float,
) -> tuple[Integers, Integers, NDArray[np.float64]]:
    """Return root, keeper and similarity of rows in the order of preference. Shape (B,) each.

    Rows linked by similar pairs have the first of them as root. Among those a row is removed only
    if a row of its scope with its answer that stays is similar enough itself: in a chain a-b-c with
    a unlike c, b is removed in favour of a, and c stays. The most similar one is the keeper, the
    first of equally similar ones.

    Args:
        values: Sorted hashes of each row's shingles, row after row.
        offsets: Shape (B + 1,).
        own: What rows have of their own.
        answers: Their answers.
        pairs: Candidates, shape (P, 2).
        scopes: Shape (B,). A row is never removed in favour of one of another scope.
        threshold: Least similarity of duplicates.
    """
    number = len(offsets) - 1
    roots, keepers = np.arange(number), np.arange(number)
    similarities = np.ones(number, np.float64)
    for pair in range(len(pairs)):
        first, second = pairs[pair, 0], pairs[pair, 1]
        if _likeness(values, offsets, own, answers, first, second) >= threshold:
            a, b = _root(roots, first), _root(roots, second)
            roots[max(a, b)] = min(a, b)
    # Those that stay, as a list for each root: the one after each, and the last one.
    following, last = np.full(number, -1), np.arange(number)
    for row in range(number):
        root = _root(roots, row)
        roots[row] = root
        if root == row:
            continue
        best, keeper, other = 0.0, -1, root
        while other >= 0:
            if scopes[other] == scopes[row] and _same_answer(answers, other, row):
                value = _likeness(values, offsets, own, answers, other, row)
                if value > best:
                    best, keeper = value, other
            other = following[other]
        if keeper >= 0 and best >= threshold:
            keepers[row], similarities[row] = keeper, best
        else:
            following[last[root]] = row
            last[root] = row
    return roots, keepers, similarities


@njit(cache=True)
def bucket_pairs(
    rows: Integers, values: Hashes, num_rows: int, all_pairs_up_to: int, pivots: int
) -> Integers:
    """Return a * N + b of the pairs a < b of rows with an equal value, some of them repeated.

    Args:
        rows: Numbers below N, in the order of `values`.
        values: Ascending.
        num_rows: N.
        all_pairs_up_to: How many rows with an equal value are all compared with one another.
        pivots: Where there are more, each is compared with so many of the first ones.
    """
    total, start = 0, 0
    for stop in range(1, len(values) + 1):
        if stop == len(values) or values[stop] != values[start]:
            size = stop - start
            total += size * (size - 1) // 2 if size <= all_pairs_up_to else size * pivots
            start = stop
    codes, count, start = np.empty(total, np.int64), 0, 0
    for stop in range(1, len(values) + 1):
        if stop < len(values) and values[stop] == values[start]:
            continue
        size = stop - start
        if size > 1:
            bucket = np.sort(rows[start:stop])
            for a in range(size if size <= all_pairs_up_to else pivots):
                for b in range(a + 1, size):
                    codes[count] = bucket[a] * num_rows + bucket[b]
                    count += 1
        start = stop
    return codes[:count]
