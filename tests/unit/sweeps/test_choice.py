"""The winner is chosen on validation rows, and its test score is not biased by the choice."""

from __future__ import annotations

import numpy as np
import pytest

from tuneloop.config import OneTaskConfig
from tuneloop.evals.scoring.comparison import summarise
from tuneloop.evals.scoring.intervals import Resampling
from tuneloop.evals.scoring.metrics import Scorer
from tuneloop.evals.scoring.predictions import Prediction
from tuneloop.evals.scoring.results import Evaluation
from tuneloop.sweeps.choice import (
    Score,
    choose,
    covariance_of_means,
    optimism,
    scatter_of_seeds,
    score_seeds,
    score_trial,
)
from tuneloop.sweeps.results import Untrained


def evaluation(scores: list[float | None], clusters: list[str] | None = None) -> Evaluation:
    predictions = [
        Prediction(
            f"r{number}", "finetuned", "", "", "", "stop", 1, 1, 0.1, "scored",
            scores={"exact_match": score}, cluster=clusters[number] if clusters else "",
        )
        for number, score in enumerate(scores)
    ]  # fmt: skip
    metrics = {
        "primary": "exact_match",
        "confidence": 0.95,
        "metrics": {"exact_match": {"label": "", "better": "higher", "kind": "binary"}},
        "arms": [
            {
                "name": "finetuned",
                "scores": {"exact_match": {"value": 0.5, "low": 0.4, "high": 0.6}},
            }
        ],
    }
    return Evaluation("s", predictions, metrics, {})


def test_equally_good_trials_give_a_test_score_without_bias() -> None:
    generator = np.random.default_rng(0)
    rate, num_rows, num_trials, num_sweeps = 0.6, 100, 12, 4000
    shape = (num_sweeps, num_trials)
    validation = generator.binomial(num_rows, rate, shape) / num_rows
    test = generator.binomial(num_rows, rate, shape) / num_rows
    winners = [choose(scores, higher_is_better=True) for scores in validation.tolist()]
    rows = np.arange(num_sweeps)
    reported, chosen_by = test[rows, winners], validation[rows, winners]
    # 0.0031 is four standard errors of the mean; choosing on the test itself adds 0.08.
    assert abs(reported.mean() - rate) < 0.0031
    assert chosen_by.mean() - rate > 0.05
    gaps = [
        optimism(wilson(v), wilson(t), higher_is_better=True)
        for v, t in zip(chosen_by[:500], reported[:500], strict=True)
    ]
    assert np.mean([gap.value for gap in gaps]) == pytest.approx(0.08, abs=0.02)


def wilson(share: float, n: int = 100, z: float = 1.96) -> Score:
    centre = (share + z * z / 2 / n) / (1 + z * z / n)
    half = z * np.sqrt(share * (1 - share) / n + z * z / 4 / n / n) / (1 + z * z / n)
    return Score(share, centre - half, centre + half)


def test_the_first_of_equal_scores_wins_and_a_missing_one_never_does() -> None:
    assert choose([None, 0.2, 0.5, 0.5], higher_is_better=True) == 2
    assert choose([None, 0.2, 0.5, 0.5], higher_is_better=False) == 1
    assert choose([None, None], higher_is_better=True) is None


def test_optimism_has_an_interval_and_the_sign_of_the_metric() -> None:
    better, worse = Score(0.7, 0.6, 0.8), Score(0.6, 0.5, 0.7)
    gap = optimism(better, worse, higher_is_better=True)
    assert gap.value == pytest.approx(0.1)
    # Two intervals of half width 0.1 give one of 0.1 times the root of two.
    assert gap.low == pytest.approx(0.1 - 0.1 * 2**0.5)
    assert gap.high == pytest.approx(0.1 + 0.1 * 2**0.5)
    # Of bits per byte the lower is the better one.
    assert optimism(worse, better, higher_is_better=False).value == pytest.approx(0.1)
    assert optimism(Score(0.7), worse, higher_is_better=True) == Score(pytest.approx(0.1))


def test_a_trial_is_scored_on_the_rows_that_count() -> None:
    one = evaluation([1.0, 1.0, 0.0, 0.0])
    assert score_trial(one).value == 0.5
    assert score_trial(one, {"r0", "r1", "r2"}).value == pytest.approx(2 / 3)


def test_macro_f1_and_bars_are_of_the_rows_that_all_trials_answered() -> None:
    task = OneTaskConfig(type="classification", labels=["a", "b"])
    # On the last four rows everything is wrong; not every trial was asked about them.
    truth, said = "aabbaabb", "aaabbbaa"
    rows = [
        Prediction(
            f"r{n}", "only", "", own, answer, "stop", 1, 1, 0.1, "scored",
            scores={"accuracy": float(own == answer)},
        )
        for n, (own, answer) in enumerate(zip(truth, said, strict=True))
    ]  # fmt: skip
    scorer = Scorer(task, {}, primary="macro_f1")
    one = Evaluation("s", rows, summarise(rows, scorer, Resampling(num_resamples=200)), {})
    common = frozenset(f"r{n}" for n in range(4))
    expected = (4 / 5 + 2 / 3) / 2
    assert score_trial(one).value == pytest.approx((4 / 9 + 2 / 7) / 2)
    assert score_trial(one, common, task=task).value == pytest.approx(expected)
    assert score_seeds([one, one], common, task=task).value == pytest.approx(expected)
    (bar,) = Untrained(one, common, task).bars_of("macro_f1")
    assert (bar.arm, bar.score) == ("only", pytest.approx(expected))
    (bar,) = Untrained(one, common, task).bars_of("accuracy")
    assert bar.score == 0.75


def test_macro_f1_of_several_seeds_has_an_interval() -> None:
    task = OneTaskConfig(type="classification", labels=["a", "b"])
    scorer = Scorer(task, {}, primary="macro_f1")

    def of(*wrong: int) -> list[Evaluation]:
        found = []
        for num_wrong in wrong:
            rows = [
                Prediction(
                    f"r{n:02d}", "only", "", own, "ba"[own == "b"] if n < num_wrong else own,
                    "stop", 1, 1, 0.1, "scored", scores={"accuracy": float(n >= num_wrong)},
                )
                for n, own in enumerate("ab" * 40)
            ]  # fmt: skip
            told = summarise(rows, scorer, Resampling(num_resamples=200))
            found.append(Evaluation("s", rows, told, {}))
        return found

    alike, apart = score_seeds(of(20, 20), task=task), score_seeds(of(4, 36), task=task)
    # Of each seed it is the share of right answers, for both labels alike.
    assert (alike.value, apart.value) == (pytest.approx(0.75), pytest.approx(0.75))
    assert alike.low is not None
    assert apart.low is not None
    assert 0.6 < alike.low < 0.7
    assert apart.low < 0.3


def test_seeds_that_differ_widen_the_interval() -> None:
    calm = [evaluation([1.0] * 50 + [0.0] * 50) for _ in range(3)]
    wild = [evaluation([1.0] * ones + [0.0] * (100 - ones)) for ones in (20, 50, 80)]
    narrow, wide = score_seeds(calm), score_seeds(wild)
    assert narrow.value == pytest.approx(0.5)
    assert wide.value == pytest.approx(0.5)
    assert narrow.low is not None
    assert wide.low is not None
    assert wide.low < narrow.low - 0.1


def test_seeds_of_all_cells_tell_how_far_seeds_lie_apart() -> None:
    def of(*ones: int) -> list[Evaluation]:
        return [evaluation([1.0] * one + [0.0] * (100 - one)) for one in ones]

    cells = [of(20, 80), of(50, 50), of(45, 55), of(50)]
    scatter = scatter_of_seeds(cells)
    assert scatter.df == 3
    # What a cell's own two seeds hide by chance, the others show, also where there is one seed.
    for calm in (cells[1], cells[3]):
        alone, known = score_seeds(calm), score_seeds(calm, scatter=scatter)
        assert alone.value == known.value
        assert alone.low is not None
        assert known.low is not None
        assert known.low < alone.low - 0.1
    assert scatter_of_seeds([of(60)]).df == 0


def test_a_score_of_all_answers_together_has_a_mean_over_seeds_alone() -> None:
    assert score_seeds([evaluation([None] * 4)] * 2) == Score(0.5)


def test_means_of_the_same_rows_vary_together() -> None:
    generator = np.random.default_rng(0)
    rows = [str(row) for row in range(400)]
    easy = generator.normal(size=400)
    first, second = easy + generator.normal(size=400), easy + generator.normal(size=400)
    scores = [dict(zip(rows, one, strict=True)) for one in (first, second)]
    covariance = covariance_of_means(scores, {})
    assert covariance is not None
    # Variance 2 of which 1 is common, of a mean over 400.
    np.testing.assert_allclose(400 * covariance, [[2, 1], [1, 2]], atol=0.25)
    # A row that one of them has no score for is left out; twins are one observation.
    twins = [one | {f"{row} again": one[row] for row in rows} for one in scores]
    twins[0]["more"] = 9.0
    doubled = covariance_of_means(twins, {f"{row} again": row for row in rows})
    np.testing.assert_allclose(doubled, covariance)
    assert covariance_of_means([{"a": 1.0}, {"a": 0.0}], {}) is None
