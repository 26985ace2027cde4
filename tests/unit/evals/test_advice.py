"""What to do next: the rules, what they rest on and what was tried before."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from evaluations import (
    TASKS,
    by_macro_f1,
    make_config,
    make_evaluation,
    publish_version,
    situation,
    titles,
)
from tuneloop.advice import advice_for
from tuneloop.artifacts import Workspace
from tuneloop.config import GenerationConfig
from tuneloop.evals.reporting.actions import Gain
from tuneloop.evals.reporting.advice import advise
from tuneloop.evals.reporting.situation import (
    Change,
    Step,
    after_what_came,
    fitting_curves,
)
from tuneloop.evals.scoring.comparison import compare, summarise
from tuneloop.evals.scoring.intervals import Resampling
from tuneloop.evals.scoring.metrics import Scorer
from tuneloop.evals.scoring.nearest import as_nearest
from tuneloop.evals.scoring.predictions import (
    FILE,
    Prediction,
    StoredPredictions,
    write_predictions,
)
from tuneloop.evals.scoring.results import Evaluation


def steps(evaluation: Evaluation, **more) -> str:
    actions = advise(situation(evaluation, **more))
    return "\n".join(f"{a.title}. {a.why} {a.command}" for a in actions)


def test_actions_follow_the_errors():
    cut = make_evaluation({"base": 0, "finetuned": 80}, wrong_answer='{"a": ', finish="length")
    assert "evaluation.max_tokens" in steps(cut)
    assert "training.num_epochs" in steps(cut)
    assert "training.num_epochs" in steps(make_evaluation({"base": 50, "finetuned": 50}))
    assert "than the base model" in steps(make_evaluation({"base": 50, "finetuned": 50}))
    wide = make_evaluation({"base": 0, "finetuned": 10}, n=20)
    assert "run demo.yaml data.split.num_test_examples=" in steps(wide, num_spare_rows=1_000)
    assert "So many are not to spare" in steps(wide, num_spare_rows=100)
    # Seven answers cannot tell; that comes before any conclusion from what is not clearly better.
    few = steps(make_evaluation({"base": 3, "finetuned": 4}, 7, "generation"))
    assert few.index("Score more test examples") < few.index("Train for 3 epochs")
    assert "harder" in steps(make_evaluation({"base": 0, "finetuned": 100}))
    worse = make_evaluation({"base": 50, "finetuned": 30})
    assert "got worse" in steps(worse)
    # What is measured comes before every bound.
    first = advise(situation(worse))[0]
    assert first.title == "Use the base model until training brings more"
    assert first.basis == "measured"
    assert first.gain is not None
    assert first.gain.value == pytest.approx(0.2)
    assert 0.1 < first.gain.low < 0.2 < first.gain.high < 0.3
    # A handful that is right says nothing yet.
    handful = steps(make_evaluation({"base": 0, "finetuned": 8}, n=8))
    assert "harder" not in handful
    assert "Train for" not in handful
    assert "Score more test examples" in handful
    assert "max_tokens" not in steps(make_evaluation({"base": 0, "finetuned": 80}))
    # Words in common say nothing about the truth; exact answers need no vote.
    writing = make_evaluation({"base": 0, "finetuned": 80}, task="generation")
    assert "judge the answers blind" in steps(writing)
    assert "blind" not in steps(make_evaluation({"base": 0, "finetuned": 80}))


def test_a_lagging_field_is_named():
    settings = {"type": "extraction"}
    reference, wrong = '{"name": "x", "year": 1}', '{"name": "x", "year": 2}'
    scorer = Scorer(make_config(settings).task, {"r": reference})
    rows = [
        Prediction(
            f"r{index}", "finetuned", "[]", reference, text, "stop", 1, 1, 0.1, "scored",
            scores=scorer.score(reference, text),
        )
        for index, text in enumerate([reference] * 6 + [wrong] * 4)
    ]  # fmt: skip
    resampling = Resampling(num_resamples=200)
    evaluation = Evaluation(
        "demo", rows, summarise(rows, scorer, resampling), compare(rows, scorer, resampling)
    )
    (lagging,) = (a for a in advise(situation(evaluation)) if a.title.startswith("Get `"))
    assert "`year`" in lagging.title
    assert lagging.why == "4 of 4 wrong answers are wrong in this field alone."


def test_one_model_in_two_forms_is_one_opinion_of_a_reference() -> None:
    doubt = "Look whether these references are right"
    two = {"base": 5, "finetuned+constrained": 80, "finetuned": 80}
    evaluation = make_evaluation(two)
    (doubtful,) = (a for a in advise(situation(evaluation)) if a.title == doubt)
    assert doubtful.gain is not None
    assert doubtful.gain.value == pytest.approx(0.2)
    del two["base"]
    evaluation = make_evaluation(two)
    bound = next(arm for arm in evaluation.arms if arm["name"] == "finetuned+constrained")
    bound["free_arm"] = "finetuned"
    assert doubt not in titles(advise(situation(evaluation)))


def test_only_rows_that_ask_the_same_are_said_to_mislead() -> None:
    evaluation = make_evaluation({"base": 5, "finetuned": 80}, task="classification")
    for similarity, num_rows in ((0.3, []), (0.9, [20])):
        row = {"conflicts": True, "similarity": similarity}
        near = as_nearest([row | {"example_id": p.example_id} for p in evaluation.predictions])
        actions = advise(situation(replace(evaluation, nearest=near)))
        assert [a.num_rows for a in actions if "say otherwise" in a.title] == num_rows


def test_advice_from_the_stored_columns_is_that_from_the_rows(tmp_path: Path) -> None:
    made = make_evaluation({"base": 5, "other": 70, "finetuned": 60}, wrong_answer="{", n=90)
    rows = [
        replace(
            p,
            completion=p.completion if number % 7 else f" {p.completion}\n{number}",
            error_tags=[*p.error_tags, *["cut_off"] * (number % 3 == 0)],
            cluster=str(number % 30) * (number % 2),
        )
        for number, p in enumerate(made.predictions)
    ]
    # One answer is missing.
    rows[-1] = replace(rows[-1], status="unscored", scores={}, completion="", error_tags=[])
    names = list(made.metrics["metrics"])
    write_predictions(rows, names, tmp_path)
    stored = replace(made, predictions=StoredPredictions(tmp_path, names))
    near = as_nearest([{"example_id": "r070", "conflicts": True, "similarity": 0.9}])
    first, second = (
        advise(situation(replace(one, nearest=near)))
        for one in (replace(made, predictions=rows), stored)
    )
    assert first == second
    titles = [action.title for action in first]
    for begin in ("Allow longer", "Teach the form", "Look whether", "Read what got worse"):
        assert any(title.startswith(begin) for title in titles), begin
    assert list(stored.predictions) == rows
    # A file of an earlier version, without some of the columns.
    table = pq.read_table(tmp_path / FILE)
    pq.write_table(table.drop_columns(["cluster", "error_tags"]), tmp_path / FILE)
    old = replace(made, predictions=StoredPredictions(tmp_path, names))
    plain = [replace(p, cluster="", error_tags=[]) for p in rows]
    assert advise(situation(old)) == advise(situation(replace(made, predictions=plain)))


def test_bounds_are_the_share_of_what_is_wrong() -> None:
    evaluation = make_evaluation({"base": 5, "finetuned": 80}, finish="length", wrong_answer="{")
    actions = advise(situation(evaluation))
    assert not any(a.title.startswith("Teach answers to end") for a in actions)
    cut = next(a for a in actions if a.title == "Allow longer answers")
    assert cut.gain is not None
    assert cut.gain.value == pytest.approx(0.2)
    assert 0.1 < cut.gain.low < 0.2 < cut.gain.high < 0.31
    assert (cut.num_rows, cut.basis) == (20, "at most")
    assert "20 of 20 wrong answers" in cut.why
    assert cut.command == "tuneloop evaluate demo.yaml evaluation.max_tokens=160"
    # Both arms say the same, and it is not the reference.
    doubted = next(a for a in actions if a.title.startswith("Look whether"))
    assert doubted.num_rows == 20
    # The only field is wrong wherever the answer is.
    field = next(a for a in actions if a.title.startswith("Get `a` right"))
    assert field.gain == cut.gain
    assert "wrong=a" in field.page
    # By words in common no answer is taken to become all right: those cut off become like the rest.
    words = make_evaluation({"finetuned": 80}, task="generation", finish="length", wrong_answer="a")
    (overlap,) = (a for a in advise(situation(words)) if a.title == "Allow longer answers")
    assert overlap.gain is not None
    assert overlap.gain.value == pytest.approx(0.2)
    rows = [replace(p, scores={**p.scores, "token_f1": 0.4}) if p.example_id < "r080" else p
            for p in words.predictions]  # fmt: skip
    (overlap,) = (
        a for a in advise(situation(replace(words, predictions=rows))) if "longer" in a.title
    )
    assert overlap.gain is not None
    assert overlap.gain.value < 0.2 * 0.4 + 1e-9
    # As long as its reference and still going on: a higher limit is no help.
    evaluation = make_evaluation({"base": 5, "finetuned": 80}, finish="length")
    endless = advise(situation(evaluation))
    assert "Allow longer answers" not in titles(endless)
    taught = next(a for a in endless if a.title.startswith("Teach answers to end: train for 3"))
    assert (taught.num_rows, taught.gain, taught.cost_s) == (20, cut.gain, 130)
    assert taught.command == "tuneloop run demo.yaml training.num_epochs=3"
    assert [a.gain is None for a in actions] == sorted(a.gain is None for a in actions)
    longer = next(a for a in actions if a.title.startswith("Teach the form of the answer"))
    assert longer.cost_s == 130  # half of the training more, the rest as before
    assert longer.command == "tuneloop run demo.yaml training.num_epochs=3"


def test_commands_take_the_rows_that_are_there_and_change_nothing_else() -> None:
    evaluation = make_evaluation({"base": 5, "finetuned": 80})
    more = {"num_train_rows": 300, "num_spare_rows": 200, "kept": ["training.num_epochs=2"]}
    commands = {a.title: a.command for a in advise(situation(evaluation, **more))}
    taken = "tuneloop run demo.yaml data.num_train_examples=500 training.num_epochs=2"
    assert commands["Get `a` right: train on 500 rows in place of 300"] == taken
    assert list(commands.values()).count(taken) == 1
    longer = "tuneloop run demo.yaml training.num_epochs=3"
    assert commands["Train for 3 epochs in place of 2"] == longer
    assert commands["Measure whether more rows would help"] == (
        "tuneloop sweep demo.yaml 'sweep.parameters={data.num_train_examples: [75, 150, 300]}' "
        "training.num_epochs=2"
    )
    named = [a.command for a in advise(situation(evaluation, **more, has_arms=True))]
    assert taken.replace("run", "train") + " && " + taken.replace("run", "evaluate") in named
    # Without spare rows, 100 of the train rows become those that a sweep chooses by.
    more["num_spare_rows"] = 0
    commands = {a.title: a.command for a in advise(situation(evaluation, **more))}
    assert "[50, 100, 200]" in commands["Measure whether more rows would help"]
    assert not any("num_train_examples=" in command for command in commands.values())
    few = advise(situation(evaluation, **{**more, "num_train_rows": 120}))
    assert "Measure whether more rows would help" not in titles(few)


def test_a_field_that_a_row_does_not_have_is_not_wrong_in_it() -> None:
    references = ['{"a": 1, "b": 2}'] * 10 + ['{"a": 1}'] * 10
    # Four rows without `b` are wrong in `a` alone; in six more a `b` is invented.
    said = [*references[:10], *['{"a": 2}'] * 4, *['{"a": 1, "b": 3}'] * 6]
    ids = [f"r{number}" for number in range(20)]
    config = make_config({"type": "extraction"})
    scorer = Scorer(config.task, dict(zip(ids, references, strict=True)))
    rows = [
        Prediction(
            key, "finetuned", "[]", reference, text, "stop", 1, 1, 0.1, "scored",
            scores=scorer.score(reference, text),
        )
        for key, reference, text in zip(ids, references, said, strict=True)
    ]  # fmt: skip
    resampling = Resampling(num_resamples=100)
    told = summarise(rows, scorer, resampling), compare(rows, scorer, resampling)
    actions = advise(situation(Evaluation("demo", rows, *told)))
    found = {a.title.partition(" right")[0]: a.num_rows for a in actions if a.title[:3] == "Get"}
    assert found == {"Get `a`": 4, "Get `b`": 6}


def test_what_a_sweep_forecasts_and_marks_that_wait_are_named() -> None:
    evaluation = make_evaluation({"base": 5, "finetuned": 99})
    step, further = ({"value": v, "low": 0.01, "high": 0.06} for v in (0.04, 0.02))
    curve = {"curves": [{"series": "demo", "forecast": {"forecasts": [
        {"num_examples": 800, "times": 2, "step": step},
        {"num_examples": 1600, "times": 4, "step": further},
    ]}}]}  # fmt: skip
    actions = advise(situation(evaluation, curve=curve, num_waiting=3))
    assert (actions[0].gain, actions[0].basis) == (Gain(**step), "forecast")
    assert actions[0].title.endswith("800 in all")
    # A gain is told from as many rows as the model has, with the command where they are there.
    for now, spare, told in ((400, 500, (step, 800)), (800, 900, (further, 1600))):
        more = {"num_train_rows": now, "num_spare_rows": spare}
        found = advise(situation(evaluation, curve=curve, **more))
        (rows,) = (a for a in found if a.basis == "forecast")
        assert (rows.gain, rows.command) == (
            Gain(**told[0]), f"tuneloop run demo.yaml data.num_train_examples={told[1]}"
        )  # fmt: skip
    (rows,) = (a for a in advise(situation(evaluation, curve=curve, num_train_rows=400))
               if a.basis == "forecast")  # fmt: skip
    assert rows.why.endswith("First 400 rows have to be collected.")
    found = advise(situation(evaluation, curve=curve, num_train_rows=500, num_spare_rows=90))
    assert "forecast" not in {a.basis for a in found}
    (rows,) = (a for a in found if a.title == "Train on 590 rows in place of 500")
    assert rows.gain is None
    assert "Apply the marks that wait: 3" in titles(actions)
    assert "Stop, or make the test harder" in titles(actions)
    assert "Measure whether more rows would help" not in titles(actions)
    # Where nearly all is right, nothing is trained on.
    assert not any(title.startswith("Train for") for title in titles(actions))


def test_a_sweep_forecasts_for_its_own_settings_and_metric() -> None:
    rate, rows = "training.learning_rate", "data.num_train_examples"
    values = [{rate: r, rows: n} for r in (5e-4, 1e-5) for n in (100, 200)]
    curve = {
        "keys": [rate, rows],
        "metric": "exact_match",
        "cells": [{"values": value} for value in values],
        "curves": [
            {"series": f"{rate}={r}", "points": [[100, 0.5], [200, 0.6]]} for r in (5e-4, 1e-5)
        ],
    }
    found = fitting_curves(curve, {rate: 1e-5}, "exact_match")
    assert [one["series"] for one in found["curves"]] == [f"{rate}=1e-05"]
    assert fitting_curves(curve, {rate: 1e-5}, "fields_f1")["curves"] == []
    assert fitting_curves(curve, {rate: 1e-3}, "exact_match")["curves"] == []
    line = {"series": "", "points": [[100, 0.5], [200, 0.6]]}
    alone = {"keys": [rows], "metric": "exact_match", "cells": [], "curves": [line]}
    assert fitting_curves(alone, {}, "exact_match") == alone
    assert fitting_curves(alone, {}, "fields_f1")["curves"] == []
    assert fitting_curves({}, {}, "exact_match")["curves"] == []
    # Seeds or settings at one volume are no learning curve.
    level = {**alone, "curves": [{"series": "", "points": [[100, 0.5], [100, 0.6]]}]}
    assert fitting_curves(level, {}, "exact_match")["curves"] == []


def test_a_sweep_without_volumes_or_of_other_settings_hides_no_learning_curve(
    tmp_path: Path,
) -> None:
    workspace = Workspace(tmp_path)
    steps = [{"num_examples": n, "times": t, "step": {"value": v, "low": 0.01, "high": 0.06}}
             for n, t, v in ((200, 2, 0.04), (400, 4, 0.02))]  # fmt: skip
    line = {"series": "", "points": [[50, 0.5], [100, 0.6]], "forecast": {"forecasts": steps}}
    level = {"series": "", "points": [[100, 0.6]]}

    def publish_sweep(keys: list[str], curve: dict, model: str) -> None:
        with workspace.draft("sweeps", "demo", f"{len(workspace.published())}s" * 8) as draft:
            content = {"keys": keys, "metric": "exact_match", "cells": [], "curves": [curve]}
            (draft.path / "curve.json").write_text(json.dumps(content))
            draft.publish(config={}, resources={}, inputs=[model], metrics={})

    def advised() -> list[str]:
        return titles(advice_for(workspace, "demo").actions)

    more, measure = "to 200 in all", "Measure whether more rows would help"
    publish_version(workspace, make_evaluation({"base": 5, "finetuned": 80}), 100, 1)
    assert measure in advised()
    publish_sweep([], level, "models/demo@v1")
    assert measure in advised()
    publish_sweep(["data.num_train_examples"], line, "models/demo@v1")
    publish_sweep([], level, "models/demo@v1")
    assert measure not in advised()
    assert any(title.endswith(more) for title in advised())
    # Trained for longer, more rows bring something else.
    publish_version(workspace, make_evaluation({"base": 5, "finetuned": 80}), 100, 2)
    assert measure in advised()
    assert not any(title.endswith(more) for title in advised())


def test_parts_that_are_surely_worse_are_named() -> None:
    evaluation = make_evaluation({"base": 5, "finetuned": 80})
    part = {"by": "topic", "slice": "x", "value": 0.2, "low": 0.1, "high": 0.4, "n": 20,
            "rest": 0.95, "p_adjusted": 0.001}  # fmt: skip
    slices = {"arms": {"finetuned": [part, {**part, "slice": "y", "p_adjusted": 0.2}]}}
    actions = advise(situation(replace(evaluation, slices=slices)))
    (named,) = (a for a in actions if "topic" in a.title)
    # Of a group that the split keeps in the test no row can be added.
    grouped = advise(situation(replace(evaluation, slices=slices), group_by="topic"))
    assert not any("topic" in title for title in titles(grouped))
    assert named.gain is not None
    assert tuple(named.gain) == pytest.approx((0.15, 0.11, 0.17))
    assert named.command == "tuneloop label-next INPUTS.csv demo.yaml"
    # Of macro-F1 the scores of parts, which are shares of right answers, are no bound.
    labels = make_evaluation({"base": 5, "finetuned": 80}, task="classification")
    together = advise(situation(replace(by_macro_f1(labels), slices=slices)))
    (named_too,) = (a for a in together if "topic" in a.title)
    assert (named_too.gain, named_too.num_rows) == (None, 20)
    assert named_too.why == "20 test rows are such: 20.0%, the others 95.0%."
    # Rows of one cluster have no interval, and so no bound.
    only = {"arms": {"finetuned": [{**part, "low": None, "high": None}]}}
    (untold,) = (
        a for a in advise(situation(replace(evaluation, slices=only))) if "topic" in a.title
    )
    assert (untold.gain, untold.basis, untold.num_rows) == (None, "unknown", 20)
    answers = {"endpoint": "http://x/v1", "model": "m", "kind": "answers"}
    answers["sources"] = [{"path": "x.csv", "format": "text"}]
    for teacher, command in (
        (answers, "generation.kind=self_instruct 'generation.sources=[]'"),
        ({**answers, "kind": "harder", "sources": []}, ""),
    ):
        more = {"teacher": GenerationConfig.model_validate(teacher), "num_wanted": 2}
        actions = advise(situation(replace(evaluation, slices=slices), **more))
        commands = {a.command for a in actions if "generate" in a.command}
        start = "tuneloop generate demo.yaml generation.more_of="
        assert commands == {
            f"{start}{what} {command}".strip() for what in ("evaluations/demo@v1", "marks")
        }


@pytest.mark.parametrize("task", list(TASKS))
@pytest.mark.parametrize("right", [{"base": 40}, {"base": 5, "finetuned": 90}])
def test_every_kind_of_evaluation_gets_advice(task, right) -> None:
    actions = advise(situation(make_evaluation(right, task=task)))
    assert all(json.dumps(action.as_dict()) for action in actions)
    assert actions or "finetuned" not in right


@pytest.mark.parametrize(
    ("value", "high", "is_last"), [(-0.001, 0.016, True), (0.004, 0.04, False), (0.02, 0.05, False)]
)
def test_what_has_just_hardly_helped_is_not_advised_first_again(value, high, is_last) -> None:
    evaluation = make_evaluation({"base": 5, "finetuned": 80}, finish="length")
    actions = advise(situation(evaluation))
    again = "Teach answers to end: train for 3 epochs in place of 2"
    assert again in titles(actions)[:-1]
    change = {"value": value, "low": -0.018, "high": high}
    metric = evaluation.metric(evaluation.primary)
    rows = {"data.num_train_examples": Change(100, 200)}
    other = Step(rows, {"value": 0.0, "low": 0.0, "high": 0.0})
    steps = [Step({"training.num_epochs": Change(1, 2)}, change), other]
    now = {"training.num_epochs": 2, "training.seed": 0}
    found = after_what_came(actions, steps, now, metric)
    assert sorted(titles(found)) == sorted(titles(actions))
    assert (titles(found)[-1] == again) == is_last
    if is_last:
        assert "brought −0.1 points (−1.8 to +1.6)" in found[-1].why
        # Another setting had changed: nothing is known about more epochs.
        assert after_what_came(actions, [other], now, metric) == actions
        # Fewer epochs had brought nothing: that says nothing of more.
        fewer = Step({"training.num_epochs": Change(3, 2)}, change)
        assert after_what_came(actions, [fewer], now, metric) == actions
        better = {"value": 0.1, "low": 0.05, "high": 0.15}
        found = after_what_came(actions, [*steps, Step(steps[0].changed, better)], now, metric)
        assert titles(found)[0] == again
        assert "brought +10.0 points (+5.0 to +15.0)" in found[0].why
        # Beside another change it cannot be told which of them helped.
        both = Step({**steps[0].changed, **rows}, better)
        assert after_what_came(actions, [both], now, metric) == actions
