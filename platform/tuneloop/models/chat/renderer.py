"""The one function that turns messages into token ids, for training, serving and evaluation.

Every assistant turn is tokenized apart from what stands before it. So the ids of a prompt are
exactly the beginning of the ids the model was trained on, whatever a tokenizer would merge across
that border, and the loss mask follows from positions instead of from searching for markers.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
import numpy as np
from numpy.typing import NDArray

from tuneloop.errors import ModelError, Problem
from tuneloop.models.chat.tokenizer_backends import ReferenceTokenizer, TokenizerBackend, TokenLists
from tuneloop.records import Message, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CODE_VERSION = 2

# Explicit templates for models that come without one. They are saved with the model, so that
# any server renders what was trained.
_ALPACA = """\
{% set ns = namespace(system='Below is an instruction that describes a task. \
Write a response that appropriately completes the request.') %}\
{% for message in messages %}\
{% if message.role == 'system' %}{% set ns.system = message.content %}{% endif %}\
{% endfor %}\
{{ ns.system }}

{% for message in messages %}\
{% if message.role == 'user' %}### Instruction:
{{ message.content }}

{% elif message.role == 'assistant' %}### Response:
{{ message.content }}{{ eos_token }}

{% endif %}\
{% endfor %}\
{% if add_generation_prompt %}### Response:
{% endif %}"""

_CHATML = """\
{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}\
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

_PLAIN = """\
{% for message in messages %}{{ message.content }}\
{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}\
{% endfor %}"""

TEMPLATES = {"alpaca": _ALPACA, "chatml": _CHATML, "plain": _PLAIN}


class RenderError(ValueError):
    """One row cannot be rendered; the message is the reason kept with the removed row."""


class Renderer:
    """Messages to ids and back, for one tokenizer and one chat template.

    Args:
        tokenizer: A fast Hugging Face tokenizer.
        template: The Jinja chat template.

    Raises:
        ModelError: The template does not end an answer with a token that stops generation.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, template: str) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.backend: TokenizerBackend = ReferenceTokenizer(tokenizer)
        self._control = re.compile(r"(?!)")
        self.stop_ids: tuple[int, ...] = ()
        self.stop_ids = self._find_stop_ids()
        self._control = self._find_control_tokens()

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
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(
                Problem(
                    "cannot load the tokenizer",
                    where=str(path),
                    got=str(error).splitlines()[0],
                    allowed="a Hugging Face directory with tokenizer.json",
                )
            ) from error
        return cls(tokenizer, _template(tokenizer, chat_template))

    def with_backend(self, backend: TokenizerBackend) -> Renderer:
        """Return the same rendering, its texts encoded by a backend verified to give equal ids."""
        renderer = copy.copy(self)
        renderer.backend = backend
        return renderer

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of a prompt, ready for the model to answer. Shape (T,).

        Raises:
            RenderError: The messages cannot be rendered.
        """
        ids: list[int] = []
        for text, _ in self._segments(messages, generation_prompt=True):
            ids += self._encode(text)
        self._refuse_double_bos(ids)
        return ids

    def sample(self, messages: Sequence[Message]) -> Sample:
        """Return ids and loss mask of a conversation: answers and their stop tokens are targets.

        Nothing follows the stop token of the last answer, as nothing would when it is generated.

        Raises:
            RenderError: The messages cannot be rendered or do not end with an answer.
        """
        if not messages or messages[-1].role != "assistant":
            raise RenderError("the last message is not the assistant's")
        if not messages[-1].content.strip():
            raise RenderError("the answer is empty")
        ids: list[int] = []
        mask: list[int] = []
        segments = self._segments(messages, generation_prompt=False)
        for position, (text, is_answer) in enumerate(segments):
            piece = self._encode(text)
            if not is_answer:
                ids += piece
                mask += [0] * len(piece)
                continue
            stop = next((i for i, token in enumerate(piece) if token in self.stop_ids), None)
            if stop is None:
                raise RenderError("the rendered answer has no stop token")
            if position == len(segments) - 1:
                piece = piece[: stop + 1]
            ids += piece
            mask += [1] * (stop + 1) + [0] * (len(piece) - stop - 1)
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
        bos = self.tokenizer.bos_token_id if self._adds_bos else None
        eos = self.tokenizer.eos_token_id if closed else None
        return self.backend.encode_batch(texts, bos, eos)

    def texts(self, messages: Sequence[Message]) -> list[str]:
        """Return the pieces of a rendered conversation, each of which is encoded on its own.

        Raises:
            RenderError: The messages cannot be rendered.
        """
        return [text for text, _ in self._segments(messages, generation_prompt=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids without special tokens."""
        return str(
            self.tokenizer.decode(
                list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

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

        Equal before and after `save`, so a finetuned model can be held against its dataset.
        """
        backend = json.loads(self.tokenizer.backend_tokenizer.to_str())
        backend.pop("padding", None)
        backend.pop("truncation", None)
        parts = [backend, self.template, list(self.stop_ids), self._adds_bos, CODE_VERSION]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write tokenizer files and the chat template in Hugging Face layout."""
        self.tokenizer.chat_template = self.template
        self.tokenizer.save_pretrained(str(path))

    def _segments(
        self, messages: Sequence[Message], generation_prompt: bool
    ) -> list[tuple[str, bool]]:
        """Cut the rendered conversation into (text, is an answer) pieces."""
        for message in messages:
            control = self._control.search(message.content)
            if control:
                raise RenderError(f"the text contains the control token {control.group()!r}")
        segments: list[tuple[str, bool]] = []
        rendered = ""
        for index, message in enumerate(messages):
            if message.role != "assistant":
                continue
            before = self._render(messages[:index], True)
            after = self._render(messages[: index + 1], False)
            if not before.startswith(rendered) or not after.startswith(before):
                raise RenderError("the chat template changes earlier turns when a turn is added")
            segments += [(before[len(rendered) :], False), (after[len(before) :], True)]
            rendered = after
        if generation_prompt:
            whole = self._render(messages, True)
            if not whole.startswith(rendered):
                raise RenderError("the chat template changes earlier turns when a turn is added")
            segments.append((whole[len(rendered) :], False))
        return segments

    def _render(self, messages: Sequence[Message], generation_prompt: bool) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [{"role": m.role, "content": m.content} for m in messages],
                    chat_template=self.template,
                    tokenize=False,
                    add_generation_prompt=generation_prompt,
                )
            )
        except jinja2.TemplateError as error:
            raise RenderError(f"the chat template refuses the messages: {error}") from error

    def _encode(self, text: str) -> list[int]:
        return self.backend.encode(text)

    def _refuse_double_bos(self, ids: Sequence[int]) -> None:
        bos = self.tokenizer.bos_token_id
        if bos is not None and list(ids[:2]) == [bos, bos]:
            raise RenderError("the prompt starts with two BOS tokens")

    @cached_property
    def _adds_bos(self) -> bool:
        """Whether the tokenizer puts BOS before plain text by itself."""
        bos = self.tokenizer.bos_token_id
        return bos is not None and self.tokenizer.encode("a")[:1] == [bos]

    def _find_control_tokens(self) -> re.Pattern[str]:
        """Return what may not stand in a message: tokens that open, close or end something.

        Other special tokens, such as a code model's `<filename>`, are harmless words in a text.
        """
        turns = [Message("system", "a"), Message("user", "b"), Message("assistant", "c")]
        try:
            skeleton = self._render(turns, True)
        except RenderError:
            skeleton = self._render(turns[1:], True)
        names = {
            token.content
            for token in self.tokenizer.added_tokens_decoder.values()
            if token.special and token.content in skeleton
        } | set(self.tokenizer.all_special_tokens)
        return re.compile("|".join(re.escape(name) for name in sorted(names)) or r"(?!)")

    def _find_stop_ids(self) -> tuple[int, ...]:
        """Return the token the template ends an answer with, and EOS."""
        answer = self._segments([Message("user", "a"), Message("assistant", "b")], False)[-1][0]
        special = set(self.tokenizer.all_special_ids) | {
            index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special
        }
        stop = next((token for token in self._encode(answer) if token in special), None)
        if stop is None:
            raise ModelError(
                Problem(
                    "the chat template does not end an answer with a stop token",
                    where="model.chat_template",
                    got=repr(answer),
                    remedy="end the assistant's turn with {{ eos_token }}",
                )
            )
        eos = self.tokenizer.eos_token_id
        return (stop,) if eos is None or eos == stop else (stop, eos)


def _load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Return the fast tokenizer of a model directory.

    `AutoTokenizer` imports torch and its model classes to find a special class; a directory that
    asks for the generic one is loaded without, five CPU seconds sooner in every process.
    """
    settings = path / "tokenizer_config.json"
    if settings.is_file():
        kind = json.loads(settings.read_text(encoding="utf-8")).get("tokenizer_class")
        if kind in ("TokenizersBackend", "PreTrainedTokenizerFast"):
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast.from_pretrained(str(path))
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)


def _template(tokenizer: PreTrainedTokenizerFast, chat_template: str) -> str:
    """Return the Jinja text that `model.chat_template` names."""
    if chat_template == "auto" and tokenizer.chat_template:
        return str(tokenizer.chat_template)
    if chat_template == "auto":
        chat_template = "alpaca"
    if chat_template in TEMPLATES:
        bos = tokenizer.bos_token_id
        # Servers tokenize rendered chats without adding BOS, so the template has to carry it.
        needs_bos = bos is not None and tokenizer.encode("a")[:1] == [bos]
        return ("{{ bos_token }}" if needs_bos else "") + TEMPLATES[chat_template]
    try:
        return Path(chat_template).read_text(encoding="utf-8")
    except OSError as error:
        raise ModelError(
            Problem(
                "no such chat template",
                where="model.chat_template",
                got=chat_template,
                allowed="auto, " + ", ".join(TEMPLATES) + ", or the path of a Jinja file",
            )
        ) from error


def template_from_root(chat_template: str) -> str:
    """Return `model.chat_template`; a file's path from the root, as workers run elsewhere."""
    is_file = chat_template not in TEMPLATES and Path(chat_template).is_file()
    return str(Path(chat_template).absolute()) if is_file else chat_template
