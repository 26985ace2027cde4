"""The training loop: what every worker runs, from the base model to the exported one."""

from __future__ import annotations

import json
import math
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
from tuneloop.models.chat import Renderer
from tuneloop.models.export import Exporter, parity_prompts
from tuneloop.records import Parity
from tuneloop.training.batches import Rows, Schedule, micro_batches, split_batch
from tuneloop.training.checkpoint import load_engine, newest_whole, save_engine
from tuneloop.training.engine import Execution, gathered, load_model, make_engine
from tuneloop.training.packed import loss_sum, pack

PROGRESS = "progress.jsonl"
_CHECK_ROWS = 2
_CHECK_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class TrainingJob:
    """Everything that is trained, the same for all workers.

    Args:
        base: Directory of the base model.
        base_name: As the user wrote it.
        chat_template: `model.chat_template` of the configuration.
        output: Directory that becomes the model artifact.
        checkpoints: Directory whose subdirectories are the checkpoints.
        progress: Directory for one JSON line per step, read by the driver.
        checkpoint_every_steps: Optimizer steps between checkpoints.
    """

    base: Path
    base_name: str
    chat_template: str
    config: TrainingConfig
    output: Path
    checkpoints: Path
    progress: Path
    checkpoint_every_steps: int


@dataclass(frozen=True)
class Worker:
    """One of the processes that train together.

    Args:
        rank: From 0.
        device: Where its share of the model lives.
        num_threads: CPU threads it may use.
        report: Takes metrics and a checkpoint directory to keep; called by all workers at once.
    """

    rank: int
    execution: Execution
    device: torch.device
    num_threads: int
    report: Callable[[dict[str, Any], Path], None]


@dataclass(frozen=True)
class TrainingResult:
    """What a training left behind, beside the files.

    Args:
        log: One row per optimizer step.
        parity: Live model against reloaded exports.
        num_parameters: Of the whole model.
        num_trainable: Of those, how many were trained.
    """

    log: list[dict[str, Any]]
    parity: Parity
    num_parameters: int
    num_trainable: int


def train_rows(job: TrainingJob, rows: Rows, worker: Worker) -> TrainingResult:
    """Train on all rows, export the model and return the log. All workers run it together.

    Raises:
        ModelError: The loss is not finite, the model mixes packed rows, or an export differs
            from the live model.
        ResourceError: The checkpoint belongs to another arrangement of workers.
    """
    config, execution = job.config, worker.execution
    torch.set_num_threads(worker.num_threads)
    _quieten()
    schedule = Schedule(
        len(rows), config.global_batch_size, config.num_epochs, config.max_steps, config.seed
    )
    model = load_model(job.base, config, execution).to(worker.device)
    check_packing(model, rows, worker.device)
    sizes = [p.numel() for p in model.parameters()]
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    engine = make_engine(model, config, execution, schedule.num_steps)
    step, log = _resume(engine, job, worker)
    engine.train()
    started = time.monotonic() - (log[-1]["elapsed_s"] if log else 0.0)
    while step < schedule.num_steps:
        record = train_step(engine, rows, schedule, step, worker)
        record["elapsed_s"] = round(time.monotonic() - started, 3)
        log.append(record)
        step += 1
        if worker.rank == 0:
            _write_progress(job.progress, record, schedule.num_steps)
        if step % job.checkpoint_every_steps == 0 or step == schedule.num_steps:
            with tempfile.TemporaryDirectory(dir=job.progress, prefix="checkpoint-") as folder:
                save_engine(engine, Path(folder), step, log, execution)
                worker.report({"step": step, "loss": record["loss"]}, Path(folder))
    parity = _export(engine, job, rows, worker)
    return TrainingResult(log, parity, sum(sizes), sum(trained))


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
    total = torch.zeros((), device=worker.device)
    norm: torch.Tensor | float | None = None
    learning_rate = engine.get_lr()[0]
    for index, share in enumerate(micro_batches(bins, worker.rank, execution.world_size)):
        loss = loss_sum(engine, pack(rows, share, worker.device))
        total += loss.detach()
        # DeepSpeed averages gradients over workers; the loss is divided by all targets already.
        engine.backward(loss * (execution.world_size / max(1, num_targets)), scale_wrt_gas=False)
        if index == execution.grad_accum_steps - 1 and execution.zero_stage == 0:
            grads = [p.grad for p in engine.module.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(grads)
        engine.step()
    if norm is None:
        norm = engine.get_global_grad_norm()
    dist.all_reduce(total)
    loss_mean = float(total) / max(1, num_targets)
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
    return {
        "step": step + 1,
        "epoch": schedule.epoch(step) + 1,
        "loss": loss_mean,
        "learning_rate": learning_rate,
        "grad_norm": grad_norm,
        "tokens_per_s": round(num_tokens / max(1e-9, time.monotonic() - began), 2),
        "num_tokens": num_tokens,
        "num_target_tokens": num_targets,
    }


def check_packing(model: Any, rows: Rows, device: torch.device) -> None:
    """Compare packed rows with the same rows one by one in the model's own attention.

    A model whose layers carry state from one row to the next, or that ignores positions, would
    be trained on mixed rows without any other sign of it.

    Raises:
        ModelError: The losses differ.
    """
    shortest = sorted(range(len(rows)), key=lambda row: int(rows.lengths[row]))
    chosen = [row for row in shortest if rows.num_target_tokens[row]][:_CHECK_ROWS]
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    attention = plain.config._attn_implementation
    model.eval()
    with torch.no_grad():
        packed = float(loss_sum(model, pack(rows, chosen, device)))
        plain.set_attn_implementation("sdpa" if plain._supports_sdpa else "eager")
        alone = 0.0
        for row in chosen:
            batch = pack(rows, [row], device)
            documents = batch.input_ids.split(batch.lengths, dim=1)
            logits = torch.cat(
                [model(input_ids=document, use_cache=False).logits[0] for document in documents]
            )[batch.predict_at]
            alone += float(
                torch.nn.functional.cross_entropy(logits.float(), batch.targets, reduction="sum")
            )
    plain.set_attn_implementation(attention)
    tolerance = _CHECK_TOLERANCE[plain.dtype]
    if abs(packed - alone) > tolerance * max(1.0, abs(alone)):
        raise ModelError(
            Problem(
                "the model does not keep packed rows apart",
                where=f"rows {', '.join(rows.row_ids[row] for row in chosen)}",
                got=f"loss {packed:.5f} packed, {alone:.5f} one by one",
                remedy="use a model with plain attention layers (Llama, Qwen, Gemma, GPT-NeoX)",
            )
        )


def _resume(engine: Any, job: TrainingJob, worker: Worker) -> tuple[int, list[dict[str, Any]]]:
    """Return finished steps and log of the newest whole checkpoint, which rank 0 chooses."""
    choice = [newest_whole(job.checkpoints) if worker.rank == 0 else None]
    dist.broadcast_object_list(choice, src=0)
    if choice[0] is None:
        return 0, []
    return load_engine(engine, choice[0], worker.execution)


def _export(engine: Any, job: TrainingJob, rows: Rows, worker: Worker) -> Parity:
    """Write the model artifact's weights and compare them with the live model."""
    renderer = Renderer.load(job.base, job.chat_template)
    exporter = Exporter(job.base, job.base_name, renderer, job.output, worker.execution.dtype)
    model = engine.module
    engine.eval()
    # Under ZeRO-3 every worker has a part of each layer, so all of them answer together.
    prompts = parity_prompts([rows.row(row) for row in range(min(len(rows), 4))])
    live = exporter.answer(model, prompts)
    wanted = [p for p in model.parameters() if p.requires_grad]
    if job.config.method == "full":
        wanted = list(model.parameters())
    with gathered(wanted, worker.execution):
        if worker.rank == 0:
            exporter.save(model)
    parity = exporter.check(live) if worker.rank == 0 else None
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
        file.write(json.dumps(record | {"num_steps": num_steps}) + "\n")
