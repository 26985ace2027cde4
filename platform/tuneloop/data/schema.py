"""What the steps of `prepare` agree on: sides, stages, reasons, row keys and Arrow schemas."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum, StrEnum
from typing import Any, NamedTuple, TypedDict

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tuneloop.errors import Problem

_ROWS_PER_FILE_BITS = 40
_REJECTION = pa.struct(
    [
        *[(name, pa.string()) for name in ("stage", "code", "what", "got", "allowed", "remedy")],
        ("is_fatal", pa.bool_()),
    ]
)
_PLAIN_TURN = [("role", pa.string()), ("content", pa.string())]
_FUNCTION = pa.struct([("name", pa.string()), ("arguments", pa.string())])
_CALL = pa.struct([("id", pa.string()), ("type", pa.string()), ("function", _FUNCTION)])
_MESSAGES = pa.list_(
    pa.struct(
        [
            *_PLAIN_TURN,
            ("tool_calls", pa.list_(_CALL)),
            *[(name, pa.string()) for name in ("tool_call_id", "name", "reasoning_content")],
            ("weight", pa.int8()),
        ]
    )
)
_PLAIN_MESSAGES = pa.list_(pa.struct(_PLAIN_TURN))


class Side(IntEnum):
    """Where a row ends; the numbers are the order in which the sides are written."""

    TRAIN = 0
    TEST = 1
    REMOVED = 2
    VALIDATION = 3

    @property
    def folder(self) -> str:
        """Name of its folder in the artifact."""
        return self.name.lower()


# In the order in which people read them.
SPLITS = (Side.TRAIN, Side.VALIDATION, Side.TEST)


class Stage(StrEnum):
    """The step that removed a row, in the order in which they run."""

    READ = "read"
    FILTER = "filter"
    TOKENIZE = "tokenize"
    DEDUP = "dedup"
    MARKS = "marks"
    DECONTAMINATION = "decontamination"
    SPLIT = "split"


class ReasonCode(StrEnum):
    """Why a row was removed, as a word that programs can rely on."""

    # Reading.
    UNREADABLE = "unreadable"
    WRONG_LAYOUT = "wrong_layout"
    WRONG_ANSWER = "wrong_answer"
    # Filters.
    EMPTY_AFTER_REPAIR = "empty_after_repair"
    TOO_FEW_CHARACTERS = "too_few_characters"
    TOO_MANY_CHARACTERS = "too_many_characters"
    TEMPLATE_MARKER = "template_marker"
    PERSONAL_DATA = "personal_data"
    REPETITION = "repetition"
    CUT_OFF = "cut_off"
    BOILERPLATE = "boilerplate"
    AI_SELF_REFERENCE = "ai_self_reference"
    MISSPELT = "misspelt"
    FOREIGN_LANGUAGE = "foreign_language"
    # Tokenizing.
    UNRENDERABLE = "unrenderable"
    TOO_LONG = "too_long"
    # Deduplication; near duplicates also in decontamination.
    EXACT_DUPLICATE = "exact_duplicate"
    NEAR_DUPLICATE = "near_duplicate"
    # Marks of people.
    MARKED = "marked"
    # Decontamination.
    SAME_TEXT = "same_text"
    SAME_PROMPT = "same_prompt"
    SHARED_NGRAMS = "shared_ngrams"
    # Split.
    GROUP_SURPLUS = "group_surplus"
    MIXTURE_SURPLUS = "mixture_surplus"
    TRAIN_LIMIT = "train_limit"
    OTHER_TASK = "other_task"
    MADE_OF_HELD_OUT = "made_of_held_out"
    SYNTHETIC_SURPLUS = "synthetic_surplus"
    # Generating rows.
    NO_REPLY = "no_reply"
    TOO_SIMILAR = "too_similar"
    UNRELATED = "unrelated"
    UNSUPPORTED = "unsupported"
    UNUSUAL_LENGTH = "unusual_length"
    LOST_DETAIL = "lost_detail"
    NO_AGREEMENT = "no_agreement"
    LOW_RATING = "low_rating"


class Reason(NamedTuple):
    """Why a row was removed.

    Args:
        code: For programs.
        text: For people, with what this row has.
        summary: The same for all rows that are counted together.
    """

    code: ReasonCode
    text: str
    summary: str


class Rejection(NamedTuple):
    """Why a row cannot be used, or is dropped by a filter, before rows are compared.

    Args:
        stage: Where it is removed.
        code: Why, for programs.
        what: What is wrong, worded alike for all rows with the same mistake.
        got: What this row has.
        allowed: What would have been accepted.
        remedy: What to do.
        is_fatal: Whether its whole file is unreadable, which is never tolerated.
    """

    stage: Stage
    code: ReasonCode
    what: str
    got: str = ""
    allowed: str = ""
    remedy: str = ""
    is_fatal: bool = False

    @staticmethod
    def of(struct: Mapping[str, Any]) -> Rejection:
        """Return a rejection as Arrow gives it back."""
        enums = {"stage": Stage(struct["stage"]), "code": ReasonCode(struct["code"])}
        return Rejection(**{**struct, **enums})

    def problem(self, place: str, more: str = "") -> Problem:
        """Return it as the problem of the row at a place, with more words after what is wrong."""
        return Problem(self.what + more, place, self.got, self.allowed, self.remedy)

    @property
    def reason(self) -> Reason:
        """Why the row was removed."""
        text = f"{self.what}: {self.got}" if self.got else self.what
        # What a chat template or a tokenizer says has its details after a colon.
        return Reason(self.code, text, self.what.partition(":")[0])


class SourceRow(TypedDict):
    """A row between reading and tokenizing, by `row_schema`.

    `rejection` is None for a usable row. `changes` is what filters repaired in it; `task` a name of
    `task.tasks`, if there are any; `stratum` its task and value of `split.stratify_by`;
    `seed_row_id` the row that a synthetic one was made from, or empty; `tools`
    the JSON of what may be called; `extra` the JSON of the user's own columns, whose types need not
    agree between files.
    """

    key: int
    source: str
    rejection: Rejection | None
    changes: str
    task: str
    messages: list[dict[str, Any]]
    tools: str
    text: str
    group: str
    stratum: str
    synthetic: bool
    seed_row_id: str
    extra: str


def row_key(file_position: int, number: int) -> int:
    """Return the key of a row: it orders rows as their files and they stand in the sources."""
    return (file_position << _ROWS_PER_FILE_BITS) + number


def file_positions(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the positions of the files that rows with these keys were read from. Shape (N,)."""
    return keys >> _ROWS_PER_FILE_BITS


def messages_type() -> pa.DataType:
    """Return the Arrow type of conversations before they are written."""
    return _MESSAGES


def row_schema() -> pa.Schema:
    """Return the Arrow schema of `SourceRow`."""
    return pa.schema(
        [
            ("key", pa.int64()),
            ("source", pa.string()),
            ("rejection", _REJECTION),
            ("changes", pa.string()),
            ("task", pa.string()),
            ("messages", _MESSAGES),
            ("tools", pa.string()),
            ("text", pa.string()),
            ("group", pa.string()),
            ("stratum", pa.string()),
            ("synthetic", pa.bool_()),
            ("seed_row_id", pa.string()),
            ("extra", pa.string()),
        ]
    )


def rendered_schema(num_bands: int, num_prompt_bands: int, num_passages: int) -> pa.Schema:
    """Return the Arrow schema of tokenized rows.

    To the columns of `row_schema` come `content_id` (hash of the row's own content), `is_plain`
    (it has no tools, and no turn has more than role and content), the tokens, what was `cut` so
    that the row fits, and the keys by which rows are compared.
    """
    return pa.schema(
        [
            *row_schema(),
            ("content_id", pa.string()),
            ("is_plain", pa.bool_()),
            ("input_ids", pa.list_(pa.int32())),
            ("loss_mask", pa.list_(pa.int8())),
            ("num_tokens", pa.int32()),
            ("num_target_tokens", pa.int32()),
            ("cut", pa.string()),
            ("num_characters", pa.int32()),
            ("exact_key", pa.int64()),
            ("prompt_key", pa.int64()),
            ("answer_key", pa.int64()),
            ("has_long_answer", pa.bool_()),
            ("bands", pa.list_(pa.uint64(), num_bands)),
            ("prompt_bands", pa.list_(pa.uint64(), num_prompt_bands)),
            ("passage_bands", pa.list_(pa.uint64(), num_passages)),
        ]
    )


def dataset_schema(columns: pa.Schema, is_text: bool = False, is_plain: bool = True) -> pa.Schema:
    """Return the Arrow schema of train, validation and test files.

    Args:
        columns: The user's own.
        is_text: Rows have `text` in place of `messages`, and say which documents are in them.
        is_plain: Every turn has a role and a content only, and no row has tools.
    """
    messages = _PLAIN_MESSAGES if is_plain else _MESSAGES
    return pa.schema(
        [
            ("row_id", pa.string()),
            ("source", pa.string()),
            ("synthetic", pa.bool_()),
            ("text", pa.string()) if is_text else ("messages", messages),
            *([] if is_plain or is_text else [("tools", pa.string())]),
            ("input_ids", pa.list_(pa.int32())),
            ("loss_mask", pa.list_(pa.int8())),
            ("num_tokens", pa.int32()),
            ("split_unit", pa.string()),
            *(document_columns() if is_text else []),
            *[(field.name, field.type) for field in columns],
        ]
    )


def plain_messages(messages: pa.ListArray) -> pa.ListArray:
    """Return the roles and contents of conversations alone."""
    turns = messages.values
    fields = [turns.field(name) for name, _ in _PLAIN_TURN]
    plain = pa.StructArray.from_arrays(fields, [name for name, _ in _PLAIN_TURN])
    return pa.ListArray.from_arrays(messages.offsets, plain)


def document_columns() -> list[pa.Field]:
    """Return the Arrow fields that tell the documents in a row of plain text apart."""
    return [
        pa.field("document_ids", pa.list_(pa.string())),
        pa.field("document_lengths", pa.list_(pa.int32())),
    ]


def removed_schema() -> pa.Schema:
    """Return the Arrow schema of `removed/`; `source` is the row's file and line."""
    return pa.schema(
        [
            ("row_id", pa.string()),
            ("stage", pa.string()),
            ("reason", pa.string()),
            ("kept_row_id", pa.string()),
            ("similarity", pa.float64()),
            ("text", pa.string()),
            ("source", pa.string()),
            ("reason_code", pa.string()),
        ]
    )
