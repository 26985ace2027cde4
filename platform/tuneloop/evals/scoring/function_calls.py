"""Tool calls in an answer, held against the calls that are accepted.

A reference is a call on each line, `{"name": …, "arguments": {…}}`, and may end with a line
`{"accepted": [{NAME: {ARGUMENT: [VALUE, …]}}, …]}`: every value that is right for every argument,
where an empty text says that the argument may be left out. Without that line the values of the
reference are the accepted ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tuneloop.config import OneTaskConfig
from tuneloop.models.chat.calls import Call, find_calls

_ACCEPTED = '{"accepted"'
_IGNORED_IN_TEXT = str.maketrans("", "", " ,./-_*^'\"")


class _Only(NamedTuple):
    """A value that is accepted as it is: a list in it is a value, and no choice of several."""

    value: Any


def function_call(reference: str, completion: str, _task: OneTaskConfig) -> float | None:
    """Return 1 if exactly the calls that are wanted are made, in any order; None if none is."""
    wanted = accepted_calls(reference)
    if wanted is None:
        return None
    found = find_calls(completion)
    if len(found) != len(wanted):
        return 0.0
    return float(_are_matched(found, wanted))


def accepted_calls(reference: str) -> list[Call] | None:
    """Return the wanted calls, each with all accepted values of its arguments; None: no calls."""
    last = reference.rpartition("\n")[2]
    calls = find_calls(reference)
    if not calls:
        return None
    if last.startswith(_ACCEPTED):
        listed = json.loads(last)["accepted"]
        return [Call(name, args or {}) for one in listed for name, args in one.items()]
    return [
        Call(c.name, {key: [value and _Only(value)] for key, value in c.arguments.items()})
        for c in calls
    ]


def with_accepted(reference: str, accepted: object) -> str:
    """Return the reference of a row whose answer is a call, with the values that it accepts.

    Args:
        accepted: The row's column `accepted`: a list or its JSON; anything else says nothing.
    """
    if isinstance(accepted, str):
        try:
            accepted = json.loads(accepted)
        except ValueError:
            return reference
    if not isinstance(accepted, list) or not find_calls(reference):
        return reference
    # A column of Arrow structs has a null for every name that other rows have.
    calls = [
        {
            name: {key: values for key, values in arguments.items() if values is not None}
            for name, arguments in one.items()
            if isinstance(arguments, dict)
        }
        for one in accepted
        if isinstance(one, dict)
    ]
    return f"{reference}\n" + json.dumps({"accepted": calls}, ensure_ascii=False)


def without_accepted(reference: str) -> str:
    """Return a reference without its line of accepted values: what an answer looks like."""
    before, _, last = reference.rpartition("\n")
    return before if last.startswith(_ACCEPTED) else reference


def _are_matched(calls: Sequence[Call], wanted: Sequence[Call]) -> bool:
    """Return whether each call fits a wanted one of its own; what the first takes may be another's.

    Source: Kuhn 1955, "The Hungarian method for the assignment problem", by augmenting paths.
    """
    taken_by: dict[int, int] = {}

    def place(number: int, tried: set[int]) -> bool:
        for i, accepted in enumerate(wanted):
            if i not in tried and _fits(calls[number], accepted):
                tried.add(i)
                if i not in taken_by or place(taken_by[i], tried):
                    taken_by[i] = number
                    return True
        return False

    return all(place(number, set()) for number in range(len(calls)))


def _fits(call: Call, accepted: Call) -> bool:
    return call.name == accepted.name and _arguments_fit(call.arguments, accepted.arguments)


def _arguments_fit(arguments: Mapping[str, Any], accepted: Mapping[str, Any]) -> bool:
    """Return whether every argument has an accepted value and none is missing."""
    if not arguments.keys() <= accepted.keys():
        return False
    for name, values in accepted.items():
        choices = values if isinstance(values, list) else [values]
        if name not in arguments:
            if choices and "" not in choices:
                return False
        elif not any(_same(arguments[name], choice) for choice in choices):
            return False
    return True


def _same(value: object, accepted: object) -> bool:
    """Return whether a value is the accepted one; objects within may list accepted values."""
    if isinstance(accepted, _Only):
        return _equal(value, accepted.value)
    if isinstance(value, dict) and isinstance(accepted, dict):
        return _equal(value, accepted) or _arguments_fit(value, accepted)
    if isinstance(value, list) and isinstance(accepted, list):
        return len(value) == len(accepted) and all(map(_same, value, accepted))
    return _equal(value, accepted)


def _equal(value: object, other: object) -> bool:
    """Return whether two values are one, but for how texts in them are written."""
    if isinstance(value, bool) or isinstance(other, bool):
        return value is other
    if isinstance(value, str) and isinstance(other, str):
        return _plain(value) == _plain(other)
    if isinstance(value, dict) and isinstance(other, dict):
        return value.keys() == other.keys() and all(_equal(value[k], other[k]) for k in value)
    if isinstance(value, list) and isinstance(other, list):
        return len(value) == len(other) and all(map(_equal, value, other))
    return bool(value == other)


def _plain(text: str) -> str:
    """Return a text without the differences of writing that change no meaning of an argument."""
    plain = text.casefold().translate(_IGNORED_IN_TEXT)
    return plain or text
