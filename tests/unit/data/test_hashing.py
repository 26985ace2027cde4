"""Words, shingles, keys and bands equal what plain Python makes of the same texts."""

from __future__ import annotations

import re

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuneloop.data.hashing.columns import Texts
from tuneloop.data.hashing.signatures import (
    _permutations,
    band_hashes,
    band_shape,
    jaccard,
    normalised_hashes,
    shingles,
    word_spans,
)

ALPHABET = "abAB1_ ,.\n\u00a0éÉжЖ日本“🙂+-<="


def python_words(text: str) -> list[str]:
    found = re.findall(r"[日本]|(?:[^\W日本]|🙂)+|[-+<=]", text.lower())
    words, operators = [], ""
    for part in found:
        if part in "-+<=":
            operators += part
        else:
            words.append(operators + part)
            operators = ""
    return [*words, operators] if operators else words


def python_shingles(text: str, n: int) -> set[tuple[str, ...]]:
    words = python_words(text)
    if len(words) < n:
        return {tuple(words)} if words else set()
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


@settings(max_examples=80, deadline=None)
@given(st.lists(st.text(ALPHABET, max_size=60), min_size=1, max_size=6), st.integers(1, 6))
def test_compiled_shingles_equal_plain_python(texts: list[str], n: int) -> None:
    found = shingles(texts, n)
    sets = found.sets()
    plain = [python_shingles(text, n) for text in texts]
    assert [len(s) for s in sets] == [len(s) for s in plain]
    for i in range(len(texts)):
        for j in range(len(texts)):
            union = plain[i] | plain[j]
            expected = len(plain[i] & plain[j]) / len(union) if union else 0.0
            assert jaccard(sets[i], sets[j]) == pytest.approx(expected)


@settings(max_examples=80, deadline=None)
@given(st.text(ALPHABET, max_size=60), st.text(ALPHABET, max_size=60))
def test_words_and_keys_equal_plain_python(one: str, other: str) -> None:
    data = one.encode()
    words = [data[start:stop].decode().lower() for start, stop in word_spans(one)]
    assert [re.sub(r"(?<=[-+<=])[^\w🙂]+|[^\w🙂]+$", "", word) for word in words] == [
        re.sub(r"(?<=[-+<=])[-+<=]+|[^\w🙂]+$", "", word) for word in python_words(one)
    ]
    same = " ".join(one.lower().split()) == " ".join(other.lower().split())
    keys = normalised_hashes(Texts.of([one, other, f"  {one.upper()}\n"])).tolist()
    assert (keys[0] == keys[1]) == same
    assert keys[0] == keys[2]


def test_arrow_columns_are_read_where_they_are() -> None:
    texts = ["left out", "one two", "", "Ünïcode wörter 日本", "x" * 300]
    column = pa.chunked_array([pa.array(texts[:3]), pa.array([*texts[3:], None])])[1:]
    found = Texts.of_column(column)
    expected = Texts.of([*texts[1:], ""])
    assert np.array_equal(normalised_hashes(found), normalised_hashes(expected))
    assert np.array_equal(shingles(found, 2).hashes, shingles(expected, 2).hashes)
    array = pa.array(texts)[2:]
    assert Texts.of_column(array).offsets[-1] - Texts.of_column(array).offsets[0] == sum(
        len(text.encode()) for text in texts[2:]
    )
    assert len(Texts.of_column(pa.array([], pa.string())).offsets) == 1


def test_shingles_and_bands_do_not_depend_on_the_batch() -> None:
    texts = ["the quick brown fox jumps over it", "", "one two", "...", "Ünïcode wörter sind es"]
    together = shingles(texts, 5).sets()
    bands = band_hashes(texts, 5, 0.8)
    for index, text in enumerate(texts):
        assert np.array_equal(shingles([text], 5).sets()[0], together[index])
        assert np.array_equal(band_hashes([text], 5, 0.8)[0], bands[index])
    assert [bool(row.all()) for row in bands] == [True, False, True, False, True]
    assert not bands[[1, 3]].any()


@pytest.mark.parametrize("num_words", [1, 4, 5, 255, 256, 257, 260, 261, 1000])
def test_bands_are_minima_over_all_shingles_however_long_the_text(num_words: int) -> None:
    text = " ".join(f"w{i}" for i in range(num_words))
    found = shingles([text], 5)
    assert len(found.hashes) == max(1, num_words - 4) == len(np.unique(found.hashes))
    multipliers, summands = _permutations(np.prod(band_shape(0.8)))
    values = (found.hashes >> np.uint64(32)).astype(np.uint32)
    minima = (values[:, None] * multipliers + summands).min(axis=0).reshape(band_shape(0.8))
    bands = band_hashes([text], 5, 0.8)[0]
    # The last value of a band decides as well as the first: another text agrees where they do.
    other = " ".join([*text.split()[:-1], "last"])
    values = (shingles([other], 5).hashes >> np.uint64(32)).astype(np.uint32)
    others = (values[:, None] * multipliers + summands).min(axis=0).reshape(band_shape(0.8))
    same = (minima == others).all(axis=1)
    assert np.array_equal(bands == band_hashes([other], 5, 0.8)[0], same)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.9, 1.0])
def test_band_shape_reaches_its_recall(threshold: float) -> None:
    bands, rows = band_shape(threshold)
    assert bands * rows <= 128
    assert 1 - (1 - threshold**rows) ** bands >= 0.98


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("caf\u00e9 \u1ec7", "cafe\u0301 e\u0302\u0323"),  # composed, and marks in any order
        ("Total 12 + 5", "Ｔｏｔａｌ\u3000１２ ＋ ５"),
        ("ガギグ", "ｶﾞｷﾞｸﾞ"),
        ("password", "pass\u200bword\ufeff"),
        ("한국어", "\u1112\u1161\u11ab\u1100\u116e\u11a8\u110b\u1165"),
        ("-5 °C", "\u22125 °C"),
    ],
)
def test_spellings_of_one_text_are_one_text(one: str, other: str) -> None:
    for texts in (Texts.of([one, other]), Texts.of_column(pa.array([one, other]))):
        keys = normalised_hashes(texts)
        assert keys[0] == keys[1]
        assert jaccard(*shingles(texts, 1).sets()) == 1.0
    padded = Texts.of_column(pa.chunked_array([["x", one], [other, "y", None]])[1:])
    assert len(np.unique(normalised_hashes(padded))) == 3


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("return a + b", "return a - b"),
        ("a < b", "a <= b"),
        ("x == y", "x != y"),
        ("it is -5 today", "it is 5 today"),
        ("I like C++", "I like C#"),
        ("$5", "€5"),
        ("x ** 2", "x * 2"),
    ],
)
def test_operators_and_signs_are_content(one: str, other: str) -> None:
    sets = shingles([one, other], 1).sets()
    assert jaccard(*sets) < 1.0
    # A sign is no word of its own, except behind the last one.
    assert len(python_words(one)) == len(word_spans(one))
