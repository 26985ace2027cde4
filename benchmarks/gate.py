"""The gate's verdicts on simulated models whose truth is known.

    python benchmarks/gate.py            # some minutes on one core
    python benchmarks/gate.py --quick    # a fifth of the replicates

Two models answer the same rows in uneven clusters: the second is the first with another seed, is 5
points worse, or 5 points better. Prints, as Markdown, how often each verdict is given with a margin
of 5 points: what is worse by the whole margin must not pass. The seeds are fixed.
"""

from __future__ import annotations

import argparse
from collections import Counter

import numpy as np

from tuneloop.config import TaskConfig
from tuneloop.evals.reporting.gate import decide
from tuneloop.evals.scoring.comparison import compare, summarise
from tuneloop.evals.scoring.intervals import Resampling
from tuneloop.evals.scoring.metrics import Scorer
from tuneloop.evals.scoring.predictions import Prediction
from tuneloop.evals.scoring.results import Evaluation
from tuneloop.evals.scoring.slices import describe_slices

MARGIN, GAIN = 0.05, 0.05
TASK = TaskConfig(type="classification", labels=["yes", "no"])
DESIGNS = ((100, 100), (112, 24), (500, 50), (2_000, 2_000), (2_000, 100))
VERDICTS = ("better", "not worse", "worse", "cannot tell")


def simulate(
    num_rows: int, num_clusters: int, gain: float, generator: np.random.Generator
) -> Evaluation:
    """Return an evaluation of two models on rows that are easy or hard for both.

    Args:
        gain: By which the second model is better, on average.
    """
    raw = generator.lognormal(0, 0.8 if num_clusters < num_rows else 0, num_clusters)
    cluster = np.sort(generator.choice(num_clusters, num_rows, p=raw / raw.sum()))
    if num_clusters == num_rows:
        cluster = np.arange(num_rows)
    # A row's rate: of its cluster and of its own, around 70%.
    logit = 0.85 + 0.8 * generator.standard_normal(num_clusters)[cluster]
    rates = 1 / (1 + np.exp(-logit - 1.5 * generator.standard_normal(num_rows)))
    rates = np.clip(rates, abs(gain), 1 - abs(gain))
    right = generator.random((2, num_rows)) < np.stack([rates, rates + gain])
    ids = [f"r{index:05d}" for index in range(num_rows)]
    scorer = Scorer(TASK, dict.fromkeys(ids, "yes"))
    rows = [
        Prediction(
            key, arm, "[]", "yes", "yes" if good else "no", "stop", 1, 1, 0.1, "scored",
            scores={"accuracy": float(good)}, cluster=f"c{number}",
        )
        for arm, answers in zip(("old", "new"), right, strict=True)
        for key, good, number in zip(ids, answers, cluster, strict=True)
    ]  # fmt: skip
    settings = Resampling(num_resamples=100)
    return Evaluation(
        "gate",
        rows,
        summarise(rows, scorer, settings),
        compare(rows, scorer, settings, MARGIN),
        describe_slices(rows, [], scorer, settings.confidence),
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a fifth of the replicates")
    count = 80 if parser.parse_args().quick else 400
    print(f"{count} replicates a line, margin {MARGIN:.0%}\n")
    print("| rows | clusters | truth | " + " | ".join(VERDICTS) + " |\n|" + "---|" * 7)
    for num_rows, num_clusters in DESIGNS:
        for truth, gain in (
            ("another seed", 0.0),
            ("5 points worse", -GAIN),
            ("5 points better", GAIN),
        ):
            generator = np.random.default_rng(1)
            found = Counter(
                decide(simulate(num_rows, num_clusters, gain, generator)).verdict
                for _ in range(count)
            )
            shares = " | ".join(f"{100 * found[verdict] / count:.1f}%" for verdict in VERDICTS)
            print(f"| {num_rows:,} | {num_clusters:,} | {truth} | {shares} |", flush=True)


if __name__ == "__main__":
    main()
