"""A mixture's tasks in a sweep: what each learns from its own rows, and what the others do."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from tuneloop.artifacts import Artifact
from tuneloop.evals.scoring.estimates import describe_difference
from tuneloop.evals.scoring.intervals import Resampling
from tuneloop.evals.scoring.results import Evaluation
from tuneloop.evals.scoring.seeds import estimate_over_seeds
from tuneloop.sweeps.choice import Score, scatter_of_seeds, score_seeds, seeds_by_row
from tuneloop.sweeps.curve import ROWS_KEY, Point, fit_line, series_of
from tuneloop.sweeps.results import ScoredTrial, Untrained, evaluations_of, forecast_of

TASKS_KEY = "data.train_tasks"


def train_rows_of(dataset: Artifact) -> dict[str, int]:
    """Return the train rows of each task of a mixture; empty where there is none."""
    card = json.loads((dataset.path / "card.json").read_text(encoding="utf-8"))
    return {task["name"]: int(task["num_train"]) for task in card["tasks"]}


def task_curves(
    choice: Mapping[str, Any],
    keys: Sequence[str],
    scored: Sequence[ScoredTrial],
    num_rows: Sequence[Mapping[str, int]],
    untrained: Mapping[str, Untrained],
    rows: frozenset[str] | None = None,
) -> list[dict[str, Any]]:
    """Return each task's own learning curves, of its own score over its own train rows.

    Args:
        choice: What `describe_choice` returned.
        keys: The swept dotted keys.
        num_rows: Of each trial, the train rows of each task.
        untrained: What is reached without training, by base model.
        rows: Ids of the only rows that count; None: all.
    """
    curves = []
    for task, metric in choice["tasks"].items():
        trained = [evaluations_of(scored, cell["trials"]) for cell in choice["cells"]]
        scatter = scatter_of_seeds(
            [each for each in trained if each and metric in each[0].arms[0]["scores"]],
            rows,
            metric,
        )
        by_series: dict[str, list[dict[str, Any]]] = {}
        for cell in choice["cells"]:
            evaluations = evaluations_of(scored, cell["trials"])
            own = num_rows[cell["trials"][0]][task]
            if not own or not evaluations or metric not in evaluations[0].arms[0]["scores"]:
                continue
            score = asdict(score_seeds(evaluations, rows, metric, scatter))
            if score["value"] is not None:
                of_task = {"trials": cell["trials"], "num_train_examples": own, **score}
                by_series.setdefault(series_of(cell["values"], keys), []).append(of_task)
        for series, cells in by_series.items():
            points = [Point(cell["num_train_examples"], cell["value"]) for cell in cells]
            first = scored[cells[0]["trials"][0]]
            without = untrained.get(first.trial.cell.config.model.base)
            evaluation = evaluations_of(scored, cells[0]["trials"])[0]
            curves.append(
                {
                    "task": task,
                    "is_share": evaluation.metric(metric).kind != "number",
                    "cells": cells,
                    **asdict(fit_line(series, points)),
                    "forecast": forecast_of(cells, scored, choice["confidence"], without, metric),
                }
            )
    return curves


def task_effects(
    choice: Mapping[str, Any],
    scored: Sequence[ScoredTrial],
    num_rows: Sequence[Mapping[str, int]],
) -> list[dict[str, Any]]:
    """Return what the other tasks of a mixture do to a task: trained with them against alone.

    Both were trained on the same rows of the task, of the largest data volume, and answered the
    same validation rows. The intervals hold all at once (Bonferroni).
    """
    pairs: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {}
    cells = sorted(choice["cells"], key=lambda cell: cell["num_train_examples"])
    for alone in cells:
        trained = alone["values"].get(TASKS_KEY)
        if trained is None or len(trained) > 1:
            continue
        for mixed in cells:
            together = mixed["values"][TASKS_KEY] or list(choice["tasks"])
            if (
                _without(alone["values"], TASKS_KEY) == _without(mixed["values"], TASKS_KEY)
                and len(together) > 1
                and trained[0] in together
                and evaluations_of(scored, alone["trials"])
                and evaluations_of(scored, mixed["trials"])
            ):
                # The largest volume comes last, and stays.
                key = repr((_without(mixed["values"], ROWS_KEY), trained, together))
                pairs[key] = (trained[0], alone, mixed)
    confidence = 1 - (1 - choice["confidence"]) / max(1, len(pairs))
    effects = []
    for task, alone, mixed in pairs.values():
        of = [evaluations_of(scored, cell["trials"]) for cell in (alone, mixed)]
        metric = choice["tasks"][task]
        scores, difference = _compared(of[0], of[1], metric, confidence)
        own, total = (num_rows[cell["trials"][0]] for cell in (alone, mixed))
        if difference.low is None or difference.high is None:
            effect = "not known"
        else:
            sign = 1 if of[0][0].metric(metric).better == "higher" else -1
            ends = sorted((sign * difference.low, sign * difference.high))
            effect = "help" if ends[0] > 0 else "hurt" if ends[1] < 0 else "not shown"
        effects.append(
            {
                "task": task,
                "values": _without(mixed["values"], TASKS_KEY),
                "is_share": of[0][0].metric(metric).kind != "number",
                "num_train_examples": own[task],
                "num_others": sum(total.values()) - total[task],
                **scores,
                "difference": asdict(difference),
                "num_seeds": min(map(len, of)),
                "effect": effect,
            }
        )
    return effects


def _without(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != key}


def _compared(
    alone: Sequence[Evaluation], mixed: Sequence[Evaluation], metric: str, confidence: float
) -> tuple[dict[str, float | None], Score]:
    """Return the scores alone and beside the other tasks, and the second minus the first.

    All of them are over the rows that every seed of both answered.
    """
    num_seeds = min(len(alone), len(mixed))
    values, clusters = seeds_by_row([*mixed[:num_seeds], *alone[:num_seeds]], None, metric)
    if not values.size:
        return {"alone": None, "mixed": None}, Score(None)
    beside, own = values[:num_seeds], values[num_seeds:]
    scores: dict[str, float | None] = {"alone": float(own.mean()), "mixed": float(beside.mean())}
    if num_seeds == 1:
        meaning = alone[0].metric(metric)
        resampling = Resampling(confidence)
        told = describe_difference(beside[0], own[0], clusters, meaning, resampling)
        return scores, Score.of(told)
    estimate = estimate_over_seeds(beside - own, clusters, "unbounded", confidence)
    return scores, Score(estimate.value, estimate.low, estimate.high)
