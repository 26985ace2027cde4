"""The validation split during training: loss, sample answers, when to stop, which weights to keep.

Everything that is decided here is a function of the training log, so a training that was cut
off and resumed decides the same.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from tuneloop.config import TrainingConfig
from tuneloop.models.export.exporter import Exporter, parity_prompt
from tuneloop.training.batches import Schedule, micro_batches, split_batch
from tuneloop.training.deepspeed_engine import Execution, ready_to_generate
from tuneloop.training.loss import loss_and_hits, row_layout
from tuneloop.training.results import StepRecord
from tuneloop.training.rows import Rows

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

_NUM_SAMPLES = 3
_SAMPLE_TOKENS = 48
_BEST = "best-"


def is_due(config: TrainingConfig, schedule: Schedule, step: int) -> bool:
    """Return whether the validation loss is measured after `step` finished steps."""
    every = config.eval_every_steps or schedule.steps_per_epoch
    return step % every == 0 or step == schedule.num_steps


def is_finished(log: Sequence[StepRecord], config: TrainingConfig, schedule: Schedule) -> bool:
    """Return whether all steps are done, or the validation loss stopped falling."""
    if len(log) >= schedule.num_steps:
        return True
    best = best_step(log)
    if config.early_stopping_patience is None or best is None:
        return False
    since = sum(row["validation_loss"] is not None for row in log[best:])
    return since >= config.early_stopping_patience


def best_step(log: Sequence[StepRecord]) -> int | None:
    """Return the step, from 1, with the least validation loss, the earliest of equal ones.

    A loss that is no number is never the least: compared with one, no other is smaller.
    """
    losses = [(row["validation_loss"], row["step"]) for row in log]
    measured = [(loss, step) for loss, step in losses if loss is not None and math.isfinite(loss)]
    return min(measured)[1] if measured else None


def measure(
    engine: DeepSpeedEngine, rows: Rows, execution: Execution, device: torch.device
) -> tuple[float, float]:
    """Return loss and accuracy over the targets of all rows. All workers call it together.

    Returns:
        The mean cross-entropy in nats, and the share of targets that the model holds most likely.
    """
    workers, size = execution.world_size, execution.micro_batch_size
    num_bins = workers * math.ceil(len(rows) / (workers * size))
    bins = split_batch(np.arange(len(rows)), rows.lengths, num_bins, size)
    total = torch.zeros(2, dtype=torch.float64, device=device)
    engine.eval()
    lay_out = row_layout(engine.module, execution.rows_alone)
    with torch.no_grad():
        # The same number of passes in every worker: under ZeRO-3 each of them is collective.
        for share in micro_batches(bins, dist.get_rank(), workers):
            loss, hits = loss_and_hits(engine, lay_out(rows, share, device))
            total += torch.stack([loss.double(), hits.double()])
    engine.train()
    dist.all_reduce(total)
    num_targets = max(1, int(rows.num_target_tokens.sum()))
    loss_mean, accuracy = (total / num_targets).tolist()
    return loss_mean, accuracy


def sample_answers(
    engine: DeepSpeedEngine, exporter: Exporter, rows: Rows, execution: Execution
) -> list[dict[str, str]]:
    """Return what the model answers now to the first validation prompts. All workers call it.

    Returns:
        `row_id`, `prompt`, `reference` and `completion` as text.
    """
    shown = [rows.row(index) for index in range(min(len(rows), _NUM_SAMPLES))]
    prompts = [parity_prompt(ids, mask) for ids, mask in shown]
    engine.eval()
    with ready_to_generate(engine, execution):
        answers = exporter.answer(engine.module, prompts, _SAMPLE_TOKENS)
    engine.train()
    decode = exporter.renderer.tokenizer.decode
    return [
        {
            "row_id": rows.row_ids[index],
            "prompt": decode(prompt),
            "reference": decode(ids[mask.astype(bool)].tolist()),
            "completion": decode(answer.ids),
        }
        for index, (prompt, (ids, mask), answer) in enumerate(
            zip(prompts, shown, answers, strict=True)
        )
    ]


def best_folder(scratch: Path, step: int) -> Path:
    """Return where the weights of a step are kept while they are the best ones."""
    return scratch / f"{_BEST}{step}"


def prune_best(scratch: Path, step: int | None) -> None:
    """Remove kept weights that are not those of the best step.

    Only after a checkpoint whose log says so: one before it would look for the older ones.
    """
    for folder in scratch.glob(f"{_BEST}*"):
        if step is None or folder != best_folder(scratch, step):
            shutil.rmtree(folder, ignore_errors=True)
