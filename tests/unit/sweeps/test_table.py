"""What a sweep shows: points, lines, sentences and a table that fits a terminal."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from tuneloop.artifacts import Artifact, Workspace
from tuneloop.evals.scoring.metrics import Metric
from tuneloop.sweeps.curve import Bar, describe_forecast, learning_curves
from tuneloop.sweeps.table import read_sweep, sweep_table, trial_table


def publish_sweep(
    tmp_path: Path,
    trials: list[dict[str, Any]],
    best: dict[str, Any] | None,
    more: dict[str, Any] | None = None,
) -> Artifact:
    keys = ["data.num_train_examples", "model.base"]
    workspace = Workspace(tmp_path)
    with workspace.draft("sweeps", "s", "f" * 64) as draft:
        pq.write_table(pa.Table.from_pylist(trials), draft.path / "trials.parquet")
        (draft.path / "curve.json").write_text(
            json.dumps(
                {
                    "metric": "exact_match",
                    "keys": keys,
                    "curves": learning_curves(trials, keys),
                    "best": best,
                    **(more or {}),
                }
            )
        )
        draft.publish(config={}, resources={}, inputs=[], metrics={})
    return workspace.open("sweeps/s")


def trial(size: int, score: float | None, problem: str = "") -> dict[str, Any]:
    return {
        "data.num_train_examples": size, "model.base": "m", "num_train_examples": size,
        "num_parameters": 135_000_000, "model": None if score is None else f"models/s-{size}@v1",
        "score": score, "low": score, "high": score, "loss": score, "wall_s": 61.4,
        "status": "failed" if problem else "done", "problem": problem,
    }  # fmt: skip


def test_a_sweep_has_points_lines_and_problems(tmp_path: Path) -> None:
    trials = [trial(100, 0.2), trial(200, 0.3), trial(400, 0.4), trial(800, None, "out of memory")]
    view = read_sweep(publish_sweep(tmp_path, trials, {"trial": 2, "model": "models/s-400@v1"}))
    assert [(end["rows"], round(end["score"], 6)) for end in view.lines] == [(100, 0.2), (400, 0.4)]
    assert view.sentences == [
        "model.base=m: +10.0 points for each doubling of the training rows; "
        "the points lie 0.0 points from the line on average."
    ]
    assert [point["best"] for point in view.points] == [False, False, True]
    assert view.best_words.startswith("40.0% with data.num_train_examples=400")
    assert view.problems == [("data.num_train_examples=800, model.base=m", "out of memory")]
    assert view.trials[3]["exact_match"] == "–"
    assert view.percent


def test_bits_per_byte_are_no_share_and_intervals_have_their_level(tmp_path: Path) -> None:
    trials = [trial(100, 0.93), trial(200, 0.91)]
    best = {"trial": 1, "model": "models/s-200@v1"}
    more = {"higher_is_better": False, "confidence": 0.9}
    view = read_sweep(publish_sweep(tmp_path, trials, best, more))
    assert not view.percent
    assert view.trials[0]["90% interval"] == "0.930 to 0.930"
    assert view.sentences[0].startswith("model.base=m: −0.020 for each doubling")


def test_what_all_trials_share_is_said_once_and_has_no_column(tmp_path: Path) -> None:
    two = [trial(100, 0.2), trial(200, 0.3)]
    table = trial_table(read_sweep(publish_sweep(tmp_path, two, None)))
    assert table.same == "base m, parameters 135 M"
    assert [row["train rows"] for row in table.rows] == ["100", "200"]
    assert not {"base", "parameters"} & set(table.rows[0])
    # Of a single trial everything is said in its row.
    lone = trial_table(read_sweep(publish_sweep(tmp_path / "lone", two[:1], None)))
    assert (lone.same, lone.rows[0]["base"]) == ("", "m")


def test_a_sweep_without_any_score_is_shown_all_the_same(tmp_path: Path) -> None:
    view = read_sweep(
        publish_sweep(tmp_path, [trial(100, None, "no"), trial(200, None, "no")], None)
    )
    assert (view.points, view.lines, view.best) == ([], [], "")
    assert len(view.problems) == 2


def test_the_winner_is_shown_with_its_test_and_what_choosing_would_have_added(
    tmp_path: Path,
) -> None:
    trials = [
        trial(size, score) | {"seed": seed, "test_score": 0.5 if seed else None}
        for size, score, seed in ((100, 0.2, 0), (100, 0.58, 1))
    ]
    best = {
        "trial": 1, "model": "models/s-100@v1",
        "validation": {"value": 0.58, "low": 0.5, "high": 0.66},
        "test": {"value": 0.5, "low": 0.42, "high": 0.58},
        "optimism": {"value": 0.08, "low": -0.033, "high": 0.193},
    }  # fmt: skip
    sizes = {"confidence": 0.95, "num_validation_examples": 150, "num_test_examples": 140}
    sweep = publish_sweep(tmp_path, trials, best, sizes)
    view = read_sweep(sweep)
    assert view.best_words.startswith("50.0% on the test with data.num_train_examples=100, ")
    assert view.best_words.endswith("model.base=m, seed 1")
    assert [(row["validation"], row["test"]) for row in view.trials] == [
        ("20.0%", "–"), ("58.0%", "50.0%"),
    ]  # fmt: skip
    assert view.choice == [
        "Chosen among 2 by exact_match on 150 validation rows that all of them answered. The "
        "test split of 140 rows was answered by the winner alone.",
        "The winner has 50.0%, 42.0% to 58.0%, on the test (95% interval); on validation 58.0%. "
        "Reporting the score it was chosen by would have added +8.0 points (−3.3 to +19.3).",
    ]
    output = io.StringIO()
    Console(width=80, file=output).print(sweep_table(sweep))
    assert "…" not in output.getvalue()
    assert "would have added" in output.getvalue()


def test_a_sweep_of_an_earlier_version_says_that_it_chose_on_the_test(tmp_path: Path) -> None:
    best = {"trial": 0, "model": "models/s-100@v1"}
    (sentence,) = read_sweep(publish_sweep(tmp_path, [trial(100, 0.2)], best)).choice
    assert "too high" in sentence


def test_the_table_in_the_terminal_fits_80_columns(tmp_path: Path) -> None:
    trials = [trial(100, 0.2), trial(200, 0.3), trial(400, None, "out of memory")]
    sweep = publish_sweep(tmp_path, trials, {"trial": 1, "model": "models/s-200@v1"})
    output = io.StringIO()
    Console(width=80, file=output).print(sweep_table(sweep))
    printed = output.getvalue()
    assert "20.0% to 20.0%" in printed
    assert "1 min 01 s" in printed
    assert "failed" in printed
    assert "best: models/s-200@v1" in printed
    assert "…" not in printed
    lone = publish_sweep(tmp_path / "lone", [trial(100, None, "no")], None)
    Console(width=80, file=output).print(sweep_table(lone))
    assert "no trial has a score" in output.getvalue()


def test_a_forecast_is_drawn_and_told(tmp_path: Path) -> None:
    sizes, scores = (100, 200, 400, 800), (0.2, 0.45, 0.62, 0.7)
    trials = [trial(size, score) for size, score in zip(sizes, scores, strict=True)]
    cells = [
        {"num_train_examples": size, "value": score, "low": score - 0.03, "high": score + 0.03}
        for size, score in zip(sizes, scores, strict=True)
    ]
    bars = [Bar("base+few-shot", 0.45, 0.44, 0.46), Bar("simple", 0.02, 0.01, 0.03)]
    forecast = describe_forecast(cells, Metric("", kind="binary"), 0.95, bars)
    curves = learning_curves(trials, ["data.num_train_examples", "model.base"])
    more = {"curves": [curves[0] | {"forecast": forecast}]}
    view = read_sweep(publish_sweep(tmp_path, trials, None, more))
    assert view.forecast_rows == [1600, 3200]
    assert (view.lines[0]["rows"], view.lines[-1]["rows"]) == (100, pytest.approx(3200))
    assert view.lines[-1]["low"] < view.lines[-1]["score"] < view.lines[-1]["high"]
    (told,) = view.sentences
    assert "compared with 800 training rows, +" in told
    assert "points (" in told
    assert ") with 1,600 and +" in told
    assert "passes base+few-shot (45.0%) at about" in told
    assert "past simple (2.0%) with 100 rows already" in told


def test_no_forecast_is_told_with_its_reason(tmp_path: Path) -> None:
    trials = [trial(100, 0.2), trial(200, 0.3)]
    curves = learning_curves(trials, ["data.num_train_examples", "model.base"])
    refused = describe_forecast([], Metric("", kind="binary"), 0.95, [])
    more = {"curves": [curves[0] | {"forecast": refused}]}
    (told,) = read_sweep(publish_sweep(tmp_path, trials, None, more)).sentences
    assert told.endswith("No forecast: 0 data volumes: at least 3 are needed.")
