"""What is wrong with each answer, and which training rows may explain it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tuneloop.artifacts import Artifact, Workspace
from tuneloop.evals.scoring.choosable import OwnTag
from tuneloop.evals.scoring.error_tags import (
    ERROR_TAGS,
    Background,
    Evidence,
    JudgedAnswer,
    find_errors,
    languages_of,
    terms_of,
    vocabulary_of,
)
from tuneloop.evals.scoring.metrics import Scorer, without_thought
from tuneloop.evals.scoring.nearest import NearestRows, TrainRow, write_nearest
from tuneloop.evals.scoring.predictions import Prediction
from tuneloop.evals.scoring.questions import Question, read_solved
from tuneloop.records import Arm, Conversation

# Of a score between 0 and 1 less than this is a wrong answer.
_WRONG_BELOW = 0.5


def read_train(
    workspace: Workspace, dataset: Artifact, arms: Sequence[Arm], tasks: Sequence[str]
) -> list[Conversation]:
    """Return the train rows of a dataset; where it has none, those the last arm was trained on."""
    if rows := read_solved(dataset, tasks):
        return rows
    known = {a.fingerprint: a.ref for a in workspace.published("datasets")}
    return [
        row
        for fingerprint in arms[-1].trained_on.split()
        if fingerprint in known
        for row in read_solved(workspace.open(known[fingerprint]), tasks)
    ]


class Diagnosis:
    """Finds what is wrong with answers to questions.

    Args:
        scorer: Knows the tasks.
        questions: All rows that are answered.
        train: Training rows, to be held against the answers.
        tags: The user's own.
    """

    def __init__(
        self,
        scorer: Scorer,
        questions: Sequence[Question],
        train: Sequence[Conversation],
        tags: Sequence[OwnTag] = (),
    ) -> None:
        self._scorer, self._tags = scorer, tags
        self._questions = {q.example_id: q for q in questions if q.messages}
        self._terms, self._vocabulary = terms_of(train), vocabulary_of(train)
        self._languages = languages_of(q.reference for q in self._questions.values())
        self._nearest: dict[str, NearestRows] = {}
        self._twins: dict[str, list[TrainRow]] = {}
        for task in dict.fromkeys(q.task for q in self._questions.values()):
            rows = [row for row in train if row.task == task]
            if rows:
                self._nearest[task] = NearestRows(rows, scorer.of(task).task)
                asked = [q for q in self._questions.values() if q.task == task]
                self._twins |= self._nearest[task].twins(asked)

    @property
    def meanings(self) -> dict[str, str]:
        """What each tag says, by name."""
        return ERROR_TAGS | {tag.name: tag.meaning for tag in self._tags}

    def find(self, prediction: Prediction) -> list[Evidence]:
        """Return what is wrong with an answer; nothing for plain texts and missing answers."""
        question = self._questions.get(prediction.example_id)
        if question is None or prediction.finish_reason is None:
            return []
        scorer = self._scorer.of(prediction.task)
        completion = without_thought(prediction.completion)
        metric = scorer.metrics[scorer.primary]
        primary = self._scorer.primary
        answer = JudgedAnswer(
            prediction.reference,
            completion,
            prediction.finish_reason,
            prediction.prompt,
            "\n".join(message.text for message in question.messages),
            is_right=metric.kind == "binary" and prediction.scores.get(primary) == 1,
            tokens=prediction.completion_tokens,
        )
        background = Background(
            self._terms,
            self._vocabulary,
            self._languages,
            self._twins.get(prediction.example_id, ()),
        )
        found = find_errors(scorer, answer, background)
        for tag in self._tags:
            own = tag.find(prediction.reference, completion, prediction.example_id)
            found += [own] if own else []
        # Places are those in the completion as it is kept.
        return [e.moved(len(prediction.completion) - len(completion)) for e in found]

    def write_nearest(self, predictions: Sequence[Prediction], folder: Path) -> None:
        """Write `nearest.parquet` for the wrong answers among those of one arm."""
        wrong = {p.example_id: p for p in predictions if self._is_wrong(p)}
        near: dict[str, list[TrainRow]] = {}
        for task, rows in self._nearest.items():
            asked = [self._questions[key] for key, p in wrong.items() if p.task == task]
            near |= rows.explain(asked)
        write_nearest(near, wrong, self._tasks_of(wrong), folder)

    def _tasks_of(self, predictions: Mapping[str, Prediction]) -> dict[str, Scorer]:
        return {key: self._scorer.of(p.task) for key, p in predictions.items()}

    def _is_wrong(self, prediction: Prediction) -> bool:
        score = prediction.scores.get(self._scorer.primary)
        is_score = self._scorer.metrics[self._scorer.primary].kind != "number"
        is_asked = prediction.example_id in self._questions
        return is_asked and is_score and score is not None and score < _WRONG_BELOW
