"""Making a conversation fit into `max_seq_len`: what is cut is never an answer or a system prompt.

The oldest turns go first, each question with all that followed it. Where one question is left, the
middle of the longest text that is not the assistant's goes, and `[…]` stands for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from tuneloop.models.chat.renderer import Renderer
from tuneloop.records import Message, Sample

_MARK = "\n[…]\n"


class Fitted(NamedTuple):
    """A conversation that fits.

    Args:
        messages: What is left of it.
        sample: Its ids and loss mask.
        cut: What went, for people; empty if nothing did.
    """

    messages: list[Message]
    sample: Sample
    cut: str


def fit(
    messages: Sequence[Message], tools: Sequence[Any], renderer: Renderer, max_tokens: int
) -> Fitted | None:
    """Return a conversation that has no more than some tokens; None if that is not possible.

    Raises:
        RenderError: It cannot be rendered.
    """

    def rendered(turns: Sequence[Message]) -> Sample:
        return renderer.sample(turns, tools)

    def fits(turns: Sequence[Message]) -> bool:
        return len(rendered(turns).input_ids) <= max_tokens

    whole = rendered(messages)
    if len(whole.input_ids) <= max_tokens:
        return Fitted(list(messages), whole, "")
    told = f"{len(whole.input_ids):,} tokens"
    questions = [index for index, message in enumerate(messages) if message.role == "user"]
    head = list(messages[: questions[0]])
    # Rendering a conversation once more for each turn would take long where there are hundreds.
    low, high = 1, len(questions) - 1
    while low < high:
        middle = (low + high) // 2
        if fits([*head, *messages[questions[middle] :]]):
            high = middle
        else:
            low = middle + 1
    left = list(messages)
    if len(questions) > 1:
        left = [*head, *messages[questions[low] :]]
        told += f", {questions[low] - questions[0]:,} oldest turns left out"
    if fits(left):
        return Fitted(left, rendered(left), told)
    texts = [i for i, m in enumerate(left) if m.role in ("user", "tool") and m.content]
    for index in sorted(texts, key=lambda index: -len(left[index].content)):
        found = _most_kept(left, index, fits)
        size = len(left[index].content)
        left[index] = replace(left[index], content=_without_middle(left[index].content, found))
        told += f", {size - found:,} characters from the middle of the {left[index].role}'s text"
        if fits(left):
            return Fitted(left, rendered(left), told)
    return None


def _most_kept(
    messages: Sequence[Message], index: int, fits: Callable[[Sequence[Message]], bool]
) -> int:
    """Return how many characters of a message can stay at most; 0 if none would do."""
    text = messages[index].content
    low, high = 0, len(text) - len(_MARK)
    while low < high:
        middle = (low + high + 1) // 2
        shorter = replace(messages[index], content=_without_middle(text, middle))
        if fits([*messages[:index], shorter, *messages[index + 1 :]]):
            low = middle
        else:
            high = middle - 1
    return max(0, low)


def _without_middle(text: str, kept: int) -> str:
    """Return a text of which so many characters are kept, from its beginning and its end."""
    start, end = kept - kept // 2, kept // 2
    return text[:start].rstrip() + _MARK + text[len(text) - end :].lstrip()
