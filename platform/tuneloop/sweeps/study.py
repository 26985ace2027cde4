"""The trials of a sweep while it runs: how those ended that did, and which is next.

A journal keeps what a killed sweep needs to go on as if nothing had happened: the combinations that
were drawn, in the order of draws and results, and how every trial ended.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tuneloop.artifacts import Artifact, sync
from tuneloop.config import TuneloopConfig
from tuneloop.sweeps.grid import VALIDATION_LOSS, Cell, Measurement, Trial

# Draws of combinations that were there already before there seem to be no more.
_MOST_DRAWS = 50


class Job(NamedTuple):
    """A cell to train.

    Args:
        fingerprint: Of its model.
    """

    cell: Cell
    dataset: Artifact
    fingerprint: str


class Journal:
    """One JSON line for each thing that happened; a torn last line is left out."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[dict[str, Any]] = []
        if path.exists():
            lines = path.read_bytes().split(b"\n")[:-1]
            self.entries = [json.loads(line) for line in lines]
            # What follows must not be glued to half a line.
            path.write_bytes(b"".join(line + b"\n" for line in lines))
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, entry: dict[str, Any]) -> None:
        """Write an entry so that it survives a kill."""
        with self.path.open("ab") as file:
            file.write(json.dumps(entry).encode() + b"\n")
        sync(self.path)
        self.entries.append(entry)


class Budget(NamedTuple):
    """What the trainings of a sweep may take."""

    trials: float = math.inf
    seconds: float = math.inf

    @classmethod
    def of(cls, config: TuneloopConfig) -> Budget:
        """Return the budget of a configuration's sweep; infinite where it has none."""
        assert config.sweep is not None
        budget, resources = config.sweep.budget, config.resources
        hours = budget.hours or math.inf
        if budget.price is not None and resources.price_per_hour is not None:
            price_per_hour = resources.price_per_hour * resources.worker_counts[0]
            hours = min(hours, budget.price / price_per_hour)
        return cls(budget.trials or math.inf, 3600 * hours)

    def allows(self, num_trials: int, spent_s: float) -> bool:
        """Return whether one more training may begin."""
        return num_trials < self.trials and spent_s < self.seconds


class Drawing(Protocol):
    """Draws combinations one after the other, by the validation losses so far."""

    def draw(self, number: int) -> dict[str, Any]:
        """Return the values of combination `number`; the same number gives the same values."""

    def tell(self, number: int, loss: float | None) -> None:
        """Take note of the mean validation loss of a combination; None where it has none."""


@dataclass
class Study:
    """The trials of a sweep: those that ended, and which is next.

    Args:
        jobs: All of a grid; with Optuna those that were drawn so far.
        budget: What may be spent in all calls together.
        journal: Of this and earlier calls.
        find: Returns the published model of a fingerprint, or None.
        drawing: Where combinations are drawn while the sweep runs.
        make: Returns the jobs of a drawn combination, one for each seed.
        num_wanted: Combinations to draw.
        num_seeds: Jobs of each.
        order_seed: Jobs of a grid are trained in an order drawn by it; None: in their order. Early
            stopping compares a training with those before it.
        trials: How they ended, by the job's number.
        measured: Validation losses during the trainings, by the job's number.
        spent_s: Seconds of training so far.
    """

    jobs: list[Job]
    budget: Budget
    journal: Journal
    find: Callable[[str], Artifact | None]
    drawing: Drawing | None = None
    make: Callable[[dict[str, Any]], list[Job]] = lambda values: []
    num_wanted: int = 0
    num_seeds: int = 1
    order_seed: int | None = None
    trials: dict[int, Trial] = field(default_factory=dict)
    measured: dict[int, list[Measurement]] = field(default_factory=dict)
    spent_s: float = 0.0
    _num_trained: int = 0
    _running: set[int] = field(default_factory=set)
    _losses: dict[int, float | None] = field(default_factory=dict)
    # The jobs of each draw, and of each distinct combination.
    _draws: list[list[int]] = field(default_factory=list)
    _distinct: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Go through the journal, then look which other models are there already."""
        entries = list(self.journal.entries)
        ended = {entry["fingerprint"] for entry in entries if "fingerprint" in entry}
        for number in range(len(self.jobs)):
            self._look_up(number, ended)
        for entry in entries:
            if "values" in entry:
                assert self.drawing is not None
                # Drawn again, so that the next draw is the one that would have come.
                self.drawing.draw(len(self._draws))
                self._add(entry["values"], ended)
            elif "status" in entry:
                self._recall(entry)
        self._count_unnoted({e["began"] for e in entries if "began" in e} - ended)

    def next(self) -> int | None:
        """Return the number of the job to train now; None: no more."""
        while self.budget.allows(self._num_trained + len(self._running), self.spent_s):
            order = list(range(len(self.jobs)))
            if self.order_seed is not None:
                random.Random(self.order_seed).shuffle(order)
            for number in order:
                if number not in self.trials and number not in self._running:
                    self._running.add(number)
                    self.journal.add({"began": self.jobs[number].fingerprint})
                    return number
            if not self._draw():
                return None
        return None

    @property
    def is_wanting(self) -> bool:
        """Whether there is anything to train."""
        more = self.drawing is not None and len(self._distinct) < self.num_wanted
        left = any(number not in self.trials for number in range(len(self.jobs)))
        return (more or left) and self.budget.allows(self._num_trained, self.spent_s)

    @property
    def num_expected(self) -> int:
        """How many trials there will be."""
        if self.drawing is None:
            return len(self.jobs)
        return self.num_wanted * self.num_seeds

    def measure(self, number: int, measurement: Measurement) -> None:
        """Take note of a validation loss during a training."""
        self.measured.setdefault(number, []).append(measurement)

    def end(self, number: int, trial: Trial, loss: float | None) -> None:
        """Take note of how a training ended.

        Args:
            loss: The validation loss of its model, or that at which it was stopped.
        """
        self._running.discard(number)
        self._num_trained += 1
        self.spent_s += trial.wall_s
        trial = replace(trial, measured=tuple(self.measured.get(number, [])))
        if not trial.may_pass:  # else the next call tries it again
            self.journal.add(
                {
                    "fingerprint": self.jobs[number].fingerprint,
                    "status": trial.status,
                    "problem": trial.problem,
                    "wall_s": trial.wall_s,
                    "loss": loss,
                    "measured": trial.measured,
                }
            )
        self._keep(number, trial, loss)

    def ended(self) -> list[Trial]:
        """Return all trials; those that the budget left out are `not run`."""
        reason = "the budget was spent"
        return [
            self.trials.get(number) or Trial(job.cell, None, reason, 0.0, status="not run")
            for number, job in enumerate(self.jobs)
        ]

    def _recall(self, entry: dict[str, Any]) -> None:
        """Take over how a trial of an earlier call ended."""
        self.spent_s += entry["wall_s"]
        self._num_trained += 1
        for number, job in enumerate(self.jobs):
            if job.fingerprint != entry["fingerprint"]:
                continue
            model = self.find(job.fingerprint) if entry["status"] == "done" else None
            if entry["status"] == "done" and model is None:
                continue  # somebody removed it
            measured = [Measurement(*one) for one in entry["measured"]]
            self.measured[number] = measured
            trial = Trial(
                job.cell,
                model,
                entry["problem"],
                entry["wall_s"],
                status=entry["status"],
                measured=tuple(measured),
            )
            self._keep(number, trial, entry["loss"])

    def _count_unnoted(self, fingerprints: Collection[str]) -> None:
        """Count trainings of earlier calls that were killed after the model, before its entry."""
        for number, job in enumerate(self.jobs):
            if job.fingerprint in fingerprints and number in self.trials:
                self._num_trained += 1
                self.spent_s += self.trials[number].wall_s

    def _look_up(self, number: int, ended: Collection[str] = ()) -> None:
        """Take a model that exists already, of a run or of another sweep.

        Args:
            ended: Fingerprints that are in the journal: their turn comes there.
        """
        job = self.jobs[number]
        model = None if job.fingerprint in ended else self.find(job.fingerprint)
        if model is not None:
            trial = Trial(job.cell, model, "", model.manifest["duration_s"])
            self._keep(number, trial, model.manifest["metrics"].get(VALIDATION_LOSS))

    def _keep(self, number: int, trial: Trial, loss: float | None) -> None:
        self.trials[number] = trial
        # The loss at which a trial was stopped is what is known of its values.
        self._losses[number] = loss
        for draw, members in enumerate(self._draws):
            if number in members:
                self._tell(draw)

    def _tell(self, draw: int) -> None:
        """Tell the mean loss of a combination once all its seeds have ended."""
        members = self._draws[draw]
        if self.drawing is None or not all(member in self.trials for member in members):
            return
        losses = [self._losses[member] for member in members]
        known = [loss for loss in losses if loss is not None]
        self.drawing.tell(draw, sum(known) / len(known) if len(known) == len(losses) else None)

    def _draw(self) -> bool:
        """Draw one more combination; return whether there is one."""
        if self.drawing is None or len(self._distinct) >= self.num_wanted:
            return False
        for _ in range(_MOST_DRAWS):
            values = self.drawing.draw(len(self._draws))
            self.journal.add({"values": values})
            if self._add(values):
                return True
        return False

    def _add(self, values: dict[str, Any], ended: Collection[str] = ()) -> bool:
        """Add a drawn combination; return whether it is a new one."""
        key = repr(values)
        is_new = key not in self._distinct
        if is_new:
            first = len(self.jobs)
            self.jobs += self.make(values)
            self._distinct[key] = list(range(first, len(self.jobs)))
        self._draws.append(self._distinct[key])
        if is_new:
            for number in self._distinct[key]:
                self._look_up(number, ended)
        else:
            self._tell(len(self._draws) - 1)
        return is_new
