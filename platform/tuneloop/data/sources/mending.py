"""Rows that are refused unless `data.sources[*].mend` names what is wrong with them.

Mending comes before a row is read as a conversation, so that reading stays strict.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from tuneloop.config import SourceConfig

# Text of text of text is a mistake that one decoding too few makes; more is something else.
_MOST_DECODINGS = 3
_ONCE_MORE = "JSON within JSON decoded once more"
_PREFERRED = "the preferred of two answers taken"


class Mended(NamedTuple):
    """A row as it is read, and what was changed in it, worded alike for all such rows."""

    row: Mapping[str, Any]
    changes: list[str]


def mended(row: Mapping[str, Any], source: SourceConfig) -> Mended:
    """Return a row with what `mend` of its source names put right; others as they are."""
    changes = []
    if "preferences" in source.mend and is_preference(row, source.format):
        row = _with_preferred(row, source.format)
        changes.append(_PREFERRED)
    if "json_within_json" in source.mend:
        decoded = _decoded_row(row)
        if decoded != row:
            row = decoded
            changes.append(_ONCE_MORE)
    return Mended(row, changes)


def without_nulls(value: object) -> Any:
    """Return a value without the names of objects that have no value, which Arrow fills in."""
    if isinstance(value, dict):
        return {name: without_nulls(part) for name, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


def is_filled_in(tools: object) -> bool:
    """Return whether tools have arguments without a schema: Arrow gave them those of other tools.

    So they stand in JSON that a program wrote from Arrow, as `datasets` does.
    """
    if not isinstance(tools, list):
        return False
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        schema = function.get("parameters") if isinstance(function, dict) else None
        arguments = schema.get("properties") if isinstance(schema, dict) else None
        if isinstance(arguments, dict) and None in arguments.values():
            return True
    return False


def is_preference(row: Mapping[str, Any], layout: str) -> bool:
    """Return whether a row has a preferred and a rejected answer in place of one answer.

    OpenAI writes `input`, `preferred_output` and `non_preferred_output`; others `chosen` and
    `rejected`, after a `prompt`, after the turns, or as the two outputs of an instruction.
    """
    has_both = {"chosen", "rejected"} <= row.keys()
    if layout == "messages":
        # Beside a whole row such columns are the user's own.
        return (has_both or "preferred_output" in row) and "messages" not in row
    if layout == "alpaca":
        return has_both and "output" not in row
    return layout == "sharegpt" and has_both


def preference_columns(layout: str) -> tuple[str, ...]:
    """Return the columns that rows of preferences have in place of those of a layout."""
    return (
        ("prompt", "input", "preferred_output", "chosen") if layout == "messages" else ("chosen",)
    )


def _with_preferred(row: Mapping[str, Any], layout: str) -> dict[str, Any]:
    if layout == "alpaca":
        return {**row, "output": row["chosen"]}
    if layout == "sharegpt":
        return {**row, "conversations": _joined(row.get("conversations"), row.get("chosen"))}
    if "preferred_output" in row:
        given = row.get("input")
        before = given if isinstance(given, dict) else {"messages": given}
        tools = {name: before[name] for name in ("tools", "functions") if before.get(name)}
        turns = _joined(before.get("messages"), row["preferred_output"])
        return {**row, **tools, "messages": turns}
    return {**row, "messages": _joined(row.get("prompt"), row["chosen"])}


def _joined(before: object, preferred: object) -> Any:
    """Return the turns of a prompt and the preferred answer, which may repeat the prompt."""
    before, preferred = _turns(before, "user"), _turns(preferred, "assistant")
    is_whole = len(preferred) > len(before) and preferred[: len(before)] == before
    return preferred if is_whole else [*before, *preferred]


def _turns(value: object, role: str) -> list[Any]:
    """Return turns as a list: of one turn, of a text, or of their JSON."""
    if isinstance(value, str):
        decoded = _once_more(value)
        if not isinstance(decoded, list) or not all(isinstance(turn, dict) for turn in decoded):
            return [{"role": role, "content": value}] if value.strip() else []
        value = decoded
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _decoded_row(row: Mapping[str, Any]) -> dict[str, Any]:
    changed = dict(row)
    for column in ("tools", "functions"):
        if isinstance(row.get(column), str):
            once = _once_more(row[column])
            if isinstance(once, str):
                changed[column] = _to_the_end(once)
    for column in ("messages", "conversations"):
        turns = row.get(column)
        turns = _once_more(turns) if isinstance(turns, str) else turns
        if isinstance(turns, list):
            changed[column] = [_decoded_turn(turn) for turn in turns]
    return changed


def _decoded_turn(turn: object) -> Any:
    if not isinstance(turn, dict):
        return turn
    changed = dict(turn)
    if isinstance(turn.get("tool_calls"), list):
        changed["tool_calls"] = [_decoded_call(call) for call in turn["tool_calls"]]
    if "function_call" in turn:
        changed["function_call"] = _decoded_call(turn["function_call"])
    for role, content in (("from", "value"), ("role", "content")):
        if turn.get(role) == "function_call" and isinstance(turn.get(content), str):
            once = _once_more(turn[content])
            calls = _to_the_end(once) if isinstance(once, str) else once
            many = calls if isinstance(calls, list) else [calls]
            if isinstance(once, str) or many != [_decoded_call(call) for call in many]:
                changed[content] = [_decoded_call(call) for call in many]
    return changed


def _decoded_call(call: object) -> Any:
    if not isinstance(call, dict):
        return call
    changed = dict(call)
    if isinstance(call.get("function"), dict):
        changed["function"] = _decoded_call(call["function"])
    if isinstance(arguments := call.get("arguments"), str):
        once = _once_more(arguments)
        if isinstance(once, str) and once != arguments:
            changed["arguments"] = _to_the_end(once)
    return changed


def _to_the_end(text: str) -> Any:
    value: Any = text
    for _ in range(_MOST_DECODINGS):
        if not isinstance(value, str):
            break
        value = _once_more(value)
    return value


def _once_more(text: str) -> Any:
    """Return what the JSON of a text holds; the text itself if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
