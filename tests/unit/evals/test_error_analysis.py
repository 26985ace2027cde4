"""Two arms example by example: outcomes, tags and filters."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuneloop.evals.reporting import error_analysis as analysis
from tuneloop.evals.reporting.error_analysis import Filter
from tuneloop.evals.reporting.overview import describe_parity
from tuneloop.evals.scoring.error_tags import misspelt_words, tag_errors
from tuneloop.evals.scoring.predictions import (
    Prediction,
    StoredPredictions,
    write_predictions,
)
from tuneloop.evals.scoring.results import Evaluation

METRICS = {
    "right": {"label": "right", "better": "higher", "kind": "binary"},
    "loss": {"label": "loss", "better": "lower", "kind": "number"},
    "length": {"label": "length", "better": "neither", "kind": "number"},
}


def answer(
    arm: str, index: int, text: str, scores: tuple[float, float] | None, tags: str = ""
) -> Prediction:
    prompt = json.dumps([{"role": "user", "content": f"question {index}"}])
    scored = {} if scores is None else {"right": scores[0], "loss": scores[1], "length": 1.0}
    return Prediction(
        f"r{index}", arm, prompt, f"truth {index}", text, "stop", 1, 1, 0.1,
        "unscored" if scores is None else "scored", error_tags=tags.split(), scores=scored,
    )  # fmt: skip


@pytest.fixture
def evaluation() -> Evaluation:
    rows = [
        answer("base", 0, "no idea", (0, 9.0), "cut_off"),
        answer("base", 1, "truth 1", (1, 1.0)),
        answer("base", 2, "truth 2", (1, 1.0), "too_long"),
        answer("base", 3, "wrong", (0, 5.0), "too_long cut_off"),
        answer("base", 4, "", None),
        answer("tuned", 0, "truth 0", (1, 1.0)),
        answer("tuned", 1, "broken ÄRGER Straße", (0, 2.0), "misspelt"),
        answer("tuned", 2, " truth  2", (1, 1.0)),
        answer("tuned", 3, "wrong too", (0, 4.0), "too_long"),
        answer("tuned", 4, "truth 4", (1, 1.0), "cut_off"),
    ]
    arms = [{"name": "base"}, {"name": "tuned"}]
    return Evaluation("demo", rows, {"primary": "right", "metrics": METRICS, "arms": arms}, {})


def outcomes(evaluation: Evaluation, metric: str) -> dict[str, str]:
    examples = evaluation.pair("base", "tuned", metric)
    return {example.example_id: example.change for example in examples}


def test_outcomes_follow_the_metric_and_its_direction(evaluation: Evaluation) -> None:
    assert outcomes(evaluation, "right") == {
        "r0": "fixed", "r1": "introduced", "r2": "both_right", "r3": "both_wrong",
        "r4": "unscored",
    }  # fmt: skip
    assert outcomes(evaluation, "loss") == {
        "r0": "fixed", "r1": "introduced", "r2": "same", "r3": "fixed", "r4": "unscored",
    }  # fmt: skip


def test_largest_changes_come_first_and_unscored_ones_last(evaluation: Evaluation) -> None:
    examples = evaluation.pair("base", "tuned", "loss")
    assert [abs(example.gain or 0) for example in examples] == [8, 1, 1, 0, 0]
    assert (examples[0].example_id, examples[-1].example_id) == ("r0", "r4")
    assert examples[-1].gain is None


def test_tags_are_counted_as_fixed_introduced_and_both(evaluation: Evaluation) -> None:
    examples = evaluation.pair("base", "tuned", "right")
    rows = analysis.tag_rows(analysis.count_tags(examples), "base", "tuned", {"empty": "no text"})
    columns = ("base", "tuned", "fixed", "introduced", "in both")
    # r4 is not scored in one arm: its error is nobody's.
    assert {row["error"]: tuple(row[name] for name in columns) for row in rows} == {
        "cut off": (2, 0, 2, 0, 0),
        "too long": (2, 1, 1, 0, 1),
        "misspelt": (0, 1, 0, 1, 0),
    }


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (Filter(), {"r0", "r1", "r2", "r3", "r4"}),
        (Filter(change="introduced"), {"r1"}),
        (Filter(tag="too_long"), {"r2", "r3"}),
        (Filter(tag="too_long", tag_change="fixed"), {"r2"}),
        (Filter(tag_change="introduced"), {"r1", "r4"}),
        (Filter(text="ärger QUESTION"), {"r1"}),
        (Filter(text="STRASSE"), {"r1"}),
        (Filter(text="  "), {"r0", "r1", "r2", "r3", "r4"}),
        (Filter(change="fixed", tag="misspelt"), set()),
    ],
)
def test_filters(evaluation: Evaluation, chosen: Filter, expected: set[str]) -> None:
    examples = evaluation.pair("base", "tuned", "right")
    assert {e.example_id for e in chosen.choose(examples)} == expected


def test_differences_are_marked_where_they_can_be_read(evaluation: Evaluation) -> None:
    examples = {e.example_id: e for e in evaluation.pair("base", "tuned", "right")}
    before, after = analysis.mark_differences(examples["r0"], "reference")
    assert before == [("extra", "no idea")]
    assert after == [("same", "truth 0")]
    before, after = analysis.mark_differences(examples["r3"], "other")
    assert before == [("same", "wrong")]
    assert after == [("same", "wrong"), ("extra", " too")]


@given(st.lists(st.integers(), max_size=40), st.integers(-3, 20), st.integers(1, 7))
def test_pages_hold_every_item_once(items: list[int], page: int, size: int) -> None:
    shown, num_pages = analysis.paginate(items, page, size)
    everything = [x for n in range(num_pages) for x in analysis.paginate(items, n + 1, size)[0]]
    assert everything == items
    assert shown or not items


def test_only_different_answers_are_judged_in_everybodys_order(evaluation: Evaluation) -> None:
    judged = analysis.examples_to_judge(evaluation, ("base", "tuned"))
    assert {example.example_id for example in judged} == {"r0", "r1", "r3"}
    again = analysis.examples_to_judge(evaluation, ("tuned", "base"))
    assert [e.example_id for e in judged] == [e.example_id for e in again]


def test_arms_of_another_evaluation_stand_before_its_own(
    evaluation: Evaluation, tmp_path: Path
) -> None:
    write_predictions(evaluation.predictions, list(METRICS), tmp_path)
    stored = replace(evaluation, predictions=StoredPredictions(tmp_path, list(METRICS)))
    both = evaluation.beside(stored, "demo@v1")
    assert [arm["name"] for arm in both.arms[:2]] == ["base of demo@v1", "tuned of demo@v1"]
    examples = both.pair("tuned of demo@v1", "base", "right")
    own = evaluation.pair("tuned", "base", "right")
    assert [e.change for e in examples] == [e.change for e in own]
    assert [e.after for e in examples] == [e.after for e in own]
    first = examples[0].before
    assert first.arm == "tuned of demo@v1"
    assert replace(first, arm="tuned") == own[0].before
    assert len(list(both.predictions)) == 20
    # What the two hold against different right answers is compared within each of them alone.
    both = evaluation.beside(stored, "demo@v1", ["r1", "r3"])
    between = both.pair("base of demo@v1", "tuned", "right")
    assert {e.example_id: e.change for e in between} == {
        "r0": "fixed", "r2": "both_right", "r4": "unscored",
    }  # fmt: skip
    assert len(both.pair("base", "tuned", "right")) == 5
    assert len(both.pair("base of demo@v1", "tuned of demo@v1", "right")) == 5


def test_what_judges_prefer(evaluation: Evaluation) -> None:
    examples = evaluation.pair("base", "tuned", "right")
    assert analysis.metric_preferences(evaluation, examples, "loss") == {
        "r0": "tuned", "r1": "base", "r2": None, "r3": "tuned",
    }  # fmt: skip
    assert analysis.length_preferences(examples)["r3"] == "tuned"
    assert analysis.judged_metrics(evaluation) == ["right", "loss"]


@pytest.mark.parametrize(
    ("text", "prompt", "reference", "expected"),
    [
        ("I recieve teh letter", "", "the letter", ["recieve", "teh"]),
        ("the frobnicator runs", "What does a frobnicator do?", "it runs", []),
        ("the frobnicator runs", "", "a frobnicator runs", []),
        ("colour and color, analyse and analyze", "", "", []),
        ("the filename of a namespace", "", "", []),
        ("call parse_args() in /usr/lib or os.path, don't", "", "", []),
        ("Herr Zweigelt, née Kärntner", "", "", []),
        ("Das ist ein schöner Tag gewesen", "", "Gestern war das Wetter sehr angenehm", []),
        ("use `kwargs` teh\n```python\nelif iter(args)", "", "", ["teh"]),
        ("", "", "", []),
    ],
)
def test_misspelt_words(text: str, prompt: str, reference: str, expected: list[str]) -> None:
    assert misspelt_words(text, prompt, reference) == expected


def test_words_of_a_stored_prompt_are_known_whatever_stands_before_them() -> None:
    prompt = json.dumps([{"role": "user", "content": "Explain:\nzorblax"}])
    assert misspelt_words("a zorblax", prompt, "") == []


def test_one_odd_word_in_a_long_answer_is_no_bad_spelling() -> None:
    from tuneloop.config import TaskConfig
    from tuneloop.evals.scoring.metrics import Scorer

    scorer = Scorer(TaskConfig(type="generation"), {})
    text = "every good answer says something useful about the thing that was asked for " * 2
    reference = text.replace("good", "fine")
    assert tag_errors(scorer, reference, text + "zorblax", "stop") == []
    assert tag_errors(scorer, reference, text + "zorblax teh recieve", "stop") == ["misspelt"]


def test_parity_in_words() -> None:
    parity = {
        "passed": True, "prompts": 4, "tokens": 1600, "max_abs_logprob_diff": 3e-6,
        "greedy_equal": False, "tolerance": 1e-3,
    }  # fmt: skip
    assert "but for exact ties" in describe_parity(parity)
    assert "1,600 tokens" in describe_parity(parity)
    assert "NOT" in describe_parity(parity | {"passed": False})
