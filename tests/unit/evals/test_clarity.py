"""How clear rows make a task, against counts made by hand."""

from __future__ import annotations

import random

import pytest

from tuneloop.config import TaskConfig
from tuneloop.evals.scoring.clarity import AnsweredRow, measure_clarity

LABELS = TaskConfig(type="classification", labels=["billing", "delivery"])
WRITING = TaskConfig(type="generation")
NOUNS = {"billing": ["invoice", "price", "refund"], "delivery": ["parcel", "courier", "van"]}


def mail(number: int, label: str) -> AnsweredRow:
    rng = random.Random(number)
    return AnsweredRow(f"my {' '.join(rng.choices(NOUNS[label], k=3))} of day {number}", label)


def test_what_a_classifier_gets_and_labels_with_few_rows_are_told() -> None:
    rows = [mail(n, "billing" if n % 4 else "delivery") for n in range(200)]
    found = measure_clarity(rows, LABELS)
    assert (found.num_rows, found.num_conflicting, found.most_right_ratio) == (200, 0, 1)
    assert found.labels == {"billing": 150, "delivery": 50}
    assert (found.metric, found.floor, found.forms) == ("accuracy", 0.75, {"labels": 1.0})
    assert found.lookup == 1.0
    assert found.lookup_low == pytest.approx(0.981, abs=1e-3)  # Wilson, 200 of 200
    assert found.advice == "classifier"
    assert not found.is_one_sided
    # With labels at random there is nothing to learn.
    rng = random.Random(0)
    noise = [AnsweredRow(row.input, rng.choice(LABELS.labels)) for row in rows]
    assert measure_clarity(noise, LABELS).advice == "finetune"
    assert (measure_clarity(noise, LABELS).lookup or 1) < 0.7
    rare = [*(mail(n, "billing") for n in range(90)), *(mail(n, "delivery") for n in range(9))]
    one_sided = measure_clarity(rare, LABELS)
    assert one_sided.is_one_sided
    assert "1 of them have fewer than 10 rows, such as `delivery`" in "\n".join(one_sided.lines())


def test_contradictions_bound_what_a_model_can_get_right() -> None:
    rows = [AnsweredRow(f"input {n}", "billing") for n in range(90)]
    rows += [AnsweredRow(" Is it  MINE?", "billing")] * 6 + [
        AnsweredRow("is it mine?", "delivery")
    ] * 4
    found = measure_clarity(rows, LABELS)
    assert (found.num_conflicting, found.most_right_ratio) == (10, 0.96)
    assert found.conflicts[0].answers == ["billing", "delivery"]
    assert found.advice == "agree"
    assert "10 rows (10.0%)" in found.lines()[0]
    assert "no model can give more than 96.0%" in found.lines()[0]
    # With other tools before it the same words ask for something else.
    told_apart = [AnsweredRow(*row[:2], context=row.answer) for row in rows]
    assert measure_clarity(told_apart, LABELS).num_conflicting == 0


def test_forms_and_lookups_of_free_text_and_of_json() -> None:
    rows = [AnsweredRow(f"What is a kite {n}?", f"A kite flies, number {n}.") for n in range(60)]
    rows += [AnsweredRow(f"List of {n}", f"- one\n- two\n- {n}") for n in range(20)]
    found = measure_clarity(rows, WRITING)
    assert found.forms == {"a single paragraph": 0.75, "lists": 0.25}
    assert found.answer_words == [3, 5, 5]
    assert found.labels == {}
    assert found.lookup is not None
    assert found.floor is not None
    assert found.lookup > found.floor
    record = TaskConfig(type="extraction", fields=["city"])
    cities = [AnsweredRow(f"From A{n} to B", f'{{"city": "A{n}"}}') for n in range(49)]
    few = measure_clarity([*cities[:-1], AnsweredRow("To C", '{"city": "C", "by": "bus"}')], record)
    assert few.forms == {"JSON with city": 48 / 49, "JSON with by, city": 1 / 49}
    assert few.advice == "label"
    assert few.lookup == 0
    alone = measure_clarity([AnsweredRow("a", "b")], WRITING)
    assert (alone.lookup, alone.advice) == (None, "label")
    assert alone.as_dict()["told"]


def test_json_that_is_written_otherwise_is_no_other_answer() -> None:
    answers = ['{"a": 1, "b": "X"}', '{"b":"X","a":1}', '{"a": 1, "b": "Y"}']
    task = TaskConfig(type="extraction")
    rows = [AnsweredRow("the same input", answer) for answer in answers[:2] * 30]
    assert measure_clarity(rows, task).num_conflicting == 0
    rows.append(AnsweredRow("the same input", answers[2]))
    assert measure_clarity(rows, task).num_conflicting == 61
    # What scores as the same is the same: 1 and 1.0, a field that is absent and null.
    alike = ['{"a": [1], "b": "X  y"}', '{"a": [1.0], "b": "X y", "c": null}']
    rows = [AnsweredRow("the same input", answer) for answer in alike]
    assert measure_clarity(rows, task).num_conflicting == 0
    rows.append(AnsweredRow("the same input", '{"a": [true], "b": "X y"}'))
    assert measure_clarity(rows, task).num_conflicting == 3
