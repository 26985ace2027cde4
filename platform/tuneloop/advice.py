"""What to do next in a workspace, and what came of the advice that was given before."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tuneloop.artifacts import Workspace
from tuneloop.config import GenerationConfig
from tuneloop.errors import ArtifactError, Problem
from tuneloop.evals.reporting.advice import Action, Gain, Situation, advise, read_curve
from tuneloop.evals.reporting.formatting import format_difference, format_estimate
from tuneloop.evals.reporting.history import Iteration, history
from tuneloop.evals.scoring.metrics import Metric
from tuneloop.evals.scoring.results import Evaluation
from tuneloop.review.fixes import states_of
from tuneloop.review.given import GivenAdvice
from tuneloop.review.store import ReviewStore, has_store

log = logging.getLogger("tuneloop.advice")


class Outcome(NamedTuple):
    """Advice that was given, beside the version that came after.

    Args:
        gain: What it was to bring.
        change: Score of the next version less that of the one it was about.
        changed: What differs between the two versions, in words: whatever of it was advised.
    """

    title: str
    basis: str
    evaluation: str
    gain: Gain | None
    next_evaluation: str
    change: float
    changed: str

    @property
    def came_true(self) -> bool | None:
        """Whether the change is within what was told; None where nothing was."""
        if self.gain is None:
            return None
        low = 0.0 if self.basis == "at most" else self.gain.low
        return low <= self.change <= self.gain.high

    def describe(self, metric: Metric) -> str:
        """Return the outcome in words."""
        told = "nothing" if self.gain is None else format_difference(self.gain.value, metric)
        prefix = "at most " if self.gain is not None and self.basis == "at most" else ""
        return (
            f"{self.title}: {prefix}{told} was told, {format_difference(self.change, metric)} came "
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
        """How often what was told came true, in words."""
        judged = [o.came_true for o in self.outcomes if o.came_true is not None]
        if not judged:
            return "none of it said how much"
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
                store.add(GivenAdvice.of(self.reference, action.title, action.basis, gain))
        except ArtifactError as error:
            log.warning("the advice is not kept: %s", error.problems[0].got)


def advice_for(
    name: str,
    workspace: Workspace,
    config_file: str,
    num_epochs: int,
    teacher: GenerationConfig | None = None,
) -> Advice:
    """Return what to do after the newest evaluation of a name.

    Args:
        config_file: For the commands.
        num_epochs: Of the training.
        teacher: Who can write rows; None where none is configured.

    Raises:
        ArtifactError: There is no evaluation of this name, or it cannot be read.
    """
    published = workspace.published()
    versions = [a for a in published if (a.kind, a.name) == ("evaluations", name)]
    if not versions:
        raise ArtifactError(
            Problem(
                "there is no evaluation to go on from",
                where=f"evaluations/{name}",
                remedy=f"tuneloop run {config_file}",
            )
        )
    opened = [workspace.open(version.ref) for version in versions]
    evaluation = Evaluation.load(opened[-1])
    found = history([*(a for a in published if a.kind != "evaluations"), *opened], name)
    metric = evaluation.metric(evaluation.primary)
    sweeps = [workspace.open(a.ref) for a in published if (a.kind, a.name) == ("sweeps", name)]
    datasets = [a for a in published if (a.kind, a.name) == ("datasets", name)]
    marks = ReviewStore(workspace.location).marks(name) if has_store(workspace.location) else []
    situation = Situation(
        evaluation,
        versions[-1].ref,
        config_file,
        found[-1].took_s,
        num_epochs,
        read_curve(sweeps),
        sum(state.state == "waiting" for state in states_of(marks, datasets)),
        len({mark.content_id for mark in marks if mark.kind == "more_like_this"}),
        teacher,
    )
    estimate = evaluation.candidate["scores"][evaluation.primary]
    return Advice(
        workspace,
        versions[-1].ref,
        f"{evaluation.candidate['name']}, {evaluation.primary} {format_estimate(estimate, metric)}",
        metric,
        advise(situation),
        _outcomes(workspace, found),
    )


def _outcomes(workspace: Workspace, iterations: Sequence[Iteration]) -> list[Outcome]:
    """Return what came of advice on versions that have a next one."""
    if not has_store(workspace.location):
        return []
    after = dict(zip([i.ref for i in iterations], iterations[1:], strict=False))
    score = {i.ref: i.value for i in iterations}
    found = []
    for given in ReviewStore(workspace.location).advice():
        following, before = after.get(given.evaluation), score.get(given.evaluation)
        if following is None or following.value is None or before is None:
            continue
        gain = json.loads(given.gain)
        found.append(
            Outcome(
                given.title,
                given.basis,
                given.evaluation,
                Gain(*gain) if gain else None,
                following.ref,
                following.value - before,
                following.changed,
            )
        )
    return found
