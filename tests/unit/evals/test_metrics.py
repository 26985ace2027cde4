"""Scores and error tags of single answers, checked by hand and against an oracle."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuneloop.config import TaskConfig
from tuneloop.errors import DataError
from tuneloop.evals.scoring.comparison import summarise
from tuneloop.evals.scoring.error_tags import misspelt_words, tag_errors, terms_of
from tuneloop.evals.scoring.intervals import Resampling
from tuneloop.evals.scoring.metrics import (
    TASK_METRICS,
    Metric,
    Scorer,
    parse_object,
    reference_words,
    rouge_l,
    same_value,
)
from tuneloop.evals.scoring.predictions import Prediction
from tuneloop.records import Conversation, Message

REFERENCE = '{"function": "read", "parameters": ["path", "mode"], "summary": "Read a file."}'


TEXT = TaskConfig(type="generation")


def score_text(reference: str, completion: str) -> dict[str, float | None]:
    return Scorer(TEXT, {}).score(reference, completion)


def extraction(fields: list[str] | None = None) -> Scorer:
    return Scorer(TaskConfig(type="extraction", fields=fields or []), {"a": REFERENCE})


@pytest.mark.parametrize(
    "text", ['{"a": 1}', ' {"a": 1}\n', '```json\n{"a": 1}\n```', '```\n{"a": 1}```']
)
def test_json_with_nothing_around_it_but_one_fence_is_valid(text):
    assert parse_object(text) == {"a": 1}


@pytest.mark.parametrize(
    "text",
    ["", "{'a': 1}", 'Here: {"a": 1}', '{"a": 1} done', '{"a": NaN}', "[1]", "3", '{"a": 1,}',
     '```json\n{"a": 1}\n``` ok', '{"a":' * 100_000, '{"a": ' + "9" * 5000 + "}"],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_everything_else_is_invalid(text):
    assert parse_object(text) is None


@pytest.mark.parametrize(
    ("expected", "got", "same"),
    [
        ("a  b\n", " a b", True),
        ("a b", "ab", False),
        ("Caf\u00e9", "Cafe\u0301", True),
        ("A", "a", False),
        (1, 1.0, True),
        (1, True, False),
        (0, False, False),
        (1, "1", False),
        (None, None, True),
        (None, "", False),
        (["x", "y"], ["x ", "y"], True),
        (["x", "y"], ["y", "x"], False),
        (["x"], ["x", "y"], False),
        ({"k": [1]}, {"k": [1.0]}, True),
        ({"k": 1}, {"k": 1, "l": 2}, False),
    ],
)
def test_values_are_equal_after_white_space_only(expected, got, same):
    assert same_value(expected, got) is same
    assert same_value(got, expected) is same


def test_extraction_scores_each_field_and_all_together():
    scorer = extraction()
    assert list(scorer.metrics) == [
        "exact_match", "valid_json", "fields_precision", "fields_recall", "fields_f1",
        "field_function", "field_parameters", "field_summary",
        "precision_function", "precision_parameters", "precision_summary",
    ]  # fmt: skip
    assert set(scorer.score(REFERENCE, REFERENCE).values()) == {1.0}
    partly = '{"function": "read", "parameters": ["path"], "summary": "Read  a file. "}'
    assert scorer.score(REFERENCE, partly) == {
        "exact_match": 0.0,
        "valid_json": 1.0,
        "fields_precision": 2 / 3,
        "fields_recall": 2 / 3,
        "fields_f1": 2 / 3,
        "field_function": 1.0,
        "field_parameters": 0.0,
        "field_summary": 1.0,
        "precision_function": 1.0,
        "precision_parameters": 0.0,
        "precision_summary": 1.0,
    }
    # An answer without fields has no precision.
    assert set(scorer.score(REFERENCE, "I do not know").values()) == {0.0, None}


def test_invented_fields_are_wrong():
    references = {
        f"r{i}": json.dumps({"name": f"n{i}"} | ({"phone": str(i)} if i % 2 else {}))
        for i in range(10)
    }
    scorer = Scorer(TaskConfig(type="extraction"), references)
    invented = [
        scorer.score(text, json.dumps({"phone": "555-0100"} | json.loads(text)))
        for text in references.values()
    ]
    mean = {
        name: float(np.mean([s[name] for s in invented if s[name] is not None]))
        for name in scorer.metrics
    }
    assert mean["exact_match"] == 0.5
    assert mean["fields_recall"] == 1.0
    assert mean["fields_precision"] == pytest.approx((5 * 0.5 + 5) / 10)
    assert (mean["field_phone"], mean["precision_phone"]) == (1.0, 0.5)
    # Null says that there is none: that is no invention, and no answer either.
    assert scorer.score('{"name": "n"}', '{"name": "n", "phone": null}')["exact_match"] == 1.0
    # Of configured fields others do not count, if the reference has them too.
    only = Scorer(TaskConfig(type="extraction", fields=["name"]), references)
    assert only.score('{"name": "n", "age": 3}', '{"name": "n", "age": 4}')["exact_match"] == 1.0
    assert only.score('{"name": "n"}', '{"name": "n", "age": 4}')["exact_match"] == 0.0


def test_configured_fields_are_the_ones_scored():
    scorer = extraction(["function"])
    assert scorer.score(REFERENCE, '{"function": "read"}') == {
        "exact_match": 1.0,
        "valid_json": 1.0,
        "fields_precision": 1.0,
        "fields_recall": 1.0,
        "fields_f1": 1.0,
        "field_function": 1.0,
        "precision_function": 1.0,
    }
    # A field that neither has is right, whether it is left out or null.
    scorer = extraction(["raises"])
    assert scorer.score(REFERENCE, "{}")["exact_match"] == 1.0
    assert scorer.score(REFERENCE, '{"raises": "OSError"}')["exact_match"] == 0.0
    assert scorer.score(REFERENCE, '{"raises": null}')["exact_match"] == 1.0


def test_fields_a_reference_lacks_have_no_score_in_that_row():
    scorer = Scorer(TaskConfig(type="extraction"), {"a": '{"x": 1}', "b": '{"y": 2}'})
    scores = scorer.score('{"x": 1}', '{"x": 1}')
    assert (scores["field_x"], scores["field_y"], scores["precision_y"]) == (1.0, None, None)


def test_references_that_cannot_be_scored_against_are_refused_together():
    with pytest.raises(DataError) as caught:
        Scorer(
            TaskConfig(type="extraction"),
            {str(index): "not json" for index in range(8)} | {"good": '{"a": 1}'},
        )
    assert len(caught.value.problems) == 6
    assert caught.value.problems[0].where == "row 0"
    assert "3 more" in caught.value.problems[-1].what
    with pytest.raises(DataError, match="positive, negative"):
        Scorer(TaskConfig(type="classification", labels=["positive", "negative"]), {"1": "meh"})


def test_labels_are_recognised_without_guessing():
    scorer = Scorer(TaskConfig(type="classification", labels=["yes", "no", "US", "us"]), {})
    assert scorer.label(" yes\n") == "yes"
    composed = Scorer(TaskConfig(type="classification", labels=["caf\u00e9", "bar"]), {})
    assert composed.label("cafe\u0301") == "caf\u00e9"
    assert scorer.label('"Yes."') == "yes"
    assert scorer.label("“Yes.”") == scorer.label("«yes».") == "yes"
    assert scorer.label("yes, because") is None
    assert scorer.label("us") == "us"
    assert scorer.label("US") == "US"
    assert scorer.label("Us") is None, "two labels fit, so none is chosen"
    assert scorer.score("yes", "Yes.") == {"accuracy": 1.0}
    assert scorer.score("yes", "maybe") == {"accuracy": 0.0}


@pytest.mark.parametrize(
    ("completion", "f1", "exact"),
    [("A", 1, 1), ("a.", 1, 1), ("", 0, 0), ("The", 0, 0), ("B", 0, 0), ("Option A", 2 / 3, 0)],
)
def test_the_letter_a_of_a_choice_is_no_article(completion, f1, exact):
    scores = score_text("A", completion)
    assert (scores["token_f1"], scores["exact_match"]) == (pytest.approx(f1), exact)
    # As any other letter.
    other = score_text("B", completion.replace("B", "C").replace("A", "B").replace("a", "b"))
    assert other["token_f1"] == pytest.approx(f1)


@pytest.mark.parametrize("sign", ["+", "/", "<=", "😀"])
def test_a_reference_of_signs_alone_is_said_as_it_is(sign):
    names = ("token_f1", "rouge_l", "exact_match")
    assert [score_text(sign, f" {sign}\n")[name] for name in names] == [1.0, 1.0, 1.0]
    for wrong in ("", "-", "plus"):
        assert [score_text(sign, wrong)[name] for name in names] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("other", ["a well\u2011known \u22125", "a well\u2010known -5"])
def test_typographic_hyphens_and_minus_are_those_of_a_keyboard(other):
    assert score_text("a well-known -5", other)["token_f1"] == 1.0


def test_token_f1_follows_the_squad_script():
    assert reference_words("The cat's a hat, an   Apple!") == ["cats", "hat", "apple"]
    scores = score_text("the black cat sat", "A black cat")
    assert scores["token_f1"] == pytest.approx(2 * (2 / 2) * (2 / 3) / (2 / 2 + 2 / 3))
    assert scores["exact_match"] == 0.0
    assert scores["length_ratio"] == pytest.approx(3 / 4)
    assert score_text("The cat.", "cat")["exact_match"] == 1.0
    assert score_text("cat", "")["token_f1"] == 0.0
    assert score_text("cat cat dog", "cat cat cat")["token_f1"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("reference", "right", "wrong"),
    [
        ("退貨期限為購買後三十天內。", "退貨期限為購買後三十天內", "我不知道"),
        ("まず再起動してください。", "まず再起動してください", "わかりません"),
        ("กรุณารีสตาร์ทอุปกรณ์", "กรุณารีสตาร์ทอุปกรณ์ ", "ไม่ทราบ"),
        ("पहले डिवाइस को बंद करें।", "पहले डिवाइस को बंद करें", "मुझे नहीं पता"),
        ("Don’t press “Stop”.", 'don\'t press "stop"', "press start"),
        ("Café", "Cafe\u0301", "tea"),
    ],
    ids=["Chinese", "Japanese", "Thai", "Hindi", "quotes", "NFC"],
)
def test_a_right_answer_is_right_in_any_script(reference, right, wrong):
    scores = score_text(reference, right)
    assert (scores["token_f1"], scores["rouge_l"], scores["exact_match"]) == (1.0, 1.0, 1.0)
    scores = score_text(reference, wrong)
    assert scores["exact_match"] == 0.0
    assert scores["token_f1"] < 0.7


def test_a_part_of_a_chinese_answer_is_a_part_of_the_score():
    scores = score_text("運費由買家承擔。", "運費由買家支付。")
    assert scores["token_f1"] == scores["rouge_l"] == pytest.approx(5 / 7)
    assert scores["length_ratio"] == 1.0


@pytest.mark.parametrize(
    ("reference", "other", "same"),
    [
        ("-5", "5", False),
        ("−5", "-5", True),
        ("It is -5 degrees.", "it is -5 degrees", True),
        ("3.14", "314", False),
        ("1,000", "1000", True),
        (".5", "5", False),
        ("$.50", "$50", False),
        ("it is .5.", "It is 0.5", True),
        ("-$5", "$5", False),
        ("-$5", "$-5", True),
        ("1,5", "15", False),
        ("5%", "5", False),
        ("C++", "C#", False),
        ("C++.", "c++", True),
        ("x < y", "x > y", False),
        ("$5", "€5", False),
        ("3-5 days", "3–5 days", True),
        ("The answer is 4.", "answer is 4", True),
        ("(see above)", "see above", True),
        ("/", "*", False),
        ("/", "", False),
        (" / ", "/", True),
    ],
)
def test_exact_match_keeps_numbers_and_signs(reference, other, same):
    assert score_text(reference, other)["exact_match"] == float(same)


def test_rouge_l_sees_order_in_any_script():
    # Lin 2004, section 3.1: "police killed the gunman" against two candidates.
    reference = "police killed the gunman"
    assert rouge_l(reference, "police kill the gunman", TEXT) == pytest.approx(0.75)
    assert rouge_l(reference, "the gunman kill police", TEXT) == pytest.approx(0.5)
    assert rouge_l("быстрый серый волк", "серый волк", TEXT) == pytest.approx(0.8)


@given(
    st.lists(st.sampled_from("abcd"), max_size=30), st.lists(st.sampled_from("abcd"), max_size=30)
)
def test_rouge_l_equals_the_textbook_table(left, right):
    table = [[0] * (len(right) + 1) for _ in range(len(left) + 1)]
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            table[i + 1][j + 1] = (
                table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
            )
    expected = 2 * table[-1][-1] / (len(left) + len(right)) if left or right else 1.0
    assert rouge_l(" ".join(left), " ".join(right), TEXT) == expected


@given(st.text(max_size=80), st.text(max_size=80))
def test_text_scores_stay_in_range_and_are_perfect_for_the_reference(reference, completion):
    scores = score_text(reference, completion)
    assert all(0 <= scores[name] <= 1 for name in ("token_f1", "rouge_l", "exact_match"))
    same = score_text(reference, reference)
    assert (same["token_f1"], same["rouge_l"], same["exact_match"]) == (1.0, 1.0, 1.0)


@given(st.text(max_size=200))
def test_any_completion_can_be_scored_and_tagged(completion):
    for scorer in (extraction(), Scorer(TaskConfig(type="generation"), {})):
        scores = scorer.score(REFERENCE, completion)
        assert set(scores) == set(scorer.metrics)
        tag_errors(scorer, REFERENCE, completion, "stop")


def test_each_task_names_a_primary_metric_it_has():
    for definition in TASK_METRICS.values():
        assert definition.metrics[definition.primary].better in ("higher", "lower")


def test_a_metric_is_one_function_and_one_entry(monkeypatch):
    def same_start(reference, completion, task):
        return float(reference[:1] == completion[:1])

    metrics = TASK_METRICS["generation"].metrics
    monkeypatch.setitem(metrics, "same_start", Metric("same first letter", score=same_start))
    scorer = Scorer(TEXT, {})
    assert scorer.score("cat", "cow")["same_start"] == 1.0
    rows = [
        Prediction(f"r{i}", "base", "[]", "cat", text, "stop", 1, 1, 0.1, "scored",
                   scores=scorer.score("cat", text))
        for i, text in enumerate(("cow", "dog"))
    ]  # fmt: skip
    summary = summarise(rows, scorer, Resampling(num_resamples=100))
    assert summary["metrics"]["same_start"] == {
        "label": "same first letter", "better": "higher", "kind": "ratio",
    }  # fmt: skip
    assert summary["arms"][0]["scores"]["same_start"]["value"] == 0.5
    tasks = {"title": {"type": "generation"}, "note": {"type": "generation"}}
    mixture = TaskConfig.model_validate({"type": "mixture", "tasks": tasks})
    mixed = Scorer(mixture, {"1": "cat"}, {"1": "title"})
    assert mixed.score("cat", "cow", "title")["title/same_start"] == 1.0


def test_tags_say_what_is_wrong():
    scorer = extraction()
    assert tag_errors(scorer, REFERENCE, REFERENCE, "stop") == []
    assert tag_errors(scorer, REFERENCE, "", "stop") == ["empty"]
    assert tag_errors(scorer, REFERENCE, REFERENCE[:-5], "length") == ["cut_off", "wrong_format"]
    assert tag_errors(scorer, REFERENCE, "word " * 60, "length") == [
        "cut_off", "never_stops", "wrong_format", "repetitive", "too_long",
    ]  # fmt: skip
    labels = Scorer(TaskConfig(type="classification", labels=["yes", "no"]), {})
    assert tag_errors(labels, "yes", "no", "stop") == []
    assert tag_errors(labels, "yes", "I think yes", "stop") == ["wrong_format", "too_long"]
    text = Scorer(TaskConfig(type="generation"), {})
    assert tag_errors(text, "one two", "one two three four", "stop") == []
    assert tag_errors(text, "one two", "one two three four five", "stop") == ["too_long"]


def test_tags_see_words_without_spaces():
    text = Scorer(TEXT, {})
    reference = "客服時間為週一至週五上午九點至下午六點。"
    assert tag_errors(text, reference, reference, "stop") == []
    assert tag_errors(text, reference, reference * 20, "stop") == ["repetitive", "too_long"]


def test_the_layout_of_json_does_not_make_it_long():
    scorer = extraction()
    spread = json.dumps(json.loads(REFERENCE), indent=4).replace(":", " : ").replace(",", " ,")
    assert (
        tag_errors(scorer, '{"a":1,"b":2,"c":3}', '{ "a" : 1 , "b" : 2 , "c" : 3 }', "stop") == []
    )
    assert tag_errors(scorer, REFERENCE.replace(" ", ""), spread, "stop") == []


def test_a_numbered_list_is_no_repetition():
    steps = "\n".join(f"{i}. Click the {w} button to open it." for i, w in enumerate("ABCDE", 1))
    assert tag_errors(Scorer(TEXT, {}), steps, steps, "stop") == []
    longer = "Click the buttons A, B, C, D and E one after the other to open all of them at once."
    assert "repetitive" not in tag_errors(Scorer(TEXT, {}), longer, steps, "stop")


def test_slips_are_seen_with_a_capital_too_and_names_are_not():
    reference = "Receive the file and separate its lines."
    assert misspelt_words("Recieve the file. Seperate its lines.", "[]", reference) == [
        "Recieve", "Seperate",
    ]  # fmt: skip
    named = "Kubernetes and Prometheus run on Debian, says Torvalds."
    assert misspelt_words(named, "[]", reference) == []


def test_terms_of_the_data_are_well_spelt():
    rows = [
        Conversation((Message("user", "Where is the qubit?"), Message("assistant", text)))
        for text in ("Call transmon first.", "A transmon is cold.", "No transmon, no qubti.")
    ]
    terms = terms_of(rows)
    assert "transmon" in terms
    assert "qubti" not in terms
    answer = "Cool the transmon."
    assert misspelt_words(answer, "[]", "Do it slowly.") == ["transmon"]
    assert misspelt_words(answer, "[]", "Do it slowly.", terms) == []


def test_a_reference_that_repeats_itself_excuses_the_answer():
    scorer = Scorer(TaskConfig(type="generation"), {})
    refrain = "Sing a song of sixpence. " * 3
    assert tag_errors(scorer, refrain, refrain, "stop") == []
    assert tag_errors(scorer, "Sing about something else, and do it well.", refrain, "stop") == [
        "repetitive"
    ]


def test_in_a_mixture_each_answer_is_scored_by_its_own_task():
    tasks = {
        "label": {"type": "classification", "labels": ["yes", "no"]},
        "title": {"type": "generation"},
    }
    mixture = TaskConfig.model_validate({"type": "mixture", "tasks": tasks})
    scorer = Scorer(mixture, {"1": "yes", "2": "a red door"}, {"1": "label", "2": "title"})
    assert scorer.primary == "score"
    assert scorer.metrics["score"].kind == "ratio"
    assert scorer.metrics["label/accuracy"].label == "label: right label"
    assert scorer.score("yes", "Yes.", "label") == {"score": 1.0, "label/accuracy": 1.0}
    title = scorer.score("a red door", "the red car", "title")
    assert title["score"] == title["title/token_f1"] == 0.5
    assert "label/accuracy" not in title
    # A label is a wrong format where a title is none.
    assert "wrong_format" in tag_errors(scorer.of("label"), "yes", "the red car", "stop")
    assert "wrong_format" not in tag_errors(scorer.of("title"), "a red door", "red car", "stop")
    with pytest.raises(DataError, match="row 2"):
        Scorer(mixture, {"1": "yes", "2": "a red door"}, {"1": "label", "2": "label"})
    # Scores that are all right or wrong are compared as such.
    tasks["title"] = {"type": "extraction"}
    mixture = TaskConfig.model_validate({"type": "mixture", "tasks": tasks})
    assert Scorer(mixture, {}, {}).metrics["score"].kind == "binary"
