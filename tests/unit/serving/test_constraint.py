"""Answers in a form that was asked for, and the most probable of given answers."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tuneloop.models.chat.own_templates import TEMPLATES
from tuneloop.models.chat.renderer import Renderer
from tuneloop.records import Message
from tuneloop.serving.constraint import Constraints
from tuneloop.serving.parsing import parse_chat
from tuneloop.serving.protocol import ProtocolError
from tuneloop.serving.ranking import AnswerSearch, AnswerTree
from tuneloop.serving.replica import ModelServer
from tuneloop.serving.requests import AnswerForm

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "What is it?"}]}


def ask(server: ModelServer, **more: Any) -> tuple[int, dict[str, Any]]:
    return asyncio.run(server.answer("chat", CHAT | more))


def answers(server: ModelServer, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    async def all_of_them() -> list[tuple[int, dict[str, Any]]]:
        return await asyncio.gather(*(server.answer("chat", CHAT | body) for body in bodies))

    results = asyncio.run(all_of_them())
    assert [(status, got) for status, got in results if status != 200] == []
    return [got["choices"][0] for _, got in results]


def schema_form(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}


def random_schema(chooser: random.Random, depth: int = 0) -> dict[str, Any]:
    kind = chooser.choice(["object", "array", "string", "integer", "enum", "boolean", "any of"])
    if depth > 2 and kind in ("object", "array", "any of"):
        kind = "boolean"
    inner = [random_schema(chooser, depth + 1) for _ in range(3)] if depth <= 2 else []
    match kind:
        case "object":
            names = chooser.sample(["a", "b_c", "naïve", "東京", "x y", '"'], 3)
            needed = chooser.sample(names, chooser.randint(0, 3))
            properties = dict(zip(names, inner, strict=True))
            closed = {"additionalProperties": False}
            return {"type": "object", "properties": properties, "required": needed} | closed
        case "array":
            return {"type": "array", "items": inner[0], "minItems": 1, "maxItems": 3}
        case "string":
            return {"type": "string", "maxLength": chooser.randint(1, 12)}
        case "integer":
            return {"type": "integer", "minimum": -5, "maximum": chooser.choice([0, 7, 12345])}
        case "enum":
            return {"enum": chooser.sample(["one", "zwei", "三", 4, None, True], 3)}
        case "any of":
            return {"anyOf": inner[:2]}
    return {"type": "boolean"}


def test_every_finished_answer_has_its_schema(server: ModelServer) -> None:
    chooser = random.Random(0)
    schemas = [random_schema(chooser) for _ in range(60)]
    bodies = [
        {"response_format": schema_form(schema), "max_tokens": 150, "seed": seed}
        | {"temperature": chooser.choice([0, 1, 2]), "frequency_penalty": chooser.choice([0, 0.5])}
        for seed, schema in enumerate(schemas)
    ]
    got = answers(server, bodies)
    finished = [
        (choice, schema)
        for choice, schema in zip(got, schemas, strict=True)
        if choice["finish_reason"] == "stop"
    ]
    assert len(finished) >= 40
    for choice, schema in finished:
        jsonschema.validate(json.loads(choice["message"]["content"]), schema)


def test_an_answer_that_is_cut_off_says_so(server: ModelServer) -> None:
    schema = {"type": "string", "minLength": 50}
    [choice] = answers(server, [{"response_format": schema_form(schema), "max_tokens": 5}])
    assert choice["finish_reason"] == "length"
    with pytest.raises(json.JSONDecodeError):
        json.loads(choice["message"]["content"])


def test_a_greedy_answer_that_has_the_form_stays(server: ModelServer) -> None:
    asked = {"temperature": 0, "max_tokens": 12, "return_token_ids": True}
    [free] = answers(server, [asked])
    anything = {"regex": r"[\s\S]*"}
    [same] = answers(server, [asked | {"structured_outputs": anything}])
    assert same["token_ids"] == free["token_ids"]


@pytest.mark.parametrize(
    ("form", "holds"),
    [
        ({"regex": r"[a-c]{2}-\d{1,3}"}, lambda t: re.fullmatch(r"[a-c]{2}-\d{1,3}", t)),
        ({"choice": ["yes", "no", "für /immer/"]}, {"yes", "no", "für /immer/"}.__contains__),
        ({"grammar": 'start: "<" ("a" | "b")~1..3 ">"'}, lambda t: re.fullmatch("<[ab]{1,3}>", t)),
        ({"json": {"const": "東京"}}, lambda t: json.loads(t) == "東京"),
    ],
)
def test_forms_as_vllm_has_them(server: ModelServer, form: dict[str, Any], holds: Any) -> None:
    bodies = [
        {"structured_outputs": form, "max_tokens": 40, "temperature": t, "seed": seed, "n": 2}
        for t, seed in itertools.product((0, 1.5), range(4))
    ]
    for choice in answers(server, bodies):
        assert choice["finish_reason"] == "stop"
        assert holds(choice["message"]["content"]), choice


def test_streams_seeds_and_log_probabilities_go_with_a_form(server: ModelServer) -> None:
    form = schema_form({"type": "object", "properties": {"a": {"type": "integer"}}})
    body = {"response_format": form, "seed": 3, "max_tokens": 60, "logprobs": True, "n": 2}
    status, whole = ask(server, **body)
    assert status == 200
    texts = [choice["message"]["content"] for choice in whole["choices"]]
    assert texts == [c["message"]["content"] for c in ask(server, **body)[1]["choices"]]

    async def stream() -> list[Any]:
        return [one async for one in server.stream("chat", CHAT | body | {"stream": True})]

    events = [json.loads(one[6:]) for one in asyncio.run(stream())[1:-1]]
    for choice in whole["choices"]:
        parts = [e["choices"][0] for e in events if e["choices"][0]["index"] == choice["index"]]
        text = "".join(part["delta"].get("content") or "" for part in parts)
        assert text == choice["message"]["content"]
        # The model's own, before anything was ruled out.
        assert all(item["logprob"] < 0 for item in choice["logprobs"]["content"])


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"enum": []}, "Unsatisfiable"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "Unsatisfiable"),
        ({"type": "string", "pattern": "["}, "regex"),
        ({"$ref": "#"}, "refers to itself"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
         "refers to itself"),
        ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
         "refers to itself"),
        ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, "refers to itself"),
        ({"$ref": "https://example.com/schema"}, "not present"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"enum": ["x" * 100] * 1000}, "bytes"),
    ],
)  # fmt: skip
def test_a_form_that_no_answer_can_have_is_one_refusal(
    server: ModelServer, schema: dict[str, Any], reason: str
) -> None:
    status, got = ask(server, response_format=schema_form(schema))
    assert status == 400
    assert got["error"]["param"] == "response_format"
    assert got["error"]["type"] == "invalid_request_error"
    assert reason in got["error"]["message"]


@pytest.mark.parametrize("form", [{"regex": r"[^\s\S]"}, {"regex": "("}, {"grammar": "start: x"}])
def test_expressions_that_nothing_matches(server: ModelServer, form: dict[str, Any]) -> None:
    status, got = ask(server, structured_outputs=form)
    assert (status, got["error"]["param"]) == (400, "structured_outputs")


def test_a_schema_may_refer_to_itself_with_an_end(server: ModelServer) -> None:
    tree = {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#"}, {"const": 1}]}},
            "required": ["next"], "additionalProperties": False}  # fmt: skip
    [choice] = answers(server, [{"response_format": schema_form(tree), "max_tokens": 300}])
    if choice["finish_reason"] == "stop":
        jsonschema.validate(json.loads(choice["message"]["content"]), tree)


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
         "structured_outputs"),
        ({"ranking": {"answers": []}}, "ranking"),
        ({"ranking": {"answers": ["a", "a"]}}, "ranking"),
        ({"ranking": {"answers": ["a", "b"]}, "stream": True}, "ranking"),
        ({"ranking": {"answers": ["a", "b"]}, "response_format": {"type": "json_object"}},
         "ranking"),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_refused(more: dict[str, Any], param: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        parse_chat(CHAT | more)
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize("strips", [True, False])
def test_a_space_that_only_the_tokenizer_writes_is_allowed(strips: bool) -> None:
    """Words of the SentencePiece kind begin with `▁`, which decoding drops from the first."""
    letters = ["▁", *'yesnofr{}1234567890:"a', *(f"<0x{byte:02X}>" for byte in range(256))]
    words = ["▁y", "▁ye", "▁yes", "▁n", "▁no"]
    names = ["<unk>", "<|im_start|>", "<|im_end|>", *letters, *words]
    vocabulary = {name: index for index, name in enumerate(names)}
    merges = [("▁", "y"), ("▁y", "e"), ("▁ye", "s"), ("▁", "n"), ("▁n", "o")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    strip = [decoders.Strip(" ", 1, 0)] if strips else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", unk_token="<unk>"
    )
    renderer = Renderer(fast, TEMPLATES["chatml"])
    form = AnswerForm("choice", json.dumps(["yes", "no", "für"]), "structured_outputs")
    constraint = Constraints(renderer, len(names) + 3).compile(form)
    torch.manual_seed(0)
    texts = set()
    for _ in range(60):
        follower, ids = constraint.start(), []
        while not follower.is_complete:
            ids.append(int(follower.mask(torch.randn(len(names) + 3)).argmax()))
            follower.push(ids[-1])
        texts.add(renderer.decode(ids))
    assert texts == {"yes", "no", "für"}
    assert constraint.start().allows(vocabulary["▁yes"]) == strips
    # What goes on from a text keeps its space.
    ids = [vocabulary[name] for name in ("<|im_end|>", "▁yes", "▁no")]
    assert renderer.decode(ids) == ("yes no" if strips else " yes no")
    assert renderer.decode_behind([5], ids) == " yes no"
    assert renderer.decode_behind(ids[:1], ids) == renderer.decode(ids)
    assert renderer.decode_behind([5], []) == ""


def test_unigram_tokens_are_known_by_their_bytes() -> None:
    pieces = ["<unk>", "<|im_start|>", "<|im_end|>", "▁", *"yesno<|>im_trdau\n", "▁yes", "no"]
    scores = [(piece, -float(rank)) for rank, piece in enumerate(dict.fromkeys(pieces))]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", unk_token="<unk>"
    )
    renderer = Renderer(fast, TEMPLATES["chatml"])
    form = AnswerForm("choice", json.dumps(["yes", "no"]), "structured_outputs")
    constraint = Constraints(renderer, len(fast) + 5).compile(form)
    torch.manual_seed(0)
    texts = set()
    for _ in range(30):
        follower, ids = constraint.start(), []
        while not follower.is_complete:
            ids.append(int(follower.mask(torch.randn(len(fast) + 5)).argmax()))
            follower.push(ids[-1])
        texts.add(renderer.decode(ids))
    assert texts == {"yes", "no"}


LABELS = ["alarm", "alarm clock", "alert", "card lost", "card stolen", "cards", "ü", "zoo"]


@pytest.fixture(scope="module")
def by_hand(tiny_model: Path, renderer: Renderer) -> dict[str, float]:
    """The log-probability of each label with its stop token, one forward pass each."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    question = [Message("user", "What is it?")]
    start = len(renderer.prompt_ids(question))
    sums = {}
    for label in LABELS:
        ids = renderer.sample([*question, Message("assistant", label)]).input_ids
        assert ids[-1] in renderer.stop_ids
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        sums[label] = float(sum(logprobs[i - 1, ids[i]] for i in range(start, len(ids))))
    return sums


def test_the_most_probable_answer_as_a_whole(
    server: ModelServer, by_hand: dict[str, float]
) -> None:
    best = max(by_hand, key=by_hand.__getitem__)
    [choice] = answers(server, [{"ranking": {"answers": LABELS}}])
    assert choice["message"]["content"] == best
    assert choice["finish_reason"] == "stop"
    [found] = choice["ranking"]["answers"]
    assert found["logprob"] == pytest.approx(by_hand[best], abs=1e-4)


def test_all_probabilities_where_they_are_asked_for(
    server: ModelServer, by_hand: dict[str, float]
) -> None:
    bodies = [{"ranking": {"answers": LABELS, "coverage": 1}}, {}, {"max_tokens": 9}]
    for order in (LABELS, LABELS[::-1]):
        bodies.append({"ranking": {"answers": order, "coverage": 1}})
    for choice in [c for c in answers(server, bodies) if "ranking" in c]:
        got = {a["text"]: a["logprob"] for a in choice["ranking"]["answers"]}
        assert list(got) == sorted(by_hand, key=by_hand.__getitem__, reverse=True)
        assert got == pytest.approx(by_hand, abs=1e-4)
        assert choice["ranking"]["coverage"] == pytest.approx(1)


@pytest.mark.parametrize("sharpness", [0.5, 2.0, 6.0])
def test_a_search_finds_what_scoring_all_finds(sharpness: float) -> None:
    chooser = random.Random(1)
    torch.manual_seed(0)
    answers = list({(*chooser.choices(range(1, 9), k=chooser.randint(1, 5)), 0) for _ in range(60)})
    logits: dict[tuple[int, ...], torch.Tensor] = {}

    def behind(path: tuple[int, ...]) -> torch.Tensor:
        return logits.setdefault(path, sharpness * torch.randn(9))

    def total(answer: tuple[int, ...]) -> float:
        steps = ((answer[:i], token) for i, token in enumerate(answer))
        return sum(float(behind(path).log_softmax(-1)[token]) for path, token in steps)

    search, fed, num_looks = AnswerSearch(AnswerTree(answers), 0.5), (), 0
    while search.advance(behind(fed)) is not None:
        # What an engine caches: tokens are dropped from the end, then one is added.
        fed = (*fed[: len(fed) - search.num_to_drop], search.path[-1])
        assert fed == search.path
        num_looks += 1
    expected = sorted(answers, key=total, reverse=True)[: len(search.found)]
    assert [answers[one.place] for one in search.found] == expected
    mass = float(torch.tensor([total(answer) for answer in answers]).exp().sum())
    found = float(torch.tensor([one.logprob for one in search.found]).exp().sum())
    assert 0.5 <= search.coverage <= found / mass + 1e-6
    if sharpness == 6:
        assert num_looks < 30  # of more than a hundred beginnings of answers
