"""Labels of a classification: read from the data, told in the instruction, kept as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tuneloop.config import TuneloopConfig
from tuneloop.data.labels import resolve_labels
from tuneloop.errors import DataError

SAID = "Answer with one of these labels only: "


def configure(
    tmp_path: Path, answers: list[str], max_seq_len: int = 512, **task: Any
) -> TuneloopConfig:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"question {n}", "completion": text} for n, text in enumerate(answers)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(path), "format": "prompt_completion"}
    return TuneloopConfig.model_validate(
        {
            "name": "labels",
            "task": {"type": "classification"} | task,
            "model": {"base": "parrot"},
            "data": {"sources": [source], "max_seq_len": max_seq_len},
        }
    )


def test_labels_left_out_are_read_and_told_and_doing_it_again_changes_nothing(tmp_path):
    labelled = resolve_labels(configure(tmp_path, ["no", "yes", "yes", "maybe so"] * 9))
    assert labelled.config.task.labels == ["maybe so", "no", "yes"]
    assert labelled.config.task.instruction == f"{SAID}maybe so, no, yes"
    assert [notice.got for notice in labelled.notices] == ["maybe so (9), no (9), yes (18)"]
    again = resolve_labels(labelled.config)
    assert (again.config, again.notices) == (labelled.config, [])


def test_spellings_of_one_label_are_told(tmp_path):
    answers = ["Very good", "very_good", "C++", "C#", "-5", "5"] * 9
    _, told = resolve_labels(configure(tmp_path, answers)).notices
    assert (told.where, told.got) == ("task.labels", "'Very good', 'very_good'")


def test_an_instruction_is_completed_only_where_it_does_not_name_them(tmp_path):
    labels = ["yes", "no"]
    config = configure(tmp_path, labels * 9, labels=labels, instruction="Say Yes or no.")
    assert resolve_labels(config).config is config
    config = configure(tmp_path, labels * 9, labels=labels, instruction="Is it now? ")
    told = resolve_labels(config).config.task
    assert told.instruction == f"Is it now?\n\n{SAID}yes, no"
    commas = resolve_labels(configure(tmp_path, labels * 9, labels=["a, b", "c"])).config.task
    assert commas.instruction == "Answer with one of these labels only:\na, b\nc"


def test_labels_that_do_not_fit_stay_out_of_the_prompt_and_that_is_told(tmp_path):
    labels = [f"label number {n:03d}" for n in range(150)]
    config = configure(tmp_path, labels * 2, labels=labels)
    labelled = resolve_labels(config)
    assert labelled.config is config
    (notice,) = labelled.notices
    assert notice.got == "150 labels, 2,736 characters"
    room = int(notice.remedy.split()[2].replace(",", ""))
    with_room = configure(tmp_path, labels * 2, max_seq_len=room, labels=labels)
    assert resolve_labels(with_room).config.task.instruction.startswith(SAID)


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        (["yes"] * 9, "one answer: 'yes'"),
        ([f"answer {n}" for n in range(40)], "40 different answers in 40 rows"),
        ([f"answer {n}" for n in range(1500)], "more than 1,000 different answers"),
    ],
)
def test_answers_that_are_no_labels_are_refused(tmp_path, answers, told):
    with pytest.raises(DataError, match="no labels") as caught:
        resolve_labels(configure(tmp_path, answers))
    assert caught.value.problems[0].got == told


def test_each_task_of_a_mixture_has_its_own(tmp_path):
    for name, answers in (("mood", ["good", "bad"] * 5), ("say", ["one", "two", "three"])):
        rows = [{"prompt": f"{name} {n}", "completion": text} for n, text in enumerate(answers)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    config = TuneloopConfig.model_validate(
        {
            "name": "mixed",
            "task": {
                "type": "mixture",
                "tasks": {
                    "mood": {"type": "classification", "instruction": "Mood?"},
                    "say": {"type": "generation", "instruction": "Say it."},
                },
            },
            "model": {"base": "parrot"},
            "data": {
                "sources": [
                    {"path": str(tmp_path / f"{n}.jsonl"), "format": "prompt_completion", "task": n}
                    for n in ("mood", "say")
                ]
            },
        }
    )
    tasks = resolve_labels(config).config.task.tasks
    assert (tasks["mood"].labels, tasks["say"].labels) == (["bad", "good"], [])
    assert tasks["mood"].instruction == f"Mood?\n\n{SAID}bad, good"
    assert tasks["say"] == config.task.tasks["say"]
