"""Text to ids by a fast engine, once it has shown that its ids are the model's own.

The model's Hugging Face tokenizer says what is right. A faster engine reads the same
`tokenizer.json` and is believed only after it gave the same ids on a sample of the user's own texts
and on texts made to trip it. Whichever encodes, the ids are the same.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from tuneloop.models.chat.awkward_texts import awkward_texts

_SHOWN_CHARACTERS = 60
# Engines remember words, some of them all; a new one after so many characters bounds that.
_FORGOTTEN_AFTER = 1_000_000_000


@dataclass(frozen=True)
class TokenLists:
    """The ids of B texts, one behind the other.

    Args:
        values: Shape (T,), all ids.
        offsets: Shape (B + 1,); text i has `values[offsets[i]:offsets[i + 1]]`.
    """

    values: NDArray[np.int32]
    offsets: NDArray[np.int64]

    @classmethod
    def of(
        cls, lists: Sequence[Any], first: int | None = None, last: int | None = None
    ) -> TokenLists:
        """Return lists or arrays of ids, packed.

        Args:
            lists: The ids of each text.
            first: Id that each text begins with, if it does not yet; None: it is left as it is.
            last: Id that each text ends with, likewise.
        """
        opening, closing = np.array([first or 0], np.uint32), np.array([last or 0], np.uint32)
        # With the ids as they come: another copy of them all would take as long as an engine does.
        parts, lengths = [np.zeros(0, np.uint32)], []
        for ids in lists:
            size = len(ids)
            opens = first is not None and not (size and ids[0] == first)
            end = ids[-1] if size else first if opens else None
            closes = last is not None and end != last
            if opens:
                parts.append(opening)
            parts.append(np.asarray(ids, np.uint32))
            if closes:
                parts.append(closing)
            lengths.append(size + opens + closes)
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        return cls(np.concatenate(parts).view(np.int32), offsets)

    def lists(self) -> list[list[int]]:
        """Return one list of ids for each text."""
        return [self.values[a:b].tolist() for a, b in itertools.pairwise(self.offsets.tolist())]


class Engine(Protocol):
    """Turns text into ids, without adding special tokens."""

    name: str

    def encode(self, text: str) -> list[int]:
        """Return the ids of one text."""

    def encode_batch(
        self, texts: Sequence[str], first: int | None = None, last: int | None = None
    ) -> TokenLists:
        """Return the ids of several texts, beginning and ending as in `TokenLists.of`."""


class OwnEngine:
    """The model's Hugging Face tokenizer itself.

    Args:
        tokenizer: A fast Hugging Face tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.name = f"tokenizers {importlib.metadata.version('tokenizers')}"

    def encode(self, text: str) -> list[int]:
        """Return the ids of one text."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def encode_batch(
        self, texts: Sequence[str], first: int | None = None, last: int | None = None
    ) -> TokenLists:
        """Return the ids of several texts, beginning and ending as in `TokenLists.of`."""
        return TokenLists.of([self.encode(text) for text in texts], first, last)


class FastEngine:
    """The same tokenizer, read by another package.

    A vocabulary may lack tokens for some bytes; what a tokenizer makes of the text around such a
    byte differs from engine to engine, so texts with one are left to the tokenizer itself.

    Args:
        tokenizer: A fast Hugging Face tokenizer.
        package: One of `FAST_PACKAGES`.

    Raises:
        ImportError: The package is not installed.
        ValueError: It does not know this kind of tokenizer. It may also panic.
    """

    def __init__(self, tokenizer: Any, package: str) -> None:
        self._own = OwnEngine(tokenizer)
        text = tokenizer.backend_tokenizer.to_str()
        description = json.loads(text)
        self._made_up = _give_every_byte_a_token(description)
        if self._made_up is not None:
            text = json.dumps(description)
        self._load = partial(_LOADERS[package], text)
        self._num_left = _FORGOTTEN_AFTER
        try:
            self._encode = self._load()
            self.name = f"{package} {importlib.metadata.version(package)}"
        except ImportError as error:
            raise ImportError("not installed (pip install 'tuneloop[fast]')") from error

    def encode(self, text: str) -> list[int]:
        """Return the ids of one text."""
        ids: list[int] = self.encode_batch([text]).values.tolist()
        return ids

    def encode_batch(
        self, texts: Sequence[str], first: int | None = None, last: int | None = None
    ) -> TokenLists:
        """Return the ids of several texts, beginning and ending as in `TokenLists.of`.

        All on this thread: Ray starts a worker for each core.
        """
        found: list[Any] = [self._ids(text) for text in texts]
        packed = TokenLists.of(found, first, last)
        # One look at all ids costs less than looking for those bytes in every text.
        if self._made_up is None or packed.values.max(initial=0) < self._made_up:
            return packed
        for place, ids in enumerate(found):
            if ids.max(initial=0) >= self._made_up:
                found[place] = self._own.encode(texts[place])
        return TokenLists.of(found, first, last)

    def _ids(self, text: str) -> NDArray[np.uint32]:
        self._num_left -= len(text)
        if self._num_left < 0:
            self._encode, self._num_left = self._load(), _FORGOTTEN_AFTER
        return self._encode(text)


_Encode = Callable[[str], NDArray[np.uint32]]


def _by_gigatoken(description: str) -> _Encode:
    """Return the encoder that knows the common patterns by heart and remembers words.

    Source: https://github.com/marcelroed/gigatoken
    """
    from gigatoken import Tokenizer

    encode: _Encode = Tokenizer.from_json(description).encode
    return encode


def _by_splintr(description: str) -> _Encode:
    """Return the encoder that knows any pattern, with a regular-expression engine of its own.

    Source: https://github.com/ml-rust/splintr
    """
    import splintr

    encode = splintr.from_json_bytes(description.encode()).encode_flat
    return lambda text: np.frombuffer(encode(text), np.uint32)


_LOADERS: dict[str, Callable[[str], _Encode]] = {
    "gigatoken": _by_gigatoken,
    "splintr-rs": _by_splintr,
}
# Fastest first.
FAST_PACKAGES = tuple(_LOADERS)


def _give_every_byte_a_token(description: dict[str, Any]) -> int | None:
    """Add tokens to a byte-level vocabulary for the bytes that have none, and return the first id.

    The engine does not load a vocabulary without them. The added ones must not be given out: their
    ids, that one and those above it, are no ids of the model. None: every byte has a token.
    """
    steps = description.get("pre_tokenizer") or {}
    kinds = {step.get("type") for step in [steps, *steps.get("pretokenizers", [])]}
    if "ByteLevel" not in kinds:
        return None
    vocabulary = description["model"]["vocab"]
    unknown = [byte for byte, name in enumerate(_byte_names()) if name not in vocabulary]
    used = [*vocabulary.values(), *(token["id"] for token in description["added_tokens"])]
    first = max(used, default=-1) + 1
    for new, byte in enumerate(unknown, first):
        vocabulary[_byte_names()[byte]] = new
    return first if unknown else None


def _byte_names() -> list[str]:
    """Return the character that stands for each byte in a byte-level vocabulary.

    Bytes that print stand for themselves, the others for the characters from U+0100 on.

    Source: Radford et al. 2019, Language Models are Unsupervised Multitask Learners, encoder.py.
    """
    prints = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = itertools.count(256)
    return [chr(byte if byte in prints else next(others)) for byte in range(256)]


@dataclass(frozen=True)
class Choice:
    """Which engine encodes, and why.

    Args:
        engine: Name and version.
        package: Of `FAST_PACKAGES`; empty for the tokenizer itself.
        num_texts: On how many texts the fast engine was held against the tokenizer.
        reason: Why none of the faster ones encodes; empty for the fastest.
    """

    engine: str
    package: str = ""
    num_texts: int = 0
    reason: str = ""

    def __str__(self) -> str:
        proof = f", proved on {self.num_texts:,} strings" if self.package else ""
        return f"{self.engine}{proof}" + (f", because {self.reason}" if self.reason else "")


def choose_engine(
    tokenizer: Any,
    own_texts: Sequence[str],
    make: Callable[[Any, str], Engine] = FastEngine,
) -> tuple[Engine, Choice]:
    """Return the fastest engine whose ids are the tokenizer's, or the tokenizer itself.

    Args:
        tokenizer: A fast Hugging Face tokenizer.
        own_texts: What is going to be encoded, or a sample of it.
        make: The engine of a package for a tokenizer.
    """
    own = OwnEngine(tokenizer)
    texts = [*own_texts, *awkward_texts(tokenizer)]
    # A lone surrogate is no text: the tokenizer refuses it, and so has an engine.
    wanted = [_tried(partial(own.encode, text))[0] for text in texts]
    reasons = []
    for package in FAST_PACKAGES:
        engine, failure = _tried(partial(make, tokenizer, package))
        if engine is None:
            reasons.append(f"{package}: {failure}")
            continue
        difference = _difference(engine, texts, wanted)
        if not difference:
            choice = Choice(engine.name, package, len(texts), "; ".join(reasons))
            return engine, choice
        reasons.append(f"{engine.name} {difference}")
    return own, Choice(own.name, reason="; ".join(reasons))


def _difference(engine: Engine, texts: Sequence[str], wanted: Sequence[list[int] | None]) -> str:
    """Return what an engine does otherwise than wanted, alone or in a batch; empty if nothing."""
    readable = [text for text, ids in zip(texts, wanted, strict=True) if ids is not None]
    lists, failure = _tried(lambda: engine.encode_batch(readable).lists())
    if lists is None:
        return f"failed on a batch: {failure}"
    if len(lists) != len(readable):
        return f"gave {len(lists)} lists of ids for {len(readable)} texts"
    of_batch = iter(lists)
    for text, right in zip(texts, wanted, strict=True):
        alone, _ = _tried(partial(engine.encode, text))
        for ids in [alone, None if right is None else next(of_batch)]:
            if ids != right:
                return f"gave {_shown(ids)} for {_shown(text)} where {_shown(right)} is right"
    return ""


_Result = TypeVar("_Result")


def _tried(work: Callable[[], _Result]) -> tuple[_Result | None, str]:
    """Return what work gives, or why it fails. A panic of a Rust library is no `Exception`."""
    try:
        return work(), ""
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        return None, (str(error).splitlines() or [type(error).__name__])[0][:200]


def _shown(value: object) -> str:
    if value is None:
        return "no ids"
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…"
