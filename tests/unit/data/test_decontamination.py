"""Train rows that repeat what is held out are found, and others are not."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tuneloop.config import DataConfig, TuneloopConfig
from tuneloop.data.decontamination.held_out import EvaluationRows, read_evaluations
from tuneloop.data.decontamination.matching import (
    MatchKind,
    RowMatch,
    TrainRows,
    near_duplicates,
    near_pairs,
    same_rows,
)
from tuneloop.data.decontamination.ngrams import (
    Overlaps,
    best_overlaps,
    count_common,
    count_ngrams,
    joined_counts,
    matched_text,
    ngram_index,
    ngram_length,
    overlapping,
)
from tuneloop.data.hashing.columns import Texts
from tuneloop.data.hashing.signatures import band_hashes, normalised_hashes, shingles, word_counts
from tuneloop.data.sources.files import find_files

DATA = DataConfig.model_validate({"sources": [{"path": "x", "format": "question_answer"}]})
VOCABULARY = [f"w{i}" for i in range(3000)]


def words(seed: object, count: int) -> str:
    return " ".join(random.Random(str(seed)).choices(VOCABULARY, k=count))


def held_out(texts: list[str], prompts: list[str] | None = None) -> EvaluationRows:
    labels = [f"bench:{i + 1}" for i in range(len(texts))]
    return EvaluationRows("bench", labels, texts, prompts or [""] * len(texts), texts)


def parts(count: int, number: int) -> list[np.ndarray]:
    """Return so many places cut into some parts, not in their order."""
    return np.array_split(np.random.default_rng(number).permutation(count), number)


def overlaps(
    train: list[str],
    other: EvaluationRows,
    threshold: float = 0.5,
    slices: int = 1,
    blocks: int = 1,
) -> list[Any]:
    """Return (train row, held-out row, overlap), with both cut into parts as on a cluster."""
    length = ngram_length(word_counts(Texts.of(other.texts)), 13)
    assert length is not None
    indices = [
        ngram_index(
            rows,
            Texts.of([other.texts[row] for row in rows]),
            Texts.of([other.prompts[row] for row in rows]),
            length,
        )
        for rows in parts(len(other.texts), slices)
    ]
    # By block and slice.
    shared = [
        [
            replace(found, rows=rows[found.rows])
            for index in indices
            for found in [index.shared_with(Texts.of([train[row] for row in rows]))]
        ]
        for rows in parts(len(train), blocks)
    ]
    counts = joined_counts(
        [
            count_ngrams(index, [block[place] for block in shared])
            for place, index in enumerate(indices)
        ]
    )
    found = [
        overlapping(index, of_slice, counts, num_common, threshold)
        for block in shared
        for num_common in [count_common(zip(indices, block, strict=True), counts.common)]
        for index, of_slice in zip(indices, block, strict=True)
    ]
    best = best_overlaps(Overlaps(*map(np.concatenate, zip(*found, strict=True))))
    columns = (column.tolist() for column in best)
    return [
        (row, other_row, round(value, 3)) for row, other_row, value in zip(*columns, strict=True)
    ]


def test_a_held_out_row_inside_a_longer_one_is_found() -> None:
    benchmark = [words(f"b{i}", 40) for i in range(5)]
    train = [words(f"t{i}", 200) for i in range(20)]
    train[3] = f"{words('x', 90)} {benchmark[2].upper()}! {words('y', 90)}"
    train[7] = " ".join(benchmark[4].split()[5:30])  # and a part of one
    assert overlaps(train, held_out(benchmark)) == [(3, 2, 1.0), (7, 4, 1.0)]
    passage = matched_text(train[3], benchmark[2], 13)
    assert passage.startswith("“" + benchmark[2].upper()[:60])
    assert matched_text(train[7], benchmark[4], 13) == f"“{train[7]}”"


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


def test_a_common_phrase_is_no_contamination_but_many_copies_of_one_row_are() -> None:
    template = words("template", 30)
    benchmark = [f"{template} {words(f'b{i}', 14)}" for i in range(20)]
    train = [f"{template} {words(f't{i}', 14)}" for i in range(30)]
    assert overlaps(train, held_out(benchmark)) == []
    train += [f"{words(f'copy{i}', 20)} {benchmark[0]}" for i in range(25)]
    assert {row for row, _, _ in overlaps(train, held_out(benchmark))} == set(range(30, 55))


def test_what_many_rows_share_is_no_leak_and_a_quoted_row_is() -> None:
    # Fifty templates of 35 words; of each a row is held out, and seven others are not.
    templates = [words(f"template{i}", 35) for i in range(50)]
    own = [words(f"own{i}", 16) for i in range(50)]
    other = held_out([f"{templates[i]} {own[i]}" for i in range(50)])
    train = [f"{templates[i]} {words(f't{i} {k}', 16)}" for i in range(50) for k in range(7)]
    assert overlaps(train, other) == []
    # A whole row, a row's own text, most of a row from its first word on, a row fifteen times.
    leaks = [f"{words('a', 30)} {other.texts[3]}", f"{own[4]} {words('b', 30)}"]
    leaks.append(" ".join(other.texts[5].split()[:48]) + " " + words("c", 30))
    leaks += [f"{words(f'd{i}', 5)} {other.texts[6]}" for i in range(15)]
    found = overlaps(train + leaks, other)
    # In the last case template and row are as frequent as one another: its own rows go as well.
    assert {row - 350: of for row, of, _ in found if row >= 350} == {
        0: 3,
        1: 4,
        2: 5,
        **dict.fromkeys(range(3, 18), 6),
    }
    assert {row // 7 for row, _, _ in found if row < 350} <= {6}


def test_short_evaluations_use_shorter_ngrams_and_never_fewer_than_eight_words() -> None:
    assert ngram_length(np.array([9] * 10), 13) == 9
    assert ngram_length(np.array([0, 3, 4]), 13) == 8
    assert ngram_length(np.array([100, 200]), 13) == 13
    assert ngram_length(np.array([0, 0]), 13) is None
    tiny = held_out(["what is it", "how many are there"])
    assert overlaps(["what is it", f"what is it {words('t', 50)}"], tiny) == []


@pytest.mark.parametrize(("slices", "blocks"), [(1, 4), (2, 1), (5, 3), (20, 60)])
def test_how_rows_are_cut_makes_no_difference(slices: int, blocks: int) -> None:
    template, header = words("template", 30), words("header", 20)
    benchmark = [f"{template} {words(f'b{i}', 14 + 3 * i)}" for i in range(20)]
    benchmark[7] += " " + header  # frequent in train rows, and held out once
    licence = words("licence", 60)  # common to other rows
    benchmark += [f"{licence} {words('x', 20)}", f"{licence} {words('y', 20)}", words("z", 400)]
    prompts = [words(f"p{i}", 15) if i % 3 else "" for i in range(23)]
    train = [f"{template} {words(f't{i}', 14)}" for i in range(30)]
    train += [f"{header} {words(f'h{i}', 2 + i)}" for i in range(15)]
    train += [f"{prompts[i % 20]} {benchmark[i][100 + i : 300 + 5 * i]}" for i in range(15)]
    train += [f"{licence} {words(f'l{i}', 14)}" for i in range(11)]
    train.append(f"{licence} {' '.join(benchmark[22].split()[:30])}")
    whole = overlaps(train, held_out(benchmark, prompts), 0.2)
    assert {row for row, _, _ in whole} & set(range(60)) == set(range(45, 60))
    assert whole[-1] == (71, 22, 0.6)
    assert overlaps(train, held_out(benchmark, prompts), 0.2, slices, blocks) == whole


def test_shared_ngrams_are_counted_once_and_only_where_they_are_the_same() -> None:
    # Beside the definition: sets of windows of words.
    generator = random.Random(5)
    small = [f"w{i}" for i in range(4)]
    texts = [" ".join(generator.choices(small, k=k)) for k in (0, 3, 8, 9, 40, 400)]
    others = [" ".join(generator.choices(small, k=k)) for k in (0, 5, 8, 30, 700)]

    def windows(text: str) -> set[tuple[str, ...]]:
        own = text.split()
        return {tuple(own[i : i + 8]) for i in range(len(own) - 7)}

    nothing = Texts.of([""] * len(others))
    index = ngram_index(np.arange(len(others)), Texts.of(others), nothing, 8)
    all_of_them = set().union(*map(windows, others))
    assert len(index.grams) == len(all_of_them)
    assert index.sizes[: len(others)].tolist() == [len(windows(text)) for text in others]
    found = index.shared_with(Texts.of(texts))
    expected = {row: len(windows(text) & all_of_them) for row, text in enumerate(texts)}
    assert dict(zip(found.rows.tolist(), found.counts.tolist(), strict=True)) == {
        row: count for row, count in expected.items() if count
    }
    assert found.sizes.tolist() == [len(windows(texts[row])) for row in found.rows]
    every = np.arange(len(index.grams))
    assert index.num_rows_of(every).sum() == sum(len(windows(text)) for text in others)
    # A row's prompt is a unit of its own, but not another row.
    again = ngram_index(np.arange(len(others)), Texts.of(others), Texts.of(others), 8)
    assert np.array_equal(again.num_rows_of(every), index.num_rows_of(every))
    assert len(again.units) == 2 * len(index.units)


def train_rows(texts: list[str]) -> TrainRows:
    exact = normalised_hashes(Texts.of(texts))
    bands = band_hashes(texts, DATA.dedup.ngram_words, DATA.dedup.threshold)
    return TrainRows(np.arange(len(texts)), exact, exact, bands)


def test_equal_and_near_duplicate_rows_are_found_however_short() -> None:
    long = words("n", 60).split()
    other = held_out(["What is it?", " ".join(long), words("c", 30)])
    texts = ["what  IS it?", " ".join([*long[:-1], "changed"]), words("t", 60), "…"]
    train = train_rows(texts)
    assert same_rows(train, other) == ({0: RowMatch(0, MatchKind.SAME_TEXT, 1.0)}, {0})
    pairs = near_pairs(train, other, DATA)
    sets = dict(enumerate(shingles(texts, DATA.dedup.ngram_words).sets()))
    found, repeated = near_duplicates(pairs, sets, other, DATA)
    assert repeated == {0, 1}
    assert {row: near.held_out for row, near in found.items() if row} == {1: 1}
    assert found[1].similarity == pytest.approx(55 / 57)


def test_all_rows_that_a_train_row_repeats_were_in_it() -> None:
    long = words("n", 60)
    texts = ["What is it?", long, "what is it", f"{long} again"]
    other, train = held_out([*texts, "Who?"]), train_rows(["What is it?", f"{long} and"])
    same = same_rows(train, held_out(["What is it?", "Who?", "what is  IT?"]))
    assert same == ({0: RowMatch(0, MatchKind.SAME_TEXT, 1.0)}, {0, 2})
    sets = dict(enumerate(shingles(["What is it?", f"{long} and"], 5).sets()))
    near = near_duplicates(near_pairs(train, other, DATA), sets, other, DATA)
    assert near.matches[1].held_out == 1
    assert near.repeated == {0, 1, 2, 3}


def test_evaluations_are_mended_as_train_rows_are_and_none_of_their_rows_is_dropped(
    tmp_path: Path,
) -> None:
    path = tmp_path / "bench.csv"
    path.write_text("question,answer\n[INST] Is the cafÃ© open? [/INST],Ja\n[INST],No\n")
    filters = {"repair_text": True, "template_markers": "strip", "min_characters": 9}
    decontamination = {"sources": [{"path": str(path), "format": "question_answer"}]}
    data = DATA.model_dump() | {"filters": filters, "decontamination": decontamination}
    config = TuneloopConfig.model_validate(
        {"name": "t", "task": {"type": "generation"}, "model": {"base": "x"}, "data": data}
    )
    (found,) = read_evaluations(find_files(config.data.decontamination.sources), config)
    assert found.prompts == ["Is the café open?", ""]
    assert found.texts == ["Is the café open?\nJa", "\nNo"]


def test_the_instruction_of_the_task_is_no_part_of_an_evaluations_rows(tmp_path: Path) -> None:
    path = tmp_path / "bench.jsonl"
    for system in ("Sort the mail.", "Sort the mail.\n\nBe brief.", "Be brief.", ""):
        said = {"system": system, "user": "Where is it?", "assistant": "lost"}
        turns = [{"role": role, "content": text} for role, text in said.items()]
        with path.open("a") as file:
            file.write(json.dumps({"messages": turns}) + "\n")
    decontamination = {"sources": [{"path": str(path), "format": "messages"}]}
    config = TuneloopConfig.model_validate(
        {
            "name": "t",
            "task": {"type": "generation", "instruction": "Sort the mail."},
            "model": {"base": "x"},
            "data": DATA.model_dump() | {"decontamination": decontamination},
        }
    )
    (found,) = read_evaluations(find_files(config.data.decontamination.sources), config)
    brief = "Be brief.\nWhere is it?"
    assert found.prompts == ["Where is it?", brief, brief, "Where is it?"]
