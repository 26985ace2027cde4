"""The training loop: what every worker runs, from the base model to the exported one."""

from __future__ import annotations

import json
import math
import resource
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from transformers.utils import logging as transformers_logging

from tuneloop.config import TrainingConfig
from tuneloop.errors import ModelError, Problem
from tuneloop.models.chat.renderer import Renderer
from tuneloop.models.export.exporter import Exporter, parity_prompt
from tuneloop.records import Parity
from tuneloop.training.batches import Schedule, micro_batches, split_batch
from tuneloop.training.checkpoint import (
    load_engine,
    newest_complete,
    refuse_damaged,
    refuse_save,
    save_engine,
    sync_copies,
)
from tuneloop.training.deepspeed_engine import (
    AttentionError,
    Execution,
    gathered,
    load_model,
    make_engine,
    num_weights,
    ready_to_generate,
)
from tuneloop.training.loss import loss_and_hits, row_layout
from tuneloop.training.methods import METHODS
from tuneloop.training.packed import forget_draws
from tuneloop.training.progress import (
    MAY_STOP_FILE,
    NOTE_FILE,
    PROGRESS_FILE,
    STOP_FILE,
    TrainingStopped,
)
from tuneloop.training.proof import packing_fault, padding_fault
from tuneloop.training.results import StepRecord, TrainingResult
from tuneloop.training.rows import Rows
from tuneloop.training.state import read_state
from tuneloop.training.validation import (
    best_folder,
    best_step,
    is_due,
    is_finished,
    measure,
    prune_best,
    sample_answers,
)

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from peft import PeftModel
    from transformers import PreTrainedModel

_UNFINISHED = "checkpoint-"
T = TypeVar("T")


@dataclass(frozen=True)
class TrainingJob:
    """What is trained and where it goes, the same for all workers.

    Args:
        base: Directory of the base model.
        base_name: The base model as the configuration names it.
        chat_template: `model.chat_template` of the configuration.
        output: Directory that becomes the model artifact.
        checkpoints: Directory below which all checkpoints are.
        progress: Directory for one JSON line per step, read by the driver, and for the best
            weights so far.
        checkpoint_every_steps: Optimizer steps between checkpoints.
        identity: Fingerprint of the model artifact; a checkpoint of another one is refused.
    """

    base: Path
    base_name: str
    chat_template: str
    config: TrainingConfig
    output: Path
    checkpoints: Path
    progress: Path
    checkpoint_every_steps: int
    identity: str = ""

    def schedule(self, rows: Rows) -> Schedule:
        """Return the order in which these rows are trained on."""
        return Schedule.of(self.config, len(rows))


@dataclass(frozen=True)
class Worker:
    """One of the processes that train together.

    Args:
        rank: From 0.
        device: Device of its share of the model.
        num_threads: CPU threads it may use.
        report: Takes metrics and, in the first worker, a checkpoint directory to keep; called by
            all workers at once.
    """

    rank: int
    execution: Execution
    device: torch.device
    num_threads: int
    report: Callable[[dict[str, float], Path | None], None]


def train_rows(
    job: TrainingJob, rows: Rows, worker: Worker, validation: Rows | None = None
) -> TrainingResult:
    """Train on all rows, export the model and return the log. All workers run it together.

    Args:
        validation: Rows of the validation split; None where the dataset has none.

    Raises:
        ModelError: The loss is not finite, the model mixes rows, an export differs from
            the live model, or the checkpoint is of another model.
        TrainingStopped: It was asked to stop before its end.
        ResourceError: A checkpoint cannot be written.
    """
    config, schedule = job.config, job.schedule(rows)
    started_engine = start_engine(job, rows, worker)
    engine, worker = started_engine.engine, started_engine.worker
    log = resume(engine, job, worker)
    engine.train()
    started = time.monotonic() - (log[-1]["elapsed_s"] if log else 0.0)
    may_stop = (job.progress / MAY_STOP_FILE).exists()
    while not is_finished(log, config, schedule):
        step = len(log)
        record = train_step(engine, rows, schedule, step, worker)
        log.append(record)
        if validation is not None and is_due(config, schedule, step + 1):
            _validate(engine, job, validation, worker, log)
        record["elapsed_s"] = round(time.monotonic() - started, 3)
        if worker.rank == 0:
            _write_progress(job.progress, record, schedule.num_steps)
        if may_stop and _is_asked_to_stop(job, worker):
            raise TrainingStopped(Problem("asked to stop", where=f"step {len(log)}"))
        if len(log) % job.checkpoint_every_steps == 0 or is_finished(log, config, schedule):
            keep_checkpoint(engine, job, worker, log)
    best = best_step(log)
    if config.keep == "best" and best is not None and best != len(log):
        refuse_damaged(best_folder(job.progress, best))
        read_state(engine, best_folder(job.progress, best), best)
    parity = export(engine, job, rows, worker)
    return TrainingResult(
        log,
        parity,
        started_engine.num_parameters,
        started_engine.num_trainable,
        started_engine.packing_fault,
    )


@dataclass(frozen=True)
class StartedEngine:
    """An engine at the first step.

    Args:
        worker: The worker, with what was found out about the model.
        num_parameters: All parameters of the model, adapters included.
        num_trainable: Parameters that are trained.
        packing_fault: Why rows are padded; empty where they are packed.
    """

    engine: DeepSpeedEngine
    worker: Worker
    num_parameters: int
    num_trainable: int
    packing_fault: str


def start_engine(job: TrainingJob, rows: Rows, worker: Worker) -> StartedEngine:
    """Load the base model into an engine, for packed rows where it keeps them apart.

    Raises:
        ModelError: The base cannot be loaded or run.
    """
    torch.set_num_threads(worker.num_threads)
    _silence_libraries()
    model, worker, fault = _load_for_rows(job, rows, worker)
    # Counted before ZeRO takes the parameters apart.
    num_all = sum(map(num_weights, model.parameters()))
    num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    engine = make_engine(model, job.config, worker.execution, job.schedule(rows).num_steps)
    return StartedEngine(engine, worker, num_all, num_trained, fault)


def _load_for_rows(
    job: TrainingJob, rows: Rows, worker: Worker
) -> tuple[PreTrainedModel | PeftModel, Worker, str]:
    """Return the model, the worker, and why rows are not packed; empty where they are."""
    execution, device = worker.execution, worker.device
    try:
        model = load_model(job.base, job.config, execution, device)
    except AttentionError as error:
        fault = str(error)
    else:
        fault = packing_fault(model, rows, device)
    fault = _first_workers(fault)
    if not fault:
        return model, worker, ""
    forget_draws()
    model = load_model(job.base, job.config, execution, device, own_attention=True)
    rows_alone = bool(_first_workers(padding_fault(model, rows, device)))
    if worker.rank == 0:
        (job.progress / NOTE_FILE).write_text(fault, encoding="utf-8")
    return model, replace(worker, execution=replace(execution, rows_alone=rows_alone)), fault


def _first_workers(text: str) -> str:
    """Return the first worker's text: every worker lays rows out as that one does."""
    texts = [text]
    dist.broadcast_object_list(texts, src=0)
    return texts[0]


def train_step(
    engine: DeepSpeedEngine, rows: Rows, schedule: Schedule, step: int, worker: Worker
) -> StepRecord:
    """Take one optimizer step and return its record for the trainer log.

    The loss is the mean over the target tokens of the global batch, however it is split.

    Args:
        step: From 0.

    Raises:
        ModelError: The loss or the gradient is not finite.
    """
    began = time.monotonic()
    execution = worker.execution
    # Dropout depends on the step, not on what ran before: a resumed run draws the same numbers.
    torch.manual_seed((schedule.seed * 1_000_003 + step) * 1_009 + worker.rank)
    batch = schedule.batch(step)
    bins = split_batch(
        batch,
        rows.lengths,
        execution.world_size * execution.grad_accum_steps,
        execution.micro_batch_size,
    )
    num_targets = int(rows.num_target_tokens[batch].sum())
    total = torch.zeros(2, dtype=torch.float64, device=worker.device)
    norm: torch.Tensor | float | None = None
    learning_rate = engine.get_lr()[0]
    taken: list[int] = []
    num_padding = 0
    lay_out = row_layout(engine.module, execution.rows_alone)
    for index, share in enumerate(micro_batches(bins, worker.rank, execution.world_size)):
        laid_out = lay_out(rows, share, worker.device)
        taken += laid_out.rows
        num_padding += laid_out.num_padding
        loss, hits = loss_and_hits(engine, laid_out)
        total += torch.stack([loss.detach().double(), hits.double()])
        # DeepSpeed averages gradients over workers; the loss is divided by all targets already.
        engine.backward(loss * (execution.world_size / max(1, num_targets)), scale_wrt_gas=False)
        if index == execution.grad_accum_steps - 1 and execution.zero_stage == 0:
            grads = [p.grad for p in engine.module.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(grads)
        engine.step()
    if norm is None:
        norm = engine.get_global_grad_norm()
    dist.all_reduce(total)
    everyone = _gather((taken, num_padding, _peak_memory(worker)), execution)
    loss_mean, accuracy = (total / max(1, num_targets)).tolist()
    grad_norm = float(norm) if norm is not None else math.nan
    if not math.isfinite(loss_mean) or not math.isfinite(grad_norm):
        raise ModelError.of(
            "the loss or its gradient is not finite",
            where=f"step {step + 1} of {schedule.num_steps}, rows "
            + ", ".join(rows.row_ids[row] for row in batch),
            got=f"loss {loss_mean}, gradient norm {grad_norm}",
            remedy="lower training.learning_rate; if it is the first step, check these rows",
        )
    num_tokens = int(rows.lengths[batch].sum())
    padding = sum(share[1] for share in everyone)
    return {
        "step": step + 1,
        "epoch": schedule.epoch(step) + 1,
        "loss": loss_mean,
        "token_accuracy": accuracy,
        "learning_rate": learning_rate,
        "grad_norm": grad_norm,
        "tokens_per_s": round(num_tokens / max(1e-9, time.monotonic() - began), 2),
        "num_workers": execution.world_size,
        "num_tokens": num_tokens,
        "num_target_tokens": num_targets,
        "padding_ratio": padding / (padding + num_tokens),
        "peak_memory_bytes": max(share[2] for share in everyone),
        # What the workers really took, in no particular order within the step.
        "rows": sorted(row for share in everyone for row in share[0]),
        "validation_loss": None,
        "validation_accuracy": None,
    }


def resume(engine: DeepSpeedEngine, job: TrainingJob, worker: Worker) -> list[StepRecord]:
    """Go on from the newest complete checkpoint, and return its log; empty without one."""
    # Rank 0 chooses for all: the others may not see its newest files yet.
    newest: list[Path | None] = [None]
    if worker.rank == 0:
        # What workers that were killed had not finished.
        for folder in job.progress.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(folder, ignore_errors=True)
        newest = [newest_complete(job.checkpoints)]
    dist.broadcast_object_list(newest, src=0)
    return [] if newest[0] is None else load_engine(engine, newest[0], job.identity)


def _is_asked_to_stop(job: TrainingJob, worker: Worker) -> bool:
    """Return whether the training is to end now. All workers call it together."""
    asked = [worker.rank == 0 and (job.progress / STOP_FILE).exists()]
    dist.broadcast_object_list(asked, src=0)
    return asked[0]


def _validate(
    engine: DeepSpeedEngine, job: TrainingJob, rows: Rows, worker: Worker, log: list[StepRecord]
) -> None:
    """Add loss and samples of the validation rows to the last record; keep the best weights."""
    record = log[-1]
    record["validation_loss"], record["validation_accuracy"] = measure(
        engine, rows, worker.execution, worker.device
    )
    record["samples"] = sample_answers(engine, exporter(job, worker), rows, worker.execution)
    if job.config.keep == "best" and best_step(log) == record["step"]:
        folder = best_folder(job.progress, record["step"])
        if worker.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        save_engine(engine, folder)


def keep_checkpoint(
    engine: DeepSpeedEngine, job: TrainingJob, worker: Worker, log: list[StepRecord]
) -> None:
    """Save a checkpoint and hand it over. All workers call it.

    Raises:
        ResourceError: It cannot be written; the ones before are untouched.
    """
    with tempfile.TemporaryDirectory(dir=job.progress, prefix=_UNFINISHED) as folder:
        save_engine(engine, Path(folder), log, job.identity)
        reason: list[str | None] = [None]
        try:
            kept = Path(folder) if worker.rank == 0 else None
            worker.report({"step": len(log), "loss": log[-1]["loss"]}, kept)
            if worker.rank == 0:
                sync_copies(job.checkpoints, len(log))
        except OSError as error:
            reason = [str(error)]
        # Only the first worker writes; the others have to stop with it.
        dist.broadcast_object_list(reason, src=0)
        if reason[0] is not None:
            raise refuse_save(job.checkpoints, reason[0])
    if worker.rank == 0:
        prune_best(job.progress, best_step(log))


def _gather(value: T, execution: Execution) -> list[T]:
    """Return every worker's value."""
    values = [value] * execution.world_size
    if execution.world_size > 1:
        dist.all_gather_object(values, value)
    return values


def _peak_memory(worker: Worker) -> int:
    """Return the most memory this worker has held so far, in bytes."""
    if worker.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(worker.device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def exporter(job: TrainingJob, worker: Worker) -> Exporter:
    """Return the exporter of the model artifact, which also answers the validation prompts."""
    renderer = Renderer.load(job.base, job.chat_template)
    return Exporter(
        job.base,
        job.base_name,
        renderer,
        job.output,
        worker.execution.dtype,
        four_bit=METHODS[job.config.method].four_bit,
    )


def export(engine: DeepSpeedEngine, job: TrainingJob, rows: Rows, worker: Worker) -> Parity:
    """Write the model artifact's weights and compare them with the live model."""
    writer, model = exporter(job, worker), engine.module
    engine.eval()
    # Under ZeRO-3 every worker has a part of each layer, so all of them answer together.
    prompts = [parity_prompt(*rows.row(row)) for row in range(min(len(rows), 4))]
    with ready_to_generate(engine, worker.execution):
        live = writer.answer(model, prompts)
    with gathered(METHODS[job.config.method].exported(model), worker.execution):
        if worker.rank == 0:
            writer.save(model)
    parity = [writer.check(live) if worker.rank == 0 else None]
    dist.broadcast_object_list(parity, src=0)
    assert parity[0] is not None
    return parity[0]


def _silence_libraries() -> None:
    """Keep progress bars and notes for library developers out of the log."""
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")


def _write_progress(folder: Path, record: StepRecord, num_steps: int) -> None:
    with (folder / PROGRESS_FILE).open("a", encoding="utf-8") as file:
        shown = {name: value for name, value in record.items() if name not in ("rows", "samples")}
        file.write(json.dumps(shown | {"num_steps": num_steps}) + "\n")
