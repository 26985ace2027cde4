"""Token ids to text while the ids are still coming."""

from __future__ import annotations

from collections.abc import Sequence

from tuneloop.models.chat.renderer import Renderer


class Detokenizer:
    """Token ids to text, token by token.

    A character that spans several tokens comes with the last of them, so the pieces joined are
    the text of all ids together.
    """

    def __init__(self, renderer: Renderer) -> None:
        self._decode = renderer.decode
        self._ids: list[int] = []
        self._start = 0  # a few tokens back, because text may depend on its neighbour
        self._num_sent = 0

    def push(self, token_id: int) -> str:
        """Return the text that this token completes."""
        self._ids.append(token_id)
        before = self._decode(self._ids[self._start : self._num_sent])
        now = self._decode(self._ids[self._start :])
        if len(now) <= len(before) or now.endswith("\ufffd"):
            return ""
        self._start, self._num_sent = self._num_sent, len(self._ids)
        return now[len(before) :]


class StreamedText:
    """The text that may be sent while an answer is being written.

    Text that may turn out to begin a stop string is held back.
    """

    def __init__(self, renderer: Renderer, stop: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(renderer)
        self._stop = stop
        self._text = ""
        self._sent = 0

    def push(self, token_id: int) -> str:
        """Return what can be sent after this token."""
        self._text += self._detokenizer.push(token_id)
        end = len(self._text)
        for stop in self._stop:
            at = self._text.find(stop, max(0, self._sent - len(stop)))
            if at >= 0:
                end = min(end, at)
            for size in range(1, len(stop)):
                if self._text.endswith(stop[:size]):
                    end = min(end, len(self._text) - size)
        delta = self._text[self._sent : max(end, self._sent)]
        self._sent += len(delta)
        return delta

    def finish(self, text: str) -> str:
        """Return what is left to send of the whole text."""
        return text[self._sent :]
