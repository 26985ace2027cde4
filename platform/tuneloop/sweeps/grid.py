"""The trials of a sweep, written out as one validated configuration for each.

Trials are compared with each other, so whatever decides which rows are held out, and how answers
are scored, is the same for all of them.
"""

from __future__ import annotations

import itertools
import logging
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from tuneloop.artifacts import Artifact
from tuneloop.config import DistributionConfig, SweepConfig, TuneloopConfig, with_value
from tuneloop.errors import ConfigError, Problem

logger = logging.getLogger("tuneloop.sweeps")

SEED_KEY = "training.seed"
# What decides which rows are held out, how answers are scored, and where results are found.
_SAME_FOR_ALL = ("data.seed", "data.split", "evaluation", "sweep", "name", "workspace")
# Draws that hit a combination again, for each that is wanted, before there seem to be no more.
_MOST_DRAWS = 50


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


@dataclass(frozen=True)
class Trial:
    """A trial when its training has ended.

    Args:
        model: The trained model; None where training failed.
        problem: Why there is no model.
        wall_s: Seconds the training took in the run that did it.
        may_pass: It failed for a reason that another run may not meet: memory, workers, disk.
    """

    cell: Cell
    model: Artifact | None
    problem: str
    wall_s: float
    may_pass: bool = False


def expand(config: TuneloopConfig) -> list[Cell]:
    """Return the trials: of `sweep.parameters`, the last key varying fastest, every seed.

    With `sweep.num_trials` that many combinations are drawn by `sweep.seed`, else all are taken.

    Raises:
        ConfigError: No `sweep`, a number of workers that is not fixed, or keys, values and
            distributions that cannot be used, all at once.
    """
    if config.sweep is None:
        raise ConfigError(
            Problem(
                "there is no `sweep` in the configuration",
                remedy="add sweep.parameters, for example data.num_train_examples: [100, 300]",
            )
        )
    problems = [*_refuse_keys(config.sweep), *_refuse_distributions(config.sweep)]
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
    for values in _combinations(config.sweep, sample=not problems):
        changed = raw
        found = []
        try:
            for key, value in values.items():
                changed = with_value(changed, key, value)
            valid = TuneloopConfig.model_validate(changed)
        except ConfigError as error:
            found = list(error.problems)
        except ValidationError as error:
            found = [_problem(detail) for detail in error.errors()]
        if found:
            problems += [problem for problem in found if problem not in problems]
            continue
        for number in range(config.sweep.num_seeds):
            seed = valid.training.seed + number
            training = valid.training.model_copy(update={"seed": seed})
            cells.append(Cell(values, valid.model_copy(update={"training": training}), seed))
    if problems:
        raise ConfigError(*problems)
    return cells


def evaluated_on(config: TuneloopConfig, split: str) -> TuneloopConfig:
    """Return the configuration with a validation split, evaluated on this split.

    Where none is configured the validation split is made as large as the test split, out of the
    rows that would else be trained on. `evaluation.sources` are for `tuneloop evaluate`.
    """
    sides = config.data.split
    if not sides.validates:
        size = (
            {"validation_ratio": sides.test_ratio}
            if sides.num_test_examples is None
            else {"num_validation_examples": sides.num_test_examples}
        )
        sides = sides.model_copy(update=size)
    return config.model_copy(
        update={
            "data": config.data.model_copy(update={"split": sides}),
            "evaluation": config.evaluation.model_copy(update={"split": split, "sources": []}),
        }
    )


def _combinations(sweep: SweepConfig, sample: bool) -> Iterator[dict[str, Any]]:
    """Yield the values of each cell.

    Args:
        sample: Whether the distributions can be drawn from. Otherwise only the values that are
            listed are tried, to find what else is wrong.
    """
    listed = {
        key: values.choice or [] if isinstance(values, DistributionConfig) else values
        for key, values in sweep.parameters.items()
    }
    if sweep.num_trials is None or not sample:
        tried = {key: values for key, values in listed.items() if values}
        for values in itertools.product(*tried.values()):
            yield dict(zip(tried, values, strict=True))
        return
    drawn: dict[str, dict[str, Any]] = {}
    numbers = random.Random(sweep.seed)
    for _ in range(_MOST_DRAWS * sweep.num_trials):
        values_drawn = {
            key: _draw(values, numbers) if isinstance(values, DistributionConfig)
            else numbers.choice(values)
            for key, values in sweep.parameters.items()
        }  # fmt: skip
        drawn.setdefault(repr(values_drawn), values_drawn)
        if len(drawn) == sweep.num_trials:
            break
    else:
        logger.warning(
            "only %d different combinations were found, not %d", len(drawn), sweep.num_trials
        )
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
        if sweep.num_trials is None:
            yield Problem(
                f"`{key}` is drawn at random, and nothing says how often",
                where=where,
                remedy="set sweep.num_trials",
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


def _problem(detail: Any) -> Problem:
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
