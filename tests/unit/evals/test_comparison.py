"""Intervals and tests against independent implementations, and by simulated coverage."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from tuneloop.config import TaskConfig
from tuneloop.evals.reporting.headline import write_headline
from tuneloop.evals.scoring.asking import EvaluationRequest, ModelAnswer
from tuneloop.evals.scoring.clusters import Clusters
from tuneloop.evals.scoring.comparison import compare, summarise
from tuneloop.evals.scoring.estimates import describe_difference, describe_mean
from tuneloop.evals.scoring.intervals import (
    PairedCounts,
    Resampling,
    bca,
    estimate_difference,
    estimate_mean,
    mcnemar_p,
    newcombe_paired,
    sign_flip_p,
    wilson,
)
from tuneloop.evals.scoring.metrics import Metric, Scorer
from tuneloop.evals.scoring.predictions import Prediction
from tuneloop.evals.scoring.questions import Question
from tuneloop.evals.scoring.results import Evaluation
from tuneloop.evals.scoring.scored_answers import score_answer
from tuneloop.records import Arm, Endpoint, Message, SamplingParams

FAST = Resampling(num_resamples=2000)


# Computed by this project's own formulas before scipy took their place (November 2026).
WILSON = {
    (0, 10, 0.95): (0.0, 0.27753279986288915),
    (1, 7, 0.9): (0.03254380205478666, 0.4522866946970291),
    (65, 112, 0.95): (0.48778518470055565, 0.6675995988065428),
    (64, 64, 0.99): (0.9060677240245965, 1.0),
    (500, 1000, 0.99): (0.45940700521208483, 0.5405929947879151),
}
NEWCOMBE = {
    (59, 6, 16, 80): (-0.11862119563870993, -0.004625113933050061),
    (15, 50, 4, 43): (0.2988563542694608, 0.5071706487091543),
    (0, 65, 0, 47): (0.48202483699462767, 0.6675995988065428),
    (5, 0, 0, 0): (-0.43448246478317465, 0.43448246478317465),
}
MCNEMAR = {
    (0, 0): 1.0,
    (5, 0): 0.0625,
    (12, 3): 0.03515625,
    (50, 4): 3.8029690507812575e-11,
    (40, 44): 0.7436441861052041,
    (900, 850): 0.24146022980870727,
}


def test_closed_forms_equal_the_values_of_earlier_versions():
    same = {"rel": 1e-12, "abs": 1e-15}
    for (right, n, confidence), ends in WILSON.items():
        assert wilson(right, n, confidence) == pytest.approx(ends, **same)
    for counts, ends in NEWCOMBE.items():
        assert newcombe_paired(PairedCounts(*counts), 0.95) == pytest.approx(ends, **same)
    for (fixed, introduced), p_value in MCNEMAR.items():
        assert mcnemar_p(fixed, introduced) == pytest.approx(p_value, **same)


def test_resampling_equals_the_values_of_earlier_versions():
    squares = np.arange(1, 41) ** 2 / 100.0
    assert bca(squares, Resampling()) == pytest.approx((4.154898790351307, 7.1727860156255))
    other = bca(squares, Resampling(0.9, 2000, 3))
    assert other == pytest.approx((4.319129217621754, 6.791056548501663))
    waves = np.cos(np.arange(60)) + 0.2
    assert sign_flip_p(waves, Resampling()) == pytest.approx(0.024797520247975203)
    assert sign_flip_p(waves[:9], Resampling()) == pytest.approx(0.1875)


def test_newcombe_and_mcnemar_equal_published_values():
    # Response before and after consolidation therapy (Cavo et al. 2012), the worked example of
    # Fagerland, Lydersen and Laake 2017, "Statistical Analysis of Contingency Tables", chapter 8.
    ends = newcombe_paired(PairedCounts(59, 6, 16, 80), 0.95)
    assert ends == pytest.approx((-0.1186, -0.0046), abs=5e-5)
    assert mcnemar_p(6, 16) == pytest.approx(0.052479, abs=5e-7)


@pytest.mark.parametrize("counts", [(5, 3, 9, 2), (0, 7, 0, 0), (4, 0, 0, 4), (0, 0, 12, 0)])
def test_swapping_the_arms_mirrors_the_interval(counts):
    both, first, second, neither = counts
    low, high = newcombe_paired(PairedCounts(*counts), 0.95)
    mirrored = PairedCounts(both, second, first, neither)
    assert newcombe_paired(mirrored, 0.95) == pytest.approx((-high, -low))
    assert low <= (first - second) / sum(counts) <= high
    assert high - low > 0.1, "small samples are never certain"


def test_bca_equals_scipy():
    generator = np.random.default_rng(7)
    for values in (generator.exponential(size=40), generator.normal(size=25) ** 3):
        theirs = stats.bootstrap(
            (values,), np.mean, n_resamples=20_000, method="BCa", rng=np.random.default_rng(1)
        ).confidence_interval
        ours = bca(values, Resampling(num_resamples=20_000))
        width = theirs.high - theirs.low
        assert ours == pytest.approx((theirs.low, theirs.high), abs=0.04 * width)


def test_sign_flips_equal_scipys_permutation_test():
    few = np.array([0.3, -0.1, 0.5, 0.2, 0.0, 0.4, -0.05])
    exact = stats.permutation_test(
        (few, np.zeros_like(few)), lambda a, b: np.mean(a - b), permutation_type="samples"
    ).pvalue
    assert sign_flip_p(few, FAST) == pytest.approx(exact)
    many = np.random.default_rng(3).normal(0.25, 1, 60)
    t_test = stats.ttest_1samp(many, 0).pvalue
    assert sign_flip_p(many, Resampling(num_resamples=20_000)) == pytest.approx(t_test, abs=0.01)
    assert sign_flip_p(np.zeros(9), FAST) == 1.0


def test_memory_of_a_large_bootstrap_is_bounded_and_seeded():
    values = np.random.default_rng(0).random(50_000)
    first, second = (bca(values, Resampling(num_resamples=200, seed=4)) for _ in range(2))
    assert first == second
    assert first != bca(values, Resampling(num_resamples=200, seed=5))


@pytest.mark.parametrize("binary", [True, False])
def test_intervals_of_paired_differences_cover_the_truth(binary):
    generator = np.random.default_rng(11)
    hits, trials, n = 0, 400, 60
    for _ in range(trials):
        easy = generator.random(n)
        if binary:
            # Right with probability 0.7 and 0.4, from one draw of difficulty plus noise.
            noise = generator.random((2, n))
            first = (0.5 * easy + 0.5 * noise[0] < 0.6127).astype(float)
            second = (0.5 * easy + 0.5 * noise[1] < 0.4472).astype(float)
            truth = 0.3
        else:
            first = easy + generator.exponential(0.3, n)
            second = easy + generator.normal(0, 0.1, n)
            truth = 0.3
        estimate = estimate_difference(
            first, second, "binary" if binary else "unbounded", Resampling(num_resamples=500)
        )
        hits += estimate.low <= truth <= estimate.high
    # 95% nominal; three standard errors of 400 trials are 3.3 points.
    assert 0.915 <= hits / trials <= 0.985


def test_edges_do_not_claim_certainty():
    ones, zeros = np.ones(5), np.zeros(5)
    estimate = estimate_difference(ones, zeros, "binary", FAST)
    assert estimate.value == 1.0
    assert estimate.low < 0.6
    assert estimate.p_value == pytest.approx(2 / 32)
    assert estimate_mean(np.array([]), "unit", FAST).value is None
    one = estimate_mean(np.array([0.4]), "unit", FAST)
    assert (one.value, one.low, one.high) == (0.4, None, None)


def predictions(arm: str, answers: list[str | None], truth: list[str], scorer: Scorer):
    return [
        Prediction(
            example_id=f"r{index}",
            arm=arm,
            prompt="[]",
            reference=reference,
            completion=answer or "",
            finish_reason=None if answer is None else "stop",
            prompt_tokens=None if answer is None else 10,
            completion_tokens=None if answer is None else 2,
            latency_s=None if answer is None else 0.5,
            status="unscored" if answer is None else "scored",
            error="HTTP 500" if answer is None else "",
            error_tags=["wrong_format"] if answer == "?" else [],
            scores={} if answer is None else scorer.score(reference, answer),
        )
        for index, (answer, reference) in enumerate(zip(answers, truth, strict=True))
    ]


@pytest.fixture
def compared():
    truth = ["a", "a", "b", "b", "c", "a"]
    scorer = Scorer(TaskConfig(type="classification", labels=["a", "b", "c", "never"]), {})
    rows = predictions("base", ["a", "?", "?", "a", None, "b"], truth, scorer)
    rows += predictions("tuned", ["a", "a", "b", "?", "c", None], truth, scorer)
    return summarise(rows, scorer, FAST), compare(rows, scorer, FAST)


def test_unscored_is_counted_and_is_neither_wrong_nor_dropped(compared):
    metrics, comparison = compared
    base, tuned = metrics["arms"]
    assert (base["num_scored"], base["num_unscored"]) == (5, 1)
    assert base["unscored_reasons"] == {"HTTP 500": 1}
    assert base["scores"]["accuracy"]["value"] == pytest.approx(1 / 5)
    assert tuned["scores"]["accuracy"]["value"] == pytest.approx(4 / 5)
    assert metrics["num_examples"] == 6
    pair = comparison["pairs"][0]
    assert (pair["arm"], pair["other"], pair["num_both_scored"]) == ("tuned", "base", 4)


def test_fixed_and_introduced_are_counted_for_score_and_tags(compared):
    pair = compared[1]["pairs"][0]
    assert pair["outcomes"] == {"fixed": 2, "introduced": 0, "both_right": 1, "both_wrong": 1}
    assert pair["differences"]["accuracy"]["value"] == pytest.approx(0.5)
    assert pair["error_tags"]["wrong_format"] == {"fixed": 2, "introduced": 1, "both": 0}


def test_macro_f1_averages_the_labels_that_occur(compared):
    base, tuned = compared[0]["arms"]
    # tuned: a 2 of 2, b 1 of 2 without false alarms, c 1 of 1; `never` has no reference.
    assert tuned["label_f1"] == pytest.approx({"a": 1.0, "b": 2 / 3, "c": 1.0})
    assert tuned["scores"]["macro_f1"]["value"] == pytest.approx((1 + 2 / 3 + 1) / 3)
    assert set(base["label_f1"]) == {"a", "b"}
    difference = compared[1]["pairs"][0]["differences"]["macro_f1"]
    assert difference["low"] <= difference["value"] <= difference["high"]


def test_lower_is_better_where_the_metric_says_so():
    scorer = Scorer(TaskConfig(type="language_modeling"), {})
    rows = [
        Prediction(
            *(f"r{index}", arm, "text", "", "", "stop", 5, 0, 0.1, "scored"),
            scores={"bits_per_byte": bits},
        )
        for arm, values in (("base", [1.0, 2.0, 3.0]), ("tuned", [0.5, 1.0, 3.5]))
        for index, bits in enumerate(values)
    ]
    pair = compare(rows, scorer, FAST)["pairs"][0]
    assert pair["outcomes"] == {"better": 2, "worse": 1, "same": 0}
    assert pair["differences"]["bits_per_byte"]["value"] == pytest.approx(-1 / 3)


def test_every_pair_of_three_arms_is_compared_with_the_strongest_last_arm_first():
    truth = ["a"] * 12
    scorer = Scorer(TaskConfig(type="classification", labels=["a", "b"]), {})
    rows = [
        row
        for arm, right in (("base", 0), ("shots", 4), ("tuned", 11))
        for row in predictions(arm, ["a"] * right + ["b"] * (12 - right), truth, scorer)
    ]
    pairs = compare(rows, scorer, FAST)["pairs"]
    assert {(p["arm"], p["other"]) for p in pairs} == {
        ("shots", "base"), ("tuned", "shots"), ("tuned", "base"),
    }  # fmt: skip
    assert all(p["differences"]["accuracy"]["low"] > -1e-9 for p in pairs if p["arm"] == "tuned")


@pytest.mark.parametrize("value", [0.0, 0.4, 1.0])
def test_equal_scores_have_an_interval_with_a_width(value):
    scores = np.full(10, value)
    one = estimate_mean(scores, "unit", FAST)
    assert one.low <= value <= one.high
    # As wide as a rate of 0 of 10 leaves possible.
    assert one.high - one.low == pytest.approx(0.2775, abs=1e-3)
    same = estimate_difference(scores, scores, "unit", FAST)
    assert (same.low, same.high) == pytest.approx((-0.2775, 0.2775), abs=1e-3)
    free = estimate_mean(scores, "unbounded", FAST)
    assert (free.value, free.low, free.high) == (value, None, None)


def labelled(right: list[bool], truth: list[str], clusters: list[str] | None = None):
    scorer = Scorer(TaskConfig(type="classification", labels=["a", "b"]), {})
    other = {"a": "b", "b": "a"}
    answers = [t if good else other[t] for good, t in zip(right, truth, strict=True)]
    rows = predictions("base", answers, truth, scorer)
    if clusters:
        rows = [replace(row, cluster=c) for row, c in zip(rows, clusters, strict=True)]
    return rows, scorer


@pytest.mark.parametrize("good", [True, False])
@pytest.mark.parametrize("by_cluster", [True, False])
def test_macro_f1_of_zero_and_one_is_not_certain(good, by_cluster):
    truth = ["a", "b"] * 6
    clusters = [f"c{index // 3}" for index in range(12)] if by_cluster else None
    rows, scorer = labelled([good] * 12, truth, clusters)
    score = summarise(rows, scorer, FAST)["arms"][0]["scores"]["macro_f1"]
    assert score["value"] == float(good)
    assert score["low"] <= score["value"] <= score["high"]
    assert 0.1 < score["high"] - score["low"] < 0.6
    # Twelve rows of one label and one of another say less about the other label.
    uneven, scorer = labelled([good] * 12, ["a"] * 11 + ["b"])
    wider = summarise(uneven, scorer, FAST)["arms"][0]["scores"]["macro_f1"]
    assert wider["high"] - wider["low"] > 0.4


def test_rows_of_a_cluster_make_the_interval_wider_and_are_counted():
    right, truth = [True] * 12 + [False] * 12, ["a"] * 24
    alone, scorer = labelled(right, truth)
    together, _ = labelled(right, truth, [f"c{index // 4}" for index in range(24)])
    narrow = summarise(alone, scorer, FAST)["arms"][0]["scores"]["accuracy"]
    wide = summarise(together, scorer, FAST, "module")["arms"][0]["scores"]["accuracy"]
    assert (narrow["value"], narrow["n"], narrow["num_clusters"]) == (0.5, 24, 24)
    assert (wide["value"], wide["n"], wide["num_clusters"]) == (0.5, 24, 6)
    assert wide["high"] - wide["low"] > 1.5 * (narrow["high"] - narrow["low"])
    one, _ = labelled(right, truth, ["c"] * 24)
    score = summarise(one, scorer, FAST)["arms"][0]["scores"]["accuracy"]
    assert (score["value"], score["low"], score["num_clusters"]) == (0.5, None, 1)


def test_missing_answers_are_shown_at_their_worst_and_best():
    truth = ["a"] * 10
    scorer = Scorer(TaskConfig(type="classification", labels=["a", "b"]), {})
    rows = predictions("base", ["a"] * 4 + ["b"] * 6, truth, scorer)
    rows += predictions("tuned", ["a"] * 6 + ["b"] * 2 + [None] * 2, truth, scorer)
    base, tuned = summarise(rows, scorer, FAST)["arms"]
    assert "worst_case" not in base
    assert tuned["worst_case"] == pytest.approx({"low": 0.6, "high": 0.8})
    pair = compare(rows, scorer, FAST)["pairs"][0]
    assert pair["worst_case"] == pytest.approx({"low": 0.2, "high": 0.4})


def test_a_missing_label_may_have_been_the_one_that_costs_most():
    task = TaskConfig(type="classification", labels=["a", "b"])
    truth = ["a"] * 4 + ["b"] * 4
    scorer = Scorer(task, {}, primary="macro_f1")
    (arm,) = summarise(
        predictions("tuned", ["a"] * 4 + ["b"] * 3 + [None], truth, scorer), scorer, FAST
    )["arms"]
    # Named `a` where `b` is right: F1 of `a` is 8/9, of `b` 6/7.
    assert arm["worst_case"] == pytest.approx({"low": (8 / 9 + 6 / 7) / 2, "high": 1.0})


def test_rows_that_a_metric_says_nothing_of_are_no_wrong_answers():
    task = TaskConfig(type="generation")
    number = {"number": Metric("right number", kind="binary")}
    scorer = Scorer(task, {}, metrics=number, primary="number")

    def rows(arm, scores, missing):
        kinds = [
            *((score, "scored") for score in scores),
            *((0, "unscored") for _ in range(missing)),
        ]
        return [
            Prediction(
                f"{i:02d}", arm, "[]", "1", "1", "stop", 1, 1, 0.1, status,
                error="" if status == "scored" else "no answer",
                scores={"number": score} if status == "scored" else {},
            )
            for i, (score, status) in enumerate(kinds)
        ]  # fmt: skip

    # Of ten rows only the first four have a number.
    first = rows("first", [1.0, 0.0, 0.0, 0.0, *[None] * 5, 0.0], 0)
    second = rows("second", [1.0, 1.0, 1.0, 0.0, *[None] * 5], 1)
    told = summarise([*first, *second], scorer, FAST)["arms"][1]
    assert told["scores"]["number"]["value"] == 0.75
    assert told["worst_case"] == pytest.approx({"low": 3 / 5, "high": 4 / 5})
    (pair,) = compare([*first, *second], scorer, FAST)["pairs"]
    assert pair["differences"]["number"]["value"] == 0.5
    assert pair["worst_case"] == pytest.approx({"low": 2 / 5, "high": 3 / 5})


def test_an_arm_of_which_the_metric_says_nothing_is_the_weakest():
    scorer = Scorer(TaskConfig(type="extraction"), {"r": '{"a": 1}'}, primary="fields_precision")
    rows = [
        Prediction(
            f"r{number}", arm, "[]", '{"a": 1}', said, "stop", 1, 1, 0.1, "scored",
            scores=scorer.score('{"a": 1}', said),
        )
        for arm, said in (("silent", "no"), ("wrong", '{"a": 2}'), ("tuned", '{"a": 1}'))
        for number in range(20)
    ]  # fmt: skip
    evaluation = Evaluation("e", rows, summarise(rows, scorer, FAST), compare(rows, scorer, FAST))
    assert evaluation.strongest_other() == "wrong"
    alone = [p for p in rows if p.arm != "wrong"]
    evaluation = Evaluation(
        "e", alone, summarise(alone, scorer, FAST), compare(alone, scorer, FAST)
    )
    assert evaluation.strongest_other() == "silent"


@pytest.mark.parametrize("num_seeds", [1, 3])
@pytest.mark.parametrize("value", [0.1, 0.3, 0.7])
def test_an_interval_of_equal_scores_has_a_width_whatever_sums_round_to(value, num_seeds):
    clusters = Clusters.of([number // 7 for number in range(80)])
    scores = np.full((num_seeds, 80), value)
    told = describe_mean(scores if num_seeds > 1 else scores[0], clusters, Metric("f1"), FAST)
    low, high = wilson(0, 12, 0.95)
    assert told["value"] == pytest.approx(value)
    assert told["low"] == pytest.approx(value - (high - low) * value)
    assert told["high"] == pytest.approx(value + (high - low) * (1 - value))


def test_p_values_read_together_are_adjusted():
    truth = ["a"] * 12
    scorer = Scorer(TaskConfig(type="classification", labels=["a", "b"]), {})
    rows = [
        row
        for arm, right in (("base", 0), ("shots", 1), ("tuned", 7))
        for row in predictions(arm, ["a"] * right + ["b"] * (12 - right), truth, scorer)
    ]
    pairs = {
        (p["arm"], p["other"]): p["differences"]["accuracy"]
        for p in compare(rows, scorer, FAST)["pairs"]
    }
    strong, weak = pairs["tuned", "base"], pairs["tuned", "shots"]
    assert strong["p_value"] == pytest.approx(2 / 2**7)
    assert strong["p_adjusted"] == pytest.approx(2 * strong["p_value"])
    assert weak["p_adjusted"] == pytest.approx(max(weak["p_value"], strong["p_adjusted"]))
    assert pairs["shots", "base"]["p_adjusted"] == pairs["shots", "base"]["p_value"]


def test_a_comparison_says_what_it_can_show():
    scorer = Scorer(TaskConfig(type="classification", labels=["a", "b"]), {})
    n = 100
    rows = predictions("base", ["a"] * 50 + ["b"] * 50, ["a"] * n, scorer)
    rows += predictions("tuned", ["b"] * 5 + ["a"] * 53 + ["b"] * 42, ["a"] * n, scorer)
    difference = compare(rows, scorer, FAST)["pairs"][0]["differences"]["accuracy"]
    assert difference["value"] == pytest.approx(0.03)
    # 13 of 100 rows differ: the normal approximation gives 2.8 * sqrt(0.13 / 100) = 0.101.
    assert difference["detectable"] == pytest.approx(0.10, abs=0.005)
    assert 1000 < difference["rows_needed"] < 1300


def test_clusters_of_equal_scores_have_an_interval_with_a_width():
    scorer = Scorer(TaskConfig(type="generation"), {})
    rows = [
        replace(row, cluster=f"c{index // 3}", scores={"token_f1": 0.4, "length_ratio": 1.0})
        for index, row in enumerate(predictions("base", ["x"] * 12, ["x"] * 12, scorer))
    ]
    scores = summarise(rows, scorer, FAST)["arms"][0]["scores"]
    assert scores["token_f1"]["low"] < 0.3 < 0.5 < scores["token_f1"]["high"]
    assert (scores["length_ratio"]["low"], scores["length_ratio"]["num_clusters"]) == (None, 4)


@pytest.mark.parametrize("n", [6, 12])
def test_intervals_of_few_scores_cover_the_truth(n):
    generator = np.random.default_rng(n)
    hits = trials = 0
    for _ in range(200):
        values = generator.beta(2, 3, n)
        one = Clusters.of(np.arange(n))
        estimate = describe_mean(values, one, Metric("score"), FAST)
        other = describe_difference(values, generator.beta(2, 3, n), one, Metric("score"), FAST)
        hits += (estimate["low"] <= 0.4 <= estimate["high"]) + (other["low"] <= 0 <= other["high"])
        trials += 2
    # 95% nominal; three standard errors of 400 intervals are 3.3 points.
    assert 0.915 <= hits / trials <= 0.985


def test_macro_f1_and_confusion_count_every_sampled_answer():
    task = TaskConfig(type="classification", labels=["a", "b"])
    scorer = Scorer(task, {"r0": "a", "r1": "b"}).averaged()
    rows = [
        replace(
            row,
            scores={"accuracy": [text == row.reference for text in texts].count(True) / 2},
            samples=[{"completion": t, "score": float(t == row.reference)} for t in texts],
        )
        for row, texts in zip(
            predictions("tuned", ["a", "b"], ["a", "b"], scorer),
            (["a", "b"], ["b", "b"]),
            strict=True,
        )
    ]
    (arm,) = summarise(rows, scorer, FAST)["arms"]
    assert arm["scores"]["accuracy"]["value"] == 0.75
    assert arm["confusion"] == {"a": {"a": 1, "b": 1}, "b": {"b": 2}}
    # Of four answers: `a` once right, never wrong, once missed; `b` twice right, once wrong.
    assert arm["label_f1"] == pytest.approx({"a": 2 / 3, "b": 4 / 5})
    # The draws of the first row have the variance 1/2; of the mean of two rows of two draws 1/16.
    assert arm["sampling"]["std_error"] == pytest.approx(1 / 4)


@pytest.mark.parametrize("names", [("", ""), ("m@v1", "m@v2")], ids=["sampled", "trainings"])
def test_macro_f1_takes_every_right_label_of_a_row_for_right(names):
    # Both labels are right; the row's reference is the one that its first answer names.
    task = TaskConfig(type="classification", labels=["a", "b", "c"])
    scorer = Scorer(task, {"r0": "a"}).averaged()
    for last, accuracy in (("b", 1.0), ("c", 0.5)):
        samples = [
            {"completion": text, "model": name, "scores": {"accuracy": score}}
            | dict.fromkeys(("finish_reason", "prompt_tokens", "completion_tokens", "latency_s"))
            | {"probability": None, "score": score}
            for text, name, score in zip(("a", last), names, (1.0, 2 * accuracy - 1), strict=True)
        ]
        (row,) = predictions("tuned", ["a"], ["a"], scorer)
        row = replace(row, scores={"accuracy": accuracy}, samples=samples)
        (arm,) = summarise([row], scorer, FAST)["arms"]
        wrong = {"c": 1} if last == "c" else {}
        assert arm["confusion"] == {"a": {"a": 2 - len(wrong)} | wrong}
        assert (arm["scores"]["macro_f1"]["value"] == 1.0) == (last == "b")


def test_of_several_right_answers_all_metrics_see_the_nearest():
    task = TaskConfig(type="generation")

    def scores(answer, *right):
        asked = Question("r0", (Message("user", "Which?"),), right[0], accepted=right[1:])
        request = EvaluationRequest(Arm("tuned", Endpoint("", "")), "", asked, SamplingParams())
        return score_answer(Scorer(task, {}), request, ModelAnswer("r0", "", answer))

    # The words are the same by SQuAD's measure, which removes signs.
    assert scores("C++", "C#", "C++")["exact_match"] == 1.0
    assert scores("C", "C#", "C++")["exact_match"] == 0.0
    # Wrong by the primary metric: the others are of the answer that it comes nearest to.
    task = TaskConfig(type="extraction")
    told = scores('{"x": 1, "y": 3}', '{"x": 9, "y": 2}', '{"x": 1, "y": 2}')
    assert (told["exact_match"], told["fields_f1"]) == (0.0, 0.5)


def test_macro_f1_may_decide_with_its_own_test_and_worst_case():
    # Nine in ten rows are `a`: accuracy hides that the first arm never answers `b`.
    task = TaskConfig(type="classification", labels=["a", "b"])
    references = {f"r{i:03d}": "b" if i % 10 == 0 else "a" for i in range(200)}
    scorer = Scorer(task, references, primary="macro_f1")
    rows = [
        Prediction(
            key, arm, "[]", reference, answer, "stop", 1, 1, 0.1, "scored",
            scores={"accuracy": float(answer == reference)},
        )
        for arm in ("majority", "model")
        for i, (key, reference) in enumerate(references.items())
        for answer in ["a" if arm == "majority" else reference if i % 7 else "a"]
    ]  # fmt: skip
    missing = replace(rows[-1], status="unscored", scores={}, completion="", finish_reason=None)
    metrics = summarise([*rows[:-1], missing], scorer, FAST)
    assert (metrics["primary"], metrics["row_metric"]) == ("macro_f1", "accuracy")
    first, second = (arm["scores"]["macro_f1"]["value"] for arm in metrics["arms"])
    assert first == pytest.approx(0.9 / 1.9, abs=1e-3)  # F1 of `a` is 360/380, of `b` 0
    assert second > 0.9
    ends = metrics["arms"][1]["worst_case"]
    assert ends["low"] < second < ends["high"]
    comparison = compare([*rows[:-1], missing], scorer, FAST)
    (pair,) = comparison["pairs"]
    assert comparison["primary"] == "macro_f1"
    difference = pair["differences"]["macro_f1"]
    assert difference["low"] > 0.3
    assert difference["p_value"] < 1e-6
    assert difference["p_adjusted"] == difference["p_value"]
    assert difference["low"] < pair["worst_case"]["low"] < difference["value"]
    # The same over clusters: the jackknife has a test of its own.
    clustered = [replace(p, cluster=f"c{i % 40}") for i, p in enumerate(rows)]
    (pair,) = compare(clustered, scorer, FAST)["pairs"]
    assert pair["differences"]["macro_f1"]["test"] == "t, jackknife over clusters"
    assert pair["differences"]["macro_f1"]["p_value"] < 1e-6
    evaluation = Evaluation("macro", rows, summarise(rows, scorer, FAST), comparison)
    assert write_headline(evaluation).tone == "good"
    changes = {example.change for example in evaluation.pair("majority", "model")}
    assert changes == {"fixed", "both_right", "both_wrong"}
