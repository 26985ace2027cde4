"""Several trainings as one arm: do the intervals hold, and does a recipe ever beat itself?

A row's chance of a right answer is logistic in what its cluster, the row itself, the seed, and the
seed on this row add. Shown for each number of seeds are the coverage of the 95% interval of a
recipe's score, how often the recipe is called better than itself with as many other seeds (and how
often either way), the coverage of its difference to a fixed base model, and how wide that interval
is beside the one that knows nothing of seeds; `t, Satterthwaite` is the estimator before.

    python benchmarks/seeds.py [--count 1000]
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import special, stats

from tuneloop.evals.scoring.clusters import (
    Clusters,
    intraclass_correlation,
    mean_with_error,
    satterthwaite_df,
)
from tuneloop.evals.scoring.estimates import describe_difference, describe_mean
from tuneloop.evals.scoring.intervals import Floats, Resampling
from tuneloop.evals.scoring.metrics import Metric
from tuneloop.evals.scoring.seeds import Seeds

_RESAMPLING = Resampling(0.95, 0)
_SHARE = Metric("right", kind="ratio")


@dataclass(frozen=True)
class Setting:
    """What is simulated; deviations are of the logit.

    Args:
        num_clusters: Of the 120 rows; as many for rows of their own.
        icc: Share of the rows' variance that clusters have in common.
        spread: Deviation of a seed's mean; 0.4 are about 6 points.
        rate: Mean score of the recipe.
    """

    num_clusters: int
    icc: float
    spread: float
    rate: float = 0.6
    num_rows: int = 120
    rows: float = 1.5
    noise: float = 1.0

    @property
    def deviation(self) -> float:
        return math.sqrt(self.rows**2 + self.noise**2 + self.spread**2)


def mean_right(centre: float, deviation: float) -> float:
    """Return the mean of the logistic function of a normal variable."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    return float(weights @ special.expit(centre + deviation * nodes) / weights.sum())


@cache
def centre_of(rate: float, deviation: float) -> float:
    """Return the mean logit at which that many are right."""
    low, high = -20.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_right(middle, deviation) < rate else (low, middle)
    return low


class Test:
    """The rows of one test: how hard they are, and who answers them."""

    def __init__(self, setting: Setting, generator: np.random.Generator) -> None:
        self.setting, self._generator = setting, generator
        self.index = np.arange(setting.num_rows) % setting.num_clusters
        shared = generator.standard_normal(setting.num_clusters)[self.index]
        own = generator.standard_normal(setting.num_rows)
        icc = setting.icc
        self.rows = setting.rows * (math.sqrt(icc) * shared + math.sqrt(1 - icc) * own)
        self.centre = centre_of(setting.rate, setting.deviation)

    def answers(self, num_seeds: int) -> Floats:
        """Return what trainings of the recipe score, shape (S, n), 0 or 1."""
        draw = self._generator.standard_normal
        noise = self.setting.noise * draw((num_seeds, len(self.rows)))
        logits = self.centre + self.rows + self.setting.spread * draw((num_seeds, 1)) + noise
        return (self._generator.random(logits.shape) < special.expit(logits)).astype(np.float64)

    def base(self) -> Floats:
        """Return what a fixed model scores, shape (1, n); right as often as the recipe less 20."""
        logits = self.rows + self.setting.noise * self._generator.standard_normal(len(self.rows))
        deviation = math.hypot(self.setting.rows, self.setting.noise)
        centre = centre_of(self.setting.rate - 0.2, deviation)
        right = self._generator.random(len(self.rows)) < special.expit(centre + logits)
        return right.astype(np.float64)[None]


def by_satterthwaite(values: Floats, clusters: Clusters) -> tuple[float, float]:
    """Return the interval of a mean over seeds with one t for the sum of both variances."""
    averaged = values.mean(axis=0)
    described = mean_with_error(averaged, clusters)
    each, num_seeds = Seeds.of_rows(values, clusters), len(values)
    noise = float(((each.parts - each.parts.mean(axis=0)) ** 2).sum()) / (num_seeds - 1)
    rows = (described.std_error or 0.0) ** 2
    seeds = max(0.0, float(each.means.var(ddof=1)) - noise) / num_seeds
    df = satterthwaite_df(clusters.sizes, intraclass_correlation(averaged, clusters))
    df = (rows + seeds) ** 2 / (rows**2 / df + seeds**2 / (len(values) - 1))
    half = float(stats.t.ppf(0.975, df)) * math.sqrt(rows + seeds)
    return float(averaged.mean()) - half, float(averaged.mean()) + half


def simulate(setting: Setting, num_seeds: int, count: int) -> list[float]:
    """Return the shares, in per cent, that the table shows, and the ratio of widths."""
    generator = np.random.default_rng(0)
    hits, widths = [], []
    for _ in range(count):
        test = Test(setting, generator)
        clusters = Clusters.of(test.index)
        recipe, again, base = test.answers(num_seeds), test.answers(num_seeds), test.base()
        mean = describe_mean(recipe, clusters, _SHARE, _RESAMPLING)
        against = describe_difference(recipe, base, clusters, _SHARE, _RESAMPLING)
        itself = describe_difference(recipe, again, clusters, _SHARE, _RESAMPLING)
        average = recipe.mean(axis=0)
        plain = describe_difference(average, base[0], clusters, _SHARE, _RESAMPLING)
        low, high = by_satterthwaite(recipe, clusters)
        hits.append(
            [
                mean["low"] <= setting.rate <= mean["high"],
                low <= setting.rate <= high,
                against["low"] <= 0.2 <= against["high"],
                plain["low"] <= 0.2 <= plain["high"],
                itself["low"] > 0 and itself["p_value"] <= 0.05,
                itself["p_value"] <= 0.05,
                against["low"] > 0 and against["p_value"] <= 0.05,
            ]
        )
        widths.append((against["high"] - against["low"]) / (plain["high"] - plain["low"]))
    return [*(100 * np.mean(hits, axis=0)).tolist(), float(np.median(widths))]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000, help="replicates of each cell")
    count = parser.parse_args().count
    columns = [
        *("seeds", "clusters", "ICC", "deviation of seeds", "score covered"),
        *("by t, Satterthwaite", "difference to base covered", "without seeds"),
        *("better than itself", "or worse", "20 points found", "width, median"),
    ]
    print(f"| {' | '.join(columns)} |\n" + "|---" * len(columns) + "|")
    for num_seeds in (2, 3, 5):
        for num_clusters, icc in ((120, 0.0), (24, 0.0), (24, 0.3)):
            for spread in (0.0, 0.2, 0.4, 1.0):
                shares = simulate(Setting(num_clusters, icc, spread), num_seeds, count)
                cells = [*(f"{share:.1f}" for share in shares[:-1]), f"×{shares[-1]:.2f}"]
                given = (num_seeds, num_clusters, icc, spread)
                print(
                    "| " + " | ".join([*(f"{one:g}" for one in given), *cells]) + " |", flush=True
                )


if __name__ == "__main__":
    main()
