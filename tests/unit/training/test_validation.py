"""What the validation losses of a log decide."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest

from tuneloop.config import TrainingConfig
from tuneloop.records import Parity
from tuneloop.training.batches import Schedule
from tuneloop.training.make import metrics_of
from tuneloop.training.results import StepRecord, TrainingResult
from tuneloop.training.validation import best_step, is_finished


def log_of(*losses: float | None) -> list[StepRecord]:
    rows: list[dict[str, Any]] = [
        {"step": step, "validation_loss": loss} for step, loss in enumerate(losses, 1)
    ]
    return cast(list[StepRecord], rows)


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ((), None),
        ((None, None), None),
        ((None, 2.0, None, 1.5, 1.5), 4),
        ((math.nan, 2.0, 3.0), 2),
        ((2.0, math.nan, 1.0), 3),
        ((math.nan, math.inf), None),
    ],
)
def test_the_best_step_has_the_least_loss_that_is_a_number(
    losses: tuple[float | None, ...], best: int | None
) -> None:
    assert best_step(log_of(*losses)) == best


def test_training_stops_after_so_many_losses_that_are_no_lower() -> None:
    config, schedule = TrainingConfig(early_stopping_patience=2), Schedule(80, 8, 1, None, 0)
    assert not is_finished(log_of(2.0, None, 3.0), config, schedule)
    assert is_finished(log_of(2.0, None, 3.0, math.nan), config, schedule)
    assert not is_finished(log_of(math.nan, 2.0, 3.0), config, schedule)
    assert is_finished(log_of(*[1.0] * 10), TrainingConfig(), schedule)


@pytest.mark.parametrize(
    ("losses", "keeps_best", "loss"),
    [
        ((2.0, 1.0, 3.0), False, 3.0),
        ((2.0, 1.0, 3.0), True, 1.0),
        ((2.0, 1.0), False, 1.0),
        ((2.0, math.inf), False, None),
        ((None, None), True, None),
    ],
)
def test_the_validation_loss_of_a_model_is_that_of_its_weights(
    losses: tuple[float | None, ...], keeps_best: bool, loss: float | None
) -> None:
    row = {
        "loss": 1.0, "num_tokens": 8, "elapsed_s": 1.0, "peak_memory_bytes": 1,
        "validation_accuracy": 0.5,
    }  # fmt: skip
    log = cast(list[StepRecord], [row | dict(one) for one in log_of(*losses)])
    parity = Parity(True, 1, 1, 0.0, True, 0, 1e-3, {})
    metrics = metrics_of(TrainingResult(log, parity, 1, 1), keeps_best)
    assert metrics.get("validation_loss") == loss
    assert metrics.get("best_step") == best_step(log)
