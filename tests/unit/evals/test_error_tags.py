"""Error tags with their evidence: what each one finds, what looks like it and is none."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tuneloop.config import EvaluationConfig, TaskConfig
from tuneloop.errors import ConfigError
from tuneloop.evals.scoring.choosable import own_tags, try_scorers
from tuneloop.evals.scoring.error_tags import (
    Background,
    JudgedAnswer,
    find_errors,
    languages_of,
    vocabulary_of,
)
from tuneloop.evals.scoring.metrics import Scorer
from tuneloop.evals.scoring.nearest import TrainRow
from tuneloop.evals.scoring.unsupported import find_unsupported
from tuneloop.evals.scoring.wording import find_copied, find_refusal, find_template
from tuneloop.records import Conversation, Message

ROOT = Path(__file__).parents[3]
WRITING = Scorer(TaskConfig(type="generation"), {})


@pytest.mark.parametrize(
    ("answer", "sources", "found"),
    [
        ("It has three doors and 1,000 seats.", "3 doors, 1000 seats", []),
        ("It costs 40% more in 2021.", "It costs more.", ["40", "2021"]),
        ("1. Open it.\n2. Close it.", "Open and close it.", []),
        ("So 3 + 4 = 7 in all.", "3 and 4", []),
        ("Use `range(17)` or utf8.", "Use it.", []),
        ("Version 2.5 is out.", "Version 2.50 is out.", []),
        ("It was found by Elena Marquez.", "It was found.", ["Elena", "Marquez"]),
        ("However, this holds. Then it ends.", "It holds.", []),
        ("Zorblax makes it.", "Somebody makes it.", ["Zorblax"]),
        ("The LLM's answer", "a large language model", []),
        ("# Getting Started With Doors\nopen it", "open it", []),
        ("Ask the Engines for it.", "the engine", []),
        ("Der Hund und die Katze im Haus am See mit dem Ball auf dem Tisch.", "Tiere", []),
        ("Ask Dr. Tanaka about it.", "Ask somebody.", ["Tanaka"]),
    ],
)
def test_unsupported_numbers_and_names(answer: str, sources: str, found: list[str]) -> None:
    spans = find_unsupported(answer, sources)
    # A title and capitals of German nouns are not what this is about.
    assert [span.text for span in spans if span.text != "Dr"] == found
    assert all(answer[span.start : span.end] == span.text for span in spans)


@pytest.mark.parametrize(
    ("answer", "declines"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("As an AI language model, I cannot say.", True),
        ("I don't have enough information to answer.", True),
        ("I must respectfully decline.", True),
        ("You cannot open it without a key.", False),
        ("I can help: open the door.", False),
        ("He said: I will not go home.", False),
        ("Sorry to hear that; open the door.", False),
    ],
)
def test_refusals(answer: str, declines: bool) -> None:
    assert (find_refusal(answer, "Open the door.") is not None) == declines
    assert find_refusal(answer, answer) is None


def test_a_template_leaks_unless_the_reference_has_it() -> None:
    for leak in ("Yes.<|im_end|>", "Yes.\nUser: And?", "### Response:\nYes", "{{ name }} it is"):
        assert find_template(leak, "q", "Yes.") is not None, leak
        assert find_template(leak, "q", leak) is None, leak
    # A question may come with its template: that is no leave to write it.
    assert find_template("### Answer: yes", "### Answer:", "yes") is not None
    assert find_template("Print {x} and <b>.", "q", "r") is None


def test_the_prompt_copied_is_told_and_a_quotation_is_not() -> None:
    question = "Which of the two doors in the long hall of the old house is open today?"
    span = find_copied(f"You ask: {question}", question, "The left one.")
    assert span is not None
    assert span.text == question.rstrip("?")
    assert find_copied(question, question, question) is None
    quoted = "The left one of the two doors in the long hall, because somebody forgot to shut it"
    assert find_copied(quoted, question, "The left one.") is None
    assert find_copied("open today", question, "The left one.") is None


def test_a_training_row_is_contradicted_only_where_the_reference_agrees_with_it() -> None:
    twin = TrainRow("t1", "", "May one open it?", "Yes, it opens at 9.", 0.9)
    known = Background(twins=(twin,))

    def tags(reference: str, completion: str) -> list[str]:
        answer = JudgedAnswer(reference, completion, "stop", question="May one open it? 8 or 9")
        return [evidence.tag for evidence in find_errors(WRITING, answer, known)]

    assert tags("Yes, it opens at 9.", "No, it stays shut.") == ["contradicts_training"]
    assert tags("Yes, it opens at 9.", "Yes, it opens at 8.") == ["contradicts_training"]
    assert tags("Yes, it opens at 9.", "It opens at 9, yes.") == []
    assert tags("No, it is shut.", "No, it stays shut.") == []


def test_another_language_is_told_by_the_reference_or_by_all_references() -> None:
    english = "The doors of the old house are open today, and everybody may come in and look."
    german = "Die Türen des alten Hauses sind heute offen, und jeder darf hereinkommen und schauen."
    assert languages_of([english] * 30 + [german]) == {"en"}
    assert languages_of([english, german]) == {"en", "de"}
    for reference, languages in ((english, ()), ("yes", {"en"})):
        answer = JudgedAnswer(reference, german, "stop")
        found = {e.tag: e for e in find_errors(WRITING, answer, Background(languages=languages))}
        assert found["wrong_language"].detail == "de, not en"
        assert "misspelt" not in found
    both = Background(languages={"en", "de"})
    assert "wrong_language" not in {
        e.tag for e in find_errors(WRITING, JudgedAnswer("yes", german, "stop"), both)
    }


def test_what_a_twentieth_of_the_rows_names_is_vocabulary() -> None:
    rows = [
        Conversation((Message("user", "q"), Message("assistant", text)))
        for text in ["Ask Lamini."] * 5 + ["Ask Tanaka."] * 2 + ["Ask."] * 50
    ]
    vocabulary = vocabulary_of(rows)
    assert "lamini" in vocabulary
    assert "tanaka" not in vocabulary
    answer = JudgedAnswer("Nobody here knows it.", "Nobody but Lamini and Tanaka knows.", "stop")
    (evidence,) = find_errors(WRITING, answer, Background(vocabulary=vocabulary))
    assert (evidence.tag, evidence.detail, evidence.start) == ("unsupported", "Tanaka", 22)


def test_what_an_answer_says_is_not_doubted_where_it_is_right() -> None:
    answer = JudgedAnswer("42", "Of 17 doors 42 are open: 42", "stop", is_right=True)
    assert [evidence.tag for evidence in find_errors(WRITING, answer)] == ["too_long"]


def test_tags_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "house_tags.py").write_text(
        '"""Tags."""\n'
        "def shouts(reference, completion):\n"
        '    """Words in capitals."""\n'
        "    return next((w for w in completion.split() if w.isupper()), None)\n"
        "def fails(reference, completion):\n    return 1 / 0\n"
        "def counts(reference, completion):\n    return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    (tag,) = own_tags(EvaluationConfig(tags=["house_tags.shouts"]))
    assert (tag.name, tag.meaning) == ("shouts", "Words in capitals")
    found = tag.find("yes", "say YES now", "r17")
    assert found is not None
    assert (found.detail, found.start, found.end) == ("YES", 4, 7)
    assert tag.find("yes", "say yes", "r17") is None
    for name, words in (("fails", "ZeroDivisionError"), ("counts", "returned 3")):
        (bad,) = own_tags(EvaluationConfig(tags=[f"house_tags.{name}"]))
        with pytest.raises(ConfigError, match="row r17") as raised:
            bad.find("yes", "no", "r17")
        assert words in raised.value.problems[0].got
    config = EvaluationConfig(tags=["house_tags.missing", "house_tags.fails"])
    problems = try_scorers(TaskConfig(type="generation"), config, "text")
    assert [problem.where for problem in problems] == ["evaluation.tags.0"]


def load_benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "error_tags_benchmark", ROOT / "benchmarks" / "error_tags.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_planted_errors_are_found_and_references_have_none() -> None:
    # A small version of `benchmarks/error_tags.py`.
    benchmark = load_benchmark()
    rows = [
        benchmark.Row(
            f"How does the {thing} in the old house work for the people who live there?",
            f"Yes, the {thing} is simple to use with the right training. It allows the people to "
            "find information about the house, and the documentation can be read by everybody.",
        )
        for thing in ("lamp", "door", "stove", "clock", "window", "bell", "stair", "gate")
    ]
    chooser = random.Random(0)
    languages = languages_of(row.reference for row in rows)
    for tag, plant in benchmark.PLANTS.items():
        num_found = 0
        for row in rows:
            made = plant(row, chooser)
            assert made is not None, tag
            reference = json.dumps({"answer": row.reference}) if made.is_json else row.reference
            scorer = Scorer(TaskConfig(type="extraction"), {}) if made.is_json else WRITING
            judged = JudgedAnswer(
                reference, made.completion, made.finish_reason, question=row.question,
                prompt=json.dumps([{"role": "user", "content": row.question}]),
            )  # fmt: skip
            known = Background(languages=languages, twins=made.twins)
            num_found += tag in {e.tag for e in find_errors(scorer, judged, known)}
        assert num_found == len(rows), tag
    for row in rows:
        judged = JudgedAnswer(row.reference, row.reference, "stop", question=row.question)
        assert find_errors(WRITING, judged, Background(languages=languages)) == []
