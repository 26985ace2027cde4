"""Combinations of a sweep by Optuna: an extra, so only who draws by it loads this."""

from __future__ import annotations

from typing import Any

import optuna
from ray import tune
from ray.tune.search.optuna import OptunaSearch

from tuneloop.config import DistributionConfig, SweepConfig
from tuneloop.sweeps.grid import VALIDATION_LOSS, listed_values


class OptunaDrawing:
    """Combinations by Optuna's tree-structured Parzen estimator, under Ray Tune's interface.

    Source: Bergstra et al. 2011, "Algorithms for hyper-parameter optimization", section 4.
    """

    def __init__(self, sweep: SweepConfig) -> None:
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
