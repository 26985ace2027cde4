"""What `check` shows of a row."""

from __future__ import annotations

from pathlib import Path

import pytest

from tuneloop.data.check import _token_sample
from tuneloop.models.chat.renderer import Renderer
from tuneloop.records import Sample


@pytest.mark.parametrize("text", ["Größe M ✅ 東京は首都です。", "Great! 🎉🎉", "Привет", "ok"])
def test_a_character_of_several_tokens_is_shown_whole(tiny_model: Path, text: str) -> None:
    renderer = Renderer.load(tiny_model)
    ids = renderer.tokenizer.encode(text, add_special_tokens=False)
    shown = _token_sample("rows.jsonl:1", Sample(ids, [1] * len(ids)), renderer).tokens
    assert "".join(piece for piece, _ in shown) == text
    assert not any("\ufffd" in piece for piece, _ in shown)
    # A text that ends within a character is shown as far as it goes.
    cut = _token_sample("rows.jsonl:1", Sample(ids[:-1], [1] * (len(ids) - 1)), renderer).tokens
    assert len(cut) <= len(ids)
