"""What a sweep found out, as `trials.parquet` and `curve.json` keep it."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple
from typing import Any, NamedTuple

from tuneloop.artifacts import Artifact
from tuneloop.config import OneTaskConfig, TuneloopConfig
from tuneloop.evals.scoring.metrics import FIELD_PREFIX, in_task
from tuneloop.evals.scoring.results import Evaluation
from tuneloop.models.export.layout import ADAPTER
from tuneloop.sweeps.choice import (
    Score,
    covariance_of_means,
    optimism,
    row_scores,
    scatter_of_seeds,
    score_arm,
    score_seeds,
)
from tuneloop.sweeps.curve import Bar, describe_forecast, series_of
from tuneloop.sweeps.grid import VALIDATION_LOSS, Trial

# A model with fewer times the parameters of another one is as large.
_LARGER = 1.1


class ScoredTrial(NamedTuple):
    """A trial with what it was trained on, and how its model did on the validation rows.

    Args:
        artifact: The model's evaluation on the validation split; None where there is no model.
        evaluation: Its content.
        score: Its primary score on the rows that all trials answered.
    """

    trial: Trial
    dataset: Artifact
    artifact: Artifact | None
    evaluation: Evaluation | None
    score: Score


class Winner(NamedTuple):
    """The best trial.

    Args:
        number: Of the trial.
        artifact: Its evaluation on the test split.
        test: Its score there.
        higher_is_better: Of the primary metric.
    """

    number: int
    artifact: Artifact
    test: Score
    higher_is_better: bool


def cells_of(scored: Sequence[ScoredTrial]) -> list[list[int]]:
    """Return the numbers of the trials of each cell: they differ in their seed only."""
    cells: dict[str, list[int]] = {}
    for number, one in enumerate(scored):
        cells.setdefault(repr(one.trial.cell.values), []).append(number)
    return list(cells.values())


def score_cells(
    scored: Sequence[ScoredTrial], cells: Sequence[Sequence[int]], rows: frozenset[str] | None
) -> list[Score]:
    """Return the score of each cell over those of its seeds that were trained."""
    evaluations = [evaluations_of(scored, numbers) for numbers in cells]
    scatter = scatter_of_seeds(evaluations, rows)
    task = scored[0].trial.cell.config.task
    return [
        score_seeds(one, rows, scatter=scatter, task=task) if one else Score(None)
        for one in evaluations
    ]


def evaluations_of(scored: Sequence[ScoredTrial], numbers: Sequence[int]) -> list[Evaluation]:
    """Return the evaluations of those of these trials that have one."""
    return [e for number in numbers if (e := scored[number].evaluation) is not None]


def loss_of(one: ScoredTrial) -> float | None:
    """Return the validation loss of a trial's model."""
    model = one.trial.model
    return None if model is None else model.manifest["metrics"].get(VALIDATION_LOSS)


def mean_of(values: Sequence[float | None]) -> float | None:
    """Return the mean; None where one of the values is missing."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def trial_row(one: ScoredTrial, winner: Winner | None, config: TuneloopConfig) -> dict[str, Any]:
    """Return one row of `trials.parquet`; what a trial lacks is None.

    Args:
        winner: Given if it is the winner.
        config: Of the sweep: its resources and prices.
    """
    resources = config.resources
    hours = one.trial.wall_s / 3600 * resources.worker_counts[0]
    row_price = config.sweep.price_per_row if config.sweep else None
    num_rows = int(one.dataset.manifest["metrics"]["num_train_rows"])
    last = one.trial.measured[-1] if one.trial.measured else None
    trial, test = one.trial, winner.test if winner else Score(None)
    row: dict[str, Any] = {
        **trial.cell.values,
        "seed": trial.cell.seed,
        "num_train_examples": num_rows,
        "num_parameters": None,
        "status": trial.status,
        "problem": trial.problem,
        "model": None,
        "evaluation": None,
        "test_evaluation": winner.artifact.ref if winner else None,
        "metric": None,
        "validation_score": one.score.value,
        "validation_low": one.score.low,
        "validation_high": one.score.high,
        "test_score": test.value,
        "test_low": test.low,
        "test_high": test.high,
        "score": one.score.value,
        "low": one.score.low,
        "high": one.score.high,
        "loss": None,
        "validation_loss": None,
        "wall_s": round(trial.wall_s, 3),
        "num_steps": last.step if last else None,
        "trained_ratio": last.percent / 100 if last else 0.0,
        "cpu_hours": None if resources.gpus_per_worker else hours,
        "gpu_hours": hours * resources.gpus_per_worker if resources.gpus_per_worker else None,
        "price": resources.price_per_hour and hours * resources.price_per_hour,
        "label_price": row_price and num_rows * row_price,
        "latency_s": None,
    }
    if trial.model is None or one.artifact is None or one.evaluation is None:
        return row
    (arm,) = one.evaluation.arms
    metrics = trial.model.manifest["metrics"]
    # The primary metric of a mixture is called `score`, and is of all rows of the trial's own.
    row = {name: score["value"] for name, score in arm["scores"].items()} | row
    return row | {
        "num_parameters": num_base_parameters(trial.model),
        "status": "done",
        "model": trial.model.ref,
        "evaluation": one.artifact.ref,
        "metric": one.evaluation.primary,
        "loss": metrics["final_loss"],
        "validation_loss": metrics.get(VALIDATION_LOSS),
        "num_steps": metrics["num_steps"],
        "trained_ratio": 1.0,
        "latency_s": latency_of(one.evaluation),
    }


def num_base_parameters(model: Artifact) -> int:
    """Return the size of the model that is served: adapters are merged into it."""
    metrics = model.manifest["metrics"]
    total = int(metrics["num_parameters"])
    return total - int(metrics["num_trainable"]) if (model.path / ADAPTER).is_dir() else total


def describe_choice(
    scored: Sequence[ScoredTrial], winner: Winner, rows: frozenset[str] | None
) -> dict[str, Any]:
    """Return what `curve.json` tells of the choice."""
    best = scored[winner.number]
    assert best.trial.model
    assert best.evaluation
    cells = cells_of(scored)
    return {
        "metric": best.evaluation.primary,
        "higher_is_better": winner.higher_is_better,
        "confidence": best.evaluation.metrics["confidence"],
        "num_validation_examples": (
            best.evaluation.metrics["num_examples"] if rows is None else len(rows)
        ),
        "weakest": weakest(best.evaluation, best.trial.cell.config.data.split.group_by),
        "tasks": {
            task: in_task(task, about["primary"]) for task, about in best.evaluation.tasks.items()
        },
        "num_test_examples": winner.artifact.manifest["metrics"]["num_examples"],
        "cells": [
            {
                "values": scored[cell[0]].trial.cell.values,
                "trials": cell,
                "num_train_examples": int(
                    scored[cell[0]].dataset.manifest["metrics"]["num_train_rows"]
                ),
                "num_seeds": sum(scored[number].evaluation is not None for number in cell),
                **asdict(score),
            }
            for cell, score in zip(cells, score_cells(scored, cells, rows), strict=True)
        ],
        "best": {
            "trial": winner.number,
            "model": best.trial.model.ref,
            "validation": asdict(best.score),
            "test": asdict(winner.test),
            "optimism": asdict(optimism(best.score, winner.test, winner.higher_is_better)),
        },
    }


class Untrained(NamedTuple):
    """What is reached without training.

    Args:
        rows: Ids of the only rows that count, as for the trials; None: all.
        task: Of the rows.
    """

    evaluation: Evaluation
    rows: frozenset[str] | None = None
    task: OneTaskConfig | None = None

    def bars_of(self, metric: str) -> list[Bar]:
        """Return the scores to pass in a metric."""
        bars = []
        for arm in self.evaluation.arms:
            if metric in arm["scores"]:
                value, low, high = astuple(
                    score_arm(self.evaluation, arm, self.rows, metric, self.task)
                )
                bars += [Bar(arm["name"], value, low, high)] if low is not None else []
        return bars

    def described(self) -> list[dict[str, Any]]:
        """Return the bars as `curve.json` keeps them, with the time to answer."""
        return [
            bar._asdict() | {"latency_s": latency_of(self.evaluation, bar.arm)}
            for bar in self.bars_of(self.evaluation.primary)
        ]


def add_forecast(
    curve: dict[str, Any],
    keys: Sequence[str],
    choice: dict[str, Any],
    scored: Sequence[ScoredTrial],
    untrained: Mapping[str, Untrained],
) -> None:
    """Add to a learning curve what more rows are expected to bring."""
    cells = [cell for cell in choice["cells"] if series_of(cell["values"], keys) == curve["series"]]
    first = scored[cells[0]["trials"][0]]
    without = untrained.get(first.trial.cell.config.model.base)
    curve["forecast"] = forecast_of(cells, scored, choice["confidence"], without)


def forecast_of(
    cells: Sequence[Mapping[str, Any]],
    scored: Sequence[ScoredTrial],
    confidence: float,
    without: Untrained | None,
    metric: str = "",
) -> dict[str, Any]:
    """Return what more rows are expected to bring to the cells of one curve.

    Args:
        cells: `trials` (numbers), `num_train_examples`, `value`, `low`, `high`.
        confidence: Level of their intervals.
        without: What is reached without training.
        metric: The primary one if empty.
    """
    evaluation = next(one.evaluation for one in scored if one.evaluation)
    metric = metric or evaluation.primary
    # What was not trained has no rows in common with the others.
    cells = [cell for cell in cells if evaluations_of(scored, cell["trials"])]
    bars = without.bars_of(metric) if without else []
    scores = [row_scores(evaluations_of(scored, cell["trials"]), metric=metric) for cell in cells]
    if without:
        scores += [row_scores([without.evaluation], bar.arm, metric) for bar in bars]
    clusters = evaluation.clusters()
    return describe_forecast(
        cells,
        evaluation.metric(metric),
        confidence,
        bars,
        covariance_of_means(scores, clusters) if all(scores) else None,
    )


def latency_of(evaluation: Evaluation, arm: str | None = None) -> float | None:
    """Return the median seconds of an answer; None where none was timed."""
    columns = (evaluation.column(name).to_pylist() for name in ("arm", "latency_s"))
    latencies = [
        latency
        for of_arm, latency in zip(*columns, strict=True)
        if latency is not None and arm in (None, of_arm)
    ]
    return statistics.median(latencies) if latencies else None


def model_steps(
    scored: Sequence[ScoredTrial], cells: Sequence[dict[str, Any]], confidence: float = 0.95
) -> list[dict[str, Any]]:
    """Return what each larger base model brought, from the smallest to the largest.

    Each is there with its best combination, at the largest data volume that all were trained on; of
    models of one size, such as a base model and its chat model, the best alone.

    Args:
        cells: Those of `curve.json`.
        confidence: Level of their intervals, and of those of the steps.
    """
    width = 2 * statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    by_base: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        first = scored[cell["trials"][0]]
        if first.trial.model is not None and cell["low"] is not None:
            by_base.setdefault(first.trial.cell.config.model.base, []).append(cell)
    volumes = [{cell["num_train_examples"] for cell in same} for same in by_base.values()]
    common = set.intersection(*volumes) if volumes else set()
    if len(by_base) < 2 or not common:
        return []
    evaluation = next(one.evaluation for one in scored if one.evaluation)
    sign = 1 if evaluation.metric(evaluation.primary).better == "higher" else -1
    clusters = evaluation.clusters()

    def best_of(same: list[dict[str, Any]]) -> dict[str, Any]:
        equal = [cell for cell in same if cell["num_train_examples"] == max(common)]
        return max(equal, key=lambda cell: sign * cell["value"])

    chosen = {base: best_of(same) for base, same in by_base.items()}
    size = {
        base: num_base_parameters(model)
        for base, cell in chosen.items()
        if (model := scored[cell["trials"][0]].trial.model) is not None
    }
    bases: list[str] = []
    for base in sorted(chosen, key=lambda base: size[base]):
        if bases and size[base] < _LARGER * size[bases[-1]]:
            bases[-1] = max(bases[-1], base, key=lambda one: sign * chosen[one]["value"])
        else:
            bases.append(base)
    steps = []
    for smaller, larger in itertools.pairwise(bases):
        pair = [chosen[smaller], chosen[larger]]
        of = [[scored[number] for number in cell["trials"]] for cell in pair]
        rows = [row_scores([e for one in same if (e := one.evaluation)]) for same in of]
        covariance = covariance_of_means(rows, clusters) if all(rows) else None
        if covariance is None:
            continue
        # Between the same rows, and the scatter of seeds, which the rows do not know.
        variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
        for number, cell in enumerate(pair):
            total = ((cell["high"] - cell["low"]) / width) ** 2
            variance += max(0.0, total - covariance[number, number])
        value, half = pair[1]["value"] - pair[0]["value"], width / 2 * math.sqrt(variance)
        hours = [statistics.mean(o.trial.wall_s for o in same if o.evaluation) for same in of]
        latencies = [[latency_of(one.evaluation) for one in same if one.evaluation] for same in of]
        known = [[one for one in same if one is not None] for same in latencies]
        steps.append(
            {
                "smaller": smaller,
                "larger": larger,
                "num_train_examples": max(common),
                "gain": {"value": value, "low": value - half, "high": value + half},
                "times_hours": hours[1] / max(hours[0], 1e-9),
                "times_latency": (
                    statistics.mean(known[1]) / max(statistics.mean(known[0]), 1e-9)
                    if all(known)
                    else None
                ),
            }
        )
    return steps


def weakest(evaluation: Evaluation, group_by: str | None = None) -> list[dict[str, Any]]:
    """Return the parts of the rows on which a model is clearly worse than on the others.

    Args:
        group_by: What the rows were split by: more rows of a group that is held out are held out.
    """
    metric = evaluation.metric(evaluation.primary)
    sign = 1 if metric.better == "higher" else -1
    level = 1 - float(evaluation.metrics["confidence"])
    (arm,) = evaluation.arms
    parts = [
        {name: part[name] for name in ("by", "slice", "value", "rest", "n")}
        for part in evaluation.slices.get("arms", {}).get(arm["name"], [])
        if part["by"] != group_by
        and part["p_adjusted"] is not None
        and part["p_adjusted"] <= level
        and sign * (part["value"] - part["rest"]) < 0
    ]
    fields = {
        name.removeprefix(FIELD_PREFIX): score
        for name, score in arm["scores"].items()
        if name.startswith(FIELD_PREFIX) and score["low"] is not None
    }
    for name, score in fields.items():
        others = [other for key, other in fields.items() if key != name]
        if others and score["high"] < min(other["low"] for other in others):
            rest = statistics.mean(other["value"] for other in others)
            part = {"by": "field", "slice": name, "value": score["value"], "rest": rest}
            parts.insert(0, part | {"n": score["n"]})
    return parts
