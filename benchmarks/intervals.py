"""Intervals and tests for clustered rows on simulated data whose truth is known.

    python benchmarks/intervals.py            # about four minutes on one core
    python benchmarks/intervals.py --quick    # a fifth of the replicates
    python benchmarks/intervals.py --cells    # also every cell of the first two tables

Prints, as Markdown: coverage and width of 95% intervals of a rate; false positives of paired
tests and coverage of paired intervals; the same for scores other than 0/1, for few clusters;
the power at the difference that is said to be detectable. Seeds are fixed.

A cluster's rate is beta or logit-normal with the given mean and intraclass correlation (ICC).
Paired arms share half of their clusters' effects and half of each row's. All methods treat 0 and 1
alike, so 2% stands for 98%. Widths are relative to Wilson's interval with the true ICC, which
nobody knows.

Shape legend: R replicates, G clusters, n rows, K intraclass correlations, M rates.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

from tuneloop.evals.scoring.clusters import (
    ICC_GRID,
    ICC_PRIOR,
    Clusters,
    PairedDesign,
    detectable_difference,
    estimate_clustered_difference,
    estimate_clustered_mean,
    satterthwaite_df,
    sign_flip_p,
)

Floats = NDArray[np.float64]
Z = 1.959964
# The demo's test split: 112 rows in 24 modules.
DEMO = [1] * 4 + [2] * 5 + [3] * 4 + [4] * 3 + [5, 5, 6, 7, 9, 12, 14, 16]
ICCS = (0.0, 0.1, 0.3, 0.5)
ANGLES = np.linspace(0, np.pi / 2, 122)[1:-1]
RATES = np.sin(ANGLES) ** 2


class Ends(NamedTuple):
    """Lower and upper ends of intervals, each of shape (R,)."""

    low: Floats
    high: Floats


class Pairs(NamedTuple):
    """Rows by cluster, each of shape (R, G): right in the first arm, in the second, in both."""

    first: Floats
    second: Floats
    both: Floats


def uneven(num_clusters: int, mean_size: int) -> Floats:
    """Return sizes whose largest is some ten times the smallest, shape (G,)."""
    raw = np.random.default_rng(1).lognormal(0, 0.8, num_clusters)
    return np.maximum(1, np.round(raw / raw.mean() * mean_size))


SIZES = {
    "demo: 24, 112 rows": np.array(DEMO, dtype=np.float64),
    "20 uneven, 100 rows": uneven(20, 5),
    "20 uneven, 500 rows": uneven(20, 25),
    "50 uneven, 500 rows": uneven(50, 10),
    "30 of 4 rows": np.full(30, 4.0),
}


def cluster_rates(kind: str, mean: float, icc: float, normal: Floats) -> Floats:
    """Return rates with this mean and ICC from standard normal effects, shape unchanged."""
    if icc == 0:
        return np.full(normal.shape, mean)
    if kind == "beta":
        grid = np.linspace(-6, 6, 4001)
        scale = 1 / icc - 1
        quantiles = stats.beta.ppf(special.ndtr(grid), mean * scale, (1 - mean) * scale)
        return np.interp(normal, grid, quantiles)
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    weights = weights / weights.sum()

    def centre(spread: float) -> float:
        return optimize.brentq(
            lambda c: special.expit(c + spread * nodes) @ weights - mean, -400, 400
        )

    def excess(spread: float) -> float:
        rates = special.expit(centre(spread) + spread * nodes)
        return (rates**2 @ weights - mean**2) / (mean * (1 - mean)) - icc

    spread = optimize.brentq(excess, 1e-3, 60)
    return special.expit(centre(spread) + spread * normal)


def draw_totals(kind: str, mean: float, icc: float, sizes: Floats, count: int) -> Floats:
    """Return right rows by cluster, shape (R, G)."""
    generator = np.random.default_rng(7)
    rates = cluster_rates(kind, mean, icc, generator.standard_normal((count, len(sizes))))
    return generator.binomial(sizes.astype(int), rates).astype(np.float64)


def draw_pairs(means: tuple[float, float], icc: float, sizes: Floats, count: int) -> Pairs:
    """Return two arms on the same rows, with logit-normal rates."""
    generator = np.random.default_rng(3)
    starts = np.r_[0, np.cumsum(sizes)[:-1]].astype(int)
    index = np.repeat(np.arange(len(sizes)), sizes.astype(int))
    cluster = generator.standard_normal((2, count, len(sizes)))
    cluster[1] = 0.5 * cluster[0] + np.sqrt(0.75) * cluster[1]
    row = generator.standard_normal((2, count, len(index)), dtype=np.float32)
    row[1] = 0.5 * row[0] + np.float32(np.sqrt(0.75)) * row[1]
    right = [
        row[arm]
        < stats.norm.ppf(cluster_rates("logit", means[arm], icc, cluster[arm])).astype(np.float32)[
            :, index
        ]
        for arm in (0, 1)
    ]
    totals = [
        np.add.reduceat(each.astype(np.int32), starts, axis=1).astype(np.float64)
        for each in (*right, right[0] & right[1])
    ]
    return Pairs(*totals)


def wilson(rate: Floats, rows: Floats | float, quantile: Floats | float) -> Ends:
    """Return Wilson's interval for this many independent rows."""
    ratio = quantile**2 / rows
    centre = (rate + ratio / 2) / (1 + ratio)
    half = np.sqrt(ratio * rate * (1 - rate) + ratio**2 / 4) / (1 + ratio)
    return Ends(centre - half, centre + half)


def anova_icc(totals: Floats, squares: Floats, sizes: Floats) -> Floats:
    """Return the ANOVA estimate of the ICC, cut to [0, 1], shape (R,)."""
    n, num_clusters = sizes.sum(), len(sizes)
    explained = (totals**2 / sizes).sum(axis=1)
    between = (explained - totals.sum(axis=1) ** 2 / n) / (num_clusters - 1)
    within = (squares - explained) / (n - num_clusters)
    typical = (n - (sizes**2).sum() / n) / (num_clusters - 1)
    spread = between + (typical - 1) * within
    return np.clip((between - within) / np.where(spread > 0, spread, 1), 0, 1)


def cr2(totals: Floats, sizes: Floats) -> Floats:
    """Return the CR2 variance of the mean, shape (R,)."""
    n = sizes.sum()
    residuals = totals - sizes * (totals.sum(axis=1, keepdims=True) / n)
    return (residuals**2 / (1 - sizes / n)).sum(axis=1) / n**2


def t_quantiles(sizes: Floats, icc: Floats) -> Floats:
    """Return t quantiles at Satterthwaite's degrees of freedom, shape (R,)."""
    grid = np.linspace(0, 1, 41)
    return stats.t.ppf(
        0.975, np.interp(icc, grid, [satterthwaite_df(sizes, float(value)) for value in grid])
    )


def chosen_on_grid(totals: Floats, sizes: Floats) -> Ends:
    """Return what `estimate_clustered_mean` does for 0/1 scores, for all replicates at once."""
    n, count = sizes.sum(), len(totals)
    rate = totals.sum(axis=1) / n
    precision = (1 / ICC_GRID - 1)[:, None]
    alpha, beta = (RATES * precision).ravel(), ((1 - RATES) * precision).ravel()
    fit = np.zeros((count, len(alpha)), dtype=np.float32)
    for size in np.unique(sizes):
        wins = np.arange(size + 1)[:, None]
        table = special.betaln(wins + alpha, size - wins + beta) - special.betaln(alpha, beta)
        table = table.astype(np.float32)
        for column in np.flatnonzero(sizes == size):
            fit += table[totals[:, column].astype(int)]
    fit = fit.reshape(count, len(ICC_GRID), len(RATES))
    weights = np.exp(fit - fit.max(axis=1, keepdims=True)) * ICC_PRIOR[:, None]
    weights /= weights.sum(axis=1, keepdims=True)
    half_way = (np.arcsin(np.sqrt(rate))[:, None] + ANGLES) / 2
    nearest = np.clip(np.rint(half_way / ANGLES[0]).astype(int) - 1, 0, len(ANGLES) - 1)
    weights = np.take_along_axis(weights, nearest[:, None, :], axis=2)
    effects = 1 + ((sizes**2).sum() / n - 1) * ICC_GRID
    errors = np.sqrt(RATES * (1 - RATES) / n * effects[:, None])
    levels = np.zeros((count, len(RATES)))
    for k in range(len(ICC_GRID)):
        levels += weights[:, k] * special.stdtr(len(sizes) - 1, (RATES - rate[:, None]) / errors[k])
    low, high = np.zeros(count), np.ones(count)
    for i, value in enumerate(rate):
        angle = np.arcsin(np.sqrt(value))
        above, below = value < RATES, value > RATES
        if value < 1:
            upper = np.interp(
                0.975, np.r_[0.5, levels[i, above], 1], np.r_[angle, ANGLES[above], np.pi / 2]
            )
            high[i] = np.sin(upper) ** 2
        if value > 0:
            lower = np.interp(
                0.025, np.r_[0, levels[i, below], 0.5], np.r_[0, ANGLES[below], angle]
            )
            low[i] = np.sin(lower) ** 2
    return Ends(low, high)


def rate_intervals(totals: Floats, sizes: Floats, icc: float) -> dict[str, Ends]:
    """Return the intervals of every candidate."""
    n = sizes.sum()
    rate = totals.sum(axis=1) / n
    effect = (sizes**2).sum() / n - 1
    variance, correlation = cr2(totals, sizes), anova_icc(totals, totals.sum(axis=1), sizes)
    quantile = t_quantiles(sizes, correlation)
    usable = (variance > 0) & (rate > 0) & (rate < 1)
    # Without variance: as many rows as an ICC of 1 would leave.
    kept = n**2 / (sizes**2).sum()
    effective = np.where(usable, rate * (1 - rate) / np.where(usable, variance, 1), kept)
    by_icc = np.where(usable, n / (1 + effect * correlation), kept)
    half = quantile * np.sqrt(variance)
    return {
        "Wilson, true ICC": wilson(rate, n / (1 + effect * icc), Z),
        "Wilson (until now)": wilson(rate, n, Z),
        "CR2, t": Ends(rate - half, rate + half),
        "Wilson, CR2, t": wilson(rate, np.maximum(effective, 1), quantile),
        "Wilson, ANOVA ICC, t": wilson(
            rate, np.maximum(by_icc, 1), stats.t.ppf(0.975, len(sizes) - 1)
        ),
        "**Wilson, ICC averaged**": chosen_on_grid(totals, sizes),
    }


def newcombe(pairs: Pairs, n: float) -> Ends:
    """Return Newcombe's paired interval of second minus first."""
    both = pairs.both.sum(axis=1)
    first, second = pairs.first.sum(axis=1), pairs.second.sum(axis=1)
    neither = n - first - second + both
    low1, high1 = wilson(first / n, n, Z)
    low2, high2 = wilson(second / n, n, Z)
    margins = first * second * (n - first) * (n - second)
    product = both * neither - (first - both) * (second - both)
    product = np.where(product > 0, np.maximum(product - n / 2, 0), product)
    phi = product / np.sqrt(np.where(margins > 0, margins, 1))
    difference = (second - first) / n
    down2, up2 = second / n - low2, high2 - second / n
    down1, up1 = first / n - low1, high1 - first / n
    return Ends(
        difference - np.sqrt(np.maximum(0, down2**2 - 2 * phi * down2 * up1 + up1**2)),
        difference + np.sqrt(np.maximum(0, up2**2 - 2 * phi * up2 * down1 + down1**2)),
    )


def paired_results(pairs: Pairs, sizes: Floats) -> tuple[dict[str, Floats], dict[str, Ends]]:
    """Return p-values and intervals of every candidate."""
    n = sizes.sum()
    totals = pairs.second - pairs.first
    gained = (pairs.second - pairs.both).sum(axis=1)
    lost = (pairs.first - pairs.both).sum(axis=1)
    mcnemar = np.minimum(1, 2 * stats.binom.cdf(np.minimum(gained, lost), gained + lost, 0.5))
    variance = cr2(totals, sizes)
    correlation = anova_icc(totals, gained + lost, sizes)
    difference = totals.sum(axis=1) / n
    intervals = {"Newcombe (until now)": newcombe(pairs, n)}
    p_values = {"McNemar, exact (until now)": mcnemar}
    for name, icc in (
        ("CR2, t (ICC 0)", 0 * correlation),
        ("**CR2, t (estimated ICC)**", correlation),
    ):
        half = t_quantiles(sizes, icc) * np.sqrt(variance)
        # Without a row that differs the chosen interval covers zero; see `unit` for its width.
        intervals[name] = Ends(difference - half, difference + half)
        p_values[name.replace("*", "")] = np.where(np.abs(difference) > half, 0.0, 1.0)
    p_values["sign-flip, exact"] = np.array([flip_p(each) for each in totals])
    p_values["**sign-flip, mid-p**"] = np.array([sign_flip_p(each) for each in totals])
    return p_values, intervals


def flip_p(totals: Floats) -> float:
    """Return the sign-flip p-value that counts ties in full."""
    sizes = np.abs(totals[totals != 0]).astype(int)
    if len(sizes) == 0:
        return 1.0
    chances = np.ones(1)
    for size in sizes:
        chances = (np.r_[chances, np.zeros(size)] + np.r_[np.zeros(size), chances]) / 2
    excess = np.abs(2 * np.arange(len(chances)) - sizes.sum())
    return min(1.0, float(chances[excess >= abs(totals.sum())].sum()))


def covered(ends: Ends, truth: float) -> float:
    """Return the percentage of intervals that cover the truth."""
    return float(100 * ((ends.low <= truth + 1e-9) & (truth - 1e-9 <= ends.high)).mean())


def show(title: str, header: list[str], lines: list[list[str]]) -> None:
    """Print a Markdown table."""
    print(f"\n### {title}\n\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for line in lines:
        print(f"| {' | '.join(line)} |")


def spread(values: list[float]) -> str:
    """Return the lowest, mean and highest value."""
    return f"{min(values):.1f} · {np.mean(values):.1f} · {max(values):.1f}"


def rates_table(count: int, cells: bool) -> None:
    """Coverage and width of the intervals of a rate."""
    coverage, width = defaultdict(list), defaultdict(list)
    details = []
    for name, sizes in SIZES.items():
        for icc in ICCS:
            for mean in (0.02, 0.1, 0.3, 0.5):
                for kind in ("beta", "logit") if icc else ("logit",):
                    results = rate_intervals(draw_totals(kind, mean, icc, sizes, count), sizes, icc)
                    true_width = float(np.mean(np.subtract(*results["Wilson, true ICC"][::-1])))
                    extreme = mean == 0.02
                    line = [name, kind, f"{icc:g}", f"{mean:.0%}"]
                    for method, ends in results.items():
                        coverage[method, icc, extreme].append(covered(ends, mean))
                        relative = float(np.mean(ends.high - ends.low)) / true_width
                        width[method, icc, extreme].append(relative)
                        line.append(f"{coverage[method, icc, extreme][-1]:.1f} ({relative:.2f})")
                    details.append(line)
    methods = list(results)
    for extreme, label in ((False, "10% to 90%"), (True, "2% and 98%")):
        show(
            f"Intervals of a rate, {label}: coverage in % (lowest · mean · highest), mean width",
            ["method", *(f"ICC {icc:g}" for icc in ICCS)],
            [
                [method]
                + [
                    f"{spread(coverage[method, icc, extreme])} "
                    f"×{np.mean(width[method, icc, extreme]):.2f}"
                    for icc in ICCS
                ]
                for method in methods
            ],
        )
    if cells:
        show("Every cell", ["sizes", "rates", "ICC", "rate", *methods], details)


def pairs_table(count: int, cells: bool) -> None:
    """False positives of the paired tests, coverage of the paired intervals."""
    wrong, coverage, found = defaultdict(list), defaultdict(list), defaultdict(list)
    details = []
    for name, sizes in SIZES.items():
        for icc in ICCS:
            for means in ((0.02, 0.02), (0.1, 0.1), (0.5, 0.5), (0.3, 0.45), (0.9, 0.95)):
                p_values, intervals = paired_results(draw_pairs(means, icc, sizes, count), sizes)
                truth = means[1] - means[0]
                kind = "sparse" if means[0] == 0.02 else "difference" if truth else "null"
                line = [name, f"{icc:g}", f"{means[0]:.0%}", f"{means[1]:.0%}"]
                for method, p in p_values.items():
                    share = float(100 * (p <= 0.05).mean())
                    (found if truth else wrong)[method, icc, kind].append(share)
                    line.append(f"{share:.1f}")
                for method, ends in intervals.items():
                    edge = "edge" if means[0] == 0.9 else kind
                    coverage[method, icc, edge].append(covered(ends, truth))
                    line.append(f"{coverage[method, icc, edge][-1]:.1f}")
                details.append(line)
    header = ["method", *(f"ICC {icc:g}" for icc in ICCS)]
    for kind, label in (("null", "rates 10% to 90%"), ("sparse", "2% and 98%")):
        show(
            f"Paired tests at 5%, no difference, {label}: false positives in %",
            header,
            [[m, *(spread(wrong[m, icc, kind]) for icc in ICCS)] for m in p_values],
        )
    show(
        "Paired tests, 30% against 45% and 90% against 95%: found in %, mean",
        header,
        [[m, *(f"{np.mean(found[m, icc, 'difference']):.1f}" for icc in ICCS)] for m in p_values],
    )
    for kind, label in (
        ("null", "no difference"),
        ("difference", "30% against 45%"),
        ("edge", "90% against 95%"),
    ):
        show(
            f"Paired intervals, {label}: coverage in %",
            header,
            [[m, *(spread(coverage[m, icc, kind]) for icc in ICCS)] for m in intervals],
        )
    if cells:
        show("Every cell", ["sizes", "ICC", "first", "second", *p_values, *intervals], details)


def others_table(count: int) -> None:
    """Scores other than 0/1, few clusters: by the shipped code, one by one."""
    lines = []
    for name in ("demo: 24, 112 rows", "50 uneven, 500 rows"):
        sizes = SIZES[name]
        index = np.repeat(np.arange(len(sizes)), sizes.astype(int))
        clusters = Clusters.of(index)
        for icc in ICCS:
            generator = np.random.default_rng(5)
            hits = defaultdict(list)
            for _ in range(count):
                effect = np.sqrt(icc) * generator.standard_normal(len(sizes))[index]
                normal = effect + np.sqrt(1 - icc) * generator.standard_normal(len(index))
                unit = special.ndtr(1.3 + 1.2 * normal)
                skewed = np.exp(normal)
                truths = {"unit": special.ndtr(1.3 / np.sqrt(1 + 1.2**2)), "unbounded": np.exp(0.5)}
                for scale, values in (("unit", unit), ("unbounded", skewed)):
                    ends = estimate_clustered_mean(values, clusters, scale)
                    hits[scale].append(ends.low <= truths[scale] <= ends.high)
            lines.append(
                [name, f"{icc:g}", *(f"{100 * np.mean(each):.1f}" for each in hits.values())]
            )
    show(
        "Means of scores in [0, 1] (mean 0.8, skewed) and of log-normal scores: coverage in %",
        ["sizes", "ICC", "Wilson, CR2, t", "CR2, t"],
        lines,
    )
    lines = []
    for sizes in ([12, 20], [5, 20, 10], [2, 4, 8, 16, 30], [1, 1, 3, 5, 8, 10, 20, 40]):
        few = np.array(sizes, dtype=np.float64)
        line = [str(len(few))]
        for icc in ICCS:
            for mean in (0.1, 0.5):
                ends = chosen_on_grid(draw_totals("logit", mean, icc, few, 2 * count), few)
                line.append(f"{covered(ends, mean):.1f} ({np.mean(ends.high - ends.low):.2f})")
        lines.append(line)
    show(
        "Few clusters, rates 10% and 50%: coverage in % (width)",
        ["clusters", *(f"ICC {icc:g}, {mean}" for icc in ICCS for mean in ("10%", "50%"))],
        lines,
    )


def power_table(count: int) -> None:
    """Power of the chosen test at the difference that is said to be detectable."""
    lines = []
    for name in ("demo: 24, 112 rows", "20 uneven, 500 rows", "50 uneven, 500 rows"):
        sizes = SIZES[name]
        for icc in (0.0, 0.2):
            discordance = 0.3
            index = np.repeat(np.arange(len(sizes)), sizes.astype(int))
            design = PairedDesign.of(Clusters.of(index), discordance, icc)
            difference = detectable_difference(design)
            generator = np.random.default_rng(2)
            # Discordant rows are gained at a rate that varies from cluster to cluster; the ICC of
            # the differences is that of the rate times the share of variance it explains.
            mean = 0.5 + difference / discordance / 2
            variance = discordance - difference**2
            rate_icc = min(0.95, icc * variance / (4 * discordance**2 * mean * (1 - mean)))
            rates = cluster_rates(
                "beta", mean, rate_icc, generator.standard_normal((count, len(sizes)))
            )
            moved = generator.binomial(sizes.astype(int), discordance, rates.shape)
            totals = 2.0 * generator.binomial(moved, rates) - moved
            found = np.mean([sign_flip_p(each) <= 0.05 for each in totals])
            lines.append(
                [
                    name,
                    f"{icc:g}",
                    f"{design.design_effect:.2f}",
                    f"{difference:.3f}",
                    f"{100 * found:.1f}",
                ]
            )
    show(
        "Detectable difference at 80% power, discordance 0.3: found in %",
        ["sizes", "ICC of differences", "design effect", "difference", "found"],
        lines,
    )


def check_shipped() -> None:
    """Hold the vectorised interval against the shipped one."""
    sizes = SIZES["demo: 24, 112 rows"]
    clusters = Clusters.of(np.repeat(np.arange(len(sizes)), sizes.astype(int)))
    totals = draw_totals("logit", 0.3, 0.3, sizes, 20)
    ends = chosen_on_grid(totals, sizes)
    for i, counts in enumerate(totals):
        values = np.concatenate(
            [np.arange(size) < right for size, right in zip(sizes, counts, strict=True)]
        ).astype(np.float64)
        shipped = estimate_clustered_mean(values, clusters, "binary")
        assert abs(shipped.low - ends.low[i]) < 0.003, (shipped, ends.low[i])
        assert abs(shipped.high - ends.high[i]) < 0.003, (shipped, ends.high[i])
        assert estimate_clustered_difference(values, values, clusters, "binary")[1] == 1.0


def main() -> None:
    """Print every table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a fifth of the replicates")
    parser.add_argument("--cells", action="store_true", help="also print every cell")
    options = parser.parse_args()
    started, part = time.time(), 5 if options.quick else 1
    check_shipped()
    print(f"{1000 // part:,} replicates a cell for rates, pairs and power,")
    print(f"{500 // part:,} for the rest.")
    rates_table(1000 // part, options.cells)
    pairs_table(1000 // part, options.cells)
    others_table(500 // part)
    power_table(1000 // part)
    print(f"\n{time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
