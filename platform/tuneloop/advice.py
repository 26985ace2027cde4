"""What to do next in a workspace, and what came of the advice that was given before."""

from __future__ import annotations

import contextlib
import json
import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from tuneloop.artifacts import Artifact, Workspace
from tuneloop.config import TuneloopConfig, load_config
from tuneloop.errors import ArtifactError, ConfigError, DataError
from tuneloop.evals.reporting.actions import Action, Gain
from tuneloop.evals.reporting.formatting import format_difference, format_estimate
from tuneloop.evals.reporting.history import Iteration
from tuneloop.evals.reporting.situation import (
    Marked,
    actions_after,
    advised,
    origin_of,
    read_versions,
    settings_of,
)
from tuneloop.evals.scoring.metrics import Metric
from tuneloop.evals.scoring.results import Evaluation
from tuneloop.marks import SCORED_SUFFIX, Mark
from tuneloop.review.fixes import marks_for, states_of
from tuneloop.review.given import GivenAdvice
from tuneloop.review.store import ReviewStore, has_store

log = logging.getLogger("tuneloop.advice")


class Outcome(NamedTuple):
    """Advice that was given, beside the version that came after.

    Args:
        gain: What it was to bring.
        change: Score of the next version less that of the one it was about, over the examples that
            both scored.
        low, high: Its 95% interval, paired; None where the rows are too few for one.
        was_done: Whether the next version has the settings that were advised; None where that
            cannot be told: other actions have the same, or none would have changed.
        changed: What differs between the two versions, in words: whatever of it was advised.
    """

    title: str
    basis: str
    evaluation: str
    gain: Gain | None
    next_evaluation: str
    change: float
    changed: str
    low: float | None = None
    high: float | None = None
    was_done: bool | None = None

    @property
    def came_true(self) -> bool | None:
        """Whether the change is within what was told; None where nothing was."""
        if self.gain is None:
            return None
        low, high = self.gain.low, self.gain.high
        if self.basis == "at most":
            low, high = min(0.0, low), max(0.0, high)
        return low <= self.change <= high

    def describe(self, metric: Metric) -> str:
        """Return the outcome in words."""
        told = "nothing" if self.gain is None else format_difference(self.gain.value, metric)
        prefix = "at most " if self.gain is not None and self.basis == "at most" else ""
        came = format_difference(self.change, metric)
        if self.low is not None and self.high is not None:
            ends = (format_difference(end, metric, unit=False) for end in (self.low, self.high))
            came += f" ({' to '.join(ends)})"
        return (
            f"{self.title}: {prefix}{told} was told, {came} came "
            f"with {self.next_evaluation} ({self.changed or 'no change that is known'})"
        )


@dataclass(frozen=True)
class Advice:
    """What to do next.

    Args:
        reference: Of the evaluation that it is about.
        score: Of its last arm, in words.
        metric: The primary one.
        actions: The best first.
        outcomes: Of earlier advice, oldest first.
    """

    workspace: Workspace
    reference: str
    score: str
    metric: Metric
    actions: list[Action]
    outcomes: list[Outcome]

    @property
    def calibration(self) -> str:
        """How often what was told came true where it was done, in words."""
        done = [o for o in self.outcomes if o.was_done]
        if not done:
            return "none of it is known to have been done"
        judged = [o.came_true for o in done if o.came_true is not None]
        if not judged:
            return "what was done did not say how much"
        return f"{sum(judged)} of {len(judged)} changes are within what was told"

    def as_dict(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return {
            "evaluation": self.reference,
            "score": self.score,
            "actions": [action.as_dict() for action in self.actions],
            "outcomes": [
                {**o._asdict(), "gain": o.gain and o.gain._asdict(), "came_true": o.came_true}
                for o in self.outcomes
            ],
            "calibration": self.calibration if self.outcomes else None,
        }

    def keep(self) -> None:
        """Note the advice, so that it can be held against what comes of it."""
        if not has_store(self.workspace.location):
            return
        try:
            store = ReviewStore(self.workspace.location)
            for action in self.actions:
                gain = json.dumps(action.gain)
                store.add(
                    GivenAdvice.of(self.reference, action.title, action.basis, gain, action.command)
                )
        except ArtifactError as error:
            log.warning("the advice is not kept: %s", error.problems[0].got)


def advice_for(workspace: Workspace, name: str, config: TuneloopConfig | None = None) -> Advice:
    """Return what to do after the newest evaluation of a name.

    Args:
        config: As it is now. Default: as the file says that the evaluation was made from.

    Raises:
        ArtifactError: There is no evaluation of this name, or it cannot be read.
    """
    versions = read_versions(workspace, name)
    if not versions.artifacts:
        again = [config.origin.file, *config.origin.overrides] if config else [f"{name}.yaml"]
        raise ArtifactError.of(
            "there is no evaluation to go on from",
            where=f"evaluations/{name}",
            remedy=shlex.join(["tuneloop", "run", *again]),
        )
    newest = versions.artifacts[-1]
    evaluation = Evaluation.load(newest)
    metric = evaluation.metric(evaluation.primary)
    estimate = evaluation.candidate["scores"][evaluation.primary]
    written = config or _written(newest)
    return Advice(
        workspace,
        newest.ref,
        f"{evaluation.candidate['name']}, {evaluation.primary} {format_estimate(estimate, metric)}",
        metric,
        actions_after(
            workspace,
            evaluation,
            versions,
            written,
            _marked(workspace, name, written),
        ),
        _outcomes(workspace, versions.iterations),
    )


def _written(evaluation: Artifact) -> TuneloopConfig | None:
    """Return the configuration that an evaluation was made from, if its file is still there."""
    try:
        config = load_config(*origin_of(evaluation))
    except ConfigError:
        return None
    return config if config.name == evaluation.name else None


def _marked(workspace: Workspace, name: str, config: TuneloopConfig | None) -> Marked:
    """Return what people's marks ask for, of those that the configuration lets count."""
    waiting: list[int] = []
    wanted: set[str] = set()
    for is_scored in (False, True):
        dataset = name + SCORED_SUFFIX * is_scored
        marks = _marks(workspace, dataset, config)
        wanted |= {mark.content_id for mark in marks if mark.kind == "more_like_this"}
        # Without such rows no evaluation reads the marks on them.
        is_read = not is_scored or config is None or config.evaluation.sources
        versions = workspace.published("datasets", dataset) if marks and is_read else []
        states = states_of(marks, workspace.with_files(versions)) if is_read else []
        waiting.append(sum(state.state == "waiting" for state in states))
    return Marked(waiting[0], len(wanted), waiting[1])


def _marks(workspace: Workspace, dataset: str, config: TuneloopConfig | None) -> list[Mark]:
    """Return the marks on a dataset's rows that count; none of a file that cannot be read here."""
    if config is not None:
        with contextlib.suppress(DataError):
            return marks_for(config, workspace, scored=dataset != config.name)
        return []
    return ReviewStore(workspace.location).marks(dataset) if has_store(workspace.location) else []


def _was_done(command: str, before: Sequence[Artifact], made_of: Sequence[Artifact]) -> bool | None:
    """Return whether artifacts have what a command changes; None where it changes no setting.

    Args:
        before: What the advice was about: a command keeps some of its settings.
    """
    had, has = settings_of(before), settings_of(made_of)
    asked = {key: value for key, value in advised(command).items() if had.get(key) != value}
    if not asked:
        return None
    return all(key in has and has[key] == value for key, value in asked.items())


def _outcomes(workspace: Workspace, iterations: Sequence[Iteration]) -> list[Outcome]:
    """Return what came of advice on versions that have a next one with rows of the same test.

    Where another metric decides, what was told is in another unit, and nothing is held against it.
    """
    if not has_store(workspace.location):
        return []
    steps = {before.ref: (before, now) for before, now in pairwise(iterations)}
    advice = ReviewStore(workspace.location).advice()
    # What several actions changed together is held against one: a forecast, or the highest bound.
    judged: dict[tuple[str, str], str] = {}
    order = ("forecast", "measured", "at most", "unknown")
    for given in sorted(advice, key=lambda one: order.index(one.basis)):
        judged.setdefault((given.evaluation, given.command), given.uid)
    found = []
    for given in advice:
        if given.evaluation not in steps:
            continue
        before, now = steps[given.evaluation]
        if now.change is None or now.metric != before.metric:
            continue
        gain = json.loads(given.gain)
        parts = ([*one.made_of, workspace.open(one.ref)] for one in (before, now))
        was_done = _was_done(given.command, *parts)
        if was_done and judged[given.evaluation, given.command] != given.uid:
            was_done = None
        found.append(
            Outcome(
                given.title,
                given.basis,
                given.evaluation,
                Gain(*gain) if gain else None,
                now.ref,
                now.change["value"],
                now.changed,
                now.change["low"],
                now.change["high"],
                was_done,
            )
        )
    return found
