"""The advice on an evaluation, from what its workspace holds."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pyarrow.compute as pc
import yaml

from tuneloop.artifacts import Artifact, Workspace
from tuneloop.config import Origin, TuneloopConfig
from tuneloop.evals.reporting.actions import Action, comes_first
from tuneloop.evals.reporting.advice import Situation, advise
from tuneloop.evals.reporting.formatting import format_change
from tuneloop.evals.reporting.history import Iteration, history
from tuneloop.evals.reporting.overview import read_json
from tuneloop.evals.scoring.metrics import Metric
from tuneloop.evals.scoring.results import Evaluation
from tuneloop.marks import SCORED_SUFFIX
from tuneloop.records import ARMS, TRAIN_LIMIT

# A gain that is smaller than the first, and surely smaller than the second, is not worth the work.
HARDLY, SURELY_LESS = 0.01, 0.03
_ROWS_KEY = "data.num_train_examples"
# What a sweep sets for each of its trainings.
_OF_A_TRIAL = ("training.seed", "training.eval_every_steps")


class Marked(NamedTuple):
    """How many marks wait for the next preparation, how many rows people want more of, and how many
    marks wait for the next evaluation: those on rows of `evaluation.sources`."""

    num_waiting: int = 0
    num_wanted: int = 0
    num_to_score: int = 0


UNMARKED = Marked()


class Versions(NamedTuple):
    """The versions of an evaluation, oldest first, and what came of each."""

    artifacts: list[Artifact]
    iterations: list[Iteration]


def read_versions(workspace: Workspace, name: str, newest: Sequence[Artifact] = ()) -> Versions:
    """Return the versions of an evaluation; none if there is none.

    Args:
        newest: What is about to be published.

    Raises:
        ArtifactError: One of them cannot be read.
    """
    published = workspace.published()
    own = [workspace.open(a.ref) for a in published if (a.kind, a.name) == ("evaluations", name)]
    own += newest
    others = [a for a in published if a.kind != "evaluations"]
    return Versions(own, history([*others, *own], name))


def actions_after(
    workspace: Workspace,
    evaluation: Evaluation,
    versions: Versions,
    config: TuneloopConfig | None,
    marked: Marked = UNMARKED,
) -> list[Action]:
    """Return what to do after the newest version of an evaluation, the best first.

    Args:
        evaluation: That version.
        config: As it is now; None where its file is not there.
    """
    artifact, iteration = versions.artifacts[-1], versions.iterations[-1]
    parts = {part.kind: part for part in iteration.made_of}
    dataset, model = parts.get("datasets"), parts.get("models")
    trained = model.manifest["config"].get("training", {}) if model else {}
    split = dataset.manifest["config"].get("data", {}).get("split", {}) if dataset else {}
    origin = config.origin if config else origin_of(artifact)
    is_scored = dataset is not None and dataset.name.endswith(SCORED_SUFFIX)
    rows = _trained_on(workspace, model, dataset)
    made_of = [*iteration.made_of, *([rows] if rows and rows is not dataset else []), artifact]
    settings = settings_of(made_of) | ({"model.base": config.model.base} if config else {})
    # Answers that an earlier version had took their time then.
    evaluated_s = float(artifact.manifest["duration_s"])
    again_s = max(0.0, _asked_s(evaluation, artifact, config) - evaluated_s)
    situation = Situation(
        evaluation,
        artifact.ref,
        origin.file,
        iteration.took_s + again_s,
        int(trained.get("num_epochs") or 1),
        _newest_curve(workspace, artifact.name, model, settings, evaluation.primary),
        *marked,
        config.generation if config else None,
        int(rows.manifest["metrics"].get("num_train_rows", 0)) if rows else 0,
        _num_spare_rows(workspace.open(rows.ref)) if rows and not is_scored else 0,
        _kept(config, made_of) if config else origin.overrides,
        float(model.manifest["duration_s"]) if model else 0.0,
        evaluated_s + again_s,
        int(artifact.manifest["config"].get("evaluation", {}).get("max_tokens", 0)),
        is_scored
        or (
            bool(config.evaluation.arms)
            if config
            else any(arm["name"] not in ARMS for arm in evaluation.arms)
        ),
        split.get("group_by") or "",
    )
    return after_what_came(
        advise(situation),
        steps_between(versions),
        settings_of(made_of),
        evaluation.metric(evaluation.primary),
    )


def _trained_on(
    workspace: Workspace, model: Artifact | None, scored: Artifact | None
) -> Artifact | None:
    """Return the dataset that a model was trained on, which may be another than the one that was
    scored; None where it is gone."""
    wanted = model.manifest["config"].get("dataset") if model else None
    if scored is None or wanted in (None, scored.train_fingerprint):
        return scored
    found = (a for a in workspace.published("datasets") if a.train_fingerprint == wanted)
    return next(found, None)


def _asked_s(evaluation: Evaluation, artifact: Artifact, config: TuneloopConfig | None) -> float:
    """Return the seconds that the candidate's answers took, whenever; 0 where nothing tells."""
    told = artifact.manifest.get("resources", {}).get("concurrency")
    at_once = told or (config.evaluation.concurrency if config else 0)
    is_own = pc.equal(evaluation.column("arm"), evaluation.candidate["name"])
    total = pc.sum(evaluation.column("latency_s").filter(is_own)).as_py()
    return (total or 0.0) / at_once if at_once else 0.0


def origin_of(evaluation: Artifact) -> Origin:
    """Return from where the configuration came that made an evaluation."""
    # An evaluation of an earlier version does not say.
    told = evaluation.manifest.get("resources", {}).get("configuration")
    return Origin(**told) if told else Origin(f"{evaluation.name}.yaml")


def _newest_curve(
    workspace: Workspace,
    name: str,
    model: Artifact | None,
    settings: Mapping[str, Any],
    primary: str,
) -> dict[str, Any]:
    """Return the newest learning curves of a name that say something of a model, see
    `fitting_curves`; empty where there are none."""
    for sweep in reversed(workspace.published("sweeps", name)):
        curve = read_json(workspace.open(sweep.ref), "curve.json") or {}
        found = fitting_curves(curve, settings, primary)
        if found["curves"] and _is_trained_alike(workspace, sweep, model, curve.get("keys", ())):
            return found
    return {}


def _is_trained_alike(
    workspace: Workspace, sweep: Artifact, model: Artifact | None, keys: Sequence[str]
) -> bool:
    """Whether a sweep's models were trained as another one but for what was varied.

    All of them share the rest, so one of them tells. What is gone tells nothing against it.
    """
    inputs = sweep.manifest["inputs"]
    trial = next((a for a in workspace.published("models") if a.ref in inputs), None)
    if model is None or trial is None:
        return True
    ours, theirs = ({**_flat(a.manifest["config"])} for a in (model, trial))
    bases = [a.manifest["config"].get("base_fingerprint") for a in (model, trial)]
    return ("model.base" in keys or bases[0] == bases[1]) and all(
        ours[key] == theirs[key]
        for key in ours.keys() & theirs.keys() - {*keys, *_OF_A_TRIAL}
        if key.startswith("training.")
    )


def fitting_curves(
    curve: dict[str, Any], settings: Mapping[str, Any], primary: str
) -> dict[str, Any]:
    """Return `curve.json` with those curves alone that are of these settings and this metric, over
    several volumes.

    What more rows bring by another learning rate, say, or to another score, says nothing here.

    Args:
        settings: By dotted key.
        primary: The metric that decides.
    """
    keys = [key for key in curve.get("keys", ()) if key != _ROWS_KEY]
    series = {
        ", ".join(f"{key}={cell['values'][key]}" for key in keys)
        for cell in curve.get("cells", ())
        if all(key in settings and settings[key] == cell["values"][key] for key in keys)
    }
    curves = [
        one
        for one in curve.get("curves", ())
        if curve.get("metric", primary) == primary
        and (not keys or one["series"] in series)
        and len({size for size, _ in one["points"]}) > 1
    ]
    return {**curve, "curves": curves}


def _num_spare_rows(dataset: Artifact) -> int:
    """Return how many train rows `data.num_train_examples` left out of a dataset."""
    card = read_json(dataset, "card.json") or {}
    reasons = card.get("reasons", [])
    return sum(r["rows"] for r in reasons if r["reason"].startswith(TRAIN_LIMIT))


def _kept(config: TuneloopConfig, made_of: Sequence[Artifact]) -> list[str]:
    """Return what the command line has to say so that a version's settings stay: overrides."""
    written = _flat(config.model_dump(mode="json"))
    kept = {o.partition("=")[0]: o for o in config.origin.overrides}
    kept |= {
        key: f"{key}={json.dumps(value)}"
        for key, value in settings_of(made_of).items()
        if key in written and written[key] != value
    }
    return list(kept.values())


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a configuration, or a manifest, by dotted key; no lists."""
    found: dict[str, Any] = {}

    def add(prefix: str, section: Mapping[str, Any]) -> None:
        for name, value in section.items():
            if isinstance(value, dict):
                add(f"{prefix}{name}.", value)
            elif not isinstance(value, list):
                found[f"{prefix}{name}"] = value

    for name in ("training", "data", "evaluation"):
        add(f"{name}.", config.get(name) or {})
    return found


def settings_of(made_of: Sequence[Artifact]) -> dict[str, Any]:
    """Return the settings of artifacts together, by dotted key."""
    return {k: v for a in made_of for k, v in _flat(a.manifest["config"]).items()}


def _rows_of(made_of: Sequence[Artifact]) -> list[Any]:
    """Return the content of the files that datasets were made of, and what marks changed in it.

    No setting tells them: without them a step to more rows of other files is one to more rows.
    """
    manifests = [a.manifest for a in made_of if a.kind == "datasets"]
    return [
        [[name.rpartition(":")[2] for name in m["inputs"]], m["config"].get("fixes")]
        for m in manifests
    ]


def advised(command: str) -> dict[str, Any]:
    """Return the settings that a command gives to the next version; empty where it makes none."""
    words = shlex.split(command.partition(" && ")[0])
    if words[1:2] not in (["run"], ["train"], ["evaluate"]):
        return {}
    parts = [word.partition("=") for word in words[3:] if "=" in word]
    found = {key: _value(text) for key, _, text in parts}
    # As `_flat` finds them in what was made.
    return {
        key: value
        for key, value in found.items()
        if re.match(r"(training|data|evaluation)\.(?!.*\d)", key)
        and not isinstance(value, dict | list)
    }


def _value(text: str) -> Any:
    """Return the value of an override as a manifest has it: 5e-4 is a text to YAML."""
    value = yaml.safe_load(text)
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


class Change(NamedTuple):
    """What a setting was, and what it becomes."""

    before: Any
    after: Any

    def goes_on_with(self, earlier: Change) -> bool:
        """Whether it is of the same kind: a number that rises, or falls, as it did before."""
        values = (*self, *earlier)
        if not all(isinstance(value, int | float) for value in values):
            return True
        return bool((self.after > self.before) == (earlier.after > earlier.before))


class Step(NamedTuple):
    """From one version to the next: the settings that differ, and what it brought.

    Args:
        changed: By dotted key.
        change: Paired difference of the scores.
    """

    changed: Mapping[str, Change]
    change: dict[str, Any]

    @property
    def hardly_helped(self) -> bool:
        """Whether it brought little, and surely not much."""
        high = self.change["high"]
        return high is not None and high < SURELY_LESS and self.change["value"] < HARDLY

    @property
    def surely_helped(self) -> bool:
        """Whether it brought something, whatever chance did."""
        return self.change["low"] is not None and self.change["low"] > 0

    def has(self, changes: Mapping[str, Change]) -> bool:
        """Whether it changed these settings in the same direction, beside others perhaps."""
        return bool(changes) and all(
            key in self.changed and change.goes_on_with(self.changed[key])
            for key, change in changes.items()
        )


def steps_between(versions: Versions) -> list[Step]:
    """Return the steps between versions, oldest first."""
    settings = [
        settings_of([*iteration.made_of, artifact]) | {"rows": _rows_of(iteration.made_of)}
        for artifact, iteration in zip(*versions, strict=True)
    ]
    return [
        Step(
            {k: Change(before.get(k), v) for k, v in now.items() if v != before.get(k)},
            iteration.change,
        )
        for iteration, now, before in zip(
            versions.iterations[1:], settings[1:], settings, strict=False
        )
        if iteration.change
    ]


def after_what_came(
    actions: Sequence[Action], steps: Sequence[Step], now: dict[str, Any], metric: Metric
) -> list[Action]:
    """Return actions in the light of what earlier changes brought.

    One that goes on with a change which surely helped by itself comes before all whose gain is a
    bound or not known; one that goes on with a change which hardly helped comes last.

    Args:
        actions: The best first.
        steps: Between the versions, oldest first; the last one of a setting counts.
        now: Settings of the newest version.
        metric: What scores mean.
    """
    if metric.kind == "number":
        return list(actions)
    places = []
    for action in actions:
        changes = {
            k: Change(now[k], value)
            for k, value in advised(action.command).items()
            if now.get(k, value) != value
        }
        step = next((s for s in reversed(steps) if s.has(changes)), None)
        place = 0 if comes_first(action, metric) else 2
        if step is not None and step.hardly_helped:
            place = 3
        elif step is not None and step.surely_helped and changes.keys() == step.changed.keys():
            place = min(place, 1)
        else:
            step = None
        if step is not None:
            came = format_change(step.change, metric)
            action = replace(action, why=f"{action.why} The last step of it brought {came}.")
        places.append((place, action))
    return [action for _, action in sorted(places, key=lambda one: one[0])]
