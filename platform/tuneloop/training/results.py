"""What the workers give back.

Ray's controller passes it on, and imports the module it is defined in to do so. This one is light;
`loop.py` would cost it six CPU seconds of imports between the last step and the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NotRequired, TypedDict

from tuneloop.records import Parity


class StepRecord(TypedDict):
    """One optimizer step in the trainer log; `trainer_log.parquet` has all but `samples`.

    Attributes:
        step: From 1.
        epoch: From 1.
        loss: Mean cross-entropy over the target tokens of the global batch, in nats.
        token_accuracy: Share of those targets that the model holds most likely.
        learning_rate: Learning rate of the step.
        grad_norm: Norm of the gradient before it is clipped.
        tokens_per_s: All workers together.
        num_workers: Workers that took part.
        num_tokens: Tokens of the global batch.
        num_target_tokens: Targets of the global batch.
        padding_ratio: Share of the computed tokens that are padding.
        peak_memory_bytes: Most memory so far of the worker that held the most.
        rows: Row numbers of the global batch, sorted.
        validation_loss: Mean cross-entropy over the validation targets; None: not measured.
        validation_accuracy: Accuracy over the validation targets; None: not measured.
        elapsed_s: Seconds since the training began, interruptions left out.
        samples: What the model answered to validation prompts, where it was measured.
    """

    step: int
    epoch: int
    loss: float
    token_accuracy: float
    learning_rate: float
    grad_norm: float
    tokens_per_s: float
    num_workers: int
    num_tokens: int
    num_target_tokens: int
    padding_ratio: float
    peak_memory_bytes: int
    rows: list[int]
    validation_loss: float | None
    validation_accuracy: float | None
    elapsed_s: NotRequired[float]
    samples: NotRequired[list[dict[str, str]]]


@dataclass(frozen=True)
class TrainingResult:
    """What a training left behind, beside the files.

    Args:
        log: One record per optimizer step.
        parity: Live model against reloaded exports.
        num_parameters: Parameters of the whole model, adapters included.
        num_trainable: Parameters that were trained.
        packing_fault: Why rows were padded instead of packed; empty where they were packed.
    """

    log: list[StepRecord]
    parity: Parity
    num_parameters: int
    num_trainable: int
    packing_fault: str = ""


@dataclass(frozen=True)
class DryRunResult:
    """What a dry run measured.

    Args:
        tokens_per_s: All workers together, in a step that was not the first.
        peak_memory_bytes: Most memory of the worker that held the most.
        checkpoint_s: Seconds to save a checkpoint.
        export_s: Seconds to export and check the model.
        num_workers: Workers that took part.
        wall_s: Seconds of the whole dry run in the workers, without starting them.
    """

    tokens_per_s: float
    peak_memory_bytes: int
    checkpoint_s: float
    export_s: float
    num_workers: int
    wall_s: float


def last_steps(log: Sequence[StepRecord]) -> Sequence[StepRecord]:
    """Return the last tenth of the steps: one batch alone says little about the loss."""
    return log[-max(1, len(log) // 10) :]


def mean_loss(steps: Sequence[StepRecord]) -> float:
    """Return the mean loss of some steps, in nats."""
    return sum(row["loss"] for row in steps) / len(steps)
