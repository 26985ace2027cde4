"""The trainings of a sweep: one Ray Tune trial for each cell that has no model yet."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial as TuneTrial

from tuneloop import pipeline
from tuneloop.artifacts import Artifact, Workspace
from tuneloop.config import TuneloopConfig
from tuneloop.errors import ModelError, Problem, TuneloopError, UserError, find_user_error
from tuneloop.models.bases.source import resolve_base
from tuneloop.sweeps.grid import Cell, Trial
from tuneloop.training.fit.refusals import refuse_small_cluster
from tuneloop.training.progress import PROGRESS_FILE, TrainingProgress, run_in_thread

logger = logging.getLogger("tuneloop.sweeps")

# A trial only launches workers and waits; what it reserves must leave room for them.
_TRIAL_CPUS = 0.1


def train_missing(
    cells: Sequence[Cell],
    datasets: Sequence[Artifact],
    config: TuneloopConfig,
    workspace: Workspace,
    trained: Mapping[int, Trial],
) -> dict[int, Trial]:
    """Train each cell without a model in a Ray Tune trial of its own; return how they ended.

    Args:
        trained: The trials whose model exists already, by the cell's number.

    Raises:
        UserError: A training lacks something that another run could mend.
    """
    missing = [number for number in range(len(cells)) if number not in trained]

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
            tune.report(
                {
                    "cell": number,
                    "problems": [vars(problem) for problem in mistake.problems],
                    "by_its_settings": isinstance(mistake, ModelError),
                    "wall_s": time.monotonic() - started,
                }
            )
            return
        wall_s = time.monotonic() - started
        tune.report({"cell": number, "model": model.artifact.ref, "wall_s": wall_s})

    refuse_small_cluster(config.resources, cpus_per_trial=_TRIAL_CPUS)
    storage = workspace.root / ".work" / f"sweep-{config.name}"
    tuner = tune.Tuner(
        tune.with_resources(trial, {"CPU": _TRIAL_CPUS}),
        param_space={"cell": tune.grid_search(missing)},
        tune_config=tune.TuneConfig(max_concurrent_trials=config.resources.num_concurrent_trials),
        run_config=tune.RunConfig(
            name=f"{time.time_ns()}",
            storage_path=str(storage),
            verbose=0,
            callbacks=[TrialLog(cells, len(missing))],
        ),
    )
    logger.info(
        "sweep of %d cells, %d of them to train: %s",
        len(cells),
        len(missing),
        ", ".join(cells[0].values),
    )
    try:
        grid = _fit(tuner, workspace.root / ".work", config.name)
    finally:
        # What a trial leaves is its artifact; Tune's own files are of no further use.
        shutil.rmtree(storage, ignore_errors=True)
    trials: dict[int, Trial] = {}
    problems: list[Problem] = []
    for result in grid:
        if result.error is not None:
            raise TuneloopError(f"a trial failed: {result.error}")
        metrics = result.metrics or {}
        cell = cells[metrics["cell"]]
        of_cell = [Problem(**problem) for problem in metrics.get("problems", [])]
        if of_cell and not metrics["by_its_settings"]:
            problems += [replace(p, where=f"{cell.label}: {p.where}") for p in of_cell]
            continue
        if of_cell:
            logger.warning("%s cannot be trained: %s", cell.label, of_cell[0])
        model = workspace.open(metrics["model"]) if not of_cell else None
        problem = "\n".join(map(str, of_cell))
        trials[metrics["cell"]] = Trial(cell, model, problem, metrics["wall_s"])
    if problems:
        raise UserError(*problems)
    return trials


def _fit(tuner: tune.Tuner, work: Path, name: str) -> tune.ResultGrid:
    """Run the tuner, and show meanwhile how far each training is.

    After Ctrl-C the trainings go on from their checkpoints the next time.
    """
    shown: dict[Path, TrainingProgress] = {}

    def poll() -> int:
        for file in work.glob(f"models-{name}-*/scratch/{PROGRESS_FILE}"):
            if file not in shown:
                shown[file] = TrainingProgress(file).__enter__()
        for file in [file for file in shown if not file.exists()]:
            shown.pop(file).__exit__()
        return sum(progress.poll() for progress in shown.values())

    try:
        return run_in_thread(tuner.fit, poll)
    finally:
        for progress in shown.values():
            progress.__exit__()


class TrialLog(tune.Callback):
    """Logs each trial's start and end in one line."""

    def __init__(self, cells: Sequence[Cell], num_missing: int) -> None:
        self.cells, self.num_missing, self.num_ended = cells, num_missing, 0

    def on_trial_start(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any
    ) -> None:
        logger.info("training %s", self.cells[trial.config["cell"]].label)

    def on_trial_complete(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any
    ) -> None:
        self.num_ended += 1
        label = self.cells[trial.config["cell"]].label
        logger.info("%d of %d trainings ended: %s", self.num_ended, self.num_missing, label)
