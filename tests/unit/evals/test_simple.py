"""The simple arm: what it answers, that it is deterministic, and that it stands in every result."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tuneloop.artifacts import Workspace
from tuneloop.config import TaskConfig, TuneloopConfig
from tuneloop.evals.reporting.headline import write_headline
from tuneloop.evals.runner import evaluate
from tuneloop.evals.scoring.questions import Question
from tuneloop.evals.scoring.results import Evaluation
from tuneloop.evals.scoring.simple import answer_simply, nearest_shots, simple_arm
from tuneloop.records import Arm, Conversation, Endpoint, Message

PLACES = ["kitchen", "garden", "cellar", "attic", "garage", "hall", "office", "porch"]
LABELS = {"lights": "switch on the lamp in the {}", "heating": "warm up the {} please"}


def solved(row_id: str, asked: str, answer: str, task: str = "") -> Conversation:
    turns = (Message("system", "Do."), Message("user", asked), Message("assistant", answer))
    return Conversation(turns, row_id, task=task)


def question(asked: str, task: str = "") -> Question:
    messages = (Message("system", "Do."), Message("user", asked))
    return Question(asked, messages, "?", task=task)


TRAIN = [
    solved(f"{label}-{place}", text.format(place), label)
    for label, text in LABELS.items()
    for place in PLACES
]
LABEL_TASK = TaskConfig(type="classification", labels=list(LABELS))


def test_a_classifier_learns_the_labels_whatever_the_order_of_rows() -> None:
    asked = [question("the lamp in the bathroom"), question("please warm the bathroom")]
    answers = answer_simply(TRAIN, asked, LABEL_TASK)
    assert list(answers.values()) == ["lights", "heating"]
    assert answer_simply(TRAIN, asked, LABEL_TASK) == answers
    only = [row for row in TRAIN if row.messages[-1].content == "lights"]
    assert set(answer_simply(only, asked, LABEL_TASK).values()) == {"lights"}


def test_scripts_without_spaces_and_bare_signs_are_told_apart() -> None:
    pairs = {"今日は天気がいい": "weather", "電車が遅れています": "train", "C++ or": "plus"}
    pairs["C# or"] = "sharp"
    train = [solved(answer, asked, answer) for asked, answer in pairs.items()]
    asked = [
        question("明日の天気は"),
        question("電車はいつ"),
        question("why C#"),
        question("why C++"),
    ]
    answers = answer_simply(train, asked, TaskConfig(type="generation"))
    assert list(answers.values()) == ["weather", "train", "sharp", "plus"]


def test_writing_and_extraction_take_the_nearest_rows_answer_and_the_first_of_equals() -> None:
    train = [solved("a", "capital of France", "Paris"), solved("b", "capital of Spain", "Madrid")]
    train.append(solved("c", "capital of Spain", "Barcelona"))
    asked = [question("what is Spain's capital"), question("nothing alike")]
    answers = answer_simply(train, asked, TaskConfig(type="generation"))
    assert list(answers.values()) == ["Madrid", "Paris"]
    shots = nearest_shots(train, asked, 2)
    assert [shot.row_id for shot in shots["what is Spain's capital"]] == ["c", "b"]


def test_where_words_tell_nothing_it_gives_the_most_frequent_label_or_the_first_row() -> None:
    # As first names, of which each is there once.
    names = [solved(f"{n:04d}", f"name{n}", "lights" if n % 3 else "heating") for n in range(1_000)]
    asked = [question("name7"), question("another")]
    assert list(answer_simply(names, asked, LABEL_TASK).values()) == ["lights", "lights"]
    blank = [solved("a", " ", "Paris"), solved("b", "", "Madrid")]
    assert (
        list(answer_simply(blank, asked, TaskConfig(type="generation")).values()) == ["Paris"] * 2
    )


def test_in_a_mixture_each_task_has_its_own_rows() -> None:
    mixed = TaskConfig.model_validate(
        {
            "type": "mixture",
            "tasks": {
                "tell": {"type": "classification", "labels": list(LABELS)},
                "say": {"type": "generation"},
            },
        }
    )
    train = [replace(row, task="tell") for row in TRAIN]
    train.append(solved("say", "warm up the hall please", "It is warm.", "say"))
    asked = [question("please warm the bathroom", "tell"), question("warm up please", "say")]
    assert list(answer_simply(train, asked, mixed).values()) == ["heating", "It is warm."]


@pytest.mark.parametrize("seed", [0, 1])
def test_it_stands_beside_the_models_and_the_headline_names_it(
    model_server, tmp_path: Path, seed: int
) -> None:
    workspace = Workspace(tmp_path)
    rows = [
        {
            "row_id": row.row_id,
            "messages": [{"role": m.role, "content": m.content} for m in row.messages],
            "num_tokens": 9,
        }
        for row in TRAIN
    ]
    random.Random(seed).shuffle(rows)
    with workspace.draft("datasets", "home", "d" * 64) as draft:
        for split in ("train", "test"):
            (draft.path / split).mkdir()
            pq.write_table(pa.Table.from_pylist(rows), draft.path / split / "part-0.parquet")
        dataset = draft.publish(config={}, resources={}, inputs=[], metrics={})
    config = TuneloopConfig.model_validate(
        {
            "name": "home",
            "task": LABEL_TASK.model_dump(),
            "model": {"base": "parrot"},
            "data": {"sources": [{"path": "rows.jsonl", "format": "messages"}]},
            "evaluation": {"num_resamples": 200},
        }
    )
    model_server.reply = lambda messages: ("lights", "stop")
    arms = [
        simple_arm("simple", dataset, config.task),
        Arm("finetuned", Endpoint(model_server.url, "parrot"), (), "weights"),
    ]
    artifact = evaluate(config, workspace, dataset, arms, "home").artifact
    assert len(model_server.requests) == len(TRAIN)
    evaluation = Evaluation.load(artifact)
    simple, finetuned = evaluation.arms
    assert (simple["scores"]["accuracy"]["value"], simple["num_unscored"]) == (1.0, 0)
    assert finetuned["scores"]["accuracy"]["value"] == 0.5
    assert "a classifier is enough" in write_headline(evaluation).detail
    predictions = pq.read_table(artifact.path / "predictions.parquet").to_pylist()
    assert {row["arm"] for row in predictions} == {"simple", "finetuned"}
    assert json.loads(predictions[0]["prompt"])[-1]["role"] == "user"
    assert "simple arm" in (artifact.path / "report.html").read_text()
