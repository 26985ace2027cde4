"""From a row as the user laid it out to a conversation, or the reason why it is none."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, ClassVar

from tuneloop.config import OneTaskConfig, SourceConfig
from tuneloop.data.schema import ReasonCode, Rejection, Stage
from tuneloop.data.sources.calls import fitted_calls, made_up_id, unpaired_result
from tuneloop.data.sources.mending import (
    is_filled_in,
    is_preference,
    mended,
    preference_columns,
    without_nulls,
)
from tuneloop.data.sources.unfit import is_turned_down, media_of
from tuneloop.models.chat.tool_results import results_in_order
from tuneloop.records import Message, Role
from tuneloop.text import is_blank

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatbot": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
}
# Keys of a turn beside its role and content.
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_WEIGHTS = ("weight", "train", "loss")
_TURN_KEYS = frozenset(
    {"role", "content", "from", "value", "tool_calls", "function_call", "tool_call_id", "name"}
).union(_THOUGHTS, _WEIGHTS)
_CUT = "turns after the last answer to learn left out"
_FILLED_IN = "names without a value that Arrow fills in left out"
_NO_INPUT = "`<noinput>` taken for no input"
_ORDERED = "results of tools put in the order of their calls"
_NO_INPUTS = ("<noinput>", "noinput")
_MISSING = "a text is `{}`: what a program writes for a missing value; learned as it is"
# Words for a missing value that are hardly ever meant, of spreadsheets and of pandas.
_NO_VALUES = frozenset(
    {"#N/A", "#REF!", "#VALUE!", "#DIV/0!", "#NAME?", "#NULL!", "#NUM!", "nan", "NaN", "<NA>"}
)
_INCOMPLETE = "a call leaves out an argument that its tool requires; learned as it is"
_PAIRS = {
    "prompt_completion": ("prompt", "completion"),
    "question_answer": ("question", "answer"),
}


class RowError(ValueError):
    """A row cannot be used.

    Args:
        what: What is wrong, worded alike for all rows with the same mistake.
        got: What this row has.
        allowed: What would have been accepted.
        remedy: What to do.
    """

    code: ClassVar[ReasonCode] = ReasonCode.WRONG_LAYOUT

    def __init__(self, what: str, got: str = "", allowed: str = "", remedy: str = "") -> None:
        super().__init__(what, got, allowed, remedy)
        self.what, self.got, self.allowed, self.remedy = what, got, allowed, remedy

    def rejection(self) -> Rejection:
        """Return why the row is removed."""
        is_fatal = isinstance(self, FileError)
        details = self.what, self.got, self.allowed, self.remedy
        return Rejection(Stage.READ, self.code, *details, is_fatal)


class ParseError(RowError):
    """A row cannot be read as text or parsed."""

    code = ReasonCode.UNREADABLE


class FileError(ParseError):
    """A whole file cannot be used: never tolerated, whatever `data.max_bad_rows_ratio` allows."""


class RepeatedKeyError(ParseError):
    """An object of JSON gives a key twice: parsers keep the last, in silence."""


class AnswerError(RowError):
    """A row's answer is none that the task allows."""

    code = ReasonCode.WRONG_ANSWER


def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON from its keys and values. Raises RepeatedKeyError."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RepeatedKeyError(
            f"an object gives the key `{twice}` twice",
            got=_short([value for name, value in pairs if name == twice]),
            allowed="every key once",
            remedy="keep the one that is meant",
        )
    return found


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
    return _text(row, "text").strip("\n")


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
        of_turns = ("messages", "conversations", "tools")
        whole = {name: without_nulls(value) for name, value in row.items() if name in of_turns}
        row, changes = {**row, **whole}, [*changes, _FILLED_IN]
    if source.format in ("messages", "sharegpt"):
        messages = _turns(row, source.format)
        tools = _tools(row)
    elif source.format == "label_studio":
        messages = _annotated(row)
    elif source.format == "prompt_completion" and isinstance(row.get("prompt"), list):
        messages = _turns({"messages": _both_lists(row)}, "messages")
        tools = _tools(row)
    else:
        messages = _pair(row, source, task)
        if source.format == "alpaca":
            messages = [*_alpaca_before(row), *messages]
            tools = _tools(row)
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
            got=_short(row[medium]),
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
    told += sorted({_MISSING.format(m.content) for m in messages if m.content in _NO_VALUES})
    return Chat(messages[: last + 1], tools, (*changes, *told))


def _pair(row: Mapping[str, Any], source: SourceConfig, task: OneTaskConfig) -> list[Message]:
    system = ""
    if source.format == "alpaca":
        prompt = _text(row, "instruction")
        more = row.get("input")
        if more is not None and not isinstance(more, str):
            raise _wrong_type("input", more)
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
                raise _missing(columns["system"], row)
            if row[columns["system"]]:
                system = _text(row, columns["system"])
    reference = row.get(answer)
    if task.type == "extraction" and isinstance(reference, dict):
        completion = json.dumps(reference, ensure_ascii=False)
    elif isinstance(reference, bool | int | float) and math.isfinite(reference):
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


def _both_lists(row: Mapping[str, Any]) -> list[Any]:
    """Return the turns of a prompt and a completion that are lists of turns, as TRL has them."""
    if not isinstance(row.get("completion"), list):
        raise RowError(
            "`prompt` is a list of turns and `completion` is not",
            got=_short(row.get("completion")),
            allowed="both lists of turns, or both texts",
        )
    return [*row["prompt"], *row["completion"]]


def _annotated(row: Mapping[str, Any]) -> list[Message]:
    """Return a task of Label Studio as a question and the answer that people gave."""
    data = _decoded(row.get("data"), "data")
    if not isinstance(data, dict) or "text" not in data:
        raise RowError(
            "the task has no `data` with a `text`",
            got=", ".join(data) if isinstance(data, dict) else _short(data),
            allowed="tasks as `tuneloop label-next` writes them, exported as JSON",
            remedy="for other tasks export CSV or JSON-MIN and use format `columns`",
        )
    given = _decoded(row.get("annotations"), "annotations") or []
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
            got=", ".join(map(_short, dict.fromkeys(answers))),
            remedy="agree on one, and delete the other annotations",
        )
    prompt = _text(data, "text").rstrip().lstrip("\r\n")
    return [Message("user", prompt), Message("assistant", answers[0].strip())]


def _annotation(results: object) -> str:
    """Return the choice or the text of an annotation; empty without one."""
    for result in results if isinstance(results, list) else []:
        value = result.get("value") if isinstance(result, dict) else None
        for kind in ("choices", "text"):
            said = value.get(kind) if isinstance(value, dict) else None
            said = said[0] if isinstance(said, list) and said else said
            if isinstance(said, str) and said.strip():
                return said
    return ""


def _only_instance(instances: object) -> dict[str, Any]:
    """Return the input and output that Alpaca's seed tasks keep in a list."""
    instances = _decoded(instances, "instances")
    if not isinstance(instances, list) or len(instances) != 1 or not isinstance(instances[0], dict):
        raise RowError(
            "`instances` is not a list of one instance",
            got=_short(instances),
            allowed='[{"input": …, "output": …}]',
            remedy="write a row for each instance",
        )
    return instances[0]


def _alpaca_before(row: Mapping[str, Any]) -> list[Message]:
    """Return what stands before the instruction: `system`, and the turns of `history`."""
    messages = _system_beside(row)
    history = _decoded(row.get("history"), "history") or []
    is_pairs = isinstance(history, list) and all(
        isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)
        for turn in history
    )
    if not is_pairs:
        raise RowError(
            "`history` is not a list of questions and answers",
            got=_short(history),
            allowed='[["question", "answer"], …]',
        )
    for question, answer in history:
        if is_blank(question) or is_blank(answer):
            raise RowError("a turn of `history` is empty", got=_short([question, answer]))
        messages.append(Message("user", question.rstrip().lstrip("\r\n")))
        messages.append(Message("assistant", answer.strip()))
    return messages


def _system_beside(row: Mapping[str, Any]) -> list[Message]:
    """Return the system message that a column `system` holds, if any."""
    value = row.get("system")
    if value is not None and not isinstance(value, str):
        raise _wrong_type("system", value)
    return [Message("system", value.strip())] if value and value.strip() else []


def _turns(row: Mapping[str, Any], layout: str) -> list[Message]:
    column = "messages" if layout == "messages" else "conversations"
    if column not in row:
        other = "sharegpt" if layout == "messages" else "messages"
        if {"messages", "conversations"} & row.keys():
            raise missing_column(column, row, f"set `format: {other}`")
        raise _missing(column, row)
    turns = _decoded(row[column], column)
    if not isinstance(turns, list) or not turns:
        raise RowError(
            f"`{column}` is not a list of turns", got=_short(turns), allowed="at least two turns"
        )
    messages = [message for turn in turns if (message := _turn(turn, layout))]
    if system := _system_beside(row):
        if messages and messages[0].role in ("system", "developer"):
            raise RowError("the row has a column `system` and a system message in its turns")
        messages = [*system, *messages]
    _check_order(messages)
    return messages


def _turn(turn: object, layout: str) -> Message | None:
    """Return a turn as a message; None for a system message that says nothing."""
    keys = ("role", "content")
    if layout == "sharegpt" and isinstance(turn, dict) and "from" in turn:
        keys = ("from", "value")
    if not isinstance(turn, dict) or keys[0] not in turn:
        wanted = ("from", "value") if layout == "sharegpt" else keys
        raise RowError(
            f"a turn has no `{wanted[0]}` and `{wanted[1]}`",
            got=_short(turn),
            allowed=f'{{"{wanted[0]}": …, "{wanted[1]}": …}}',
        )
    said = {key: value for key, value in turn.items() if value not in (None, "", [], {})}
    unknown = [key for key in said if key not in _TURN_KEYS]
    if unknown:
        raise RowError(
            f"a turn has a key that is not understood: `{unknown[0]}`",
            got=_short(said[unknown[0]]),
            allowed=", ".join(sorted(_TURN_KEYS - {"from", "value"})),
            remedy="remove it, or write what it says in one of the allowed keys",
        )
    spoken = str(turn[keys[0]]).lower()
    role = _ROLES.get(spoken)
    if role is None:
        raise RowError(
            "a turn has a role that is not supported",
            got=_short(turn[keys[0]]),
            allowed=", ".join(_ROLES),
        )
    calls = said.get("tool_calls") or []
    if "function_call" in said:  # OpenAI's layout before there were tools
        calls = [{"function": said["function_call"]}]
    content = turn.get(keys[1])
    if spoken == "function_call":
        written = _decoded(content, "function_call")
        calls, content = [written] if isinstance(written, dict) else written, ""
    text = "" if content is None else _content(content)
    text = text.strip() if role == "assistant" else text.rstrip().lstrip("\r\n")
    if calls and role != "assistant":
        raise RowError(f"a turn of the {role} has tool calls", got=_short(calls))
    if is_blank(text) and not calls and role in ("user", "assistant"):
        if keys[1] not in turn:
            raise RowError(
                f"a turn has no `{keys[0]}` and `{keys[1]}`",
                got=_short(turn),
                allowed=f'{{"{keys[0]}": …, "{keys[1]}": …}}',
            )
        raise RowError(f"a turn of the {role} is empty")
    if not text and role in ("system", "developer"):
        return None
    thoughts = [said[key] for key in _THOUGHTS if key in said]
    fields = {name: said.get(name, "") for name in ("tool_call_id", "name")}
    for name, value in [*fields.items(), *(("reasoning_content", t) for t in thoughts)]:
        if not isinstance(value, str):
            raise _wrong_type(name, value)
    return Message(
        role,
        text,
        tool_calls=_calls(calls) if calls else "",
        reasoning_content=thoughts[0].strip() if thoughts else "",
        weight=_weight(turn, role),
        **fields,
    )


def _weight(turn: Mapping[str, Any], role: Role) -> int:
    """Return 0 for a turn marked as not to be learned, else 1."""
    for key in _WEIGHTS:
        value = turn.get(key)
        if value is None:
            continue
        if value not in (0, 1):  # also False, True, 0.0 and 1.0
            raise RowError(
                f"`{key}` of a turn is neither 0 nor 1",
                got=_short(value),
                allowed="0 or false: context only; 1 or true: learned",
            )
        if value and role != "assistant":
            raise RowError(
                f"a turn of the {role} is marked to be learned",
                got=f"{key}: {_short(value)}",
                allowed="turns of the assistant",
            )
        if not value and role == "assistant":
            return 0
    return 1


def _calls(calls: object) -> str:
    """Return the JSON of tool calls in OpenAI's layout, with arguments as JSON text."""
    allowed = '[{"function": {"name": …, "arguments": "{…}"}}]'
    if not isinstance(calls, list):
        raise RowError("`tool_calls` is not a list", got=_short(calls), allowed=allowed)
    found = []
    for number, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(
                "a tool call has no `function` with a `name`", got=_short(call), allowed=allowed
            )
        arguments = function.get("arguments", function.get("parameters"))
        found.append(
            {
                "id": str(call.get("id") or made_up_id(number)),
                "type": "function",
                "function": {"name": function["name"], "arguments": _arguments(arguments)},
            }
        )
    return json.dumps(found, ensure_ascii=False)


def _arguments(value: object) -> str:
    """Return a call's arguments as the JSON text of an object."""
    if value is None or value == "":
        return "{}"
    decoded = value
    if isinstance(value, str):
        try:
            decoded = json.loads(value, object_pairs_hook=object_of)
        except RowError:
            raise
        except ValueError as error:
            raise RowError(
                "the arguments of a tool call are not valid JSON", got=_short(value)
            ) from error
        if isinstance(decoded, str):
            raise RowError(
                "the arguments of a tool call are JSON within JSON",
                got=_short(value),
                allowed="the JSON text of an object, written once",
                remedy="data.sources[*].mend: [json_within_json] decodes them once more",
            )
    if not isinstance(decoded, dict):
        raise RowError(
            "the arguments of a tool call are not an object",
            got=_short(decoded),
            allowed="a JSON object",
        )
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _tools(row: Mapping[str, Any]) -> str:
    """Return the JSON of a row's tools in OpenAI's layout; empty for none."""
    column = "tools" if row.get("tools") or not row.get("functions") else "functions"
    tools = _decoded(row.get(column), column) or []
    if isinstance(tools, str):
        raise RowError(
            f"`{column}` is JSON within JSON",
            got=_short(tools),
            allowed="a list",
            remedy="data.sources[*].mend: [json_within_json] decodes it once more",
        )
    found = []
    for tool in tools if isinstance(tools, list) else [tools]:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(
                f"one of `{column}` has no `function` with a `name`",
                got=_short(tool),
                allowed='[{"type": "function", "function": {"name": …, "parameters": {…}}}]',
            )
        found.append(tool if "function" in tool else {"type": "function", "function": tool})
    return json.dumps(found, ensure_ascii=False) if found else ""


def _check_order(messages: Sequence[Message]) -> None:
    """Raise RowError if turns do not follow one another as in a conversation."""
    is_system = [message.role in ("system", "developer") for message in messages]
    if any(is_system[1:]):
        raise RowError("a system message is not the first one")
    spoken = [message for message in messages if message.role not in ("system", "developer")]
    before = "start"
    for message in spoken:
        if message.role not in _FOLLOWS[before]:
            break
        before = "call" if message.tool_calls else message.role
    else:
        if len(spoken) >= 2 and before in ("assistant", "call"):
            return
    raise RowError(
        "the turns do not alternate from user to assistant",
        got=_short(" ".join(message.role for message in spoken)),
        allowed="user assistant, once or more, after an optional system message; results of tools "
        "after the assistant's calls",
    )


_FOLLOWS: dict[str, tuple[str, ...]] = {
    "start": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    # A call whose result is not in the row may be followed by the next question.
    "call": ("tool", "user"),
    "tool": ("tool", "assistant"),
}


def _decoded(value: object, column: str) -> Any:
    """Return a value, or what its JSON holds: CSV has no lists."""
    if not isinstance(value, str) or not value.strip():
        return value if not isinstance(value, str) else None
    try:
        return json.loads(value, object_pairs_hook=object_of)
    except RowError:
        raise
    except ValueError as error:
        raise RowError(f"`{column}` is not valid JSON", got=_short(value)) from error


def _content(value: object) -> str:
    """Return a turn's text; a list of text parts, as OpenAI writes it, is joined."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(
        isinstance(part, dict)
        and part.get("type") in ("text", "input_text", "output_text")
        and isinstance(part.get("text"), str)
        for part in value
    ):
        return "".join(part["text"] for part in value)
    raise RowError("a turn's content is not text", got=_short(value), allowed="a string")


def check_answer(answer: str, task: OneTaskConfig) -> None:
    """Raise AnswerError if the answer is none that the task allows."""
    if task.type == "classification" and answer not in task.labels:
        close = difflib.get_close_matches(answer.lower(), task.labels, n=1)
        raise AnswerError(
            "the answer is not one of task.labels",
            got=_short(answer),
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
                "the answer is not valid JSON", got=_short(answer), allowed="a JSON object"
            ) from error
        if not isinstance(record, dict):
            raise AnswerError(
                "the answer is not a JSON object", got=_short(answer), allowed="a JSON object"
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
        raise _missing(column, row)
    value = row[column]
    if value is None:
        raise RowError(f"`{column}` is empty", got="null", allowed="text")
    if not isinstance(value, str):
        raise _wrong_type(column, value)
    if is_blank(value):
        raise RowError(f"`{column}` is empty", got=_short(value), allowed="text")
    return value


def _missing(column: str, row: Mapping[str, Any]) -> RowError:
    return missing_column(column, row, "set `format` to the rows' layout, or map `columns`")


def missing_column(column: str, row: Mapping[str, Any], remedy: str) -> RowError:
    """Return the error for a column that a row lacks, with a suggestion if one is close."""
    close = difflib.get_close_matches(column, list(row), n=1)
    return RowError(
        f"no column `{column}`",
        got="columns " + (", ".join(row) or "none"),
        remedy=f"did you mean `{close[0]}`? Otherwise {remedy}" if close else remedy,
    )


def _wrong_type(column: str, value: object) -> RowError:
    return RowError(
        f"`{column}` is not text",
        got=f"{type(value).__name__} {_short(value)}",
        allowed="a string",
    )


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return repr(text if len(text) <= 80 else text[:77] + "…")
