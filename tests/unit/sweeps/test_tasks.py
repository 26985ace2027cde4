"""A mixture's tasks: each has a curve over its own rows, and what the others do to it is paired."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tuneloop.artifacts import Artifact
from tuneloop.config import TuneloopConfig
from tuneloop.evals.scoring.predictions import Prediction
from tuneloop.evals.scoring.results import Evaluation
from tuneloop.sweeps.advice import advise
from tuneloop.sweeps.choice import score_trial
from tuneloop.sweeps.curve import ROWS_KEY, learning_curves
from tuneloop.sweeps.grid import Trial, expand
from tuneloop.sweeps.report import render_sweep
from tuneloop.sweeps.results import ScoredTrial, Untrained, Winner, describe_choice, trial_row
from tuneloop.sweeps.tasks import TASKS_KEY, task_curves, task_effects

NUM_ROWS = 400  # of each task
TASKS = ("read", "write")
SIZES = [50, 100, 200, 400]
METRIC = {"label": "right", "better": "higher", "kind": "binary"}


def artifact(kind: str, **metrics: Any) -> Artifact:
    return Artifact(kind, "s", 1, Path("/nowhere"), "", {"metrics": metrics})


def rate(task: str, own: int, trained: list[str] | None) -> float:
    """Return how many are right: writing suffers from reading, and a task not trained is not."""
    if not own:
        return 0.05
    hurt = 0.12 if task == "write" and trained is None else 0.0
    return 0.9 - 0.7 / (1 + own / 60) - hurt


def evaluation(rates: dict[str, float], seed: int, arm: str = "finetuned") -> Evaluation:
    """Return answers to the same rows of both tasks; the easier a row, the more are right on it."""
    difficulty = np.random.default_rng(0).random((len(TASKS), NUM_ROWS))
    own = np.random.default_rng(seed).random((len(TASKS), NUM_ROWS))
    predictions, scores = [], {}
    for number, task in enumerate(TASKS):
        luck = 0.7 * difficulty[number] + 0.3 * own[number]
        right = (np.argsort(np.argsort(luck)) < rates[task] * NUM_ROWS).astype(float)
        value = float(right.mean())
        half = 1.96 * np.sqrt(value * (1 - value) / NUM_ROWS)
        scores[f"{task}/exact_match"] = {"value": value, "low": value - half, "high": value + half}
        predictions += [
            Prediction(
                f"{task}{row}", arm, "", "", "", "stop", 1, 1, 0.2, "scored",
                scores={"score": one, f"{task}/exact_match": one}, task=task,
            )
            for row, one in enumerate(right)
        ]  # fmt: skip
    both = np.mean([one["value"] for one in scores.values()])
    scores["score"] = {"value": both, "low": both - 0.03, "high": both + 0.03}
    metrics = {
        "primary": "score", "confidence": 0.95, "num_examples": len(predictions),
        "arms": [{"name": arm, "scores": scores}],
        "metrics": {"score": METRIC} | {f"{task}/exact_match": METRIC for task in TASKS},
        "tasks": {task: {"type": "extraction", "primary": "exact_match"} for task in TASKS},
    }  # fmt: skip
    return Evaluation("s", predictions, metrics, {}, {})


@pytest.mark.parametrize("num_seeds", [1, 2])
def test_each_task_has_its_curve_and_what_the_others_do_to_it(num_seeds: int) -> None:
    source = {"path": "rows.jsonl", "format": "question_answer"}
    config = TuneloopConfig.model_validate(
        {
            "name": "s",
            "task": {"type": "mixture", "tasks": {task: {"type": "extraction"} for task in TASKS}},
            "model": {"base": "small"},
            "data": {
                "sources": [source | {"task": task} for task in TASKS],
                "split": {"num_test_examples": 30},
            },
            "sweep": {
                "parameters": {TASKS_KEY: [None, ["read"], ["write"]], ROWS_KEY: SIZES},
                "num_seeds": num_seeds,
            },
        }
    )
    keys = list(config.sweep.parameters) if config.sweep else []
    scored, num_rows = [], []
    for number, cell in enumerate(expand(config)):
        trained = cell.config.data.train_tasks
        own = {
            task: cell.values[ROWS_KEY] // 2 if trained is None or task in trained else 0
            for task in TASKS
        }
        rates = {task: rate(task, own[task], trained) for task in TASKS}
        model = artifact(
            "models", num_parameters=10**8, num_trainable=0, final_loss=1.0, num_steps=9
        )
        one = evaluation(rates, number + 1)
        dataset = artifact("datasets", num_train_rows=sum(own.values()))
        trial = Trial(cell, model, "", 60.0)
        scored.append(ScoredTrial(trial, dataset, artifact("evaluations"), one, score_trial(one)))
        num_rows.append(own)
    best = max(range(len(scored)), key=lambda number: scored[number].score.value or 0)
    winner = Winner(best, artifact("evaluations", num_examples=30), scored[best].score, True)
    choice = describe_choice(scored, winner, None)
    untrained = {"small": Untrained(evaluation({"read": 0.55, "write": 0.3}, 99, "base"))}

    curves = task_curves(choice, keys, scored, num_rows, untrained)
    # Beside the other task and alone; a task that was not trained on has no point.
    assert [(line["task"], len(line["cells"])) for line in curves] == [
        (task, 4) for task in TASKS for _ in range(2)
    ]
    read = curves[0]
    assert [cell["num_train_examples"] for cell in read["cells"]] == [25, 50, 100, 200]
    (bar,) = read["forecast"]["break_even"]
    true = next(size for size in range(1, 400) if rate("read", size, None) >= 0.55)
    assert bar["low"] <= true <= bar["high"]
    assert bar["score"] == pytest.approx(0.55, abs=0.005)

    effects = {one["task"]: one for one in task_effects(choice, scored, num_rows)}
    assert (effects["read"]["effect"], effects["write"]["effect"]) == ("not shown", "hurt")
    assert effects["write"]["num_train_examples"] == effects["write"]["num_others"] == 200
    gap = effects["write"]["difference"]
    assert gap["low"] < -0.12 < gap["high"] < 0
    # Row by row it is known better than two scores that know nothing of each other.
    assert gap["high"] - gap["low"] < 2 * 2.24 * np.sqrt(2 * 0.2 / NUM_ROWS)
    assert effects["write"]["num_seeds"] == num_seeds

    table = [trial_row(one, winner if n == best else None, config) for n, one in enumerate(scored)]
    content = {"keys": keys, "curves": learning_curves(table, keys)} | choice
    content |= {"task_curves": curves, "task_effects": list(effects.values())}
    assert "Train `write` by itself" in [one.title for one in advise(content, table)]
    page = render_sweep("sweeps/s", content, table)
    assert "<td>hurt</td>" in page
    assert ", not trained</td>" in page
    assert ", 200 rows</td>" in page


def test_scores_and_difference_of_a_task_are_of_the_same_rows() -> None:
    alone = evaluation({"read": 0.6, "write": 0.6}, 1)
    mixed = evaluation({"read": 0.6, "write": 0.5}, 2)
    right = [p.example_id for p in alone.predictions if p.task == "write" and p.scores["score"]]
    # What is missing beside the other task is what was right alone.
    rows = [
        replace(p, scores={}, status="unscored") if p.example_id in right[:100] else p
        for p in mixed.predictions
    ]
    evaluations = [alone, replace(mixed, predictions=rows)]
    metrics = {task: f"{task}/exact_match" for task in TASKS}
    cells = [
        {"values": {TASKS_KEY: tasks}, "trials": [number], "num_train_examples": 100}
        for number, tasks in enumerate((["write"], None))
    ]
    choice = {"cells": cells, "tasks": metrics, "confidence": 0.95}
    scored: Any = [SimpleNamespace(evaluation=one) for one in evaluations]
    (effect,) = task_effects(choice, scored, [{"read": 0, "write": 50}, {"read": 50, "write": 50}])
    assert effect["alone"] == pytest.approx((240 - 100) / 300)
    assert effect["mixed"] - effect["alone"] == pytest.approx(effect["difference"]["value"])
