"""What rows say, as columns, and the keys by which they are compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tuneloop.config import DedupConfig, TaskConfig
from tuneloop.data.hashing.columns import ComparedSide, Hashes, Indices, Texts, compared_text
from tuneloop.data.hashing.signatures import band_hashes, lowest_hashes, normalised_hashes, shingles
from tuneloop.records import Message

# Jaccard similarity of their sets of words from which two prompts ask nearly the same.
ALIKE_PROMPTS = 0.9
# Words in a row, the same in several prompts, from which they are a passage or a template.
PASSAGE_WORDS, PASSAGE_HASHES = 25, 8
# The columns that hold what a row says.
CONTENT_COLUMNS = ["task", "messages", "tools", "text"]


class OwnContent(NamedTuple):
    """What a row itself says: messages without the task's instruction, or text."""

    messages: list[dict[str, str]]
    text: str


@dataclass(frozen=True)
class Content:
    """How to read what rows say; small enough to send to every task.

    Args:
        is_text: The rows are documents; otherwise they are conversations.
        instructions: By name of the task, what stands before its conversations; the name is empty
            where there is no mixture.
    """

    is_text: bool
    instructions: Mapping[str, str]

    @staticmethod
    def of(task: TaskConfig) -> Content:
        """Return how to read the rows of a task or mixture."""
        instructions = {name: task.of(name).instruction.strip() for name in ("", *task.tasks)}
        return Content(task.type == "language_modeling", instructions)

    @property
    def columns(self) -> list[str]:
        """The columns that `column` reads."""
        return ["text"] if self.is_text else CONTENT_COLUMNS

    def own(self, row: Mapping[str, Any]) -> OwnContent:
        """Return what a row itself says, without the instruction that all rows of its task have."""
        messages, instruction = row["messages"], self.instructions[row["task"]]
        if messages and instruction:
            system = messages[0]["content"][len(instruction) :].strip()
            messages = [{"role": "system", "content": system}] * bool(system) + messages[1:]
        return OwnContent(spoken(messages, row["tools"]), row["text"])

    def own_of(self, table: pa.Table) -> list[OwnContent]:
        """Return what each row of a table itself says."""
        return [self.own(row) for row in table.select(CONTENT_COLUMNS).to_pylist()]

    def column(self, table: pa.Table, on: ComparedSide) -> pa.ChunkedArray | pa.Array:
        """Return one side of what each row says, as large strings; a document is all of its row."""
        if self.is_text:
            return table["text"].cast(pa.large_string())
        texts = [compared_text(*own, on) for own in self.own_of(table)]
        return pa.array(texts, pa.large_string())

    def answers(self, table: pa.Table) -> pa.Array:
        """Return all that the assistant says in each conversation: any turn may be learned."""
        rows = (own.messages for own in self.own_of(table))
        texts = ["\n".join(m["content"] for m in row if m["role"] == "assistant") for row in rows]
        return pa.array(texts, pa.large_string())


def spoken(messages: list[dict[str, Any]], tools: str) -> list[dict[str, str]]:
    """Return what is compared of a conversation: thoughts and calls are content, and tools' names.

    Args:
        tools: JSON of the row's tools; empty for none.
    """
    own = []
    for turn in messages:
        if not turn.get("tool_calls") and not turn.get("reasoning_content"):
            own.append({"role": turn["role"], "content": turn["content"]})
            continue
        message = Message.of(turn)
        text = f"{message.reasoning_content}\n{message.text}".lstrip("\n")
        own.append({"role": turn["role"], "content": text})
    if tools:
        # The same question with other tools has another answer.
        names = " ".join(tool["function"]["name"] for tool in json.loads(tools))
        own.insert(0, {"role": "tools", "content": names})
    return own


def dedup_keys(table: pa.Table, content: Content, dedup: DedupConfig) -> dict[str, pa.Array]:
    """Return the columns that deduplication needs to know of the rows.

    They are `content_id`, `num_characters`, `exact_key` and `bands`, as in `rendered_schema`.
    """
    texts = Texts.of_column(content.column(table, dedup.on))
    if content.is_text:
        # A document is all of its row: its bytes are there already.
        data = texts.data.data
        ids = [_digits(data[start:stop]) for start, stop in pairwise(texts.offsets.tolist())]
        sizes = pc.utf8_length(table["text"])
    else:
        rows, tasks = content.own_of(table), table["task"].to_pylist()
        ids = [content_id(*own, task) for own, task in zip(rows, tasks, strict=True)]
        sizes = pa.array([sum(len(m["content"]) for m in own) or len(text) for own, text in rows])
    return {
        "content_id": pa.array(ids, pa.string()),
        "num_characters": sizes.cast(pa.int32()),
        "exact_key": pa.array(normalised_hashes(texts)),
        "bands": _lists(band_hashes(texts, dedup.ngram_words, dedup.threshold)),
    }


def prompt_keys(table: pa.Table, content: Content, exact: Indices) -> dict[str, pa.Array]:
    """Return the columns of `rendered_schema` from `prompt_key` on, without `bands`.

    A document has its own text for a prompt, but no bands.

    Args:
        exact: `exact_key` of the rows.
    """
    if content.is_text:
        prompts = answers = Texts.of([""] * table.num_rows)
    else:
        rows = [own.messages for own in content.own_of(table)]
        prompts = Texts.of([compared_text(messages, "", "prompt") for messages in rows])
        answers = Texts.of([compared_text(messages, "", "completion") for messages in rows])
        has_prompt = np.array([bool(messages) for messages in rows], dtype=bool)
        exact = np.where(has_prompt, normalised_hashes(prompts), exact)
    return {
        "prompt_key": pa.array(exact),
        "answer_key": pa.array(normalised_hashes(answers)),
        "has_long_answer": pa.array(lowest_hashes(answers, PASSAGE_WORDS, 1)[:, 0] != 0),
        "prompt_bands": _lists(band_hashes(prompts, 1, ALIKE_PROMPTS)),
        "passage_bands": _lists(lowest_hashes(prompts, PASSAGE_WORDS, PASSAGE_HASHES)),
    }


def shingles_of_rows(
    table: pa.Table, keys: Indices, content: Content, on: ComparedSide, ngram_words: int
) -> pa.Table:
    """Return `key` and the sorted distinct `shingles` of the rows whose key is wanted.

    Args:
        keys: Ascending.
        on: Which side of a pair to compare.
    """
    chosen = rows_with_keys(table, keys)
    texts = [compared_text(*own, on) for own in content.own_of(chosen)]
    sets: list[Hashes] = shingles(texts, ngram_words).sets() if texts else []
    return pa.table({"key": chosen["key"], "shingles": pa.array(sets, pa.list_(pa.uint64()))})


def texts_of_rows(table: pa.Table, keys: Indices, content: Content) -> pa.Table:
    """Return `key`, `text`, `prompt` and `answer` of the rows whose key is wanted."""
    chosen = rows_with_keys(table, keys)
    rows = content.own_of(chosen)
    columns = {
        "text": [compared_text(*own, "both") for own in rows],
        "prompt": [compared_text(own.messages, "", "prompt") for own in rows],
        "answer": [compared_text(own.messages, "", "completion") for own in rows],
    }
    return pa.table(
        {"key": chosen["key"]} | {name: pa.array(c, pa.string()) for name, c in columns.items()}
    )


def rows_with_keys(table: pa.Table, keys: Indices) -> pa.Table:
    """Return the rows whose key is wanted."""
    return table.filter(pc.is_in(table["key"], value_set=pa.array(keys, pa.int64())))


def content_id(messages: list[dict[str, str]], text: str, task: str = "") -> str:
    """Return 20 hexadecimal digits that identify what a row says, wherever it was read.

    Args:
        task: Name of its task in a mixture: the same words in two tasks are two rows.
    """
    parts = [part for m in messages for part in (m["role"], m["content"])] or [text]
    parts = [f"task {task}", *parts] if task else parts
    return _digits("\0".join(parts).encode("utf-8", "replace"))


def _digits(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()[:20]


def _lists(values: NDArray[Any]) -> pa.FixedSizeListArray:
    """Return an array of shape (B, width) as B lists."""
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
