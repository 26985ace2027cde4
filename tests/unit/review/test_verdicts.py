"""Verdicts are kept for good, and ratings follow from them."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import numpy as np
import pytest

from tuneloop.errors import ArtifactError
from tuneloop.review.ratings import Preference, bradley_terry
from tuneloop.review.verdicts import Verdict, VerdictStore, blind_order, open_examples

ARMS = ("base", "finetuned")


def verdict(example: str, choice: str = "left", reviewer: str = "ann") -> Verdict:
    return Verdict("evaluations/demo@v1", example, *ARMS, choice, reviewer)  # type: ignore[arg-type]


def test_verdicts_survive_and_a_changed_mind_is_the_newest_row(tmp_path: Path) -> None:
    store = VerdictStore(tmp_path)
    store.add(verdict("1"))
    store.add(verdict("2", "tie"))
    store.add(verdict("1", "right"))
    store.add(verdict("1", "left", reviewer="bob"))
    found = VerdictStore(tmp_path).read("evaluations/demo@v1", "ann")
    assert [(v.example_id, v.choice, v.winner) for v in found] == [
        ("2", "tie", None),
        ("1", "right", "finetuned"),
    ]
    assert len(store.read("evaluations/demo@v1")) == 3
    assert store.read("evaluations/demo@v2") == []
    with sqlite3.connect(store.path) as connection:
        assert connection.execute("SELECT count(*) FROM verdicts").fetchone() == (4,)


@pytest.mark.parametrize(
    "statement", ["UPDATE verdicts SET choice = 'tie'", "DELETE FROM verdicts"]
)
def test_verdicts_are_never_edited(tmp_path: Path, statement: str) -> None:
    store = VerdictStore(tmp_path)
    store.add(verdict("1"))
    with sqlite3.connect(store.path) as connection, pytest.raises(sqlite3.DatabaseError):
        connection.execute(statement)
    assert len(store.read("evaluations/demo@v1")) == 1


def test_two_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    store = VerdictStore(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: store.add(verdict(str(i))), range(200)))
    assert len(store.read("evaluations/demo@v1")) == 200


def test_sides_are_blind_stable_and_balanced() -> None:
    sides = [blind_order(str(i), "ann", ARMS) for i in range(400)]
    assert sides == [blind_order(str(i), "ann", ARMS[::-1]) for i in range(400)]
    assert 150 < sum(left == "base" for left, _ in sides) < 250
    assert sides != [blind_order(str(i), "bob", ARMS) for i in range(400)]


def test_judged_examples_are_not_asked_again() -> None:
    assert open_examples(["1", "2", "3"], [verdict("2")], ARMS) == ["1", "3"]
    assert open_examples(["1", "2"], [verdict("2")], ("base", "other")) == ["1", "2"]


def test_unusable_stores(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="remote workspace"):
        VerdictStore("s3://bucket/prefix")
    (tmp_path / "review").mkdir()
    (tmp_path / "review" / "verdicts.sqlite").write_text("not a database, but long enough" * 100)
    with pytest.raises(ArtifactError, match="cannot be opened"):
        VerdictStore(tmp_path)


def test_ratings_recover_known_strengths() -> None:
    random = np.random.default_rng(0)
    truth = {"a": 1200.0, "b": 1000.0, "c": 800.0}
    preferences = []
    for _ in range(4000):
        first, second = random.choice(list(truth), 2, replace=False)
        chance = 1 / (1 + 10 ** ((truth[second] - truth[first]) / 400))
        preferences.append(Preference(first, second, float(random.random() < chance)))
    ratings = bradley_terry(preferences, num_resamples=100)
    assert [rating.arm for rating in ratings] == ["a", "b", "c"]
    for rating in ratings:
        assert abs(rating.elo - truth[rating.arm]) < 40
        assert rating.low < rating.elo < rating.high


def test_ratings_do_not_depend_on_order_and_stay_finite() -> None:
    preferences = [Preference("a", "b", 1.0)] * 5 + [Preference("b", "a", 0.5)] * 2
    ratings = bradley_terry(preferences)
    assert ratings == bradley_terry(preferences)
    best = ratings[0]
    assert (best.arm, best.num_wins, best.num_losses, best.num_ties) == ("a", 5, 0, 2)
    assert np.isfinite([rating.elo for rating in ratings]).all()
    forward = bradley_terry(preferences, num_resamples=1)[0].elo
    assert forward == pytest.approx(bradley_terry(preferences[::-1], num_resamples=1)[0].elo)
    assert bradley_terry([]) == []
