"""What every engine behind `DecodeEngine` has to do, against transformers' own forward passes.

vLLM takes part where it is installed and TUNELOOP_TEST_VLLM is set: it takes a minute to start.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, MistralForCausalLM

from tuneloop.config import VllmConfig
from tuneloop.errors import TuneloopError
from tuneloop.models.chat.renderer import Renderer
from tuneloop.records import SamplingParams
from tuneloop.serving.constraint import Constraints
from tuneloop.serving.engine import Engine, PlainEngine
from tuneloop.serving.model import load_decoder
from tuneloop.serving.ranking import AnswerTree
from tuneloop.serving.requests import (
    AnswerForm,
    DecodeEngine,
    DecodeRequest,
    DecodeResult,
    InvalidRequest,
    Ranking,
    Shaping,
    TokenScore,
)
from tuneloop.serving.vllm.engine import ServedWeights, VllmEngine

PROMPTS = [[(7 * i + k) % 420 + 5 for i in range(length)] for k, length in enumerate((3, 90, 30))]
POSITIONS = 256
ENGINES = [
    "tuneloop",
    "transformers",
    pytest.param(
        "openvino",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("openvino") is None, reason="openvino is not installed"
        ),
    ),
    pytest.param(
        "vllm",
        marks=pytest.mark.skipif(
            not os.environ.get("TUNELOOP_TEST_VLLM"), reason="TUNELOOP_TEST_VLLM is not set"
        ),
    ),
]


@pytest.fixture(scope="module")
def weights(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> ServedWeights:
    """A model whose heads have the 32 dimensions that vLLM's kernels need, and two adapters.

    It sees 48 tokens, fewer than the longest of the prompts has.
    """
    folder = tmp_path_factory.mktemp("conformance")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    torch.manual_seed(0)
    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=POSITIONS,
            sliding_window=48, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=0,
        )
    )  # fmt: skip
    with torch.no_grad():  # larger weights, so that attention decides the next token
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    adapters = {}
    for index, name in enumerate(("first", "second")):
        torch.manual_seed(index)
        # Of different ranks, and one on a layer that the other leaves alone.
        layers = ["q_proj", "down_proj", *["v_proj"] * index]
        lora = LoraConfig(r=8 - 4 * index, target_modules=layers, init_lora_weights=False)
        adapted = get_peft_model(model, lora)
        adapted.save_pretrained(folder / name)
        model = adapted.unload()
        adapters[name] = folder / name
    return ServedWeights(folder / "model", adapters)


@pytest.fixture(scope="module")
def reference(weights: ServedWeights) -> Any:
    return AutoModelForCausalLM.from_pretrained(weights.path).eval()


@pytest.fixture(scope="module")
def renderer(weights: ServedWeights) -> Renderer:
    return Renderer.load(weights.path)


def start(kind: str, weights: ServedWeights, renderer: Renderer) -> DecodeEngine:
    decode = renderer.decode
    if kind == "vllm":
        return VllmEngine(weights, VllmConfig(), decode, (), max_batch_size=4)
    if kind == "openvino":
        from tuneloop.serving.openvino.engine import OpenVinoEngine

        return OpenVinoEngine.load(
            weights.path, decode=decode, stop_ids=(), max_batch_size=4, adapters=weights.adapters
        )
    engine = Engine if kind == "tuneloop" else PlainEngine
    model = load_decoder(weights.path)
    return engine(model, decode, (), max_batch_size=4, adapters=weights.adapters)


@pytest.fixture(scope="module", params=ENGINES)
def engine(
    request: pytest.FixtureRequest, weights: ServedWeights, renderer: Renderer
) -> Iterator[DecodeEngine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tuneloop.serving.engine.num_threads", lambda: 1)
        patch.setattr("tuneloop.serving.model.num_threads", lambda: 1)
        torch.set_num_threads(1)
        engine = start(request.param, weights, renderer)
        yield engine
        # The last test of an engine.
        pending = engine.submit(asking(PROMPTS[0], 200))
        engine.close()
        if not pending.done() or pending.exception() is not None:
            with pytest.raises(TuneloopError):
                pending.result(60)
        with pytest.raises(TuneloopError):
            engine.refuse_dead()


def asking(prompt: Sequence[int], count: int = 8, **options: Any) -> DecodeRequest:
    params = options.pop("params", SamplingParams(max_tokens=count, logprobs=True))
    return DecodeRequest(prompt, params, **options)


def answers(engine: DecodeEngine, requests: Sequence[DecodeRequest]) -> list[DecodeResult]:
    return [future.result(60) for future in [engine.submit(request) for request in requests]]


def logprobs_of(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """Return the log-probabilities behind each token. Shape (T, V)."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].log_softmax(-1)


def greedy(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(logprobs_of(model, ids)[-1].argmax()))
    return ids[len(prompt) :]


def test_greedy_answers_of_a_batch_and_their_scores(engine: DecodeEngine, reference: Any) -> None:
    requests = [asking(prompt, num_top=3) for prompt in PROMPTS]
    for prompt, answer in zip(PROMPTS, answers(engine, requests), strict=True):
        assert answer.token_ids == greedy(reference, prompt, 8)
        assert answer.finish_reason == "length"
        assert (answer.prompt_tokens, answer.completion_tokens) == (len(prompt), 8)
        behind = logprobs_of(reference, [*prompt, *answer.token_ids])[len(prompt) - 1 : -1]
        assert answer.scores is not None
        for row, token, score in zip(behind, answer.token_ids, answer.scores, strict=True):
            assert score.logprob == pytest.approx(float(row[token]), abs=1e-3)
            assert [logprob for _, logprob in score.top] == pytest.approx(
                row.topk(3).values.tolist(), abs=1e-3
            )
        assert answer.logprobs == [score.logprob for score in answer.scores]


def test_scores_of_a_prompt_with_and_without_an_answer(
    engine: DecodeEngine, reference: Any
) -> None:
    prompt = PROMPTS[1]
    both, alone = answers(
        engine, [asking(prompt, count, score_prompt=True, num_top=1) for count in (2, 0)]
    )
    rows = logprobs_of(reference, prompt)[:-1]
    expected = rows[range(len(rows)), prompt[1:]].tolist()
    for answer in (both, alone):
        assert answer.prompt_scores is not None
        assert [score.logprob for score in answer.prompt_scores] == pytest.approx(
            expected, abs=1e-3
        )
        best = [score.top[0][1] for score in answer.prompt_scores]
        assert best == pytest.approx(rows.max(-1).values.tolist(), abs=1e-3)
    assert both.token_ids == greedy(reference, prompt, 2)
    assert (alone.token_ids, alone.text, alone.completion_tokens) == ([], "", 0)


def test_a_stop_token_ends_an_answer_and_is_not_in_it(engine: DecodeEngine, reference: Any) -> None:
    expected = greedy(reference, PROMPTS[1], 8)
    kept = expected[: expected.index(expected[3])]
    answer = answers(engine, [asking(PROMPTS[1], stop_ids=frozenset([expected[3]]))])[0]
    assert answer.token_ids == kept
    assert len(answer.logprobs or ()) == len(kept)
    assert (answer.finish_reason, answer.completion_tokens) == ("stop", len(kept) + 1)


def test_a_stop_string_is_cut_off(engine: DecodeEngine, reference: Any, renderer: Renderer) -> None:
    text = renderer.decode(greedy(reference, PROMPTS[2], 20))
    place = next(i for i in range(2, len(text)) if text[i].isascii() and text[i].isprintable())
    params = SamplingParams(max_tokens=20, stop=(text[place],))
    answer = answers(engine, [asking(PROMPTS[2], params=params)])[0]
    assert answer.text == text[: text.index(text[place])]
    assert answer.finish_reason == "stop"
    assert renderer.decode(answer.token_ids).startswith(answer.text + text[place])


def test_a_stream_tells_the_tokens_of_the_answer(engine: DecodeEngine, reference: Any) -> None:
    told: list[tuple[int, TokenScore | None]] = []
    stop = greedy(reference, PROMPTS[2], 8)[-1]
    one = asking(
        PROMPTS[2],
        20,
        stop_ids=frozenset([stop]),
        on_token=lambda token, score: told.append((token, score)),
        num_top=1,
    )
    answer = answers(engine, [one])[0]
    assert [token for token, _ in told] == answer.token_ids
    assert [score for _, score in told] == answer.scores
    assert answer.token_ids
    assert answer.finish_reason == "stop"


def test_each_request_names_its_adapter(
    engine: DecodeEngine, reference: Any, weights: ServedWeights
) -> None:
    requests = [asking(PROMPTS[1], adapter=name) for name in ("first", "", "second", "first")]
    first, plain, second, again = answers(engine, requests)
    found = {"first": first.token_ids, "second": second.token_ids}
    assert again.token_ids == first.token_ids
    assert plain.token_ids == greedy(reference, PROMPTS[1], 8)
    for name, folder in weights.adapters.items():
        base = AutoModelForCausalLM.from_pretrained(weights.path).eval()
        assert found[name] == greedy(PeftModel.from_pretrained(base, folder), PROMPTS[1], 8)
    assert len({tuple(ids) for ids in [*found.values(), plain.token_ids]}) == 3


def test_the_most_probable_of_given_answers(engine: DecodeEngine, reference: Any) -> None:
    given = [(7, 8, 2), (7, 9, 2), (7, 9, 9, 2), (30, 2)]
    tree = AnswerTree(given)
    requests = [asking(PROMPTS[1], 4, ranking=Ranking(tree, share)) for share in (0.0, 1.0)]
    best, every = answers(engine, requests)
    totals = []
    for answer in given:
        rows = logprobs_of(reference, [*PROMPTS[1], *answer])[len(PROMPTS[1]) - 1 : -1]
        totals.append(float(rows[range(len(answer)), answer].sum()))
    order = sorted(range(len(given)), key=lambda place: -totals[place])
    assert [one.place for one in every.ranked] == order
    assert [one.logprob for one in every.ranked] == pytest.approx(
        [totals[place] for place in order], abs=1e-3
    )
    assert every.coverage == pytest.approx(1)
    assert [one.place for one in best.ranked] == order[:1]
    assert best.token_ids == list(given[order[0]][:-1])
    assert best.finish_reason == "stop"


def test_an_answer_has_its_form(engine: DecodeEngine, renderer: Renderer) -> None:
    constraints = Constraints(renderer, engine.vocab_size)
    forms = {
        r"[0-9]{3}": AnswerForm("regex", "[0-9]{3}", "structured_outputs"),
        r"(yes|no)": AnswerForm("choice", '["yes", "no"]', "structured_outputs"),
        r'\{\s{0,64}"a"\s{0,64}:\s{0,64}(true|false)\s{0,64}\}': AnswerForm(
            "json",
            '{"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], '
            '"additionalProperties": false}',
            "response_format",
        ),
    }
    stop_ids = frozenset(renderer.stop_ids)
    requests = [
        asking(PROMPTS[0], 150, constraint=constraints.compile(form), stop_ids=stop_ids)
        for form in forms.values()
    ]
    for expression, answer in zip(forms, answers(engine, requests), strict=True):
        assert answer.finish_reason == "stop"
        assert re.fullmatch(expression, answer.text), answer.text


def test_samples_follow_their_seed(engine: DecodeEngine, reference: Any) -> None:
    def sampling(seed: int, **shaping: Any) -> DecodeRequest:
        params = SamplingParams(max_tokens=12, temperature=1.5, seed=seed)
        return asking(PROMPTS[0], params=params, shaping=Shaping(**shaping))

    one, same, other, likeliest = answers(
        engine, [sampling(1), sampling(1), sampling(2), sampling(3, top_k=1)]
    )
    assert one.token_ids == same.token_ids
    assert one.token_ids != other.token_ids
    assert likeliest.token_ids == greedy(reference, PROMPTS[0], 12)


def test_biases_and_penalties_change_what_is_chosen(engine: DecodeEngine, reference: Any) -> None:
    plain = greedy(reference, PROMPTS[2], 20)
    assert len(set(plain)) < len(plain)
    biased, once = answers(
        engine,
        [
            asking(PROMPTS[2], 3, shaping=Shaping(logit_bias={9: 100.0})),
            asking(PROMPTS[2], 20, shaping=Shaping(presence_penalty=2.0, frequency_penalty=2.0)),
        ],
    )
    assert biased.token_ids == [9, 9, 9]
    ids = list(PROMPTS[2])
    for _ in range(20):
        logits = logprobs_of(reference, ids)[-1].clone()
        for token in set(ids[30:]):
            logits[token] -= 2.0 + 2.0 * ids[30:].count(token)
        ids.append(int(logits.argmax()))
    assert once.token_ids == ids[30:]
    # Scores are the model's own, before either.
    own = logprobs_of(reference, [*PROMPTS[2], 9])[len(PROMPTS[2]) - 1][9]
    assert (biased.logprobs or [])[0] == pytest.approx(float(own), abs=1e-3)


def test_a_cancelled_request_makes_room(engine: DecodeEngine, reference: Any) -> None:
    long = [engine.submit(asking(PROMPTS[0], 200)) for _ in range(8)]
    assert all(future.cancel() for future in long)
    assert answers(engine, [asking(PROMPTS[2])])[0].token_ids == greedy(reference, PROMPTS[2], 8)
    assert engine.activity().waiting == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (asking([]), "no tokens"),
        (asking([3, 9999]), "outside the vocabulary"),
        (asking(PROMPTS[0], POSITIONS), "256 positions"),
        (asking(PROMPTS[0], adapter="third"), "no adapter `third`"),
        (asking(PROMPTS[0], 2, ranking=Ranking(AnswerTree([(5, 6, 2)]))), "at least 3"),
    ],
)
def test_what_can_never_be_answered_is_refused_at_once(
    engine: DecodeEngine, wrong: DecodeRequest, message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        engine.submit(wrong)


def test_an_engine_counts_what_it_does(engine: DecodeEngine) -> None:
    before = engine.activity()
    answers(engine, [asking(PROMPTS[1], 5)])
    after = engine.activity()
    assert after.prompt_tokens - before.prompt_tokens == len(PROMPTS[1])
    assert after.generated_tokens - before.generated_tokens == 5
    assert (engine.max_length, engine.max_batch_size) == (POSITIONS, 4)
    engine.refuse_dead()
