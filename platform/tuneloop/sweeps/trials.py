"""The trainings of a sweep: one Ray Tune trial for each cell that has no model yet."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial as TuneTrial

from tuneloop import pipeline
from tuneloop.artifacts import Artifact, Workspace
from tuneloop.config import TuneloopConfig
from tuneloop.errors import ModelError, Problem, find_user_error
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

    A trial that fails without telling why is tried once more. None of them ends the others.

    Args:
        trained: The trials whose model exists already, by the cell's number.
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
            failure_config=tune.FailureConfig(max_failures=1),
        ),
    )
    logger.info(
        "sweep of %d trials, %d of them to train: %s",
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
    for result in grid:
        number = (result.config or {})["cell"]
        cell, metrics = cells[number], result.metrics or {}
        wall_s = float(metrics.get("wall_s") or metrics.get("time_total_s") or 0.0)
        if result.error is None and "model" in metrics:
            trials[number] = Trial(cell, workspace.open(metrics["model"]), "", wall_s)
            continue
        problems = [str(Problem(**problem)) for problem in metrics.get("problems", [])]
        if result.error is not None:
            problems = [f"it failed twice: {str(result.error).strip().splitlines()[-1]}"]
        logger.warning("%s cannot be trained: %s", cell.label, problems[0])
        may_pass = result.error is not None or not metrics["by_its_settings"]
        trials[number] = Trial(cell, None, "\n".join(problems), wall_s, may_pass)
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
