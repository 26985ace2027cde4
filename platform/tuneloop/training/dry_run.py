"""A training in small, on the real thing: what would fail after hours fails in the first minute.

The same workers, model, rows and ZeRO stage as in the training that follows take the step with the
most tokens, save a checkpoint, take another step, go back to the checkpoint and take it again, look
at validation rows, and export and check the model. All of it is thrown away but what was measured.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tuneloop.errors import ModelError, Problem
from tuneloop.training.loop import (
    TrainingJob,
    Worker,
    export,
    exporter,
    keep_checkpoint,
    resume,
    start_engine,
    train_step,
)
from tuneloop.training.packed import LOSS_TOLERANCE
from tuneloop.training.results import Measured
from tuneloop.training.rows import Rows, make_rows
from tuneloop.training.validation import measure, sample_answers

_STAGE = "stage"


def fly(job: TrainingJob, rows: Rows, worker: Worker, validation: Rows | None = None) -> Measured:
    """Do once everything that a training does. All workers run it together.

    Args:
        job: Its directories are thrown away afterwards.
        validation: Rows that are only looked at; None where the dataset has none.

    Raises:
        ModelError: As of `train_rows`; or the checkpoint does not give back what was saved.
        ResourceError: As of `train_rows`.
    """
    started = time.monotonic()
    schedule = job.schedule(rows)
    with _stage(job, worker, "loading the model"):
        engine, _ = start_engine(job, rows, worker)
        engine.train()
    heaviest = int(schedule.sums(rows.lengths).argmax())
    with _stage(job, worker, f"taking the step with the most tokens ({heaviest + 1})"):
        log = [train_step(engine, rows, schedule, heaviest, worker)]
    with _stage(job, worker, "saving a checkpoint") as saving:
        keep_checkpoint(engine, job, worker, log)
    with _stage(job, worker, "taking a second step"):
        second = train_step(engine, rows, schedule, 0, worker)
    with _stage(job, worker, "going on from the checkpoint"):
        found = resume(engine, job, worker)
        again = train_step(engine, rows, schedule, 0, worker)
        tolerance = LOSS_TOLERANCE[worker.execution.dtype] * max(1.0, abs(second["loss"]))
        if not found or abs(second["loss"] - again["loss"]) > tolerance:
            raise _no_way_back(job, found, second["loss"], again["loss"])
    if validation is not None:
        with _stage(job, worker, "looking at validation rows"):
            few = _first(validation, worker.execution.world_size)
            measure(engine, few, worker.execution, worker.device)
            sample_answers(engine, exporter(job, worker), few, worker.execution)
    with _stage(job, worker, "exporting the model") as exporting:
        export(engine, job, rows, worker)
    return Measured(
        tokens_per_s=again["tokens_per_s"],
        peak_memory_bytes=again["peak_memory_bytes"],
        checkpoint_s=saving.wall_s,
        export_s=exporting.wall_s,
        num_workers=worker.execution.world_size,
        wall_s=round(time.monotonic() - started, 3),
    )


def stage_of(progress: Path) -> str:
    """Return what the workers of a preflight were doing last."""
    with contextlib.suppress(FileNotFoundError):
        return (progress / _STAGE).read_text(encoding="utf-8")
    return "starting the workers"


@dataclass
class _Took:
    wall_s: float = 0.0


@contextlib.contextmanager
def _stage(job: TrainingJob, worker: Worker, name: str) -> Iterator[_Took]:
    """Note what is done, where it is found when the process is killed, and how long it took."""
    if worker.rank == 0:
        (job.progress / _STAGE).write_text(name, encoding="utf-8")
    took, started = _Took(), time.monotonic()
    yield took
    took.wall_s = round(time.monotonic() - started, 3)


def _no_way_back(
    job: TrainingJob, found: list[dict[str, Any]], second: float, again: float
) -> ModelError:
    return ModelError(
        Problem(
            "a checkpoint does not give back what was saved",
            where=str(job.checkpoints),
            got=f"loss {again:.5f} after going back, {second:.5f} before"
            if found
            else "no whole checkpoint there",
            remedy="make sure that all nodes share the workspace; another resources.zero_stage "
            "may help",
        )
    )


def _first(rows: Rows, count: int) -> Rows:
    parts = [rows.row(index) for index in range(min(len(rows), count))]
    documents = [rows.document_lengths(index) for index in range(len(parts))]
    ids, masks = ([np.asarray(part[side]).tolist() for part in parts] for side in (0, 1))
    return make_rows([rows.row_ids[index] for index in range(len(parts))], ids, masks, documents)
