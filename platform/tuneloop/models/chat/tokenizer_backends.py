"""Text to ids by a fast tokenizer backend, once it is verified to give the model's own ids.

The model's Hugging Face tokenizer is the reference. A faster backend reads the same
`tokenizer.json` and is used only after it gave the same ids on a sample of the user's own texts and
on texts made to trip it. Whichever backend encodes, the ids are the same.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from tuneloop.models.chat.awkward_texts import awkward_texts
from tuneloop.text import shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IdList = list[int] | NDArray[np.uint32]

_SHOWN_CHARACTERS = 60
# Some backends cache words without a limit; one is loaded anew after this many characters.
_RELOAD_AFTER_CHARACTERS = 1_000_000_000


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
        cls, lists: Sequence[IdList], first: int | None = None, last: int | None = None
    ) -> TokenLists:
        """Return lists or arrays of ids, packed.

        Args:
            lists: The ids of each text.
            first: Id put before each text that does not begin with it; None: texts are left alone.
            last: Id put after each text that does not end with it; None likewise.
        """
        opening, closing = np.array([first or 0], np.uint32), np.array([last or 0], np.uint32)
        # With the ids as they come: another copy of them all would take as long as encoding does.
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


class TokenizerBackend(Protocol):
    """Turns text into ids, without adding special tokens."""

    name: str

    def encode(self, text: str) -> list[int]:
        """Return the ids of one text."""

    def encode_batch(
        self, texts: Sequence[str], first: int | None = None, last: int | None = None
    ) -> TokenLists:
        """Return the ids of several texts, beginning and ending as in `TokenLists.of`."""


class ReferenceTokenizer:
    """The model's Hugging Face tokenizer itself.

    Args:
        tokenizer: A fast Hugging Face tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
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


class FastTokenizer:
    """The same tokenizer, run by another package.

    A vocabulary may lack tokens for some bytes; backends differ in what they make of the text
    around such a byte, so texts with one are left to the reference tokenizer.

    Args:
        tokenizer: A fast Hugging Face tokenizer.
        package: One of `FAST_PACKAGES`.

    Raises:
        ImportError: The package is not installed.
        ValueError: The package does not support this kind of tokenizer. It may also panic.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, package: str) -> None:
        self._reference = ReferenceTokenizer(tokenizer)
        text = tokenizer.backend_tokenizer.to_str()
        description = json.loads(text)
        self._first_added = _give_every_byte_a_token(description)
        if self._first_added is not None:
            text = json.dumps(description)
        self._load = partial(_LOADERS[package], text)
        self._num_left = _RELOAD_AFTER_CHARACTERS
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
        lists: list[IdList] = [self._ids(text) for text in texts]
        packed = TokenLists.of(lists, first, last)
        # Comparing all ids once costs less than searching every text for those bytes.
        if self._first_added is None or packed.values.max(initial=0) < self._first_added:
            return packed
        for index, ids in enumerate(lists):
            if np.max(ids, initial=0) >= self._first_added:
                lists[index] = self._reference.encode(texts[index])
        return TokenLists.of(lists, first, last)

    def _ids(self, text: str) -> NDArray[np.uint32]:
        self._num_left -= len(text)
        if self._num_left < 0:
            self._encode, self._num_left = self._load(), _RELOAD_AFTER_CHARACTERS
        return self._encode(text)


_Encode = Callable[[str], NDArray[np.uint32]]


def _by_gigatoken(description: str) -> _Encode:
    """Return the encoder with the common patterns compiled in and a cache of words.

    Source: https://github.com/marcelroed/gigatoken
    """
    from gigatoken import Tokenizer

    encode: _Encode = Tokenizer.from_json(description).encode
    return encode


def _by_splintr(description: str) -> _Encode:
    """Return the encoder for any pattern, with a regular-expression engine of its own.

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

    Fast backends do not load a vocabulary without them. The added ids, the first and all above it,
    are unknown to the model and must never be returned. None: every byte has a token.
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
class BackendChoice:
    """Which tokenizer backend encodes, and why. Dataset cards hold it under these names.

    Args:
        engine: Name and version.
        package: One of `FAST_PACKAGES`; empty for the reference tokenizer.
        num_texts: How many texts the fast backend was compared with the reference on.
        reason: Why no faster backend is used; empty for the fastest.
    """

    engine: str
    package: str = ""
    num_texts: int = 0
    reason: str = ""

    def __str__(self) -> str:
        verified = f", verified on {self.num_texts:,} strings" if self.package else ""
        return f"{self.engine}{verified}" + (f", because {self.reason}" if self.reason else "")


def choose_backend(
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    make: Callable[[PreTrainedTokenizerFast, str], TokenizerBackend] = FastTokenizer,
) -> tuple[TokenizerBackend, BackendChoice]:
    """Return the fastest backend that gives the tokenizer's own ids, or the reference tokenizer.

    Args:
        tokenizer: A fast Hugging Face tokenizer.
        texts: What is going to be encoded, or a sample of it.
        make: Returns a package's backend for a tokenizer.
    """
    reference = ReferenceTokenizer(tokenizer)
    texts = [*texts, *awkward_texts(tokenizer)]
    # A lone surrogate is no text: the tokenizer refuses it, and a backend has to refuse it too.
    expected = [_attempt(partial(reference.encode, text))[0] for text in texts]
    reasons = []
    for package in FAST_PACKAGES:
        backend, failure = _attempt(partial(make, tokenizer, package))
        if backend is None:
            reasons.append(f"{package}: {failure}")
            continue
        difference = _difference(backend, texts, expected)
        if not difference:
            return backend, BackendChoice(backend.name, package, len(texts), "; ".join(reasons))
        reasons.append(f"{backend.name} {difference}")
    return reference, BackendChoice(reference.name, reason="; ".join(reasons))


def _difference(
    backend: TokenizerBackend, texts: Sequence[str], expected: Sequence[list[int] | None]
) -> str:
    """Return where a backend's ids differ, alone or in a batch; empty if nowhere."""
    readable = [text for text, ids in zip(texts, expected, strict=True) if ids is not None]
    lists, failure = _attempt(lambda: backend.encode_batch(readable).lists())
    if lists is None:
        return f"failed on a batch: {failure}"
    if len(lists) != len(readable):
        return f"gave {len(lists)} lists of ids for {len(readable)} texts"
    in_batch = iter(lists)
    for text, right in zip(texts, expected, strict=True):
        alone, _ = _attempt(partial(backend.encode, text))
        for ids in [alone, None if right is None else next(in_batch)]:
            if ids != right:
                return f"gave {_shown(ids)} for {_shown(text)} where {_shown(right)} is right"
    return ""


_Result = TypeVar("_Result")


def _attempt(work: Callable[[], _Result]) -> tuple[_Result | None, str]:
    """Return the result of work, or why it fails. A panic of a Rust library is no `Exception`."""
    try:
        return work(), ""
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        return None, (str(error).splitlines() or [type(error).__name__])[0][:200]


def _shown(value: object) -> str:
    if value is None:
        return "no ids"
    return shorten(repr(value), _SHOWN_CHARACTERS)
