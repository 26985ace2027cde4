"""Several trainings of one recipe: intervals and tests for other seeds as well as other rows."""

from __future__ import annotations

import importlib.util
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from tuneloop.config import TaskConfig
from tuneloop.evals.scoring.clusters import (
    Clusters,
    detectable_difference,
    estimate_clustered_mean,
    rows_needed,
)
from tuneloop.evals.scoring.comparison import compare, summarise
from tuneloop.evals.scoring.estimates import (
    describe_difference,
    describe_mean,
    describe_statistic_over_seeds,
    design_of,
    rows_to_find,
)
from tuneloop.evals.scoring.intervals import Resampling
from tuneloop.evals.scoring.metrics import Metric, Scorer
from tuneloop.evals.scoring.predictions import Prediction, by_model, paired_values, values_of
from tuneloop.evals.scoring.seeds import Seeds, SeedScatter, estimate_over_seeds

SHARE = Metric("share", kind="ratio")
PLAIN = Resampling(0.95, 0)
ROOT = Path(__file__).parents[3]
CLUSTERS = Clusters.of(np.arange(120) % 24)


def test_one_seed_is_the_plain_mean_and_seeds_that_differ_widen_it():
    one = np.random.default_rng(6).standard_normal(120)
    plain = estimate_clustered_mean(one, CLUSTERS, "unbounded")
    assert estimate_over_seeds(one[None], CLUSTERS, "unbounded") == plain
    same = estimate_over_seeds(np.stack([one, one, one]), CLUSTERS, "unbounded")
    assert (same.low, same.high) == pytest.approx((plain.low, plain.high))
    assert same.seed_share == 0
    apart = estimate_over_seeds(np.stack([one - 0.5, one, one + 0.5]), CLUSTERS, "unbounded")
    assert apart.std_error**2 == pytest.approx(plain.std_error**2 + 0.25 / 3)
    assert apart.seed_share == pytest.approx(0.25 / 3 / apart.std_error**2)
    # The two half-widths, each with its own t, as the sides of a right angle.
    of_rows, of_seeds = plain.high - plain.value, stats.t.ppf(0.975, 2) * math.sqrt(0.25 / 3)
    assert apart.high - apart.value == pytest.approx(math.hypot(of_rows, of_seeds))


def test_noise_of_seeds_on_rows_is_not_counted_twice():
    values = np.random.default_rng(3).standard_normal((5, 120))
    seeds = Seeds.of_rows(values, CLUSTERS)
    shares = (values - values.mean(axis=1, keepdims=True)) / 120
    parts = np.array([[row[CLUSTERS.index == g].sum() for g in range(24)] for row in shares])
    assert seeds.parts == pytest.approx(parts / math.sqrt(1 - 5 / 120))
    noise = ((seeds.parts - seeds.parts.mean(axis=0)) ** 2).sum() / (4 * 5)
    between = values.mean(axis=1).var(ddof=1) / 5
    scatter = SeedScatter.of(seeds)
    assert scatter.df == 4
    assert scatter.variance / 5 == pytest.approx(max(0.0, between - 0.75 * noise))
    # The mean as a statistic has the same parts, up to the factor of the jackknife.
    mean = Seeds.of_statistics(
        [lambda weights, row=row: weights @ row / weights.sum(axis=1) for row in values], CLUSTERS
    )
    assert mean.means == pytest.approx(seeds.means)
    assert (mean.parts / seeds.parts).std() == pytest.approx(0, abs=1e-9)
    assert (mean.parts / seeds.parts).mean() == pytest.approx(1, abs=0.05)


def test_the_scatter_of_several_recipes_is_pooled_and_covers():
    generator = np.random.default_rng(4)
    hits, widths = [], []
    for _ in range(60):
        # Right as often as the seed's luck says: 0.2 to 0.8 on average, with 0.06 between seeds.
        truth = np.linspace(0.2, 0.8, 8)
        luck = truth[:, None] + 0.06 * generator.standard_normal((8, 2))
        cells = (generator.random((8, 2, 120)) < luck[..., None]).astype(float)
        recipes = [Seeds.of_rows(cell, CLUSTERS) for cell in cells]
        scatter = SeedScatter.of(*recipes)
        assert scatter.df == 8
        assert SeedScatter.of(recipes[0]).df == 1
        for cell, rate in zip(cells, truth, strict=True):
            alone = estimate_over_seeds(cell, CLUSTERS, "binary")
            pooled = estimate_over_seeds(cell, CLUSTERS, "binary", 0.95, scatter)
            assert alone.value == pooled.value
            hits.append(pooled.low <= rate <= pooled.high)
            widths.append((pooled.high - pooled.low) / (alone.high - alone.low))
    assert np.mean(hits) > 0.925
    assert np.median(widths) < 0.6


def test_test_and_interval_of_a_difference_agree_and_turn_with_the_arms():
    generator = np.random.default_rng(1)
    for shift in (0.0, 0.1, 0.2, 0.3):
        first = (generator.random((3, 120)) < 0.5 + shift).astype(float)
        second = (generator.random((2, 120)) < 0.5).astype(float)
        forth = describe_difference(first, second, CLUSTERS, SHARE, PLAIN)
        back = describe_difference(second, first, CLUSTERS, SHARE, PLAIN)
        assert (forth["low"], forth["high"]) == pytest.approx((-back["high"], -back["low"]))
        assert forth["p_value"] == pytest.approx(back["p_value"])
        assert (forth["p_value"] <= 0.05) == (not forth["low"] <= 0 <= forth["high"])
        assert forth["value"] == pytest.approx(first.mean() - second.mean())
        at_p = describe_difference(
            first, second, CLUSTERS, SHARE, Resampling(1 - forth["p_value"], 0)
        )
        assert min(abs(at_p["low"]), abs(at_p["high"])) == pytest.approx(0, abs=1e-6)


def test_trainings_that_are_alike_are_told_as_one():
    right = np.ones((3, 120))
    assert describe_mean(right, CLUSTERS, SHARE, PLAIN) == describe_mean(
        right[0], CLUSTERS, SHARE, PLAIN
    )
    told = describe_difference(right, right[:1], CLUSTERS, SHARE, PLAIN)
    assert (told["value"], told["p_value"]) == (0, 1)
    assert told["low"] < 0 < told["high"]
    statistic = [lambda weights: np.full(len(weights), 0.5)] * 2
    assert describe_statistic_over_seeds(statistic, [], CLUSTERS, 0.95) is None


def test_more_rows_do_not_find_what_the_seeds_hide():
    generator = np.random.default_rng(2)
    rates = np.array([[0.4], [0.6], [0.8]])
    values = (generator.random((3, 120)) < rates).astype(float)
    base = np.zeros(120)
    design = design_of(values, base, CLUSTERS, "unit", 0.95)
    assert design.by_seeds > 0.4
    assert detectable_difference(design) > design.by_seeds
    assert rows_to_find(design, 0.3) is None
    known = design_of(values[0], base, CLUSTERS, "unit", 0.95)
    assert known.by_seeds == 0
    assert rows_needed(known, 0.3) == rows_to_find(known, 0.3)
    told = describe_difference(values, base, CLUSTERS, SHARE, PLAIN)
    assert told["detectable"] == pytest.approx(detectable_difference(design))


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
def test_intervals_hold_for_other_seeds_and_a_recipe_does_not_beat_itself(num_seeds):
    spec = importlib.util.spec_from_file_location("seeds", ROOT / "benchmarks" / "seeds.py")
    benchmark = sys.modules["seeds"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    for num_clusters, icc, spread in ((120, 0.0, 0.0), (24, 0.3, 0.6)):
        covered, _, difference, rows_alone, better, either, *_ = benchmark.simulate(
            benchmark.Setting(num_clusters, icc, spread), num_seeds, 120
        )
        # Three standard errors below 95%.
        assert min(covered, difference) >= 89
        assert better <= 5
        assert either <= 11
    assert rows_alone < 88, "the interval that knows no seeds"


def test_scores_of_models_are_told_apart_and_a_metric_may_miss_some_answers():
    def sample(model: str, **scores: float | None) -> dict[str, Any]:
        answer = {"completion": model, "finish_reason": "stop", "prompt_tokens": 3, "error": ""}
        answer |= {"completion_tokens": 1, "latency_s": 0.1, "probability": None}
        return answer | {"model": model, "score": scores["hit"], "scores": scores}

    both = [sample("a", hit=1.0, extra=None), sample("b", hit=0.0, extra=0.5)]
    row = Prediction(
        *("r1", "arm", "[]", "x", "a", "stop", 3, 1, 0.1, "scored"),
        scores={"hit": 0.5, "extra": 0.5},
        samples=both,
    )
    lost = replace(row, example_id="r2", status="unscored", scores={}, samples=both[:1])
    assert values_of([row], "hit").tolist() == [[1.0], [0.0]]
    assert values_of([row], "extra").tolist() == [[0.5], [0.5]]
    assert {m: [p.completion for p in rows] for m, rows in by_model([row, lost]).items()} == {
        "a": ["a", "a"],
        "b": ["b", "a"],
    }
    # The same trainings, asked in two ways, are paired.
    other = replace(row, samples=[sample("a", hit=0.5, extra=1.0), sample("b", hit=0.5, extra=1.0)])
    first, second = paired_values([row], [other], "hit")
    assert (first.tolist(), second.tolist()) == ([[0.5], [-0.5]], [0.0])
    alone = replace(row, samples=[])
    assert paired_values([row], [alone], "hit")[0].tolist() == [[1.0], [0.0]]
    assert by_model([alone]) == {"": [alone]}
    assert values_of([alone], "hit").tolist() == [0.5]


def labelled(arm: str, rates: dict[str, float], seed: int) -> list[Prediction]:
    """Return 60 rows that each model of an arm labels right as often as is said."""
    generator = np.random.default_rng(seed)
    rows = []
    for n in range(60):
        label, other = ("on", "off") if n % 2 else ("off", "on")
        samples = []
        for model, rate in rates.items():
            text = label if generator.random() < rate else other
            scores = {"accuracy": float(text == label)}
            samples.append({"completion": text, "finish_reason": "stop", "model": model})
            samples[-1] |= {"prompt_tokens": 3, "completion_tokens": 1, "latency_s": 0.1}
            samples[-1] |= {"probability": None, "scores": scores, "score": scores["accuracy"]}
        mean = float(np.mean([one["score"] for one in samples]))
        rows.append(
            Prediction(
                *(f"r{n}", arm, "[]", label, samples[0]["completion"], "stop", 3, 1, 0.1, "scored"),
                scores={"accuracy": mean},
                cluster=str(n // 3),
                samples=samples if len(samples) > 1 else [],
            )
        )
    return rows


def test_macro_f1_is_the_mean_of_the_models_and_knows_their_seeds():
    task = TaskConfig(type="classification", labels=["on", "off"])
    arms = labelled("base", {"": 0.5}, 1), labelled("three", {"a": 0.6, "b": 0.8, "c": 1.0}, 2)
    rows = [*arms[0], *arms[1], *(replace(p, arm="again") for p in arms[1])]
    scorer = Scorer(task, {p.example_id: p.reference for p in arms[0]}).averaged()
    base, three, _ = summarise(rows, scorer, Resampling(0.95, 200))["arms"]
    of_models = [model["scores"]["macro_f1"]["value"] for model in three["models"]]
    told = three["scores"]["macro_f1"]
    assert told["value"] == pytest.approx(np.mean(of_models))
    assert of_models[2] == 1
    assert told["method"] == "jackknife over clusters, t, rows and seeds"
    assert told["seed_share"] > 0.3
    # An arm that is one model has the interval of one.
    assert base["scores"]["accuracy"]["method"] == "Wilson, ICC averaged"
    pairs = {
        (p["arm"], p["other"]): p["differences"]
        for p in compare(rows, scorer, Resampling(0.95, 200))["pairs"]
    }
    against = pairs["three", "base"]["macro_f1"]
    assert against["value"] == pytest.approx(told["value"] - base["scores"]["macro_f1"]["value"])
    assert (against["p_value"] <= 0.05) == (not against["low"] <= 0 <= against["high"])
    # The same trainings, asked in two ways, differ by nothing: their seeds are in both.
    for name in ("accuracy", "macro_f1"):
        same = pairs["again", "three"][name]
        assert same["value"] == 0
        assert same["high"] < (told["high"] - told["low"]) / 2
