"""A sweep: every cell of the grid trained under Ray Tune, served, scored, and set side by side.

Each trial is an ordinary training with an artifact of its own, so a sweep that was cut short goes
on with the cells that are missing, and a cell that a `run` has trained already costs nothing.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tuneloop import pipeline
from tuneloop.artifacts import Artifact, Published, Workspace, fingerprint
from tuneloop.cluster import connect
from tuneloop.config import TuneloopConfig
from tuneloop.errors import Problem, TuneloopError, UserError, find_user_error
from tuneloop.models.source import resolve_base
from tuneloop.sweeps.curve import learning_curves
from tuneloop.sweeps.grid import Cell, expand

logger = logging.getLogger("tuneloop.sweeps")

CODE_VERSION = 1
# A trial only launches workers and waits; what it reserves must leave room for them.
_TRIAL_CPUS = 0.1


def sweep(config: TuneloopConfig, workspace: Workspace) -> list[Published]:
    """Return `sweeps/<config.name>` in a list, made or reused.

    Raises:
        ConfigError: An unknown key or a refused value in `sweep.parameters`.
        UserError: What stops a cell: a base model that does not load is told before anything is
            trained; a training that fails is told when the other cells are done and kept.
    """
    cells = expand(config)
    with connect(config.resources):
        datasets = _prepare_all(cells, workspace)
        results = _train_all(cells, datasets, config, workspace)
        models = [workspace.open(result["model"]) for result in results]
        evaluations = [
            pipeline.evaluate_finetuned(cell.config, workspace, dataset, model).artifact
            for cell, dataset, model in zip(cells, datasets, models, strict=True)
        ]
    keys = list(cells[0].values)
    parts = {
        "keys": keys,
        "cells": [cell.values for cell in cells],
        "models": [model.fingerprint for model in models],
        "evaluations": [evaluation.fingerprint for evaluation in evaluations],
    }
    identity = fingerprint("sweep", CODE_VERSION, **parts)
    found = workspace.find("sweeps", config.name, identity)
    if found is not None:
        return [Published(found, reused=True)]
    trials = [
        _trial_row(cell, model, evaluation, result["wall_s"])
        for cell, model, evaluation, result in zip(cells, models, evaluations, results, strict=True)
    ]
    with workspace.draft("sweeps", config.name, identity) as draft:
        best = _write(draft.path, trials, keys, evaluations[0])
        artifact = draft.publish(
            config=parts,
            resources=config.resources.model_dump(mode="json"),
            inputs=[item.ref for pair in zip(models, evaluations, strict=True) for item in pair],
            metrics={
                "num_trials": len(trials),
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


def _train_all(
    cells: Sequence[Cell],
    datasets: Sequence[Artifact],
    config: TuneloopConfig,
    workspace: Workspace,
) -> list[dict[str, Any]]:
    """Train every cell in a Ray Tune trial of its own and return what the trials report."""
    from ray import tune

    def trial(params: dict[str, Any]) -> None:
        number = params["cell"]
        logging.basicConfig(level=logging.WARNING, force=True)
        started = time.monotonic()
        cell = cells[number]
        try:
            base = resolve_base(cell.config.model.base)
            model = pipeline.train_model(cell.config, workspace, base, datasets[number])
        except Exception as error:
            # A user's mistake travels back as a result: Tune would only keep its traceback.
            mistake = find_user_error(error)
            if mistake is None:
                raise
            tune.report({"cell": number, "problems": [vars(p) for p in mistake.problems]})
            return
        wall_s = time.monotonic() - started
        duration_s = model.artifact.manifest["duration_s"]
        tune.report(
            {
                "cell": number,
                "model": model.artifact.ref,
                "wall_s": duration_s if model.reused else wall_s,
            }
        )

    storage = workspace.root / ".work" / f"sweep-{config.name}"
    tuner = tune.Tuner(
        tune.with_resources(trial, {"CPU": _TRIAL_CPUS}),
        param_space={"cell": tune.grid_search(list(range(len(cells))))},
        tune_config=tune.TuneConfig(max_concurrent_trials=config.resources.num_concurrent_trials),
        run_config=tune.RunConfig(
            name=f"{time.time_ns()}", storage_path=str(storage), verbose=0, callbacks=[_progress()]
        ),
    )
    logger.info("sweep of %d cells: %s", len(cells), ", ".join(cells[0].values))
    grid = tuner.fit()
    results: dict[int, dict[str, Any]] = {}
    problems: list[Problem] = []
    for result in grid:
        metrics = result.metrics or {}
        if result.error is not None:
            raise TuneloopError(f"a trial failed: {result.error}")
        for problem in metrics.get("problems", []):
            values = ", ".join(f"{k}={v}" for k, v in cells[metrics["cell"]].values.items())
            problems.append(Problem(**problem | {"where": f"{values}: {problem['where']}"}))
        results[metrics["cell"]] = metrics
    if problems:
        raise UserError(*problems)
    return [results[number] for number in range(len(cells))]


def _progress() -> Any:
    """Return a Tune callback that tells each trial's end in one line."""
    from ray.tune import Callback

    class Progress(Callback):
        def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            done = sum(item.status == "TERMINATED" for item in trials)
            logger.info("trial %s of the sweep ended (%d done)", trial.config["cell"] + 1, done)

    return Progress()


def _trial_row(cell: Cell, model: Artifact, evaluation: Artifact, wall_s: float) -> dict[str, Any]:
    """Return one row of `trials.parquet`."""
    metrics = json.loads((evaluation.path / "metrics.json").read_text(encoding="utf-8"))
    (arm,) = [arm for arm in metrics["arms"] if arm["name"] == pipeline.FINETUNED]
    score = arm["scores"][metrics["primary"]]
    others = {
        f"metric.{name}": value["value"]
        for name, value in arm["scores"].items()
        if name != metrics["primary"]
    }
    return {
        **cell.values,
        "num_train_examples": _num_train_rows(model),
        "num_parameters": model.manifest["metrics"]["num_parameters"],
        "model": model.ref,
        "evaluation": evaluation.ref,
        "metric": metrics["primary"],
        "score": score["value"],
        "low": score["low"],
        "high": score["high"],
        **others,
        "loss": model.manifest["metrics"]["final_loss"],
        "wall_s": round(wall_s, 3),
    }


def _num_train_rows(model: Artifact) -> int:
    workspace = Workspace(model.path.parents[2])
    dataset = next(item for item in model.manifest["inputs"] if item.startswith("datasets/"))
    return int(workspace.open(dataset).manifest["metrics"]["num_train_rows"])


def _write(
    folder: Path, trials: list[dict[str, Any]], keys: list[str], evaluation: Artifact
) -> dict[str, Any]:
    """Write `trials.parquet` and `curve.json`; return the best trial's row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    metrics = json.loads((evaluation.path / "metrics.json").read_text(encoding="utf-8"))
    higher = metrics["metrics"][metrics["primary"]]["better"] == "higher"
    scored = [trial for trial in trials if trial["score"] is not None]
    best = (max if higher else min)(scored or trials, key=lambda trial: trial["score"] or 0.0)
    pq.write_table(pa.Table.from_pylist(trials), folder / "trials.parquet", compression="zstd")
    curve = {
        "metric": metrics["primary"],
        "higher_is_better": higher,
        "keys": keys,
        "curves": learning_curves(trials, keys),
        "best": {"trial": trials.index(best), "model": best["model"]},
    }
    (folder / "curve.json").write_text(json.dumps(curve, indent=2), encoding="utf-8")
    return best
