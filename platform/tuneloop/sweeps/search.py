"""Ray Tune's searchers over a sweep: the next trial of a study, and combinations by Optuna."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.search import Searcher

from tuneloop.config import DistributionConfig, SweepConfig
from tuneloop.sweeps.grid import VALIDATION_LOSS, Cell, Measurement, Trial, listed_values
from tuneloop.sweeps.study import Study

PERCENT = "percent"


class OptunaDrawing:
    """Combinations by Optuna's tree-structured Parzen estimator, under Ray Tune's interface.

    Source: Bergstra et al. 2011, "Algorithms for hyper-parameter optimization", section 4.
    """

    def __init__(self, sweep: SweepConfig) -> None:
        # Loaded here: it is an extra.
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.listed = {key: listed_values(values) for key, values in sweep.parameters.items()}
        domains = {key: _domain(values) for key, values in sweep.parameters.items()}
        space = OptunaSearch.convert_search_space(domains)
        self.search = OptunaSearch(space, metric=VALIDATION_LOSS, mode="min", seed=sweep.seed)

    def draw(self, number: int) -> dict[str, Any]:
        """Return the values of a combination, numbers rounded to four digits."""
        drawn = self.search.suggest(str(number)) or {}
        values: dict[str, Any] = {}
        for key, listed in self.listed.items():
            value = drawn[key]
            if listed is not None:
                value = listed[value]
            elif isinstance(value, float):
                value = float(f"{value:.4g}")
            values[key] = value
        return values

    def tell(self, number: int, loss: float | None) -> None:
        """Hand the loss to Optuna."""
        result = None if loss is None else {VALIDATION_LOSS: loss}
        self.search.on_trial_complete(str(number), result, error=loss is None)


def _domain(values: list[Any] | DistributionConfig) -> Any:
    """Return a key's values as Ray Tune has them; of listed ones their numbers."""
    if (listed := listed_values(values)) is not None:
        # Optuna knows text and numbers only.
        return tune.choice(range(len(listed)))
    assert isinstance(values, DistributionConfig)
    if values.randint is not None:
        return tune.randint(*values.randint)
    if values.uniform is not None:
        return tune.uniform(*values.uniform)
    assert values.loguniform is not None
    return tune.loguniform(*values.loguniform)


class TrialSearch(Searcher):
    """Ray Tune's view of a study: which job is next, and how one ended.

    Args:
        folder: Where each trial finds its configuration.
        how_it_ended: Returns the trial and its loss from the cell and the last report.
    """

    def __init__(
        self,
        study: Study,
        folder: Path,
        how_it_ended: Callable[[Cell, dict[str, Any]], tuple[Trial, float | None]],
    ) -> None:
        super().__init__()
        self.study, self.folder, self.how_it_ended = study, folder, how_it_ended
        self.numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """Return the parameters of the next trial."""
        number = self.study.next()
        if number is None:
            return Searcher.FINISHED
        self.numbers[trial_id] = number
        job = self.study.jobs[number]
        order = {"config": job.cell.config.model_dump(mode="json"), "dataset": job.dataset.ref}
        order_file(self.folder, number).write_text(json.dumps(order), encoding="utf-8")
        return {"cell": number}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Take note of a validation loss."""
        if PERCENT in result:
            one = Measurement(result[PERCENT], result["step"], result[VALIDATION_LOSS])
            self.study.measure(self.numbers[trial_id], one)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Take note of how the trial ended."""
        number = self.numbers[trial_id]
        cell = self.study.jobs[number].cell
        self.study.end(number, *self.how_it_ended(cell, result or {}))

    def save(self, checkpoint_path: str) -> None:
        """Write nothing of use: the journal is what a sweep goes on from."""
        Path(checkpoint_path).touch()


def order_file(folder: Path, number: int) -> Path:
    """Return where a trial finds what to train."""
    return folder / f"trial-{number}.json"
