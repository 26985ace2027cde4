"""From trials and their evaluations to the table, `curve.json` and the advice on the page."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from tuneloop.artifacts import Artifact
from tuneloop.config import TuneloopConfig
from tuneloop.evals.scoring.predictions import Prediction
from tuneloop.evals.scoring.results import Evaluation
from tuneloop.sweeps.advice import advise
from tuneloop.sweeps.choice import Score, score_trial
from tuneloop.sweeps.curve import ROWS_KEY, learning_curves
from tuneloop.sweeps.grid import Measurement, Trial, expand
from tuneloop.sweeps.report import render_sweep
from tuneloop.sweeps.results import (
    ScoredTrial,
    Untrained,
    Winner,
    add_forecast,
    cells_of,
    describe_choice,
    evaluations_of,
    forecast_of,
    model_steps,
    score_cells,
    trial_row,
    weakest,
)
from tuneloop.sweeps.run import write
from tuneloop.sweeps.table import read_files

NUM_ROWS = 300
SIZES = [50, 100, 200, 400]
MODELS = {"small": 10**8, "large": 3 * 10**8}


def artifact(kind: str, **metrics: Any) -> Artifact:
    return Artifact(kind, "s", 1, Path("/nowhere"), "", {"metrics": metrics})


def rate(size: int, base: str) -> float:
    return {"small": 0.75, "large": 0.9}[base] - 0.7 / (1 + (size / 100) ** 1.2)


def evaluation(rates: dict[str, float], seed: int, difficulty: np.ndarray) -> Evaluation:
    """Return arms that answer the same rows: the easier a row, the more are right on it."""
    own = np.random.default_rng(seed)
    predictions, arms = [], []
    for arm, right in rates.items():
        luck = 0.7 * difficulty + 0.3 * own.random(NUM_ROWS)
        scores = (np.argsort(np.argsort(luck)) < right * NUM_ROWS).astype(float)
        value = float(scores.mean())
        half = 1.96 * np.sqrt(value * (1 - value) / NUM_ROWS)
        arms.append(
            {
                "name": arm,
                "scores": {
                    "exact_match": {
                        "value": value, "low": value - half, "high": value + half, "n": NUM_ROWS
                    }
                },
            }
        )  # fmt: skip
        predictions += [
            Prediction(
                f"r{row}", arm, "", "", "", "stop", 1, 1, 0.2, "scored",
                scores={"exact_match": score},
            )
            for row, score in enumerate(scores)
        ]  # fmt: skip
    metrics = {
        "primary": "exact_match", "confidence": 0.95, "num_examples": NUM_ROWS, "arms": arms,
        "metrics": {"exact_match": {"label": "right", "better": "higher", "kind": "binary"}},
    }  # fmt: skip
    part = {"by": "label", "slice": "other", "value": 0.1, "rest": 0.8, "n": 30}
    slices = {"arms": {"finetuned": [part | {"p_adjusted": 0.001}]}}
    return Evaluation("s", predictions, metrics, {}, slices)


@pytest.fixture
def measured() -> tuple[TuneloopConfig, list[ScoredTrial], dict[str, Untrained]]:
    config = TuneloopConfig.model_validate(
        {
            "name": "s",
            "task": {"type": "extraction"},
            "model": {"base": "small"},
            "data": {
                "sources": [{"path": "rows.jsonl", "format": "question_answer"}],
                "split": {"num_test_examples": 30},
            },
            "sweep": {
                "parameters": {"model.base": list(MODELS), ROWS_KEY: SIZES},
                "num_seeds": 2,
                "price_per_row": 0.5,
            },
            "resources": {"price_per_hour": 2.0, "num_workers": 2},
        }
    )
    difficulty = np.random.default_rng(0).random(NUM_ROWS)
    scored = []
    for number, cell in enumerate(expand(config)):
        size, base = cell.values[ROWS_KEY], cell.values["model.base"]
        model = artifact(
            "models", num_parameters=MODELS[base], num_trainable=0, final_loss=1.0, num_steps=9
        )
        one = evaluation({"finetuned": rate(size, base)}, number, difficulty)
        dataset = artifact("datasets", num_train_rows=size)
        trial = Trial(cell, model, "", 360.0 * (1 + (base == "large")))
        evaluated = artifact("evaluations")
        scored.append(ScoredTrial(trial, dataset, evaluated, one, score_trial(one)))
    bars = evaluation({"base+few-shot": 0.45}, 99, difficulty)
    return config, scored, dict.fromkeys(MODELS, Untrained(bars))


def test_rows_curves_steps_and_page_are_of_the_trials(
    measured: tuple[TuneloopConfig, list[ScoredTrial], dict[str, Untrained]], tmp_path: Path
) -> None:
    config, scored, untrained = measured
    best = max(range(len(scored)), key=lambda number: scored[number].score.value or 0)
    tested = artifact("evaluations", num_examples=30)
    winner = Winner(best, tested, scored[best].score, higher_is_better=True)
    keys = ["model.base", ROWS_KEY]
    table = [trial_row(one, winner if n == best else None, config) for n, one in enumerate(scored)]
    choice = describe_choice(scored, winner, None)
    curves = learning_curves(table, keys)
    for curve in curves:
        add_forecast(curve, keys, choice, scored, untrained)
    steps = model_steps(scored, choice["cells"])

    first, last = table[0], table[-1]
    # Two workers for a tenth and for a fifth of an hour.
    assert (first["cpu_hours"], last["cpu_hours"]) == (0.2, 0.4)
    assert (first["price"], first["label_price"]) == (0.4, 25.0)
    assert (first["latency_s"], first["num_steps"], first["trained_ratio"]) == (0.2, 9, 1.0)
    assert [row["test_score"] is not None for row in table].count(True) == 1

    (step,) = steps
    assert (step["smaller"], step["larger"], step["num_train_examples"]) == ("small", "large", 400)
    assert step["gain"]["low"] < 0.15 < step["gain"]["high"]
    # Row by row the difference is known better than either score.
    width = step["gain"]["high"] - step["gain"]["low"]
    assert width < 2 * 1.96 * np.sqrt(2 * 0.2 / NUM_ROWS)
    assert (step["times_hours"], step["times_latency"]) == (2.0, 1.0)

    for curve, base in zip(curves, MODELS, strict=True):
        (bar,) = curve["forecast"]["break_even"]
        assert bar["found"] == "found"
        true = next(size for size in range(10, 400) if rate(size, base) >= 0.45)
        assert bar["low"] <= true <= bar["high"]
        assert true / 1.5 < bar["num_examples"] < true * 1.5
    assert [part["slice"] for part in choice["weakest"]] == ["other"]
    # More rows of a group that the split holds out are held out as well.
    (winners,) = evaluations_of(scored, [best])
    assert weakest(winners, group_by="label") == []

    content = {"keys": keys, "curves": curves, "model_steps": steps, "chosen_by": "exact_match"}
    content |= choice | {"untrained": {}, "price_per_row": 0.5, "price_per_hour": 2.0}
    write(tmp_path, table, content)
    assert pq.read_table(tmp_path / "trials.parquet").num_rows == len(scored)
    assert json.loads((tmp_path / "curve.json").read_text())["cells"][0]["num_seeds"] == 2
    assert "A larger model helps" in render_sweep("sweeps/s", content, table)


def test_a_failed_cell_changes_no_forecast(
    measured: tuple[TuneloopConfig, list[ScoredTrial], dict[str, Untrained]],
) -> None:
    _, scored, untrained = measured
    small = scored[: 2 * len(SIZES)]
    failed = [one._replace(evaluation=None, score=Score(None)) for one in small[:2]]

    def forecast(trials: list[ScoredTrial]) -> dict[str, Any]:
        cells = [
            {"trials": numbers, "num_train_examples": size, **asdict(score)}
            for numbers in cells_of(trials)
            for size in [trials[numbers[0]].trial.cell.values[ROWS_KEY]]
            for score in score_cells(trials, [numbers], None)
        ]
        return forecast_of(cells, trials, 0.95, untrained["small"])

    # The others still answer the same rows as one another and as the bar.
    assert forecast([*failed, *small[2:]]) == forecast(small[2:])


def test_the_steps_between_models_have_the_level_of_the_scores(
    measured: tuple[TuneloopConfig, list[ScoredTrial], dict[str, Untrained]],
) -> None:
    _, scored, _ = measured
    winner = Winner(0, artifact("evaluations", num_examples=30), scored[0].score, True)
    cells = describe_choice(scored, winner, None)["cells"]
    # Intervals of 90% of the same scores.
    share = 1.6449 / 1.96
    shorter = [
        cell | {end: (1 - share) * cell["value"] + share * cell[end] for end in ("low", "high")}
        for cell in cells
    ]
    (at_95,), (at_90,) = model_steps(scored, cells), model_steps(scored, shorter, 0.9)
    widths = [step["gain"]["high"] - step["gain"]["low"] for step in (at_90, at_95)]
    assert widths[0] == pytest.approx(widths[1] * share, rel=1e-3)


@pytest.mark.parametrize(("size", "found"), [(10**8, 0), (1.05 * 10**8, 0), (1.2 * 10**8, 1)])
def test_between_models_of_one_size_there_is_no_step(
    measured: tuple[TuneloopConfig, list[ScoredTrial], dict[str, Untrained]], size: int, found: int
) -> None:
    _, scored, _ = measured
    for one in scored:
        assert one.trial.model is not None
        if one.trial.cell.config.model.base == "large":
            one.trial.model.manifest["metrics"]["num_parameters"] = size
    winner = Winner(0, artifact("evaluations", num_examples=30), scored[0].score, True)
    cells = describe_choice(scored, winner, None)["cells"]
    assert len(model_steps(scored, cells)) == found


def test_the_score_of_a_mixture_is_of_the_rows_that_all_trials_answered(
    measured: tuple[TuneloopConfig, list[ScoredTrial], dict[str, Untrained]],
) -> None:
    config, scored, _ = measured
    one = scored[0]
    assert one.evaluation is not None
    (arm,) = one.evaluation.metrics["arms"]
    arm["scores"]["score"] = {"value": 0.9, "low": 0.8, "high": 1.0}
    row = trial_row(one._replace(score=Score(0.5, 0.4, 0.6)), None, config)
    assert (row["score"], row["low"], row["high"]) == (0.5, 0.4, 0.6)


def test_values_that_are_lists_or_of_several_types_are_read_as_they_were(
    measured: tuple[TuneloopConfig, list[ScoredTrial], dict[str, Untrained]], tmp_path: Path
) -> None:
    config, scored, _ = measured
    key = "training.lora.target_modules"
    values = [["q_proj", "v_proj"], "all-linear"]
    scored = [
        one._replace(trial=replace(one.trial, cell=replace(one.trial.cell, values={key: value})))
        for one, value in zip(scored, values, strict=False)
    ]
    winner = Winner(0, artifact("evaluations", num_examples=30), scored[0].score, True)
    table = [trial_row(one, winner if not n else None, config) for n, one in enumerate(scored)]
    content = {"keys": [key], "curves": learning_curves(table, [key])}
    content |= describe_choice(scored, winner, None)
    page = render_sweep("sweeps/s", content, table)
    assert "<td>q_proj+v_proj</td>" in page
    write(tmp_path, table, content)
    curve, trials = read_files(Artifact("sweeps", "s", 1, tmp_path, "", {}))
    assert [trial[key] for trial in trials] == values
    assert advise(curve, trials) == advise(content, table)


def test_a_trial_without_a_model_has_a_row_all_the_same(
    measured: tuple[TuneloopConfig, list[ScoredTrial], dict[str, Untrained]],
) -> None:
    config, scored, _ = measured
    one = scored[0]
    reached = (Measurement(20.0, 4, 2.0), Measurement(40.0, 8, 1.9))
    stopped = Trial(
        one.trial.cell, None, "stopped at 40%", 36.0, status="stopped", measured=reached
    )
    row = trial_row(one._replace(trial=stopped, artifact=None, evaluation=None), None, config)
    assert (row["status"], row["num_steps"], row["trained_ratio"]) == ("stopped", 8, 0.4)
    assert row["model"] is None
    assert row["price"] == pytest.approx(0.04)
    left_out = Trial(one.trial.cell, None, "the budget was spent", 0.0, status="not run")
    row = trial_row(one._replace(trial=left_out, artifact=None, evaluation=None), None, config)
    assert (row["status"], row["num_steps"], row["trained_ratio"]) == ("not run", None, 0.0)
