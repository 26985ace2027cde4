"""A grid of dotted keys, written out as one validated configuration per cell."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from tuneloop.artifacts import Artifact
from tuneloop.config import TuneloopConfig, with_value
from tuneloop.errors import ConfigError, Problem


@dataclass(frozen=True)
class Cell:
    """One trial.

    Args:
        values: Dotted key to value, in the order of the YAML.
        config: The configuration with these values, without `sweep`.
    """

    values: dict[str, Any]
    config: TuneloopConfig

    @property
    def label(self) -> str:
        """Its values in one line."""
        return ", ".join(f"{key}={value}" for key, value in self.values.items())


@dataclass(frozen=True)
class Trial:
    """One cell of the grid when its training has ended.

    Args:
        model: The trained model; None where the settings themselves made training fail.
        problem: Why there is no model.
        wall_s: Seconds the training took in the run that did it.
    """

    cell: Cell
    model: Artifact | None
    problem: str
    wall_s: float


def expand(config: TuneloopConfig) -> list[Cell]:
    """Return the cells of `sweep.parameters`, the last key varying fastest.

    Raises:
        ConfigError: No `sweep`, a number of workers that is not fixed, or keys and values that the
            configuration does not accept, all at once.
    """
    if config.sweep is None:
        raise ConfigError(
            Problem(
                "there is no `sweep` in the configuration",
                remedy="add sweep.parameters, for example data.num_train_examples: [100, 300]",
            )
        )
    if not isinstance(config.resources.num_workers, int):
        # Ray would count the share of a node that a trial holds as room for one more worker.
        raise ConfigError(
            Problem(
                "the trainings of a sweep have a fixed number of workers",
                where="resources.num_workers",
                got=str(list(config.resources.num_workers)),
                remedy="give one number; resources.num_concurrent_trials fills a large cluster",
            )
        )
    raw = config.model_dump(mode="json", exclude={"sweep"})
    parameters = config.sweep.parameters
    cells, problems = [], []
    for values in itertools.product(*parameters.values()):
        cell = dict(zip(parameters, values, strict=True))
        changed = raw
        for key, value in cell.items():
            changed = with_value(changed, key, value)
        try:
            cells.append(Cell(cell, TuneloopConfig.model_validate(changed)))
        except ValidationError as error:
            for detail in error.errors():
                key = ".".join(str(part) for part in detail["loc"])
                unknown = detail["type"] == "extra_forbidden"
                problem = Problem(
                    f"sweep.parameters names the unknown key `{key}`"
                    if unknown
                    else f"sweep.parameters gives `{key}` a value that is not allowed",
                    where="sweep.parameters",
                    got="" if unknown else repr(detail.get("input")),
                    allowed="" if unknown else str(detail["msg"]).removeprefix("Value error, "),
                    remedy="use the dotted path of a key of this YAML" if unknown else "",
                )
                if problem not in problems:
                    problems.append(problem)
    if problems:
        raise ConfigError(*problems)
    return cells
