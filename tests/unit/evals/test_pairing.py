"""Two arms over the same examples: what became of each, and in which order they are shown."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuneloop.evals.scoring.metrics import Metric
from tuneloop.evals.scoring.pairing import (
    TAG_CHANGES,
    Between,
    PairedExample,
    Pairs,
    count_changes,
    count_tag_changes,
    pair_arms,
)
from tuneloop.evals.scoring.predictions import Prediction

RIGHT = Metric("right", kind="binary")
LOSS = Metric("loss", better="lower", kind="number")


def predict(arm: str, example: str, score: float | None, tags: str = "") -> Prediction:
    scores = {} if score is None else {"m": score}
    return Prediction(
        example, arm, "[]", "", "", None, None, None, None,
        "unscored" if score is None else "scored", error_tags=tags.split(), scores=scores,
    )  # fmt: skip


def pair(scores: dict[str, tuple[float | None, float | None]], metric: Metric) -> list:
    rows = [predict("old", example, before) for example, (before, _) in scores.items()]
    rows += [predict("new", example, after) for example, (_, after) in scores.items()]
    return pair_arms(rows, "old", "new", "m", metric)


def changes(examples: list[PairedExample]) -> dict[str, str]:
    return {example.example_id: example.change for example in examples}


def test_what_became_of_an_example() -> None:
    scores = {"a": (0, 1), "b": (1, 0), "c": (1, 1), "d": (0, 0), "e": (None, 1), "f": (1, None)}
    assert changes(pair(scores, RIGHT)) == {
        "a": "fixed", "b": "introduced", "c": "both_right", "d": "both_wrong",
        "e": "unscored", "f": "unscored",
    }  # fmt: skip
    assert changes(pair({"a": (2.0, 1.5), "b": (1.0, 3.0), "c": (1.0, 1.0)}, LOSS)) == {
        "a": "fixed", "b": "introduced", "c": "same",
    }  # fmt: skip


def test_counts_cover_every_example_once() -> None:
    examples = pair({"a": (0, 1), "b": (0, 1), "c": (None, None), "d": (1, 1)}, RIGHT)
    assert count_changes(examples) == {
        "fixed": 2, "introduced": 0, "both_wrong": 0, "both_right": 1, "same": 0, "unscored": 1,
    }  # fmt: skip


def test_swapping_the_arms_turns_the_gain_round() -> None:
    there = pair({"a": (0.2, 0.9)}, LOSS)[0]
    back = pair({"a": (0.9, 0.2)}, LOSS)[0]
    assert there.gain == pytest.approx(-0.7)
    assert back.gain == pytest.approx(0.7)


def test_examples_that_only_one_arm_was_asked_are_left_out() -> None:
    rows = [predict("old", "a", 1), predict("new", "a", 1), predict("new", "b", 1)]
    assert changes(pair_arms(rows, "old", "new", "m", RIGHT)) == {"a": "both_right"}


def test_the_largest_change_comes_first_whatever_the_order_of_the_rows() -> None:
    scores = {"d": (0.0, 3.0), "a": (1.0, 0.0), "c": (0.0, 1.0), "b": (1.0, 1.0), "e": (None, 1.0)}
    rows = [predict("old", example, before) for example, (before, _) in scores.items()]
    rows += [predict("new", example, after) for example, (_, after) in scores.items()]
    for seed in range(5):
        shuffled = random.Random(seed).sample(rows, len(rows))
        examples = Pairs.of(shuffled, Between("old", "new"), "m", LOSS)
        assert [e.example_id for e in examples] == ["d", "a", "c", "b", "e"]
        assert examples[-1].example_id == "e"


@given(st.lists(st.tuples(*[st.sampled_from([None, 0.0, 0.3, 1.0])] * 2), max_size=12))
def test_columns_say_the_same_as_the_examples_one_by_one(scores: list) -> None:
    rows = [predict("old", f"x{i}", before, "empty") for i, (before, _) in enumerate(scores)]
    rows += [predict("new", f"x{i}", now, "cut_off") for i, (_, now) in enumerate(scores[1:], 1)]
    for metric in (RIGHT, LOSS):
        each = pair_arms(rows, "old", "new", "m", metric)
        pairs = Pairs.of(rows, Between("old", "new"), "m", metric)
        assert sorted(pairs, key=lambda e: e.example_id) == sorted(each, key=lambda e: e.example_id)
        assert pairs.is_answered.tolist() == [e.is_answered for e in pairs]
        for tag in ("empty", "cut_off", "refusal"):
            became = pairs.tag_changes(tag)
            for change in TAG_CHANGES:
                assert became[change].tolist() == [e.tag_change(tag) == change for e in pairs]


def test_changes_of_a_tag() -> None:
    before = {"a": "cut_off", "b": "cut_off", "c": ""}
    after = {"a": "", "b": "cut_off", "c": "cut_off"}
    rows = [predict("old", example, 0, tags) for example, tags in before.items()]
    rows += [predict("new", example, 0, tags) for example, tags in after.items()]
    examples = pair_arms(rows, "old", "new", "m", RIGHT)
    assert count_tag_changes(examples, ["cut_off", "empty"]) == {
        "cut_off": {"fixed": 1, "introduced": 1, "both": 1},
        "empty": {"fixed": 0, "introduced": 0, "both": 0},
    }
    assert [e.tag_change("empty") for e in examples] == [None, None, None]
