"""Does the forecast of a sweep hold? `python benchmarks/curves.py [CURVES]`.

Learning curves are made up whose law, noise and saturation are not those that the fit expects:
another family half of the time, the scatter of a single seed unknown to it. It prints how often the
90% intervals at twice and four times the largest data volume hold the true score, how wide they
are, how often there is a refusal, and how near the break-even point is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from tuneloop.sweeps.forecast import Law, SizedScore, fit_law, is_sharp, is_vague


def make_curve(generator: np.random.Generator) -> Callable[[float], float]:
    """Return a true learning curve: score by training rows."""
    floor = generator.uniform(0, 0.4)
    start = generator.uniform(floor + 0.1, 1)
    if generator.random() < 0.5:
        half, exponent = (
            np.exp(generator.uniform(np.log(30), np.log(3000))),
            generator.uniform(0.4, 1.4),
        )
        return lambda size: 1 - floor - (start - floor) / (1 + (size / half) ** exponent)
    # Saturates faster than any power: an exponential of a power.
    scale, shape = np.exp(generator.uniform(np.log(50), np.log(2000))), generator.uniform(0.4, 1)
    return lambda size: 1 - floor - (start - floor) * np.exp(-((size / scale) ** shape))


def measure(
    curve: Callable[[float], float], num_sizes: int, num_seeds: int, generator: np.random.Generator
) -> list[SizedScore]:
    """Return what a sweep would measure of a curve.

    All trials answer the same rows: three fifths of their noise are common to them.
    """
    num_rows, scatter = int(generator.choice([100, 200, 500])), generator.uniform(0.005, 0.03)
    smallest = int(generator.choice([25, 50, 100]))
    of_rows = np.sqrt(0.6) * generator.standard_normal()
    points = []
    for power in range(num_sizes):
        size = smallest * 2**power
        rate = curve(size)
        row_error = np.sqrt(rate * (1 - rate) / num_rows)
        of_seeds = np.sqrt(0.4) * generator.standard_normal(num_seeds).mean()
        of_training = scatter * generator.standard_normal(num_seeds).mean()
        score = float(np.clip(rate + row_error * (of_rows + of_seeds) + of_training, 0, 1))
        # A single seed does not tell its scatter.
        known = 0.0 if num_seeds == 1 else scatter**2 / num_seeds
        rows = (score * (1 - score) / num_rows + 1 / num_rows**2) * (0.6 + 0.4 / num_seeds)
        points.append(SizedScore(size, score, float(np.sqrt(rows + known))))
    return points


class BreakEven(NamedTuple):
    """Whether a break-even point was told, and is within a factor of 1.5 and its interval."""

    is_told: bool
    is_near: bool
    is_covered: bool


def try_break_even(
    law: Law, curve: Callable[[float], float], largest: int, generator: np.random.Generator
) -> BreakEven | None:
    """Return how a bar is met that the true curve passes near the sizes that were tried.

    None where the curve is so flat that no number of rows is the right one.
    """
    true = np.exp(generator.uniform(np.log(largest / 4), np.log(largest * 2)))
    if curve(true * 1.5) - curve(true / 1.5) < 0.03:
        return None
    estimate = law.break_even(curve(true), 0.0)
    factor = max(estimate.value / true, true / max(estimate.value, 1e-9))
    return BreakEven(is_sharp(estimate), factor < 1.5, estimate.low <= true <= estimate.high)


def main(num_curves: int) -> None:
    print(
        "| sizes | seeds | refused | 2x covered | width | 4x covered | width "
        "| break-even told | all within 1.5 | told within 1.5 | covered |"
    )
    print("|---" * 11 + "|")
    for num_sizes in (3, 4, 5, 6):
        for num_seeds in (1, 3):
            generator = np.random.default_rng(num_sizes * 10 + num_seeds)
            covered, widths = {2: [], 4: []}, {2: [], 4: []}
            bars: list[BreakEven] = []
            num_refused = 0
            for _ in range(num_curves):
                curve = make_curve(generator)
                points = measure(curve, num_sizes, num_seeds, generator)
                largest = points[-1].num_examples
                law = fit_law(points, is_share=True)
                num_refused += is_vague(law.at(4 * largest), law)
                for times in (2, 4):
                    forecast = law.at(times * largest)
                    if is_vague(forecast, law):
                        continue
                    covered[times].append(forecast.low <= curve(times * largest) <= forecast.high)
                    widths[times].append(forecast.high - forecast.low)
                if (met := try_break_even(law, curve, largest, generator)) is not None:
                    bars.append(met)
            cells = [num_sizes, num_seeds, f"{num_refused / num_curves:.0%}"]
            for times in (2, 4):
                cells += [f"{np.mean(covered[times]):.1%}", f"{100 * np.mean(widths[times]):.0f}"]
            told = [bar for bar in bars if bar.is_told]
            cells += [f"{len(told) / len(bars):.0%} of {len(bars)}"]
            for found in (bars, told):
                cells += [f"{np.mean([bar.is_near for bar in found]):.0%}"]
            cells += [f"{np.mean([bar.is_covered for bar in bars]):.0%}"]
            print("|", " | ".join(map(str, cells)), "|", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 500)
