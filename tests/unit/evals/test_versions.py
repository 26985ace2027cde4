"""Versions of an evaluation: what changed between them, and what came of the advice."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evaluations import (
    by_macro_f1,
    make_config,
    make_evaluation,
    publish_evaluation,
    publish_version,
    titles,
)
from tuneloop.advice import advice_for
from tuneloop.artifacts import Artifact, Workspace
from tuneloop.evals.reporting.history import history
from tuneloop.evals.scoring.references import changed_references
from tuneloop.marks import Mark
from tuneloop.review.given import GivenAdvice
from tuneloop.review.store import URL_VARIABLE, ReviewStore


def test_versions_by_macro_f1_are_compared_and_by_another_metric_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    workspace = Workspace(tmp_path)
    first = make_evaluation({"base": 5, "finetuned": 80}, task="classification")
    publish_version(workspace, first, 100, 1)
    advice_for(workspace, "demo").keep()
    second = make_evaluation({"base": 5, "finetuned": 90}, task="classification")
    publish_version(workspace, by_macro_f1(second), 200, 1)
    # What was told is in points of accuracy.
    changed = advice_for(workspace, "demo")
    assert changed.outcomes == []
    changed.keep()
    third = make_evaluation({"base": 5, "finetuned": 96}, task="classification")
    publish_version(workspace, by_macro_f1(third), 400, 1)
    found = history(workspace.published(), "demo")
    assert [(i.metric, i.num_fixed, i.num_introduced) for i in found] == [
        ("accuracy", None, None), ("macro_f1", 10, 0), ("macro_f1", 6, 0)
    ]  # fmt: skip
    # All references are `yes`, so the mean over the labels is the F1 of that one.
    change = 2 * 0.96 / 1.96 - 2 * 0.9 / 1.9
    assert found[2].change["value"] == pytest.approx(change)
    assert 0 < found[2].change["low"] < change < found[2].change["high"]
    outcomes = advice_for(workspace, "demo").outcomes
    assert outcomes
    assert all(o.change == pytest.approx(change) for o in outcomes)
    # The next version answers other rows: nothing says what came.
    others = [replace(p, example_id=f"s{p.example_id}") for p in second.predictions]
    publish_version(workspace, by_macro_f1(replace(second, predictions=others)), 800, 1)
    assert advice_for(workspace, "demo").outcomes == outcomes
    assert history(workspace.published(), "demo")[-1].num_shared == 0


def test_a_corrected_reference_is_no_error_that_was_fixed(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    before = make_evaluation({"finetuned": 80})
    publish_version(workspace, before, 100, 1)
    # Six answers got better; five wrong ones are what their references were corrected to.
    now = make_evaluation({"finetuned": 86})
    corrected = [
        replace(p, reference=p.completion, scores=dict.fromkeys(p.scores, 1.0))
        if p.example_id >= "r095"
        else p
        for p in now.predictions
    ]
    publish_version(workspace, replace(now, predictions=corrected), 100, 1)
    last = history(workspace.published(), "demo")[-1]
    assert (last.num_fixed, last.num_introduced, last.num_shared) == (6, 0, 95)
    assert last.change
    assert last.change["value"] == pytest.approx(6 / 95)
    assert last.changed.endswith("; 5 rows not compared: right answers differ")


def test_rows_with_other_right_answers_are_found(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    # Several right answers are no change where they were so before; to accept one more is.
    for name, second, third in (("old", "p", []), ("new", "q", ["z"])):
        rows = [
            {
                "row_id": row,
                "messages": [
                    {"role": "user", "content": row},
                    {"role": "assistant", "content": answer},
                ],
                "accepted_answers": accepted,
            }
            for row, answer, accepted in (("a", "x", ["y"]), ("b", second, []), ("c", "r", third))
        ]
        with workspace.draft("datasets", name, name * 16) as draft:
            (draft.path / "test").mkdir()
            pq.write_table(pa.Table.from_pylist(rows), draft.path / "test" / "0.parquet")
            draft.publish(config={}, resources={}, inputs=[], metrics={})
    datasets = workspace.published("datasets")
    old, new = (
        Artifact("evaluations", "e", 1, tmp_path, "", {"config": {"dataset": name * 16}})
        for name in ("old", "new")
    )
    assert changed_references(old, new, datasets) == {"b", "c"}
    assert changed_references(old, old, datasets) == frozenset()


def test_marks_on_rows_scored_elsewhere_wait_for_the_next_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    workspace = Workspace(tmp_path)
    publish_version(workspace, make_evaluation({"base": 5, "finetuned": 80}), 100, 1)
    for kind, row in (("bad_row", "r1"), ("more_like_this", "r2")):
        ReviewStore(tmp_path).add(Mark(kind, row, "datasets/demo-scored@v1", "ann"))
    config = make_config({"type": "extraction"})
    asked = config.evaluation.model_copy(update={"sources": config.data.sources})
    scored = config.model_copy(update={"evaluation": asked})
    waiting = "Apply the marks that wait on rows of `evaluation.sources`: 1"
    commands = {a.title: a.command for a in advice_for(workspace, "demo", scored).actions}
    assert commands[waiting].startswith("tuneloop evaluate ")
    assert "Add training rows like those that people marked: 1" in commands
    # Nothing reads them where no such rows are scored.
    assert waiting not in titles(advice_for(workspace, "demo", config).actions)


@pytest.mark.parametrize(("source", "is_alone"), [("a", True), ("b", False)])
def test_what_other_rows_brought_is_not_said_of_a_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, is_alone: bool
) -> None:
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    workspace = Workspace(tmp_path)
    publish_version(workspace, make_evaluation({"base": 5, "finetuned": 60}), 100, 1)
    better = make_evaluation({"base": 5, "finetuned": 90})
    publish_version(workspace, better, 200, 1, source=source)
    (more,) = (a for a in advice_for(workspace, "demo").actions if "400 rows" in a.title)
    assert ("The last step of it brought" in more.why) is is_alone


def test_of_rows_scored_elsewhere_the_forecast_is_from_the_rows_that_were_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    workspace = Workspace(tmp_path)
    evaluation = make_evaluation({"base": 5, "finetuned": 80})
    publish_version(workspace, evaluation, 200, 1)
    told = {"resources": {}, "inputs": [], "metrics": {"num_train_rows": 0}}
    with workspace.draft("datasets", "demo-scored", "s" * 64) as draft:
        draft.publish(config={}, **told)
    (model,) = workspace.published("models")
    publish_evaluation(workspace, evaluation, "e" * 64, "s" * 64, model.fingerprint, told)
    line = {"series": "", "points": [[50, 0.5], [100, 0.6]], "forecast": {"forecasts": [
        {"num_examples": n, "times": t, "step": {"value": v, "low": 0.01, "high": 0.06}}
        for n, t, v in ((200, 2, 0.04), (400, 4, 0.02))
    ]}}  # fmt: skip
    with workspace.draft("sweeps", "demo", "w" * 64) as draft:
        keys = ["data.num_train_examples"]
        content = {"keys": keys, "metric": "exact_match", "cells": [], "curves": [line]}
        (draft.path / "curve.json").write_text(json.dumps(content))
        draft.publish(config={}, **told)
    (rows,) = (a for a in advice_for(workspace, "demo").actions if a.basis == "forecast")
    # Not the step from 100 rows, which is larger; and what is trained is scored on the same rows.
    assert rows.gain is not None
    assert (rows.gain.value, rows.title[-10:]) == (0.02, "400 in all")
    assert " && tuneloop evaluate demo.yaml" in rows.command


def test_a_version_with_several_answers_to_a_row_is_compared_by_shares(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    second = make_evaluation({"finetuned": 60})
    halves = [replace(p, scores={**p.scores, "exact_match": 0.5}) for p in second.predictions]
    meanings = second.metrics["metrics"]
    meanings = {**meanings, "exact_match": {**meanings["exact_match"], "kind": "ratio"}}
    first = replace(second, predictions=halves, metrics={**second.metrics, "metrics": meanings})
    publish_version(workspace, first, 100, 1)
    publish_version(workspace, second, 100, 2)
    change = history(workspace.published(), "demo")[-1].change
    assert change is not None
    # 60 rows gained a half and 40 lost one: t with 99 degrees of freedom is 1.984.
    half = 1.984 * (0.24 / 99) ** 0.5
    ends = [change[name] for name in ("value", "low", "high")]
    assert ends == pytest.approx([0.1, 0.1 - half, 0.1 + half], abs=1e-4)


def test_a_setting_that_stays_as_it_was_is_nothing_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    workspace = Workspace(tmp_path)
    publish_version(workspace, make_evaluation({"finetuned": 80}), 100, 1, learning_rate=5e-4)
    first = advice_for(workspace, "demo")
    first.keep()
    assert all(
        "training.learning_rate=5e-04" in a.command for a in first.actions if " run " in a.command
    )
    same = "tuneloop run demo.yaml training.learning_rate=5e-4"
    given = GivenAdvice.of(first.reference, "Apply the marks", "unknown", "null", same)
    ReviewStore(tmp_path).add(given)
    publish_version(workspace, make_evaluation({"finetuned": 90}), 100, 2, learning_rate=5e-4)
    done = {o.title: o.was_done for o in advice_for(workspace, "demo").outcomes}
    assert done["Apply the marks"] is None
    assert done["Train for 2 epochs in place of 1"] is True


def test_advice_is_kept_and_held_against_the_next_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    workspace = Workspace(tmp_path)
    publish = partial(publish_version, workspace)
    publish(make_evaluation({"base": 5, "finetuned": 80}), 100, 1)
    first = advice_for(workspace, "demo")
    assert first.outcomes == []
    first.keep()
    first.keep()
    # Advised later, with the same command: what is forecast is judged, not the bound.
    command = next(a.command for a in first.actions if a.title.startswith("Get"))
    assert command == "tuneloop run demo.yaml data.num_train_examples=200 workspace=here"
    gain = json.dumps([0.2, 0.15, 0.25])
    late = GivenAdvice.of(first.reference, "Forecast", "forecast", gain, command)
    assert len(ReviewStore(tmp_path).advice()) == len(first.actions)
    publish(make_evaluation({"base": 5, "finetuned": 90}), 200, 1)
    second = advice_for(workspace, "demo")
    ReviewStore(tmp_path).add(late)
    both = f"{command.replace('run', 'train')} && {command.replace('run', 'evaluate')}"
    ReviewStore(tmp_path).add(GivenAdvice.of(first.reference, "Two", "unknown", "null", both))
    with_forecast = advice_for(workspace, "demo")
    assert [(o.title, o.came_true) for o in with_forecast.outcomes if o.was_done] == [
        ("Forecast", False), ("Two", None)
    ]  # fmt: skip
    assert with_forecast.calibration == "0 of 1 changes are within what was told"
    assert second.reference == "evaluations/demo@v2"
    assert len(second.outcomes) == len(first.actions)
    # Each of the 100 rows is its own cluster: 10 changed for the better, none for the worse.
    assert all(o.change == pytest.approx(0.1) for o in second.outcomes)
    assert all(0.03 < o.low < 0.06 < 0.14 < o.high < 0.19 for o in second.outcomes)
    done = [o for o in second.outcomes if o.was_done]
    assert [o.title for o in done] == ["Get `a` right: train on 200 rows in place of 100"]
    assert done[0].came_true
    undone = {o.title: o.was_done for o in second.outcomes}
    assert undone["Train for 2 epochs in place of 1"] is False
    # A sweep leaves no setting in the next version.
    assert undone["Measure whether more rows would help"] is None
    assert second.calibration == "1 of 1 changes are within what was told"
    words = done[0].describe(second.metric)
    assert "at most +20.0 points was told, +10.0 points (+" in words
    assert "came with evaluations/demo@v2 (datasets/demo@v2; data.num_train_examples" in words
    longer_command = f"{command} evaluation.max_tokens=80"
    same = GivenAdvice.of(first.reference, "Same", "at most", gain, longer_command)
    ReviewStore(tmp_path).add(same)
    outcomes = advice_for(workspace, "demo").outcomes
    assert [o.was_done for o in outcomes if o.title == "Same"] == [True]
    ReviewStore(tmp_path).add(Mark("bad_row", "r1", "datasets/demo@v1", "ann"))
    waiting = "Apply the marks that wait: 1"
    assert waiting in titles(advice_for(workspace, "demo").actions)
    data = make_config({"type": "extraction"}).data.model_copy(update={"fixes": False})
    unread = make_config({"type": "extraction"}).model_copy(update={"data": data})
    assert waiting not in titles(advice_for(workspace, "demo", unread).actions)
    # The file says other rows and answers: a command of the next advice keeps those of the version.
    config = make_config({"type": "extraction"})
    kept = advice_for(workspace, "demo", config)
    (longer,) = (a for a in kept.actions if "2 epochs" in a.title)
    assert longer.command.endswith(
        "training.num_epochs=2 data.num_train_examples=200 data.split.num_test_examples=20 "
        "data.split.test_ratio=null evaluation.max_tokens=80"
    )
    assert json.loads(json.dumps(second.as_dict()))["evaluation"] == "evaluations/demo@v2"
    # What differs in how answers were asked for is a change as well.
    second.keep()
    publish(make_evaluation({"base": 5, "finetuned": 90}), 200, 1, max_tokens=160)
    outcomes = advice_for(workspace, "demo").outcomes
    newest = {o.changed for o in outcomes if o.next_evaluation == "evaluations/demo@v3"}
    assert newest == {"datasets/demo@v3; models/demo@v3; evaluation.max_tokens: 80 → 160"}
