"""Win rates of biased judges, corrected by votes, on simulated data whose truth is known.

    python benchmarks/judges.py            # about six minutes on one core
    python benchmarks/judges.py --quick    # a fifth of the replicates

Prints, as Markdown: coverage of the 95% intervals of the judge alone, of the votes alone and of the
votes corrected by the judge; and how many more votes an interval as narrow would take without a
judge. Seeds are fixed.

People prefer an answer where they see its quality, with noise, above that of the other; where they
see no difference it is a tie. A judge sees the same quality with noise of its own, and likes the
longer answer, the first one, or its own. Votes are a random part of the rows.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tuneloop.evals.scoring.clusters import Clusters, estimate_clustered_mean
from tuneloop.evals.scoring.corrected import correct_rate

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Judge:
    """What a judge likes besides quality, in units of the quality's spread over rows.

    Args:
        noise: Of each judgement.
        longer: For an answer that is one standard deviation longer.
        first: For the answer that is shown first; both orders are asked, and flips are ties.
        own: For the candidate.
    """

    noise: float
    longer: float = 0.0
    first: float = 0.0
    own: float = 0.0


JUDGES = {
    "good": Judge(0.3),
    "fair": Judge(0.6),
    "noisy": Judge(2.0),
    "longer wins": Judge(0.6, longer=1.5),
    "first wins": Judge(0.6, first=1.5),
    "likes itself": Judge(0.6, own=1.2),
    "longer, first and itself": Judge(1.0, longer=1.0, first=1.0, own=1.0),
    "knows nothing": Judge(1e6),
}


@dataclass(frozen=True)
class Design:
    """How many rows, in clusters of which size, with how many votes; the candidate's lead."""

    num_rows: int
    cluster_size: int
    num_votes: int
    lead: float
    icc: float = 0.3


DESIGNS = [
    Design(rows, size, votes, lead)
    for rows, size in ((300, 1), (1000, 1), (600, 4), (1000, 20))
    for votes in (40, 100, 200)
    for lead in (0.0, 0.6, 1.5)
]


def votes_of(quality: Floats, noise: Floats) -> Floats:
    """Return 1 where the candidate wins, 0.5 for a tie, 0 where it loses."""
    seen = quality + noise
    return np.where(np.abs(seen) < 0.15, 0.5, (seen > 0).astype(float))


class Drawn:
    """Rows whose votes and judgements are known."""

    def __init__(self, design: Design, judge: Judge, rng: np.random.Generator) -> None:
        n = design.num_rows
        ids = np.arange(n) // design.cluster_size
        shared = rng.normal(size=ids.max() + 1)[ids]
        icc = design.icc if design.cluster_size > 1 else 0.0
        quality = design.lead + np.sqrt(icc) * shared + np.sqrt(1 - icc) * rng.normal(size=n)
        longer = rng.normal(size=n) + 0.5  # the candidate writes more
        self.votes = votes_of(quality, 0.5 * rng.normal(size=n))
        seen = quality + judge.longer * longer + judge.own
        both = [
            votes_of(seen + side * judge.first, judge.noise * rng.normal(size=n))
            for side in (1, -1)
        ]
        self.judged = np.where(both[0] == both[1], both[0], 0.5)
        self.clusters = Clusters.of(ids)
        self.has_vote = np.zeros(n, dtype=bool)
        self.has_vote[rng.permutation(n)[: design.num_votes]] = True


def truth_of(lead: float) -> float:
    """Return the rate of votes over all rows there could be."""
    rng = np.random.default_rng(99)
    quality = lead + rng.normal(size=4_000_000)
    return float(votes_of(quality, 0.5 * rng.normal(size=len(quality))).mean())


def simulate(designs: list[Design], replicates: int) -> None:
    """Print coverage and gain of each judge."""
    truths = {lead: truth_of(lead) for lead in {design.lead for design in designs}}
    print(
        "| judge | correlation with votes | judge alone | votes alone | corrected | "
        "its cells | more votes, as it were |\n|---|---|---|---|---|---|---|"
    )
    for name, judge in JUDGES.items():
        hits = np.zeros((len(designs), 3))
        correlations, gains = [], []
        for row, design in enumerate(designs):
            for number in range(replicates):
                drawn = Drawn(design, judge, np.random.default_rng([7, row, number]))
                votes = np.where(drawn.has_vote, drawn.votes, np.nan)
                rate = correct_rate(votes, drawn.judged, drawn.clusters)
                alone = estimate_clustered_mean(drawn.judged, drawn.clusters, "unit")
                for place, estimate in enumerate((alone, rate.votes_alone, rate.estimate)):
                    low, high = estimate.low or 0.0, 1.0 if estimate.high is None else estimate.high
                    hits[row, place] += low <= truths[design.lead] <= high
                if np.ptp(drawn.judged) > 0 and np.ptp(drawn.votes) > 0:
                    correlations.append(np.corrcoef(drawn.votes, drawn.judged)[0, 1])
                if rate.gain is not None:
                    gains.append(rate.gain)
        cover = 100 * hits / replicates
        print(
            f"| {name} | {np.mean(correlations):.2f} | {cover[:, 0].mean():.1f} | "
            f"{cover[:, 1].mean():.1f} | {cover[:, 2].mean():.1f} | "
            f"{cover[:, 2].min():.1f} to {cover[:, 2].max():.1f} | "
            f"{100 * (np.median(gains) - 1):+.0f}% |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    started = time.process_time()
    simulate(DESIGNS, 200 if quick else 1000)
    print(f"\n{time.process_time() - started:.0f} s of CPU")


if __name__ == "__main__":
    main()
