"""What is said about more training rows than were tried: right, with its doubt, or not at all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tuneloop.evals.scoring.metrics import Metric
from tuneloop.sweeps.curve import Bar, describe_forecast
from tuneloop.sweeps.forecast import SizedScore, fit_law, refusal

ACCURACY = Metric("right", kind="binary")


def rectified(size: float) -> float:
    """A flat start, then a power law, then 90%; half of the way with 150 rows."""
    return 0.9 - 0.8 / (1 + (size / 150) ** 1.2)


def cells(sizes: list[int], half_width: float = 0.02, curve: Any = rectified) -> list[dict]:
    return [
        {
            "num_train_examples": size, "value": curve(size),
            "low": curve(size) - half_width, "high": curve(size) + half_width,
        }
        for size in sizes
    ]  # fmt: skip


def test_a_known_law_is_found_and_continued() -> None:
    points = [SizedScore(25 * 2**power, rectified(25 * 2**power), 0.005) for power in range(6)]
    law = fit_law(points, is_share=True)
    for times in (2, 4):
        forecast = law.at(times * 800)
        assert forecast.low < rectified(times * 800) < forecast.high
        assert forecast.value == pytest.approx(rectified(times * 800), abs=0.02)
    rows = law.break_even(rectified(150), 0.0)
    assert rows.is_sharp
    assert rows.value == pytest.approx(150, rel=0.1)
    # The same points give the same forecast.
    assert fit_law(points, is_share=True).at(3200) == law.at(3200)


def test_a_loss_is_forecast_downwards() -> None:
    points = [SizedScore(s, 2 + 3 / (1 + s / 100), 0.01) for s in (25, 50, 100, 200, 400)]
    forecast = fit_law(points, is_share=False).at(1600)
    assert forecast.low < 2 + 3 / 17 < forecast.high
    assert forecast.value < points[-1].score


def test_intervals_hold_what_they_say() -> None:
    # benchmarks/curves.py is the long version: more curves, other laws, noise that is not known.
    generator = np.random.default_rng(7)
    held = []
    for _ in range(60):
        floor, half = generator.uniform(0, 0.4), np.exp(generator.uniform(3.5, 7.5))
        drop, exponent = (0.95 - floor) * generator.uniform(0.3, 1), generator.uniform(0.4, 1.4)

        def truth(
            size: float,
            floor: float = floor,
            drop: float = drop,
            half: float = half,
            exponent: float = exponent,
        ) -> float:
            return 1 - floor - drop / (1 + (size / half) ** exponent)  # fmt: skip

        points = [
            SizedScore(size, float(truth(size) + 0.025 * generator.standard_normal()), 0.025)
            for size in (50, 100, 200, 400)
        ]
        forecast = fit_law(points, is_share=True).at(1600)
        held.append(forecast.low <= truth(1600) <= forecast.high)
    # Of 90%, by chance: fewer than 47 of 60 come once in two hundred times.
    assert sum(held) >= 47


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ([], "0 data volumes"),
        ([100], "1 data volume:"),
        ([100, 400], "2 data volumes"),
        ([100, 150, 200], "2.0 times the smallest"),
    ],
)
def test_points_that_bear_no_law_are_refused_with_the_reason(sizes: list[int], reason: str) -> None:
    assert reason in refusal([SizedScore(size, 0.5, 0.1) for size in sizes])
    assert reason in describe_forecast(cells(sizes), ACCURACY, 0.95, [])["refused"]


def test_scores_without_intervals_and_guesses_are_refused() -> None:
    unsure = [cell | {"low": None} for cell in cells([50, 100, 200])]
    assert "0 data volumes" in describe_forecast(unsure, ACCURACY, 0.95, [])["refused"]
    wild = cells([50, 100, 200], half_width=0.45)
    assert "too uncertain" in describe_forecast(wild, ACCURACY, 0.95, [])["refused"]
    rising = Metric("points", kind="number")
    assert "for shares" in describe_forecast(cells([50, 100, 200]), rising, 0.95, [])["refused"]


def test_bars_are_passed_found_or_out_of_reach() -> None:
    bars = [
        Bar("simple", 0.05, 0.04, 0.06),
        Bar("base+few-shot", 0.5, 0.49, 0.51),
        Bar("large", 0.97, 0.96, 0.98),
    ]
    forecast = describe_forecast(cells([25, 50, 100, 200, 400, 800]), ACCURACY, 0.95, bars)
    found = {bar["arm"]: bar for bar in forecast["break_even"]}
    assert [bar["found"] for bar in found.values()] == ["passed", "found", "out of reach"]
    assert found["base+few-shot"]["low"] < 150 < found["base+few-shot"]["high"]
    assert found["large"]["high"] is None
    assert [one["num_examples"] for one in forecast["forecasts"]] == [1600, 3200]
    gain = forecast["forecasts"][0]["gain"]
    assert gain["low"] < rectified(1600) - rectified(800) < gain["high"]


def test_a_bar_of_the_same_rows_is_passed_where_the_curve_passes_it() -> None:
    # The rows are too easy by 4 points, for the curve and for the bar alike.
    sizes = (25, 50, 100, 200, 400)
    easy = {"half_width": 1.96 * 0.04, "curve": lambda size: rectified(size) + 0.04}
    bar = Bar("base+few-shot", 0.54, 0.54 - 1.96 * 0.04, 0.54 + 1.96 * 0.04)
    shared = np.full((6, 6), 0.04**2 * 0.98)
    np.fill_diagonal(shared, 0.04**2)
    found = {}
    for name, of_rows in (("own rows", None), ("same rows", shared)):
        forecast = describe_forecast(cells(list(sizes), **easy), ACCURACY, 0.95, [bar], of_rows)
        (found[name],) = forecast["break_even"]
    width = {name: one["high"] / one["low"] for name, one in found.items()}
    assert width["same rows"] < 1.6 < width["own rows"]
    assert found["same rows"]["num_examples"] == pytest.approx(150, rel=0.15)
    assert found["same rows"]["near"] > found["own rows"]["near"]
