"""The workers of one training: started, followed, and told about when they die."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tuneloop.artifacts import Draft
from tuneloop.cluster import WaitingNotice, joins_cluster
from tuneloop.config import TuneloopConfig, grad_accum_steps, micro_batch_size
from tuneloop.errors import Problem, ResourceError, UserError, find_user_error
from tuneloop.models.bases.source import BaseModel
from tuneloop.training.checkpoint import newest_whole
from tuneloop.training.dry_run import fly, stage_of
from tuneloop.training.engine import Execution
from tuneloop.training.loop import PROGRESS, TrainingJob, Worker, train_rows
from tuneloop.training.results import Measured, TrainingResult
from tuneloop.training.rows import open_rows
from tuneloop.training.trackers import Trackers, flat

logger = logging.getLogger("tuneloop.training")

_RUN = "checkpoints"
_LOG_EVERY_S = 5.0
# How often an elastic training looks for more room. Growing costs the steps since the checkpoint.
_RESIZE_EVERY_S = 60.0


@dataclass(frozen=True)
class Stored:
    """Where the rows are, for workers to map.

    Args:
        train: Directory of the train split.
        validation: Of the validation split; None where there are no such rows.
    """

    train: Path
    validation: Path | None


def run_workers(
    config: TuneloopConfig, base: BaseModel, stored: Stored, draft: Draft
) -> TrainingResult:
    """Run the workers to the end and return what rank 0 returned."""
    scratch = draft.scratch.absolute()
    _tidy(scratch)
    job = _job(config, base, draft, draft.path.absolute(), scratch)
    trackers = Trackers(
        config.resources.trackers,
        config.name,
        flat(config.training.model_dump()),
        draft.path / "tensorboard",
    )
    max_failures = config.resources.max_failures
    trainer = _trainer(config, job, stored, train_rows, max_failures)
    try:
        outcome = _follow(trainer, Progress(scratch / PROGRESS, trackers), max_failures)
    finally:
        trackers.close()
    assert isinstance(outcome, TrainingResult)
    return outcome


def can_go_on(draft: Draft) -> bool:
    """Return whether an interrupted training left a checkpoint."""
    return newest_whole(draft.scratch / _RUN) is not None


def run_preflight(
    config: TuneloopConfig, base: BaseModel, stored: Stored, draft: Draft
) -> Measured:
    """Do once everything that the training will do, with the same workers, and throw it away.

    Raises:
        UserError: As of the training; each problem says during what.
    """
    folder = draft.scratch.absolute() / "preflight"
    shutil.rmtree(folder, ignore_errors=True)
    output, progress = folder / "model", folder / "progress"
    for part in (output, progress):
        part.mkdir(parents=True)
    job = _job(config, base, draft, output, progress)
    try:
        trainer = _trainer(config, job, stored, fly, max_failures=0)
        outcome = _follow(trainer, Progress(progress / PROGRESS), max_failures=0)
        assert isinstance(outcome, Measured)
        return outcome
    except UserError as error:
        during = f"preflight, {stage_of(progress)}"
        raise type(error)(
            *(replace(p, where=f"{during}; {p.where}".rstrip("; ")) for p in error.problems)
        ) from error
    except Exception as error:
        error.add_note(f"during the preflight, {stage_of(progress)}")
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _job(
    config: TuneloopConfig, base: BaseModel, draft: Draft, output: Path, scratch: Path
) -> TrainingJob:
    return TrainingJob(
        base=base.path.absolute(),
        base_name=base.name,
        chat_template=config.model.chat_template,
        config=config.training,
        output=output,
        checkpoints=scratch / _RUN,
        progress=scratch,
        checkpoint_every_steps=config.resources.checkpoint_every_steps,
        identity=draft.fingerprint,
    )


def _trainer(
    config: TuneloopConfig, job: TrainingJob, stored: Stored, call: Any, max_failures: int
) -> Any:
    """Return the Ray Train trainer whose workers call `train_rows` or `fly`."""
    from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    resources = config.resources
    # Ray starts a process for the datasets of a training, which this one reads itself, and one
    # that outlives a killed controller to free its workers, which ends with a Ray of our own.
    idle = {"DatasetsCallback"}
    if not joins_cluster(resources):
        idle.add("PlacementGroupCleanerCallback")

    class Trainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()
            return [c for c in callbacks if type(c).__name__ not in idle]

    use_gpu = resources.gpus_per_worker > 0
    per_worker = {"CPU": 1.0} | ({"GPU": resources.gpus_per_worker} if use_gpu else {})
    settings = {
        "call": call,
        "job": job,
        "executions": {n: _execution(config, n) for n in resources.worker_counts},
        "stored": stored,
    }
    return Trainer(
        # As its train_loop_config Ray's controller would read them, and import for that everything
        # that only the workers need: most of its start.
        functools.partial(run_worker, settings),
        scaling_config=ScalingConfig(
            num_workers=resources.num_workers,
            use_gpu=use_gpu,
            resources_per_worker=per_worker,
            elastic_resize_monitor_interval_s=_RESIZE_EVERY_S,
        ),
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        run_config=RunConfig(
            name=_RUN,
            storage_path=str(job.progress),
            failure_config=FailureConfig(max_failures=max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )


def _execution(config: TuneloopConfig, num_workers: int) -> Execution:
    """Return how the training is executed on so many workers."""
    return Execution(
        world_size=num_workers,
        micro_batch_size=micro_batch_size(config, num_workers),
        grad_accum_steps=grad_accum_steps(config, num_workers),
        zero_stage=config.resources.zero_stage,
        use_gpu=config.resources.gpus_per_worker > 0,
        gradient_checkpointing=config.resources.gradient_checkpointing,
    )


def run_worker(settings: dict[str, Any]) -> TrainingResult | Measured | UserError:
    """Train in one Ray Train worker. A user's mistake is returned, as a retry would not mend it."""
    import ray
    import torch
    from ray import train as ray_train
    from ray.train.torch import get_device

    # Ray Train notes each report at INFO; the driver tells the progress.
    logging.getLogger().setLevel(logging.WARNING)
    context = ray_train.get_context()
    # An elastic training has another number of workers after a node is lost or has come.
    execution: Execution = settings["executions"][context.get_world_size()]
    node = next(
        node for node in ray.nodes() if node["NodeID"] == ray.get_runtime_context().get_node_id()
    )
    cores = min(len(os.sched_getaffinity(0)), int(node["Resources"].get("CPU", 1)))

    def report(metrics: dict[str, Any], folder: Path | None) -> None:
        kept = None if folder is None else ray_train.Checkpoint.from_directory(folder)
        ray_train.report(metrics, checkpoint=kept)

    worker = Worker(
        rank=context.get_world_rank(),
        execution=execution,
        device=get_device() if execution.use_gpu else torch.device("cpu"),
        # Ray sets OMP_NUM_THREADS=1; the workers of a node share its cores.
        num_threads=max(1, cores // context.get_local_world_size()),
        report=report,
    )
    stored: Stored = settings["stored"]
    call: Callable[..., TrainingResult | Measured] = settings["call"]
    try:
        validation = None if stored.validation is None else open_rows(stored.validation)
        return call(settings["job"], open_rows(stored.train), worker, validation)
    except UserError as error:
        return error
    except (MemoryError, RuntimeError) as error:
        if _lacks_memory(error):
            return _out_of_memory(str(error).splitlines()[0])
        raise


def _follow(trainer: Any, progress: Progress, max_failures: int) -> Any:
    """Run the trainer in a thread, tell its progress meanwhile, and return what rank 0 returned.

    In the main thread Ray would take over Ctrl-C and end the process with exit code 0. In a
    thread of its own it leaves Ctrl-C to the caller, who shuts Ray down; the checkpoints stay.
    """
    outcome: dict[str, Any] = {}

    def fit() -> None:
        try:
            outcome["value"] = trainer.fit().return_value
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    thread.start()
    notice = WaitingNotice()
    while thread.is_alive():
        thread.join(timeout=0.5)
        progress.tell()
        notice.tell(progress.position)
    progress.tell(final=True)
    error = outcome.get("error")
    if error is None:
        if isinstance(outcome["value"], UserError):
            raise outcome["value"]
        return outcome["value"]
    user_error = find_user_error(error)
    if user_error is not None:
        raise user_error from error
    refusal = _worker_death(error, max_failures)
    if refusal is not None:
        raise refusal from error
    raise error


class Progress:
    """Tells new lines of a training's progress file, at most one every few seconds.

    Args:
        path: The file, which need not exist yet; lines that are there already are not told.
        trackers: Get every line.
    """

    def __init__(self, path: Path, trackers: Trackers | None = None) -> None:
        self.path = path
        self.trackers = trackers
        self.position = path.stat().st_size if path.exists() else 0
        self.told = 0.0
        self.pending: dict[str, Any] | None = None

    def tell(self, final: bool = False) -> None:
        """Log the newest line, if there is one that has not been told; `final` does not wait."""
        # The directory goes when the model is published.
        with contextlib.suppress(FileNotFoundError), self.path.open("rb") as file:
            file.seek(self.position)
            for line in file:
                if line.endswith(b"\n"):
                    self.position += len(line)
                    self.pending = json.loads(line)
                    if self.trackers is not None:
                        self.trackers.log(self.pending)
        row = self.pending
        if row is None or (not final and time.monotonic() - self.told < _LOG_EVERY_S):
            return
        self.told, self.pending = time.monotonic(), None
        left = (row["num_steps"] - row["step"]) * row["elapsed_s"] / row["step"]
        logger.info(
            "step %d/%d  loss %.4f  learning rate %.2e  %.0f tokens/s  ETA %s",
            row["step"],
            row["num_steps"],
            row["loss"],
            row["learning_rate"],
            row["tokens_per_s"],
            duration(left),
        )


def _worker_death(error: BaseException, max_failures: int) -> ResourceError | None:
    """Return what to tell when workers were killed, mostly for memory; None for other errors."""
    import ray

    failures = list(getattr(error, "worker_failures", {}).values())
    starved = [f for f in failures if isinstance(f, ray.exceptions.OutOfMemoryError)]
    dead = [f for f in failures if isinstance(f, ray.exceptions.RayActorError)]
    if not starved and not dead:
        return None
    what = "a training worker ran out of memory"
    if not starved:
        what = "a training worker was killed, most often by the system for lack of memory"
    found = str((starved or dead)[0]).splitlines()[0]
    return _out_of_memory(f"{max_failures + 1} failures: {found}", what, max_failures)


def _lacks_memory(error: BaseException) -> bool:
    """Return whether PyTorch or Python could not get memory, on a GPU or on the CPU."""
    import torch

    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        sign in str(error) for sign in ("can't allocate memory", "CUDA out of memory")
    )


def _out_of_memory(
    got: str, what: str = "a training worker ran out of memory", max_failures: int = 0
) -> ResourceError:
    return ResourceError(
        Problem(
            what,
            where="resources",
            got=got,
            allowed=f"resources.max_failures {max_failures}" if max_failures else "",
            remedy="lower resources.micro_batch_size or data.max_seq_len, use training.method "
            "lora, or more memory; the same command goes on from the last checkpoint",
        )
    )


def _tidy(scratch: Path) -> None:
    """Remove what a killed run left half-done, so that it cannot stop the next one."""
    # Ray writes its list of checkpoints in place. One that cannot be read, or that another
    # version of Ray wrote, would end every later run; our own lists find the checkpoints.
    import ray

    for file in (scratch / _RUN).glob("*snapshot*.json"):
        try:
            known = json.loads(file.read_text(encoding="utf-8"))
            names = [result["checkpoint_dir_name"] for result in known["checkpoint_results"]]
            usable = known["ray_version"] == ray.__version__
            usable = usable and all((scratch / _RUN / name).is_dir() for name in names)
        except (ValueError, KeyError, TypeError):
            usable = False
        if not usable:
            logger.warning("removing the unreadable list of checkpoints %s", file)
            file.unlink()


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
