"""`sweep`: the settings that are tried, and the budget for it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from tuneloop.config.section import Section


class DistributionConfig(Section):
    """Where random values of a swept key come from: one of these, named as in Ray Tune."""

    choice: list[Any] | None = None
    """Any of these values."""
    uniform: tuple[float, float] | None = None
    """A number between two ends."""
    loguniform: tuple[float, float] | None = None
    """A number between two ends above 0; every order of magnitude as likely."""
    randint: tuple[int, int] | None = None
    """A whole number from the first up to, not including, the second."""


class SweepBudgetConfig(Section):
    """What the trainings of a sweep may cost; none begins once it is spent."""

    trials: int | None = Field(None, ge=1)
    """Most trainings; every seed counts. Default: any number."""
    hours: float | None = Field(None, gt=0)
    """Most hours of training, all trials together. Default: any number."""
    price: float | None = Field(None, gt=0)
    """Most money for training, by `resources.price_per_hour`. Default: any."""


class SweepConfig(Section):
    """Settings to try: each combination is trained, and the best on the validation split tested."""

    parameters: dict[str, list[Any] | DistributionConfig] = Field(min_length=1)
    """The values to try for each dotted key, for example `data.num_train_examples: [100, 300]`, or
    where to draw them from, for example `training.learning_rate: {loguniform: [1.0e-4,
    3.0e-3]}`."""
    search: Literal["grid", "random", "optuna"] | None = None
    """`grid` takes every combination; `random` draws them; `optuna` draws each by the validation
    losses so far (needs the extra `optuna`). Default: `random` with `num_trials`, else `grid`."""
    num_trials: int | None = Field(None, ge=1)
    """Combinations to draw. Needed, or `budget.trials`, with `random` and `optuna`."""
    num_seeds: int = Field(1, ge=1)
    """Trainings of each combination, with `training.seed` and the numbers after it. Intervals then
    say what other seeds would give as well."""
    seed: int = 0
    """Seed of the combinations that are drawn."""
    metric: str | None = None
    """What the best combination is chosen by: a metric of the evaluation, or `validation_loss`.
    Default: `evaluation.primary`."""
    mode: Literal["max", "min"] | None = None
    """Which end of the metric is better. Default: as the metric has it."""
    scheduler: Literal["asha"] | None = None
    """`asha` stops a training early whose validation loss is not among the best so far. Default:
    every training goes to its end."""
    grace_period: float = Field(0.2, gt=0, lt=1)
    """For `asha`: the share of a training before which it is not stopped."""
    reduction_factor: float = Field(2, gt=1)
    """For `asha`: one in so many goes on at each decision."""
    budget: SweepBudgetConfig = SweepBudgetConfig()
    price_per_row: float | None = Field(None, gt=0)
    """Price of labelling a row; the report then tells what more rows would cost."""

    @field_validator("parameters", mode="before")
    @classmethod
    def _lists_or_distributions(cls, parameters: object) -> Any:
        if not isinstance(parameters, dict):
            return parameters
        wrong = [
            f"{key} is neither a list of values nor one of "
            f"{', '.join(DistributionConfig.model_fields)}"
            for key, values in parameters.items()
            if not isinstance(values, list | DistributionConfig)
            and not (
                isinstance(values, dict) and set(values) <= set(DistributionConfig.model_fields)
            )
        ]
        if wrong:
            raise ValueError("; ".join(wrong))
        return {
            key: DistributionConfig.model_validate(values) if isinstance(values, dict) else values
            for key, values in parameters.items()
        }
