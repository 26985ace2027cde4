"""The trials of a sweep, written out as one validated configuration for each.

Trials are compared with each other, so whatever decides which rows are held out, and how answers
are scored, is the same for all of them.
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from tuneloop.artifacts import Artifact
from tuneloop.config import DistributionConfig, SweepConfig, TuneloopConfig, with_value
from tuneloop.errors import ConfigError, Problem
from tuneloop.evals.scoring.choosable import chosen_metrics
from tuneloop.evals.scoring.metrics import TASK_METRICS
from tuneloop.sweeps.curve import ROWS_KEY

logger = logging.getLogger("tuneloop.sweeps")

SEED_KEY = "training.seed"
# What decides which rows are held out, how answers are scored, and where results are found.
_SAME_FOR_ALL = ("data.seed", "data.split", "evaluation", "sweep", "name", "workspace")
# Draws that hit a combination again, for each that is wanted, before there seem to be no more.
_MOST_DRAWS = 50
VALIDATION_LOSS = "validation_loss"
# What decides which rows are trained on, by which model: made before the first training.
_PREPARED = ("data", "task", "model")


@dataclass(frozen=True)
class Cell:
    """One trial.

    Args:
        values: Dotted key to value, in the order of the YAML. Trials with the same values differ
            in their seed.
        config: The configuration with these values, without `sweep`. It has a validation split,
            and is evaluated on that.
        seed: `training.seed`.
    """

    values: dict[str, Any]
    config: TuneloopConfig
    seed: int = 0

    @property
    def label(self) -> str:
        """Its values and its seed in one line."""
        values = self.values if SEED_KEY in self.values else self.values | {"seed": self.seed}
        return ", ".join(f"{key}={value}" for key, value in values.items())


class Measurement(NamedTuple):
    """A validation loss during a training.

    Args:
        percent: How much of the training was done.
    """

    percent: float
    step: int
    loss: float


Status = Literal["done", "failed", "stopped", "not run"]


@dataclass(frozen=True)
class Trial:
    """A trial when its training has ended.

    Args:
        model: The trained model; None where there is none.
        problem: Why there is no model.
        wall_s: Seconds the training took, with the steps up to a checkpoint that it went on from.
        may_pass: It failed for a reason that another run may not meet: memory, workers, disk.
        status: `stopped` early for its validation loss, `not run` for the budget.
        measured: The validation losses of a training that was stopped.
    """

    cell: Cell
    model: Artifact | None
    problem: str
    wall_s: float
    may_pass: bool = False
    status: Status = "done"
    measured: tuple[Measurement, ...] = ()


def expand(config: TuneloopConfig) -> list[Cell]:
    """Return the trials: of `sweep.parameters`, the last key varying fastest, every seed.

    With `random` as many combinations are drawn by `sweep.seed` as are asked for. `optuna` draws
    while the sweep runs: for it these are the combinations of listed values, with every key that is
    drawn from a distribution at its low end.

    Raises:
        ConfigError: No `sweep`, a number of workers that is not fixed, or keys, values and
            distributions that cannot be used, all at once.
    """
    if config.sweep is None:
        raise ConfigError.of(
            "there is no `sweep` in the configuration",
            remedy="add sweep.parameters, for example data.num_train_examples: [100, 300]",
        )
    sweep = config.sweep
    problems = [
        *_refuse_keys(sweep),
        *_refuse_distributions(sweep),
        *_refuse_search(config, sweep),
        *_refuse_metric(config, sweep),
    ]
    if not isinstance(config.resources.num_workers, int):
        # Ray would count the share of a node that a trial holds as room for one more worker.
        problems.append(
            Problem(
                "the trainings of a sweep have a fixed number of workers",
                where="resources.num_workers",
                got=str(list(config.resources.num_workers)),
                remedy="give one number; resources.num_concurrent_trials fills a large cluster",
            )
        )
    raw = evaluated_on(config, "validation").model_dump(mode="json", exclude={"sweep"})
    cells = []
    for end in _ends(sweep):
        _validated(raw, end, problems)
    for values in _combinations(sweep, sample=not problems):
        valid = _validated(raw, values, problems)
        if valid is not None:
            cells += _each_seed(Cell(values, valid), sweep.num_seeds)
    ConfigError.refuse(problems)
    return cells


def search_of(sweep: SweepConfig) -> Literal["grid", "random", "optuna"]:
    """Return how combinations are found: `sweep.search`, or its default."""
    return sweep.search or ("random" if sweep.num_trials else "grid")


def num_combinations(sweep: SweepConfig) -> int | None:
    """Return how many combinations are drawn; None: nothing says so."""
    if sweep.num_trials or sweep.budget.trials is None:
        return sweep.num_trials
    return math.ceil(sweep.budget.trials / sweep.num_seeds)


def listed_values(values: list[Any] | DistributionConfig) -> list[Any] | None:
    """Return the values of a key that can be counted; None where they cannot."""
    return values.choice if isinstance(values, DistributionConfig) else values


def with_drawn(cell: Cell, values: Mapping[str, Any], num_seeds: int) -> list[Cell]:
    """Return the trials of a combination, from the cell with the same listed values."""
    raw = cell.config.model_dump(mode="json")
    for key, value in values.items():
        if cell.values[key] != value:
            raw = with_value(raw, key, value)
    config = TuneloopConfig.model_validate(raw)
    return _each_seed(replace(cell, values=dict(values), config=config), num_seeds)


def _each_seed(cell: Cell, num_seeds: int) -> list[Cell]:
    cells = []
    for number in range(num_seeds):
        seed = cell.config.training.seed + number
        training = cell.config.training.model_copy(update={"seed": seed})
        config = cell.config.model_copy(update={"training": training})
        cells.append(Cell(cell.values, config, seed))
    return cells


def _validated(
    raw: dict[str, Any], values: Mapping[str, Any], problems: list[Problem]
) -> TuneloopConfig | None:
    """Return the configuration with these values; None where it is wrong, and add why."""
    try:
        for key, value in values.items():
            raw = with_value(raw, key, value)
        return TuneloopConfig.model_validate(raw)
    except ConfigError as error:
        found = list(error.problems)
    except ValidationError as error:
        found = [_problem(detail) for detail in error.errors()]
    problems += [problem for problem in found if problem not in problems]
    return None


def evaluated_on(config: TuneloopConfig, split: str) -> TuneloopConfig:
    """Return the configuration with a validation split, evaluated on this split.

    Where none is configured the validation split is made as large as the test split, out of the
    rows that would else be trained on. `evaluation.sources` are for `tuneloop evaluate`, and
    `sweep.metric` takes the place of `evaluation.primary`.
    """
    sides = config.data.split
    if not sides.validates:
        size = (
            {"validation_ratio": sides.test_ratio}
            if sides.num_test_examples is None
            else {"num_validation_examples": sides.num_test_examples}
        )
        sides = sides.model_copy(update=size)
    evaluation = {"split": split, "sources": []}
    metric = None if config.sweep is None else config.sweep.metric
    if metric not in (None, VALIDATION_LOSS):
        evaluation["primary"] = metric
    return config.model_copy(
        update={
            "data": config.data.model_copy(update={"split": sides}),
            "evaluation": config.evaluation.model_copy(update=evaluation),
        }
    )


def _ends(sweep: SweepConfig) -> Iterator[dict[str, Any]]:
    """Yield both ends of every distribution, each key alone."""
    for key, values in sweep.parameters.items():
        for end in _ends_of(values):
            yield {key: end}


def _ends_of(values: list[Any] | DistributionConfig) -> tuple[Any, ...]:
    """Return the least and the greatest value; nothing for values that are listed."""
    if listed_values(values) is not None:
        return ()
    assert isinstance(values, DistributionConfig)
    if values.randint is not None:
        return values.randint[0], values.randint[1] - 1
    return values.uniform or values.loguniform or ()


def _combinations(sweep: SweepConfig, sample: bool) -> Iterator[dict[str, Any]]:
    """Yield the values of each cell.

    Args:
        sample: Whether the distributions can be drawn from. Otherwise only the values that are
            listed are tried, to find what else is wrong.
    """
    search = search_of(sweep)
    listed = {
        key: list(_ends_of(values)[:1]) if (found := listed_values(values)) is None else found
        for key, values in sweep.parameters.items()
    }
    wanted = num_combinations(sweep)
    if search != "random" or wanted is None or not sample:
        tried = {key: values for key, values in listed.items() if values}
        for values in itertools.product(*tried.values()):
            yield dict(zip(tried, values, strict=True))
        return
    drawn: dict[str, dict[str, Any]] = {}
    numbers = random.Random(sweep.seed)
    for _ in range(_MOST_DRAWS * wanted):
        values_drawn = {
            key: _draw(values, numbers) if isinstance(values, DistributionConfig)
            else numbers.choice(values)
            for key, values in sweep.parameters.items()
        }  # fmt: skip
        drawn.setdefault(repr(values_drawn), values_drawn)
        if len(drawn) == wanted:
            break
    else:
        logger.warning("only %d different combinations were found, not %d", len(drawn), wanted)
    yield from drawn.values()


def _draw(distribution: DistributionConfig, numbers: random.Random) -> Any:
    if distribution.choice is not None:
        return numbers.choice(distribution.choice)
    if distribution.randint is not None:
        return numbers.randrange(*distribution.randint)
    if distribution.uniform is not None:
        value = numbers.uniform(*distribution.uniform)
    else:
        assert distribution.loguniform is not None
        value = math.exp(numbers.uniform(*map(math.log, distribution.loguniform)))
    return float(f"{value:.4g}")


def _refuse_keys(sweep: SweepConfig) -> Iterator[Problem]:
    for key in sweep.parameters:
        if any(key == fixed or key.startswith(f"{fixed}.") for fixed in _SAME_FOR_ALL):
            yield Problem(
                f"`{key}` cannot be swept",
                where="sweep.parameters",
                allowed="keys that leave the held-out rows and their scoring as they are",
                remedy="make two configurations and run each",
            )
        elif key == SEED_KEY and sweep.num_seeds > 1:
            yield Problem(
                "the seeds are given twice",
                where="sweep.parameters",
                got=f"`{SEED_KEY}` and sweep.num_seeds {sweep.num_seeds}",
                remedy="leave one of them out; only sweep.num_seeds gives intervals over seeds",
            )


def _refuse_distributions(sweep: SweepConfig) -> Iterator[Problem]:
    for key, values in sweep.parameters.items():
        where = f"sweep.parameters.{key}"
        if not isinstance(values, DistributionConfig):
            yield from _refuse_values(key, values)
            continue
        kinds = {kind: ends for kind, ends in values if ends is not None}
        if len(kinds) != 1:
            yield Problem(
                "a distribution is of one kind",
                where=where,
                got=" and ".join(kinds) or "none",
                allowed=", ".join(DistributionConfig.model_fields),
            )
            continue
        ((kind, ends),) = kinds.items()
        if kind == "choice":
            yield from _refuse_values(key, ends)
            continue
        if ends[0] >= ends[1]:
            yield Problem(
                "a distribution begins below its end",
                where=where,
                got=f"{kind} from {ends[0]} to {ends[1]}",
                remedy=f"{kind}: [{ends[1]}, {ends[0]}]"
                if ends[0] > ends[1]
                else "give a list of values to try just these",
            )
        if kind == "loguniform" and min(ends) <= 0:
            yield Problem(
                "a loguniform distribution begins above 0", where=where, got=str(min(ends))
            )
        if search_of(sweep) == "grid":
            yield Problem(
                f"`{key}` is drawn at random, and nothing says how often",
                where=where,
                remedy="set sweep.num_trials",
            )
        elif search_of(sweep) == "optuna" and key.split(".")[0] in _PREPARED:
            yield Problem(
                f"`{key}` changes the dataset or the model, which are made before the first trial",
                where=where,
                got=f"{kind} with sweep.search optuna",
                remedy=f"give a list: {key}: [{ends[0]}, {ends[1]}]",
            )


def _refuse_search(config: TuneloopConfig, sweep: SweepConfig) -> Iterator[Problem]:
    search = search_of(sweep)
    if search == "grid" and sweep.num_trials:
        yield Problem(
            "a grid takes every combination",
            where="sweep.num_trials",
            got=str(sweep.num_trials),
            remedy="leave it out, or set sweep.search to random or optuna; sweep.budget.trials "
            "ends a grid early",
        )
    if search != "grid" and num_combinations(sweep) is None:
        yield Problem(
            f"nothing says how many combinations {search} draws",
            where="sweep.search",
            remedy="set sweep.num_trials",
        )
    if search == "optuna" and importlib.util.find_spec("optuna") is None:
        yield Problem(
            "Optuna is not installed",
            where="sweep.search",
            got="optuna",
            remedy='pip install "tuneloop[optuna]"',
        )
    if sweep.budget.price is not None and config.resources.price_per_hour is None:
        yield Problem(
            "a budget in money needs the price of an hour",
            where="sweep.budget.price",
            remedy="set resources.price_per_hour, or give sweep.budget.hours",
        )
    if sweep.scheduler is not None and ROWS_KEY in sweep.parameters:
        yield Problem(
            "early stopping compares trainings that differ in their settings only",
            where="sweep.scheduler",
            got=f"{sweep.scheduler}, with `{ROWS_KEY}` in sweep.parameters",
            remedy="choose the settings first; then sweep the data volumes without a scheduler: "
            "a learning curve needs all of them",
        )


def _refuse_metric(config: TuneloopConfig, sweep: SweepConfig) -> Iterator[Problem]:
    if sweep.metric == VALIDATION_LOSS:
        better = "min"
    else:
        evaluation = evaluated_on(config, "validation").evaluation
        try:
            chosen = chosen_metrics(config.task, evaluation)
        except ConfigError as error:
            for problem in error.problems:
                moved = sweep.metric and problem.where == "evaluation.primary"
                yield replace(problem, where="sweep.metric") if moved else problem
            return
        usual = TASK_METRICS.get(config.task.type)
        known = chosen or (usual.metrics if usual else {})
        primary = evaluation.primary or (usual.primary if usual else "")
        better = {"higher": "max", "lower": "min"}[
            known[primary].better if primary in known else "higher"
        ]
    if sweep.mode not in (None, better):
        yield Problem(
            "the mode is not that of the metric",
            where="sweep.mode",
            got=f"{sweep.mode} of {sweep.metric or 'the primary metric'}",
            allowed=better,
        )


def _refuse_values(key: str, values: list[Any]) -> Iterator[Problem]:
    where = f"sweep.parameters.{key}"
    if not values:
        yield Problem(f"`{key}` has no value to try", where=where, remedy="name one")
    twice = [value for number, value in enumerate(values) if value in values[:number]]
    if twice:
        yield Problem(
            f"`{key}` has a value twice",
            where=where,
            got=repr(twice[0]),
            remedy="name it once; sweep.num_seeds trains each combination several times",
        )


def _problem(detail: ErrorDetails) -> Problem:
    """Turn an error in one combination into a problem."""
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return Problem(
            f"sweep.parameters names the unknown key `{key}`",
            where="sweep.parameters",
            remedy="use the dotted path of a key of this YAML",
        )
    return Problem(
        f"sweep.parameters gives `{key}` a value that is not allowed",
        where="sweep.parameters",
        got="" if isinstance(detail.get("input"), dict) else repr(detail.get("input")),
        allowed=str(detail["msg"]).removeprefix("Value error, "),
    )
