"""What requests to endpoints cost, in a file: a crash loses no count of what may have been paid."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Cost:
    """Tokens and money."""

    tokens: int = 0
    money: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.tokens + other.tokens, self.money + other.money)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.tokens - other.tokens, self.money - other.money)


class Entry(NamedTuple):
    """A line of the file: a request that is about to be sent, or what became of it.

    Args:
        key: What the reply depends on.
        cost: The most that it can cost; once there is a reply, what it has cost.
        reply: None before it is sent.
        is_lost: It may have been answered and paid for, and no answer arrived.
        is_earlier: The reply is one of another file, and cost nothing now.
    """

    key: str
    cost: Cost
    reply: Mapping[str, Any] | None
    is_lost: bool = False
    is_earlier: bool = False


def read_entries(path: Path) -> Iterator[Entry]:
    """Yield what such a file holds, without lines that a crash cut off; nothing if it is absent."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            found = json.loads(line)
            if "identity" in found:  # an answer of an earlier version, which kept no costs
                yield Entry(found["identity"], Cost(), found, is_earlier=True)
                continue
            reply = None if found["reply"] is None else dict(found["reply"])
            flags = bool(found.get("lost")), bool(found.get("earlier"))
            yield Entry(found["key"], Cost(*found["cost"]), reply, *flags)
        except (ValueError, KeyError, TypeError):
            continue


class Spending:
    """What requests have cost, with their replies, in a file that a killed run leaves for the next.

    A request is noted before it is sent, with the most that it can cost, and its reply settles the
    note. One that a crash left without a reply counts at that most, so that a budget holds whatever
    happens.

    Args:
        path: A JSON Lines file; a last line cut off by a crash is ignored.

    Attributes:
        spent: What all requests of this file have cost.
        num_requests: How many they are, those that failed included.
        num_lost: Of them, how many have a reply that got lost: by a crash, a timeout or a broken
            connection. They may be paid for twice.
        lost: The most that those can have cost; it is part of `spent`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.spent = self.lost = Cost()
        self.num_requests = self.num_lost = 0
        sent: dict[str, list[Cost]] = {}
        for entry in read_entries(path):
            if entry.reply is None:
                sent.setdefault(entry.key, []).append(entry.cost)
                continue
            if not entry.is_earlier and sent.get(entry.key):
                # What a reply has cost settles one note: an earlier one may be of a lost reply.
                sent[entry.key].pop()
            self._count(entry)
        for key, costs in sent.items():
            for cost in costs:
                self._count(Entry(key, cost, None, is_lost=True))

    def note(self, key: str, cost: Cost) -> None:
        """Write down that a request is about to be sent, with the most that it can cost."""
        self._write(Entry(key, cost, None))

    def add(self, entry: Entry) -> None:
        """Keep a reply, or why there is none, with what it has cost."""
        self._write(entry)
        self._count(entry)

    def warn_of_lost(self, logger: logging.Logger) -> None:
        """Say how many replies earlier runs have lost, and what is held for them."""
        if self.num_lost:
            logger.warning(
                "the replies to %d earlier requests were lost (a kill, a timeout, a broken "
                "connection): asked again they may be paid for twice. They count in the budget "
                "with the most that they can have cost, %s tokens%s",
                self.num_lost,
                f"{self.lost.tokens:,}",
                f" and {self.lost.money:.3g} in money" if self.lost.money else "",
            )

    def _count(self, entry: Entry) -> None:
        self.spent += entry.cost
        self.num_requests += not entry.is_earlier
        if entry.is_lost:
            self.num_lost += 1
            self.lost += entry.cost

    def _write(self, entry: Entry) -> None:
        line = json.dumps(
            {
                "key": entry.key,
                "cost": [entry.cost.tokens, entry.cost.money],
                "reply": entry.reply,
                "lost": entry.is_lost,
                "earlier": entry.is_earlier,
            }
        )
        with self.path.open("a", encoding="utf-8") as file:
            # A line that a crash cut off stays by itself.
            file.write(f"\n{line}\n")
