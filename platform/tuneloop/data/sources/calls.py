"""Whether the calls of a row fit the tools that it lists, and results their calls."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tuneloop.models.chat.tool_results import rounds_of
from tuneloop.records import Message

# Schemas that say elsewhere, or in other words, which arguments there are.
_SAID_ELSEWHERE = frozenset({"$ref", "allOf", "anyOf", "oneOf", "patternProperties"})


class Misfit(NamedTuple):
    """A call that the row's tools do not allow: what is wrong, what it has, what is allowed."""

    what: str
    got: str
    allowed: str


class FoundCalls(NamedTuple):
    """What is found in the calls that a row teaches.

    Args:
        misfit: The first call that the tools do not allow, if any.
        is_incomplete: Whether a call leaves out an argument that its tool requires. Many tools
            name no defaults where they have some, so that is told and not refused.
    """

    misfit: Misfit | None
    is_incomplete: bool


def fitted_calls(messages: Sequence[Message], tools: str) -> FoundCalls:
    """Return whether the calls to learn name functions and arguments that the tools have.

    Types of values are not compared: lists of tools name them in too many ways.

    Args:
        messages: The turns; those with weight 0 are context, whatever they call.
        tools: JSON of the row's tools in OpenAI's layout; a row that lists none allows all.
    """
    if not tools or not any(message.tool_calls for message in messages):
        return FoundCalls(None, False)
    listed: dict[str, list[dict[str, Any]]] = {}
    for tool in json.loads(tools):
        listed.setdefault(tool["function"]["name"], []).append(tool["function"])
    is_incomplete = False
    for function in _learned_calls(messages):
        name = function["name"]
        if name not in listed:
            what = "a call names a function that is not among the row's tools"
            return FoundCalls(Misfit(what, f"`{name}`", ", ".join(listed)), False)
        arguments = json.loads(function["arguments"])
        # Of two tools with one name either may be meant.
        names = [_argument_names(tool) for tool in listed[name]]
        known = list(dict.fromkeys(argument for own in names for argument in own or ()))
        unknown = [argument for argument in arguments if argument not in known]
        if unknown and None not in names:
            what = "a call has an argument that its tool does not have"
            got, allowed = f"`{unknown[0]}` of `{name}`", ", ".join(known) or "no argument"
            return FoundCalls(Misfit(what, got, allowed), False)
        required = set.intersection(*(_required(tool) for tool in listed[name]))
        is_incomplete = is_incomplete or not required <= arguments.keys()
    return FoundCalls(None, is_incomplete)


def unpaired_result(messages: Sequence[Message]) -> Misfit | None:
    """Return what is wrong where calls and the results after them do not belong together.

    A result may name a call that is not before it, or some of the calls may have results and
    others none. Results without an id say nothing, and neither do calls whose ids a reader made up.
    """
    for ids, start, stop in rounds_of(messages):
        named = [result.tool_call_id for result in messages[start:stop]]
        unknown = [name for name in named if name and name not in ids]
        if unknown and ids != [made_up_id(number) for number in range(len(ids))]:
            what = "the result of a tool names a call that is not before it"
            return Misfit(what, f"`{unknown[0]}`", ", ".join(ids))
        if named and stop - start < len(ids):
            what = "some calls made at once have results and others have none"
            got = f"{stop - start} results of {len(ids)} calls"
            return Misfit(what, got, "a result of each call, or of none")
    return None


def made_up_id(number: int) -> str:
    """Return the id of a turn's call that has none."""
    return f"call_{number}"


def _learned_calls(messages: Sequence[Message]) -> Iterator[dict[str, Any]]:
    for message in messages:
        if message.weight and message.tool_calls:
            yield from (call["function"] for call in json.loads(message.tool_calls))


def _argument_names(tool: Mapping[str, Any]) -> list[str] | None:
    """Return the arguments that a tool has; None if its schema leaves that open."""
    schema = tool.get("parameters")
    if not isinstance(schema, dict) or not isinstance(schema.get("properties"), dict):
        return None
    if _SAID_ELSEWHERE & schema.keys() or schema.get("additionalProperties") not in (None, False):
        return None
    return list(schema["properties"])


def _required(tool: Mapping[str, Any]) -> set[str]:
    schema = tool.get("parameters")
    names = schema.get("required") if isinstance(schema, dict) else None
    # A single argument's schema may say `required: true`, as older layouts do.
    return {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()
