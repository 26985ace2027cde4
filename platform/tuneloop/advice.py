"""What to do next in a workspace, and what came of the advice that was given before."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import yaml

from tuneloop.artifacts import Artifact, Workspace
from tuneloop.config import TuneloopConfig
from tuneloop.data.schema import TRAIN_LIMIT
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
# A change hardly helped that brought less than a point, and surely less than three: as in sweeps.
_HARDLY, _SURELY_LESS = 0.01, 0.03


class Outcome(NamedTuple):
    """Advice that was given, beside the version that came after.

    Args:
        gain: What it was to bring.
        change: Score of the next version less that of the one it was about, over the examples that
            both scored.
        low, high: Its 95% interval, paired; None where no example is shared.
        was_done: Whether the next version has the settings that were advised; None where that
            cannot be told: other actions have the same, or none is named.
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
        low = 0.0 if self.basis == "at most" else self.gain.low
        return low <= self.change <= self.gain.high

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


def advice_for(
    name: str,
    workspace: Workspace,
    config_file: str,
    config: TuneloopConfig | None = None,
) -> Advice:
    """Return what to do after the newest evaluation of a name.

    Args:
        config_file: For the commands.
        config: What is in it; None where that is not known.

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
    parts = {artifact.kind: artifact for artifact in found[-1].made_of}
    dataset, model = parts.get("datasets"), parts.get("models")
    trained = model.manifest["config"].get("training", {}) if model else {}
    split = dataset.manifest["config"].get("data", {}).get("split", {}) if dataset else {}
    situation = Situation(
        evaluation,
        versions[-1].ref,
        config_file,
        found[-1].took_s,
        int(trained.get("num_epochs") or 1),
        read_curve(sweeps),
        sum(state.state == "waiting" for state in states_of(marks, datasets)),
        len({mark.content_id for mark in marks if mark.kind == "more_like_this"}),
        config.generation if config else None,
        int(dataset.manifest["metrics"].get("num_train_rows", 0)) if dataset else 0,
        _num_spare_rows(workspace.open(dataset.ref)) if dataset else 0,
        _kept(config, [*found[-1].made_of, opened[-1]]) if config else [],
        float(model.manifest["duration_s"]) if model else 0.0,
        int(opened[-1].manifest["config"].get("evaluation", {}).get("max_tokens", 0)),
        bool(config and config.evaluation.arms),
        split.get("group_by") or "",
    )
    settings = [_all_settings([*i.made_of, a]) for i, a in zip(found, opened, strict=True)]
    estimate = evaluation.candidate["scores"][evaluation.primary]
    return Advice(
        workspace,
        versions[-1].ref,
        f"{evaluation.candidate['name']}, {evaluation.primary} {format_estimate(estimate, metric)}",
        metric,
        after_what_failed(advise(situation), _steps(found, settings), settings[-1], metric),
        _outcomes(workspace, found),
    )


def _num_spare_rows(dataset: Artifact) -> int:
    """Return how many train rows `data.num_train_examples` left out of a dataset."""
    file = dataset.path / "card.json"
    if not file.is_file():
        return 0
    card = json.loads(file.read_text(encoding="utf-8"))
    reasons = card.get("reasons", [])
    return sum(r["rows"] for r in reasons if r["reason"].startswith(TRAIN_LIMIT))


def _kept(config: TuneloopConfig, made_of: Sequence[Artifact]) -> list[str]:
    """Return the settings of a version that the configuration has otherwise, as overrides."""
    written = _settings(config.model_dump(mode="json"))
    return [
        f"{key}={json.dumps(value)}"
        for artifact in made_of
        for key, value in _settings(artifact.manifest["config"]).items()
        if key in written and written[key] != value
    ]


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a configuration, or a manifest, by dotted key; no lists."""
    found: dict[str, Any] = {}

    def add(prefix: str, section: dict[str, Any]) -> None:
        for name, value in section.items():
            if isinstance(value, dict):
                add(f"{prefix}{name}.", value)
            elif not isinstance(value, list):
                found[f"{prefix}{name}"] = value

    for name in ("training", "data", "evaluation"):
        add(f"{name}.", config.get(name) or {})
    return found


def _all_settings(made_of: Sequence[Artifact]) -> dict[str, Any]:
    """Return the settings of artifacts together."""
    return {k: v for a in made_of for k, v in _settings(a.manifest["config"]).items()}


def _advised(command: str) -> dict[str, Any]:
    """Return the settings that a command gives to the next version; empty where it makes none."""
    words = shlex.split(command.partition(" && ")[0])
    if words[1:2] not in (["run"], ["train"], ["evaluate"]):
        return {}
    parts = [word.partition("=") for word in words[3:] if "=" in word]
    return {key: yaml.safe_load(value) for key, _, value in parts}


def _was_done(command: str, made_of: Sequence[Artifact]) -> bool | None:
    """Return whether artifacts have the settings of a command; None where it names none."""
    advised, has = _advised(command), _all_settings(made_of)
    if not advised:
        return None
    return all(key in has and has[key] == value for key, value in advised.items())


class Step(NamedTuple):
    """From one version to the next: the settings that differ, and what it brought."""

    changed: frozenset[str]
    change: dict[str, Any]

    @property
    def hardly_helped(self) -> bool:
        """Whether it brought little, and surely not much."""
        high = self.change["high"]
        return high is not None and high < _SURELY_LESS and self.change["value"] < _HARDLY


def _steps(iterations: Sequence[Iteration], settings: Sequence[dict[str, Any]]) -> list[Step]:
    """Return the steps between versions, oldest first."""
    return [
        Step(frozenset(k for k, v in now.items() if v != before.get(k)), iteration.change)
        for iteration, now, before in zip(iterations[1:], settings[1:], settings, strict=False)
        if iteration.change
    ]


def after_what_failed(
    actions: Sequence[Action], steps: Sequence[Step], now: dict[str, Any], metric: Metric
) -> list[Action]:
    """Return actions with those last that go on with a change which hardly helped.

    Args:
        actions: The best first.
        steps: Between the versions, oldest first; the last one of a setting counts.
        now: Settings of the newest version.
        metric: What scores mean.
    """
    if metric.kind == "number":
        return list(actions)
    others, tried = [], []
    for action in actions:
        changes = {k for k, value in _advised(action.command).items() if now.get(k, value) != value}
        step = next((s for s in reversed(steps) if changes and changes <= s.changed), None)
        if step is None or not step.hardly_helped:
            others.append(action)
            continue
        came = format_difference(step.change["value"], metric)
        ends = [format_difference(step.change[end], metric, unit=False) for end in ("low", "high")]
        why = f"{action.why} The last step of it brought {came} ({' to '.join(ends)})."
        tried.append(replace(action, why=why))
    return others + tried


def _outcomes(workspace: Workspace, iterations: Sequence[Iteration]) -> list[Outcome]:
    """Return what came of advice on versions that have a next one."""
    if not has_store(workspace.location):
        return []
    after = dict(zip([i.ref for i in iterations], iterations[1:], strict=False))
    score = {i.ref: i.value for i in iterations}
    advice = ReviewStore(workspace.location).advice()
    # What several actions changed together is held against one: a forecast, or the highest bound.
    judged: dict[tuple[str, str], str] = {}
    order = ("forecast", "at most", "unknown")
    for given in sorted(advice, key=lambda one: order.index(one.basis)):
        judged.setdefault((given.evaluation, given.command), given.uid)
    found = []
    for given in advice:
        following, before = after.get(given.evaluation), score.get(given.evaluation)
        if following is None or following.value is None or before is None:
            continue
        gain = json.loads(given.gain)
        change = following.change or {}
        made_of = [*following.made_of, workspace.open(following.ref)]
        was_done = _was_done(given.command, made_of)
        if was_done and judged[given.evaluation, given.command] != given.uid:
            was_done = None
        found.append(
            Outcome(
                given.title,
                given.basis,
                given.evaluation,
                Gain(*gain) if gain else None,
                following.ref,
                change.get("value", following.value - before),
                following.changed,
                change.get("low"),
                change.get("high"),
                was_done,
            )
        )
    return found
