"""Which trial is next, what the budget leaves out, and how a killed sweep goes on.

No training runs here: how each ends is made up. The searchers are Optuna's and Ray Tune's own.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tuneloop.artifacts import Artifact
from tuneloop.config import TuneloopConfig
from tuneloop.sweeps.grid import Cell, Measurement, Trial, expand, with_drawn
from tuneloop.sweeps.study import Budget, Job, Journal, Study

RATE = "training.learning_rate"
ANY = Budget()


def config(sweep: dict[str, Any]) -> TuneloopConfig:
    return TuneloopConfig.model_validate(
        {
            "name": "s",
            "task": {"type": "extraction"},
            "model": {"base": "m"},
            "data": {"sources": [{"path": "rows.jsonl", "format": "question_answer"}]},
            "sweep": sweep,
        }
    )


def job(cell: Cell) -> Job:
    dataset = Artifact("datasets", "s", 1, "f" * 64, Path(), {})
    return Job(cell, dataset, f"{cell.values}, {cell.seed}")


class Models(dict):
    """Published models by fingerprint."""

    def publish(self, job: Job) -> Artifact:
        manifest = {"metrics": {}, "duration_s": 5.0}
        self[job.fingerprint] = SimpleNamespace(manifest=manifest)  # type: ignore[assignment]
        return self[job.fingerprint]


def train(study: Study, models: Models, num_trials: int = 99) -> list[dict[str, Any]]:
    """Train up to so many jobs of the study; the loss falls towards a rate of 1e-3."""
    trained: list[dict[str, Any]] = []
    while len(trained) < num_trials and (number := study.next()) is not None:
        one = study.jobs[number]
        loss = abs(np.log10(one.cell.values[RATE]) + 3) + 0.01 * one.cell.seed
        trial = Trial(one.cell, models.publish(one), "", 10.0)
        study.end(number, trial, float(loss))
        trained.append(one.cell.values | {"seed": one.cell.seed})
    return trained


def test_a_grid_is_trained_once_and_what_exists_is_not(tmp_path: Path) -> None:
    jobs = [job(cell) for cell in expand(config({"parameters": {RATE: [1e-4, 1e-3, 1e-2]}}))]
    models = Models()
    models.publish(jobs[1])
    study = Study(jobs, ANY, Journal(tmp_path / "j"), models.get)
    assert [values[RATE] for values in train(study, models, 1)] == [1e-4]
    assert study.is_wanting
    again = Study(jobs, ANY, Journal(tmp_path / "j"), models.get)
    assert [values[RATE] for values in train(again, models)] == [1e-2]
    assert not again.is_wanting
    assert [trial.wall_s for trial in again.ended()] == [10, 5, 10]
    assert {trial.status for trial in again.ended()} == {"done"}


def test_what_stopped_or_failed_by_its_settings_is_not_repeated(tmp_path: Path) -> None:
    jobs = [job(cell) for cell in expand(config({"parameters": {RATE: [1e-4, 1e-3, 1e-2]}}))]
    study = Study(jobs, ANY, Journal(tmp_path / "j"), Models().get)
    for status, may_pass in (("stopped", False), ("failed", False), ("failed", True)):
        number = study.next()
        assert number is not None
        study.measure(number, Measurement(50.0, 4, 2.5))
        ended = Trial(jobs[number].cell, None, "why", 7.0, may_pass, status)  # type: ignore[arg-type]
        study.end(number, ended, None)
    # A kill in the middle of a line loses that line only.
    with (tmp_path / "j").open("ab") as file:
        file.write(b'{"fingerp')
    again = Study(jobs, ANY, Journal(tmp_path / "j"), Models().get)
    assert again.next() == 2
    assert [trial.status for trial in again.ended()] == ["stopped", "failed", "not run"]
    assert again.ended()[0].measured == (Measurement(50.0, 4, 2.5),)
    assert again.spent_s == 14
    again.end(2, Trial(jobs[2].cell, None, "", 1.0, status="stopped"), 1.0)
    lines = (tmp_path / "j").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    ended = [entry["status"] for entry in entries if "status" in entry]
    assert ended == ["stopped", "failed", "stopped"]


def test_a_training_that_was_killed_before_its_entry_counts_for_the_budget(tmp_path: Path) -> None:
    jobs = [job(cell) for cell in expand(config({"parameters": {RATE: [1e-4, 1e-3, 1e-2]}}))]
    models = Models()
    budget = Budget(2, math.inf)
    study = Study(jobs, budget, Journal(tmp_path / "j"), models.get)
    train(study, models, 1)
    number = study.next()
    assert number == 1
    models.publish(jobs[1])  # and here the kill
    again = Study(jobs, budget, Journal(tmp_path / "j"), models.get)
    assert again.next() is None
    assert again.spent_s == 10 + 5
    # One that was killed before its model is begun again, and counts once.
    del models[jobs[1].fingerprint]
    again = Study(jobs, budget, Journal(tmp_path / "j"), models.get)
    assert [values[RATE] for values in train(again, models)] == [1e-3]


@pytest.mark.parametrize(
    ("budget", "num_trained"),
    [
        (Budget(2, math.inf), 2),
        # Each takes 10 s: the third begins, for the budget is not spent before it.
        (Budget(math.inf, 21.0), 3),
        (Budget(math.inf, 20.0), 2),
        (ANY, 4),
    ],
)
def test_no_training_begins_when_the_budget_is_spent(
    tmp_path: Path, budget: Budget, num_trained: int
) -> None:
    sweep = {"parameters": {RATE: [1e-4, 1e-3]}, "num_seeds": 2}
    jobs = [job(cell) for cell in expand(config(sweep))]
    models = Models()
    study = Study(jobs, budget, Journal(tmp_path / "j"), models.get)
    assert len(train(study, models)) == num_trained
    assert [t.status for t in study.ended()].count("not run") == 4 - num_trained
    # What earlier calls spent counts.
    again = Study(jobs, budget, Journal(tmp_path / "j"), models.get)
    assert not train(again, models)


def test_money_is_time_by_the_price_of_all_workers() -> None:
    settings = config({"parameters": {RATE: [1e-4]}, "budget": {"price": 1, "hours": 4}})
    priced = {"price_per_hour": 0.25, "num_workers": 2}
    resources = settings.resources.model_copy(update=priced)
    budget = Budget.of(settings.model_copy(update={"resources": resources}))
    assert budget == (math.inf, 2 * 3600)


def optuna_study(folder: Path, models: Models, num_wanted: int, num_seeds: int = 1) -> Study:
    pytest.importorskip("optuna")
    from tuneloop.sweeps.drawing import OptunaDrawing

    settings = config(
        {
            "parameters": {RATE: {"loguniform": [1e-5, 1e-1]}, "training.num_epochs": [1, 2]},
            "search": "optuna",
            "num_trials": num_wanted,
            "num_seeds": num_seeds,
        }
    )
    assert settings.sweep is not None
    cells = {cell.values["training.num_epochs"]: cell for cell in expand(settings)[::num_seeds]}

    def make(values: dict[str, Any]) -> list[Job]:
        cell = cells[values["training.num_epochs"]]
        return [job(one) for one in with_drawn(cell, values, num_seeds)]

    return Study(
        [],
        ANY,
        Journal(folder / "j"),
        models.get,
        drawing=OptunaDrawing(settings.sweep),
        make=make,
        num_wanted=num_wanted,
    )


def test_optuna_learns_from_the_losses(tmp_path: Path) -> None:
    models = Models()
    trained = train(optuna_study(tmp_path, models, 40), models)
    assert len({repr(values) for values in trained}) == 40
    far = [abs(np.log10(values[RATE]) + 3) for values in trained]
    # Drawn at random they would be one order of magnitude off.
    assert np.mean(far[-20:]) < 0.6


def test_a_killed_optuna_sweep_draws_what_it_would_have_drawn(tmp_path: Path) -> None:
    whole, parts = Models(), Models()
    expected = train(optuna_study(tmp_path / "whole", whole, 16, num_seeds=2), whole)
    assert [values["seed"] for values in expected[:4]] == [0, 1, 0, 1]
    trained = []
    for share in (1, 6, 7, 99):
        # Killed in the middle of a training: it was begun, and not told to have ended.
        study = optuna_study(tmp_path / "parts", parts, 16, num_seeds=2)
        trained += train(study, parts, share)
        study.next()
    assert trained == expected
    assert len(study.ended()) == 32
    assert all(trial.status == "done" for trial in study.ended())
    assert not optuna_study(tmp_path / "parts", parts, 16, num_seeds=2).is_wanting


def test_what_is_told_is_the_mean_loss_also_of_a_trial_that_was_stopped(tmp_path: Path) -> None:
    class Recorder:
        def __init__(self) -> None:
            self.told: list[tuple[int, float | None]] = []

        def draw(self, number: int) -> dict[str, Any]:
            return {RATE: 10.0 ** -(number + 2)}

        def tell(self, number: int, loss: float | None) -> None:
            self.told.append((number, loss))

    sweep = {"parameters": {RATE: [1e-2]}, "num_seeds": 2}
    (cell, _) = expand(config(sweep))
    models, recorder = Models(), Recorder()
    study = Study(
        [],
        ANY,
        Journal(tmp_path / "j"),
        models.get,
        drawing=recorder,
        make=lambda values: [job(one) for one in with_drawn(cell, values, 2)],
        num_wanted=2,
        num_seeds=2,
    )
    losses = [1.0, 3.0, 9.0, None]
    for loss, status in zip(losses, ("done", "stopped", "done", "failed"), strict=True):
        number = study.next()
        assert number is not None
        model = models.publish(study.jobs[number]) if status == "done" else None
        ended = Trial(study.jobs[number].cell, model, "", 1.0, status=status)  # type: ignore[arg-type]
        study.end(number, ended, loss)
    assert study.num_expected == 4
    assert recorder.told == [(0, 2.0), (1, None)]


def test_a_small_space_is_drawn_whole_and_then_ends(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    from tuneloop.sweeps.drawing import OptunaDrawing

    sweep = {"parameters": {RATE: [1e-4, 1e-3, 1e-2]}, "search": "optuna", "num_trials": 9}
    settings = config(sweep)
    assert settings.sweep is not None
    (cell, *_) = expand(settings)
    models = Models()
    study = Study(
        [],
        ANY,
        Journal(tmp_path / "j"),
        models.get,
        drawing=OptunaDrawing(settings.sweep),
        make=lambda values: [job(one) for one in with_drawn(cell, values, 1)],
        num_wanted=9,
    )
    assert sorted(values[RATE] for values in train(study, models)) == [1e-4, 1e-3, 1e-2]


def test_early_stopping_knows_the_trials_of_earlier_calls(tmp_path: Path) -> None:
    from tuneloop.sweeps.search import PERCENT
    from tuneloop.sweeps.trials import make_scheduler, measured_of

    settings = config({"parameters": {RATE: [1e-4, 1e-3]}, "scheduler": "asha"})
    assert settings.sweep is not None
    jobs = [job(cell) for cell in expand(settings)]
    study = Study(jobs, ANY, Journal(tmp_path / "j"), Models().get)

    # In an order that is not that of the values, and the same in the next call.
    rates = [10.0**-power for power in range(2, 9)]
    many = [job(cell) for cell in expand(config({"parameters": {RATE: rates}}))]
    orders = []
    for call in "ab":
        ordered = Study(many, ANY, Journal(tmp_path / call), Models().get, order_seed=0)
        orders.append([values[RATE] for values in train(ordered, Models())])
    assert orders[0] == orders[1] != rates
    assert sorted(orders[0], reverse=True) == rates

    def decide(loss: float) -> str:
        scheduler = make_scheduler(settings.sweep, study)  # type: ignore[arg-type]
        assert scheduler is not None
        trial: Any = SimpleNamespace(trial_id="now")
        scheduler.on_trial_add(None, trial)  # type: ignore[arg-type]
        report = {PERCENT: 20.0, "validation_loss": loss}
        return scheduler.on_trial_result(None, trial, report)  # type: ignore[arg-type]

    assert decide(2.0) == "CONTINUE", "the first has nothing to be compared with"
    study.measure(0, Measurement(20.0, 1, 1.0))
    study.end(0, Trial(jobs[0].cell, None, "", 1.0, status="stopped"), 1.0)
    assert decide(2.0) == "STOP"
    assert decide(0.5) == "CONTINUE"
    # A model that was there already says how it came about: the last loss came with the model.
    table = pa.table({"step": [1, 2, 3, 4, 5], "validation_loss": [1.0, None, 0.8, None, 0.7]})
    pq.write_table(table, tmp_path / "trainer_log.parquet")
    model = Artifact("models", "s", 1, tmp_path, "", {"metrics": {}, "duration_s": 1.0})
    dataset = Artifact("datasets", "s", 1, Path(), "", {"metrics": {"num_train_rows": 40}})
    found = Study(
        [jobs[0]._replace(dataset=dataset)], ANY, Journal(tmp_path / "k"), lambda _: model
    )
    expected = [Measurement(20.0, 1, 1.0), Measurement(60.0, 3, 0.8)]
    assert measured_of(found.jobs[0], found.trials[0]) == expected
    study = found
    assert decide(2.0) == "STOP"
    # In a sweep the training is asked to end, and its trial goes on until it has.
    asked: list[int] = []
    scheduler: Any = make_scheduler(settings.sweep, study, asked.append)
    trial: Any = SimpleNamespace(trial_id="now", config={"cell": 1})
    scheduler.on_trial_add(None, trial)
    report = {PERCENT: 20.0, "validation_loss": 2.0}
    assert scheduler.on_trial_result(None, trial, report) == "CONTINUE"
    assert asked == [1]
