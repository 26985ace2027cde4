"""Intervals and tests for clustered rows: hand calculations, edges, and a small simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import special, stats

from tuneloop.evals.scoring.clusters import (
    Clusters,
    PairedDesign,
    cr2_variance,
    detectable_difference,
    estimate_clustered_difference,
    estimate_clustered_mean,
    estimate_clustered_statistic,
    holm,
    intraclass_correlation,
    rows_needed,
    satterthwaite_df,
    sign_flip_p,
)

# The demo's test split: 112 rows in 24 modules.
DEMO = np.array([1] * 4 + [2] * 5 + [3] * 4 + [4] * 3 + [5, 5, 6, 7, 9, 12, 14, 16])


def of_sizes(sizes):
    return Clusters.of(np.repeat(np.arange(len(sizes)), sizes))


def test_clusters_count_rows_and_sum_values():
    clusters = Clusters.of(["b", "a", "b", "c"])
    assert clusters.sizes.tolist() == [1, 2, 1]
    assert clusters.totals(np.array([1.0, 2.0, 3.0, 4.0])).tolist() == [2, 4, 4]
    assert not clusters.singletons
    assert Clusters.of(["b", "a"]).singletons


def test_cr2_is_the_textbook_formula_written_with_matrices():
    rng = np.random.default_rng(0)
    sizes = np.array([1, 4, 2, 7])
    clusters = of_sizes(sizes)
    values = rng.standard_normal(14)
    ones = np.ones((14, 1))
    hat = ones @ ones.T / 14
    residuals = values - values.mean()
    meat = 0.0
    for group in range(4):
        rows = np.flatnonzero(clusters.index == group)
        eigenvalues, vectors = np.linalg.eigh(np.eye(len(rows)) - hat[np.ix_(rows, rows)])
        adjust = vectors @ np.diag(eigenvalues**-0.5) @ vectors.T
        meat += (np.ones(len(rows)) @ adjust @ residuals[rows]) ** 2
    assert cr2_variance(clusters.totals(values), clusters.sizes) == pytest.approx(meat / 14**2)


@pytest.mark.parametrize("icc", [0.0, 0.3])
def test_degrees_of_freedom_are_those_of_the_matrix_formula(icc):
    sizes = np.array([1.0, 4, 2, 7, 5])
    n = sizes.sum()
    centre = np.eye(5) - np.outer(sizes, np.ones(5)) / n
    covariance = centre @ np.diag(sizes * (1 + (sizes - 1) * icc)) @ centre.T
    product = np.diag(1 / (1 - sizes / n)) @ covariance
    expected = np.trace(product) ** 2 / np.trace(product @ product)
    assert satterthwaite_df(sizes, icc) == pytest.approx(expected)


def test_degrees_of_freedom_of_even_clusters_are_one_less_than_their_number():
    assert satterthwaite_df(np.full(12, 4.0), 0.2) == pytest.approx(11)


def test_intraclass_correlation_of_a_hand_calculation():
    clusters = of_sizes([2, 2, 2])
    # Means 1, 2, 6 around 3: between 2 * (4 + 1 + 9) / 2 = 14; within 6 / 3 = 2; (14-2)/(14+2).
    values = np.array([0.0, 2, 1, 3, 5, 7])
    assert intraclass_correlation(values, clusters) == pytest.approx(0.75)
    assert intraclass_correlation(np.tile([0.0, 1], 3), clusters) == 0


def test_unbounded_means_of_even_clusters_are_a_t_interval_of_the_cluster_means():
    values = np.random.default_rng(1).standard_normal(20)
    estimate = estimate_clustered_mean(values, of_sizes([4] * 5), "unbounded")
    means = values.reshape(5, 4).mean(axis=1)
    low, high = stats.t.interval(0.95, 4, means.mean(), stats.sem(means))
    assert (estimate.low, estimate.high) == pytest.approx((low, high))
    assert estimate.num_clusters == 5
    assert estimate.n == 20


def test_clusters_of_copies_are_as_good_as_one_row_each():
    wins = np.array([1] * 12 + [0] * 12)
    copies = estimate_clustered_mean(
        np.repeat(wins, 10).astype(float), of_sizes([10] * 24), "binary"
    )
    single = stats.binomtest(12, 24).proportion_ci(method="wilson")
    assert copies.high - copies.low == pytest.approx(single.high - single.low, rel=0.08)
    assert copies.design_effect == pytest.approx(10, rel=0.1)


def test_rows_that_ignore_their_clusters_cost_little():
    values = (np.random.default_rng(3).random(500) < 0.6).astype(float)
    estimate = estimate_clustered_mean(values, of_sizes([10] * 50), "binary")
    independent = stats.binomtest(int(values.sum()), 500).proportion_ci(method="wilson")
    assert estimate.high - estimate.low < 1.2 * (independent.high - independent.low)


@pytest.mark.parametrize("scale", ["binary", "unit"])
@pytest.mark.parametrize("sizes", [[5, 9], DEMO.tolist(), [200] * 30], ids=["two", "demo", "large"])
def test_none_and_all_right_leave_room_on_one_side_alone(scale, sizes):
    clusters = of_sizes(sizes)
    n = sum(sizes)
    nothing = estimate_clustered_mean(np.zeros(n), clusters, scale)
    everything = estimate_clustered_mean(np.ones(n), clusters, scale)
    assert (nothing.value, nothing.low) == (0, 0)
    assert (everything.value, everything.high) == (1, 1)
    assert everything.low == pytest.approx(1 - nothing.high, abs=1e-4)
    assert nothing.high > 3.8 / (n + 3.8)  # never shorter than Wilson's for independent rows
    assert nothing.high < 1


def test_interval_holds_its_mean_and_mirrors():
    rng = np.random.default_rng(5)
    clusters = of_sizes(DEMO)
    for rate in (0.01, 0.1, 0.5, 0.97):
        values = (rng.random(112) < rate).astype(float)
        estimate = estimate_clustered_mean(values, clusters, "binary")
        mirrored = estimate_clustered_mean(1 - values, clusters, "binary")
        assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
        assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx(
            (estimate.low, estimate.high), abs=1e-4
        )


def test_one_cluster_and_no_rows_have_no_interval():
    one = estimate_clustered_mean(np.array([0.0, 1.0]), of_sizes([2]), "binary")
    assert (one.value, one.low, one.high, one.method) == (0.5, None, None, "one cluster")
    empty = np.zeros(0)
    none, p_value, _ = estimate_clustered_difference(empty, empty, Clusters.of([]), "binary")
    assert (none.value, p_value) == (None, None)
    pair, p_value, _ = estimate_clustered_difference(
        np.ones(2), np.zeros(2), of_sizes([2]), "binary"
    )
    assert (pair.low, p_value) == (None, 0.5)


def test_sign_flips_are_all_patterns_with_ties_counted_half():
    rng = np.random.default_rng(2)
    for totals in (rng.integers(-4, 5, 9).astype(float), rng.standard_normal(8)):
        sums = np.abs(
            [np.dot(signs, totals) for signs in itertools.product((-1, 1), repeat=len(totals))]
        )
        observed = abs(totals.sum())
        tied = np.isclose(sums, observed)
        expected = (sums[~tied] > observed).sum() / len(sums) + tied.mean() / 2
        assert sign_flip_p(totals) == pytest.approx(expected, abs=2e-3)


def test_sign_flip_of_single_rows_is_mcnemars_mid_p():
    totals = np.array([1.0] * 14 + [-1.0] * 4 + [0.0] * 30)
    expected = 2 * stats.binom.cdf(4, 18, 0.5) - stats.binom.pmf(4, 18, 0.5)
    assert sign_flip_p(totals) == pytest.approx(expected)
    assert sign_flip_p(np.zeros(5)) == 1
    assert sign_flip_p(np.array([3.0, -3.0])) == pytest.approx(0.75)


def test_many_clusters_use_a_limit_that_agrees_with_the_exact_distribution(monkeypatch):
    totals = np.random.default_rng(4).integers(-3, 5, 900).astype(float) / 2
    totals[:40] = 4
    limit = sign_flip_p(totals)
    monkeypatch.setattr("tuneloop.evals.scoring.clusters._MAX_EXACT_FLIPS", 10_000)
    assert limit == pytest.approx(sign_flip_p(totals), rel=1e-2)


def test_difference_is_zero_and_uncertain_where_no_row_differs():
    right = (np.random.default_rng(0).random(112) < 0.6).astype(float)
    clusters = of_sizes(DEMO)
    estimate, p_value, _ = estimate_clustered_difference(right, right, clusters, "binary")
    assert (estimate.value, p_value) == (0, 1)
    assert -estimate.low == estimate.high == pytest.approx(0.12, abs=0.08)
    worst, p_value, _ = estimate_clustered_difference(
        np.zeros(112), np.ones(112), clusters, "binary"
    )
    assert (worst.value, worst.low) == (-1, -1)
    assert -1 < worst.high < -0.6
    assert p_value < 1e-6


def test_difference_turns_with_the_arms():
    rng = np.random.default_rng(8)
    first, second = rng.random((2, 112))
    forth, p_forth, _ = estimate_clustered_difference(first, second, of_sizes(DEMO), "unit")
    back, p_back, _ = estimate_clustered_difference(second, first, of_sizes(DEMO), "unit")
    assert (forth.low, forth.high) == pytest.approx((-back.high, -back.low))
    assert p_forth == pytest.approx(p_back)


def test_jackknife_of_a_mean_is_close_to_its_cr2_interval():
    values = np.random.default_rng(7).random(120)
    clusters = of_sizes([4] * 30)
    jackknife = estimate_clustered_statistic(
        lambda weights: weights @ values / weights.sum(axis=1), clusters, "unit"
    )
    mean = estimate_clustered_mean(values, clusters, "unit")
    assert (jackknife.low, jackknife.high) == pytest.approx((mean.low, mean.high), abs=1e-6)


def test_holm_by_hand():
    adjusted = holm(np.array([0.01, 0.04, np.nan, 0.03, 0.5]))
    assert adjusted.tolist() == pytest.approx([0.04, 0.09, np.nan, 0.09, 0.5], nan_ok=True)
    assert holm(np.array([0.6, 0.7])).tolist() == [1, 1]


def test_detectable_difference_of_independent_rows_is_the_textbook_formula():
    design = PairedDesign(num_clusters=1000, mean_size=1, discordance=0.3)
    expected = (1.96 + 0.8416) * math.sqrt((0.3 - detectable_difference(design) ** 2) / 1000)
    assert detectable_difference(design) == pytest.approx(expected, rel=2e-3)


def test_correlated_rows_need_more_of_them_and_small_tests_stay_below_one():
    even = PairedDesign(24, 5, 0.3)
    clustered = PairedDesign(24, 5, 0.3, icc=0.3)
    assert detectable_difference(clustered) > 1.3 * detectable_difference(even)
    tiny = PairedDesign(3, 1, 0.1)
    assert 0.1 < detectable_difference(tiny) < 1
    uneven = PairedDesign.of(of_sizes(DEMO), 0.3, 0.2)
    assert uneven.num_clusters * uneven.mean_size == pytest.approx(112)
    assert uneven.num_clusters < 24


def test_rows_needed_find_the_difference_and_fewer_do_not():
    design = PairedDesign(24, 5, 0.3, icc=0.1)
    rows = rows_needed(design, 0.05)
    assert rows % 5 == 0
    found = [
        detectable_difference(PairedDesign(clusters, 5, 0.3, icc=0.1))
        for clusters in (rows // 5, rows // 5 - 1)
    ]
    assert found[0] <= 0.05 < found[1]
    with pytest.raises(ValueError, match="not above 0"):
        rows_needed(design, 0.0)


def draw(rng, sizes, mean, icc, count):
    """Right rows by cluster, shape (count, G); rates are beta-distributed."""
    scale = 1 / icc - 1
    rates = rng.beta(mean * scale, (1 - mean) * scale, (count, len(sizes)))
    return rng.binomial(sizes, rates)


def rows_of(totals, sizes):
    return np.concatenate([np.arange(n) < k for n, k in zip(sizes, totals, strict=True)]).astype(
        float
    )


@pytest.mark.parametrize(("mean", "icc"), [(0.1, 0.3), (0.5, 0.2)])
def test_intervals_of_clustered_rates_cover_where_wilsons_do_not(mean, icc):
    rng = np.random.default_rng(11)
    clusters = of_sizes(DEMO)
    hits, plain = [], []
    for totals in draw(rng, DEMO, mean, icc, 150):
        estimate = estimate_clustered_mean(rows_of(totals, DEMO), clusters, "binary")
        hits.append(estimate.low <= mean <= estimate.high)
        wilson = stats.binomtest(int(totals.sum()), 112).proportion_ci(method="wilson")
        plain.append(wilson.low <= mean <= wilson.high)
    assert 0.91 <= np.mean(hits) <= 0.99
    assert np.mean(plain) < 0.86


def test_paired_test_finds_nothing_where_there_is_nothing():
    rng = np.random.default_rng(12)
    clusters = of_sizes(DEMO)
    significant, hits, mcnemar = [], [], []
    for _ in range(400):
        shared, own = rng.standard_normal(24), rng.standard_normal((2, 24))
        rates = special.expit(0.5 + shared + 1.2 * own)[:, clusters.index]
        first, second = (rng.random((2, 112)) < rates).astype(float)
        estimate, p_value, _ = estimate_clustered_difference(first, second, clusters, "binary")
        significant.append(p_value <= 0.05)
        hits.append(estimate.low <= 0 <= estimate.high)
        gained, lost = int((first > second).sum()), int((first < second).sum())
        mcnemar.append(stats.binomtest(gained, gained + lost).pvalue <= 0.05)
    assert 0.02 <= np.mean(significant) <= 0.08
    assert 0.92 <= np.mean(hits) <= 0.98
    assert np.mean(mcnemar) > 0.08
