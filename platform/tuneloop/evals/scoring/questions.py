"""The questions of a held-out split, and the solved examples put before them."""

from __future__ import annotations

import json
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tuneloop.artifacts import Artifact
from tuneloop.errors import ArtifactError, DataError
from tuneloop.evals.scoring.function_calls import with_accepted
from tuneloop.records import Conversation, Message

_CANDIDATES = 64
_COLUMNS = (
    *("row_id", "source", "messages", "text", "num_tokens", "task"),
    *("tools", "accepted", "accepted_answers"),
)
_SYSTEM = ("system", "developer")


@dataclass(frozen=True)
class Question:
    """One row that is answered.

    Args:
        messages: The row without its last answer; empty for plain text.
        reference: The row's last answer; empty for plain text. Calls as `function_calls` has them.
        text: The row's text where it is plain text.
        task: The row's task in a mixture; empty otherwise.
        tools: JSON of the tools that may be called; empty for none.
        accepted: More answers that are right.
    """

    example_id: str
    messages: tuple[Message, ...] = ()
    reference: str = ""
    text: str = ""
    task: str = ""
    tools: str = ""
    accepted: tuple[str, ...] = ()

    def prompt(self, shots: Sequence[Conversation] = ()) -> tuple[Message, ...]:
        """Return the messages to send: system, the shots of its task, then the row's own turns."""
        system = tuple(m for m in self.messages if m.role in _SYSTEM)
        turns = tuple(m for m in self.messages if m.role not in _SYSTEM)
        fitting = [shot for shot in shots if shot.task == self.task]
        solved = tuple(m for shot in fitting for m in shot.messages if m.role not in _SYSTEM)
        return system + solved + turns

    def as_row(self) -> dict[str, Any]:
        """Return the question with its reference as a row of a dataset."""
        messages = (*self.messages, Message("assistant", self.reference)) if self.messages else ()
        return {
            "row_id": self.example_id,
            "messages": [message.as_dict() for message in messages],
            "text": self.text,
            "tools": self.tools,
            "task": self.task,
        }


def read_questions(
    dataset: Artifact, tasks: Collection[str] = (), split: str = "test"
) -> list[Question]:
    """Return a held-out split in the order it is stored.

    Args:
        dataset: Artifact with this split.
        tasks: Names of a mixture's tasks; each row then names its own.
        split: `test` or `validation`.

    Raises:
        DataError: The split is empty.
        ArtifactError: A row does not end with an answer, or an id occurs twice.
    """
    questions = []
    for row in _read_split(dataset, split):
        if row.get("text") is not None:
            questions.append(Question(str(row["row_id"]), text=row["text"]))
            continue
        messages = _messages(row)
        if len(messages) < 2 or messages[-1].role != "assistant":
            raise ArtifactError.of(
                f"a {split} row does not end with an answer",
                where=f"{dataset.ref}, row {row['row_id']}",
                got=", ".join(m.role for m in messages) or "no messages",
                allowed="at least one question and a last turn by the assistant",
            )
        task = str(row["task"]) if tasks else ""
        if tasks and task not in tasks:
            raise ArtifactError.of(
                f"a {split} row is of a task that the configuration does not have",
                where=f"{dataset.ref}, row {row['row_id']}",
                got=task,
                allowed=", ".join(tasks),
                remedy="prepare the dataset again",
            )
        reference = messages[-1].text
        if messages[-1].tool_calls:
            reference = with_accepted(reference, row.get("accepted"))
        tools = row.get("tools") or ""
        questions.append(
            Question(
                str(row["row_id"]),
                messages[:-1],
                reference,
                task=task,
                tools=tools,
                accepted=_texts_of(row.get("accepted_answers")),
            )
        )
    if not questions:
        raise DataError.of(
            f"there is nothing to score: the {split} split is empty",
            where=dataset.ref,
            remedy=f"raise data.split.num_{split}_examples or data.split.{split}_ratio",
        )
    if len({question.example_id for question in questions}) < len(questions):
        raise ArtifactError.of(
            f"a row id occurs twice in the {split} split",
            where=dataset.ref,
            remedy="prepare the dataset again with data.dedup.exact=true",
        )
    return questions


def _texts_of(accepted: Any) -> tuple[str, ...]:
    """Return the texts of a column `accepted_answers`; a user's own may hold something else."""
    is_list = isinstance(accepted, list) and all(isinstance(text, str) for text in accepted)
    return tuple(accepted) if is_list else ()


def normalised_prompt(question: Question) -> str:
    """Return the question's last turn with runs of white space as one space."""
    return " ".join(question.messages[-1].content.split()) if question.messages else ""


def read_solved(
    dataset: Artifact, tasks: Collection[str] = (), most: int | None = None
) -> list[Conversation]:
    """Return the conversations of the train split, ordered by row id; none of plain text.

    Args:
        tasks: Names of a mixture's tasks; each row then names its own.
        most: Rows at most, the first ones.
    """
    rows = [row for row in _read_split(dataset, "train", most) if row.get("messages")]
    rows.sort(key=lambda row: str(row["row_id"]))
    return [
        Conversation(
            _messages(row),
            str(row["row_id"]),
            str(row.get("source", "")),
            str(row["task"]) if tasks else "",
        )
        for row in rows
    ]


def choose_shots(
    dataset: Artifact, num_shots: int, seed: int, tasks: Collection[str] = ()
) -> tuple[Conversation, ...]:
    """Return solved examples from the train split: of typical length, and unlike one another.

    Rows of middling length (the two middle quarters by tokens) are drawn by the seed; from these
    each next shot is the one least like those chosen, by words in common on both sides. A plain
    text corpus has no shots.

    Args:
        dataset: Artifact with a train split.
        num_shots: How many; fewer are returned when the split is smaller.
        seed: The same seed chooses the same rows, in whatever order they are stored.
        tasks: Names of a mixture's tasks; `num_shots` are chosen for each.
    """
    if num_shots == 0:
        return ()
    rows = [row for row in _read_split(dataset, "train") if row.get("messages")]
    if not tasks:
        return _choose(rows, num_shots, seed)
    chosen = (_choose([r for r in rows if r["task"] == name], num_shots, seed) for name in tasks)
    return tuple(
        replace(shot, task=name)
        for name, shots in zip(tasks, chosen, strict=True)
        for shot in shots
    )


def _choose(rows: list[dict[str, Any]], num_shots: int, seed: int) -> tuple[Conversation, ...]:
    rows.sort(key=lambda row: (row["num_tokens"], row["row_id"]))
    if len(rows) >= 4 * num_shots:
        rows = rows[len(rows) // 4 : len(rows) - len(rows) // 4]
    pool = random.Random(seed).sample(rows, min(_CANDIDATES, len(rows)))
    conversations = [
        Conversation(_messages(row), str(row["row_id"]), str(row.get("source", ""))) for row in pool
    ]
    words = [_words_by_side(conversation) for conversation in conversations]
    chosen: list[int] = []
    while len(chosen) < min(num_shots, len(conversations)):
        rest = [index for index in range(len(conversations)) if index not in chosen]
        chosen.append(
            max(
                rest,
                key=lambda index: min(
                    (_distance(words[index], words[other]) for other in chosen), default=0.0
                ),
            )
        )
    return tuple(conversations[index] for index in chosen)


def messages_json(messages: Sequence[Message], tools: str = "") -> str:
    """Return messages as the JSON that predictions keep, after a turn with the tools, if any."""
    turns = [{"role": "tools", "content": tools}] if tools else []
    turns += [replace(m, weight=1).as_dict() for m in messages]
    return json.dumps(turns, ensure_ascii=False)


class _Words(NamedTuple):
    question: frozenset[str]
    answer: frozenset[str]


def _words_by_side(conversation: Conversation) -> _Words:
    *question, answer = conversation.messages
    asked = " ".join(m.text for m in question if m.role not in _SYSTEM)
    return _Words(frozenset(asked.split()), frozenset(answer.text.split()))


def _distance(left: _Words, right: _Words) -> float:
    """Return 2 minus the Jaccard similarities of questions and of answers."""
    return sum(
        1 - len(ours & theirs) / max(1, len(ours | theirs))
        for ours, theirs in zip(left, right, strict=True)
    )


def _messages(row: dict[str, Any]) -> tuple[Message, ...]:
    return tuple(map(Message.of, row["messages"] or ()))


def _read_split(dataset: Artifact, split: str, most: int | None = None) -> list[dict[str, Any]]:
    tables: list[pa.Table] = []
    for file in sorted((dataset.path / split).glob("*.parquet")):
        names = pq.read_schema(file).names
        tables.append(pq.read_table(file, columns=[name for name in _COLUMNS if name in names]))
    if most is not None and tables:
        # A row takes several times the memory in Python that it takes in Arrow.
        table = pa.concat_tables(tables, promote_options="default")
        tables = [table.take(pc.sort_indices(table["row_id"])[:most])]
    return [row for table in tables for row in table.to_pylist()]
