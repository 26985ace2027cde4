"""Rows about one passage are told from rows of one template, by their answers."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tuneloop.data.hashing.columns import Texts
from tuneloop.data.hashing.content import PASSAGE_HASHES, PASSAGE_WORDS
from tuneloop.data.hashing.signatures import lowest_hashes, shingles
from tuneloop.data.split.passages import _join_synthetic
from tuneloop.data.split.shared_texts import (
    Pair,
    Undrawn,
    drawn_from_shared,
    sharing_rows,
    undrawn_texts,
)

_FIRST = ("sta", "kel", "mor", "vin", "dor")
_LAST = ("ne", "ta", "rid", "lok", "mis", "gan", "pel", "sur", "bek", "fol", "wim", "zet")
WORDS = [first + last for first in _FIRST for last in _LAST]


def labels(prompts: list[str]) -> list[int]:
    hashes = lowest_hashes(Texts.of(prompts), PASSAGE_WORDS, PASSAGE_HASHES)
    return sharing_rows(hashes).tolist()


def text(rng: random.Random, number: int) -> str:
    # Words of its own: a real text has few of another's.
    return " ".join(f"{rng.choice(WORDS)}{rng.randrange(400)}" for _ in range(number))


def about(rng: random.Random, count: int, layout: str = "{}\n\n{}") -> tuple[list[str], list[str]]:
    """Return prompts and answers of five questions on each of some texts of 60 words."""
    prompts, answers = [], []
    for _ in range(count):
        passage = text(rng, 60)
        words = passage.split()
        for _ in range(5):
            place = rng.randrange(50)
            prompts.append(layout.format(passage, f"What follows {words[place]} {text(rng, 4)}?"))
            answers.append(" ".join(words[place + 1 : place + 4]))
    return prompts, answers


def clusters(prompts: list[str], answers: list[str], size: int) -> list[list[Pair]]:
    rows = list(map(Pair, prompts, answers))
    return [rows[at : at + size] for at in range(0, len(rows), size)]


@pytest.mark.parametrize("layout", ["{}\n\n{}", "Passage: {} Question: {}", "{1} Read this: {0}"])
def test_questions_about_one_text_share_it(layout: str) -> None:
    prompts, answers = about(random.Random(1), 20, layout)
    expected = [number // 5 for number in range(100)]
    found = labels(prompts)
    assert [found[row] == found[row - 1] for row in range(1, 100)] == [
        expected[row] == expected[row - 1] for row in range(1, 100)
    ]
    assert len(set(found)) == 20
    more = drawn_from_shared(clusters(prompts, answers, 5))
    assert more is not None
    assert more > 0.9


def test_what_templates_ask_for_is_not_drawn_from_them() -> None:
    rng = random.Random(2)
    heads = [text(rng, 40) for _ in range(20)]
    prompts = [f"{head}\n\n{text(rng, 15)}" for head in heads for _ in range(5)]
    for answers in (
        [text(rng, 5) for _ in prompts],
        # An answer from the row's own part.
        [" ".join(prompt.split()[-4:]) for prompt in prompts],
        # Names of fields, which the template has, in every answer of it.
        [f"{prompt.split()[0]} {prompt.split()[1]}: {text(rng, 3)}" for prompt in prompts],
    ):
        more = drawn_from_shared(clusters(prompts, answers, 5))
        assert more is not None
        assert abs(more) < 0.05


def test_labels_and_few_answers_say_nothing() -> None:
    prompts, answers = about(random.Random(3), 20)
    assert drawn_from_shared(clusters(prompts, ["yes", "no"] * 50, 5)) is None
    # The labels that an instruction lists are in it.
    listed = [prompt.split()[row % 2] for row, prompt in enumerate(prompts)]
    assert drawn_from_shared(clusters(prompts, listed, 5)) is None
    assert drawn_from_shared(clusters(prompts[:5], answers[:5], 5)) is None
    assert drawn_from_shared([]) is None


def test_shared_texts_that_no_answer_draws_on_are_told() -> None:
    prompts, answers = about(random.Random(6), 20)
    assert undrawn_texts(list(map(Pair, prompts, answers))) is None
    yes_and_no = [Pair(prompt, ("yes", "no")[row % 2]) for row, prompt in enumerate(prompts)]
    assert undrawn_texts(yes_and_no) == Undrawn(100, 20, 0, 1)
    assert undrawn_texts([]) is None


def test_what_most_rows_have_is_a_template() -> None:
    rng = random.Random(4)
    head = text(rng, 60)
    assert len(set(labels([f"{head} {text(rng, 10)}" for _ in range(100)]))) == 100
    # As few as these may ask about one text.
    assert len(set(labels([f"{head} {text(rng, 10)}" for _ in range(20)]))) == 1
    # A chain of texts, each in two rows, that holds all rows together.
    chain = np.array([[n + 1, n + 2] for n in range(100)], dtype=np.uint64)
    assert len(set(sharing_rows(chain).tolist())) == 100
    assert len(set(sharing_rows(chain[:20]).tolist())) == 1


def test_rows_that_a_model_wrote_join_the_passages_of_people() -> None:
    # Rows 0 and 1 quote one passage; 4 and 5 share a template.
    passages = np.array([0, 0, 2, 3, 4, 5])
    is_synthetic = np.array([False, False, True, True, False, True])
    _join_synthetic(passages, np.arange(6), is_synthetic, np.array([0, 0, 0, 1, 2, 2]))
    assert passages.tolist() == [0, 0, 0, 3, 4, 5]


def test_the_lowest_hashes_are_distinct_and_ascending() -> None:
    rng = random.Random(5)
    prompts = [" ".join(rng.choices(WORDS[:3], k=k)) for k in (3, 4, 9, 40, 400)]
    ngrams = shingles(Texts.of(prompts), 3).sets()
    for row, values in zip(lowest_hashes(Texts.of(prompts), 3, 8), ngrams, strict=True):
        assert row.tolist() == [*values[:8].tolist(), *[0] * (8 - len(values))]


def test_short_prompts_share_nothing() -> None:
    assert labels(["What is it?"] * 3) == [0, 1, 2]
    hashes = lowest_hashes(Texts.of([" ".join(WORDS[:25]), ""]), PASSAGE_WORDS, PASSAGE_HASHES)
    assert np.count_nonzero(hashes, axis=1).tolist() == [1, 0]
