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

from tuneloop.sweeps.forecast import Law, SizedScore, fit_law, is_vague


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


def make_steep_curve(generator: np.random.Generator) -> Callable[[float], float]:
    """Return a curve as of finetuning at a fixed number of epochs: more rows are more steps."""
    floor = generator.uniform(0, 0.2)
    start = generator.uniform(floor + 0.3, 1)
    half, exponent = np.exp(generator.uniform(np.log(40), np.log(600))), generator.uniform(1.5, 3.0)
    return lambda size: 1 - floor - (start - floor) / (1 + (size / half) ** exponent)


class Measured(NamedTuple):
    """What a sweep would measure of a curve.

    Args:
        covariance: Of the points' noise, as their rows tell it. Shape (K, K).
        num_rows: That are scored.
        of_rows: The noise that all scores on these rows have in common, in standard errors.
    """

    points: list[SizedScore]
    covariance: np.ndarray
    num_rows: int
    of_rows: float


# Of the noise of the rows so much is common to all that answer them.
_COMMON = 0.6


def measure(
    curve: Callable[[float], float], num_sizes: int, num_seeds: int, generator: np.random.Generator
) -> Measured:
    """Return what a sweep would measure of a curve. All trials answer the same rows."""
    num_rows, scatter = int(generator.choice([100, 200, 500])), generator.uniform(0.005, 0.03)
    smallest = int(generator.choice([25, 50, 100]))
    of_rows = generator.standard_normal()
    points, errors = [], []
    for power in range(num_sizes):
        size = smallest * 2**power
        rate = curve(size)
        row_error = np.sqrt(rate * (1 - rate) / num_rows)
        of_seeds = np.sqrt(1 - _COMMON) * generator.standard_normal(num_seeds).mean()
        of_training = scatter * generator.standard_normal(num_seeds).mean()
        noise = row_error * (np.sqrt(_COMMON) * of_rows + of_seeds) + of_training
        score = float(np.clip(rate + noise, 0, 1))
        # A single seed does not tell its scatter.
        known = 0.0 if num_seeds == 1 else scatter**2 / num_seeds
        rows = score * (1 - score) / num_rows + 1 / num_rows**2
        total = rows * (_COMMON + (1 - _COMMON) / num_seeds) + known
        points.append(SizedScore(size, score, float(np.sqrt(total))))
        errors.append(float(np.sqrt(rows)))
    covariance = _COMMON * np.outer(errors, errors)
    np.fill_diagonal(covariance, [point.std_error**2 for point in points])
    return Measured(points, covariance, num_rows, of_rows)


class BreakEven(NamedTuple):
    """How near a break-even point is.

    Attributes:
        is_told: It was named.
        is_near: Within a factor of 1.5 of the true one.
        is_covered: Inside its interval.
        knows_shape: Whether it would be near if the true curve were known but for its height.
    """

    is_told: bool
    is_near: bool
    is_covered: bool
    knows_shape: bool


def try_break_even(
    law: Law, curve: Callable[[float], float], measured: Measured, generator: np.random.Generator
) -> BreakEven | None:
    """Return how a bar is met that the true curve passes near the sizes that were tried.

    The bar is measured on the same rows. None where the curve is so flat that no number of rows is
    the right one.
    """
    points, num_rows = measured.points, measured.num_rows
    largest = points[-1].num_examples
    true = np.exp(generator.uniform(np.log(largest / 4), np.log(largest * 2)))
    if curve(true * 1.5) - curve(true / 1.5) < 0.03:
        return None
    rate = curve(true)
    own = np.sqrt(1 - _COMMON) * generator.standard_normal()
    noise = np.sqrt(rate * (1 - rate) / num_rows) * (np.sqrt(_COMMON) * measured.of_rows + own)
    bar = float(np.clip(rate + noise, 0, 1))
    std_error = float(np.sqrt(bar * (1 - bar) / num_rows + 1 / num_rows**2))
    errors = [
        np.sqrt(point.score * (1 - point.score) / num_rows + 1 / num_rows**2) for point in points
    ]
    estimate = law.break_even(bar, std_error, _COMMON * std_error * np.array(errors))
    # Moved by the mean of what the points lie above it, the true curve meets the bar here.
    height = np.mean([point.score - curve(point.num_examples) for point in points])
    sizes = np.geomspace(true / 100, true * 100, 2000)
    known = sizes[np.argmax(np.array([curve(size) for size in sizes]) + height >= bar)]
    return BreakEven(
        estimate.is_sharp,
        _factor(estimate.value, true) < 1.5,
        estimate.low <= true <= estimate.high,
        _factor(known, true) < 1.5,
    )


def _factor(estimate: float, true: float) -> float:
    return max(estimate / true, true / max(estimate, 1e-9))


def main(num_curves: int) -> None:
    for make in (make_curve, make_steep_curve):
        print(f"\n{make.__name__}\n")
        try_family(make, num_curves)


def try_family(
    make: Callable[[np.random.Generator], Callable[[float], float]], num_curves: int
) -> None:
    """Print the table of a family of curves."""
    print(
        "| sizes | seeds | refused | 2x covered | width | 4x covered | width "
        "| break-even told | all within 1.5 | told within 1.5 | shape known | covered |"
    )
    print("|---" * 12 + "|")
    for num_sizes in (3, 4, 5, 6):
        for num_seeds in (1, 3):
            generator = np.random.default_rng(num_sizes * 10 + num_seeds)
            covered, widths = {2: [], 4: []}, {2: [], 4: []}
            bars: list[BreakEven] = []
            num_refused = 0
            for _ in range(num_curves):
                curve = make(generator)
                measured = measure(curve, num_sizes, num_seeds, generator)
                largest = measured.points[-1].num_examples
                law = fit_law(measured.points, is_share=True, covariance=measured.covariance)
                num_refused += is_vague(law.at(4 * largest), law)
                for times in (2, 4):
                    forecast = law.at(times * largest)
                    if is_vague(forecast, law):
                        continue
                    covered[times].append(forecast.low <= curve(times * largest) <= forecast.high)
                    widths[times].append(forecast.high - forecast.low)
                if (met := try_break_even(law, curve, measured, generator)) is not None:
                    bars.append(met)
            cells = [num_sizes, num_seeds, f"{num_refused / num_curves:.0%}"]
            for times in (2, 4):
                cells += [f"{np.mean(covered[times]):.1%}", f"{100 * np.mean(widths[times]):.0f}"]
            told = [bar for bar in bars if bar.is_told]
            cells += [f"{len(told) / len(bars):.0%} of {len(bars)}"]
            for found in (bars, told):
                cells += [f"{np.mean([bar.is_near for bar in found]):.0%}"]
            cells += [f"{np.mean([bar.knows_shape for bar in bars]):.0%}"]
            cells += [f"{np.mean([bar.is_covered for bar in bars]):.0%}"]
            print("|", " | ".join(map(str, cells)), "|", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 500)
