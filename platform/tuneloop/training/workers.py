"""The workers of one training: started, followed, and what is said when they die."""

from __future__ import annotations

import functools
import logging
import os
import shutil
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import ray
import torch
from ray import train as ray_train
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from tuneloop.artifacts import Draft
from tuneloop.config import TuneloopConfig, grad_accum_steps, micro_batch_size
from tuneloop.errors import ResourceError, UserError, find_user_error
from tuneloop.models.bases.source import BaseModel
from tuneloop.models.chat.own_templates import template_from_root
from tuneloop.training.checkpoint import newest_complete
from tuneloop.training.deepspeed_engine import Execution
from tuneloop.training.dry_run import dry_run, stage_of
from tuneloop.training.loop import TrainingJob, Worker, train_rows
from tuneloop.training.progress import PROGRESS_FILE, TrainingProgress, run_in_thread
from tuneloop.training.results import DryRunResult, TrainingResult
from tuneloop.training.rows import Rows, open_rows
from tuneloop.training.trackers import Trackers, dotted

_CHECKPOINTS = "checkpoints"
# The checkpoint that an earlier attempt at the same training left.
_EARLIER = "earlier"
# The traceback of an error that no retry helps.
_FAILURE = "failure.txt"
_PROGRAM_ERRORS = (TypeError, ValueError, LookupError, AttributeError, ImportError, AssertionError)
# How often an elastic training looks for more room. Growing costs the steps since the checkpoint.
_RESIZE_EVERY_S = 60.0


@dataclass(frozen=True)
class StoredRows:
    """The directories that workers map the rows from.

    Args:
        train: Directory of the train split.
        validation: Directory of the validation split; None where it has no rows.
    """

    train: Path
    validation: Path | None


@dataclass(frozen=True)
class WorkerSetup:
    """What every worker is started with.

    Args:
        run: The training, or the dry run.
        executions: How it is executed, by the number of workers.
    """

    run: Callable[[TrainingJob, Rows, Worker, Rows | None], TrainingResult | DryRunResult]
    job: TrainingJob
    stored: StoredRows
    executions: dict[int, Execution]


def run_workers(
    config: TuneloopConfig, base: BaseModel, stored: StoredRows, draft: Draft
) -> TrainingResult:
    """Run the workers to the end and return what rank 0 returned."""
    scratch = draft.scratch.absolute()
    job = _job(config, base, draft, draft.path.absolute(), scratch)
    _keep_newest_checkpoint(job.checkpoints)
    trackers = Trackers(
        config.resources.trackers,
        config.name,
        dotted(config.training.model_dump()),
        draft.path / "tensorboard",
    )
    setup = WorkerSetup(train_rows, job, stored, _executions(config))
    progress = TrainingProgress(scratch / PROGRESS_FILE, "training", trackers)
    try:
        result = _run(config, setup, progress, config.resources.max_failures)
    finally:
        trackers.close()
    assert isinstance(result, TrainingResult)
    return result


def can_resume(draft: Draft) -> bool:
    """Return whether an interrupted training left a checkpoint."""
    return newest_complete(draft.scratch / _CHECKPOINTS) is not None


def dry_run_workers(
    config: TuneloopConfig, base: BaseModel, stored: StoredRows, draft: Draft
) -> DryRunResult:
    """Do once everything that the training will do, with the same workers, and throw it away.

    Raises:
        UserError: What stops the training; each problem names the stage of the dry run.
    """
    folder = draft.scratch.absolute() / "dry_run"
    shutil.rmtree(folder, ignore_errors=True)
    output, scratch = folder / "model", folder / "scratch"
    for path in (output, scratch):
        path.mkdir(parents=True)
    job = _job(config, base, draft, output, scratch)
    setup = WorkerSetup(dry_run, job, stored, _executions(config))
    try:
        progress = TrainingProgress(scratch / PROGRESS_FILE, "dry run")
        result = _run(config, setup, progress, max_failures=0)
        assert isinstance(result, DryRunResult)
        return result
    except UserError as error:
        during = f"dry run, {stage_of(scratch)}"
        raise type(error)(
            *(replace(p, where=f"{during}; {p.where}".rstrip("; ")) for p in error.problems)
        ) from error
    except Exception as error:
        error.add_note(f"during the dry run, {stage_of(scratch)}")
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _job(
    config: TuneloopConfig, base: BaseModel, draft: Draft, output: Path, scratch: Path
) -> TrainingJob:
    return TrainingJob(
        base=base.path.absolute(),
        base_name=base.name,
        chat_template=template_from_root(config.model.chat_template),
        config=config.training,
        output=output,
        checkpoints=scratch / _CHECKPOINTS,
        progress=scratch,
        checkpoint_every_steps=config.resources.checkpoint_every_steps,
        identity=draft.fingerprint,
    )


def _trainer(config: TuneloopConfig, setup: WorkerSetup, max_failures: int) -> TorchTrainer:
    """Return the Ray Train trainer whose workers run the setup."""
    resources = config.resources
    use_gpu = resources.gpus_per_worker > 0
    per_worker = {"CPU": 1.0} | ({"GPU": resources.gpus_per_worker} if use_gpu else {})
    return TorchTrainer(
        # As its train_loop_config Ray's controller would read the setup, and import for that all
        # that only the workers need: most of its start.
        functools.partial(run_worker, setup),
        scaling_config=ray_train.ScalingConfig(
            num_workers=resources.num_workers,
            use_gpu=use_gpu,
            resources_per_worker=per_worker,
            elastic_resize_monitor_interval_s=_RESIZE_EVERY_S,
        ),
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        run_config=ray_train.RunConfig(
            # A new name for each attempt: Ray would end where its list of an earlier attempt's
            # checkpoints is cut off, or of another version. Ours finds them all.
            name=f"attempt-{time.time_ns()}",
            storage_path=str(setup.job.checkpoints),
            failure_config=ray_train.FailureConfig(max_failures=max_failures),
            checkpoint_config=ray_train.CheckpointConfig(num_to_keep=2),
            logging_config=ray_train.LoggingConfig(log_level="ERROR"),
        ),
    )


def _executions(config: TuneloopConfig) -> dict[int, Execution]:
    """Return how the training is executed on each possible number of workers."""
    resources = config.resources
    return {
        num_workers: Execution(
            world_size=num_workers,
            micro_batch_size=micro_batch_size(config, num_workers),
            grad_accum_steps=grad_accum_steps(config, num_workers),
            zero_stage=resources.zero_stage,
            use_gpu=resources.gpus_per_worker > 0,
            gradient_checkpointing=resources.gradient_checkpointing,
        )
        for num_workers in resources.worker_counts
    }


@dataclass(frozen=True)
class WorkerFailure:
    """An error of the program in a worker, which would come again at every attempt.

    Args:
        text: The traceback.
    """

    text: str


def run_worker(setup: WorkerSetup) -> TrainingResult | DryRunResult | UserError | WorkerFailure:
    """Train in one Ray Train worker. A user's mistake is returned, as a retry would not mend it.

    Neither would it mend an error of the program. That one is raised, so that no other worker waits
    for this one, and returned by the next attempt at once.
    """
    failure = setup.job.progress / _FAILURE
    if failure.exists():
        return WorkerFailure(failure.read_text(encoding="utf-8"))
    # Ray Train notes each report at INFO; the driver logs the progress.
    logging.getLogger().setLevel(logging.WARNING)
    context = ray_train.get_context()
    # An elastic training has another number of workers after a node is lost or has come.
    execution = setup.executions[context.get_world_size()]
    node = next(
        node for node in ray.nodes() if node["NodeID"] == ray.get_runtime_context().get_node_id()
    )
    cores = min(len(os.sched_getaffinity(0)), int(node["Resources"].get("CPU", 1)))

    def report(metrics: dict[str, float], folder: Path | None) -> None:
        checkpoint = None if folder is None else ray_train.Checkpoint.from_directory(folder)
        ray_train.report(metrics, checkpoint=checkpoint)
        if folder is not None:
            shutil.rmtree(setup.job.checkpoints / _EARLIER, ignore_errors=True)

    worker = Worker(
        rank=context.get_world_rank(),
        execution=execution,
        device=get_device() if execution.use_gpu else torch.device("cpu"),
        # Ray sets OMP_NUM_THREADS=1; the workers of a node share its cores.
        num_threads=max(1, cores // context.get_local_world_size()),
        report=report,
    )
    stored = setup.stored
    try:
        validation = None if stored.validation is None else open_rows(stored.validation)
        return setup.run(setup.job, open_rows(stored.train), worker, validation)
    except UserError as error:
        return error
    except (MemoryError, RuntimeError) as error:
        if _lacks_memory(error):
            return _out_of_memory(str(error).splitlines()[0])
        # A worker that lost another one raises RuntimeError itself, and a retry may go well.
        if isinstance(error, NotImplementedError):
            failure.write_text(traceback.format_exc(), encoding="utf-8")
        raise
    except _PROGRAM_ERRORS:
        failure.write_text(traceback.format_exc(), encoding="utf-8")
        raise


def _run(
    config: TuneloopConfig, setup: WorkerSetup, progress: TrainingProgress, max_failures: int
) -> TrainingResult | DryRunResult:
    """Run the workers, show their progress meanwhile, and return what rank 0 returned."""
    (setup.job.progress / _FAILURE).unlink(missing_ok=True)
    trainer = _trainer(config, setup, max_failures)
    try:
        with progress:
            value = run_in_thread(lambda: trainer.fit().return_value, progress.poll)
    except Exception as error:
        refusal = find_user_error(error) or _worker_death(error, max_failures)
        if refusal is not None:
            raise refusal from error
        raise
    if isinstance(value, UserError):
        raise value
    if isinstance(value, WorkerFailure):
        raise RuntimeError(f"a training worker failed, and would again:\n{value.text}")
    assert isinstance(value, TrainingResult | DryRunResult)
    return value


def _worker_death(error: BaseException, max_failures: int) -> ResourceError | None:
    """Return the error for workers that were killed, mostly for memory; None for other errors."""
    failures = list(getattr(error, "worker_failures", {}).values())
    starved = [f for f in failures if isinstance(f, ray.exceptions.OutOfMemoryError)]
    dead = [f for f in failures if isinstance(f, ray.exceptions.RayActorError)]
    if not starved and not dead:
        return None
    what = "a training worker ran out of memory"
    if not starved:
        what = "a training worker was killed, most often by the system for lack of memory"
    first = str((starved or dead)[0]).splitlines()[0]
    return _out_of_memory(f"{max_failures + 1} failures: {first}", what, max_failures)


def _lacks_memory(error: BaseException) -> bool:
    """Return whether PyTorch or Python could not get memory, on a GPU or on the CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        sign in str(error) for sign in ("can't allocate memory", "CUDA out of memory")
    )


def _out_of_memory(
    got: str, what: str = "a training worker ran out of memory", max_failures: int = 0
) -> ResourceError:
    return ResourceError.of(
        what,
        where="resources",
        got=got,
        allowed=f"resources.max_failures {max_failures}" if max_failures else "",
        remedy="lower resources.micro_batch_size or data.max_seq_len, use training.method "
        "lora, or more memory; the same command resumes from the last checkpoint",
    )


def _keep_newest_checkpoint(checkpoints: Path) -> None:
    """Remove what earlier attempts left but their newest complete checkpoint."""
    newest, kept = newest_complete(checkpoints), checkpoints / _EARLIER
    if newest is not None and newest != kept:
        shutil.rmtree(kept, ignore_errors=True)
        newest.rename(kept)
    for path in checkpoints.glob("*"):
        if path.is_file():
            path.unlink()
        elif path != kept or newest is None:
            shutil.rmtree(path)
