"""Rendering: the ids that are trained are the ids that are served."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tuneloop.errors import ModelError
from tuneloop.models.chat.own_templates import TEMPLATES
from tuneloop.models.chat.renderer import Renderer
from tuneloop.models.chat.template import RenderError
from tuneloop.records import Message

SYSTEM = Message("system", "Answer in one word.")
TURNS = [
    SYSTEM,
    Message("user", "What is the capital of France?\n"),
    Message("assistant", "\n\nParis"),
    Message("user", "And 1 2 3?"),
    Message("assistant", "4"),
]


@pytest.fixture(scope="module", params=["auto", *TEMPLATES])
def renderer(request: pytest.FixtureRequest, tiny_model: Path) -> Renderer:
    return Renderer.load(tiny_model, request.param)


def test_every_prompt_is_a_prefix_of_the_training_ids(renderer: Renderer) -> None:
    sample = renderer.sample(TURNS)
    for index, turn in enumerate(TURNS):
        if turn.role == "assistant":
            prompt = renderer.prompt_ids(TURNS[:index])
            assert sample.input_ids[: len(prompt)] == prompt
            assert sample.loss_mask[len(prompt)] == 1
            assert sample.loss_mask[len(prompt) - 1] == 0


def test_the_mask_covers_answers_and_their_stop_token_only(renderer: Renderer) -> None:
    sample = renderer.sample(TURNS)
    learned = [i for i, kept in zip(sample.input_ids, sample.loss_mask, strict=True) if kept]
    stop = renderer.stop_ids[0]
    assert learned.count(stop) == 2
    assert sample.input_ids[-1] == stop
    assert sample.loss_mask[-1] == 1
    assert renderer.decode(learned) == "\n\nParis4"


def test_answers_end_at_the_tokens_that_generation_config_names_as_well(
    tiny_model: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    usual = Renderer.load(base)
    assert usual.stop_ids == (2,)
    # Token 40 is a piece of text.
    (base / "generation_config.json").write_text('{"eos_token_id": [0, 2, 40]}')
    renderer = Renderer.load(base)
    assert renderer.stop_ids == (2, 0)
    assert renderer.sample(TURNS) == usual.sample(TURNS)
    quoted = renderer.sample([*TURNS[:-1], Message("assistant", "a<|endoftext|>b")])
    assert quoted.input_ids.count(0) == 0
    # As an export has it.
    renderer.save(tmp_path / "export")
    settings = json.dumps({"eos_token_id": list(renderer.stop_ids)})
    (tmp_path / "export" / "generation_config.json").write_text(settings)
    assert Renderer.load(tmp_path / "export").hash == renderer.hash != usual.hash


def test_chatml_ends_turns_with_eos_where_the_vocabulary_has_no_token_for_it(
    tiny_model: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    tokenizer = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    settings = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    text = json.dumps([tokenizer, settings]).replace("<|im_end|>", "<|end|>")
    for name, content in zip(("tokenizer", "tokenizer_config"), json.loads(text), strict=True):
        (tmp_path / "model" / f"{name}.json").write_text(json.dumps(content))
    for name in ("chatml", "chatml_tools"):
        renderer = Renderer.load(tmp_path / "model", name)
        sample = renderer.sample(TURNS[1:3])
        rendered = renderer.tokenizer.decode(sample.input_ids, skip_special_tokens=False)
        assert "<|im_end|>" not in rendered
        assert renderer.tokenizer.eos_token == "<|end|>"
        assert rendered.rstrip().endswith("\n\nParis<|end|>")
        assert sample.loss_mask[-1] == 1


def test_pad_equal_to_eos_still_learns_to_stop(renderer: Renderer) -> None:
    assert renderer.tokenizer.pad_token_id == renderer.tokenizer.eos_token_id
    sample = renderer.sample(TURNS[:3])
    assert sample.loss_mask[-1] == 1
    assert sample.input_ids[-1] == renderer.tokenizer.eos_token_id


def test_the_mask_counted_by_hand(tiny_model: Path) -> None:
    renderer = Renderer.load(tiny_model)
    encode = renderer.tokenizer.encode
    prompt = encode("<|im_start|>user\nyes\n<|im_end|>\n<|im_start|>assistant\n")
    sample = renderer.sample([Message("user", "yes\n"), Message("assistant", "no")])
    assert sample.input_ids == [*prompt, *encode("no"), *encode("<|im_end|>")]
    assert sample.loss_mask == [0] * len(prompt) + [1] * len(encode("no")) + [1]


def test_saving_keeps_the_hash_and_another_template_changes_it(
    tmp_path: Path, tiny_model: Path
) -> None:
    alpaca = Renderer.load(tiny_model, "alpaca")
    alpaca.save(tmp_path)
    assert Renderer.load(tmp_path).hash == alpaca.hash
    assert Renderer.load(tmp_path).prompt_ids(TURNS[:2]) == alpaca.prompt_ids(TURNS[:2])
    assert Renderer.load(tiny_model, "plain").hash != alpaca.hash


def test_control_tokens_in_the_text_are_text(renderer: Renderer) -> None:
    turns = [Message("user", "ignore <|im_end|> this"), Message("assistant", "no")]
    sample, plain = renderer.sample(turns), renderer.sample([Message("user", "a"), turns[1]])
    stop = renderer.stop_ids[0]
    assert sample.input_ids.count(stop) == plain.input_ids.count(stop)
    assert "ignore <|im_end|> this" in renderer.tokenizer.decode(sample.input_ids)


@pytest.mark.parametrize(
    "turns", [[], [SYSTEM], TURNS[:2], [*TURNS[:2], Message("assistant", " ")]]
)
def test_conversations_without_an_answer_are_refused(
    renderer: Renderer, turns: list[Message]
) -> None:
    with pytest.raises(RenderError):
        renderer.sample(turns)


def test_double_bos_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    template = tmp_path / "twice.jinja"
    template.write_text("{{ bos_token }}{{ bos_token }}" + TEMPLATES["alpaca"])
    renderer = Renderer.load(tiny_model, str(template))
    renderer.tokenizer.bos_token = "<|endoftext|>"
    with pytest.raises(RenderError, match="two BOS"):
        renderer.sample(TURNS)


def test_a_tokenizer_that_adds_bos_gets_it_from_the_template_once(tiny_model: Path) -> None:
    from tokenizers import processors
    from transformers import AutoTokenizer

    from tuneloop.models.chat.own_templates import chosen_template

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    renderer = Renderer(tokenizer, chosen_template(tokenizer, "alpaca"))
    ids = renderer.prompt_ids(TURNS[:2])
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id
    assert renderer.text_ids("yes")[0] == tokenizer.bos_token_id


def test_a_template_without_a_stop_token_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    template = tmp_path / "endless.jinja"
    template.write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    with pytest.raises(ModelError, match="stop token"):
        Renderer.load(tiny_model, str(template))


def test_a_call_that_nothing_closes_is_not_learned_with_its_result(
    tiny_model: Path, tmp_path: Path
) -> None:
    text = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content or '' }}{% for call in m.tool_calls or [] %}{{ call.function | tojson }}
{% endfor %}{% if not m.tool_calls %}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
    function = {"name": "add", "arguments": '{"a": 1}'}
    calls = [{"id": "abcdefghi", "type": "function", "function": function}]
    question = Message("user", "What is 1 + 1?")
    called = Message.of({"role": "assistant", "content": "", "tool_calls": calls})
    rest = [Message.of({"role": "tool", "content": "2"}), Message("assistant", "It is 2.")]
    (tmp_path / "open.jinja").write_text(text)
    renderer = Renderer.load(tiny_model, str(tmp_path / "open.jinja"))
    for turns in ([question, called], [question, called, *rest]):
        with pytest.raises(RenderError, match="stop token"):
            renderer.sample(turns)
    context = Message.of({**called.as_dict(), "weight": 0})
    learned = renderer.sample([question, context, *rest])
    ids = [i for i, kept in zip(learned.input_ids, learned.loss_mask, strict=True) if kept]
    assert renderer.decode(ids) == "It is 2."
    closed = text.replace("{% if not m.tool_calls %}<|im_end|>\n{% endif %}", "<|im_end|>\n")
    (tmp_path / "closed.jinja").write_text(closed)
    sample = Renderer.load(tiny_model, str(tmp_path / "closed.jinja")).sample
    assert sum(sample([question, called, *rest]).loss_mask) > len(ids)


def test_a_special_token_that_opens_an_answer_does_not_end_it(
    tiny_model: Path, tmp_path: Path
) -> None:
    opened = TEMPLATES["chatml"].replace(
        "{{ message.content }}",
        "{% if message.role == 'assistant' %}<|im_start|>final\n{% endif %}{{ message.content }}",
    )
    (tmp_path / "opened.jinja").write_text(opened)
    renderer = Renderer.load(tiny_model, str(tmp_path / "opened.jinja"))
    assert renderer.stop_ids == Renderer.load(tiny_model).stop_ids
    sample = renderer.sample([Message("user", "a"), Message("assistant", "Paris")])
    learned = [i for i, kept in zip(sample.input_ids, sample.loss_mask, strict=True) if kept]
    assert renderer.decode(learned) == "final\nParis"


def test_a_template_that_rewrites_earlier_turns_is_refused(
    tiny_model: Path, tmp_path: Path
) -> None:
    template = tmp_path / "counting.jinja"
    template.write_text(
        "{{ messages | length }}{% for m in messages %}{{ m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    with pytest.raises(ModelError, match="earlier turns"):
        Renderer.load(tiny_model, str(template))


def test_of_several_templates_the_default_is_taken(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_model)
    chatml = TEMPLATES["chatml"].replace("<|im_end|>", "{{ eos_token }}")
    tokenizer.chat_template = {"rag": "{{ messages }}", "default": chatml}
    tokenizer.save_pretrained(tmp_path)
    assert Renderer.load(tmp_path).template == chatml
    tokenizer.chat_template = {"rag": "{{ messages }}", "tool_use": chatml}
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="several chat templates") as caught:
        Renderer.load(tmp_path / "other")
    assert caught.value.problems[0].got == "rag, tool_use"


def test_missing_tokenizer_and_template(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(ModelError, match="tokenizer"):
        Renderer.load(tmp_path)
    with pytest.raises(ModelError, match="chat template"):
        Renderer.load(tiny_model, "alpacca")


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> Renderer:
    return Renderer.load(tiny_model)


@given(
    st.lists(st.text() | st.sampled_from(["é😀", "<|im_end|>", "日本", "a b"])).map("".join),
    st.lists(st.integers(0, 60), max_size=4),
)
def test_pieces_say_what_their_ids_say(plain: Renderer, text: str, cuts: list[int]) -> None:
    ids = plain.batch_ids([text], closed=True).values
    borders = [0, *sorted(cut for cut in cuts if cut < len(ids)), len(ids)]
    pieces = [ids[start:stop] for start, stop in itertools.pairwise(borders)]
    decode = plain.tokenizer.backend_tokenizer.decode
    assert plain.piece_texts(text, pieces) == [decode(piece.tolist()) for piece in pieces]


def test_the_quick_way_to_load_gives_the_same_tokenizer(tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    quick = Renderer.load(tiny_model)
    usual = Renderer(AutoTokenizer.from_pretrained(tiny_model), quick.template)
    assert usual.hash == quick.hash
    assert usual.prompt_ids(TURNS[:2]) == quick.prompt_ids(TURNS[:2])
