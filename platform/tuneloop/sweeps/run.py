"""A sweep: every cell of the grid trained under Ray Tune, served, scored, and set side by side.

Each trial is an ordinary training with an artifact of its own, so a sweep that was cut short goes
on with the cells that are missing, and a cell that a `run` has trained already costs nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tuneloop import pipeline
from tuneloop.artifacts import Artifact, Published, Workspace, fingerprint
from tuneloop.cluster import connect
from tuneloop.config import TuneloopConfig
from tuneloop.errors import (
    ModelError,
    Problem,
    UserError,
)
from tuneloop.models.bases.source import resolve_base
from tuneloop.models.export.layout import ADAPTER
from tuneloop.records import FINETUNED
from tuneloop.sweeps.curve import learning_curves
from tuneloop.sweeps.grid import Cell, Trial, expand

CODE_VERSION = 3


def sweep(config: TuneloopConfig, workspace: Workspace) -> list[Published]:
    """Return `sweeps/<config.name>` in a list, made or reused.

    A cell whose settings make training fail (a loss that is not finite) is a result like any
    other: it is in the table as failed. What another run could mend (memory, workers, disk) ends
    the sweep after the other cells, which are kept.

    Raises:
        ConfigError: An unknown key or a refused value in `sweep.parameters`.
        UserError: What stops a cell: a base model that does not load is reported before anything
            is trained; a training that lacks something, when the other cells are done.
        ModelError: No cell could be trained.
    """
    started = time.time()
    cells = expand(config)
    keys = list(cells[0].values)
    with connect(config.resources):
        datasets = _prepare_all(cells, workspace)
        made = [
            pipeline.finetuned_identities(
                cell.config, resolve_base(cell.config.model.base), dataset
            )
            for cell, dataset in zip(cells, datasets, strict=True)
        ]
        parts = {
            "keys": keys,
            "cells": [cell.values for cell in cells],
            "models": [model for model, _ in made],
            "evaluations": [evaluation for _, evaluation in made],
        }
        identity = fingerprint("sweep", CODE_VERSION, **parts)
        # Cells that cannot be trained leave nothing else that could be reused.
        existing = workspace.find("sweeps", config.name, identity)
        if existing is not None:
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
        scored = iter(
            pipeline.evaluate_each(
                [
                    pipeline.Trained(trial.cell.config, dataset, trial.model)
                    for trial, dataset in zip(trials, datasets, strict=True)
                    if trial.model
                ],
                workspace,
            )
        )
        evaluations = [next(scored).artifact if trial.model else None for trial in trials]
    rows = [
        _trial_row(trial, dataset, evaluation)
        for trial, dataset, evaluation in zip(trials, datasets, evaluations, strict=True)
    ]
    finished = [item for item in evaluations if item]
    with workspace.draft("sweeps", config.name, identity) as draft:
        draft.started = started  # what it took is the trials' time, not that of writing
        best = _write(draft.path, rows, keys, finished[0])
        artifact = draft.publish(
            config=parts,
            resources=config.resources.model_dump(mode="json"),
            inputs=[trial.model.ref for trial in trials if trial.model]
            + [item.ref for item in finished],
            metrics={
                "num_trials": len(rows),
                "num_failed": sum(row["status"] == "failed" for row in rows),
                "best_model": best["model"],
                "best_score": best["score"],
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
    return [
        pipeline.prepare_dataset(
            cell.config, workspace, resolve_base(cell.config.model.base)
        ).artifact
        for cell in cells
    ]


def _trial_row(trial: Trial, dataset: Artifact, evaluation: Artifact | None) -> dict[str, Any]:
    """Return one row of `trials.parquet`; what a failed trial lacks is None."""
    row: dict[str, Any] = {
        **trial.cell.values,
        "num_train_examples": int(dataset.manifest["metrics"]["num_train_rows"]),
        "num_parameters": None,
        "status": "failed",
        "problem": trial.problem,
        "model": None,
        "evaluation": None,
        "metric": None,
        "score": None,
        "low": None,
        "high": None,
        "loss": None,
        "wall_s": round(trial.wall_s, 3),
    }
    if trial.model is None or evaluation is None:
        return row
    metrics = json.loads((evaluation.path / "metrics.json").read_text(encoding="utf-8"))
    (arm,) = [arm for arm in metrics["arms"] if arm["name"] == FINETUNED]
    score = arm["scores"][metrics["primary"]]
    return row | {
        "num_parameters": _num_base_parameters(trial.model),
        "status": "done",
        "model": trial.model.ref,
        "evaluation": evaluation.ref,
        "metric": metrics["primary"],
        "score": score["value"],
        "low": score["low"],
        "high": score["high"],
        **{name: value["value"] for name, value in arm["scores"].items()},
        "loss": trial.model.manifest["metrics"]["final_loss"],
    }


def _num_base_parameters(model: Artifact) -> int:
    """Return the size of the model that is served: adapters are merged into it."""
    metrics = model.manifest["metrics"]
    total = int(metrics["num_parameters"])
    return total - int(metrics["num_trainable"]) if (model.path / ADAPTER).is_dir() else total


def _write(
    folder: Path, trials: list[dict[str, Any]], keys: list[str], evaluation: Artifact
) -> dict[str, Any]:
    """Write `trials.parquet` and `curve.json`; return the best trial's row."""
    metrics = json.loads((evaluation.path / "metrics.json").read_text(encoding="utf-8"))
    higher = metrics["metrics"][metrics["primary"]]["better"] == "higher"
    scored = [trial for trial in trials if trial["score"] is not None]
    finished = [trial for trial in trials if trial["model"] is not None]
    best = (max if higher else min)(scored or finished, key=lambda trial: trial["score"] or 0.0)
    # Failed trials have no metric columns, and values of one key may be of several types.
    names = dict.fromkeys(name for trial in trials for name in trial)
    columns = {name: _column([trial.get(name) for trial in trials]) for name in names}
    pq.write_table(pa.table(columns), folder / "trials.parquet", compression="zstd")
    curve = {
        "metric": metrics["primary"],
        "higher_is_better": higher,
        "keys": keys,
        "curves": learning_curves(trials, keys),
        "best": {"trial": trials.index(best), "model": best["model"]},
    }
    (folder / "curve.json").write_text(json.dumps(curve, indent=2), encoding="utf-8")
    return best


def _column(values: list[Any]) -> list[Any]:
    """Return values that one Arrow column can hold: as they are, or all as JSON."""
    types = {type(value) for value in values if value is not None}
    if len(types) <= 1 or types == {int, float}:
        return values
    return [json.dumps(value) for value in values]
