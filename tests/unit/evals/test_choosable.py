"""Metrics that a configuration chooses, and scorers of the user's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tuneloop.config import EvaluationConfig, TaskConfig
from tuneloop.errors import ConfigError
from tuneloop.evals.scoring.choosable import (
    chosen_metrics,
    code_of_own_scorers,
    metrics_by_task,
    primary_of,
    try_scorers,
)
from tuneloop.evals.scoring.comparison import LabelCounts
from tuneloop.evals.scoring.metrics import Scorer
from tuneloop.evals.scoring.predictions import Prediction

TEXT = TaskConfig(type="generation")


def choose(*metrics, primary=None, task=TEXT):
    evaluation = EvaluationConfig(metrics=list(metrics), primary=primary)
    chosen = chosen_metrics(task, evaluation)
    return Scorer(task, {}, metrics=chosen, primary=primary_of(task, evaluation, chosen))


def score(metric, reference: str, completion: str):
    scorer = choose(metric)
    (value,) = scorer.score(reference, completion).values()
    return value


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "own_scorers_of_a_test.py"
    path.write_text(
        "def polite(reference, completion):\n"
        "    return float('please' in completion)\n"
        "def fails(reference, completion):\n"
        "    return 1 / len(completion.split('x')[1:])\n"
        "def percent(reference, completion):\n"
        "    return 100\n"
        "def needs_more(reference, completion, question):\n"
        "    return 1.0\n"
    )
    return path


def test_the_chosen_metrics_are_measured_in_their_order_and_one_decides():
    scorer = choose("chrf", "exact_match", {"name": "number", "after": "####"})
    assert list(scorer.metrics) == ["chrf", "exact_match", "number"]
    assert scorer.primary == "chrf"
    assert choose("chrf", "token_f1").primary == "token_f1"
    assert choose("chrf", "token_f1", primary="chrf").primary == "chrf"
    assert choose(primary="rouge_l").primary == "rouge_l"
    assert choose("length_ratio", "bleu").primary == "bleu"
    labels = TaskConfig(type="classification", labels=["a", "b"])
    assert list(choose("accuracy", "macro_f1", task=labels).metrics) == ["accuracy"]
    assert chosen_metrics(TEXT, EvaluationConfig()) is None


@pytest.mark.parametrize(
    ("settings", "where", "told"),
    [
        ({"metrics": ["chrff"]}, "evaluation.metrics.0", "did you mean `chrf`?"),
        ({"metrics": ["chrf", "accuracy"]}, "evaluation.metrics.1", "it scores classification"),
        ({"metrics": ["chrf", "chrf"]}, "evaluation.metrics.1", "named twice"),
        ({"metrics": ["regex"]}, "evaluation.metrics.0.pattern", "needs a pattern"),
        (
            {"metrics": [{"name": "regex", "pattern": "("}]},
            "evaluation.metrics.0.pattern",
            "not a regular expression",
        ),
        ({"metrics": ["chrf"], "primary": "token_f1"}, "evaluation.primary", "cannot decide"),
        ({"primary": "length_ratio"}, "evaluation.primary", "cannot decide"),
        ({"metrics": ["no_such_module.f"]}, "evaluation.metrics.0", "cannot be loaded"),
    ],
)
def test_what_cannot_score_is_refused_by_name(settings, where, told):
    with pytest.raises(ConfigError) as caught:
        chosen_metrics(TEXT, EvaluationConfig.model_validate(settings))
    (problem,) = caught.value.problems
    assert problem.where == where
    assert told in str(problem)
    assert try_scorers(TEXT, EvaluationConfig.model_validate(settings), "a text") == [problem]


def test_options_belong_to_their_metric():
    with pytest.raises(ValueError, match="`after` belongs to the metric `number`"):
        EvaluationConfig.model_validate({"metrics": [{"name": "chrf", "after": "#"}]})


def test_the_metrics_of_a_mixture_are_named_with_their_task():
    tasks = {"a": {"type": "generation"}, "b": {"type": "generation"}}
    mixture = TaskConfig.model_validate({"type": "mixture", "tasks": tasks})
    assert chosen_metrics(mixture, EvaluationConfig()) is None
    evaluation = EvaluationConfig(metrics=["a/chrf", {"name": "a/number", "after": "#"}])
    by_task = metrics_by_task(mixture, evaluation)
    assert {name: list(metrics) for name, metrics in by_task.items()} == {"a": ["chrf", "number"]}
    references = {"1": "it is #7", "2": "yes it is"}
    scorer = Scorer(mixture, references, {"1": "a", "2": "b"}, by_task=by_task)
    assert list(scorer.metrics)[:3] == ["score", "a/chrf", "a/number"]
    assert "b/token_f1" in scorer.metrics
    # The first metric named for a task decides about its rows; the others keep their own.
    scores = scorer.score("it is #7", "it is #7", "a")
    assert scores == {"score": 1.0, "a/chrf": 1.0, "a/number": 1.0}
    assert scorer.score("yes it is", "yes", "b")["score"] == pytest.approx(0.5)
    for wrong in ("chrf", "c/chrf", "a/macro_f1", "a/perplexity", "a/accuracy"):
        with pytest.raises(ConfigError) as raised:
            chosen_metrics(mixture, EvaluationConfig(metrics=["a/chrf", wrong]))
        assert raised.value.problems[0].where == "evaluation.metrics.1"
    with pytest.raises(ConfigError, match="goes by the metric of its task"):
        chosen_metrics(mixture, EvaluationConfig(primary="score"))


def test_macro_f1_decides_together_and_accuracy_about_single_answers():
    labels = TaskConfig(type="classification", labels=["a", "b"])
    scorer = choose(primary="macro_f1", task=labels)
    assert (scorer.decides, scorer.primary) == ("macro_f1", "accuracy")
    own = choose("exact_match_strict", "macro_f1", primary="macro_f1", task=labels)
    assert (own.decides, own.primary) == ("macro_f1", "exact_match_strict")
    with pytest.raises(ConfigError, match="cannot decide"):
        choose(primary="macro_f1")


@pytest.mark.parametrize(
    ("options", "reference", "completion", "expected"),
    [
        ({}, "The total is 1,234.5.", "So it is 1234.5", 1.0),
        ({}, "4", "2 + 2 = 4", 1.0),
        ({}, "4", "4 or 5", 0.0),
        ({}, "-4", "4", 0.0),
        ({}, "−4", "-4", 1.0),
        ({}, "pages 3-5", "5", 1.0),
        ({}, "4", "four", 0.0),
        ({}, "no number", "4", None),
        ({"tolerance": 0.01}, "200", "201.9", 1.0),
        ({"tolerance": 0.01}, "200", "202.1", 0.0),
        ({"after": "####"}, "6 * 7 #### 42", "It is 6 * 7.\n#### 42 apples", 1.0),
        ({"after": "####"}, "6 * 7 #### 42", "It is 42", 0.0),
        ({"after": "####"}, "6 * 7 #### 42", "#### 42 of 50", 1.0),
        ({}, "0.5", "it is .5", 1.0),
        ({}, ".5", "5", 0.0),
        ({}, "-$1,200.50", "a loss of −$1200.5", 1.0),
        ({}, "-$5", "$5", 0.0),
        ({"after": "####"}, "so #### Paris", "hence #### paris.", 1.0),
        # Floats are the same for all of these.
        ({}, "121932631112635269", "121932631112635268", 0.0),
        ({}, "121932631112635269", "121,932,631,112,635,269.0", 1.0),
        ({"tolerance": 0.01}, "121932631112635269", "121932631112635268", 1.0),
        ({}, "1e9999999999999999999999", "12", 0.0),
    ],
)
def test_numbers_are_compared_by_value(options, reference, completion, expected):
    assert score({"name": "number", **options}, reference, completion) == expected


def test_labels_lists_and_nested_values_get_partial_credit():
    assert score("multi_label_f1", "red, green", "Green, red") == 1.0
    assert score("multi_label_f1", "red, green", "red, blue") == pytest.approx(0.5)
    assert score("multi_label_f1", '["red", "green"]', "red") == pytest.approx(2 / 3)
    by_line = {"name": "multi_label_f1", "separator": "|"}
    assert score(by_line, "red|light green", "light green") == pytest.approx(2 / 3)
    reference = json.dumps({"items": [{"n": 1, "tag": "a"}, {"n": 2, "tag": "b"}], "id": None})
    assert score("json_f1", reference, reference) == 1.0
    swapped = json.dumps({"items": [{"n": 2.0, "tag": "b"}, {"n": 1, "tag": "a"}]})
    assert score("json_f1", reference, swapped) == 1.0
    half = json.dumps({"items": [{"n": 1, "tag": "c"}]})
    assert score("json_f1", reference, half) == pytest.approx(2 * 1 / (4 + 2))
    assert score("json_f1", reference, "no JSON") == 0.0
    assert score("json_f1", "no JSON", half) is None
    assert score("json_f1", '{"a": null}', "{}") == 1.0
    assert score("json_f1", '{"a": []}', "[]") == 0.0
    assert score("json_f1", '{"a": 1, "b": true}', '{"a": "1", "b": true}') == 0.5
    assert score("json_f1", '{"a": "caf\u00e9"}', '{"a": "cafe\u0301"}') == 1.0
    assert score("multi_label_f1", "caf\u00e9", "cafe\u0301") == 1.0


def test_texts_are_compared_as_sacrebleu_does():
    sacrebleu = pytest.importorskip("sacrebleu")
    reference, completion = "the cat sat on the mat today", "the cat sat on a mat"
    chrf = sacrebleu.sentence_chrf(completion, [reference]).score / 100
    bleu = sacrebleu.sentence_bleu(completion, [reference]).score / 100
    assert score("chrf", reference, completion) == pytest.approx(chrf)
    assert score("bleu", reference, completion) == pytest.approx(bleu)
    for metric in ("chrf", "bleu"):
        assert score(metric, "運費由買家承擔。", "運費由買家承擔。") == pytest.approx(1.0)
        assert 0.2 < score(metric, "運費由買家承擔。", "運費由買家支付。") < 0.9
    assert score("exact_match_strict", "A b.", " A b.\n") == 1.0
    assert score("exact_match_strict", "A b.", "a b.") == 0.0


def test_a_pattern_is_found_or_says_the_same():
    assert score({"name": "regex", "pattern": r"^\d{4}-\d\d$"}, "x", "2024-05") == 1.0
    assert score({"name": "regex", "pattern": r"^\d{4}-\d\d$"}, "x", "May 2024") == 0.0
    choice = {"name": "regex", "pattern": r"(?i)answer is \(?([a-d])"}
    assert score(choice, "The answer is (b).", "I think the answer is b") == 1.0
    assert score(choice, "The answer is (b).", "answer is (c)") == 0.0
    assert score(choice, "no letter", "answer is (c)") is None
    either = {"name": "regex", "pattern": r"answer is (\w)|\((\w)\)"}
    assert score(either, "(b)", "(c)") == 0.0
    assert score(either, "(b)", "the answer is b") == 1.0


def test_a_scorer_of_the_users_own_is_a_function_by_its_dotted_path(module):
    scorer = choose("own_scorers_of_a_test.polite", "token_f1")
    assert scorer.score("yes", "yes please")["polite"] == 1.0
    assert scorer.metrics["polite"].kind == "ratio"
    evaluation = EvaluationConfig(metrics=["own_scorers_of_a_test.polite"])
    assert try_scorers(TEXT, evaluation, "yes") == []
    # What the function does is part of the result.
    before = code_of_own_scorers(evaluation)
    module.write_text(module.read_text().replace("please", "thanks"))
    assert code_of_own_scorers(evaluation) != before


def test_what_a_scorer_imports_of_its_directory_is_part_of_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    package = tmp_path / "package_of_a_test"
    package.mkdir()
    code = "from . import words\ndef score(reference, completion): return 1.0\n"
    (package / "scorers.py").write_text(code)
    (package / "words.py").write_text("from .parts.signs import MARKS\n")
    (package / "parts").mkdir()
    (package / "parts" / "__init__.py").write_text("")
    (package / "parts" / "signs.py").write_text("MARKS = '!'\n")
    (package / "other.py").write_text("")
    evaluation = EvaluationConfig(metrics=["package_of_a_test.scorers.score"])
    before = code_of_own_scorers(evaluation)
    (package / "other.py").write_text("MARKS = '.'\n")
    assert code_of_own_scorers(evaluation) == before
    (package / "parts" / "signs.py").write_text("MARKS = '?'\n")
    assert code_of_own_scorers(evaluation) != before


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("fails", "ZeroDivisionError"),
        ("percent", "100.0"),
        ("needs_more", "cannot be loaded"),
        ("missing", "AttributeError"),
    ],
)
def test_a_scorer_that_fails_is_told_with_the_row(module, name, told):
    evaluation = EvaluationConfig(metrics=[f"own_scorers_of_a_test.{name}"])
    (problem,) = try_scorers(TEXT, evaluation, "no such letter")
    assert problem.where == "evaluation.metrics.0"
    assert told in str(problem)


@pytest.mark.parametrize("name", ["error", "latency_s", "macro_f1"])
def test_a_scorer_named_as_a_column_of_predictions_is_refused(module, name):
    source = f"\ndef {name}(reference, completion):\n    return 1.0\n"
    module.with_name(f"named_{name}.py").write_text(source)
    with pytest.raises(ConfigError, match="a column of that name already"):
        choose(f"named_{name}.{name}")


def test_an_answer_that_is_no_label_is_a_class_of_its_own():
    task = TaskConfig(type="classification", labels=["a", "b"])
    scorer = Scorer(task, {})
    rows = [
        Prediction(f"r{i}", "base", "[]", truth, answer, "stop", 1, 1, 0.1, "scored")
        for i, (truth, answer) in enumerate([("a", "a"), ("a", "b"), ("a", "?"), ("b", "b")])
    ]
    assert LabelCounts(rows, scorer).confusion() == {"a": {"a": 1, "b": 1, "": 1}, "b": {"b": 1}}
