"""Models that the decode engine does not reproduce are served all the same, by `generate`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GenerationConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    Phi3Config,
    Qwen2MoeConfig,
    XGLMConfig,
)

from tuneloop.models.chat.renderer import Renderer
from tuneloop.records import SamplingParams
from tuneloop.serving.constraint import Constraints
from tuneloop.serving.engine import Engine, PlainEngine
from tuneloop.serving.ranking import AnswerTree
from tuneloop.serving.requests import AnswerForm, DecodeRequest, Ranking

SMALL: dict[str, Any] = {
    "vocab_size": 429,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": 40,
}
# Which of them the engine gets wrong, and by what it knows.
FAMILIES: dict[str, tuple[Callable[[], Any], str]] = {
    "squashed scores": (lambda: Gemma2Config(**SMALL, head_dim=8), "softcap"),
    "positions of its own": (
        lambda: XGLMConfig(
            vocab_size=429, d_model=32, ffn_dim=48, num_layers=2, attention_heads=4,
            eos_token_id=None, bos_token_id=None,
        ),
        "logits differ",
    ),
    "convolution": (
        lambda: Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]),
        "layers without attention",
    ),
    "a window in the mask only": (
        lambda: Qwen2MoeConfig(
            **SMALL, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
            shared_expert_intermediate_size=16, use_sliding_window=True, sliding_window=64,
            layer_types=["sliding_attention", "full_attention"],
        ),
        "sliding_window 64 is in the mask alone",
    ),
    "attention in chunks": (
        lambda: Llama4TextConfig(
            **SMALL, head_dim=8, attention_chunk_size=64, num_local_experts=2,
            intermediate_size_mlp=48,
        ),
        "attention in chunks of 64",
    ),
    "positions scaled by the longest sequence": (
        lambda: Phi3Config(
            **SMALL, original_max_position_embeddings=40, rope_parameters=LONGROPE
        ),
        "longrope",
    ),
}  # fmt: skip
PROMPTS = [[(7 * i + k) % 420 + 5 for i in range(length)] for k, length in enumerate((3, 90, 30))]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuneloop.serving.engine.num_threads", lambda: 1)
    monkeypatch.setattr("tuneloop.serving.model.num_threads", lambda: 1)
    # On some machines the transposed product is the faster one; here it always is.
    monkeypatch.setattr("tuneloop.serving.linear.MIN_GAIN", 0.0)
    torch.set_num_threads(1)


@pytest.fixture
def load(tiny_model: Path, tmp_path: Path) -> Iterator[Callable[..., tuple[Any, Engine]]]:
    engines: list[Engine] = []

    def load(config: Any, **options: Any) -> tuple[Any, Engine]:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=parameter.shape[-1] ** -0.5)
        model.save_pretrained(tmp_path)
        AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
        engines.append(Engine.load(tmp_path, decode=str, stop_ids=(), **options))
        return model, engines[-1]

    yield load
    for engine in engines:
        engine.close()


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    plain = GenerationConfig(max_new_tokens=count, do_sample=False, pad_token_id=0)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=plain)
    return out[0, len(prompt) :].tolist()


def submit(engine: Engine, prompt: list[int], count: int = 8, **options: Any) -> Any:
    params = SamplingParams(max_tokens=count, logprobs=True)
    return engine.submit(DecodeRequest(prompt, params, **options))


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_the_engine_does_not_reproduce_is_generated_one_by_one(
    kind: str, load: Callable[..., tuple[Any, Engine]]
) -> None:
    make, reason = FAMILIES[kind]
    model, engine = load(make())
    assert isinstance(engine, PlainEngine)
    assert reason in engine.notice
    model.generation_config = GenerationConfig()
    answers = [future.result(60) for future in [submit(engine, prompt) for prompt in PROMPTS]]
    assert [a.token_ids for a in answers] == [greedy(model, p, 8) for p in PROMPTS]
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = [*prompt, *answer.token_ids]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        chosen = logits.log_softmax(-1)[range(len(prompt) - 1, len(ids) - 1), answer.token_ids]
        assert answer.logprobs == pytest.approx(chosen.tolist(), abs=1e-3)
        assert answer.finish_reason == "length"


def test_stops_scores_and_cancelling_are_the_engines(
    load: Callable[..., tuple[Any, Engine]],
) -> None:
    model, engine = load(FAMILIES["positions of its own"][0]())
    expected = greedy(model, PROMPTS[0], 8)
    stopped = submit(engine, PROMPTS[0], stop_ids=frozenset(expected[3:4])).result(60)
    assert stopped.token_ids == expected[: expected.index(expected[3])]
    assert stopped.finish_reason == "stop"
    tokens: list[int] = []
    assert (
        submit(engine, PROMPTS[0], on_token=lambda token, _: tokens.append(token))
        .result(60)
        .token_ids
        == tokens
    )
    scored = submit(engine, PROMPTS[2], 0, score_prompt=True).result(60)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([PROMPTS[2]])).logits[0, :-1].log_softmax(-1)
    assert [s.logprob for s in scored.prompt_scores] == pytest.approx(
        logits[range(29), PROMPTS[2][1:]].tolist(), abs=1e-3
    )
    long = submit(engine, PROMPTS[0], 150)
    later = submit(engine, PROMPTS[0], 4)
    assert long.cancel()
    assert later.result(60).token_ids == expected[:4]


def test_forms_and_given_answers_are_the_engines(
    load: Callable[..., tuple[Any, Engine]], tiny_model: Path
) -> None:
    model, engine = load(FAMILIES["positions of its own"][0]())
    form = AnswerForm("regex", "[0-9]{3}", "structured_outputs")
    constraint = Constraints(Renderer.load(tiny_model), 429).compile(form)
    ids = submit(engine, PROMPTS[0], 20, constraint=constraint).result(60).token_ids
    assert re.fullmatch("[0-9]{3}", Renderer.load(tiny_model).decode(ids))
    answers = [(7, 8, 2), (7, 9, 2), (7, 9, 9, 2), (30, 2)]
    tree = AnswerTree(answers)
    ranked = submit(engine, PROMPTS[1], 20, ranking=Ranking(tree, 1.0)).result(60).ranked
    for one in ranked:
        ids = [*PROMPTS[1], *answers[one.place]]
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        places = range(len(PROMPTS[1]) - 1, len(ids) - 1)
        total = float(logprobs[places, ids[len(PROMPTS[1]) :]].sum())
        assert one.logprob == pytest.approx(total, abs=1e-3)
    assert len(ranked) == 4
    assert sorted(ranked, key=lambda one: -one.logprob) == list(ranked)


def test_adapters_are_put_on_whole_sequences(
    load: Callable[..., tuple[Any, Engine]], tmp_path: Path
) -> None:
    config = FAMILIES["squashed scores"][0]()
    model, base = load(config)
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, lora).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    base.close()
    engine = Engine.load(tmp_path, decode=str, stop_ids=(), adapters={"mine": tmp_path / "adapter"})
    try:
        answers = [submit(engine, PROMPTS[1], adapter=name).result(60) for name in ("mine", "")]
        given = (7, 8, 9, 2), (30, 31, 2)
        ranking = Ranking(AnswerTree(given), 1.0)
        ranked = submit(engine, PROMPTS[1], adapter="mine", ranking=ranking).result(60).ranked
    finally:
        engine.close()
    mine = greedy(adapted, PROMPTS[1], 8)
    with adapted.disable_adapter():
        plain = greedy(adapted, PROMPTS[1], 8)
    assert [answer.token_ids for answer in answers] == [mine, plain]
    assert mine != plain
    for one in ranked:
        ids = [*PROMPTS[1], *given[one.place]]
        with torch.no_grad():
            logprobs = adapted(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        total = logprobs[range(len(PROMPTS[1]) - 1, len(ids) - 1), ids[len(PROMPTS[1]) :]].sum()
        assert one.logprob == pytest.approx(float(total), abs=1e-3)


def test_what_the_engine_reproduces_stays_with_it(
    load: Callable[..., tuple[Any, Engine]],
) -> None:
    _, engine = load(LlamaConfig(**SMALL))
    assert type(engine) is Engine
    assert engine.notice == ""
