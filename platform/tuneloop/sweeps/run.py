"""A sweep: every trial trained under Ray Tune, scored on validation rows; the best one tested.

Each trial is an ordinary training with an artifact of its own, so a sweep that was cut short goes
on with the trials that are missing.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tuneloop import pipeline
from tuneloop.artifacts import Artifact, Published, Workspace, fingerprint
from tuneloop.cluster import connect
from tuneloop.config import TuneloopConfig
from tuneloop.errors import ModelError, Problem
from tuneloop.evals.scoring.results import Evaluation
from tuneloop.models.bases.source import resolve_base
from tuneloop.sweeps.choice import Score, choose, score_trial
from tuneloop.sweeps.curve import ROWS_KEY, learning_curves
from tuneloop.sweeps.grid import VALIDATION_LOSS, Trial, evaluated_on, expand
from tuneloop.sweeps.plan import Prepared, common_rows, make_study, prepare_all, refuse_losses
from tuneloop.sweeps.report import render_sweep
from tuneloop.sweeps.results import (
    ScoredTrial,
    Untrained,
    Winner,
    add_forecast,
    cells_of,
    describe_choice,
    loss_of,
    mean_of,
    model_steps,
    score_cells,
    trial_row,
)
from tuneloop.sweeps.tasks import task_curves, task_effects, train_rows_of

CODE_VERSION = 18


def sweep(config: TuneloopConfig, workspace: Workspace) -> list[Published]:
    """Return `sweeps/<config.name>` in a list, made or reused.

    Every model is scored on the validation split, which is taken from the train rows where none is
    configured; the best one alone answers the test split.

    A trial that fails is in the table as failed. Where its settings made it fail (a loss that is
    not finite) that is a result; where another run could mend it (memory, workers, disk) the same
    call tries it again. A call after a kill repeats no trial that ended.

    Raises:
        ConfigError: An unknown key, a refused value or a distribution in `sweep.parameters`.
        UserError: A base model does not load, a dataset cannot be made, or a training does not
            fit; told before anything is trained.
        ModelError: No trial could be trained.
    """
    started = time.time()
    cells = [replace(cell, config=pipeline.with_labels(cell.config)) for cell in expand(config)]
    assert config.sweep is not None
    keys = list(cells[0].values)
    with connect(config.resources):
        prepared = Prepared(config.sweep, prepare_all(cells, workspace))
        jobs = [prepared.job(cell) for cell in cells]
        rows = common_rows([job.dataset for job in jobs], keys)
        refuse_losses(config.sweep, [job.dataset for job in jobs], rows)
        parts = {
            "keys": keys,
            "cells": [cell.values for cell in cells],
            "seeds": [cell.seed for cell in cells],
            "models": [job.fingerprint for job in jobs],
            "evaluations": [prepared.identities(job)[1] for job in jobs],
            "sweep": config.sweep.model_dump(mode="json"),
            "price_per_hour": config.resources.price_per_hour,
        }
        identity = fingerprint("sweep", CODE_VERSION, **parts)
        # Cells that cannot be trained leave nothing else that could be reused.
        existing = workspace.find("sweeps", config.name, identity)
        if existing is not None and not existing.manifest["metrics"]["num_to_retry"]:
            return [Published(existing, reused=True)]
        folder = workspace.work_folder("sweep-of", config.name, identity)
        study = make_study(config, workspace, prepared, jobs, folder)
        if study.is_wanting:
            # From here on PyTorch and Ray Tune are needed.
            from tuneloop.sweeps.trials import refuse_unfit, train_all

            refuse_unfit(study.jobs or jobs, study.trials, study.budget.seconds)
            train_all(study, config, workspace, folder)
        trials, datasets = study.ended(), [job.dataset for job in study.jobs]
        if not any(trial.model for trial in trials):
            raise ModelError(*(Problem("no cell could be trained", got=t.problem) for t in trials))
        num_to_retry = sum(trial.may_pass for trial in trials)
        if existing is not None and num_to_retry >= existing.manifest["metrics"]["num_to_retry"]:
            return [Published(existing, reused=True)]
        scored = _score_on_validation(trials, datasets, rows, workspace)
        winner = _test_winner(scored, rows, config.sweep.metric, workspace)
        untrained = _score_untrained(scored, rows, workspace) if ROWS_KEY in keys else {}
    metrics = {
        "num_trials": len(scored),
        "num_failed": sum(trial.status == "failed" for trial in trials),
        "num_stopped": sum(trial.status == "stopped" for trial in trials),
        "num_not_run": sum(trial.status == "not run" for trial in trials),
        "num_to_retry": num_to_retry,
    }
    with workspace.draft("sweeps", config.name, identity) as draft:
        draft.started = started  # what it took is the trials' time, not that of writing
        table = [
            trial_row(one, winner if number == winner.number else None, config)
            for number, one in enumerate(scored)
        ]
        choice = describe_choice(scored, winner, rows)
        choice["chosen_by"] = config.sweep.metric or choice["metric"]
        curves = learning_curves(table, keys)
        for curve in curves:
            add_forecast(curve, keys, choice, scored, untrained)
        content = {"keys": keys, "curves": curves} | choice
        content |= {
            "untrained": {base: one.described() for base, one in untrained.items()},
            "model_steps": model_steps(scored, choice["cells"], choice["confidence"]),
            "price_per_row": config.sweep.price_per_row,
            "price_per_hour": config.resources.price_per_hour,
        }
        if choice["tasks"]:
            rows_of = {dataset.ref: train_rows_of(dataset) for dataset in datasets}
            num_rows = [rows_of[dataset.ref] for dataset in datasets]
            content |= {
                "task_curves": task_curves(choice, keys, scored, num_rows, untrained, rows),
                "task_effects": task_effects(choice, scored, num_rows),
            }
        write(draft.path, table, content)
        report = render_sweep(f"sweeps/{config.name}", content, table)
        (draft.path / "report.html").write_text(report, encoding="utf-8")
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
    if not num_to_retry:
        shutil.rmtree(folder, ignore_errors=True)
    return [Published(artifact, reused=False)]


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
            score = score_trial(evaluation, rows, task=trial.cell.config.task)
            scored.append(ScoredTrial(trial, dataset, artifact, evaluation, score))
        else:
            scored.append(ScoredTrial(trial, dataset, None, None, Score(None)))
    return scored


def _test_winner(
    scored: Sequence[ScoredTrial],
    rows: frozenset[str] | None,
    metric: str | None,
    workspace: Workspace,
) -> Winner:
    """Choose the cell with the best mean over its seeds, its best seed, and test that alone.

    Args:
        metric: `validation_loss` if that decides, else the primary score does.
    """
    evaluation = next(one.evaluation for one in scored if one.evaluation)
    higher = evaluation.metric(evaluation.primary).better == "higher"
    cells = cells_of(scored)
    # What fails with some seeds is only taken where nothing else was trained.
    whole = [cell for cell in cells if all(scored[number].evaluation for number in cell)] or cells
    if metric == VALIDATION_LOSS:
        losses = [loss_of(one) for one in scored]
        means = [mean_of([losses[number] for number in cell]) for cell in whole]
        best_cell = whole[choose(means, higher_is_better=False) or 0]
        best = choose([losses[number] for number in best_cell], higher_is_better=False)
    else:
        means = [score.value for score in score_cells(scored, whole, rows)]
        best_cell = whole[choose(means, higher) or 0]
        best = choose([scored[number].score.value for number in best_cell], higher)
    if best is None:
        raise ModelError.of("no trial has a score", got="no answer could be scored")
    trial, dataset, *_ = scored[best_cell[best]]
    assert trial.model
    config = evaluated_on(trial.cell.config, "test")
    (tested,) = pipeline.evaluate_each([pipeline.Trained(config, dataset, trial.model)], workspace)
    score = score_trial(Evaluation.load(tested.artifact))
    return Winner(best_cell[best], tested.artifact, score, higher)


def _score_untrained(
    scored: Sequence[ScoredTrial], rows: frozenset[str] | None, workspace: Workspace
) -> dict[str, Untrained]:
    """Return by base model what is reached without training, on the validation split.

    Solved examples, and what the simple arm learns from, are of the largest data volume.
    """
    untrained: dict[str, Untrained] = {}
    by_size = sorted(scored, key=lambda one: one.dataset.manifest["metrics"]["num_train_rows"])
    for one in {one.trial.cell.config.model.base: one for one in by_size}.values():
        config = one.trial.cell.config
        base = resolve_base(config.model.base)
        published = pipeline.evaluate_untrained(config, workspace, base, one.dataset)
        if published is None:
            continue
        evaluation = Evaluation.load(published.artifact)
        untrained[config.model.base] = Untrained(evaluation, rows, config.task)
    return untrained


def write(folder: Path, trials: list[dict[str, Any]], curve: dict[str, Any]) -> None:
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
