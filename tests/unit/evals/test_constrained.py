"""Arms whose answers are bound to the form of the task, and what the report says of them."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from tuneloop import contest
from tuneloop.artifacts import Artifact, Workspace
from tuneloop.config import ArmConfig, TuneloopConfig
from tuneloop.errors import DataError
from tuneloop.evals.reporting.advice import Situation, advise
from tuneloop.evals.reporting.gain import describe_gain
from tuneloop.evals.reporting.headline import write_headline
from tuneloop.evals.runner import evaluate
from tuneloop.evals.scoring.asking import arm_identity
from tuneloop.evals.scoring.calibration import describe_calibration
from tuneloop.evals.scoring.cheapest import find_cheapest
from tuneloop.evals.scoring.constrained import (
    constrain,
    has_key,
    is_wrapped,
    layout_of,
    schema_of,
    unwrap,
)
from tuneloop.evals.scoring.metrics import Metric
from tuneloop.evals.scoring.predictions import Prediction
from tuneloop.evals.scoring.results import Evaluation
from tuneloop.models.json_form import has_form
from tuneloop.records import (
    BASE,
    BASE_CONSTRAINED,
    FINETUNED,
    FINETUNED_CONSTRAINED,
    SIMPLE,
    Arm,
    Endpoint,
    Price,
    SamplingParams,
)


def make_config(task: dict[str, Any], **evaluation: Any) -> TuneloopConfig:
    return TuneloopConfig.model_validate(
        {
            "name": "it",
            "task": task,
            "model": {"base": "parrot"},
            "data": {"sources": [{"path": "rows.jsonl", "format": "messages"}]},
            "evaluation": {"num_resamples": 200, **evaluation},
        }
    )


def publish(workspace: Workspace, pairs: list[list[str]]) -> Artifact:
    rows = [
        {
            "row_id": f"r{index:03d}",
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ],
            "num_tokens": 9,
        }
        for index, (question, answer) in enumerate(pairs)
    ]
    with workspace.draft("datasets", "it", "d" * 64) as draft:
        for split in ("train", "test"):
            (draft.path / split).mkdir()
            pq.write_table(pa.Table.from_pylist(rows), draft.path / split / "part-0.parquet")
        return draft.publish(config={}, resources={}, inputs=[], metrics={})


def test_the_schema_of_the_train_rows() -> None:
    answers = [
        '{"b": "x", "a": 1}',
        '{"b": "y", "a": 2.5, "tags": ["u"]}',
        '{"a": 3, "b": null, "tags": [], "at": {"city": "Rom"}}',
        '{"b": "z", "a": 4}',
    ]
    schema = schema_of(answers)
    assert list(schema["properties"]) == ["b", "a", "tags", "at"]
    assert schema["required"] == ["b", "a"]
    assert schema["properties"]["a"] == {"type": "number"}
    for answer in answers:
        jsonschema.validate(json.loads(answer), schema)
    for other in ('{"a": 1}', '{"b": 1, "a": 1}', '{"b": "x", "a": 1, "c": 1}', "[]"):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(json.loads(other), schema)
    assert has_form('{"b": "ü", "a": 1, "tags": ["v", "w"]}', schema)
    assert not has_form('{"a": 1, "b": "x"}', schema)  # a server writes them in order
    assert not has_form('{"b": "x", "a": 1', schema)


@pytest.mark.parametrize(
    ("answers", "fits", "other"),
    [
        (['{"a": 1, "b": [1, 2]}', '{"a": "ü"}'], '{"a": "x", "b": [1, 2]}', '{"a":1}'),
        (['{"a":1,"b":[1,2]}'], '{"a":2,"b":[]}', '{"a": 1, "b": []}'),
        (['{"a": 1}', '{"a":1}'], '{\n  "a": 1\n}', '{"a": "x"}'),
    ],
)
def test_answers_are_laid_out_like_those_of_the_train_rows(
    answers: list[str], fits: str, other: str
) -> None:
    schema = schema_of(answers) | layout_of(answers)
    assert has_form(fits, schema)
    assert not has_form(other, schema)


def test_what_no_answer_can_be_bound_to_is_told(tmp_path: Path) -> None:
    many = json.dumps({f"key {i}": i for i in range(3000)})
    dataset = publish(Workspace(tmp_path), [["q", many]])
    arm, task = Arm("base", Endpoint("", BASE), (), "weights"), {"type": "extraction"}
    with pytest.raises(DataError, match="bytes"):
        constrain(arm, make_config(task).task, dataset)
    task = {"type": "classification", "labels": [f"label {i}" for i in range(1001)]}
    with pytest.raises(DataError, match="1,001 labels"):
        constrain(arm, make_config(task).task, dataset)


def test_labels_of_another_server_come_as_json(tmp_path: Path) -> None:
    task = make_config({"type": "classification", "labels": ["a", "b"]}).task
    arm = constrain(Arm("large", Endpoint("http://x/v1", "m")), task, None)
    asked = arm.forms[""]["response_format"]["json_schema"]
    assert asked["schema"]["properties"]["label"]["enum"] == ["a", "b"]
    assert asked["strict"] is True
    assert unwrap('{"label": "b"}', arm.answer_key) == "b"
    assert unwrap("b, I think", arm.answer_key) == "b, I think"
    # In a mixture the records of another task may have a property of that name.
    record = {"json_schema": {"schema": schema_of(['{"label": "x", "size": 3}'])}}
    forms = (arm.forms[""], {"response_format": record}, {})
    assert [is_wrapped(form, arm.answer_key) for form in forms] == [True, False, False]
    assert [has_key(form, arm.answer_key) for form in forms] == [False, True, False]
    # Their records were once cut to that property: stored ones are not taken for whole.
    mixed = replace(arm, forms={"sort": forms[0], "extract": forms[1]})
    one = replace(mixed, answer_key="")
    assert arm_identity(mixed, SamplingParams()) != arm_identity(one, SamplingParams())
    plain = replace(arm, answer_key="")
    assert arm_identity(arm, SamplingParams()) == arm_identity(plain, SamplingParams())
    own = constrain(Arm("base", Endpoint("", BASE), (), "weights"), task, None)
    assert own.forms[""]["ranking"] == {"answers": ["a", "b"], "coverage": 0.0}


def test_ranked_labels_have_probabilities_and_a_gain_is_split(
    model_server: Any, tmp_path: Path
) -> None:
    workspace = Workspace(tmp_path)
    labels = ["on", "off"]
    chooser = random.Random(0)
    dataset = publish(workspace, [[f"turn it {i}", labels[i % 2]] for i in range(40)])
    config = make_config({"type": "classification", "labels": labels})

    def reply(request: dict[str, Any]) -> dict[str, Any]:
        right = labels[int(request["messages"][-1]["content"].split()[-1]) % 2]
        other = labels[1 - labels.index(right)]
        if "ranking" not in request:
            # The base says too much, the finetuned model is right.
            return {"content": f"It is {right}!" if request["model"] == "base" else right}
        is_right = request["model"] != "base" or chooser.random() < 0.5
        best, rest = (right, other) if is_right else (other, right)
        ranked = [{"text": best, "logprob": -0.7}, {"text": rest, "logprob": -2.5}]
        return {"content": best, "ranking": {"answers": ranked, "coverage": 1.0}}

    model_server.answer = reply
    model_server.models = ["base", "tuned"]
    base = Arm(BASE, Endpoint(model_server.url, "base"), (), "base weights")
    tuned = Arm(FINETUNED, Endpoint(model_server.url, "tuned"), (), "weights", trained_on="d" * 64)

    def bound(arm: Arm, name: str) -> Arm:
        own = constrain(replace(arm, endpoint=Endpoint("", "")), config.task, dataset, True)
        assert own.forms[""]["ranking"]["coverage"] == 0.99
        return replace(arm, name=name, forms=own.forms)

    arms = [base, bound(base, BASE_CONSTRAINED), bound(tuned, FINETUNED_CONSTRAINED), tuned]
    artifact = evaluate(config, workspace, dataset, arms, "it").artifact
    evaluation = Evaluation.load(artifact)
    scores = {arm["name"]: arm["scores"]["accuracy"]["value"] for arm in evaluation.arms}
    assert scores[BASE] == 0
    assert scores[FINETUNED] == scores[FINETUNED_CONSTRAINED] == 1
    rows = pq.read_table(artifact.path / "predictions.parquet").to_pylist()
    expected = 1 / (1 + 2.718281828 ** (-2.5 + 0.7))
    for one in rows:
        known = one["arm"] in (BASE_CONSTRAINED, FINETUNED_CONSTRAINED)
        assert one["probability"] == (pytest.approx(expected) if known else None)
    calibration = {arm["name"]: arm.get("calibration") for arm in evaluation.arms}
    assert calibration[BASE] is None
    measured = calibration[BASE_CONSTRAINED]
    assert measured["expected_calibration_error"] == pytest.approx(
        abs(expected - scores[BASE_CONSTRAINED])
    )
    # The same model is no opponent of itself.
    assert [pair["other"] for pair in evaluation.candidate_pairs()] == [BASE, BASE_CONSTRAINED]
    gain = describe_gain(evaluation)
    assert f"`{BASE_CONSTRAINED}` has +{100 * scores[BASE_CONSTRAINED]:.1f} points" in gain
    assert f"+{100 * (1 - scores[BASE_CONSTRAINED]):.1f} points" in gain
    assert gain in write_headline(evaluation).detail
    report = (artifact.path / "report.html").read_text()
    assert "expected calibration error" in report
    # Nothing is asked again, and probabilities are kept.
    num_asked = len(model_server.requests)
    again = evaluate(config, workspace, dataset, arms[:2], "other").artifact
    assert len(model_server.requests) == num_asked
    assert Evaluation.load(again).arms[1]["calibration"] == measured


def test_free_answers_that_have_the_form_are_not_asked_for_again(
    model_server: Any, tmp_path: Path
) -> None:
    workspace = Workspace(tmp_path)
    dataset = publish(workspace, [[f"say {i}", json.dumps({"n": i})] for i in range(20)])
    config = make_config({"type": "extraction"})

    def reply(request: dict[str, Any]) -> dict[str, Any]:
        number = int(request["messages"][-1]["content"].split()[-1])
        text = json.dumps({"n": number})
        is_bound = "response_format" in request
        return {"content": text if number % 2 or is_bound else f"Sure: {text}"}

    model_server.answer = reply
    free = Arm("finetuned", Endpoint(model_server.url, "parrot"), (), "weights")
    own = constrain(replace(free, endpoint=Endpoint("", "")), config.task, dataset)
    arms = [replace(free, name="bound", forms=own.forms), free]
    artifact = evaluate(config, workspace, dataset, arms, "it").artifact
    assert sum("response_format" in request for request in model_server.requests) == 10
    evaluation = Evaluation.load(artifact)
    scores = {arm["name"]: arm["scores"]["exact_match"]["value"] for arm in evaluation.arms}
    assert scores == {"bound": 1.0, "finetuned": 0.5}
    assert not evaluation.candidate_pairs()
    first = advise(Situation(evaluation, artifact.ref, "it.yaml", None, 1, {}))[0]
    assert (first.title, first.basis) == ("Ask it as `bound` does", "measured")
    assert first.gain is not None
    assert first.gain.value == 0.5


@pytest.mark.parametrize(
    ("scores", "margin", "cheapest"),
    [
        ({SIMPLE: 0.80, BASE: 0.2, FINETUNED: 0.81}, 0.05, SIMPLE),
        ({SIMPLE: 0.50, BASE: 0.79, FINETUNED: 0.81}, 0.05, BASE),
        ({SIMPLE: 0.50, BASE: 0.70, FINETUNED: 0.81}, 0.05, FINETUNED),
        ({SIMPLE: 0.50, BASE: 0.70, FINETUNED: 0.81}, 0.15, BASE),
        ({SIMPLE: 0.50, "large": 0.95, FINETUNED: 0.93}, None, FINETUNED),
        ({SIMPLE: 0.50, "large": 0.95, FINETUNED: 0.80}, None, "large"),
        ({"elsewhere": 0.95, FINETUNED: 0.80}, None, None),
    ],
)
def test_the_cheapest_that_is_enough(
    scores: dict[str, float], margin: float | None, cheapest: str | None
) -> None:
    own = Endpoint("", "m")
    kinds = {
        SIMPLE: Arm(SIMPLE, own, answer=lambda _: {}),
        BASE: Arm(BASE, own, (), "weights"),
        FINETUNED: Arm(FINETUNED, own, (), "weights", trained_on="d"),
        "large": Arm("large", Endpoint("http://x/v1", "m"), price=Price(1, 1)),
        "elsewhere": Arm("elsewhere", Endpoint("answers.jsonl", ""), answer=lambda _: {}),
    }
    about = [
        {"name": name, "scores": {"accuracy": {"value": score}}, "mean_prompt_tokens": 10.0,
         "mean_completion_tokens": 2.0, "cost_per_1000_requests": 1.0 if name == "large" else None}
        for name, score in scores.items()
    ]  # fmt: skip
    names = list(scores)
    pairs = [
        {"arm": arm, "other": other, "differences": {"accuracy": {
            "low": scores[arm] - scores[other] - 0.02, "high": scores[arm] - scores[other] + 0.02}}}
        for i, arm in enumerate(names) for other in names[:i]
    ]  # fmt: skip
    comparison = {"primary": "accuracy", "margin": margin, "pairs": pairs}
    metric = Metric("accuracy", "binary")
    found = find_cheapest([kinds[n] for n in names], about, comparison, metric)
    assert found is not None
    assert (found["best"], found["cheapest"]) == (max(names, key=scores.__getitem__), cheapest)


def test_calibration_counted_by_hand() -> None:
    sure = [(0.95, 1.0)] * 9 + [(0.95, 0.0)] + [(1.0, 1.0)] * 2 + [(0.55, 0.0)] * 4
    rows = [
        Prediction(str(i), "a", "", "", "", "stop", 1, 1, 0.1, "scored",
                   scores={"accuracy": right}, probability=p)
        for i, (p, right) in enumerate(sure)
    ]  # fmt: skip
    got = describe_calibration(rows, "accuracy")
    assert got is not None
    assert [one["n"] for one in got["bins"]] == [4, 12]
    high = (10 * 0.95 + 2) / 12
    error = (4 * 0.55 + 12 * abs(high - 11 / 12)) / 16
    assert got["expected_calibration_error"] == pytest.approx(error)
    assert describe_calibration([Prediction("1", "a", "", "", "", "stop", 1, 1, 0.1, "scored")],
                                "accuracy") is None  # fmt: skip


def test_what_has_no_form_is_told_before_anything_runs(tmp_path: Path) -> None:
    arms = {"base": {}, "bound": {"model": "base", "constrain": True}}
    config = make_config({"type": "generation"}, arms=arms)
    [problem] = contest.arm_problems(config, Workspace(tmp_path))
    assert problem.where == "evaluation.arms.bound"
    assert "no form" in problem.what
    assert not contest.arm_problems(
        make_config({"type": "extraction"}, arms=arms), Workspace(tmp_path)
    )
    with pytest.raises(ValidationError, match="`constrain` does not belong"):
        ArmConfig(answers="a.jsonl", constrain=True)
