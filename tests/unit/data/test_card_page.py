"""The dataset card as Markdown: data in it stays data."""

from __future__ import annotations

import re

import pytest

from tuneloop.data.card.page import _lengths, _literal

# CommonMark: a code span is a run of backticks, its text, and a run of the same length.
CODE_SPAN = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)")


@pytest.mark.parametrize(
    "text",
    [
        "What is 2*3*4 when _x_ is set in :red[mode] :material/home:?",
        "![logo](http://127.0.0.1:9/track.png) <b>bold</b> ~~25~~",
        "`one` and ``two``",
        "`",
        "ends with a backtick `",
        "a | b",
    ],
)
def test_data_is_one_code_span_from_end_to_end(text: str) -> None:
    span = CODE_SPAN.fullmatch(_literal(text))
    assert span is not None
    assert span[2].strip() == text


def test_white_space_is_folded_and_nothing_stays_nothing() -> None:
    assert _literal("two\nlines\t here") == "`two lines here`"
    assert _literal(" \n") == ""


def test_lengths_are_told_in_words():
    found = {"p50": 142, "p90": 190, "p99": 1246, "max": 2500}
    assert _lengths(found) == "half up to 142, 90% up to 190, 99% up to 1,246, longest 2,500"
