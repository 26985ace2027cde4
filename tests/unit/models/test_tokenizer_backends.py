"""A fast tokenizer is used only after it gave the model's own ids."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tuneloop.data.tokenize.rendering import Rendering
from tuneloop.models.chat import tokenizer_backends as backends
from tuneloop.models.chat.awkward_texts import awkward_texts
from tuneloop.models.chat.renderer import Renderer
from tuneloop.models.chat.tokenizer_backends import (
    FAST_PACKAGES,
    FastTokenizer,
    ReferenceTokenizer,
    TokenLists,
    choose_backend,
)
from tuneloop.records import Message

OWN_TEXTS = ["Return the number of items.", "def read(path, mode='r'): ..."]
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|")


@pytest.fixture(scope="module")
def renderer(tiny_model: Path) -> Renderer:
    return Renderer.load(tiny_model)


class Odd(ReferenceTokenizer):
    """A backend that is right but for texts with one word, alone, in batches or in both."""

    def __init__(self, tokenizer: Any, word: str, alone: bool = True, batch: bool = True) -> None:
        super().__init__(tokenizer)
        self.name, self.word, self.alone, self.batch = "odd 1.0", word, alone, batch

    def _twisted(self, text: str) -> list[int]:
        ids = super().encode(text)
        return [*ids[:-1], ids[-1] + 1] if self.word in text else ids

    def encode(self, text: str) -> list[int]:
        return self._twisted(text) if self.alone else super().encode(text)

    def encode_batch(self, texts: Sequence[str]) -> TokenLists:
        encode = self._twisted if self.batch else super().encode
        return TokenLists.of([encode(text) for text in texts])


def test_the_fast_tokenizer_is_verified_on_own_and_awkward_texts(renderer: Renderer) -> None:
    backend, choice = choose_backend(renderer.tokenizer, OWN_TEXTS)
    assert isinstance(backend, FastTokenizer)
    assert choice.num_texts == len(OWN_TEXTS) + len(awkward_texts(renderer.tokenizer)) > 1000
    assert str(choice) == f"{backend.name}, verified on {choice.num_texts:,} strings"


def test_a_backend_that_is_right_everywhere_is_chosen(renderer: Renderer) -> None:
    backend, choice = choose_backend(
        renderer.tokenizer, OWN_TEXTS, lambda t, _: Odd(t, "no text has this")
    )
    assert backend.name == choice.engine == "odd 1.0"


@pytest.mark.parametrize("word", ["\x01", "\u200d", "12345", "items"])
@pytest.mark.parametrize(("alone", "batch"), [(True, False), (False, True)])
def test_a_backend_with_other_ids_is_refused_with_a_reason(
    word: str, alone: bool, batch: bool, renderer: Renderer
) -> None:
    backend, choice = choose_backend(
        renderer.tokenizer, OWN_TEXTS, lambda t, _: Odd(t, word, alone, batch)
    )
    assert type(backend) is ReferenceTokenizer
    assert not choice.package
    assert choice.engine.startswith("tokenizers ")
    assert "because odd 1.0 gave [" in str(choice)
    assert "is right" in choice.reason


def test_a_backend_that_fails_is_refused(renderer: Renderer) -> None:
    class Failing(ReferenceTokenizer):
        def __init__(self, tokenizer: Any, package: str) -> None:
            super().__init__(tokenizer)

        def encode_batch(self, texts: Sequence[str]) -> TokenLists:
            raise RuntimeError("out of order")

    backend, choice = choose_backend(renderer.tokenizer, OWN_TEXTS, Failing)
    assert type(backend) is ReferenceTokenizer
    assert "out of order" in choice.reason


def test_without_the_package_the_tokenizer_itself_encodes(
    renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    backend, choice = choose_backend(renderer.tokenizer, OWN_TEXTS)
    assert choice.package == "splintr-rs"
    assert choice.reason == "gigatoken: not installed (pip install 'tuneloop[fast]')"
    monkeypatch.setitem(sys.modules, "splintr", None)
    backend, choice = choose_backend(renderer.tokenizer, OWN_TEXTS)
    assert type(backend) is ReferenceTokenizer
    assert choice.reason.endswith("splintr-rs: not installed (pip install 'tuneloop[fast]')")


def split(pattern: str) -> list[Any]:
    regex = Regex(pattern)
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return [pre_tokenizers.Split(regex, "isolated"), bytes_only]


KINDS = {
    "qwen": ("gigatoken", split(QWEN)),
    "llama3": ("gigatoken", split(LLAMA3)),
    "gpt2 written out": ("splintr-rs", split(GPT2)),
    "any pattern": ("splintr-rs", split(r"\d|[a-z]+|\s|.")),
    "smollm2": (
        "splintr-rs",
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_common_kind_of_byte_level_tokenizer_has_a_fast_backend(
    kind: str, tiny_model: Path
) -> None:
    package, steps = KINDS[kind]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    backend, choice = choose_backend(tokenizer, OWN_TEXTS)
    assert choice.package == package
    text = " 12  3\u00e9 e\u0301 <|im_end|>x\r\n"
    assert backend.encode(text) == tokenizer.encode(text, add_special_tokens=False)


def test_texts_with_bytes_that_have_no_token_keep_the_tokenizers_ids(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = description["model"]["vocab"]
    # The names of the bytes 0x01 and 0xF1, which stand in no merge.
    gone = ["\u0101", "\u00f1"]
    for name in gone:
        del vocabulary[name]
    names = {token: index for index, token in enumerate(vocabulary)}
    description["model"]["vocab"] = names
    description["added_tokens"] = [
        token | {"id": names[token["content"]]} for token in description["added_tokens"]
    ]
    short = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(description)), eos_token="<|im_end|>"
    )
    backend, choice = choose_backend(short, ["a\x01b \x01."])
    assert choice.package == "gigatoken"
    assert backend.encode("a\x01b") == backend.encode("ab")


def test_a_tokenizer_of_another_kind_encodes_itself() -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend, choice = choose_backend(PreTrainedTokenizerFast(tokenizer_object=words), ["a b"])
    assert type(backend) is ReferenceTokenizer
    assert "gigatoken" in choice.reason
    assert backend.encode("b a") == [1, 0]


@pytest.mark.parametrize("package", FAST_PACKAGES)
def test_the_backend_changes_neither_ids_nor_identity(package: str, renderer: Renderer) -> None:
    fast = renderer.with_backend(FastTokenizer(renderer.tokenizer, package))
    turns = [Message("user", "What is 1 2 3?\n"), Message("assistant", "\n\nnone")]
    assert fast.hash == renderer.hash
    assert fast.sample(turns) == renderer.sample(turns)
    assert fast.prompt_ids(turns[:1]) == renderer.prompt_ids(turns[:1])
    assert fast.text_ids("yes no") == renderer.text_ids("yes no")


def test_what_a_backend_caches_is_bounded(
    renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = []
    load = backends._LOADERS["gigatoken"]
    monkeypatch.setitem(
        backends._LOADERS, "gigatoken", lambda text: loads.append(text) or load(text)
    )
    monkeypatch.setattr(backends, "_RELOAD_AFTER_CHARACTERS", 100)
    backend = FastTokenizer(renderer.tokenizer, "gigatoken")
    texts = ["yes no true false " * 3] * 5  # 54 characters each: a new one for every second text
    ids = backend.encode_batch(texts).lists()
    assert len(loads) == 1 + 2
    assert ids == [ReferenceTokenizer(renderer.tokenizer).encode(texts[0])] * 5


def test_rows_that_cannot_be_rendered_prove_nothing(tiny_model: Path) -> None:
    rendering = Rendering(str(tiny_model), "auto")
    leaking = {"messages": [{"role": "user", "content": "<|im_end|>"}], "text": ""}
    asked = {"role": "user", "content": "yes?"}
    fine = {"messages": [asked, {"role": "assistant", "content": "no"}], "text": ""}
    _, none = rendering.verified([leaking])
    fast, two = rendering.verified([leaking, fine])
    assert fast.backend == "gigatoken"
    assert two.num_texts == none.num_texts + 2


@given(
    st.lists(st.lists(st.integers(0, 3), max_size=4), max_size=6),
    st.sampled_from([None, 0, 1]),
    st.sampled_from([None, 0, 2]),
)
def test_first_and_last_ids_are_added_where_they_are_missing(
    lists: list[list[int]], first: int | None, last: int | None
) -> None:
    wanted = []
    for ids in lists:
        opened = ids if first is None or ids[:1] == [first] else [first, *ids]
        wanted.append(opened if last is None or opened[-1:] == [last] else [*opened, last])
    assert TokenLists.of(lists).lists() == lists
    assert TokenLists.of(lists, first, last).lists() == wanted
    arrays = [np.array(ids, np.uint32) for ids in lists]
    assert TokenLists.of(arrays, first, last).lists() == wanted
