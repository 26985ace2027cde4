"""Bytes of tokens join to the text that they become, whole and streamed."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tuneloop.models.chat.renderer import Renderer
from tuneloop.serving.answers import ScoredToken, chat_logprobs
from tuneloop.serving.requests import TokenScore
from tuneloop.serving.text import StreamedText


@pytest.mark.parametrize("text", ["Great! 🎉", "東京", "naïve", "ok ✅ <|im_end|>"])
def test_bytes_of_split_characters_join_to_the_text(renderer: Renderer, text: str) -> None:
    ids = renderer.tokenizer.encode(text)
    assert b"".join(map(renderer.token_bytes, ids)) == text.encode()
    report = chat_logprobs([ScoredToken(i, TokenScore(-1.0, ((i, -1.0),))) for i in ids], renderer)
    for key in (lambda item: item, lambda item: item["top_logprobs"][0]):
        joined = itertools.chain(*(key(item)["bytes"] for item in report["content"]))
        assert bytes(joined) == text.encode()


@pytest.fixture
def falling_back(tmp_path: Path) -> Renderer:
    """As of Llama 2 and Gemma: `▁` for a space, `<0x..>` for the bytes of what has no token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "</s>": 1, "▁": 2, "a": 3, "▁a": 4}
    vocabulary |= {f"<0x{byte:02X}>": 5 + byte for byte in range(256)}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    fast.save_pretrained(tmp_path)
    return Renderer.load(tmp_path, "plain")


def test_bytes_of_vocabularies_that_fall_back_to_bytes(falling_back: Renderer) -> None:
    text = "a a 🎉"
    ids = falling_back.text_ids(text)
    assert b"".join(map(falling_back.token_bytes, ids)) == text.encode()
    assert falling_back.token_bytes(9999) == b""


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize(
    "data", ["éあ🎉".encode(), "éあ🎉".encode() + b"\xff", b"\xe3\x81", b"\xff\xc3\xa9"]
)
def test_bytes_are_streamed_as_the_text_that_they_become(
    falling_back: Renderer, data: bytes, ended: bool
) -> None:
    ids = [4, *(5 + byte for byte in data), *([3, 4] if ended else [])]
    whole = falling_back.decode(ids)
    streamed = StreamedText(falling_back.decode, [], falling_back.unsettled_ids)
    pieces = [streamed.push(token) for token in ids]
    assert "".join([*pieces, streamed.finish(whole)]) == whole
    # A special token, which is left out, does not end a run of bytes.
    ids.insert(2, 1)
    streamed = StreamedText(falling_back.decode, [], falling_back.unsettled_ids)
    assert "".join([*map(streamed.push, ids), streamed.finish(whole)]) == whole
