"""Results of tools in the order of their calls, wherever a conversation comes from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tuneloop.records import Message


class Round(NamedTuple):
    """Calls made at once: their ids, and the places of the results that follow them."""

    ids: list[str]
    start: int
    stop: int


def rounds_of(messages: Sequence[Message]) -> Iterator[Round]:
    """Yield the calls of each turn that makes some."""
    for place, message in enumerate(messages):
        if message.tool_calls:
            stop = place + 1
            while stop < len(messages) and messages[stop].role == "tool":
                stop += 1
            ids = [str(call.get("id") or "") for call in json.loads(message.tool_calls)]
            yield Round(ids, place + 1, stop)


def results_in_order(messages: Sequence[Message]) -> list[Message]:
    """Return the turns with the results of calls made at once in the order of the calls.

    Most templates write no ids, so the place alone says which result is whose. Results that do
    not all name one of the calls are left as they are.
    """
    ordered = list(messages)
    for ids, start, stop in rounds_of(messages):
        results = ordered[start:stop]
        if len(set(ids)) == len(ids) and {result.tool_call_id for result in results} <= set(ids):
            ordered[start:stop] = sorted(results, key=lambda one: ids.index(one.tool_call_id))
    return ordered
