"""Will it fit: one verdict on a training, before the data is prepared and before it starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tuneloop.artifacts import Artifact
from tuneloop.config import TuneloopConfig
from tuneloop.errors import Problem, UserError
from tuneloop.models.bases.source import BaseModel
from tuneloop.training.fit import refusals
from tuneloop.training.fit.estimate import (
    ResourceEstimate,
    RowTotals,
    Workload,
    estimate,
    workload_of_rows,
    workload_of_totals,
)
from tuneloop.training.fit.shape import ModelShape, model_shape
from tuneloop.training.rows import Rows


@dataclass(frozen=True)
class PreparedRows:
    """A dataset that is to be trained on now, on the running Ray.

    Args:
        train: Rows of the train split.
        validation: Rows of the validation split; may be empty.
        scratch: Directory for checkpoints.
    """

    dataset: Artifact
    train: Rows
    validation: Rows
    scratch: Path


class Prediction(NamedTuple):
    """How much a training computes, and what it needs for that.

    Attributes:
        estimate: None where it cannot be made.
        num_parameters: Of the base model.
        unknown: Why it cannot; empty where it can.
    """

    workload: Workload
    estimate: ResourceEstimate | None
    num_parameters: int
    unknown: str = ""


@dataclass(frozen=True)
class Fit:
    """What a training needs, and what stands in its way.

    Args:
        prediction: None where nothing is known of the rows, or where they cannot be trained on.
        errors: Everything that would stop the training; empty when it can start.
    """

    prediction: Prediction | None
    errors: list[UserError]

    @property
    def problems(self) -> list[Problem]:
        """Everything that would stop the training, in one list."""
        return [problem for error in self.errors for problem in error.problems]

    def require(self) -> Prediction:
        """Return the prediction; raise one error, of the first one's kind, with all problems."""
        if self.errors:
            raise type(self.errors[0])(*self.problems)
        assert self.prediction is not None
        return self.prediction


def assess(config: TuneloopConfig, base: BaseModel, rows: RowTotals | PreparedRows | None) -> Fit:
    """Return whether a training fits.

    Args:
        base: The model to train; its weights are not loaded.
        rows: The rows themselves, their totals, or None. With the rows themselves the
            disk and the running Ray are judged as well.

    Raises:
        ModelError: The base model cannot be trained, so nothing else can be judged.
    """
    if rows is None:
        return Fit(None, _errors(lambda: refusals.refuse_unsupported(config)))
    shape = model_shape(base, config.training, config.resources.gpus_per_worker > 0)
    if isinstance(rows, RowTotals):
        predicted = _predict(config, shape, workload_of_totals(config, shape, rows))
        errors = _errors(
            lambda: refusals.refuse_unsupported(config),
            lambda: refusals.refuse_long_totals(rows, shape),
            lambda: refusals.refuse_small_memory(predicted.estimate),
        )
        return Fit(predicted, errors)
    dataset = rows.dataset
    errors = _errors(
        lambda: refusals.refuse_other_renderer(config, base, dataset),
        lambda: refusals.refuse_unsupported(config),
        lambda: refusals.refuse_without_validation(config, rows.validation, dataset),
        lambda: refusals.refuse_untrainable_rows(rows.train, dataset),
        lambda: refusals.refuse_unreadable_rows(rows.train, shape, dataset.ref),
        lambda: refusals.refuse_unreadable_rows(
            rows.validation, shape, f"{dataset.ref}, validation"
        ),
    )
    if errors:
        return Fit(None, errors)
    predicted = _predict(
        config, shape, workload_of_rows(config, shape, rows.train, rows.validation)
    )
    errors = _errors(
        lambda: refusals.refuse_small_cluster(config.resources),
        lambda: refusals.refuse_small_disk(predicted.estimate, rows.scratch),
        lambda: refusals.refuse_small_memory(predicted.estimate),
    )
    return Fit(predicted, errors)


def _predict(config: TuneloopConfig, shape: ModelShape, work: Workload) -> Prediction:
    if shape.unknown:
        return Prediction(work, None, shape.num_parameters, shape.unknown)
    return Prediction(work, estimate(config, shape, work), shape.num_parameters)


def _errors(*checks: Callable[[], None]) -> list[UserError]:
    """Run every check and return what they raise."""
    errors: list[UserError] = []
    for check in checks:
        try:
            check()
        except UserError as error:
            errors.append(error)
    return errors
