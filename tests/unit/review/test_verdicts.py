"""Verdicts are kept for good, and ratings follow from them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from tuneloop.review.ratings import Preference, bradley_terry, rate_arms
from tuneloop.review.verdicts import Verdict, blind_order, open_examples

ARMS = ("base", "finetuned")


def verdict(example: str, choice: str = "left", reviewer: str = "ann") -> Verdict:
    return Verdict("evaluations/demo@v1", example, *ARMS, choice, reviewer)  # type: ignore[arg-type]


def test_sides_are_blind_stable_and_balanced() -> None:
    sides = [blind_order(str(i), "ann", ARMS) for i in range(400)]
    assert sides == [blind_order(str(i), "ann", ARMS[::-1]) for i in range(400)]
    assert 150 < sum(left == "base" for left, _ in sides) < 250
    assert sides != [blind_order(str(i), "bob", ARMS) for i in range(400)]


def test_judged_examples_are_not_asked_again() -> None:
    assert open_examples(["1", "2", "3"], [verdict("2")], ARMS) == ["1", "3"]
    assert open_examples(["1", "2"], [verdict("2")], ("base", "other")) == ["1", "2"]


def test_ratings_recover_known_strengths() -> None:
    random = np.random.default_rng(0)
    truth = {"a": 1200.0, "b": 1000.0, "c": 800.0}
    preferences = []
    for _ in range(4000):
        first, second = random.choice(list(truth), 2, replace=False)
        chance = 1 / (1 + 10 ** ((truth[second] - truth[first]) / 400))
        preferences.append(Preference(first, second, float(random.random() < chance)))
    ratings = bradley_terry(preferences)
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
    forward = bradley_terry(preferences)[0].elo
    assert forward == pytest.approx(bradley_terry(preferences[::-1])[0].elo)
    assert bradley_terry([]) == []


def strength(chance: float) -> float:
    """Return the Elo rating of the first of two arms that wins with this chance."""
    return 1000 + 200 * np.log10(chance / (1 - chance))


def votes(num_wins: int, num_losses: int) -> list[Preference]:
    return [Preference("a", "b", 1.0)] * num_wins + [Preference("a", "b", 0.0)] * num_losses


def test_one_vote_says_nothing_and_three_of_three_not_enough() -> None:
    (row,) = {r["95% interval"] for r in rate_arms(votes(1, 0))}
    assert row == "unknown"
    best, worst = bradley_terry(votes(3, 0))
    assert best.low < 1000 < worst.high
    best, worst = bradley_terry(votes(20, 0))
    assert (best.high, worst.low) == (np.inf, -np.inf)
    assert worst.high < 1000 < best.low < best.elo
    assert rate_arms(votes(20, 0))[0]["95% interval"] == f"{best.low:,.0f} or more"
    apart = bradley_terry(votes(9, 0) + [Preference("c", "d", 1.0)] * 9)
    assert all(np.isinf([r.low, r.high]).all() for r in apart), "nothing links the two pairs"


@pytest.mark.parametrize("n", [1, 3, 5, 10, 30])
def test_the_interval_of_two_arms_covers_the_truth(n: int) -> None:
    ratings = [
        {r.arm: r for r in bradley_terry(votes(wins, n - wins))}["a"] for wins in range(n + 1)
    ]
    for chance in (0.5, 0.6, 0.7, 0.8, 0.9):
        covered = sum(
            stats.binom.pmf(wins, n, chance)
            for wins, rating in enumerate(ratings)
            if rating.low <= strength(chance) <= rating.high
        )
        assert covered > 0.925


def test_reviewers_of_one_example_do_not_count_as_so_many_examples() -> None:
    three = [Preference("a", "b", float(i < 8), f"e{i}") for i in range(12) for _ in range(3)]
    once = [Preference("a", "b", float(i < 8), f"e{i}") for i in range(12)]
    assert bradley_terry(three)[0].low == bradley_terry(once)[0].low
    # Sides do not matter, and reviewers who differ count as a tie.
    mixed = [Preference("a", "b", 1.0, "e"), Preference("b", "a", 1.0, "e")] * 4
    assert bradley_terry(mixed)[0].elo == pytest.approx(1000)


def test_the_intervals_of_several_arms_cover_the_truth() -> None:
    generator = np.random.default_rng(5)
    true = np.array([0.0, 0.5, 1.2, -0.7])
    elo = 1000 + 400 / np.log(10) * (true - true.mean())
    hits = trials = 0
    for _ in range(40):
        pairs = [generator.choice(4, 2, replace=False) for _ in range(40)]
        cast = [
            Preference(
                f"m{i}", f"m{j}", float(generator.random() < 1 / (1 + np.exp(true[j] - true[i])))
            )
            for i, j in pairs
        ]
        for rating in bradley_terry(cast):
            hits += rating.low <= elo[int(rating.arm[1])] <= rating.high
            trials += 1
    # 95% nominal; three standard errors of 160 arms are 5 points.
    assert hits / trials > 0.90
