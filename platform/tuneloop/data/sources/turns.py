"""From the turns of a row, as OpenAI and ShareGPT lay them out, to messages and tools."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tuneloop.data.sources.calls import made_up_id
from tuneloop.data.sources.row_errors import (
    RowError,
    decoded,
    missing_column,
    object_of,
    short,
    wrong_type,
)
from tuneloop.data.sources.values import learned_json
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
_FOLLOWS: dict[str, tuple[str, ...]] = {
    "start": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    # A call whose result is not in the row may be followed by the next question.
    "call": ("tool", "user"),
    "tool": ("tool", "assistant"),
}


def turns_of(row: Mapping[str, Any], layout: str) -> list[Message]:
    """Return a row's conversation by its layout, `messages` or `sharegpt`. Raises RowError."""
    column = "messages" if layout == "messages" else "conversations"
    if column not in row:
        other = "sharegpt" if layout == "messages" else "messages"
        if {"messages", "conversations"} & row.keys():
            raise missing_column(column, row, f"set `format: {other}`")
        raise missing_column(column, row)
    turns = decoded(row[column], column)
    if not isinstance(turns, list) or not turns:
        raise RowError(
            f"`{column}` is not a list of turns", got=short(turns), allowed="at least two turns"
        )
    messages = [message for turn in turns if (message := _turn(turn, layout))]
    if system := system_beside(row):
        if messages and messages[0].role in ("system", "developer"):
            raise RowError("the row has a column `system` and a system message in its turns")
        messages = [*system, *messages]
    _check_order(messages)
    return messages


def both_lists(row: Mapping[str, Any]) -> list[Any]:
    """Return the turns of a prompt and a completion that are lists of turns, as TRL has them."""
    if not isinstance(row.get("completion"), list):
        raise RowError(
            "`prompt` is a list of turns and `completion` is not",
            got=short(row.get("completion")),
            allowed="both lists of turns, or both texts",
        )
    return [*row["prompt"], *row["completion"]]


def system_beside(row: Mapping[str, Any]) -> list[Message]:
    """Return the system message that a column `system` holds, if any."""
    value = row.get("system")
    if value is not None and not isinstance(value, str):
        raise wrong_type("system", value)
    return [Message("system", value.strip())] if value and value.strip() else []


def _turn(turn: object, layout: str) -> Message | None:
    """Return a turn as a message; None for a system message that says nothing."""
    keys = ("role", "content")
    if layout == "sharegpt" and isinstance(turn, dict) and "from" in turn:
        keys = ("from", "value")
    if not isinstance(turn, dict) or keys[0] not in turn:
        wanted = ("from", "value") if layout == "sharegpt" else keys
        raise RowError(
            f"a turn has no `{wanted[0]}` and `{wanted[1]}`",
            got=short(turn),
            allowed=f'{{"{wanted[0]}": …, "{wanted[1]}": …}}',
        )
    said = {key: value for key, value in turn.items() if value not in (None, "", [], {})}
    unknown = [key for key in said if key not in _TURN_KEYS]
    if unknown:
        raise RowError(
            f"a turn has a key that is not understood: `{unknown[0]}`",
            got=short(said[unknown[0]]),
            allowed=", ".join(sorted(_TURN_KEYS - {"from", "value"})),
            remedy="remove it, or write what it says in one of the allowed keys",
        )
    spoken = str(turn[keys[0]]).lower()
    role = _ROLES.get(spoken)
    if role is None:
        raise RowError(
            "a turn has a role that is not supported",
            got=short(turn[keys[0]]),
            allowed=", ".join(_ROLES),
        )
    calls = said.get("tool_calls") or []
    if "function_call" in said:  # OpenAI's layout before there were tools
        calls = [{"function": said["function_call"]}]
    content = turn.get(keys[1])
    if spoken == "function_call":
        written = decoded(content, "function_call")
        calls, content = [written] if isinstance(written, dict) else written, ""
    text = "" if content is None else _content(content)
    text = text.strip() if role == "assistant" else text.rstrip().lstrip("\r\n")
    if calls and role != "assistant":
        raise RowError(f"a turn of the {role} has tool calls", got=short(calls))
    if is_blank(text) and not calls and role in ("user", "assistant"):
        if keys[1] not in turn:
            raise RowError(
                f"a turn has no `{keys[0]}` and `{keys[1]}`",
                got=short(turn),
                allowed=f'{{"{keys[0]}": …, "{keys[1]}": …}}',
            )
        raise RowError(f"a turn of the {role} is empty")
    if not text and role in ("system", "developer"):
        return None
    thoughts = [said[key] for key in _THOUGHTS if key in said]
    fields = {name: said.get(name, "") for name in ("tool_call_id", "name")}
    for name, value in [*fields.items(), *(("reasoning_content", t) for t in thoughts)]:
        if not isinstance(value, str):
            raise wrong_type(name, value)
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
                got=short(value),
                allowed="0 or false: context only; 1 or true: learned",
            )
        if value and role != "assistant":
            raise RowError(
                f"a turn of the {role} is marked to be learned",
                got=f"{key}: {short(value)}",
                allowed="turns of the assistant",
            )
        if not value and role == "assistant":
            return 0
    return 1


def _calls(calls: object) -> str:
    """Return the JSON of tool calls in OpenAI's layout, with arguments as JSON text."""
    allowed = '[{"function": {"name": …, "arguments": "{…}"}}]'
    if not isinstance(calls, list):
        raise RowError("`tool_calls` is not a list", got=short(calls), allowed=allowed)
    found = []
    for number, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(
                "a tool call has no `function` with a `name`", got=short(call), allowed=allowed
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
                "the arguments of a tool call are not valid JSON", got=short(value)
            ) from error
        if isinstance(decoded, str):
            raise RowError(
                "the arguments of a tool call are JSON within JSON",
                got=short(value),
                allowed="the JSON text of an object, written once",
                remedy="data.sources[*].mend: [json_within_json] decodes them once more",
            )
    if not isinstance(decoded, dict):
        raise RowError(
            "the arguments of a tool call are not an object",
            got=short(decoded),
            allowed="a JSON object",
        )
    return value if isinstance(value, str) else learned_json(value)


def tools_of(row: Mapping[str, Any]) -> str:
    """Return the JSON of a row's tools in OpenAI's layout; empty for none."""
    column = "tools" if row.get("tools") or not row.get("functions") else "functions"
    tools = decoded(row.get(column), column) or []
    if isinstance(tools, str):
        raise RowError(
            f"`{column}` is JSON within JSON",
            got=short(tools),
            allowed="a list",
            remedy="data.sources[*].mend: [json_within_json] decodes it once more",
        )
    found = []
    for tool in tools if isinstance(tools, list) else [tools]:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(
                f"one of `{column}` has no `function` with a `name`",
                got=short(tool),
                allowed='[{"type": "function", "function": {"name": …, "parameters": {…}}}]',
            )
        found.append(tool if "function" in tool else {"type": "function", "function": tool})
    return learned_json(found) if found else ""


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
        got=short(" ".join(message.role for message in spoken)),
        allowed="user assistant, once or more, after an optional system message; results of tools "
        "after the assistant's calls",
    )


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
    raise RowError("a turn's content is not text", got=short(value), allowed="a string")
