"""Ray Tune's view of a study: a searcher that hands it the next trial."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.tune.search import Searcher

from tuneloop.sweeps.grid import VALIDATION_LOSS, Cell, Measurement, Trial
from tuneloop.sweeps.study import Study

PERCENT = "percent"


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
