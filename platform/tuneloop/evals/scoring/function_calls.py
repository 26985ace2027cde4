"""Tool calls in an answer, held against the calls that are accepted.

A reference is a call on each line, `{"name": …, "arguments": {…}}`, and may end with a line
`{"accepted": [{NAME: {ARGUMENT: [VALUE, …]}}, …]}`: every value that is right for every argument,
where an empty text says that the argument may be left out. Without that line the values of the
reference are the accepted ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tuneloop.config import OneTaskConfig
from tuneloop.models.chat.calls import Call, find_calls

_ACCEPTED = '{"accepted"'
_IGNORED_IN_TEXT = str.maketrans("", "", " ,./-_*^'\"")


def function_call(reference: str, completion: str, _task: OneTaskConfig) -> float | None:
    """Return 1 if exactly the calls that are wanted are made, in any order; None if none is."""
    wanted = accepted_calls(reference)
    if wanted is None:
        return None
    found = find_calls(completion)
    if len(found) != len(wanted):
        return 0.0
    for call in found:
        fitting = next((i for i, accepted in enumerate(wanted) if _fits(call, accepted)), None)
        if fitting is None:
            return 0.0
        del wanted[fitting]
    return 1.0


def accepted_calls(reference: str) -> list[Call] | None:
    """Return the wanted calls, each with all accepted values of its arguments; None: no calls."""
    last = reference.rpartition("\n")[2]
    calls = find_calls(reference)
    if not calls:
        return None
    if last.startswith(_ACCEPTED):
        listed = json.loads(last)["accepted"]
        return [Call(name, args or {}) for one in listed for name, args in one.items()]
    return [Call(c.name, {key: [value] for key, value in c.arguments.items()}) for c in calls]


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
    if isinstance(value, bool) or isinstance(accepted, bool):
        return value is accepted
    if isinstance(value, str) and isinstance(accepted, str):
        return _plain(value) == _plain(accepted)
    if isinstance(value, dict) and isinstance(accepted, dict):
        return value == accepted or _arguments_fit(value, accepted)
    if isinstance(value, list) and isinstance(accepted, list):
        return _all_same(value, accepted)
    return bool(value == accepted)


def _all_same(values: Sequence[Any], accepted: Sequence[Any]) -> bool:
    return len(values) == len(accepted) and all(map(_same, values, accepted))


def _plain(text: str) -> str:
    """Return a text without the differences of writing that change no meaning of an argument."""
    plain = text.casefold().translate(_IGNORED_IN_TEXT)
    return plain or text
