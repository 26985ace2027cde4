"""From a row as the user laid it out to a conversation, or the reason why it is none."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from tuneloop.config import OneTaskConfig, SourceConfig
from tuneloop.data.sources.calls import fitted_calls, unpaired_result
from tuneloop.data.sources.mending import (
    is_filled_in,
    is_preference,
    mended,
    preference_columns,
    without_nulls,
)
from tuneloop.data.sources.row_errors import (
    AnswerError,
    RowError,
    decoded,
    missing_column,
    object_of,
    short,
    wrong_type,
)
from tuneloop.data.sources.turns import both_lists, system_beside, tools_of, turns_of
from tuneloop.data.sources.unfit import is_turned_down, media_of
from tuneloop.data.sources.values import learned_json
from tuneloop.models.chat.tool_results import results_in_order
from tuneloop.records import Message
from tuneloop.text import is_blank

_CUT = "turns after the last answer to learn left out"
_FILLED_IN = "names without a value that Arrow fills in left out"
_NO_INPUT = "`<noinput>` taken for no input"
_ORDERED = "results of tools put in the order of their calls"
_NO_INPUTS = ("<noinput>", "noinput")
_MISSING = "a text is `{}`: what a program writes for a missing value; learned as it is"
# Words for a missing value that are hardly ever meant, of spreadsheets and of pandas.
NO_VALUES = frozenset(
    {"#N/A", "#REF!", "#VALUE!", "#DIV/0!", "#NAME?", "#NULL!", "#NUM!", "nan", "NaN", "<NA>"}
)
_INCOMPLETE = "a call leaves out an argument that its tool requires; learned as it is"
# What answers are to Label Studio.
_ANSWERS = ("choices", "textarea")
_PAIRS = {
    "prompt_completion": ("prompt", "completion"),
    "question_answer": ("question", "answer"),
}


def used_columns(source: SourceConfig) -> tuple[str, ...]:
    """Return the columns that a format reads; all others are the user's and are kept."""
    if source.format == "columns":
        return tuple(source.columns.values())
    if source.format in _PAIRS:
        return _PAIRS[source.format]
    own = {
        "alpaca": (*("instruction", "input", "output", "instances", "system", "history", "tools"),),
        "messages": ("messages", "system", "tools", "functions"),
        "sharegpt": ("conversations", "system", "tools"),
        "text": ("text",),
        "label_studio": ("data", "annotations"),
    }[source.format]
    return (*own, *(preference_columns(source.format) if "preferences" in source.mend else ()))


@dataclass(frozen=True)
class Chat:
    """A row's conversation.

    Args:
        messages: Turns; the last is an answer to learn.
        tools: JSON of the tools that may be called, a list in OpenAI's layout; empty for none.
        changes: What was mended, left out or is odd, worded alike for all such rows.
    """

    messages: list[Message]
    tools: str = ""
    changes: tuple[str, ...] = ()


def to_document(row: Mapping[str, Any]) -> str:
    """Return the text of a row of format `text`. Raises RowError."""
    return _text(row, "text").strip("\r\n")


def to_chat(row: Mapping[str, Any], source: SourceConfig, task: OneTaskConfig) -> Chat:
    """Return a row's conversation, checked against the task, without `task.instruction`.

    White space after a prompt, blank lines before it, and white space around an answer are
    dropped: the chat template supplies what stands between them. Turns after the last answer to
    learn teach nothing, and are left out.

    Raises:
        RowError: A column is missing, empty or of the wrong type, a turn has a key that is not
            understood, the turns are not a conversation, a call fits none of the row's tools, or
            the answer is none that the task allows.
    """
    row, changes = mended(row, source)
    if is_preference(row, source.format) and "preferences" not in source.mend:
        raise RowError(
            "the row holds a preferred and a rejected answer",
            got="columns " + ", ".join(row),
            allowed="one answer",
            remedy="preferences are not learned here; data.sources[*].mend: [preferences] learns "
            "the preferred answers, and nothing of the others",
        )
    if source.format == "prompt_completion" and row.get("label") is False:
        raise RowError(
            "the row says that its answer is a bad one",
            got="label false, as rows for KTO have it",
            allowed="answers to learn",
            remedy="leave rows with label false out; or, where the column means something else, "
            "set data.sources[*].format: columns and name prompt and completion",
        )
    # Whoever learns what annotators did learns from these as well.
    if is_turned_down(row) and "answer" not in used_columns(source):
        raise RowError(
            "the row was turned down by its annotator",
            got=f"answer: {row['answer']}, as Prodigy writes it",
            allowed="answer: accept",
            remedy="leave such rows out",
        )
    tools = ""
    if source.format == "alpaca" and "instances" in row and "output" not in row:
        row = {**row, **_only_instance(row["instances"])}
    if source.format == "alpaca" and str(row.get("input")).strip().lower() in _NO_INPUTS:
        row, changes = {**row, "input": ""}, [*changes, _NO_INPUT]
    if is_filled_in(row.get("tools")):
        of_turns = ["messages", "conversations", "tools"]
        of_turns += ["prompt", "completion"] if isinstance(row.get("prompt"), list) else []
        whole = {name: without_nulls(value) for name, value in row.items() if name in of_turns}
        row, changes = {**row, **whole}, [*changes, _FILLED_IN]
    if source.format in ("messages", "sharegpt"):
        messages = turns_of(row, source.format)
        tools = tools_of(row)
    elif source.format == "label_studio":
        messages = _annotated(row)
    elif source.format == "prompt_completion" and isinstance(row.get("prompt"), list):
        messages = turns_of({"messages": both_lists(row)}, "messages")
        tools = tools_of(row)
    else:
        messages = _pair(row, source, task)
        if source.format == "alpaca":
            messages = [*_alpaca_before(row), *messages]
            tools = tools_of(row)
    last = max((i for i, m in enumerate(messages) if m.role == "assistant" and m.weight), default=0)
    if not last:
        raise RowError(
            "no answer of the row is to be learned",
            got="weight 0 (or train or loss false) in all turns of the assistant",
            remedy="give one of them weight 1, or leave the row out",
        )
    check_answer(messages[last].content, task)
    if medium := media_of(row, messages, source.format):
        raise RowError(
            f"the row is about more than text: it has `{medium}`",
            got=short(row[medium]),
            allowed="rows of text alone",
            remedy="only text is learned; leave such rows out, or the column if it is not needed",
        )
    if unpaired := unpaired_result(messages[: last + 1]):
        raise RowError(*unpaired, remedy="give each result the id of its call")
    ordered = results_in_order(messages)
    if ordered != messages:
        messages, changes = ordered, [*changes, _ORDERED]
    calls = fitted_calls(messages[: last + 1], tools)
    if calls.misfit is not None:
        raise AnswerError(
            *calls.misfit,
            remedy="list the tool, or mend the call; a turn with weight 0 may call anything",
        )
    told = [_CUT] if last + 1 < len(messages) else []
    told += [_INCOMPLETE] if calls.is_incomplete else []
    told += sorted({_MISSING.format(m.content) for m in messages if m.content in NO_VALUES})
    return Chat(messages[: last + 1], tools, (*changes, *told))


def _pair(row: Mapping[str, Any], source: SourceConfig, task: OneTaskConfig) -> list[Message]:
    system = ""
    if source.format == "alpaca":
        prompt = _text(row, "instruction")
        more = row.get("input")
        if more is not None and not isinstance(more, str):
            raise wrong_type("input", more)
        if more and more.strip():
            prompt = f"{prompt.rstrip()}\n\n{more}"
        answer = "output"
    else:
        columns = dict(source.columns)
        if not columns:
            columns["prompt"], columns["completion"] = _PAIRS[source.format]
        prompt, answer = _text(row, columns["prompt"]), columns["completion"]
        if "system" in columns:
            if columns["system"] not in row:
                raise missing_column(columns["system"], row)
            if row[columns["system"]]:
                system = _text(row, columns["system"])
    reference = row.get(answer)
    if task.type == "extraction" and isinstance(reference, dict):
        completion = learned_json(reference)
    elif isinstance(reference, int) or (isinstance(reference, float) and math.isfinite(reference)):
        # A label 0 or 1, a count; pandas writes whole numbers as 1.0 where some are missing.
        is_whole = isinstance(reference, float) and reference.is_integer()
        completion = json.dumps(int(reference) if is_whole else reference)
    elif isinstance(reference, Decimal) and reference.is_finite():
        completion = f"{reference:f}"
    else:
        completion = _text(row, answer)
    messages = [Message("system", system.strip())] if system else []
    return [
        *messages,
        Message("user", prompt.rstrip().lstrip("\r\n")),
        Message("assistant", completion.strip()),
    ]


def _annotated(row: Mapping[str, Any]) -> list[Message]:
    """Return a task of Label Studio as a question and the answer that people gave."""
    data = decoded(row.get("data"), "data")
    if not isinstance(data, dict) or "text" not in data:
        raise RowError(
            "the task has no `data` with a `text`",
            got=", ".join(data) if isinstance(data, dict) else short(data),
            allowed="tasks as `tuneloop label-next` writes them, exported as JSON",
            remedy="for other tasks export CSV or JSON-MIN and use format `columns`",
        )
    given = decoded(row.get("annotations"), "annotations") or []
    results = [
        one.get("result") or []
        for one in given
        if isinstance(one, dict) and not one.get("was_cancelled")
    ]
    answers = [text for result in results if (text := _annotation(result))]
    if not answers:
        raise RowError(
            "the task is not labelled yet",
            remedy="label it, export labelled tasks only, or raise data.max_bad_rows_ratio",
        )
    if len(set(answers)) > 1:
        raise RowError(
            "people gave the task different answers",
            got=", ".join(map(short, dict.fromkeys(answers))),
            remedy="agree on one, and delete the other annotations",
        )
    prompt = _text(data, "text").rstrip().lstrip("\r\n")
    return [Message("user", prompt), Message("assistant", answers[0].strip())]


def _annotation(results: object) -> str:
    """Return the choice or the text of an annotation; empty without one.

    Raises:
        RowError: It has several: taking one of them would drop the others.
    """
    said: list[str] = []
    for result in results if isinstance(results, list) else []:
        # A marked passage, for example, has its text in the same place.
        is_answer = isinstance(result, dict) and result.get("type") in (None, *_ANSWERS)
        value = result.get("value") if is_answer else None
        for kind in ("choices", "text"):
            found = value.get(kind) if isinstance(value, dict) else None
            texts = found if isinstance(found, list) else [found]
            said += [text for text in texts if isinstance(text, str) and text.strip()]
    if len(set(said)) > 1:
        raise RowError(
            "an annotation has several answers",
            got=", ".join(map(short, dict.fromkeys(said))),
            allowed="one choice, or one text",
            remedy="for other tasks export CSV or JSON-MIN and use format `columns`",
        )
    return said[0] if said else ""


def _only_instance(instances: object) -> dict[str, Any]:
    """Return the input and output that Alpaca's seed tasks keep in a list."""
    instances = decoded(instances, "instances")
    if not isinstance(instances, list) or len(instances) != 1 or not isinstance(instances[0], dict):
        raise RowError(
            "`instances` is not a list of one instance",
            got=short(instances),
            allowed='[{"input": …, "output": …}]',
            remedy="write a row for each instance",
        )
    return instances[0]


def _alpaca_before(row: Mapping[str, Any]) -> list[Message]:
    """Return what stands before the instruction: `system`, and the turns of `history`."""
    messages = system_beside(row)
    history = decoded(row.get("history"), "history") or []
    is_pairs = isinstance(history, list) and all(
        isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)
        for turn in history
    )
    if not is_pairs:
        raise RowError(
            "`history` is not a list of questions and answers",
            got=short(history),
            allowed='[["question", "answer"], …]',
        )
    for question, answer in history:
        if is_blank(question) or is_blank(answer):
            raise RowError("a turn of `history` is empty", got=short([question, answer]))
        messages.append(Message("user", question.rstrip().lstrip("\r\n")))
        messages.append(Message("assistant", answer.strip()))
    return messages


def check_answer(answer: str, task: OneTaskConfig) -> None:
    """Raise AnswerError if the answer is none that the task allows."""
    if task.type == "classification" and answer not in task.labels:
        close = difflib.get_close_matches(answer.lower(), task.labels, n=1)
        raise AnswerError(
            "the answer is not one of task.labels",
            got=short(answer),
            allowed=", ".join(task.labels),
            remedy=f"did you mean `{close[0]}`?" if close else "add it to task.labels",
        )
    if task.type == "extraction":
        try:
            record = json.loads(
                answer, parse_constant=_refuse_constant, object_pairs_hook=object_of
            )
        except RowError:
            raise
        except ValueError as error:
            raise AnswerError(
                "the answer is not valid JSON", got=short(answer), allowed="a JSON object"
            ) from error
        if not isinstance(record, dict):
            raise AnswerError(
                "the answer is not a JSON object", got=short(answer), allowed="a JSON object"
            )
        absent = [name for name in task.fields if name not in record]
        if absent:
            raise AnswerError(
                f"the answer has no field `{absent[0]}`",
                got=", ".join(record),
                allowed="all of task.fields: " + ", ".join(task.fields),
            )


def _refuse_constant(name: str) -> float:
    """Raise ValueError for NaN and Infinity, which Python reads and no other parser of JSON."""
    raise ValueError(name)


def _text(row: Mapping[str, Any], column: str) -> str:
    if column not in row:
        raise missing_column(column, row)
    value = row[column]
    if value is None:
        raise RowError(f"`{column}` is empty", got="null", allowed="text")
    if not isinstance(value, str):
        raise wrong_type(column, value)
    if is_blank(value):
        raise RowError(f"`{column}` is empty", got=short(value), allowed="text")
    return value
