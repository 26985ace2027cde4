"""Rows that are too long lose their oldest turns or the middle of the prompt, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest

from tuneloop.config import TuneloopConfig
from tuneloop.data.fixes import _rendered
from tuneloop.data.schema import row_schema
from tuneloop.data.tokenize.batch import tokenize
from tuneloop.data.tokenize.rendering import Rendering
from tuneloop.data.tokenize.truncation import fit
from tuneloop.models.chat.renderer import Renderer
from tuneloop.records import Message

SYSTEM = Message("system", "Answer in one word.")
TALK = [
    SYSTEM,
    *(
        message
        for number in range(6)
        for message in (
            Message("user", f"Question {number}: what is the capital of France?"),
            Message("assistant", f"Paris {number}"),
        )
    ),
]
WORDS = " ".join(f"word{number}" for number in range(200))
LONG = [SYSTEM, Message("user", f"First {WORDS} last?"), Message("assistant", "Paris")]


@pytest.fixture(scope="module")
def renderer(tiny_model: Path) -> Renderer:
    return Renderer.load(tiny_model)


def length(renderer: Renderer, messages: list[Message]) -> int:
    return len(renderer.sample(messages).input_ids)


def test_the_oldest_turns_go_and_no_more_than_needed(renderer: Renderer) -> None:
    for kept in range(1, 6):
        expected = [SYSTEM, *TALK[-2 * kept :]]
        limit = length(renderer, expected)
        for spare in (0, 3):
            found = fit(TALK, (), renderer, limit + spare)
            assert found is not None
            assert found.messages == expected
            assert found.sample == renderer.sample(expected)
            assert f", {12 - 2 * kept} oldest turns left out" in found.cut
    whole = fit(TALK, (), renderer, length(renderer, TALK))
    assert whole is not None
    assert (whole.messages, whole.cut) == (TALK, "")


def test_the_middle_of_the_only_question_goes(renderer: Renderer) -> None:
    limit = 200
    found = fit(LONG, (), renderer, limit)
    assert found is not None
    assert limit - 12 <= len(found.sample.input_ids) <= limit
    system, user, answer = found.messages
    assert (system, answer) == (LONG[0], LONG[2])
    assert user.content.startswith("First word0 ")
    assert user.content.endswith(" last?")
    assert "\n[…]\n" in user.content
    assert "from the middle of the user's text" in found.cut


def test_after_the_oldest_turns_the_middle(renderer: Renderer) -> None:
    found = fit([*TALK, *LONG[1:]], (), renderer, 200)
    assert found is not None
    assert [m.role for m in found.messages] == ["system", "user", "assistant"]
    assert "12 oldest turns left out" in found.cut
    assert "from the middle" in found.cut


def test_a_long_result_of_a_tool_is_cut_and_its_call_is_not(tiny_model: Path) -> None:
    renderer = Renderer.load(tiny_model, "chatml_tools")
    function = {"name": "look_up", "arguments": json.dumps({"word": "capital"})}
    calls = json.dumps([{"id": "1", "type": "function", "function": function}])
    turns = [
        Message("user", "What is it?"),
        Message("assistant", "", tool_calls=calls),
        Message("tool", WORDS),
        Message("assistant", "Paris"),
    ]
    found = fit(turns, (), renderer, 250)
    assert found is not None
    assert [m for i, m in enumerate(found.messages) if i != 2] == [turns[0], turns[1], turns[3]]
    assert "\n[…]\n" in found.messages[2].content


def test_an_answer_that_is_too_long_is_never_cut(renderer: Renderer) -> None:
    assert fit([Message("user", "Why?"), Message("assistant", WORDS)], (), renderer, 100) is None
    system = [Message("system", WORDS), Message("user", "Why?"), Message("assistant", "So.")]
    assert fit(system, (), renderer, 100) is None


def test_tokenized_rows_hold_what_is_left_and_say_what_went(renderer: Renderer) -> None:
    rows = [
        {"messages": [m.as_dict() for m in messages], "tools": "", "text": ""}
        for messages in (LONG, TALK[:3])
    ]
    table = pa.Table.from_pylist(rows, schema=row_schema())
    found = tokenize(table, renderer, is_text=False, max_tokens=200)
    (first, second), (cut, uncut) = found["messages"].to_pylist(), found["cut"].to_pylist()
    assert found["num_tokens"].to_pylist()[0] <= 200
    assert "[…]" in first[1]["content"]
    assert "tokens, " in cut
    assert [Message.of(turn) for turn in second] == TALK[:3]
    assert uncut == ""
    assert tokenize(table, renderer, is_text=False)["num_tokens"].to_pylist()[0] > 200


def test_a_row_that_people_correct_stays_on_the_list_of_those_that_were_cut(
    tiny_model: Path,
) -> None:
    source = {"path": "a.jsonl", "format": "question_answer"}
    config = TuneloopConfig.model_validate(
        {
            "name": "t",
            "task": {"type": "generation"},
            "model": {"base": "x"},
            "data": {"sources": [source]},
        }
    )
    texts = dict.fromkeys(
        ("source", "changes", "task", "tools", "text", "group", "stratum", "seed_row_id"), ""
    )
    row = texts | {
        "key": 3,
        "rejection": None,
        "messages": [message.as_dict() for message in TALK],
        "synthetic": False,
        "extra": "{}",
        "content_id": "as-before",
        "cut": "900 tokens, 4 oldest turns left out",
    }
    (fresh,) = _rendered([row], Rendering(str(tiny_model), "auto"), config).to_pylist()
    assert (fresh["content_id"], fresh["cut"]) == (row["content_id"], row["cut"])
