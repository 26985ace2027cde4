"""Token ids to text while the ids are still coming."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

Decode = Callable[[Sequence[int]], str]


class Detokenizer:
    """Token ids to text, token by token.

    A character that spans several tokens comes with the last of them, so the pieces joined are
    the text of all ids together.

    Args:
        decode: Ids to text without special tokens.
        unsettled: Ids whose text depends on what follows; it comes with the next id of another
            kind. Without them the text of bytes comes at once, and is not taken back where a later
            byte breaks it.
    """

    def __init__(self, decode: Decode, unsettled: Collection[int] = ()) -> None:
        self._decode = decode
        self._unsettled = unsettled
        self._ids: list[int] = []
        self._start = 0  # a few tokens back, because text may depend on its neighbour
        self._num_sent = 0

    def push(self, token_id: int) -> str:
        """Return the text that this token completes."""
        self._ids.append(token_id)
        if token_id in self._unsettled:
            return ""
        before = self._decode(self._ids[self._start : self._num_sent])
        now = self._decode(self._ids[self._start :])
        if len(now) <= len(before) or now.endswith("\ufffd"):
            return ""
        self._start, self._num_sent = self._num_sent, len(self._ids)
        return now[len(before) :]

    @property
    def held(self) -> str:
        """What the tokens that have given no text so far would be if nothing followed."""
        before = self._decode(self._ids[self._start : self._num_sent])
        return self._decode(self._ids[self._start :])[len(before) :]


class StopFinder:
    """Watches for stop strings, at the cost of the newest text alone."""

    def __init__(self, decode: Decode, stop: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(decode)
        self._stop = stop
        self._kept = max(map(len, stop)) - 1
        self._tail = ""

    def push(self, token_id: int) -> bool:
        """Return whether the text that this token completes brings a stop string."""
        text = self._tail + self._detokenizer.push(token_id)
        self._tail = text[max(0, len(text) - self._kept) :]
        return any(stop in text for stop in self._stop)


class StreamedText:
    """The text that may be sent while an answer is being written.

    Text that may turn out to begin a stop string, or to be another one, is held back.

    Args:
        unsettled: As of `Detokenizer`.
    """

    def __init__(
        self, decode: Decode, stop: Sequence[str], unsettled: Collection[int] = ()
    ) -> None:
        self._detokenizer = Detokenizer(decode, unsettled)
        self._stop = stop
        self._text = ""
        self._sent = 0

    def push(self, token_id: int) -> str:
        """Return what can be sent after this token."""
        piece = self._detokenizer.push(token_id)
        if not piece:
            return ""
        self._text += piece
        end = len(self._text)
        for stop in self._stop:
            at = self._text.find(stop, max(0, self._sent - len(stop)))
            if at >= 0:
                end = min(end, at)
            end = min(end, _partial_stop(self._text, stop))
        delta = self._text[self._sent : max(end, self._sent)]
        self._sent += len(delta)
        return delta

    def finish(self, text: str) -> str:
        """Return what is left to send of the whole text."""
        return text[self._sent :]


def _partial_stop(text: str, stop: str) -> int:
    """Return where the text ends with a beginning of the stop string, or its length."""
    at = max(0, len(text) - len(stop) + 1)
    while (at := text.find(stop[0], at)) >= 0:
        if stop.startswith(text[at:]):
            return at
        at += 1
    return len(text)
