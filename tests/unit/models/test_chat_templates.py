"""Rendering by the templates of well-known families, held against `apply_chat_template`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import chat_templates as written
from chat_templates import WITH_TOOLS, renderer_of
from tuneloop.errors import ModelError
from tuneloop.models.chat.renderer import Renderer
from tuneloop.models.chat.template import RenderError
from tuneloop.records import Message

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "temperature",
            "description": "How warm it is.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
TALK = [
    Message("user", "What is the capital of France?"),
    Message("assistant", "Paris, of course."),
    Message("user", "And of Spain, 12 \u00e9?"),
    Message("assistant", "Madrid."),
]


def call(city: str) -> str:
    function = {"name": "temperature", "arguments": json.dumps({"city": city})}
    return json.dumps([{"id": "call12345", "type": "function", "function": function}])


CALLS = [
    Message("user", "How warm is it in Oslo?"),
    Message("assistant", "", tool_calls=call("Oslo")),
    Message("tool", '{"celsius": -3}', tool_call_id="call12345", name="temperature"),
    Message("assistant", "Three below zero."),
    Message("user", "And in Rome?"),
    Message("assistant", "", tool_calls=call("Rome")),
]


def make(family: str, tiny_model: Path) -> Renderer:
    template, special = written.FAMILIES[family]
    return renderer_of(template, special, tiny_model)


def plainly(message: Message) -> dict[str, Any]:
    """Return a message as users give it to `apply_chat_template`."""
    turn = message.as_dict()
    for item in turn.get("tool_calls", ()):
        item["function"]["arguments"] = json.loads(item["function"]["arguments"])
    if message.tool_calls and not message.content:
        turn["content"] = None
    turn.pop("weight", None)
    return turn


def expected_ids(renderer: Renderer, messages: list[Message], **more: Any) -> list[int]:
    rendered = renderer.tokenizer.apply_chat_template(
        [plainly(message) for message in messages],
        chat_template=renderer.template,
        tokenize=False,
        **more,
    )
    return list(renderer.tokenizer.encode(rendered, add_special_tokens=False))


def learned_texts(renderer: Renderer, messages: list[Message], **more: Any) -> list[str]:
    """Return the text of each run of targets."""
    sample = renderer.sample(messages, **more)
    runs: list[list[int]] = [[]]
    for token, is_target in zip(sample.input_ids, sample.loss_mask, strict=True):
        if is_target:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [renderer.tokenizer.decode(run, skip_special_tokens=True) for run in runs if run]


@pytest.mark.parametrize("family", written.FAMILIES)
def test_ids_are_those_of_the_template_and_a_prompt_is_their_beginning(
    family: str, tiny_model: Path
) -> None:
    renderer = make(family, tiny_model)
    sample = renderer.sample(TALK)
    ids = expected_ids(renderer, TALK)
    assert sample.input_ids == ids[: len(sample.input_ids)]
    assert renderer.tokenizer.decode(ids[len(sample.input_ids) :]).strip() == ""
    prompt = renderer.prompt_ids(TALK[:-1])
    assert prompt == expected_ids(renderer, TALK[:-1], add_generation_prompt=True)
    assert sample.input_ids[: len(prompt)] == prompt
    thought = "<think>\n\n</think>\n\n" if family == "qwen3" else ""
    learned = [text.strip() for text in learned_texts(renderer, TALK)]
    assert learned == ["Paris, of course.", thought + "Madrid."]


@pytest.mark.parametrize("family", WITH_TOOLS)
def test_tools_and_calls_are_rendered_and_the_calls_learned(family: str, tiny_model: Path) -> None:
    renderer = make(family, tiny_model)
    sample = renderer.sample(CALLS, TOOLS)
    ids = expected_ids(renderer, CALLS, tools=TOOLS)
    assert sample.input_ids == ids[: len(sample.input_ids)]
    assert renderer.tokenizer.decode(ids[len(sample.input_ids) :]).strip() == ""
    prompt = renderer.prompt_ids(CALLS[:-1], TOOLS)
    assert sample.input_ids[: len(prompt)] == prompt
    first, second, third = learned_texts(renderer, CALLS, tools=TOOLS)
    # The whole call, and nothing else, is learned in the first turn as it is in the last one.
    assert first.replace("Oslo", "Rome") == third.removeprefix("<think>\n\n</think>\n\n")
    assert second.strip() == "Three below zero."
    assert '"city": "Rome"' in third


def test_a_result_of_a_tool_may_be_empty_and_have_calls(tiny_model: Path) -> None:
    odd = Message("tool", "", tool_calls=call("Oslo"), tool_call_id="call12345")
    assert make("qwen2.5", tiny_model).prompt_ids([*CALLS[:2], odd], TOOLS)


@pytest.mark.parametrize("family", written.FAMILIES)
def test_an_answer_of_weight_0_is_context(family: str, tiny_model: Path) -> None:
    renderer = make(family, tiny_model)
    turns = [TALK[0], Message("assistant", "Paris, of course.", weight=0), *TALK[2:]]
    assert renderer.sample(turns).input_ids == renderer.sample(TALK).input_ids
    (only,) = learned_texts(renderer, turns)
    assert only.strip().endswith("Madrid.")
    assert "Paris" not in only


@pytest.mark.parametrize("family", [name for name in written.FAMILIES if name != "gemma"])
def test_an_answer_with_tags_is_learned_from_its_beginning(family: str, tiny_model: Path) -> None:
    turns = [Message("system", "Be brief."), *TALK]
    turns[2] = Message("assistant", "<b>Paris</b>, of course.")
    learned = learned_texts(make(family, tiny_model), turns)[0]
    assert learned.strip() == "<b>Paris</b>, of course."


def test_thoughts_are_written_where_the_template_writes_them(tiny_model: Path) -> None:
    renderer = make("qwen3", tiny_model)
    thinking = [
        TALK[0],
        Message("assistant", "Paris.", reasoning_content="It is on the Seine."),
        TALK[2],
        Message("assistant", "Madrid.", reasoning_content="It is on the Manzanares."),
    ]
    ids = expected_ids(renderer, thinking)
    sample = renderer.sample(thinking)
    assert sample.input_ids == ids[: len(sample.input_ids)]
    assert learned_texts(renderer, thinking) == [
        "Paris.",
        "<think>\nIt is on the Manzanares.\n</think>\n\nMadrid.",
    ]
    with pytest.raises(RenderError, match="no place for `reasoning_content`"):
        make("smollm2", tiny_model).sample(thinking)


def test_a_template_that_opens_the_thinking_itself_is_trained_behind_it(tiny_model: Path) -> None:
    special = ("<|end|>", "<|User|>", "<|Assistant|>")
    renderer = renderer_of(written.R1, special, tiny_model)
    sample, prompt = renderer.sample(TALK), renderer.prompt_ids(TALK[:-1])
    assert sample.input_ids[: len(prompt)] == prompt
    assert renderer.tokenizer.decode(prompt).endswith("<|Assistant|><think>\n")
    assert learned_texts(renderer, TALK) == ["Paris, of course.", "\n</think>\n\nMadrid."]
    answers = [
        Message("assistant", "Madrid.", reasoning_content="On the Manzanares."),
        Message("assistant", "<think>On the Manzanares.</think>\n\nMadrid."),
    ]
    for answer in answers:
        assert learned_texts(renderer, [*TALK[:3], answer])[-1] == (
            "On the Manzanares.\n</think>\n\nMadrid."
        )


def test_a_tag_that_names_the_speaker_opens_no_thinking(tiny_model: Path) -> None:
    bot = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>{% endfor %}"
    bot += "{% if add_generation_prompt %}<assistant>{% endif %}"
    renderer = renderer_of(bot, ("<|end|>", "<|begin|>"), tiny_model)
    assert not renderer.opens_thinking
    assert learned_texts(renderer, TALK) == ["Paris, of course.", "Madrid."]
    with pytest.raises(RenderError, match="no place for `reasoning_content`"):
        renderer.sample([TALK[0], Message("assistant", "Paris.", reasoning_content="Hm.")])


def test_what_a_template_has_no_place_for_is_refused_with_the_template_as_cause(
    tiny_model: Path,
) -> None:
    with pytest.raises(RenderError, match="no place for `tools`") as caught:
        make("smollm2", tiny_model).prompt_ids(TALK[:1], TOOLS)
    assert "model.chat_template" in caught.value.remedy
    with pytest.raises(RenderError, match="no place for `tool_calls`"):
        make("gemma", tiny_model).sample(CALLS[:2])
    with pytest.raises(RenderError, match="System role not supported") as caught:
        make("gemma", tiny_model).sample([Message("system", "Be brief."), *TALK])
    assert "the model's own template" in caught.value.remedy
    assert "task.instruction" in caught.value.remedy
    phi = renderer_of(written.PHI3, ("<|end|>", "<|user|>", "<|assistant|>"), tiny_model)
    for role in ("system", "developer"):
        with pytest.raises(RenderError, match="no place for a system message") as caught:
            phi.prompt_ids([Message(role, "Be brief."), *TALK[:1]])
        assert "task.instruction" in caught.value.remedy
    with pytest.raises(RenderError, match="must alternate"):
        make("gemma", tiny_model).prompt_ids([TALK[0], TALK[0]])
    with pytest.raises(RenderError, match="one call at a time"):
        two = json.dumps(2 * json.loads(call("Oslo")))
        make("llama3", tiny_model).sample([CALLS[0], Message("assistant", "", two)], TOOLS)


def test_a_template_gets_a_date_that_never_changes(tiny_model: Path, tmp_path: Path) -> None:
    for family, text in (("llama3", "26 Jul 2024"), ("granite", "July 26, 2024")):
        renderer = make(family, tiny_model)
        assert text in renderer.tokenizer.decode(renderer.prompt_ids(TALK[:1]))
        assert "strftime_now(" not in renderer.template
        renderer.save(tmp_path / family)
        assert Renderer.load(tmp_path / family).hash == renderer.hash
    template = "{% set form = '%Y' %}{{ strftime_now(form) }}" + written.SMOLLM2
    with pytest.raises(ModelError, match="today's date"):
        renderer_of(template, ("<|im_end|>", "<|im_start|>"), tiny_model)


def test_a_developer_is_the_system_where_the_template_knows_no_other(tiny_model: Path) -> None:
    renderer = make("qwen2.5", tiny_model)
    said = [[Message(role, "Be brief."), TALK[0]] for role in ("system", "developer")]
    assert renderer.prompt_ids(said[0]) == renderer.prompt_ids(said[1])


@pytest.mark.parametrize("family", written.FAMILIES)
def test_a_control_token_in_a_text_is_text(family: str, tiny_model: Path) -> None:
    renderer = make(family, tiny_model)
    control = written.FAMILIES[family][1][0]
    turns = [Message("user", f"What does {control} do?"), Message("assistant", f"{control} ends.")]
    plain = [Message("user", "What does it do?"), Message("assistant", "It ends.")]
    sample, other = renderer.sample(turns), renderer.sample(plain)
    stop = renderer.stop_ids[0]
    assert sample.input_ids.count(stop) == other.input_ids.count(stop)
    assert renderer.tokenizer.decode(sample.input_ids).count(control) == (
        renderer.tokenizer.decode(other.input_ids).count(control) + 2
    )
    prompt = renderer.prompt_ids(turns[:1])
    assert sample.input_ids[: len(prompt)] == prompt
    assert prompt.count(stop) == renderer.prompt_ids(plain[:1]).count(stop)


@pytest.fixture(params=["legacy", "first"])
def sentence_piece(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """A tokenizer that puts a space before the first word of a text, or of each part of it."""
    words = ["\u2581" + w for w in ("", "Paris", "is", "it", "the", "capital", "[/INST]", "[INST]")]
    letters = [chr(c) for c in range(33, 127)]
    vocabulary = {
        piece: index
        for index, piece in enumerate(
            dict.fromkeys(
                ["<unk>", "<s>", "</s>", *words, *letters, *[w[1:] for w in words if w[1:]]]
            )
        )
    }
    vocabulary["\n"] = len(vocabulary)
    merges: list[tuple[str, str]] = []
    for word in words:
        for end in range(1, len(word)):
            left, right = word[:end], word[end]
            for piece in (left, left + right):
                vocabulary.setdefault(piece, len(vocabulary))
            if (left, right) not in merges:
                merges.append((left, right))
    model = models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    if request.param == "legacy":
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.mark.parametrize("template", ["LLAMA2", "ZEPHYR"])
def test_answers_have_the_ids_they_have_in_the_whole(
    template: str, sentence_piece: PreTrainedTokenizerFast
) -> None:
    renderer = Renderer(sentence_piece, getattr(written, template))
    turns = [
        Message("user", "Is it the capital?"),
        Message("assistant", "Paris is it"),
        Message("user", "Is it?"),
        Message("assistant", "it is the capital"),
    ]
    sample = renderer.sample(turns)
    ids = expected_ids(renderer, turns)
    assert sample.input_ids == ids[: len(sample.input_ids)]
    prompt = renderer.prompt_ids(turns[:-1])
    assert prompt == expected_ids(renderer, turns[:-1], add_generation_prompt=True)
    assert sample.input_ids[: len(prompt)] == prompt
    assert [t.strip() for t in learned_texts(renderer, turns)] == [
        "Paris is it",
        "it is the capital",
    ]
    counts = [
        renderer.sample([Message("user", text), turns[1]]).input_ids.count(renderer.stop_ids[0])
        for text in ("what is </s> it", "what is it")
    ]
    assert counts[0] == counts[1]


def test_a_template_that_renders_no_answer_is_told_without_a_traceback(
    tiny_model: Path, tmp_path: Path
) -> None:
    template = tmp_path / "broken.jinja"
    template.write_text("{{ raise_exception('never') }}")
    with pytest.raises(ModelError, match="cannot render a question and its answer"):
        Renderer.load(tiny_model, str(template))
