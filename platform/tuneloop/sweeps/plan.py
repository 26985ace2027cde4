"""What a sweep needs before its first training: datasets, fingerprints, and the study."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from tuneloop import pipeline
from tuneloop.artifacts import Artifact, Workspace
from tuneloop.config import SweepConfig, TuneloopConfig
from tuneloop.errors import ConfigError, DataError, Problem, UserError
from tuneloop.models.bases.source import resolve_base
from tuneloop.sweeps.grid import (
    VALIDATION_LOSS,
    Cell,
    listed_values,
    num_combinations,
    search_of,
    with_drawn,
)
from tuneloop.sweeps.study import Budget, Job, Journal, Study
from tuneloop.training.batches import Schedule

logger = logging.getLogger("tuneloop.sweeps")


class Prepared(NamedTuple):
    """A sweep's datasets, by what decides them."""

    sweep: SweepConfig
    datasets: dict[str, Artifact]

    def job(self, cell: Cell) -> Job:
        """Return what a cell trains, on which rows."""
        dataset = self.datasets[_dataset_key(cell)]
        training = cell.config.training
        if self.sweep.scheduler is not None and training.eval_every_steps is None:
            # As often as early stopping decides, and no oftener than it helps.
            num_rows = int(dataset.manifest["metrics"]["num_train_rows"])
            steps = Schedule.of(training, num_rows).num_steps
            every = max(1, round(steps * min(self.sweep.grace_period, 0.1)))
            training = training.model_copy(update={"eval_every_steps": every})
            config = cell.config.model_copy(update={"training": training})
            cell = replace(cell, config=config)
        job = Job(cell, dataset, "")
        return job._replace(fingerprint=self.identities(job)[0])

    def identities(self, job: Job) -> tuple[str, str]:
        """Return the fingerprints of the model and of its evaluation on the validation split."""
        base = resolve_base(job.cell.config.model.base)
        return pipeline.finetuned_identities(job.cell.config, base, job.dataset)


def make_study(
    config: TuneloopConfig,
    workspace: Workspace,
    prepared: Prepared,
    jobs: list[Job],
    folder: Path,
) -> Study:
    """Return the study that earlier calls have left, or a new one."""
    assert config.sweep is not None
    sweep = config.sweep
    study = partial(
        Study,
        budget=Budget.of(config),
        journal=Journal(folder / "journal.jsonl"),
        find=partial(workspace.find, "models", config.name),
    )
    if search_of(sweep) != "optuna":
        return study(jobs, order_seed=None if sweep.scheduler is None else sweep.seed)
    listed = [key for key, values in sweep.parameters.items() if listed_values(values) is not None]
    first = jobs[:: sweep.num_seeds]
    by_listed = {repr([job.cell.values[key] for key in listed]): job.cell for job in first}

    def make(values: dict[str, Any]) -> list[Job]:
        cell = by_listed[repr([values[key] for key in listed])]
        return [prepared.job(one) for one in with_drawn(cell, values, sweep.num_seeds)]

    # Loaded here: everything else is looked up without Ray Tune.
    from tuneloop.sweeps.drawing import OptunaDrawing

    return study(
        [],
        drawing=OptunaDrawing(sweep),
        make=make,
        num_wanted=num_combinations(sweep) or 0,
        num_seeds=sweep.num_seeds,
    )


def prepare_all(cells: Sequence[Cell], workspace: Workspace) -> dict[str, Artifact]:
    """Prepare every cell's dataset, and return them by what decides them.

    All base models are fetched before the first is used.
    """
    problems: list[Problem] = []
    for base in dict.fromkeys(cell.config.model.base for cell in cells):
        try:
            resolve_base(base)
        except UserError as error:
            problems += error.problems
    UserError.refuse(problems)
    datasets: dict[str, Artifact] = {}
    for cell in cells:
        wanted = _dataset_key(cell)
        if wanted in datasets:
            continue
        try:
            datasets[wanted] = pipeline.prepare_dataset(
                cell.config, workspace, resolve_base(cell.config.model.base)
            ).artifact
        except DataError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    DataError.refuse(problems)
    return datasets


def _dataset_key(cell: Cell) -> str:
    return cell.config.model_dump_json(include={"data", "task", "model"})


def common_rows(datasets: Sequence[Artifact], keys: Sequence[str]) -> frozenset[str] | None:
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
        raise DataError.of(
            "the trials have too few validation rows in common to be compared",
            where="sweep.parameters",
            got=f"{len(common):,} rows in common, of {min(map(len, ids)):,} or more each, over "
            + ", ".join(f"`{key}`" for key in keys),
            allowed="at least half of them",
            remedy="sweep keys that leave the rows as they are",
        )
    logger.warning(
        "the trials' validation splits differ: compared on the %d rows that all have", len(common)
    )
    return common


def refuse_losses(
    sweep: SweepConfig, datasets: Sequence[Artifact], rows: frozenset[str] | None
) -> None:
    """Raise ConfigError where validation losses would be compared that are of other things.

    A validation loss is a mean over the tokens of all answers: where models cut the same answers
    into other tokens, the one with the shorter tokens has the lower loss.

    Args:
        rows: What `common_rows` returned. Losses are of all validation rows of a trial.
    """
    is_chosen_by = sweep.metric == VALIDATION_LOSS
    uses = [("sweep.metric", VALIDATION_LOSS)] * is_chosen_by
    uses += [("sweep.scheduler", str(sweep.scheduler))] * (sweep.scheduler is not None)
    uses += [("sweep.search", "optuna")] * (search_of(sweep) == "optuna")
    if not uses:
        return
    by_renderer = {dataset.manifest["config"]["renderer"]: dataset for dataset in datasets}
    first, *others = (
        _num_targets(dataset) if len(by_renderer) > 1 else {} for dataset in by_renderer.values()
    )
    what, allowed = "", ""
    if any(one[row] != first[row] for one in others for row in first.keys() & one.keys()):
        what, allowed = "other tokens", "models that cut answers into the same tokens"
    elif is_chosen_by and rows is not None:
        uses, what = uses[:1], "other validation rows"
        allowed = "keys that leave the rows as they are"
    ConfigError.refuse(
        Problem(
            f"validation losses cannot be compared: those of the trials are of {what}",
            where=where,
            got=got,
            allowed=allowed,
            remedy="leave it out, so that scores alone decide; or make a sweep of each",
        )
        for where, got in (uses if what else ())
    )


def _num_targets(dataset: Artifact) -> dict[str, int]:
    """Return by validation row into how many tokens its answers were cut."""
    table = pq.read_table(dataset.path / "validation", columns=["row_id", "loss_mask"])
    ids, masks = (table[name].to_pylist() for name in ("row_id", "loss_mask"))
    return {row: sum(mask) for row, mask in zip(ids, masks, strict=True)}
