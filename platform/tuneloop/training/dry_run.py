"""A dry run: two steps of the training with everything around them, thrown away afterwards.

The same workers, model, rows and ZeRO stage as in the training that follows take the step with the
most tokens, save a checkpoint, take another step, go back to the checkpoint and take it again,
measure validation rows, and export and check the model. What would fail after hours fails in the
first minute; only the measurements are kept.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tuneloop.errors import ModelError
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
from tuneloop.training.loss import LOSS_TOLERANCE
from tuneloop.training.results import DryRunResult, StepRecord
from tuneloop.training.rows import Rows, make_rows
from tuneloop.training.validation import measure, sample_answers

_STAGE = "stage"


def dry_run(
    job: TrainingJob, rows: Rows, worker: Worker, validation: Rows | None = None
) -> DryRunResult:
    """Do once everything that a training does. All workers run it together.

    Args:
        job: The training, with directories that are removed afterwards.
        validation: Rows of the validation split; None where the dataset has none.

    Raises:
        ModelError: As `train_rows`; or the checkpoint does not give back what was saved.
        ResourceError: As `train_rows`.
    """
    started = time.monotonic()
    schedule = job.schedule(rows)
    with _stage(job, worker, "loading the model"):
        started_engine = start_engine(job, rows, worker)
        engine, worker = started_engine.engine, started_engine.worker
        engine.train()
    heaviest = int(schedule.sums(rows.lengths).argmax())
    with _stage(job, worker, f"taking the step with the most tokens ({heaviest + 1})"):
        log = [train_step(engine, rows, schedule, heaviest, worker)]
    with _stage(job, worker, "saving a checkpoint") as saving:
        keep_checkpoint(engine, job, worker, log)
    with _stage(job, worker, "taking a second step"):
        second = train_step(engine, rows, schedule, 0, worker)
    with _stage(job, worker, "going on from the checkpoint"):
        resumed = bool(resume(engine, job, worker))
        again = train_step(engine, rows, schedule, 0, worker)
        tolerance = LOSS_TOLERANCE[worker.execution.dtype] * max(1.0, abs(second["loss"]))
        if not resumed or abs(second["loss"] - again["loss"]) > tolerance:
            raise _lost_state(job, second, again if resumed else None)
    if validation is not None:
        with _stage(job, worker, "measuring validation rows"):
            few = _first(validation, worker.execution.world_size)
            measure(engine, few, worker.execution, worker.device)
            sample_answers(engine, exporter(job, worker), few, worker.execution)
    with _stage(job, worker, "exporting the model") as exporting:
        export(engine, job, rows, worker)
    return DryRunResult(
        tokens_per_s=again["tokens_per_s"],
        peak_memory_bytes=again["peak_memory_bytes"],
        checkpoint_s=saving.wall_s,
        export_s=exporting.wall_s,
        num_workers=worker.execution.world_size,
        wall_s=round(time.monotonic() - started, 3),
    )


def stage_of(progress: Path) -> str:
    """Return what the workers of a dry run were doing last."""
    with contextlib.suppress(FileNotFoundError):
        return (progress / _STAGE).read_text(encoding="utf-8")
    return "starting the workers"


@dataclass
class _Timing:
    wall_s: float = 0.0


@contextlib.contextmanager
def _stage(job: TrainingJob, worker: Worker, name: str) -> Iterator[_Timing]:
    """Measure one stage; its name is in a file, which a process that is killed leaves behind."""
    if worker.rank == 0:
        (job.progress / _STAGE).write_text(name, encoding="utf-8")
    timing, started = _Timing(), time.monotonic()
    yield timing
    timing.wall_s = round(time.monotonic() - started, 3)


def _lost_state(job: TrainingJob, before: StepRecord, after: StepRecord | None) -> ModelError:
    return ModelError.of(
        "a checkpoint does not give back what was saved",
        where=str(job.checkpoints),
        got="no complete checkpoint there"
        if after is None
        else f"loss {after['loss']:.5f} after going back, {before['loss']:.5f} before",
        remedy="make sure that all nodes share the workspace; another resources.zero_stage "
        "may help",
    )


def _first(rows: Rows, count: int) -> Rows:
    """Return the first rows, at most `count` of them."""
    parts = [rows.row(index) for index in range(min(len(rows), count))]
    documents = [rows.document_lengths(index) for index in range(len(parts))]
    ids, masks = [ids.tolist() for ids, _ in parts], [mask.tolist() for _, mask in parts]
    return make_rows([rows.row_ids[index] for index in range(len(parts))], ids, masks, documents)
