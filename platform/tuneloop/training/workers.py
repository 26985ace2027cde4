"""The workers of one training: started, followed, and told about when they die."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

from tuneloop.artifacts import Draft
from tuneloop.config import TuneloopConfig, grad_accum_steps, micro_batch_size
from tuneloop.errors import Problem, ResourceError, UserError, find_user_error
from tuneloop.models.source import BaseModel
from tuneloop.training.batches import Rows
from tuneloop.training.engine import Execution
from tuneloop.training.loop import PROGRESS, TrainingJob, TrainingResult, Worker, train_rows
from tuneloop.training.trackers import Trackers, flat

logger = logging.getLogger("tuneloop.training")

_RUN = "checkpoints"
_LOG_EVERY_S = 5.0


def run_workers(
    config: TuneloopConfig, base: BaseModel, rows: Rows, validation: Rows, draft: Draft
) -> TrainingResult:
    """Run the workers to the end and return what rank 0 returned.

    Args:
        validation: Rows that are only looked at; may be none.
    """
    import ray
    from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    resources = config.resources
    execution = Execution(
        world_size=resources.num_workers,
        micro_batch_size=micro_batch_size(config),
        grad_accum_steps=grad_accum_steps(config),
        zero_stage=resources.zero_stage,
        use_gpu=resources.gpus_per_worker > 0,
        gradient_checkpointing=resources.gradient_checkpointing,
    )
    scratch = draft.scratch.absolute()
    _tidy(scratch)
    job = TrainingJob(
        base=base.path.absolute(),
        base_name=base.name,
        chat_template=config.model.chat_template,
        config=config.training,
        output=draft.path.absolute(),
        checkpoints=scratch / _RUN,
        progress=scratch,
        checkpoint_every_steps=resources.checkpoint_every_steps,
    )
    per_worker = {"CPU": 1.0}
    if execution.use_gpu:
        per_worker["GPU"] = resources.gpus_per_worker
    trainer = TorchTrainer(
        run_worker,
        # One copy of the rows in Ray's object store serves all workers of a node.
        train_loop_config={
            "job": job,
            "execution": execution,
            "rows": ray.put(rows),
            "validation": ray.put(validation),
        },
        scaling_config=ScalingConfig(
            num_workers=resources.num_workers,
            use_gpu=execution.use_gpu,
            resources_per_worker=per_worker,
        ),
        torch_config=TorchConfig(backend="nccl" if execution.use_gpu else "gloo"),
        run_config=RunConfig(
            name=_RUN,
            storage_path=str(scratch),
            failure_config=FailureConfig(max_failures=resources.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    trackers = Trackers(
        resources.trackers,
        config.name,
        flat(config.training.model_dump()),
        draft.path / "tensorboard",
    )
    try:
        outcome = _follow(trainer, Progress(scratch / PROGRESS, trackers), resources.max_failures)
    finally:
        trackers.close()
    if isinstance(outcome, UserError):
        raise outcome
    assert isinstance(outcome, TrainingResult)
    return outcome


def run_worker(settings: dict[str, Any]) -> TrainingResult | UserError:
    """Train in one Ray Train worker. A user's mistake is returned, as a retry would not mend it."""
    import ray
    import torch
    from ray import train as ray_train
    from ray.train.torch import get_device

    # Ray Train notes each report at INFO; the driver tells the progress.
    logging.getLogger().setLevel(logging.WARNING)
    context = ray_train.get_context()
    execution: Execution = settings["execution"]
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
    try:
        rows, validation = ray.get([settings["rows"], settings["validation"]])
        return train_rows(settings["job"], rows, worker, validation if len(validation) else None)
    except UserError as error:
        return error


def _follow(trainer: Any, progress: Progress, max_failures: int) -> Any:
    """Run the trainer in a thread and tell its progress meanwhile.

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
    while thread.is_alive():
        thread.join(timeout=0.5)
        progress.tell()
    progress.tell(final=True)
    error = outcome.get("error")
    if error is None:
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
    return ResourceError(
        Problem(
            "a training worker ran out of memory"
            if starved
            else "a training worker was killed, most often by the system for lack of memory",
            where="resources",
            got=f"{max_failures + 1} failures: " + str((starved or dead)[0]).splitlines()[0],
            allowed=f"resources.max_failures {max_failures}",
            remedy="lower resources.micro_batch_size or data.max_seq_len, use training.method "
            "lora, or more memory; the same command goes on from the last checkpoint",
        )
    )


def _tidy(scratch: Path) -> None:
    """Remove what a killed run left half-done, so that it cannot stop the next one."""
    for folder in scratch.glob("checkpoint-*"):
        shutil.rmtree(folder, ignore_errors=True)
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
