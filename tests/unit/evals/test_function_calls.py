"""Calls are right when every argument has one of its accepted values, however they are written."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tuneloop.config import OneTaskConfig, TaskConfig, TuneloopConfig
from tuneloop.evals.reporting.error_analysis import prompt_turns
from tuneloop.evals.runner import make_scorer
from tuneloop.evals.scoring.error_tags import tag_errors
from tuneloop.evals.scoring.function_calls import (
    find_calls,
    function_call,
    with_accepted,
    without_accepted,
)
from tuneloop.evals.scoring.metrics import Scorer
from tuneloop.evals.scoring.questions import Question, messages_json
from tuneloop.evals.scoring.simple import answer_simply
from tuneloop.records import Conversation, Message

TASK = OneTaskConfig(type="generation")
ACCEPTED = [{"area": {"base": [10, 12], "unit": ["units", ""], "where": [{"city": ["Rome"]}, ""]}}]


def call(name: str = "area", **arguments: Any) -> str:
    return json.dumps({"name": name, "arguments": arguments})


REFERENCE = with_accepted(call(base=10), ACCEPTED)


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (call(base=10), 1),
        (call(base=12.0, unit="Units."), 1),
        (call(base=10, where={"city": "Rome"}), 1),
        (call(base=10, where={"city": "Oslo"}), 0),
        (f"<tool_call>\n{call(base=10)}\n</tool_call>", 1),
        (f"<think>{call(base=1)}</think>I call {call(base=10)}", 1),
        (json.dumps([{"name": "area", "parameters": {"base": 10}}]), 1),
        (json.dumps([{"function": {"name": "area", "arguments": '{"base": 10}'}}]), 1),
        (call(base=True), 0),
        (call(base="10"), 0),
        (call(base=11), 0),
        (call(unit="units"), 0),
        (call(base=10, height=3), 0),
        (call("volume", base=10), 0),
        (2 * call(base=10), 0),
        ("The area is 10. {", 0),
        ("[" * 5000, 0),
        ("", 0),
    ],
)
def test_a_call_is_right_with_accepted_values_only(completion: str, expected: float) -> None:
    scorer = Scorer(TASK, {"a": REFERENCE})
    assert scorer.primary == "function_call"
    assert scorer.score(REFERENCE, completion, "") == {"function_call": expected}


def test_calls_decide_where_nothing_is_configured() -> None:
    config = TuneloopConfig.model_validate(
        {
            "name": "t",
            "task": {"type": "generation"},
            "model": {"base": "x"},
            "data": {"sources": [{"path": "a.jsonl", "format": "messages"}]},
        }
    )
    asked = [Question("a", (Message("user", "How large?"),), REFERENCE)]
    assert make_scorer(config, asked).primary == "function_call"
    words = [*asked, Question("b", (Message("user", "Where?"),), "Rome")]
    assert make_scorer(config, words).primary == "token_f1"


def test_the_simple_arm_answers_with_the_nearest_rows_calls() -> None:
    function = {"name": "area", "arguments": '{"base": 10}'}
    calls = json.dumps([{"id": "1", "type": "function", "function": function}])
    turns = Message("user", "How large?"), Message("assistant", "", tool_calls=calls)
    asked = [Question("a", (Message("user", "How large is it?"),), REFERENCE)]
    answers = answer_simply([Conversation(turns, "r")], asked, TaskConfig(type="generation"))
    assert function_call(REFERENCE, answers["a"], TASK) == 1


def test_accepted_values_are_no_part_of_what_a_reference_says() -> None:
    mixed = Scorer(TASK, {"a": REFERENCE, "b": "Rome"})
    scores = mixed.score(REFERENCE, call(base=10))
    assert (scores["function_call"], scores["token_f1"], scores["length_ratio"]) == (1, 1, 1)
    assert without_accepted(REFERENCE) == call(base=10)
    assert without_accepted("Rome\nParis") == "Rome\nParis"
    tags = tag_errors(mixed, REFERENCE, 3 * f"{call(base=10)}\n", "stop")
    assert "too_long" in tags


def test_calls_within_a_prompt_are_shown() -> None:
    calls = json.dumps([{"id": "1", "function": {"name": "area", "arguments": "{}"}}])
    prompt = messages_json([Message("user", "a"), Message("assistant", "", tool_calls=calls)])
    shown = '{"name": "area", "arguments": {}}'
    assert prompt_turns(prompt) == [("user", "a"), ("assistant", shown)]


def test_several_calls_in_any_order_and_references_without_a_list() -> None:
    first, second = call(base=1), call(base=2)
    reference = f"{first}\n{second}"
    assert function_call(reference, f"{second} {first}", TASK) == 1
    assert function_call(reference, f"{second} {second}", TASK) == 0
    assert function_call("Paris", first, TASK) is None
    mixed = Scorer(TASK, {"a": reference, "b": "Paris"})
    assert mixed.primary == "token_f1"
    assert mixed.score("Paris", "Paris", "")["function_call"] is None


def test_a_list_in_a_reference_is_a_value_and_no_choice() -> None:
    reference = call(where={"ids": [1, 2], "rooms": [{"sizes": [3, 4]}]})
    assert function_call(reference, reference, TASK) == 1
    for where in (
        {"ids": 1, "rooms": [{"sizes": [3, 4]}]},
        {"ids": [1, 2], "rooms": [{"sizes": 3}]},
        {"ids": [True, 2], "rooms": [{"sizes": [3, 4]}]},
    ):
        assert function_call(reference, call(where=where), TASK) == 0
    assert function_call(call(where={"city": "Rome"}), call(where={"city": "rome."}), TASK) == 1
    assert function_call(call(where={"city": "Rome"}), call(where={"city": ["Rome"]}), TASK) == 0
    assert function_call(call(where={"ids": []}), call(where={}), TASK) == 0


def test_a_call_leaves_the_others_what_they_need() -> None:
    calls = f"{call(base=2)}\n{call(base=1)}"
    reference = with_accepted(calls, [{"area": {"base": [1, 2]}}, {"area": {"base": [1]}}])
    for completion in (f"{call(base=1)} {call(base=2)}", f"{call(base=2)} {call(base=1)}"):
        assert function_call(reference, completion, TASK) == 1
    assert function_call(reference, 2 * f"{call(base=2)} ", TASK) == 0


def test_accepted_values_from_any_column() -> None:
    as_struct = [{"area": {"base": [10], "height": None}, "volume": None}]
    for accepted in (as_struct, json.dumps(as_struct)):
        reference = with_accepted(call(base=10), accepted)
        assert function_call(reference, call(base=10), TASK) == 1
    for other in (None, "yes", 3, ["x"]):
        assert find_calls(with_accepted(call(base=10), other))[0].arguments == {"base": 10}


def test_a_thought_before_an_answer_is_not_scored() -> None:
    scorer = Scorer(TASK, {"a": "Paris"})
    scores = scorer.score("Paris", "<think>\n\n</think>\n\nParis", "")
    assert scores["exact_match"] == scores["token_f1"] == 1
    labels = OneTaskConfig(type="classification", labels=["yes", "no"])
    assert Scorer(labels, {"a": "no"}).label("<think>\nyes?\n</think>\n\nno") == "no"
