"""What a sweep says to do next is what its numbers say, and the page shows them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tuneloop.evals.scoring.metrics import Metric
from tuneloop.sweeps.advice import advise
from tuneloop.sweeps.curve import ROWS_KEY, Bar, describe_forecast, learning_curves
from tuneloop.sweeps.report import list_candidates, render_sweep, show_tasks

ACCURACY = Metric("right", kind="binary")
SIZES = (50, 100, 200, 400, 800)


def rising(size: float) -> float:
    return 0.95 - 0.9 / (1 + (size / 800) ** 1.0)


def flat(size: float) -> float:
    return 0.7 - 0.5 / (1 + (size / 20) ** 1.7)


def sweep(
    curve: Callable[[float], float],
    bars: list[Bar] | None = None,
    half_width: float = 0.015,
    **more: Any,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return `curve.json` and the trials of a sweep over data volumes."""
    keys = [ROWS_KEY]
    trials = [
        {
            ROWS_KEY: size, "num_train_examples": size, "num_parameters": 10**8, "seed": 0,
            "score": curve(size), "low": curve(size) - half_width, "high": curve(size) + half_width,
            "status": "done", "model": f"models/s@v{size}", "wall_s": 3.6 * size, "problem": "",
            "cpu_hours": size / 1000, "gpu_hours": None, "price": size / 100, "latency_s": 0.5,
            "label_price": size / 2, "loss": 1.0, "test_score": None, "trained_ratio": 1.0,
        }
        for size in SIZES
    ]  # fmt: skip
    best = max(range(len(SIZES)), key=lambda number: trials[number]["score"])
    trials[best]["test_score"] = trials[best]["score"]
    cells = [
        {"values": {ROWS_KEY: trial[ROWS_KEY]}, "trials": [number], "value": trial["score"]}
        | {name: trial[name] for name in ("num_train_examples", "low", "high")}
        for number, trial in enumerate(trials)
    ]
    (line,) = learning_curves(trials, keys)
    line["forecast"] = describe_forecast(cells, ACCURACY, 0.95, bars or [])
    score = {name: trials[best][key] for name, key in (("value", "score"), ("low", "low"))}
    score["high"] = trials[best]["high"]
    content = {
        "metric": "accuracy", "higher_is_better": True, "keys": keys, "curves": [line],
        "cells": cells, "confidence": 0.95, "num_validation_examples": 900,
        "num_test_examples": 900, "price_per_row": 0.5, "price_per_hour": 10.0,
        "best": {
            "trial": best, "model": trials[best]["model"], "validation": score, "test": score,
            "optimism": {"value": 0.0, "low": -0.02, "high": 0.02},
        },
        "untrained": {"m": [bar._asdict() | {"latency_s": 0.9} for bar in bars or []]},
    }  # fmt: skip
    return content | more, trials


def test_more_rows_are_advised_where_they_surely_help_with_their_price() -> None:
    weakest = [{"by": "label", "slice": "other", "value": 0.2, "rest": 0.6, "n": 40}]
    (first, *_) = advise(*sweep(rising, weakest=weakest))
    assert first.kind == "rows"
    # Four times the rows: from 800 to 3,200.
    assert first.title == "Label about 2,400 more rows"
    assert first.gain is not None
    assert first.gain["low"] < rising(3200) - rising(800) < first.gain["high"]
    # 2,400 labels, and four times the 0.8 hours.
    assert first.price == pytest.approx(2400 * 0.5 + 4 * 0.8 * 10)
    assert "label `other` (20.0% of 40, the others 60.0%)" in first.why


def test_the_price_of_more_rows_goes_by_the_rows_of_the_training_that_is_known() -> None:
    curve, trials = sweep(rising)
    curve["best"]["trial"] = SIZES.index(400)
    # An hour for 800 rows, so four hours for the 3,200.
    trials[SIZES.index(400)]["cpu_hours"] = 0.5
    (first, *_) = advise(curve, trials)
    assert first.price == pytest.approx(2400 * 0.5 + 4 * 10)


def test_stop_is_advised_where_the_numbers_say_so() -> None:
    content, trials = sweep(flat)
    # The truth: 1,600 rows bring a tenth of a point.
    assert flat(1600) - flat(800) < 0.002
    first, *rest = advise(content, trials)
    # Nothing is said of settings that were not tried.
    assert (first.kind, first.title) == ("stop", "Stop: more rows hardly help")
    assert "at most 3 points with 95% certainty" in first.why
    gain = content["curves"][0]["forecast"]["forecasts"][0]["gain"]
    assert flat(1600) - flat(800) < gain["high"] < 0.03
    assert gain["value"] < 0.01
    assert [one.title for one in rest] == ["More rows hardly help"]
    # Not where a larger model helps: then that is what to do.
    step = {
        "smaller": "s", "larger": "m", "num_train_examples": 800, "times_hours": 2.5,
        "times_latency": 1.5, "gain": {"value": 0.06, "low": 0.03, "high": 0.09},
    }  # fmt: skip
    first, *_ = advise(*sweep(flat, model_steps=[step]))
    assert (first.kind, first.title) == ("model", "A larger model helps")
    assert "+6.0 points (+3.0 to +9.0), for 2.5 times the training time" in first.why
    none = step | {"gain": {"value": -0.01, "low": -0.03, "high": 0.005}}
    first, *_ = advise(*sweep(flat, model_steps=[none]))
    assert first.kind == "stop"
    assert "The larger model does not help either" in first.why


def test_nothing_is_advised_that_the_intervals_do_not_bear() -> None:
    first, second = advise(*sweep(flat, half_width=0.08))
    assert first.title == "It cannot be told yet what would help"
    assert second.title == "More rows may help"
    assert advise({"best": {}}, []) == []


def test_a_prompt_that_is_not_passed_is_kept() -> None:
    (first, *_) = advise(*sweep(flat, [Bar("base+few-shot", 0.9, 0.89, 0.91)]))
    assert first.title == "Stop: keep base+few-shot"
    assert "90.0% without training, the best combination 69.9%" in first.why
    assert "3,200 rows" in first.why
    # Of two that are not passed the better one is named first.
    bars = [Bar("base+few-shot", 0.72, 0.71, 0.73), Bar("simple", 0.9, 0.89, 0.91)]
    titles = [one.title for one in advise(*sweep(flat, bars))]
    assert titles[:2] == ["Stop: keep simple", "base+few-shot is as good"]


def test_what_is_as_good_without_training_is_told_before_more_rows() -> None:
    # 800 rows reach 50%: not surely better than 49%, as good as 51%, surely better than 30%.
    reached = rising(800)
    for score, title in (
        (reached - 0.01, "Not surely better than simple"),
        (reached + 0.01, "simple is as good"),
        (reached - 0.2, "Label about"),
    ):
        content, trials = sweep(rising, [Bar("simple", score, score - 0.02, score + 0.02)])
        first = advise(content, trials)[0]
        assert first.title.startswith(title)
        if first.kind == "prompt":
            assert "which passes it at about" in first.why
            assert f"It has {score:.1%} without training" in first.why
    # Also where two volumes bear no forecast.
    content, trials = sweep(rising, [Bar("simple", reached, 0.4, 0.6)])
    content["curves"][0]["forecast"] = {"refused": "2 data volumes"}
    assert advise(content, trials)[0].title == "simple is as good"


def test_a_best_value_at_the_end_of_what_was_tried_is_told() -> None:
    content, trials = sweep(flat)
    rates = [1e-4, 2e-4, 3e-4, 4e-4, 5e-4]
    for trial, cell, rate in zip(trials, content["cells"], rates, strict=True):
        trial["training.learning_rate"] = rate
        cell["values"]["training.learning_rate"] = rate
    content["keys"] = [ROWS_KEY, "training.learning_rate"]
    content["curves"][0]["series"] = f"training.learning_rate={rates[-1]}"
    told = "Try more of `training.learning_rate`"
    # The others are less than a point worse: it may be luck that the last one is the best.
    assert content["cells"][-1]["value"] - content["cells"][-2]["value"] < 0.01
    assert told not in [one.title for one in advise(content, trials)]
    content["cells"][-1]["value"] += 0.02
    assert advise(content, trials)[0].title == told


def test_of_settings_alone_the_best_is_told_beside_the_next() -> None:
    content, trials = sweep(flat)
    rates = [1e-4, 2e-4, 1e-3, 5e-4, 3e-4]
    for trial, cell, rate, score in zip(
        trials, content["cells"], rates, (0.5, 0.6, 0.7, 0.8, 0.65), strict=True
    ):
        trial.pop(ROWS_KEY)
        trial |= {"training.learning_rate": rate, "score": score}
        cell |= {"values": {"training.learning_rate": rate}, "value": score}
        cell |= {"low": score - 0.04, "high": score + 0.04}
    content["keys"] = ["training.learning_rate"]
    content["curves"] = [
        {"series": f"training.learning_rate={rate:g}", "points": [[100, 0.5]], "forecast": {}}
        for rate in rates
    ]
    content["best"]["trial"] = 3
    content["best"]["validation"] = {"value": 0.8, "low": 0.76, "high": 0.84}
    first = advise(content, trials)[0]
    assert (first.kind, first.title) == ("setting", "Take `training.learning_rate: 0.0005`")
    assert first.why == (
        "It has 80.0% (76.0% to 84.0%) on the validation rows; the next, "
        "`training.learning_rate: 0.001`, has 70.0% (66.0% to 74.0%)."
    )
    content["cells"][2] |= {"value": 0.795, "low": 0.76, "high": 0.83}
    first = advise(content, trials)[0]
    assert (
        first.title == "Take `training.learning_rate: 0.0005`, or `training.learning_rate: 0.001`"
    )
    assert first.why == (
        "They have 80.0% (76.0% to 84.0%) and 79.5% (76.0% to 83.0%) on the validation rows: "
        "less than a point apart."
    )
    content["best"]["validation"]["value"] = 0.99
    assert advise(content, trials)[0].title == "Stop: little is left to gain"


def test_the_front_is_what_nothing_beats() -> None:
    bars = [Bar("base+few-shot", 0.3, 0.29, 0.31), Bar("simple", 0.1, 0.09, 0.11)]
    content, trials = sweep(rising, bars)
    trials[0]["latency_s"] = 2.0
    candidates = list_candidates(content, trials)
    assert [one.score for one in candidates] == sorted(
        (one.score for one in candidates), reverse=True
    )
    front = {one.name: one.is_on_front for one in candidates}
    # Dearer and slower than the few-shot prompt, and worse: 50 rows reach 10%.
    assert rising(50) < 0.3
    assert not front["rows 50"]
    assert front["rows 800"]
    assert front["base+few-shot"]
    assert not front["simple"], "as slow and as cheap as the prompt, and worse"
    assert candidates[0].price == pytest.approx(8 + 400)


def test_a_mixture_shows_each_task_by_itself() -> None:
    content, trials = sweep(rising)
    for trial in trials:
        trial["read/accuracy"], trial["write/word_f1"] = trial["score"] / 2, 0.25
    tasks = {"read": "read/accuracy", "write": "write/word_f1"}
    page = render_sweep("sweeps/s@v1", content | {"tasks": tasks}, trials)
    assert "<th>read</th><th>write</th>" in page
    assert f"<td>rows 800</td><td>{100 * rising(800) / 2:.1f}%</td><td>25.0%</td>" in page
    # Where the trials' validation rows differ, score and interval are of those that all answered.
    common = {"trials": [4], "num_train_examples": 90, "value": 0.5, "low": 0.4, "high": 0.6}
    curves = [{"task": "read", "cells": [common]}]
    (*_, last) = show_tasks(content | {"tasks": tasks, "task_curves": curves}, trials)
    assert last["read"] == "50.0% (40.0% to 60.0%), 90 rows"


def test_saved_steps_are_counted_in_trainings_of_any_length() -> None:
    content, trials = sweep(rising)
    for trial in trials:
        trial["num_steps"] = 100
    # Three times as long, and stopped at a fifth.
    trials[0] |= {"status": "stopped", "score": None, "num_steps": 60, "trained_ratio": 0.2}
    assert "<dd>34%</dd>" in render_sweep("sweeps/s@v1", content, trials)  # 460 of 700 steps


def test_the_page_loads_nothing_and_shows_curve_front_and_advice() -> None:
    content, trials = sweep(rising, [Bar("base+few-shot", 0.45, 0.44, 0.46)])
    page = render_sweep("sweeps/s@v1", content, trials)
    assert "Label about 2,400 more rows" in page
    assert page.count("<circle") == len(SIZES) + 1, "the points, and the legend"
    assert 'class="band' in page
    assert "base+few-shot 45.0%" in page
    assert "Rows until finetuning passes" in page
    assert "★" in page
    assert "src=" not in page
    assert "http" not in page.replace("http-equiv", "")
    # Two base models have two prompts, and one simple arm.
    bars = {"simple": 0.2, "base+few-shot": 0.45}
    content["untrained"] = {
        base: [
            {"arm": arm, "score": score + more * (arm != "simple"), "latency_s": 0.9}
            for arm, score in bars.items()
        ]
        for base, more in (("m", 0.0), ("n", 0.1))
    }
    page = render_sweep("sweeps/s@v1", content, trials)
    for label in ("base+few-shot of m 45.0%", "base+few-shot of n 55.0%"):
        assert page.count(f">{label}<") == 1
    assert page.count(">simple 20.0%<") == 1
    # What users wrote is text, not markup.
    content["keys"] = [ROWS_KEY, "model.base"]
    for trial in trials:
        trial["model.base"] = "<script>"
    content["curves"][0]["series"] = "model.base=<script>"
    assert "<script>" not in render_sweep("sweeps/s@v1", content, trials)
