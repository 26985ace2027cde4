"""Training rows near a wrong answer: which are found, their order, what is said of them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tuneloop.config import TaskConfig
from tuneloop.evals.scoring import nearest
from tuneloop.evals.scoring.metrics import Scorer
from tuneloop.evals.scoring.nearest import (
    NearestRows,
    contradicts,
    open_nearest,
    says_the_same,
    write_nearest,
)
from tuneloop.evals.scoring.predictions import Prediction
from tuneloop.evals.scoring.questions import Question
from tuneloop.records import Conversation, Message

WRITING = TaskConfig(type="generation")
LABELS = TaskConfig(type="classification", labels=["open", "shut", "sing"])
READING = TaskConfig(type="extraction")


def row(row_id: str, question: str, answer: str) -> Conversation:
    return Conversation((Message("user", question), Message("assistant", answer)), row_id)


def ask(text: str, reference: str = "") -> Question:
    return Question("q", (Message("user", text),), reference)


@pytest.mark.parametrize(
    ("task", "first", "second", "same", "against"),
    [
        (LABELS, "open", " Open.", True, False),
        (LABELS, "open", "shut", False, True),
        (LABELS, "open", "no label", False, False),
        (READING, '{"a": 1, "b": null}', '{"b": null, "a": 1.0}', True, False),
        (READING, '{"a": 1}', '{"a": 2}', False, True),
        (READING, '{"a": 1}', '{"b": 2}', False, False),
        (WRITING, "Yes, it is.", "No.", False, True),
        (WRITING, "It opens at 9 today.", "it opens at 9 today", True, False),
        (WRITING, "It opens at 9 today.", "It opens at 10 today.", False, True),
        (WRITING, "It does open today.", "It does not open today.", False, True),
        (WRITING, "It opens at 9.", "The house has 12 rooms and a garden.", False, False),
    ],
)
def test_answers_are_the_same_or_cannot_both_be_right(
    task: TaskConfig, first: str, second: str, same: bool, against: bool
) -> None:
    assert says_the_same(first, second, task) is same
    assert contradicts(first, second, task) is against
    assert contradicts(second, first, task) is against


def test_the_nearest_rows_come_first_and_twins_ask_nearly_the_same() -> None:
    rows = NearestRows(
        [
            row("a", "how do I open the green door of the old house", "Push."),
            row("b", "how do I open the red door of the old house", "Pull."),
            row("c", "what do birds eat in winter", "Seeds."),
        ],
        WRITING,
    )
    question = ask("how do I open the red door of the old house")
    near = rows.explain([question])["q"]
    assert [one.row_id for one in near[:2]] == ["b", "a"]
    assert near[0].similarity == pytest.approx(1.0)
    assert [one.row_id for one in rows.twins([question])["q"]] == ["b"]
    assert rows.twins([ask("zebra")]) == {"q": []}


def test_so_many_characters_are_looked_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "MOST_CHARACTERS", 40)
    rows = [row(name, f"open the {name} door", "Push.") for name in ("red", "blue", "green")]
    near = NearestRows(rows, WRITING).explain([ask("open the green door")])["q"]
    assert [one.row_id for one in near] == ["red", "blue"]


def test_a_label_that_its_neighbours_deny_is_among_the_five() -> None:
    # A small version of `benchmarks/label_errors.py`.
    chooser = random.Random(0)
    words = {
        "open": "open unlock unbolt push enter".split(),
        "shut": "shut lock bolt pull leave".split(),
        "sing": "sing hum play whistle chant".split(),
    }
    rows = []
    for index in range(240):
        label = ("open", "shut", "sing")[index % 3]
        asked = " ".join([*chooser.sample(words[label], 3), f"word{chooser.randrange(40)}"])
        rows.append(row(f"r{index}", asked, label))
    wrong = rows[90]
    rows[90] = row("wrong", wrong.messages[0].content, "sing")
    asked = ask("push open unlock the thing", "open")
    near = NearestRows(rows, LABELS).explain([asked])["q"]
    assert near[0].row_id == "wrong"
    assert near[0].agreement == 0.0
    assert len(near) == 5


def test_what_is_written_says_why_a_row_matters(tmp_path: Path) -> None:
    rows = NearestRows([row("a", "open the door", "shut"), row("b", "open it", "open")], LABELS)
    wrong = Prediction(
        "q", "arm", "[]", "open", "shut", "stop", 1, 1, 0.1, "scored", scores={"accuracy": 0.0}
    )
    near = rows.explain([ask("open the door")])
    write_nearest(near, {"q": wrong}, {"q": Scorer(LABELS, {"q": "open"})}, tmp_path)
    found = {one["row_id"]: one for one in open_nearest(tmp_path).to_table().to_pylist()}
    assert (found["a"]["conflicts"], found["a"]["gives_this_answer"]) == (True, True)
    assert (found["b"]["conflicts"], found["b"]["gives_this_answer"]) == (False, False)
    assert found["a"]["similarity"] == pytest.approx(1.0)
    assert open_nearest(tmp_path / "elsewhere").count_rows() == 0
