"""Labels that the other rows deny."""

from __future__ import annotations

import random
from itertools import product
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq

from tuneloop.evals.scoring.doubtful import doubtful_labels
from tuneloop.evals.scoring.questions import read_solved
from tuneloop.records import Conversation, Message

ROOMS = ["kitchen", "garden", "cellar", "attic", "garage", "hall", "office", "porch"]
SAID = {
    "lights": ["switch on the lamp in the {}", "make the {} bright", "the {} is dark, lamp please"],
    "heating": ["warm up the {}", "the {} is cold, heat it", "set the {} to a warm 21 degrees"],
    "music": ["play a song in the {}", "some music for the {}", "the {} is silent, play a tune"],
}


def labelled(text: str, label: str, name: str) -> Conversation:
    return Conversation((Message("user", text), Message("assistant", label)), name)


def rows() -> list[Conversation]:
    texts = [
        (text.format(room), label)
        for label, said in SAID.items()
        for text, room in product(said, ROOMS)
    ]
    random.Random(0).shuffle(texts)
    return [labelled(text, label, f"r{index:02}") for index, (text, label) in enumerate(texts)]


def test_wrong_labels_come_first_with_what_the_others_say():
    clean, labels = rows(), list(SAID)
    right = {row.row_id: row.messages[-1].text for row in clean}
    wrong = {
        name: labels[(labels.index(right[name]) + 1) % len(labels)]
        for name in ("r07", "r31", "r50")
    }
    spoilt = [
        labelled(row.messages[0].text, wrong.get(row.row_id, right[row.row_id]), row.row_id)
        for row in clean
    ]
    found = doubtful_labels(spoilt)
    assert {doubt.row.row_id for doubt in found[:3]} == wrong.keys()
    for doubt in found[:3]:
        assert doubt.given == wrong[doubt.row.row_id]
        assert doubt.other == right[doubt.row.row_id]
        assert 0 <= doubt.given_probability < doubt.other_probability <= 1
    assert doubtful_labels(spoilt) == found


def test_right_labels_are_not_doubted():
    assert doubtful_labels(rows()) == []


def test_what_cannot_be_judged_is_not_doubted():
    assert doubtful_labels(rows()[:10]) == []
    assert doubtful_labels([labelled(f"word{i}", "a", str(i)) for i in range(30)]) == []
    one_label = [labelled(f"the {i}th of them", "a", str(i)) for i in range(30)]
    assert doubtful_labels(one_label) == []
    # No other row has its label.
    lonely = [*rows(), labelled("open the kitchen window", "windows", "r99")]
    assert "r99" not in {doubt.row.row_id for doubt in doubtful_labels(lonely)}


def test_the_first_rows_are_read_whatever_file_they_are_in(tmp_path):
    (tmp_path / "train").mkdir()
    every = [
        {"row_id": row.row_id, "messages": [turn.as_dict() for turn in row.messages]}
        for row in rows()
    ]
    for number in range(2):
        part = pa.Table.from_pylist(every[::-1][number::2])
        pq.write_table(part, tmp_path / "train" / f"part-{number}.parquet")
    dataset = SimpleNamespace(path=tmp_path)
    assert [row.row_id for row in read_solved(dataset, (), 5)] == [f"r{i:02}" for i in range(5)]
    assert read_solved(dataset, (), 99) == read_solved(dataset) == rows()
