"""Conversations in the dialects in which people write them: read whole, or refused."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pytest

from tuneloop.config import DedupConfig, OneTaskConfig, SourceConfig
from tuneloop.data.hashing.content import Content, dedup_keys
from tuneloop.data.schema import dataset_schema, plain_messages, row_schema
from tuneloop.data.sources.formats import Chat, to_chat
from tuneloop.data.sources.row_errors import RowError
from tuneloop.records import Message

TASK = OneTaskConfig(type="generation")
TOOL = {"type": "function", "function": {"name": "temperature", "parameters": {}}}


def chat(layout: str, mend: tuple[str, ...] = (), **row: Any) -> Chat:
    return to_chat(row, SourceConfig(path="a.jsonl", format=layout, mend=list(mend)), TASK)


def said(found: Chat) -> list[tuple[str, str, int]]:
    return [(m.role, m.content, m.weight) for m in found.messages]


def user(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **more}


def assistant(text: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def called(arguments: Any, name: str = "temperature") -> list[dict[str, Any]]:
    return [{"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}]


@pytest.mark.parametrize("key", ["weight", "train", "loss"])
@pytest.mark.parametrize("off", [0, False])
def test_a_turn_that_is_marked_is_not_learned(key: str, off: Any) -> None:
    turns = [user("a", **{key: off}), assistant("b", **{key: off}), user("c"), assistant("d")]
    found = chat("messages", messages=turns)
    assert said(found) == [
        ("user", "a", 1),
        ("assistant", "b", 0),
        ("user", "c", 1),
        ("assistant", "d", 1),
    ]
    turns[3][key] = off
    with pytest.raises(RowError, match="no answer of the row is to be learned"):
        chat("messages", messages=turns)
    turns[1][key] = True
    found = chat("messages", messages=turns)
    assert said(found) == [("user", "a", 1), ("assistant", "b", 1)]
    assert found.changes == ("turns after the last answer to learn left out",)
    turns[0][key] = 1
    with pytest.raises(RowError, match="the user is marked to be learned"):
        chat("messages", messages=turns)
    with pytest.raises(RowError, match="neither 0 nor 1"):
        chat("messages", messages=[user("a"), assistant("b", **{key: 0.5})])


def test_the_openai_layout_whole() -> None:
    found = chat(
        "messages",
        messages=[
            {"role": "developer", "content": "Be brief."},
            user([{"type": "text", "text": "How warm "}, {"type": "text", "text": "is it?"}]),
            assistant(None, tool_calls=called('{"city": "Oslo"}'), refusal=None),
            {"role": "tool", "content": "-3", "tool_call_id": "1", "name": "temperature"},
            assistant("Cold.", reasoning_content="Below zero."),
        ],
        tools=[TOOL],
    )
    assert json.loads(found.tools) == [TOOL]
    assert [m.role for m in found.messages] == [
        "developer",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert found.messages[1].content == "How warm is it?"
    assert found.messages[2].calls == called('{"city": "Oslo"}')
    assert found.messages[3] == Message("tool", "-3", tool_call_id="1", name="temperature")
    assert found.messages[4].reasoning_content == "Below zero."
    assert [Message.of(m.as_dict()) for m in found.messages] == found.messages
    older = chat(
        "messages",
        messages=[user("a"), assistant(None, function_call={"name": "f", "arguments": "{}"})],
        functions=[{"name": "f"}],
    )
    assert older.messages[-1].calls[0]["function"] == {"name": "f", "arguments": "{}"}
    assert json.loads(older.tools) == [{"type": "function", "function": {"name": "f"}}]


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        ({"mood": "happy"}, "not understood: `mood`"),
        ({"audio": {"id": "x"}}, "not understood: `audio`"),
        ({"tool_calls": called("{")}, "arguments of a tool call are not valid JSON"),
        ({"tool_calls": called(json.dumps('{"a": 1}'))}, "JSON within JSON"),
        ({"tool_calls": called("[1]")}, "not an object"),
        ({"tool_calls": [{"type": "function"}]}, "no `function` with a `name`"),
        ({"content": [{"type": "image_url", "image_url": "x"}]}, "content is not text"),
        ({"content": None}, "assistant is empty"),
        ({"content": "\u200b\n"}, "assistant is empty"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(turn: dict[str, Any], expected: str) -> None:
    with pytest.raises(RowError, match=expected):
        chat("messages", messages=[user("a"), assistant("b") | turn])


@pytest.mark.parametrize("empty", [None, "", [], {}])
def test_a_key_that_says_nothing_is_no_mistake(empty: Any) -> None:
    found = chat("messages", messages=[user("a"), assistant("b", annotations=empty)], tools=empty)
    assert said(found) == [("user", "a", 1), ("assistant", "b", 1)]
    assert not found.tools


def test_preferences_are_refused_with_a_remedy() -> None:
    with pytest.raises(RowError, match="preferred and a rejected") as caught:
        chat(
            "messages",
            input={"messages": [user("a")]},
            preferred_output=[assistant("b")],
            non_preferred_output=[assistant("c")],
        )
    assert "mend: [preferences]" in caught.value.remedy


def test_an_answer_that_is_called_bad_is_not_learned() -> None:
    with pytest.raises(RowError, match="a bad one"):
        chat("prompt_completion", prompt="a", completion="b", label=False)
    for fine in (True, "no", 0):
        found = chat("prompt_completion", prompt="a", completion="b", label=fine)
        assert said(found)[-1] == ("assistant", "b", 1)


def test_of_preferences_the_preferred_answer_is_taken_on_request() -> None:
    wanted = [("user", "a", 1), ("assistant", "b", 1)]
    mend = ("preferences",)
    openai = chat(
        "messages",
        mend,
        input={"messages": [user("a")], "tools": [TOOL], "parallel_tool_calls": True},
        preferred_output=[assistant("b")],
        non_preferred_output=[assistant("c")],
    )
    assert (said(openai), json.loads(openai.tools)) == (wanted, [TOOL])
    assert openai.changes == ("the preferred of two answers taken",)
    both = {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}
    assert said(chat("messages", mend, **both)) == wanted
    apart = {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]}
    assert said(chat("messages", mend, **apart)) == wanted
    assert said(chat("messages", mend, prompt="a", chosen="b", rejected="c")) == wanted
    turn, chosen = {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}
    beside = {"conversations": [turn], "chosen": chosen, "rejected": {"from": "gpt", "value": "c"}}
    assert said(chat("sharegpt", mend, **beside)) == wanted
    alpaca = {"instruction": "a", "input": "", "chosen": "b", "rejected": "c"}
    assert said(chat("alpaca", mend, **alpaca)) == wanted
    for layout, row in (("messages", both), ("sharegpt", beside), ("alpaca", alpaca)):
        with pytest.raises(RowError, match="preferred and a rejected"):
            chat(layout, **row)
    # What is whole without them is no preference: the answer stands in `messages`.
    whole = chat("messages", mend, messages=[user("a"), assistant("d")], **apart)
    assert (said(whole)[-1], whole.changes) == (("assistant", "d", 1), ())
    mapped = {"prompt": "prompt", "completion": "chosen"}
    source = SourceConfig(path="a.jsonl", format="columns", columns=mapped)
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert said(to_chat(row, source, TASK)) == wanted


@pytest.mark.parametrize("times", [2, 3])
def test_json_within_json_is_decoded_on_request(times: int) -> None:
    def wrapped(value: Any, count: int) -> Any:
        return value if not count else wrapped(json.dumps(value), count - 1)

    turns = [user("a"), assistant(None, tool_calls=called(wrapped({"a": 1}, times)))]
    tools = wrapped([TOOL], times)
    with pytest.raises(RowError, match="JSON within JSON") as caught:
        chat("messages", messages=turns)
    assert "mend: [json_within_json]" in caught.value.remedy
    with pytest.raises(RowError, match="`tools` is JSON within JSON"):
        chat("messages", messages=[user("a"), assistant("b")], tools=tools)
    found = chat("messages", ("json_within_json",), messages=turns, tools=tools)
    assert json.loads(found.messages[-1].calls[0]["function"]["arguments"]) == {"a": 1}
    assert json.loads(found.tools) == [TOOL]
    assert found.changes == ("JSON within JSON decoded once more",)
    call = {"name": "f", "arguments": wrapped({"a": 1}, times)}
    sharegpt = [
        {"from": "human", "value": "a"},
        {"from": "function_call", "value": json.dumps(call)},
    ]
    found = chat("sharegpt", ("json_within_json",), conversations=sharegpt)
    assert json.loads(found.messages[-1].calls[0]["function"]["arguments"]) == {"a": 1}


def test_what_needs_no_mending_is_as_it_was() -> None:
    arguments = json.dumps({"text": '"quoted"', "list": '[1, "2"]'})
    turns = [user("a"), assistant(None, tool_calls=called(arguments))]
    plain = chat("messages", messages=turns, tools=[TOOL])
    mended = chat("messages", ("json_within_json", "preferences"), messages=turns, tools=[TOOL])
    assert mended == plain
    assert plain.messages[-1].calls[0]["function"]["arguments"] == arguments


def test_a_key_given_twice_is_refused() -> None:
    twice = '{"city": "Oslo", "city": "Rome"}'
    with pytest.raises(RowError, match="the key `city` twice"):
        chat("messages", messages=[user("a"), assistant(None, tool_calls=called(twice))])
    row = {"question": "a", "answer": twice}
    source = SourceConfig(path="a.jsonl", format="question_answer")
    with pytest.raises(RowError, match="the key `city` twice"):
        to_chat(row, source, OneTaskConfig(type="extraction"))


def test_a_system_column_beside_messages_is_the_system_message() -> None:
    turns = [user("a"), assistant("b")]
    found = chat("messages", messages=turns, system="You are a pirate.")
    assert said(found)[0] == ("system", "You are a pirate.", 1)
    with pytest.raises(RowError, match="a column `system` and a system message"):
        chat("messages", messages=[{"role": "developer", "content": "x"}, *turns], system="y")


def test_the_dialects_of_sharegpt() -> None:
    found = chat(
        "sharegpt",
        conversations=[
            {"from": "human", "value": "Warm?"},
            {"from": "function_call", "value": '{"name": "temperature", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "-3"},
            {"from": "gpt", "value": "No.", "loss": True},
        ],
        system="You are a pirate.",
        tools=json.dumps([TOOL["function"]]),
    )
    assert [m.role for m in found.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert found.messages[0].content == "You are a pirate."
    assert json.loads(found.messages[2].calls[0]["function"]["arguments"]) == {"a": 1}
    assert json.loads(found.tools) == [TOOL]
    found = chat("sharegpt", conversations=[user("hi"), assistant("hello")], system="", tools="[]")
    assert said(found) == [("user", "hi", 1), ("assistant", "hello", 1)]
    assert not found.tools
    with pytest.raises(RowError, match="no `from` and `value`"):
        chat("sharegpt", conversations=[{"speaker": "human", "value": "hi"}])
    with pytest.raises(RowError, match="no column `messages`") as caught:
        chat("messages", conversations=[user("hi"), assistant("hello")])
    assert "sharegpt" in caught.value.remedy


def weather(**more: Any) -> list[dict[str, Any]]:
    """Return the list of one tool: `city`, which it requires, and `unit`."""
    properties = {"city": {"type": "string"}, "unit": {"type": "string"}}
    schema = {"type": "object", "properties": properties, "required": ["city"], **more}
    return [{"type": "function", "function": {"name": "weather", "parameters": schema}}]


def taught(arguments: Any, tools: Any, name: str = "weather", weight: int = 1) -> Chat:
    turns = [user("a"), assistant(None, tool_calls=called(arguments, name), weight=weight)]
    return chat("messages", messages=[*turns, user("b"), assistant("c")], tools=tools)


def test_calls_fit_the_tools_of_their_row() -> None:
    assert taught('{"city": "Oslo", "unit": "C"}', weather()).changes == ()
    with pytest.raises(RowError, match="function that is not among the row's tools") as caught:
        taught("{}", weather(), name="wether")
    assert (caught.value.got, caught.value.allowed) == ("`wether`", "weather")
    with pytest.raises(RowError, match="argument that its tool does not have") as caught:
        taught('{"city": "Oslo", "town": "Oslo"}', weather())
    assert (caught.value.got, caught.value.allowed) == ("`town` of `weather`", "city, unit")
    # The second of two calls at once; the older layout; ShareGPT.
    parallel = [*called('{"city": "Oslo"}', "weather"), *called("{}", "f")]
    with pytest.raises(RowError, match="not among the row's tools"):
        chat("messages", messages=[user("a"), assistant("", tool_calls=parallel)], tools=weather())
    older = assistant(None, function_call={"name": "f", "arguments": "{}"})
    with pytest.raises(RowError, match="not among the row's tools"):
        chat("messages", messages=[user("a"), older], functions=[{"name": "weather"}])
    turns = [{"from": "human", "value": "a"}, {"from": "function_call", "value": '{"name": "f"}'}]
    with pytest.raises(RowError, match="not among the row's tools"):
        chat("sharegpt", conversations=turns, tools=json.dumps(weather()))


def test_names_that_arrow_filled_in_are_left_out_of_json_too() -> None:
    filled = weather()
    filled[0]["function"]["parameters"]["properties"]["day"] = None
    found = taught({"city": "Oslo", "day": None, "unit": None}, filled)
    assert json.loads(found.tools) == weather()
    arguments = json.loads(found.messages[1].tool_calls)[0]["function"]["arguments"]
    assert json.loads(arguments) == {"city": "Oslo"}
    assert found.changes == ("names without a value that Arrow fills in left out",)
    # A null that the author wrote stays.
    found = taught({"city": "Oslo", "unit": None}, weather())
    assert '\\"unit\\": null' in found.messages[1].tool_calls
    assert found.changes == ()


def test_what_the_tools_of_a_row_leave_open_is_allowed() -> None:
    assert taught('{"any": 1}', None, name="f").changes == ()
    # Context, such as a mistake that the row goes on to mend.
    assert taught('{"town": 1}', weather(), name="f", weight=0).changes == ()
    # Any argument: a schema that says so, that says it elsewhere, or none.
    for tools in (
        weather(additionalProperties=True),
        weather(additionalProperties={}),
        weather(anyOf=[{"required": ["town"]}]),
        [{"function": {"name": "weather"}}],
    ):
        assert taught('{"city": "Oslo", "town": "Oslo"}', tools).changes == ()
    with pytest.raises(RowError, match="argument"):
        taught('{"town": "Oslo"}', weather(additionalProperties=False))
    # Two tools of one name: either may be meant.
    other = {"name": "weather", "parameters": {"type": "object", "properties": {"town": {}}}}
    assert taught('{"town": "Oslo"}', [*weather(), {"function": other}]).changes == ()
    # A required argument that is left out may have a default that the schema does not tell.
    told = "a call leaves out an argument that its tool requires; learned as it is"
    assert taught('{"unit": "C"}', weather()).changes == (told,)


def result(call: str, text: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call, "content": text}


def several(*ids: str) -> dict[str, Any]:
    """Return a turn with calls made at once, the first of city 0; without ids for empty ones."""
    calls = [called(json.dumps({"city": str(n)}), "weather")[0] for n in range(len(ids))]
    return assistant(
        None, tool_calls=[call | {"id": i} for call, i in zip(calls, ids, strict=True)]
    )


def results(*turns: dict[str, Any]) -> tuple[list[str], tuple[str, ...]]:
    found = chat("messages", messages=[user("a"), *turns, assistant("b")])
    return [m.content for m in found.messages if m.role == "tool"], found.changes


def test_results_stand_in_the_order_of_their_calls() -> None:
    changed = ("results of tools put in the order of their calls",)
    calls = several("x", "y")
    assert results(calls, result("y", "1"), result("x", "0")) == (["0", "1"], changed)
    assert results(calls, result("x", "0"), result("y", "1")) == (["0", "1"], ())
    # The second round has ids of its own.
    again = [several("z", "w"), result("w", "3"), result("z", "2")]
    in_order = [calls, result("x", "0"), result("y", "1"), *again]
    assert results(*in_order) == (["0", "1", "2", "3"], changed)
    with pytest.raises(RowError, match="names a call that is not before it") as caught:
        results(calls, result("x", "0"), result("v", "1"))
    assert (caught.value.got, caught.value.allowed) == ("`v`", "x, y")
    with pytest.raises(RowError, match="others have none") as caught:
        results(calls, result("y", "1"))
    assert caught.value.got == "1 results of 2 calls"
    # Without ids the place has to do.
    assert results(several("", ""), result("y", "1"), result("x", "0")) == (["1", "0"], ())
    assert results(calls, result("", "1"), result("", "0")) == (["1", "0"], ())


@pytest.mark.parametrize(
    ("layout", "row", "column"),
    [
        (
            "sharegpt",
            {"conversations": [user("<image>\nWhat?"), assistant("a")], "image": "a"},
            "image",
        ),
        ("sharegpt", {"conversations": [user("What?"), assistant("a")], "images": ["a"]}, "images"),
        ("messages", {"messages": [user("<video>?"), assistant("a")], "videos": ["a"]}, "videos"),
        ("alpaca", {"instruction": "<audio>?", "output": "a", "audios": ["a"]}, "audios"),
    ],
)
def test_rows_about_images_are_refused(layout: str, row: dict[str, Any], column: str) -> None:
    with pytest.raises(RowError, match=f"more than text: it has `{column}`"):
        chat(layout, **row)
    # Without the images it is a text; a column of the user's own is no part of a conversation.
    chat(layout, **{**row, column: []})
    chat("question_answer", question="q", answer="a", image="https://a/b.png", images="3")


def test_rows_that_an_annotator_turned_down_are_refused() -> None:
    source = {
        "path": "a",
        "format": "columns",
        "columns": {"prompt": "text", "completion": "label"},
    }
    row = {"text": "a", "label": "b", "_task_hash": 1}
    kept = to_chat({**row, "answer": "accept"}, SourceConfig.model_validate(source), TASK)
    assert kept.messages[-1].content == "b"
    with pytest.raises(RowError, match="turned down by its annotator"):
        to_chat({**row, "answer": "reject"}, SourceConfig.model_validate(source), TASK)
    source["columns"] = {"prompt": "text", "completion": "answer"}
    judged = to_chat({**row, "answer": "reject"}, SourceConfig.model_validate(source), TASK)
    assert judged.messages[-1].content == "reject"


@pytest.mark.parametrize("given", ["<noinput>", "Noinput "])
def test_alpacas_word_for_no_input_is_none(given: str) -> None:
    found = chat("alpaca", instruction="Do it.", input=given, output="Done.")
    assert [m.content for m in found.messages] == ["Do it.", "Done."]
    assert found.changes == ("`<noinput>` taken for no input",)


def test_missing_values_that_programs_wrote_as_text_are_told() -> None:
    found = chat("question_answer", question="q", answer=" #N/A ")
    told = "a text is `#N/A`: what a program writes for a missing value; learned as it is"
    assert (found.messages[-1].content, found.changes) == ("#N/A", (told,))
    assert chat("question_answer", question="Is nan a number?", answer="No").changes == ()


def test_a_prompt_and_a_completion_of_turns_are_read_as_trl_has_them() -> None:
    system = {"role": "system", "content": "s"}
    found = chat("prompt_completion", prompt=[system, user("a")], completion=[assistant("b")])
    assert said(found) == [("system", "s", 1), ("user", "a", 1), ("assistant", "b", 1)]
    with pytest.raises(RowError, match="`completion` is not"):
        chat("prompt_completion", prompt=[user("a")], completion="b")


@pytest.mark.parametrize("history", [[["q", "a"]], '[["q", "a"]]'])
def test_alpaca_with_system_and_history(history: Any) -> None:
    row = {"instruction": "And Spain?", "input": "", "output": "Madrid", "system": "One word."}
    found = chat("alpaca", **row, history=history)
    assert [m.content for m in found.messages] == ["One word.", "q", "a", "And Spain?", "Madrid"]
    assert len(chat("alpaca", **row, history=[]).messages) == 3
    with pytest.raises(RowError, match="`history` is not a list"):
        chat("alpaca", **row, history=["q", "a"])


def test_the_seed_tasks_of_alpaca_keep_their_answer_in_a_list() -> None:
    one = {"input": "3, 1", "output": "1, 3"}
    found = chat("alpaca", instruction="Sort.", instances=[one])
    assert [m.content for m in found.messages] == ["Sort.\n\n3, 1", "1, 3"]
    for instances in ([], [one, one], "x y", [3]):
        with pytest.raises(RowError, match="instances"):
            chat("alpaca", instruction="Sort.", instances=instances)


@pytest.mark.parametrize(
    "roles", [["tool", "assistant"], ["user", "tool", "assistant"], ["user", "assistant", "tool"]]
)
def test_results_of_tools_follow_calls(roles: list[str]) -> None:
    with pytest.raises(RowError, match="do not alternate"):
        chat("messages", messages=[{"role": role, "content": "x"} for role in roles])


def test_calls_and_tools_are_content_when_rows_are_compared() -> None:
    def row(city: str, tool: str) -> dict[str, Any]:
        turns = [user("How warm?"), assistant("", tool_calls=called(json.dumps({"city": city})))]
        tools = json.dumps([{"function": {"name": tool}}])
        return {"task": "", "messages": turns, "tools": tools, "text": ""}

    rows = [row("Oslo", "f"), row("Rome", "f"), row("Oslo", "g"), row("Oslo", "f")]
    table = pa.Table.from_pylist(rows, schema=row_schema())
    content = Content(False, {"": ""})
    keys = dedup_keys(table, content, DedupConfig())
    ids = keys["content_id"].to_pylist()
    assert ids[0] == ids[3]
    assert len(set(ids)) == 3
    assert len(set(keys["exact_key"].to_pylist())) == 3


def test_plain_rows_keep_the_layout_of_two_fields() -> None:
    rows = [{"messages": [user("a"), assistant("b")]}, {"messages": []}]
    messages = pa.Table.from_pylist(rows, schema=row_schema()).slice(0, 1)["messages"].chunk(0)
    plain = dataset_schema(pa.schema([]))
    assert plain_messages(messages).type == plain.field("messages").type
    assert plain_messages(messages).to_pylist() == [[user("a"), assistant("b")]]
    whole = dataset_schema(pa.schema([]), is_plain=False)
    assert whole.field("tools").type == pa.string()
    assert {f.name for f in whole.field("messages").type.value_type} >= {"tool_calls", "weight"}


def test_an_annotation_with_several_answers_is_refused() -> None:
    def row(*results: tuple[str, dict[str, Any]]) -> dict[str, Any]:
        given = [{"type": kind, "value": value} for kind, value in results]
        return {"data": {"text": "q"}, "annotations": [{"result": given}]}

    source = SourceConfig(path="x", format="label_studio")
    one, two = ("choices", {"choices": ["a"]}), ("choices", {"choices": ["a", "b"]})
    passage = ("labels", {"text": "Oslo", "labels": ["city"]})
    assert (
        to_chat(row(one, passage), source, OneTaskConfig(type="generation")).messages[-1].text
        == "a"
    )
    for results, what in (
        ([two], "several answers"),
        ([one, ("choices", {"choices": ["b"]})], "several answers"),
        ([passage], "not labelled yet"),
    ):
        with pytest.raises(RowError, match=what):
            to_chat(row(*results), source, OneTaskConfig(type="generation"))
