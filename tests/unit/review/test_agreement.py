"""Agreement between reviewers, and with automatic judges."""

from __future__ import annotations

from pathlib import Path

import pytest

from tuneloop.review.agreement import (
    cohen_kappa,
    describe_kappa,
    judge_agreement,
    judge_rows,
    preferences,
    reviewer_agreement,
    reviewer_rows,
)
from tuneloop.review.store import ReviewStore
from tuneloop.review.verdicts import Choice, Verdict, next_example


def verdict(
    example: str, choice: Choice, reviewer: str = "ann", sides: tuple[str, str] = ("a", "b")
) -> Verdict:
    return Verdict("evaluations/demo@v1", example, *sides, choice, reviewer)


def test_kappa_by_hand() -> None:
    # Cohen's example with 20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no: (0.7 - 0.5) / (1 - 0.5).
    first = ["y"] * 25 + ["n"] * 25
    second = ["y"] * 20 + ["n"] * 5 + ["y"] * 10 + ["n"] * 15
    assert cohen_kappa(first, second) == pytest.approx(0.4)
    assert cohen_kappa(second, first) == pytest.approx(0.4)
    assert cohen_kappa(["y", "n"], ["y", "n"]) == pytest.approx(1)
    assert cohen_kappa(["y", "n"], ["n", "y"]) == pytest.approx(-1)
    assert cohen_kappa(["y", "y"], ["y", "y"]) is None
    assert cohen_kappa([], []) is None


def test_reviewers_agree_on_arms_not_on_sides() -> None:
    verdicts = [
        verdict("1", "left"), verdict("2", "right"), verdict("3", "tie"),
        verdict("1", "right", "bob", ("b", "a")), verdict("2", "right", "bob", ("b", "a")),
        verdict("9", "left", "bob"), verdict("8", "left", "cy"),
    ]  # fmt: skip
    (row,) = reviewer_agreement(verdicts)
    assert (row.first, row.second, row.num_shared, row.agreed_ratio) == ("ann", "bob", 2, 0.5)
    assert reviewer_rows(verdicts)[0]["same verdict"] == "50%"


def test_other_pairs_of_arms_are_other_questions() -> None:
    verdicts = [verdict("1", "left"), verdict("1", "left", "bob", ("a", "c"))]
    assert reviewer_agreement(verdicts) == []


def test_judges_are_measured_where_people_decided() -> None:
    verdicts = [
        verdict("1", "left"), verdict("2", "right"), verdict("3", "left"),
        verdict("4", "tie"), verdict("5", "both_bad"), verdict("6", "left"),
    ]  # fmt: skip
    preferred = {"1": "a", "2": "a", "3": None, "4": "a", "5": "b"}
    row = judge_agreement(verdicts, "metric", preferred)
    assert row is not None
    assert (row.num_verdicts, row.num_undecided, row.agreed_ratio) == (3, 1, 0.5)
    assert judge_agreement(verdicts[3:5], "metric", preferred) is None
    assert judge_rows(verdicts, ("a", "c"), {"metric": preferred}) == []
    assert judge_rows(verdicts, ("b", "a"), {"metric": preferred})[0]["agrees"] == "50%"


def test_preferences_for_a_rating() -> None:
    chosen: list[Choice] = ["left", "right", "tie", "both_bad"]
    assert [p.score for p in preferences([verdict("1", c) for c in chosen])] == [
        1.0, 0.0, 0.5, 0.5,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("kappa", "words"),
    [(0.9, "almost perfect"), (0.61, "substantial"), (0.1, "slight"), (-0.2, "worse than chance")],
)
def test_kappa_in_words(kappa: float, words: str) -> None:
    assert describe_kappa(kappa) == words


def test_skipped_examples_come_back_last() -> None:
    assert next_example(["1", "2", "3"], []) == "1"
    assert next_example(["1", "2", "3"], ["1"]) == "2"
    assert next_example(["1", "2"], ["1", "2"]) == "1"
    assert next_example(["1", "2"], ["1", "2", "1"]) == "2"
    assert next_example(["2"], ["1", "2"]) == "2"
    assert next_example([], ["1"]) is None


def test_looking_at_verdicts_makes_no_file(tmp_path: Path) -> None:
    store = ReviewStore(f"file://{tmp_path}/new")
    assert store.verdicts("evaluations/demo@v1") == []
    assert not (tmp_path / "new").exists()
    store.add(verdict("1", "left"))
    assert len(ReviewStore(tmp_path / "new").verdicts("evaluations/demo@v1")) == 1
