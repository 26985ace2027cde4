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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tuneloop.config import TrainingConfig
from tuneloop.errors import ModelError, Problem
from tuneloop.models.chat.renderer import Renderer
from tuneloop.models.export.exporter import Exporter, parity_prompts
from tuneloop.records import Parity
from tuneloop.training.batches import Schedule, micro_batches, split_batch
from tuneloop.training.checkpoint import load_engine, newest_whole, refuse_save, save_engine
from tuneloop.training.engine import Execution, answering, gathered, load_model, make_engine
from tuneloop.training.packed import can_share, check_packing, loss_and_hits, pack
from tuneloop.training.results import TrainingResult
from tuneloop.training.rows import Rows
from tuneloop.training.state import read_state
from tuneloop.training.validation import (
    best_folder,
    best_step,
    forget_all_but,
    is_due,
    is_finished,
    measure,
    sample_answers,
)

PROGRESS = "progress.jsonl"
_UNFINISHED = "checkpoint-"


@dataclass(frozen=True)
class TrainingJob:
    """Everything that is trained, the same for all workers.

    Args:
        base: Directory of the base model.
        base_name: As the user wrote it.
        chat_template: `model.chat_template` of the configuration.
        output: Directory that becomes the model artifact.
        checkpoints: Directory whose subdirectories are the checkpoints.
        progress: Directory for one JSON line per step, read by the driver, and for the best
            weights so far.
        checkpoint_every_steps: Optimizer steps between checkpoints.
        identity: Fingerprint of the result; a checkpoint of another one is refused.
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
        config = self.config
        return Schedule(
            len(rows), config.global_batch_size, config.num_epochs, config.max_steps, config.seed
        )


@dataclass(frozen=True)
class Worker:
    """One of the processes that train together.

    Args:
        rank: From 0.
        device: Where its share of the model lives.
        num_threads: CPU threads it may use.
        report: Takes metrics and, in the first worker, a checkpoint directory to keep; called by
            all workers at once.
    """

    rank: int
    execution: Execution
    device: torch.device
    num_threads: int
    report: Callable[[dict[str, Any], Path | None], None]


def train_rows(
    job: TrainingJob, rows: Rows, worker: Worker, validation: Rows | None = None
) -> TrainingResult:
    """Train on all rows, export the model and return the log. All workers run it together.

    Args:
        validation: Rows that are only looked at; None where the dataset has none.

    Raises:
        ModelError: The loss is not finite, the model mixes packed rows, an export differs from
            the live model, or the checkpoint is of another model.
        ResourceError: A checkpoint cannot be written.
    """
    config, schedule = job.config, job.schedule(rows)
    engine, sizes = start_engine(job, rows, worker)
    log = resume(engine, job, worker)
    engine.train()
    started = time.monotonic() - (log[-1]["elapsed_s"] if log else 0.0)
    while not is_finished(log, config, schedule):
        step = len(log)
        record = train_step(engine, rows, schedule, step, worker)
        log.append(record)
        if validation is not None and is_due(config, schedule, step + 1):
            _look(engine, job, validation, worker, log)
        record["elapsed_s"] = round(time.monotonic() - started, 3)
        if worker.rank == 0:
            _write_progress(job.progress, record, schedule.num_steps)
        if len(log) % job.checkpoint_every_steps == 0 or is_finished(log, config, schedule):
            keep_checkpoint(engine, job, worker, log)
    best = best_step(log)
    if config.keep == "best" and best is not None and best != len(log):
        read_state(engine, best_folder(job.progress, best), best)
    parity = export(engine, job, rows, worker)
    return TrainingResult(log, parity, *sizes)


def start_engine(job: TrainingJob, rows: Rows, worker: Worker) -> tuple[Any, tuple[int, int]]:
    """Load the base model into an engine; return it and the numbers of all and trained parameters.

    Raises:
        ModelError: The model mixes packed rows.
    """
    torch.set_num_threads(worker.num_threads)
    _quieten()
    model = load_model(job.base, job.config, worker.execution, worker.device)
    check_packing(model, rows, worker.device)
    # Counted before ZeRO takes the parameters apart.
    num_all = sum(_num_weights(p) for p in model.parameters())
    num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    engine = make_engine(model, job.config, worker.execution, job.schedule(rows).num_steps)
    return engine, (num_all, num_trained)


def _num_weights(parameter: torch.Tensor) -> int:
    """Return how many weights a parameter holds; with bitsandbytes two of them share a byte."""
    quantized = getattr(parameter, "quant_state", None)
    return parameter.numel() if quantized is None else quantized.shape.numel()


def train_step(
    engine: Any, rows: Rows, schedule: Schedule, step: int, worker: Worker
) -> dict[str, Any]:
    """Take one optimizer step and return its row of the trainer log.

    The loss is the mean over the target tokens of the global batch, whatever the split.

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
    seen: list[int] = []
    num_padding = 0
    share_prefix = can_share(engine.module)
    for index, share in enumerate(micro_batches(bins, worker.rank, execution.world_size)):
        packed = pack(rows, share, worker.device, share_prefix)
        seen += packed.rows
        num_padding += 0 if packed.rows else packed.input_ids.numel()
        loss, hits = loss_and_hits(engine, packed)
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
    everyone = _gather((seen, num_padding, _peak_memory(worker)), execution)
    loss_mean, accuracy = (total / max(1, num_targets)).tolist()
    grad_norm = float(norm) if norm is not None else math.nan
    if not math.isfinite(loss_mean) or not math.isfinite(grad_norm):
        raise ModelError(
            Problem(
                "the loss or its gradient is not finite",
                where=f"step {step + 1} of {schedule.num_steps}, rows "
                + ", ".join(rows.row_ids[row] for row in batch),
                got=f"loss {loss_mean}, gradient norm {grad_norm}",
                remedy="lower training.learning_rate; if it is the first step, look at these rows",
            )
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


def resume(engine: Any, job: TrainingJob, worker: Worker) -> list[dict[str, Any]]:
    """Return the log of the newest whole checkpoint, which rank 0 chooses; empty without one."""
    choice: list[Path | None] = [None]
    if worker.rank == 0:
        # What workers that were killed had not finished.
        for folder in job.progress.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(folder, ignore_errors=True)
        choice = [newest_whole(job.checkpoints)]
    dist.broadcast_object_list(choice, src=0)
    return [] if choice[0] is None else load_engine(engine, choice[0], job.identity)


def _look(
    engine: Any, job: TrainingJob, rows: Rows, worker: Worker, log: list[dict[str, Any]]
) -> None:
    """Measure the validation rows, note it in the log's last row, and keep the best weights."""
    record = log[-1]
    record |= measure(engine, rows, worker.execution, worker.device)
    record["samples"] = sample_answers(engine, exporter(job, worker), rows, worker.execution)
    if job.config.keep == "best" and best_step(log) == record["step"]:
        folder = best_folder(job.progress, record["step"])
        if worker.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        save_engine(engine, folder)


def keep_checkpoint(
    engine: Any, job: TrainingJob, worker: Worker, log: list[dict[str, Any]]
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
        except OSError as error:
            reason = [str(error)]
        # Only the first worker writes; the others have to stop with it.
        dist.broadcast_object_list(reason, src=0)
        if reason[0] is not None:
            raise refuse_save(job.checkpoints, reason[0])
    if worker.rank == 0:
        forget_all_but(job.progress, best_step(log))


def _gather(mine: Any, execution: Execution) -> list[Any]:
    """Return every worker's value."""
    if execution.world_size == 1:
        return [mine]
    everyone: list[Any] = [None] * execution.world_size
    dist.all_gather_object(everyone, mine)
    return everyone


def _peak_memory(worker: Worker) -> int:
    """Return the most memory this worker has held so far, in bytes."""
    if worker.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(worker.device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def exporter(job: TrainingJob, worker: Worker) -> Exporter:
    """Return what writes the model artifact's weights, and what samples are answered with."""
    renderer = Renderer.load(job.base, job.chat_template)
    return Exporter(
        job.base,
        job.base_name,
        renderer,
        job.output,
        worker.execution.dtype,
        four_bit=job.config.method == "qlora",
    )


def export(engine: Any, job: TrainingJob, rows: Rows, worker: Worker) -> Parity:
    """Write the model artifact's weights and compare them with the live model."""
    writer, model = exporter(job, worker), engine.module
    engine.eval()
    # Under ZeRO-3 every worker has a part of each layer, so all of them answer together.
    prompts = parity_prompts([rows.row(row) for row in range(min(len(rows), 4))])
    with answering(engine, worker.execution):
        live = writer.answer(model, prompts)
    wanted = [p for p in model.parameters() if p.requires_grad]
    if job.config.method == "full":
        wanted = list(model.parameters())
    with gathered(wanted, worker.execution):
        if worker.rank == 0:
            writer.save(model)
    parity = writer.check(live) if worker.rank == 0 else None
    outcome = [parity]
    dist.broadcast_object_list(outcome, src=0)
    assert outcome[0] is not None
    return outcome[0]


def _quieten() -> None:
    """Keep bars and notes for library developers out of the log."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")


def _write_progress(folder: Path, record: dict[str, Any], num_steps: int) -> None:
    with (folder / PROGRESS).open("a", encoding="utf-8") as file:
        shown = {name: value for name, value in record.items() if name not in ("rows", "samples")}
        file.write(json.dumps(shown | {"num_steps": num_steps}) + "\n")
