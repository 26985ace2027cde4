"""An evaluation's results: the predictions of its arms and what was computed from them."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from tuneloop.artifacts import Artifact
from tuneloop.evals.scoring.error_tags import ERROR_TAGS
from tuneloop.evals.scoring.metrics import FIELD_PREFIX, PRECISION_PREFIX, Metric, in_task
from tuneloop.evals.scoring.nearest import as_nearest, open_nearest
from tuneloop.evals.scoring.pairing import Between, Pairs
from tuneloop.evals.scoring.predictions import (
    JoinedPredictions,
    Prediction,
    StoredPredictions,
    column_of,
)


@dataclass(frozen=True)
class Evaluation:
    """An evaluation's results.

    Args:
        predictions: Every example of every arm.
        metrics: Content of `metrics.json`.
        comparison: Content of `comparison.json`.
        slices: Content of `slices.json`; empty in an evaluation of an earlier version.
        nearest: Rows of `nearest.parquet`: what may explain wrong answers of the candidate.
        others: Arms of another evaluation that stand beside its own.
        changed: Examples that were held against other right answers there.
    """

    name: str
    predictions: Sequence[Prediction]
    metrics: dict[str, Any]
    comparison: dict[str, Any]
    slices: dict[str, Any] = field(default_factory=dict)
    nearest: ds.Dataset = field(default_factory=lambda: as_nearest([]))
    others: Collection[str] = ()
    changed: Collection[str] = ()

    @classmethod
    def load(cls, artifact: Artifact) -> Evaluation:
        """Return the results an artifact holds; predictions are read when they are looked at."""
        metrics = json.loads((artifact.path / "metrics.json").read_text(encoding="utf-8"))
        comparison = json.loads((artifact.path / "comparison.json").read_text(encoding="utf-8"))
        predictions = StoredPredictions(artifact.path, list(metrics["metrics"]))
        stored = artifact.path / "slices.json"
        slices = json.loads(stored.read_text(encoding="utf-8")) if stored.exists() else {}
        nearest = open_nearest(artifact.path)
        return cls(artifact.name, predictions, metrics, comparison, slices, nearest)

    def beside(self, other: Evaluation, name: str, changed: Collection[str] = ()) -> Evaluation:
        """Return this evaluation with the arms of another one before its own.

        Args:
            other: Its arms are called `ARM of NAME`. Only what both have is compared: examples by
                their ids, and metrics.
            name: Of the other evaluation.
            changed: Examples that the two hold against different right answers: they are left out
                of pairs of arms of both.
        """
        metrics = {
            k: v for k, v in self.metrics["metrics"].items() if k in other.metrics["metrics"]
        }
        arms = [{**arm, "name": f"{arm['name']} of {name}"} for arm in other.arms]
        return replace(
            self,
            predictions=JoinedPredictions(other.predictions, f" of {name}", self.predictions),
            metrics={**self.metrics, "metrics": metrics, "arms": [*arms, *self.arms]},
            others=[arm["name"] for arm in arms],
            changed=changed,
        )

    def column(self, name: str) -> pa.ChunkedArray:
        """Return a column of the predictions, see `column_of`."""
        return column_of(self.predictions, name)

    def clusters(self) -> dict[str, str]:
        """Return the cluster of each example; empty where it is one of its own."""
        columns = (self.column(name).to_pylist() for name in ("example_id", "cluster"))
        return dict(zip(*columns, strict=True))

    def near(self, example_ids: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
        """Return by example the training rows that may explain an answer of the candidate."""
        found: dict[str, list[dict[str, Any]]] = {example_id: [] for example_id in example_ids}
        is_meant = ds.field("example_id").isin(pa.array(example_ids, pa.string()))
        for row in self.nearest.to_table(filter=is_meant).to_pylist():
            found[row["example_id"]].append(row)
        return found

    @property
    def primary(self) -> str:
        return str(self.metrics["primary"])

    @property
    def row_metric(self) -> str:
        """The metric by which single answers are right or wrong: macro-F1 is of all together."""
        # An evaluation of an earlier version does not say.
        return str(self.metrics.get("row_metric", self.primary))

    @property
    def arms(self) -> list[dict[str, Any]]:
        return list(self.metrics["arms"])

    @property
    def candidate(self) -> dict[str, Any]:
        """The arm the headline is about: the last one."""
        return self.arms[-1]

    @property
    def tasks(self) -> dict[str, dict[str, str]]:
        """The `type` and `primary` metric of each task of a mixture; empty otherwise."""
        # An evaluation of an earlier version has none.
        return dict(self.metrics.get("tasks", {}))

    def metric(self, name: str) -> Metric:
        """Return what a metric means."""
        return Metric(**self.metrics["metrics"][name])

    @property
    def tags(self) -> dict[str, str]:
        """What each error tag says, by name."""
        # An evaluation of an earlier version does not say.
        return dict(self.metrics.get("error_tags", ERROR_TAGS))

    def task_types(self) -> set[str]:
        """Return the types of all tasks."""
        return {task["type"] for task in self.tasks.values()} or {self.metrics["task_type"]}

    def secondary(self) -> list[str]:
        """Return the metrics to show beside the primary one; in a mixture, each task's primary."""
        if self.tasks:
            return [in_task(name, task["primary"]) for name, task in self.tasks.items()]
        return [
            name
            for name in self.metrics["metrics"]
            if name != self.primary and not name.startswith((FIELD_PREFIX, PRECISION_PREFIX))
        ]

    def pair(self, before: str, after: str, metric: str = "", task: str | None = None) -> Pairs:
        """Return the examples of two arms in the order to show them, see `Pairs`.

        Args:
            before: Name of the arm to compare with.
            after: Name of the arm that is compared.
            metric: What decides about an answer; `row_metric` if empty.
            task: The only one of a mixture's tasks to look at.
        """
        name = metric or self.row_metric
        # In a mixture a metric may be that of one task alone.
        only = task or (name.rpartition("/")[0] if self.tasks else "")
        found = Pairs.of(self.predictions, Between(before, after, only), name, self.metric(name))
        if not self.changed or (before in self.others) == (after in self.others):
            return found
        ids = found.sides("example_id")[1]
        changed = pc.is_in(ids, value_set=pa.array([*self.changed], pa.string()))
        return found.where(pc.invert(changed).to_numpy())

    @property
    def judge(self) -> dict[str, Any]:
        """What the judge and people said; empty where there was no judge."""
        return dict(self.comparison.get("judge") or {})

    @property
    def forgetting(self) -> dict[str, Any]:
        """The models on general tasks, before and after; empty where that was not asked for."""
        return dict(self.comparison.get("forgetting") or {})

    def candidate_pairs(self) -> list[dict[str, Any]]:
        """Return the candidate against every other arm, in the order of the arms.

        The candidate's own model with constrained answers is no opponent.
        """
        name = self.candidate["name"]
        own = {arm["name"] for arm in self.arms if arm.get("free_arm") == name}
        pairs = [p for p in self.comparison["pairs"] if p["arm"] == name and p["other"] not in own]
        return list(reversed(pairs))

    def strongest_other(self) -> str | None:
        """Return the name of the best arm that is not the candidate, or None."""
        opponents = [pair["other"] for pair in self.candidate_pairs()]
        others = [arm for arm in self.arms if arm["name"] in opponents]
        if not others:
            return None
        sign = -1 if self.metric(self.primary).better == "lower" else 1

        def score(arm: dict[str, Any]) -> float:
            # A metric may say nothing of any of an arm's answers.
            value = arm["scores"][self.primary]["value"]
            return -math.inf if value is None else sign * value

        return str(max(others, key=score)["name"])

    def scores_of_models(self) -> dict[str, dict[str, float | None]]:
        """Return the primary score of each model of the arms that are several trainings."""
        return {
            arm["name"]: {m["name"]: m["scores"][self.primary]["value"] for m in arm["models"]}
            for arm in self.arms
            if "models" in arm
        }

    def headline_numbers(self) -> dict[str, Any]:
        """Return the numbers worth seeing in a list of artifacts, for the manifest."""
        return {
            "primary": self.primary,
            "scores": {arm["name"]: arm["scores"][self.primary]["value"] for arm in self.arms},
            **({"models": models} if (models := self.scores_of_models()) else {}),
            "differences": {
                pair["other"]: {
                    key: pair["differences"][self.primary][key]
                    for key in ("value", "low", "high", "p_value")
                }
                for pair in self.candidate_pairs()
            },
            "num_examples": self.metrics["num_examples"],
            "num_unscored": sum(arm["num_unscored"] for arm in self.arms),
            **({"num_unjudged": judge["num_missing"]} if (judge := self.judge) else {}),
        }
