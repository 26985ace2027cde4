"""What early stopping of a sweep saves, and what it costs: `python benchmarks/early_stopping.py`.

Sweeps over 12 learning rates with made-up losses, under the scheduler that a sweep has. A small
rate learns slowly, a large one fast and then not at all; which one is best, and by how much, is
drawn for each sweep, and every loss is measured with noise. It prints the share of the steps that
is saved, and how often the survivor's score is within two points of the best of all 12. Then how
often a reported score holds, where 12 models are equally good: chosen on one split and tested on
another.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple, cast

import numpy as np
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import TrialScheduler

from tuneloop.config import SweepConfig
from tuneloop.sweeps.choice import Score, optimism
from tuneloop.sweeps.search import PERCENT
from tuneloop.sweeps.study import Budget, Journal, Study
from tuneloop.sweeps.trials import make_scheduler

RATES = np.geomspace(1e-5, 2e-2, 12)
_MEASUREMENTS = 10
_NUM_SWEEPS = 500


class _Trial(NamedTuple):
    trial_id: str


def make_losses(generator: np.random.Generator) -> np.ndarray:
    """Return the true validation losses of 12 rates at ten places. Shape (12, 10)."""
    best = np.exp(generator.uniform(np.log(1e-4), np.log(5e-3)))
    start, floor = generator.uniform(1.5, 3), generator.uniform(0.2, 0.8)
    distance = np.log10(RATES / best)
    # Beyond the best rate the loss ends higher, far beyond it does not fall at all.
    end = floor + np.where(distance > 0, generator.uniform(0.2, 0.6) * distance**2, 0)
    half = 0.08 * np.maximum(RATES / best, 1e-6) ** -generator.uniform(0.6, 1)
    share = np.arange(1, _MEASUREMENTS + 1) / _MEASUREMENTS
    return end[:, None] + (start - end[:, None]) / (1 + share / half[:, None])


def stop_early(losses: np.ndarray, order: np.ndarray, at_once: int) -> np.ndarray:
    """Return how many measurements each rate came to, `at_once` of them side by side."""
    config = SweepConfig(parameters={"training.learning_rate": [1.0]}, scheduler="asha")
    with TemporaryDirectory() as folder:
        journal = Journal(Path(folder) / "journal")
        study = Study([], Budget(), journal, lambda fingerprint: None)
        scheduler = make_scheduler(config, study)
    assert scheduler is not None
    controller = cast(TuneController, None)
    reached = np.zeros(len(order), int)
    waiting, running = list(order), []
    while waiting or running:
        while waiting and len(running) < at_once:
            running.append(waiting.pop(0))
            scheduler.on_trial_add(controller, cast(TuneTrial, _Trial(str(running[-1]))))
        for rate in list(running):
            reached[rate] += 1
            report = {
                PERCENT: 100 * reached[rate] / _MEASUREMENTS,
                "validation_loss": losses[rate, reached[rate] - 1],
            }
            trial = cast(TuneTrial, _Trial(str(rate)))
            decision = scheduler.on_trial_result(controller, trial, report)
            if decision == TrialScheduler.STOP or reached[rate] == _MEASUREMENTS:
                running.remove(rate)
    return reached


def score(loss: np.ndarray) -> np.ndarray:
    """Return what share of the answers is right: the mean probability of a right token."""
    return np.exp(-loss)


def main(num_sweeps: int) -> None:
    print("| order | at once | steps saved | within 2 points of the best | worst loss of points |")
    print("|---|---|---|---|---|")
    for order in ("ascending", "descending", "random"):
        for at_once in (1, 4):
            generator = np.random.default_rng(0)
            saved, lost = [], []
            for _ in range(num_sweeps):
                losses = make_losses(generator)
                noisy = losses + 0.02 * generator.standard_normal(losses.shape)
                places = {
                    "ascending": np.arange(12),
                    "descending": np.arange(12)[::-1],
                    "random": generator.permutation(12),
                }[order]
                reached = stop_early(noisy, places, at_once)
                whole = np.flatnonzero(reached == _MEASUREMENTS)
                found = whole[noisy[whole, -1].argmin()]
                saved.append(1 - reached.mean() / _MEASUREMENTS)
                scores = score(losses[:, -1])
                lost.append(100 * (scores.max() - scores[found]))
            near = np.mean(np.array(lost) <= 2)
            print(f"| {order} | {at_once} | {np.mean(saved):.0%} | {near:.0%} | {max(lost):.1f} |")
    print(f"\n{describe_choice(4000)}")


def describe_choice(num_sweeps: int) -> str:
    """Return how often the test score of the best of 12 equally good models holds the truth."""
    generator, rate, rows = np.random.default_rng(0), 0.6, 100
    validation = generator.binomial(rows, rate, (num_sweeps, 12)) / rows
    test = generator.binomial(rows, rate, num_sweeps) / rows
    best = validation.max(axis=1)
    width = 1.96 * np.sqrt(test * (1 - test) / rows)
    held = np.mean(np.abs(test - rate) <= width)
    gap = optimism(Score(float(best.mean())), Score(float(test.mean())), True).value
    assert gap is not None
    return (
        f"Best of 12 equally good models (60%, {rows} rows), {num_sweeps:,} sweeps: chosen by "
        f"{best.mean():.1%}, tested {test.mean():.1%}; the 95% interval of the test holds 60% in "
        f"{held:.1%}, reporting the first would have added {100 * gap:.1f} points."
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else _NUM_SWEEPS)
