"""The one function that turns messages into token ids, for training, serving and evaluation.

The rendered conversation is cut before every assistant turn, and no token reaches over a cut. So
the ids of a prompt are exactly the beginning of the ids the model was trained on, and the loss mask
follows from positions instead of from searching for markers. Elsewhere the ids are those of the
rendered text as a whole.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from tuneloop.errors import ModelError
from tuneloop.models.chat.own_templates import TEMPLATES, chosen_template
from tuneloop.models.chat.template import (
    FROZEN_DATE,
    ChatTemplate,
    Escapes,
    RenderError,
    closed_thinking,
)
from tuneloop.models.chat.tokenizer_backends import ReferenceTokenizer, TokenizerBackend, TokenLists
from tuneloop.records import Message, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CODE_VERSION = 2

# Byte-level vocabularies write each byte as a character: itself where it can be printed, otherwise
# one beyond the bytes (Radford et al. 2019; `bytes_to_unicode` in OpenAI's GPT-2).
_PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTE_OF = {chr(byte): byte for byte in _PRINTED} | {
    chr(256 + rank): byte
    for rank, byte in enumerate(byte for byte in range(256) if byte not in _PRINTED)
}


_log = logging.getLogger("tuneloop.models")


class _Piece(NamedTuple):
    """Part of a rendered conversation, encoded on its own.

    Args:
        is_target: It begins with an answer to learn, up to the stop token.
    """

    text: str
    is_target: bool


class Renderer:
    """Messages to ids and back, for one tokenizer and one chat template.

    Args:
        tokenizer: A fast Hugging Face tokenizer.
        template: The Jinja chat template.
        other_stops: Tokens that end an answer besides the template's and EOS, if they are special.

    Raises:
        ModelError: The template does not end an answer with a token that stops generation, or
            renders no question with its answer.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, template: str, other_stops: Collection[int] = ()
    ) -> None:
        self.tokenizer = tokenizer
        self._chat_template = ChatTemplate(tokenizer, template)
        self.template = self._chat_template.source
        self.backend: TokenizerBackend = ReferenceTokenizer(tokenizer)
        self._control = re.compile(r"(?!)")
        self.stop_ids: tuple[int, ...] = ()
        try:
            self.stop_ids = self._find_stop_ids(other_stops)
            self._control = self._find_control_tokens()
        except RenderError as error:
            raise ModelError.of(
                "the chat template cannot render a question and its answer",
                where="model.chat_template",
                got=str(error),
                remedy="set model.chat_template to another one: "
                + ", ".join(TEMPLATES)
                + ", or the path of a Jinja file",
            ) from error
        if self.template != template:
            _log.info("the chat template writes today's date: frozen at %s", FROZEN_DATE)

    @classmethod
    def load(cls, path: str | Path, chat_template: str = "auto") -> Renderer:
        """Load a model directory's tokenizer with its own or an explicit template.

        Args:
            path: Hugging Face model directory.
            chat_template: `auto`, the name of a built-in template, or the path of a Jinja file.

        Raises:
            ModelError: No readable tokenizer, or no such template.
        """
        try:
            tokenizer = _load_tokenizer(Path(path))
            other_stops = _other_stops(Path(path))
        except (OSError, ValueError, KeyError) as error:
            raise ModelError.of(
                "cannot load the tokenizer",
                where=str(path),
                got=str(error).splitlines()[0],
                allowed="a Hugging Face directory with tokenizer.json",
            ) from error
        return cls(tokenizer, chosen_template(tokenizer, chat_template), other_stops)

    def with_backend(self, backend: TokenizerBackend) -> Renderer:
        """Return the same rendering, its texts encoded by a backend verified to give equal ids."""
        renderer = copy.copy(self)
        renderer.backend = backend
        return renderer

    @property
    def setting_names(self) -> frozenset[str]:
        """The names that the template reads and a request may set, such as `enable_thinking`."""
        return self._chat_template.setting_names

    @property
    def opens_thinking(self) -> bool:
        """Whether a prompt ends with a tag behind which the model has to think."""
        return self._chat_template.opens_thinking

    def with_settings(self, settings: Mapping[str, Any]) -> Renderer:
        """Return the same rendering with values for some of `setting_names`.

        A control token in a value is text, as in a message.
        """
        if not settings:
            return self
        renderer = copy.copy(self)
        renderer._chat_template = self._chat_template.with_settings(settings)
        return renderer

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> list[int]:
        """Return the ids of a prompt, ready for the model to answer. Shape (T,).

        Args:
            tools: That may be called, in OpenAI's layout.

        Raises:
            RenderError: The messages cannot be rendered.
        """
        pieces, escapes = self._pieces(messages, tools, is_prompt=True)
        ids = list(itertools.chain.from_iterable(self._encode_pieces(pieces, escapes)))
        self._refuse_double_bos(ids)
        return ids

    def sample(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> Sample:
        """Return ids and loss mask of a conversation: answers and their stop tokens are targets.

        Answers of weight 0 are context. Nothing follows the stop token of the last answer, as
        nothing would when it is generated.

        Args:
            tools: That may be called, in OpenAI's layout.

        Raises:
            RenderError: The messages cannot be rendered or do not end with an answer to learn.
        """
        if not messages or messages[-1].role != "assistant":
            raise RenderError("the last message is not the assistant's")
        if not messages[-1].text.strip():
            raise RenderError("the answer is empty")
        if not messages[-1].weight:
            raise RenderError("the last answer has weight 0: nothing is learned from it")
        ids: list[int] = []
        mask: list[int] = []
        pieces, escapes = self._pieces(messages, tools, is_prompt=False)
        encoded = self._encode_pieces(pieces, escapes)
        for position, (piece, own) in enumerate(zip(pieces, encoded, strict=True)):
            if not piece.is_target:
                ids += own
                mask += [0] * len(own)
                continue
            stop = next((i for i, token in enumerate(own) if token in self.stop_ids), None)
            if stop is None:
                raise RenderError("the rendered answer has no stop token")
            if position == len(pieces) - 1:
                own = own[: stop + 1]
            ids += own
            mask += [1] * (stop + 1) + [0] * (len(own) - stop - 1)
        self._refuse_double_bos(ids)
        return Sample(ids, mask)

    def text_ids(self, text: str) -> list[int]:
        """Return the ids of plain text, with BOS where the tokenizer adds one. Shape (T,)."""
        ids: list[int] = self.batch_ids([text]).values.tolist()
        return ids

    def batch_ids(self, texts: Sequence[str], closed: bool = False) -> TokenLists:
        """Return the ids of plain texts, each with BOS where the tokenizer adds one.

        Args:
            texts: Whole documents, or the first parts of documents.
            closed: The texts are whole: each ends with EOS, where the tokenizer has one.
        """
        bos = self.tokenizer.bos_token_id if self.adds_bos else None
        eos = self.tokenizer.eos_token_id if closed else None
        return self.backend.encode_batch(texts, bos, eos)

    def texts(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> list[str]:
        """Return the pieces of a rendered conversation, each of which is encoded on its own.

        Raises:
            RenderError: The messages cannot be rendered.
        """
        pieces, escapes = self._pieces(messages, tools, is_prompt=False)
        return [escapes.restore(piece.text) for piece in pieces]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids without special tokens."""
        return str(
            self.tokenizer.decode(
                list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def decode_behind(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """Return what ids add to the text of those before them, without special tokens.

        The space before the first word of a text is dropped; before a word within one it stays.
        """
        text = self.decode(ids)
        special = self.special_names
        if not self.drops_leading_space or all(token in special for token in before):
            return text
        said = (self.token_bytes(token) for token in ids if token not in special)
        return f" {text}" if next(filter(None, said), b"").startswith(b" ") else text

    def decode_with(self, kept: Collection[int], ids: Sequence[int]) -> str:
        """Return the text of ids with the names of some special tokens and without the others."""
        parts, start = [], 0
        for place, token in enumerate(ids):
            if token in kept:
                parts += [self.decode(ids[start:place]), self._added_tokens[token]]
                start = place + 1
        return "".join([*parts, self.decode(ids[start:])])

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token stands for, which may be a part of a character.

        A special token stands for its name, an id that no token has for nothing.
        """
        if token_id in self._added_tokens:
            return self._added_tokens[token_id].encode()
        name = self.tokenizer.convert_ids_to_tokens(token_id)
        if name is None:
            return b""
        if self._decoders & {"ByteLevel"}:
            return bytes(_BYTE_OF[character] for character in name)
        if self._decoders & {"ByteFallback"} and re.fullmatch("<0x[0-9A-F]{2}>", name):
            return bytes([int(name[3:5], 16)])
        if self._decoders & {"Metaspace", "Replace"}:
            return name.replace("▁", " ").encode()
        return self.decode([token_id]).encode()

    def piece_texts(self, text: str, pieces: Sequence[NDArray[np.int32]]) -> list[str]:
        """Return what each piece of a text's ids says, without special tokens.

        Args:
            text: What was encoded.
            pieces: Its ids, cut anywhere; half a character at a border is replaced.
        """
        data, sizes = text.encode(), self._byte_sizes
        if sizes is not None:
            ends = np.cumsum([int(sizes[piece].sum()) for piece in pieces]).tolist()
            # Looked up in the text itself, which is many times as fast as decoding the ids.
            if ends and ends[-1] == len(data):
                borders = itertools.pairwise([0, *ends])
                return [data[a:b].decode("utf-8", "replace") for a, b in borders]
        decode = self.tokenizer.backend_tokenizer.decode
        return [decode(piece.tolist()) for piece in pieces]

    @cached_property
    def drops_leading_space(self) -> bool:
        """Whether the first word of a text has a space before it that decoding drops.

        So it is with tokenizers of the SentencePiece kind.
        """
        vocabulary = self.tokenizer.get_vocab()
        token = next(
            (index for name, index in vocabulary.items() if name[:1] == "▁" and name[1:]), None
        )
        return token is not None and not self.decode([token]).startswith(" ")

    @cached_property
    def _added_tokens(self) -> dict[int, str]:
        added = self.tokenizer.added_tokens_decoder
        return {index: token.content for index, token in added.items()}

    @cached_property
    def special_names(self) -> dict[int, str]:
        """The special tokens, which a text of ids leaves out, by their ids."""
        added = self.tokenizer.added_tokens_decoder
        return {index: token.content for index, token in added.items() if token.special}

    @cached_property
    def unsettled_ids(self) -> frozenset[int]:
        """Ids whose text depends on those that follow.

        Where tokens stand for bytes, a run of them is one text if all of it is one, and otherwise
        a sign of replacement for each byte. Special tokens, which are left out, do not end it.
        """
        if "ByteFallback" not in self._decoders:
            return frozenset()
        find = self.tokenizer.backend_tokenizer.token_to_id
        run = (find(f"<0x{byte:02X}>") for byte in range(256))
        return frozenset(index for index in run if index is not None) | self.special_names.keys()

    @cached_property
    def _decoders(self) -> set[str]:
        """The steps by which the tokenizer turns tokens into text."""
        decoder = json.loads(self.tokenizer.backend_tokenizer.to_str())["decoder"] or {}
        return {step["type"] for step in decoder.get("decoders", [decoder]) if step}

    @cached_property
    def _byte_sizes(self) -> NDArray[np.int64] | None:
        """How many bytes of text each id stands for; None where that is not a matter of the id."""
        backend = json.loads(self.tokenizer.backend_tokenizer.to_str())
        if (backend["decoder"] or {}).get("type") != "ByteLevel" or backend["normalizer"]:
            return None
        vocabulary = self.tokenizer.get_vocab()
        sizes = np.zeros(max(vocabulary.values()) + 1, np.int64)
        for name, index in vocabulary.items():
            sizes[index] = len(name)  # a character for a byte
        for index, token in self.tokenizer.added_tokens_decoder.items():
            sizes[index] = 0 if token.special else len(token.content.encode())
        return sizes

    @cached_property
    def hash(self) -> str:
        """Identity of the rendering, 64 hexadecimal digits: tokenizer, template, stop tokens, code.

        Equal before and after an export, so a finetuned model can be held against its dataset.
        """
        backend = json.loads(self.tokenizer.backend_tokenizer.to_str())
        backend.pop("padding", None)
        backend.pop("truncation", None)
        parts = [backend, self.template, list(self.stop_ids), self.adds_bos, CODE_VERSION]
        if not self._is_additive:
            # Their answers begin as within the whole since this version.
            parts.append("whole")
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write tokenizer files and the chat template in Hugging Face layout."""
        self.tokenizer.chat_template = self.template
        self.tokenizer.save_pretrained(str(path))

    def _pieces(
        self, messages: Sequence[Message], tools: Sequence[Any], is_prompt: bool
    ) -> tuple[list[_Piece], Escapes]:
        """Cut the rendered conversation before each answer, and return how it is escaped.

        In a prompt, an answer that the template has changed since it was given is not cut off.
        """
        template = self._chat_template
        turns = template.turns(messages, tools)
        given = [turns, list(tools), template.settings]
        found = self._control.findall(json.dumps(given, ensure_ascii=False))
        escapes = Escapes(())
        if found:
            escapes = Escapes.of(tuple(sorted(set(found))), str(given))
            turns, tools, settings = escapes.escape(given)
            template = template.with_settings(settings)
        whole = template.render(turns, tools, is_prompt)
        template.refuse_losses(whole, turns, tools)
        cuts: list[int] = []
        learned, followed = {}, {}
        for index, message in enumerate(messages):
            # What opens a conversation is nothing the model was asked for.
            if message.role != "assistant" or (is_prompt and index == 0):
                continue
            is_last = index == len(messages) - 1 and not is_prompt
            before = template.render(turns[:index], tools, True)
            if whole.startswith(before):
                start = len(before)
            elif is_last:
                whole = before + closed_thinking(before, whole, turns[index])
                start = len(before)
            else:
                try:
                    start = template.answer_start(turns, tools, index, whole, is_prompt)
                except RenderError:
                    if is_prompt or not message.weight:
                        continue
                    raise
            if cuts and start < cuts[-1]:
                raise RenderError("the chat template changes the order of the turns")
            cuts.append(start)
            learned[start] = bool(message.weight) and not is_prompt
            if learned[start] and not is_last:
                followed[start] = turns[index + 1]["content"] or ""
        borders = list(itertools.pairwise([0, *cuts, len(whole)]))
        for start, end in borders:
            self._refuse_unclosed(whole[start:end], followed.get(start, ""))
        return [_Piece(whole[a:b], learned.get(a, False)) for a, b in borders], escapes

    def _refuse_unclosed(self, answer: str, following: str) -> None:
        """Raise RenderError for an answer whose first stop token is that of the turn behind it.

        Args:
            answer: With the turns behind it.
            following: What the next turn says; empty where there is none.
        """
        said = following.strip()
        if not said:
            return
        names = self.tokenizer.convert_ids_to_tokens(list(self.stop_ids))
        stop = min((at for name in names if (at := answer.find(name)) >= 0), default=len(answer))
        if said in answer[:stop] and said not in answer[stop:]:
            raise RenderError("the chat template ends an answer or a call without a stop token")

    def _encode_pieces(self, pieces: Sequence[_Piece], escapes: Escapes) -> list[list[int]]:
        """Return the ids of each piece.

        Where a tokenizer writes a word otherwise at the beginning of a text, a piece has the ids it
        has within the whole, unless a token would reach over the border.
        """
        if self._is_additive:
            return [self._encode(piece.text, escapes) for piece in pieces]
        lists: list[list[int]] = []
        done: list[int] = []
        text = ""
        for piece in pieces:
            text += piece.text
            ids = self._encode(text, escapes)
            if ids[: len(done)] == done:
                own = ids[len(done) :]
            else:
                line, anchored = (self._encode(t, escapes) for t in ("\n", "\n" + piece.text))
                is_apart = anchored[: len(line)] == line
                own = anchored[len(line) :] if is_apart else self._encode(piece.text, escapes)
            lists.append(own)
            done = done + own
        return lists

    def _encode(self, text: str, escapes: Escapes) -> list[int]:
        if not escapes.tokens or not escapes.pattern.search(text):
            return self.backend.encode(text)
        added = self.tokenizer.added_tokens_decoder
        flags = {token.content: (index, token) for index, token in added.items() if token.special}
        names = sorted(flags, key=len, reverse=True)
        parts = re.split("(" + "|".join(map(re.escape, names)) + ")", text)
        ids: list[int] = []
        for number, part in enumerate(parts):
            if number % 2:
                ids.append(flags[part][0])
                continue
            if number and flags[parts[number - 1]][1].rstrip:
                part = part.lstrip()
            if number < len(parts) - 1 and flags[parts[number + 1]][1].lstrip:
                part = part.rstrip()
            ids += self._encode_plain(escapes.restore(part), is_first=not number)
        return ids

    def _encode_plain(self, text: str, is_first: bool) -> list[int]:
        """Return the ids of a text in which control tokens are text."""
        ids: list[int] = self._plain_backend.encode(text, add_special_tokens=False).ids
        if is_first or self._is_additive:
            return ids
        # Only the first text of all begins as a text does, if a special token shows that.
        stop = self.tokenizer.convert_ids_to_tokens(self.stop_ids[0])
        if self.backend.encode(stop + "a")[1:] == self.backend.encode("a"):
            return ids
        line, anchored = (
            self._plain_backend.encode(t, add_special_tokens=False).ids for t in ("\n", "\n" + text)
        )
        return list(anchored[len(line) :]) if anchored[: len(line)] == line else ids

    @cached_property
    def _plain_backend(self) -> Tokenizer:
        """The tokenizer, taking special tokens for text."""
        plain = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        plain.encode_special_tokens = True
        return plain

    @cached_property
    def _is_additive(self) -> bool:
        """Whether a text that is cut before an answer has the ids of its parts.

        So it is where tokens are made of bytes: the header before an answer ends a word. Tokenizers
        of the SentencePiece kind put a space before the first word of a text.
        """
        backend = json.loads(self.tokenizer.backend_tokenizer.to_str())
        splitter = json.dumps(backend["pre_tokenizer"])
        return '"ByteLevel"' in splitter and '"add_prefix_space": true' not in splitter

    def _refuse_double_bos(self, ids: Sequence[int]) -> None:
        bos = self.tokenizer.bos_token_id
        if bos is not None and list(ids[:2]) == [bos, bos]:
            raise RenderError("the prompt starts with two BOS tokens")

    @cached_property
    def adds_bos(self) -> bool:
        """Whether the tokenizer puts BOS before plain text by itself."""
        bos = self.tokenizer.bos_token_id
        return bos is not None and self.tokenizer.encode("a")[:1] == [bos]

    def _find_control_tokens(self) -> re.Pattern[str]:
        """Return what is text where it stands in a message: tokens that open or close something.

        Other special tokens, such as a code model's `<filename>`, are harmless words in a text.
        """
        turns = [Message("system", "a"), Message("user", "b"), Message("assistant", "c")]
        template = self._chat_template
        try:
            skeleton = template.render(template.turns(turns, ()), (), True)
        except RenderError:
            skeleton = template.render(template.turns(turns[1:], ()), (), True)
        found = {
            token.content
            for token in self.tokenizer.added_tokens_decoder.values()
            if token.special and token.content in skeleton
        } | {
            *self.tokenizer.all_special_tokens,
            *self.tokenizer.convert_ids_to_tokens(list(self.stop_ids)),
        }
        names = sorted(found, key=lambda name: (-len(name), name))
        return re.compile("|".join(map(re.escape, names)) or r"(?!)")

    def _find_stop_ids(self, others: Collection[int]) -> tuple[int, ...]:
        """Return the token the template ends an answer with, EOS, and what is special of others."""
        said = "Yes."
        pieces, _ = self._pieces([Message("user", "a"), Message("assistant", said)], (), False)
        # What stands before the answer opens it, as the name of a channel does.
        answer = pieces[-1].text.rpartition(said)[2]
        special = set(self.tokenizer.all_special_ids) | {
            index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special
        }
        stop = next((token for token in self.backend.encode(answer) if token in special), None)
        if stop is None:
            raise ModelError.of(
                "the chat template does not end an answer with a stop token",
                where="model.chat_template",
                got=repr(answer),
                remedy="end the assistant's turn with {{ eos_token }}",
            )
        eos = self.tokenizer.eos_token_id
        known = [stop] if eos is None else [stop, eos]
        return tuple(dict.fromkeys([*known, *(token for token in others if token in special)]))


def _load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Return the fast tokenizer of a model directory.

    `AutoTokenizer` imports torch and its model classes to find a special class; a directory that
    asks for the generic one is loaded without, five CPU seconds sooner in every process.
    """
    import transformers

    settings = path / "tokenizer_config.json"
    if settings.is_file():
        kind = json.loads(settings.read_text(encoding="utf-8")).get("tokenizer_class")
        if kind in ("TokenizersBackend", "PreTrainedTokenizerFast"):
            return transformers.PreTrainedTokenizerFast.from_pretrained(str(path))
    return transformers.AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)


def _other_stops(path: Path) -> list[int]:
    """Return the tokens that end a generation by a model's `generation_config.json`.

    Qwen and Llama 3 name some there that their tokenizers do not call EOS.
    """
    file = path / "generation_config.json"
    named = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    stops = named.get("eos_token_id")
    return stops if isinstance(stops, list) else [] if stops is None else [stops]
