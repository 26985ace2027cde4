"""Several answers to a row, and several trainings as one arm."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from rich.console import Console

from spelt_words import WORDS, arms, publish_dataset, row
from tuneloop.artifacts import Workspace
from tuneloop.config import FloorConfig, TuneloopConfig
from tuneloop.evals.reporting.gate import decide
from tuneloop.evals.reporting.headline import write_headline
from tuneloop.evals.reporting.report import terminal_table
from tuneloop.evals.runner import evaluate, find_unanswered
from tuneloop.evals.scoring.results import Evaluation
from tuneloop.records import Arm, Endpoint

pytestmark = pytest.mark.usefixtures("short_waits")


def drawn(body: dict) -> dict:
    """Answer as a model does that is right in a share of the draws, by the seed."""
    word = body["messages"][-1]["content"].removeprefix("spell ")
    is_right = len(body["messages"]) > 2 or body["seed"] % 4 != 0
    return {
        "content": json.dumps({"word": word.upper() if is_right else "?", "letters": len(word)})
    }


def sampled(config: TuneloopConfig, num_samples: int) -> TuneloopConfig:
    settings = config.evaluation.model_dump() | {"temperature": 0.7, "num_samples": num_samples}
    return TuneloopConfig.model_validate(config.model_dump() | {"evaluation": settings})


def test_a_row_has_the_mean_of_its_sampled_answers(model_server, config, workspace, dataset):
    model_server.answer = drawn
    both = arms(model_server, dataset)
    once = evaluate(sampled(config, 1), workspace, dataset, both, "words").artifact
    seeds = [body["seed"] for body in model_server.requests if len(body["messages"]) == 2]
    # One seed for all rows would draw the same random numbers for each.
    assert len(set(seeds)) == 10
    assert "samples" not in pq.read_schema(once.path / "predictions.parquet").names

    model_server.requests.clear()
    four = evaluate(sampled(config, 4), workspace, dataset, both, "words").artifact
    # The first answer to each is there already, and both arms draw by the same seeds.
    assert len(model_server.requests) == 2 * 10 * 3
    seeds += [body["seed"] for body in model_server.requests if len(body["messages"]) == 2]
    assert len(set(seeds)) == 40
    rows = Evaluation.load(four).predictions
    assert len(rows) == 20
    base = [p for p in rows if p.arm == "base"]
    share = sum(seed % 4 != 0 for seed in seeds) / 40
    assert sum(p.scores["exact_match"] for p in base) / 10 == pytest.approx(share)
    assert 0 < share < 1
    for p in base:
        scores = [sample["score"] for sample in p.samples]
        assert p.scores["exact_match"] == sum(scores) / 4
        assert p.completion == p.samples[0]["completion"]
    evaluation = Evaluation.load(four)
    score = evaluation.arms[0]["scores"]["exact_match"]
    assert (score["n"], score["value"]) == (10, pytest.approx(share))
    assert score["low"] < share < score["high"]
    assert evaluation.metric("exact_match").kind == "ratio"
    assert evaluation.arms[0]["sampling"]["num_samples"] == 4
    assert 0 < evaluation.arms[0]["sampling"]["share"] <= 1
    assert evaluation.arms[1]["sampling"]["share"] in (0, None)
    assert "4 answers to each row" in (four.path / "report.html").read_text()
    # Fewer are part of more.
    model_server.requests.clear()
    evaluate(sampled(config, 2), workspace, dataset, both, "words")
    assert not model_server.requests


def test_a_row_without_one_of_its_answers_is_asked_for_that_one(
    model_server, config, workspace, dataset
):
    def answer(body):
        if is_down and body["seed"] == lost[0]:
            raise ValueError("overloaded")
        return drawn(body)

    is_down, lost = False, [-1]
    model_server.answer = answer
    base = arms(model_server, dataset)[:1]
    evaluate(sampled(config, 1), workspace, dataset, base, "elsewhere")
    lost, is_down = [model_server.requests[0]["seed"]], True
    again = Workspace(workspace.root.parent / "again")
    rows = [row(index, word) for index, word in enumerate(WORDS)]
    dataset = publish_dataset(again, rows, [row(100 + i, w * 2) for i, w in enumerate(WORDS)])
    first = evaluate(sampled(config, 3), again, dataset, base, "words").artifact
    assert first.manifest["metrics"]["num_unscored"] == 1
    is_down = False
    model_server.requests.clear()
    # A refusal for good is not asked again by itself; another evaluation of the same arm does.
    second = evaluate(sampled(config, 4), again, dataset, base, "words").artifact
    assert len([b for b in model_server.requests if b["seed"] == lost[0]]) == 1
    assert len(model_server.requests) == 10 + 1
    assert second.manifest["metrics"]["num_unscored"] == 0


def trained(server, name: str, *versions: int) -> Arm:
    """Return an arm of several trainings, one of which has seen nothing of what another has."""
    seen = {1: set(), 2: {"row-000"}, 3: set()}
    server.models += [f"models/words@v{n}" for n in versions]
    models = tuple(
        Arm(
            f"{name} (models/words@v{n})",
            Endpoint(server.url, f"models/words@v{n}"),
            (),
            f"training-{n}",
            trained_on=f"rows-{n}",
            find_seen=lambda questions, n=n: seen[n],
        )
        for n in versions
    )
    return Arm(name, Endpoint("", ""), trained_on="rows-1", models=models)


def by_training(body: dict) -> dict:
    """Answer as trainings that differ: the third, and the base, miss words with five letters."""
    word = body["messages"][-1]["content"].removeprefix("spell ")
    is_right = body["model"] not in ("parrot", "models/words@v3") or len(word) != 5
    content = json.dumps({"word": word.upper() if is_right else "?", "letters": len(word)})
    return {"content": content}


def test_several_trainings_are_one_arm(model_server, config, workspace, dataset, capsys):
    model_server.answer = by_training
    base = arms(model_server, dataset)[0]
    both = [base, trained(model_server, "three", 1, 2, 3)]
    artifact = evaluate(config, workspace, dataset, both, "words").artifact
    assert len(model_server.requests) == 4 * 10
    evaluation = Evaluation.load(artifact)
    rows = [p for p in evaluation.predictions if p.arm == "three"]
    assert len(rows) == 10
    for p in rows:
        assert p.models == [f"models/words@v{n}" for n in (1, 2, 3)]
        five = len(json.loads(p.samples[0]["completion"])["word"]) == 5
        assert p.scores["exact_match"] == pytest.approx(2 / 3 if five else 1)
        assert [s["scores"]["exact_match"] for s in p.samples] == [1, 1, 0 if five else 1]
    # What one of them was trained on is not unseen by the arm.
    assert [p.example_id for p in rows if p.contaminated] == ["row-000"]
    first, second = evaluation.arms
    scores = {m["name"]: m["scores"]["exact_match"]["value"] for m in second["models"]}
    assert scores == {"models/words@v1": 1, "models/words@v2": 1, "models/words@v3": 0.5}
    score = second["scores"]["exact_match"]
    assert (score["n"], score["value"]) == (10, pytest.approx(2.5 / 3))
    assert "rows and seeds" in score["method"]
    assert 0 < score["seed_share"] < 1
    # An arm that is one model has the interval of one, and costs are those of one answer.
    assert first["scores"]["exact_match"]["method"] == "Wilson"
    assert "models" not in first
    assert second["mean_prompt_tokens"] == first["mean_prompt_tokens"]
    pair = evaluation.comparison["pairs"][0]["differences"]["exact_match"]
    assert pair["test"] == "t, rows and seeds"
    assert artifact.manifest["metrics"]["models"] == {"three": scores}
    trainings = [f"training-{n}" for n in (1, 2, 3)]
    assert artifact.manifest["inputs"] == [dataset.ref, "weights-1", *trainings]
    assert evaluation.metrics["num_arms_scored"] == 4
    # Three trainings that differ much: more rows would not tell, and a gate says so.
    gate = decide(evaluation, [FloorConfig(at_least=0.6)])
    assert (gate.verdict, gate.passed) == ("cannot tell", False)
    assert [check.rows_needed for check in (gate.checks[0], gate.checks[-1])] == [None, None]
    for check in (gate.checks[0], gate.checks[-1]):
        assert "more trainings would have to tell" in check.detail
    assert "too few trainings to tell" in write_headline(evaluation).title
    report = (artifact.path / "report.html").read_text()
    assert "models/words@v3 50.0%" in report
    assert "Of an arm that is several trainings it covers both" in report
    Console(width=120).print(terminal_table(artifact))
    assert "models/words@v3" in capsys.readouterr().out


def test_what_each_training_answered_is_not_asked_again(model_server, config, workspace, dataset):
    model_server.answer = by_training
    evaluate(config, workspace, dataset, [trained(model_server, "three", 1, 2, 3)], "words")
    model_server.requests.clear()
    other, alone = trained(model_server, "two", 3, 2), trained(model_server, "one", 1).models[0]
    assert find_unanswered(config, workspace, dataset, [other, alone]) == []
    artifact = evaluate(config, workspace, dataset, [other, alone], "again").artifact
    assert not model_server.requests
    two, one = Evaluation.load(artifact).arms
    assert (two["scores"]["exact_match"]["value"], one["scores"]["exact_match"]["value"]) == (
        *(0.75, 1),
    )
    # And the other way round: what a model answered alone is part of the arm.
    sampled_config = sampled(config, 2)
    evaluate(sampled_config, workspace, dataset, [alone], "drawn")
    model_server.requests.clear()
    three = trained(model_server, "three", 1, 2, 3)
    artifact = evaluate(sampled_config, workspace, dataset, [three], "drawn").artifact
    assert {body["model"] for body in model_server.requests} == {
        "models/words@v2",
        "models/words@v3",
    }
    assert len(model_server.requests) == 2 * 2 * 10
    (row, *_) = Evaluation.load(artifact).predictions
    assert [s["model"][-1] for s in row.samples] == ["1", "1", "2", "2", "3", "3"]


def test_a_row_that_one_training_did_not_answer_is_asked_of_that_one(
    model_server, config, workspace, dataset
):
    def answer(body):
        is_lost = body["model"] == "models/words@v2" and "plum" in body["messages"][-1]["content"]
        if is_lost and is_down:
            raise ValueError("overloaded")
        return by_training(body)

    is_down = True
    model_server.answer = answer
    two = [trained(model_server, "two", 1, 2)]
    first = evaluate(config, workspace, dataset, two, "words").artifact
    evaluation = Evaluation.load(first)
    assert (evaluation.arms[0]["num_scored"], evaluation.arms[0]["num_unscored"]) == (9, 1)
    is_down = False
    model_server.requests.clear()
    # Another evaluation of the same models asks what is missing, and nothing else.
    again = evaluate(config, workspace, dataset, two, "again").artifact
    assert len(model_server.requests) == 1
    assert again.manifest["metrics"]["num_unscored"] == 0


def test_samples_need_a_temperature(config):
    with pytest.raises(ValidationError, match="set a temperature above 0, or num_samples: 1"):
        TuneloopConfig.model_validate(config.model_dump() | {"evaluation": {"num_samples": 4}})
