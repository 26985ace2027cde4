"""A sweep: every trial trained under Ray Tune, scored on validation rows; the best one tested.

Each trial is an ordinary training with an artifact of its own, so a sweep that was cut short goes
on with the trials that are missing.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from tuneloop import pipeline
from tuneloop.artifacts import Artifact, Published, Workspace, fingerprint
from tuneloop.cluster import connect
from tuneloop.config import TuneloopConfig
from tuneloop.errors import DataError, ModelError, Problem, UserError
from tuneloop.evals.scoring.results import Evaluation
from tuneloop.models.bases.source import resolve_base
from tuneloop.models.export.layout import ADAPTER
from tuneloop.sweeps.choice import Score, choose, optimism, score_seeds, score_trial
from tuneloop.sweeps.curve import (
    ROWS_KEY,
    Bar,
    describe_forecast,
    learning_curves,
    series_of,
)
from tuneloop.sweeps.grid import Cell, Trial, evaluated_on, expand

logger = logging.getLogger("tuneloop.sweeps")

CODE_VERSION = 4


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


def sweep(config: TuneloopConfig, workspace: Workspace) -> list[Published]:
    """Return `sweeps/<config.name>` in a list, made or reused.

    Every model is scored on the validation split, which is taken from the train rows where none is
    configured; the best one alone answers the test split.

    A trial that fails is in the table as failed. Where its settings made it fail (a loss that is
    not finite) that is a result; where another run could mend it (memory, workers, disk) the same
    call tries it again.

    Raises:
        ConfigError: An unknown key, a refused value or a distribution in `sweep.parameters`.
        UserError: A base model does not load, or a dataset cannot be made; told before anything is
            trained.
        ModelError: No trial could be trained.
    """
    started = time.time()
    cells = [replace(cell, config=pipeline.with_labels(cell.config)) for cell in expand(config)]
    keys = list(cells[0].values)
    with connect(config.resources):
        datasets = _prepare_all(cells, workspace)
        rows = _common_rows(cells, datasets)
        made = [
            pipeline.finetuned_identities(
                cell.config, resolve_base(cell.config.model.base), dataset
            )
            for cell, dataset in zip(cells, datasets, strict=True)
        ]
        parts = {
            "keys": keys,
            "cells": [cell.values for cell in cells],
            "seeds": [cell.seed for cell in cells],
            "models": [model for model, _ in made],
            "evaluations": [evaluation for _, evaluation in made],
        }
        identity = fingerprint("sweep", CODE_VERSION, **parts)
        # Cells that cannot be trained leave nothing else that could be reused.
        existing = workspace.find("sweeps", config.name, identity)
        if existing is not None and not existing.manifest["metrics"]["num_to_retry"]:
            return [Published(existing, reused=True)]
        trained = {
            number: Trial(cell, model, "", model.manifest["duration_s"])
            for number, (cell, (model_fingerprint, _)) in enumerate(zip(cells, made, strict=True))
            if (model := workspace.find("models", config.name, model_fingerprint)) is not None
        }
        if len(trained) < len(cells):
            # From here on PyTorch and Ray Tune are needed.
            from tuneloop.sweeps.trials import train_missing

            trained |= train_missing(cells, datasets, config, workspace, trained)
        trials = [trained[number] for number in range(len(cells))]
        if not any(trial.model for trial in trials):
            raise ModelError(*(Problem("no cell could be trained", got=t.problem) for t in trials))
        num_to_retry = sum(trial.may_pass for trial in trials)
        if existing is not None and num_to_retry >= existing.manifest["metrics"]["num_to_retry"]:
            return [Published(existing, reused=True)]
        scored = _score_on_validation(trials, datasets, rows, workspace)
        winner = _test_winner(scored, rows, workspace)
        bars = _score_bars(scored, workspace) if ROWS_KEY in keys else {}
    metrics = {
        "num_trials": len(scored),
        "num_failed": sum(one.evaluation is None for one in scored),
        "num_to_retry": num_to_retry,
    }
    with workspace.draft("sweeps", config.name, identity) as draft:
        draft.started = started  # what it took is the trials' time, not that of writing
        table = [
            _trial_row(one, winner if number == winner.number else None)
            for number, one in enumerate(scored)
        ]
        choice = _describe_choice(scored, winner, rows)
        curves = learning_curves(table, keys)
        for curve in curves:
            _add_forecast(curve, keys, choice, scored, bars)
        _write(draft.path, table, {"keys": keys, "curves": curves} | choice)
        best = table[winner.number]
        artifact = draft.publish(
            config=parts,
            resources=config.resources.model_dump(mode="json"),
            inputs=[trial.model.ref for trial in trials if trial.model]
            + [row["evaluation"] for row in table if row["evaluation"]]
            + [winner.artifact.ref],
            metrics=metrics
            | {
                "best_model": best["model"],
                "best_score": winner.test.value,
                "best_validation_score": best["validation_score"],
                **{f"best {key}": best[key] for key in keys},
            },
        )
    return [Published(artifact, reused=False)]


def _prepare_all(cells: Sequence[Cell], workspace: Workspace) -> list[Artifact]:
    """Prepare every cell's dataset; all base models are fetched before the first is used."""
    problems: list[Problem] = []
    for base in dict.fromkeys(cell.config.model.base for cell in cells):
        try:
            resolve_base(base)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    datasets: dict[str, Artifact] = {}
    for cell in cells:
        wanted = cell.config.model_dump_json(include={"data", "task", "model"})
        if wanted in datasets:
            continue
        try:
            datasets[wanted] = pipeline.prepare_dataset(
                cell.config, workspace, resolve_base(cell.config.model.base)
            ).artifact
        except DataError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    if problems:
        raise DataError(*problems)
    return [
        datasets[cell.config.model_dump_json(include={"data", "task", "model"})] for cell in cells
    ]


def _common_rows(cells: Sequence[Cell], datasets: Sequence[Artifact]) -> frozenset[str] | None:
    """Return the ids of the validation rows that count; None: all, for all trials have the same.

    A key that changes which rows there are (a filter, a source) changes the validation split too.
    No trial is trained on a row of its own validation split, so the common ones are unseen by all.
    """
    folders = dict.fromkeys(dataset.path / "validation" for dataset in datasets)
    tables = [pq.read_table(folder, columns=["row_id"]) for folder in folders]
    ids = [frozenset(table["row_id"].to_pylist()) for table in tables]
    common = frozenset.intersection(*ids)
    if all(rows == common for rows in ids):
        return None
    if len(common) < min(map(len, ids)) / 2:
        raise DataError(
            Problem(
                "the trials have too few validation rows in common to be compared",
                where="sweep.parameters",
                got=f"{len(common):,} rows in common, of {min(map(len, ids)):,} or more each, over "
                + ", ".join(f"`{key}`" for key in cells[0].values),
                allowed="at least half of them",
                remedy="sweep keys that leave the rows as they are",
            )
        )
    logger.warning(
        "the trials' validation splits differ: compared on the %d rows that all have", len(common)
    )
    return common


def _score_on_validation(
    trials: Sequence[Trial],
    datasets: Sequence[Artifact],
    rows: frozenset[str] | None,
    workspace: Workspace,
) -> list[ScoredTrial]:
    """Serve every model, one after the other, and score it on the validation split."""
    evaluations = iter(
        pipeline.evaluate_each(
            [
                pipeline.Trained(trial.cell.config, dataset, trial.model)
                for trial, dataset in zip(trials, datasets, strict=True)
                if trial.model
            ],
            workspace,
        )
    )
    scored = []
    for trial, dataset in zip(trials, datasets, strict=True):
        if trial.model:
            artifact = next(evaluations).artifact
            evaluation = Evaluation.load(artifact)
            score = score_trial(evaluation, rows)
            scored.append(ScoredTrial(trial, dataset, artifact, evaluation, score))
        else:
            scored.append(ScoredTrial(trial, dataset, None, None, Score(None)))
    return scored


def _cells(scored: Sequence[ScoredTrial]) -> list[list[int]]:
    """Return the numbers of the trials of each cell: they differ in their seed only."""
    cells: dict[str, list[int]] = {}
    for number, one in enumerate(scored):
        cells.setdefault(repr(one.trial.cell.values), []).append(number)
    return list(cells.values())


def _score_cell(
    scored: Sequence[ScoredTrial], numbers: Sequence[int], rows: frozenset[str] | None
) -> Score:
    """Return the score over the seeds of a cell that were trained."""
    evaluations = [e for number in numbers if (e := scored[number].evaluation) is not None]
    return score_seeds(evaluations, rows) if evaluations else Score(None)


def _test_winner(
    scored: Sequence[ScoredTrial], rows: frozenset[str] | None, workspace: Workspace
) -> Winner:
    """Choose the cell with the best mean over its seeds, its best seed, and test that alone."""
    evaluation = next(one.evaluation for one in scored if one.evaluation)
    higher = evaluation.metric(evaluation.primary).better == "higher"
    cells = _cells(scored)
    # What fails with some seeds is only taken where nothing else was trained.
    whole = [cell for cell in cells if all(scored[number].evaluation for number in cell)] or cells
    best_cell = whole[
        choose([_score_cell(scored, cell, rows).value for cell in whole], higher) or 0
    ]
    best = choose([scored[number].score.value for number in best_cell], higher)
    if best is None:
        raise ModelError(Problem("no trial has a score", got="no answer could be scored"))
    trial, dataset, *_ = scored[best_cell[best]]
    assert trial.model
    config = evaluated_on(trial.cell.config, "test")
    (tested,) = pipeline.evaluate_each([pipeline.Trained(config, dataset, trial.model)], workspace)
    score = score_trial(Evaluation.load(tested.artifact))
    return Winner(best_cell[best], tested.artifact, score, higher)


def _trial_row(one: ScoredTrial, winner: Winner | None) -> dict[str, Any]:
    """Return one row of `trials.parquet`; what a trial lacks is None.

    Args:
        winner: Given if it is the winner.
    """
    trial, test = one.trial, winner.test if winner else Score(None)
    row: dict[str, Any] = {
        **trial.cell.values,
        "seed": trial.cell.seed,
        "num_train_examples": int(one.dataset.manifest["metrics"]["num_train_rows"]),
        "num_parameters": None,
        "status": "failed",
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
    }
    if trial.model is None or one.artifact is None or one.evaluation is None:
        return row
    (arm,) = one.evaluation.arms
    metrics = trial.model.manifest["metrics"]
    return row | {
        "num_parameters": _num_base_parameters(trial.model),
        "status": "done",
        "model": trial.model.ref,
        "evaluation": one.artifact.ref,
        "metric": one.evaluation.primary,
        **{name: value["value"] for name, value in arm["scores"].items()},
        "loss": metrics["final_loss"],
        "validation_loss": metrics.get("validation_loss"),
    }


def _num_base_parameters(model: Artifact) -> int:
    """Return the size of the model that is served: adapters are merged into it."""
    metrics = model.manifest["metrics"]
    total = int(metrics["num_parameters"])
    return total - int(metrics["num_trainable"]) if (model.path / ADAPTER).is_dir() else total


def _describe_choice(
    scored: Sequence[ScoredTrial], winner: Winner, rows: frozenset[str] | None
) -> dict[str, Any]:
    """Return what `curve.json` tells of the choice."""
    best = scored[winner.number]
    assert best.trial.model
    assert best.evaluation
    return {
        "metric": best.evaluation.primary,
        "higher_is_better": winner.higher_is_better,
        "confidence": best.evaluation.metrics["confidence"],
        "num_validation_examples": (
            best.evaluation.metrics["num_examples"] if rows is None else len(rows)
        ),
        "num_test_examples": winner.artifact.manifest["metrics"]["num_examples"],
        "cells": [
            {
                "values": scored[cell[0]].trial.cell.values,
                "trials": cell,
                "num_train_examples": int(
                    scored[cell[0]].dataset.manifest["metrics"]["num_train_rows"]
                ),
                "num_seeds": sum(scored[number].evaluation is not None for number in cell),
                **asdict(_score_cell(scored, cell, rows)),
            }
            for cell in _cells(scored)
        ],
        "best": {
            "trial": winner.number,
            "model": best.trial.model.ref,
            "validation": asdict(best.score),
            "test": asdict(winner.test),
            "optimism": asdict(optimism(best.score, winner.test, winner.higher_is_better)),
        },
    }


def _add_forecast(
    curve: dict[str, Any],
    keys: Sequence[str],
    choice: dict[str, Any],
    scored: Sequence[ScoredTrial],
    bars: Mapping[str, list[Bar]],
) -> None:
    """Add to a learning curve what more rows are expected to bring."""
    cells = [cell for cell in choice["cells"] if series_of(cell["values"], keys) == curve["series"]]
    first = scored[cells[0]["trials"][0]]
    evaluation = next(one.evaluation for one in scored if one.evaluation)
    curve["forecast"] = describe_forecast(
        cells,
        evaluation.metric(evaluation.primary),
        choice["confidence"],
        bars.get(first.trial.cell.config.model.base, []),
    )


def _score_bars(scored: Sequence[ScoredTrial], workspace: Workspace) -> dict[str, list[Bar]]:
    """Return by base model what is reached without training, on the validation split.

    Solved examples, and what the simple arm learns from, are of the largest data volume.
    """
    bars: dict[str, list[Bar]] = {}
    by_size = sorted(scored, key=lambda one: one.dataset.manifest["metrics"]["num_train_rows"])
    for one in {one.trial.cell.config.model.base: one for one in by_size}.values():
        config = one.trial.cell.config
        base = resolve_base(config.model.base)
        published = pipeline.evaluate_untrained(config, workspace, base, one.dataset)
        if published is None:
            continue
        evaluation = Evaluation.load(published.artifact)
        scores = {arm["name"]: arm["scores"][evaluation.primary] for arm in evaluation.arms}
        bars[config.model.base] = [
            Bar(name, score["value"], score["low"], score["high"])
            for name, score in scores.items()
            if score["low"] is not None
        ]
    return bars


def _write(folder: Path, trials: list[dict[str, Any]], curve: dict[str, Any]) -> None:
    """Write `trials.parquet` and `curve.json`."""
    # Failed trials have no metric columns, and values of one key may be of several types.
    names = dict.fromkeys(name for trial in trials for name in trial)
    columns = {name: _column([trial.get(name) for trial in trials]) for name in names}
    pq.write_table(pa.table(columns), folder / "trials.parquet", compression="zstd")
    (folder / "curve.json").write_text(json.dumps(curve, indent=2), encoding="utf-8")


def _column(values: list[Any]) -> list[Any]:
    """Return values that one Arrow column can hold: as they are, or all as JSON."""
    types = {type(value) for value in values if value is not None}
    if len(types) <= 1 or types == {int, float}:
        return values
    return [json.dumps(value) for value in values]
