"""Train rows that repeat what is held out are found, and others are not."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from tuneloop.config import DataConfig
from tuneloop.data.decontamination import (
    HeldOut,
    TrainRows,
    matched_text,
    near_duplicates,
    near_pairs,
    ngram_index,
    overlapping,
    same_rows,
)
from tuneloop.data.signatures import band_hashes, normalised_hash, shingles

DATA = DataConfig.model_validate({"sources": [{"path": "x", "format": "question_answer"}]})
VOCABULARY = [f"w{i}" for i in range(3000)]


def words(seed: object, count: int) -> str:
    return " ".join(random.Random(str(seed)).choices(VOCABULARY, k=count))


def held_out(texts: list[str], prompts: list[str] | None = None) -> HeldOut:
    labels = [f"bench:{i + 1}" for i in range(len(texts))]
    return HeldOut("bench", labels, texts, prompts or [""] * len(texts), texts)


def overlaps(train: list[str], other: HeldOut, threshold: float = 0.5) -> list[Any]:
    index = ngram_index(other, 13)
    assert index is not None
    found = index.common(train)
    rows = sorted(found)
    matches = overlapping(
        index, [found[r][0] for r in rows], [found[r][1] for r in rows], threshold
    )
    return [(rows[row], other_row, round(value, 3)) for row, other_row, value in matches]


def test_a_held_out_row_inside_a_longer_one_is_found() -> None:
    benchmark = [words(f"b{i}", 40) for i in range(5)]
    train = [words(f"t{i}", 200) for i in range(20)]
    train[3] = f"{words('x', 90)} {benchmark[2].upper()}! {words('y', 90)}"
    train[7] = " ".join(benchmark[4].split()[5:30])  # and a part of one
    assert overlaps(train, held_out(benchmark)) == [(3, 2, 1.0), (7, 4, 1.0)]
    passage = matched_text(train[3], [benchmark[2]], 13)
    assert passage.startswith("“" + benchmark[2].upper()[:60])
    assert matched_text(train[7], [benchmark[4]], 13) == f"“{train[7]}”"


def test_the_overlap_is_a_share_of_the_shorter_rows_ngrams() -> None:
    whole = words("b", 52)  # 40 n-grams of 13 words
    half = " ".join(whole.split()[:33])  # 21 of them
    other = held_out([whole, words("c", 60)])
    train = [f"{half} {words('t', 100)}", f"{' '.join(whole.split()[:30])} {words('u', 100)}"]
    assert overlaps(train, other) == [(0, 0, 0.525)]
    assert overlaps(train, other, threshold=0.4) == [(0, 0, 0.525), (1, 0, 0.45)]


def test_a_prompt_alone_contaminates() -> None:
    prompt, answer = words("p", 20), words("a", 200)
    other = held_out([f"{prompt}\n{answer}", words("c", 220)], [prompt, words("d", 30)])
    assert overlaps([f"{prompt} {words('else', 150)}", words("z", 100)], other) == [(0, 0, 1.0)]


def test_boilerplate_is_no_contamination_but_many_copies_of_one_row_are() -> None:
    template = words("template", 30)
    benchmark = [f"{template} {words(f'b{i}', 14)}" for i in range(20)]
    train = [f"{template} {words(f't{i}', 14)}" for i in range(30)]
    assert overlaps(train, held_out(benchmark)) == []
    train += [f"{benchmark[0].split(' ', 30)[30]} {words(f'copy{i}', 20)}" for i in range(25)]
    assert {row for row, _, _ in overlaps(train, held_out(benchmark), 0.1)} == set(range(30, 55))


def test_short_evaluations_use_shorter_ngrams_and_never_fewer_than_eight_words() -> None:
    short = held_out([words(f"b{i}", 9) for i in range(10)])
    index = ngram_index(short, 13)
    assert index is not None
    assert index.ngram_words == 9
    tiny = held_out(["what is it", "how many are there"])
    assert overlaps(["what is it", f"what is it {words('t', 50)}"], tiny) == []
    assert ngram_index(held_out(["!!", "??"]), 13) is None


def train_rows(texts: list[str]) -> TrainRows:
    exact = np.array([normalised_hash(text) for text in texts])
    bands = band_hashes(texts, DATA.dedup.ngram_words, DATA.dedup.threshold)
    return TrainRows(np.arange(len(texts)), exact, exact, bands)


def test_equal_and_near_duplicate_rows_are_found_however_short() -> None:
    long = words("n", 60).split()
    other = held_out(["What is it?", " ".join(long), words("c", 30)])
    texts = ["what  IS it?", " ".join([*long[:-1], "changed"]), words("t", 60), "…"]
    train = train_rows(texts)
    assert same_rows(train, other) == {0: (0, "same text")}
    pairs = near_pairs(train, other, DATA)
    sets = dict(enumerate(shingles(texts, DATA.dedup.ngram_words).sets()))
    found = near_duplicates(pairs, sets, other, DATA)
    assert {row: near[0] for row, near in found.items() if row} == {1: 1}
    assert found[1][1] == pytest.approx(55 / 57)
