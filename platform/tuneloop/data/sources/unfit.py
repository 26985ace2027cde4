"""Rows that hold more than text, or that a person has turned down: their columns say so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tuneloop.records import Message

_MEDIA = ("image", "video", "audio")
# Prodigy writes what the annotator did with a row beside it.
_PRODIGY = "_task_hash"


def media_of(row: Mapping[str, Any], messages: list[Message], layout: str) -> str:
    """Return the column with the images, videos or sounds that a row speaks of; empty if none.

    A list `images` beside a conversation belongs to it; a column `image` does where a turn has
    `<image>` in its place. Elsewhere such a column is the user's own.
    """
    texts = [message.content for message in messages if message.role == "user"]
    for medium in _MEDIA:
        has_place = any(f"<{medium}>" in text for text in texts)
        many = f"{medium}s"
        if row.get(many) and (has_place or (layout != "columns" and isinstance(row[many], list))):
            return many
        if row.get(medium) and has_place:
            return medium
    return ""


def is_turned_down(row: Mapping[str, Any]) -> bool:
    """Return whether an annotator rejected or passed over a row, as Prodigy keeps such rows."""
    return _PRODIGY in row and row.get("answer") in ("reject", "ignore")


def is_prodigy(row: Mapping[str, Any]) -> bool:
    """Return whether a row is of Prodigy: `answer` says what the annotator did with it."""
    return _PRODIGY in row and row.get("answer") in ("accept", "reject", "ignore")


def is_chat_export(row: Mapping[str, Any]) -> bool:
    """Return whether a row is a conversation as a chat application exports it, no list of turns."""
    mapping = row.get("mapping")
    if isinstance(mapping, dict):  # a tree of messages
        return all(isinstance(node, dict) and "children" in node for node in mapping.values())
    turns = row.get("chat_messages")
    return isinstance(turns, list) and all(
        isinstance(turn, dict) and "sender" in turn for turn in turns
    )
