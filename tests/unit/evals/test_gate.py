"""The gate: verdicts, floors, rows that were trained on, what CI reads, and the command itself."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from tuneloop import pipeline
from tuneloop.artifacts import Workspace
from tuneloop.cli import main
from tuneloop.config import FloorConfig, TaskConfig, TuneloopConfig
from tuneloop.errors import ConfigError
from tuneloop.evals.reporting.gate import decide, to_junit, to_markdown
from tuneloop.evals.scoring.comparison import compare, summarise
from tuneloop.evals.scoring.intervals import Resampling
from tuneloop.evals.scoring.metrics import Scorer
from tuneloop.evals.scoring.predictions import Prediction
from tuneloop.evals.scoring.results import Evaluation
from tuneloop.evals.scoring.slices import Slice, describe_slices, find_slices

TASK = TaskConfig(type="classification", labels=["yes", "no"])


def evaluate(old: list[int], new: list[int], margin: float = 0.05) -> Evaluation:
    """Return the evaluation of two arms that are right where a list has 1."""
    ids = [f"r{index:04d}" for index in range(len(old))]
    scorer = Scorer(TASK, dict.fromkeys(ids, "yes"))
    rows = [
        Prediction(
            key, arm, json.dumps([{"role": "user", "content": key}]), "yes",
            "yes" if right else "no", "stop", 1, 1, 0.1, "scored", scores={"accuracy": right},
        )
        for arm, scores in (("old", old), ("new", new))
        for key, right in zip(ids, scores, strict=True)
    ]  # fmt: skip
    settings = Resampling(num_resamples=100)
    slices = [Slice("topic", "billing", frozenset(ids[:20])), Slice("topic", "odd", frozenset())]
    return Evaluation(
        "gate",
        rows,
        summarise(rows, scorer, settings),
        compare(rows, scorer, settings, margin),
        describe_slices(rows, slices[:1], scorer, 0.95),
    )


def test_the_verdict_goes_by_the_interval_and_the_margin() -> None:
    half = [1, 0] * 100
    verdicts = {
        "better": decide(evaluate(half, [1] * 160 + [0] * 40)),
        "worse": decide(evaluate([1] * 160 + [0] * 40, half)),
        "not worse": decide(evaluate(half, half)),
        "cannot tell": decide(evaluate(half[:30], half[1:31])),
    }
    assert {name: result.verdict for name, result in verdicts.items()} == {n: n for n in verdicts}
    assert [result.passed for result in verdicts.values()] == [True, False, True, False]
    # 30 rows of which every one differs: 0.05 takes about (1.96 + 0.84)**2 / 0.05**2 of them.
    (check,) = verdicts["cannot tell"].checks
    assert check.rows_needed == pytest.approx(3140, rel=0.02)
    assert "about 3,100 rows would tell" in check.detail


def test_a_floor_of_a_part_says_by_what_it_is_reached() -> None:
    told = evaluate([1] * 100, [1] * 100)
    floors = [FloorConfig(at_least=0.5, by="topic")]
    assert decide(told, floors).checks[-1].name == "at least 50.0% on topic = billing"
    together = replace(
        told,
        metrics=told.metrics | {"primary": "macro_f1"},
        comparison=told.comparison | {"primary": "macro_f1"},
    )
    (part,) = decide(together, floors).checks[1:]
    assert part.name == "at least 50.0% on topic = billing, by accuracy"


def test_two_ways_to_ask_one_model_have_a_verdict() -> None:
    told = evaluate([1, 0] * 100, [1] * 160 + [0] * 40)
    old, new = told.arms
    bound = replace(told, metrics=told.metrics | {"arms": [{**old, "free_arm": "new"}, new]})
    assert decide(bound).verdict == "better"


def test_a_small_loss_that_is_shown_passes_within_the_margin_and_not_without() -> None:
    old = [1] * 1000
    new = [0] * 8 + [1] * 992
    assert decide(evaluate(old, new, margin=0.02)).verdict == "not worse"
    assert decide(evaluate(old, new, margin=0.005)).verdict == "worse"


def test_one_model_is_not_worse_than_itself_however_few_rows_there_are() -> None:
    few = evaluate([1, 0, 1, 0, 1] * 4, [1, 0, 1, 0, 1] * 4, margin=0.01)
    assert decide(few).verdict == "cannot tell"
    assert decide(few, is_same=True).passed


def test_a_model_is_held_against_itself_with_answers_of_a_form() -> None:
    evaluation = evaluate([1] * 200, [0] * 100 + [1] * 100)
    evaluation.metrics["arms"][0]["free_arm"] = "new"
    assert evaluation.candidate_pairs() == []
    assert decide(evaluation).verdict == "worse"


def test_plain_text_has_no_points_for_a_margin(tmp_path: Path) -> None:
    source = {"path": "rows.jsonl", "format": "text"}
    told = {"name": "t", "task": {"type": "language_modeling"}, "model": {"base": "none"}}
    config = TuneloopConfig.model_validate(told | {"data": {"sources": [source]}})
    with pytest.raises(ConfigError) as raised:
        pipeline.gate(config, Workspace(tmp_path), "base", "finetuned")
    assert raised.value.problems[0].where == "evaluation.margin"


def test_floors_are_reached_only_where_the_interval_shows_it() -> None:
    evaluation = evaluate([1] * 500, [1] * 14 + [0] * 6 + [1] * 480)
    outcomes = {
        least: decide(evaluation, [FloorConfig(at_least=least, by="topic", value="billing")])
        for least in (0.4, 0.6, 0.9)
    }
    assert [result.checks[1].outcome for result in outcomes.values()] == [
        "reached", "cannot tell", "missed",
    ]  # fmt: skip
    assert [result.passed for result in outcomes.values()] == [True, False, False]
    # 70% of 20: Wilson's lower end is 48.1%; the distance to 60% is less than half of it.
    assert outcomes[0.6].checks[1].rows_needed == round(20 * ((0.7 - 0.4810) / 0.1) ** 2)
    assert decide(evaluation, [FloorConfig(at_least=0.9)]).checks[1].outcome == "reached"
    with pytest.raises(ConfigError) as raised:
        decide(evaluation, [FloorConfig(at_least=0.9, by="topic", value="refunds")])
    assert raised.value.problems[0].allowed == "billing"


def test_a_floor_has_to_hold_with_all_missing_answers_wrong() -> None:
    evaluation = evaluate([1] * 500, [1] * 480 + [0] * 20)
    rows = [
        replace(p, status="unscored", scores={}, finish_reason=None, completion="", error="lost")
        if p.arm == "new" and (index < 6 or 300 <= index < 360)
        else p
        for arm in ("old", "new")
        for index, p in enumerate(p for p in evaluation.predictions if p.arm == arm)
    ]
    scorer = Scorer(TASK, {p.example_id: "yes" for p in rows})
    part = Slice("topic", "billing", frozenset(p.example_id for p in rows[:100]))
    evaluation = Evaluation(
        "gate", rows, summarise(rows, scorer, Resampling()), compare(rows, scorer, Resampling()),
        describe_slices(rows, [part], scorer, 0.95),
    )  # fmt: skip
    # 414 of 434 answers are right, 94 of 94 of the part; of all rows 82.8%, of the part 94%.
    floors = [
        FloorConfig(at_least=0.82),
        FloorConfig(at_least=0.9),
        FloorConfig(at_least=0.93, by="topic"),
        FloorConfig(at_least=0.95, by="topic"),
    ]
    checks = decide(evaluation, floors).checks[1:]
    assert [check.outcome for check in checks] == ["reached", "cannot tell"] * 2
    assert checks[1].detail.endswith("too many answers are missing to tell")


def test_a_floor_of_a_column_that_parts_the_rows_as_another_does_is_asked_for() -> None:
    evaluation = evaluate([1] * 100, [0] * 20 + [1] * 80)
    column = {
        p.example_id: "b" if int(p.example_id[1:]) < 20 else "o" for p in evaluation.predictions
    }
    columns = {"team": column, "topic": {key: value * 2 for key, value in column.items()}}
    scorer = Scorer(TASK, dict.fromkeys(column, "yes"))
    found = find_slices(evaluation.predictions, columns, scorer, "question")
    told = replace(evaluation, slices=describe_slices(evaluation.predictions, found, scorer, 0.95))
    for by, names in (("team", ["b", "o"]), ("topic", ["bb", "oo"])):
        checks = decide(told, [FloorConfig(at_least=0.5, by=by)]).checks[1:]
        assert {c.name.rpartition(" = ")[2]: c.outcome for c in checks} == dict(
            zip(names, ("missed", "reached"), strict=True)
        )
    (one,) = decide(told, [FloorConfig(at_least=0.5, by="topic", value="bb")]).checks[1:]
    assert one.name == "at least 50.0% on topic = bb"


def test_a_candidate_that_was_trained_on_the_rows_does_not_pass() -> None:
    evaluation = evaluate([1, 0] * 50, [1] * 100)
    parts = {name: {"value": 1.0, "n": n} for name, n in (("all", 100), ("flagged", 3))}
    evaluation.metrics["arms"][1]["contamination"] = parts
    result = decide(evaluation)
    assert (result.verdict, result.passed) == ("better", False)
    assert result.checks[1].detail == "3 of 100 rows are in its training data"


def test_a_model_of_another_seed_is_rarely_called_better_or_worse() -> None:
    generator = np.random.default_rng(0)
    verdicts = []
    for _ in range(30):
        chances = generator.beta(2, 1, 100)
        old, new = (generator.random((2, 100)) < chances).astype(int).tolist()
        verdicts.append(decide(evaluate(old, new)).verdict)
    # At a true rate of 5% more than five of 30 have a chance of 0.3%.
    assert sum(verdict in ("better", "worse") for verdict in verdicts) <= 5


def test_what_ci_reads_is_well_formed_whatever_the_names_are() -> None:
    evaluation = evaluate([1] * 30, [0] * 30)
    awkward = Slice("topic", "a|<b>\x01", frozenset(f"r{n:04d}" for n in range(9)))
    rows = evaluation.predictions
    scorer = Scorer(TASK, {p.example_id: p.reference for p in rows})
    evaluation.slices.update(describe_slices(rows, [awkward], scorer, 0.95))
    result = decide(evaluation, [FloorConfig(at_least=0.5, by="topic")])
    suite = ElementTree.fromstring(to_junit(result))[0]
    assert (suite.get("tests"), suite.get("failures")) == ("2", "2")
    assert suite[1].get("name") == "at least 50.0% on topic = a|<b>"
    assert r"| at least 50.0% on topic = a\|<b> | **missed** |" in to_markdown(result, "")


def test_the_command_compares_and_answers_with_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    generator = random.Random(0)
    rows = [
        {"prompt": f"may one do {index}?", "completion": "no", "topic": f"t{index % 3}"}
        for index in range(120)
    ]
    answers = {"same": 0.1, "old": 0.1, "bad": 0.6}
    for name, share in answers.items():
        given = [
            row | {"completion": "yes" if generator.random() < share else "no"} for row in rows
        ]
        Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, given)))
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arms = ", ".join(f"{name}: {{answers: {name}.jsonl}}" for name in answers)
    source = "{path: rows.jsonl, format: prompt_completion}"
    Path("gate.yaml").write_text(
        f"""
name: tiny
task: {{type: classification, labels: ["yes", "no"]}}
model: {{base: none}}
data: {{sources: [{source}]}}
evaluation: {{margin: 0.15, num_resamples: 100, arms: {{{arms}}}, sources: [{source}]}}
"""
    )
    gate = ["gate", "gate.yaml", "--against", "old", "--candidate"]
    written = ["--junit", "gate.xml", "--markdown", "gate.md"]
    assert main([*gate, "bad", *written, "--json"]) == 3
    printed = json.loads(capfd.readouterr().out)
    assert printed["artifact"] == "evaluations/tiny-gate@v1"
    assert printed["gate"]["verdict"] == "worse"
    assert 'type="worse"' in Path("gate.xml").read_text()
    assert "Not passed" in Path("gate.md").read_text()
    assert main([*gate, "same", "evaluation.floors=[{at_least: 0.5, by: topic}]"]) == 0
    out = capfd.readouterr().out
    assert "passed: same is not worse than `old`" in out
    assert out.count("reached") == 3
    # The floors are no part of what was measured: the evaluation is the same.
    assert main([*gate, "same", "--json", "evaluation.floors=[{at_least: 0.99}]"]) == 3
    assert json.loads(capfd.readouterr().out)["reused"] is True
    assert main([*gate, "same", "--junit", "no/such/folder.xml"]) == 2
