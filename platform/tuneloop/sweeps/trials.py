"""The trainings of a sweep: a Ray Tune trial for each cell that has no model yet."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import pyarrow.parquet as pq
from ray import tune
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from tuneloop import pipeline
from tuneloop.artifacts import Workspace
from tuneloop.config import SweepConfig, TuneloopConfig
from tuneloop.errors import ModelError, Problem, UserError, find_user_error
from tuneloop.models.bases.source import resolve_base
from tuneloop.progress import repeating
from tuneloop.sweeps.grid import VALIDATION_LOSS, Cell, Measurement, Trial
from tuneloop.sweeps.search import PERCENT, TrialSearch, order_file
from tuneloop.sweeps.study import Job, Study
from tuneloop.training.batches import Schedule
from tuneloop.training.fit.assess import PreparedRows, assess
from tuneloop.training.fit.refusals import refuse_small_budget, refuse_small_cluster
from tuneloop.training.progress import (
    MAY_STOP_FILE,
    PROGRESS_FILE,
    STOP_FILE,
    TrainingProgress,
    TrainingStopped,
    run_in_thread,
)
from tuneloop.training.rows import open_rows, store_rows

logger = logging.getLogger("tuneloop.sweeps")

# A trial only launches workers and waits; what it reserves must leave room for them.
_TRIAL_CPUS = 0.1
# How often a trial looks for new validation losses.
_POLL_S = 0.5


def train_all(study: Study, config: TuneloopConfig, workspace: Workspace, folder: Path) -> None:
    """Train what the study has next, each in a Ray Tune trial of its own, until there is no more.

    A trial that fails without telling why is tried once more. None of them ends the others.

    Args:
        folder: Of the sweep, for what its trials need.
    """
    assert config.sweep is not None
    refuse_small_cluster(config.resources, cpus_per_trial=_TRIAL_CPUS)

    may_stop = config.sweep.scheduler is not None

    def trial(params: dict[str, Any]) -> None:
        logging.basicConfig(level=logging.WARNING, force=True)
        order = json.loads(order_file(folder, params["cell"]).read_text(encoding="utf-8"))
        one = TuneloopConfig.model_validate(order["config"])
        train_one(one, workspace, order["dataset"], may_stop)

    def how_it_ended(cell: Cell, report: dict[str, Any]) -> tuple[Trial, float | None]:
        wall_s = float(report.get("wall_s") or report.get("time_total_s") or 0.0)
        if "model" in report:
            return Trial(cell, workspace.open(report["model"]), "", wall_s), report["loss"]
        if "problems" in report:
            problems = "\n".join(str(Problem(**problem)) for problem in report["problems"])
            logger.warning("%s cannot be trained: %s", cell.label, problems)
            may_pass = not report["by_its_settings"]
            return Trial(cell, None, problems, wall_s, may_pass, "failed"), None
        if "stopped_at" in report:
            loss, percent = report["loss"], report["stopped_at"]
            problem = f"stopped at {percent:.0f}% of its training: validation loss {loss:.4g}"
            return Trial(cell, None, problem, wall_s, status="stopped"), loss
        return Trial(cell, None, "it failed twice", wall_s, may_pass=True, status="failed"), None

    # Only the scheduler needs a loss, and the last report of a trial has none.
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
    logger.info(
        "sweep of %d trials, %d of them to train: %s",
        study.num_expected,
        study.num_expected - len(study.trials),
        ", ".join(config.sweep.parameters),
    )
    storage = folder / "tune"

    def stop(number: int) -> None:
        made = study.jobs[number].fingerprint
        (workspace.work_folder("models", config.name, made) / "scratch" / STOP_FILE).touch()

    scheduler = make_scheduler(config.sweep, study, stop)
    tuner = tune.Tuner(
        tune.with_resources(trial, {"CPU": _TRIAL_CPUS}),
        tune_config=tune.TuneConfig(
            search_alg=TrialSearch(study, folder, how_it_ended),
            scheduler=scheduler,
            num_samples=-1,
            max_concurrent_trials=config.resources.num_concurrent_trials,
            # The next trial begins in the process of the last one, whose imports took seconds.
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=f"{time.time_ns()}",
            storage_path=str(storage),
            verbose=0,
            callbacks=[TrialLog(study)],
            failure_config=tune.FailureConfig(max_failures=1),
        ),
    )
    try:
        grid = _fit(tuner, workspace.root / ".work", config.name)
    finally:
        # What a trial leaves is its artifact; Tune's own files are of no further use.
        shutil.rmtree(storage, ignore_errors=True)
    for result in grid:
        if result.error is not None and "cell" in (result.config or {}):
            number = (result.config or {})["cell"]
            problem = f"it failed twice: {str(result.error).strip().splitlines()[-1]}"
            study.trials[number] = replace(study.trials[number], problem=problem)
            logger.warning("%s cannot be trained: %s", study.jobs[number].cell.label, problem)
    for number, ended in study.trials.items():
        if ended.status == "stopped":
            made = study.jobs[number].fingerprint
            left = workspace.work_folder("models", config.name, made)
            shutil.rmtree(left, ignore_errors=True)


def refuse_unfit(jobs: Sequence[Job], trials: Mapping[int, Trial], budget_s: float) -> None:
    """Raise UserError, with the problems of all trainings, if one of them does not fit.

    Args:
        trials: Those that ended, by the job's number.
        budget_s: Seconds that all trainings may take; one has to fit where none has ended.
    """
    problems: list[Problem] = []
    seconds: list[float | None] = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        stored: dict[str, PreparedRows] = {}
        for number, job in enumerate(jobs):
            if number in trials:
                continue
            ref = job.dataset.ref
            if ref not in stored:
                sides = [
                    open_rows(store_rows(job.dataset.path, side, scratch / f"{len(stored)}"))
                    for side in ("train", "validation")
                ]
                stored[ref] = PreparedRows(job.dataset, sides[0], sides[1], scratch)
            try:
                base = resolve_base(job.cell.config.model.base)
                fit = assess(job.cell.config, base, stored[ref])
                expected = fit.prediction and fit.prediction.estimate
                seconds.append(expected.whole_s if expected else None)
                found = fit.problems
            except UserError as error:
                found = list(error.problems)
            told = {(problem.what, problem.where) for problem in problems}
            problems += [
                replace(problem, where=f"{job.cell.label}; {problem.where}".rstrip("; "))
                for problem in found
                if (problem.what, f"{job.cell.label}; {problem.where}".rstrip("; ")) not in told
            ]
    UserError.refuse(problems)
    if not trials:
        refuse_small_budget(seconds, budget_s)


def train_one(
    config: TuneloopConfig, workspace: Workspace, dataset_ref: str, may_stop: bool
) -> None:
    """Train the model of a trial, and tell Ray Tune its validation losses and how it ended.

    Args:
        may_stop: The scheduler may end it early.
    """
    started = time.monotonic()
    try:
        dataset, base = workspace.open(dataset_ref), resolve_base(config.model.base)
        made, _ = pipeline.finetuned_identities(config, base, dataset)
        progress = workspace.work_folder("models", config.name, made) / "scratch" / PROGRESS_FILE
        if may_stop:
            progress.parent.mkdir(parents=True, exist_ok=True)
            (progress.parent / MAY_STOP_FILE).touch()
        with _reported(progress):
            model = pipeline.train_model(config, workspace, base, dataset).artifact
    except Exception as error:
        # A user's mistake travels back as a result: Tune would only keep its traceback.
        mistake = find_user_error(error)
        if mistake is None:
            raise
        if isinstance(mistake, TrainingStopped):
            rows = [json.loads(line) for line in progress.read_bytes().splitlines()]
            last = [row for row in rows if row[VALIDATION_LOSS] is not None][-1]
            tune.report(
                {
                    "stopped_at": 100 * last["step"] / last["num_steps"],
                    "loss": last[VALIDATION_LOSS],
                    "wall_s": time.monotonic() - started,
                }
            )
            return
        tune.report(
            {
                "problems": [vars(problem) for problem in mistake.problems],
                "by_its_settings": isinstance(mistake, ModelError),
                "wall_s": time.monotonic() - started,
            }
        )
        return
    loss = model.manifest["metrics"].get(VALIDATION_LOSS)
    # A training that went on from a checkpoint has the time of the steps before it as well.
    wall_s = max(time.monotonic() - started, model.manifest["metrics"]["train_s"])
    tune.report({"model": model.ref, "loss": loss, "wall_s": wall_s})


@contextlib.contextmanager
def _reported(progress: Path) -> Iterator[None]:
    """Report the validation losses in a training's progress file to Ray Tune while it goes on."""
    position = 0

    def report() -> None:
        nonlocal position
        with contextlib.suppress(FileNotFoundError), progress.open("rb") as file:
            file.seek(position)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                position += len(line)
                row = json.loads(line)
                # The last loss comes with the model.
                if row[VALIDATION_LOSS] is None or row["step"] == row["num_steps"]:
                    continue
                tune.report(
                    {
                        PERCENT: 100 * row["step"] / row["num_steps"],
                        "step": row["step"],
                        VALIDATION_LOSS: row[VALIDATION_LOSS],
                    }
                )

    with repeating(report, _POLL_S):
        yield


class _Earlier(NamedTuple):
    """A trial of an earlier call, as a scheduler knows trials."""

    trial_id: str


class GentleASHA(ASHAScheduler):
    """ASHA that asks a training to end, in place of killing its trial.

    Ray Tune kills the actor of a trial that it stops, and Ray Train's controller with it. What the
    workers had reserved is then freed by a helper that asks Ray's state API, which a Ray without
    a dashboard does not have: the next trial would wait for ever.
    """

    stop: Callable[[int], None] | None = None

    def on_trial_result(
        self, tune_controller: TuneController, trial: TuneTrial, result: dict[str, Any]
    ) -> str:
        """Return CONTINUE, and ask a training to end that ASHA stops."""
        decision = super().on_trial_result(tune_controller, trial, result)
        if decision == TrialScheduler.STOP and self.stop is not None:
            self.stop(trial.config["cell"])
            return str(TrialScheduler.CONTINUE)
        return str(decision)


def measured_of(job: Job, trial: Trial) -> list[Measurement]:
    """Return the validation losses during the training of a model that was there already."""
    if trial.model is None:
        return []
    columns = ["step", VALIDATION_LOSS]
    log = pq.read_table(trial.model.path / "trainer_log.parquet", columns=columns).to_pylist()
    num_rows = int(job.dataset.manifest["metrics"]["num_train_rows"])
    num_steps = Schedule.of(job.cell.config.training, num_rows).num_steps
    return [
        Measurement(100 * row["step"] / num_steps, row["step"], row[VALIDATION_LOSS])
        for row in log
        # As in a training that goes on: the last loss comes with the model.
        if row[VALIDATION_LOSS] is not None and row["step"] != num_steps
    ]


def make_scheduler(
    sweep: SweepConfig, study: Study, stop: Callable[[int], None] | None = None
) -> TrialScheduler | None:
    """Return what stops trainings early, knowing those of earlier calls; None: nothing does.

    Args:
        stop: Asks the training of a job's number to end; None: the scheduler says STOP.

    Source: Li et al. 2020, "A system for massively parallel hyperparameter tuning", algorithm 2.
    """
    if sweep.scheduler is None:
        return None
    scheduler = GentleASHA(
        time_attr=PERCENT,
        metric=VALIDATION_LOSS,
        mode="min",
        max_t=100,
        grace_period=100 * sweep.grace_period,
        reduction_factor=sweep.reduction_factor,
        stop_last_trials=False,
    )
    for number, trial in study.trials.items():
        earlier = cast(TuneTrial, _Earlier(f"earlier-{number}"))
        controller = cast(TuneController, None)
        scheduler.on_trial_add(controller, earlier)
        for one in study.measured.get(number) or measured_of(study.jobs[number], trial):
            report = {PERCENT: one.percent, VALIDATION_LOSS: one.loss}
            scheduler.on_trial_result(controller, earlier, report)
    scheduler.stop = stop
    return scheduler


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

    def __init__(self, study: Study) -> None:
        self.study = study

    def on_trial_start(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any
    ) -> None:
        logger.info("training %s", self._label(trial))

    def on_trial_complete(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any
    ) -> None:
        ended = self.study.trials.get(trial.config["cell"])
        logger.info(
            "%d of %d trainings ended: %s%s",
            len(self.study.trials),
            self.study.num_expected,
            self._label(trial),
            f", {ended.problem}" if ended is not None and ended.status == "stopped" else "",
        )

    def _label(self, trial: TuneTrial) -> str:
        return self.study.jobs[trial.config["cell"]].cell.label
