"""Several sampled answers to each row: do the intervals hold, and what a shared seed would do.

Rows have a probability of a right answer, rows of a cluster have one in common (a beta distribution
for the clusters, one for the rows around it). Of each row `m` answers are drawn; its score is their
mean. Shown are the coverage of the 95% interval of the score, the false positives of the paired
test between two arms that are equally good on every row, and the coverage of their difference. The
shared seed draws one random number for all rows, which is what happens when a server is given one
seed for all questions and its first token decides.

    python benchmarks/samples.py [--count 1000]

Source: Miller 2024, "Adding error bars to evals", arXiv:2411.00640, section 3.1.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tuneloop.evals.scoring.clusters import Clusters
from tuneloop.evals.scoring.estimates import describe_difference, describe_mean
from tuneloop.evals.scoring.intervals import Floats, Resampling
from tuneloop.evals.scoring.metrics import Metric

_RESAMPLING = Resampling(0.95, 500)


@dataclass(frozen=True)
class Setting:
    """What is simulated.

    Args:
        num_rows: Rows of the test.
        num_clusters: Clusters of about the same size; as many as rows for rows of their own.
        rate: Mean probability of a right answer.
        spread: How much rows differ: 0 all have the same probability, 1 each is surely right or
            surely wrong. Half of it is between clusters.
    """

    num_rows: int
    num_clusters: int
    rate: float
    spread: float


class Shares(NamedTuple):
    """Of the replicates, from 0 to 1."""

    covered: float
    false_positives: float
    difference_covered: float


def probabilities(setting: Setting, clusters: Floats, generator: np.random.Generator) -> Floats:
    """Return each row's probability of a right answer, shape (n,)."""

    def drawn(mean: Floats, spread: float) -> Floats:
        if spread == 0:
            return mean
        size = (1 - spread) / spread
        mean = np.clip(mean, 1e-6, 1 - 1e-6)
        return generator.beta(mean * size, (1 - mean) * size)

    of_cluster = drawn(np.full(setting.num_clusters, setting.rate), setting.spread / 2)
    return drawn(of_cluster[clusters], setting.spread / 2)


def simulate(
    setting: Setting, num_samples: int, count: int, *, shared_seed: bool = False
) -> Shares:
    """Return how often intervals hold and equal arms differ, for `count` tests."""
    generator = np.random.default_rng(0)
    index = np.arange(setting.num_rows) % setting.num_clusters
    clusters = Clusters.of([str(i) for i in index])
    metric = Metric("right", kind="binary" if num_samples == 1 else "ratio")
    covered = found = difference_covered = 0
    for _ in range(count):
        right = probabilities(setting, index, generator)

        def answered(right: Floats = right) -> Floats:
            rows = 1 if shared_seed else setting.num_rows
            numbers = generator.random((num_samples, rows))
            return (numbers < right).mean(axis=0)

        ours, theirs = answered(), answered()
        mean = describe_mean(ours, clusters, metric, _RESAMPLING)
        covered += mean["low"] <= setting.rate <= mean["high"]
        difference = describe_difference(ours, theirs, clusters, metric, _RESAMPLING)
        found += difference["p_value"] <= 0.05
        difference_covered += difference["low"] <= 0 <= difference["high"]
    return Shares(covered / count, found / count, difference_covered / count)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000, help="replicates of each cell")
    count = parser.parse_args().count
    print(
        "| rows | clusters | rate | spread | answers | covered | false positives | "
        "difference covered | one seed for all rows: covered |\n" + "|---" * 9 + "|"
    )
    for num_rows, num_clusters in ((100, 100), (200, 30)):
        for rate in (0.1, 0.5, 0.9):
            for spread in (0.1, 0.6):
                for num_samples in (1, 4, 16):
                    setting = Setting(num_rows, num_clusters, rate, spread)
                    own = simulate(setting, num_samples, count)
                    shared = simulate(setting, num_samples, max(100, count // 5), shared_seed=True)
                    cells = [f"{100 * share:.1f}" for share in (*own, shared.covered)]
                    print(
                        f"| {num_rows} | {num_clusters} | {rate:.0%} | {spread} | {num_samples} | "
                        f"{' | '.join(cells)} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
