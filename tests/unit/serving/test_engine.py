"""The engine against transformers' own greedy decoding and forward passes."""

from __future__ import annotations

import copy
import math
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

from tuneloop.errors import ModelError, TuneloopError
from tuneloop.models.chat.renderer import Renderer
from tuneloop.records import SamplingParams
from tuneloop.serving.engine import Engine
from tuneloop.serving.ranking import AnswerSearch, AnswerTree
from tuneloop.serving.requests import DecodeRequest, InvalidRequest, QueueFull, Ranking, Shaping
from tuneloop.serving.sampling import argmax, sample, shape

SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 400,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
FAMILIES = {
    "llama": LlamaConfig(**SMALL),
    "mistral with window": MistralConfig(**SMALL, sliding_window=16),
    "qwen3": Qwen3Config(**SMALL, head_dim=16),
    "gemma3 with window": Gemma3TextConfig(
        **SMALL,
        head_dim=16,
        sliding_window=16,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    ),
    "gpt_neox": GPTNeoXConfig(**{k: v for k, v in SMALL.items() if k != "num_key_value_heads"}),
    "gpt2": GPT2Config(
        vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=400, bos_token_id=None,
        eos_token_id=None, pad_token_id=0,
    ),
}  # fmt: skip


def make_model(config):  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    with torch.no_grad():  # larger weights, so that attention decides the next token
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


def decode(ids):  # type: ignore[no-untyped-def]
    return "".join(chr(33 + token) for token in ids)


def greedy(model, prompt: list[int], max_tokens: int) -> list[int]:  # type: ignore[no-untyped-def]
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False
    )
    return out[0, len(prompt) :].tolist()


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny products gain nothing from threads, and wait for each other on a busy machine."""
    monkeypatch.setattr("tuneloop.serving.engine.num_threads", lambda: 1)
    monkeypatch.setattr("tuneloop.serving.model.num_threads", lambda: 1)
    torch.set_num_threads(1)


@pytest.fixture
def start() -> Iterator:  # type: ignore[type-arg]
    engines: list[Engine] = []

    def _start(model, stop_ids=(), **options):  # type: ignore[no-untyped-def]
        engines.append(Engine(model, decode, stop_ids, **options))
        return engines[-1]

    yield _start
    for engine in engines:
        engine.close()


def prompts_of(lengths: list[int], seed: int = 0) -> list[list[int]]:
    chooser = random.Random(seed)
    return [[chooser.randrange(99) for _ in range(length)] for length in lengths]


@pytest.mark.parametrize("family", ["llama", "gemma3 with window", "gpt2"])
def test_searches_beside_other_requests_score_as_one_forward_pass_each(family: str, start) -> None:  # type: ignore[no-untyped-def]
    """A search goes back and takes another branch: cached tokens are dropped, others are kept."""
    model = make_model(FAMILIES[family])
    plain_model = copy.deepcopy(model)
    shared = prompts_of([70], seed=1)[0]
    prompts = prompts_of([3, 126]) + [shared + one for one in prompts_of([2, 9], seed=2)]
    chooser = random.Random(3)
    answers = sorted(
        {(*chooser.choices(range(1, 4), k=chooser.randint(1, 4)), 0) for _ in range(20)}
    )
    engine = start(model, max_batch_size=4)
    params = SamplingParams(max_tokens=7)
    requests = [
        DecodeRequest(p, params, ranking=Ranking(AnswerTree(answers), 1.0)) for p in prompts
    ]
    plain = [DecodeRequest(p, SamplingParams(max_tokens=20)) for p in prompts]
    futures = [engine.submit(one) for pair in zip(requests, plain, strict=True) for one in pair]
    for prompt, found, other in zip(prompts, futures[::2], futures[1::2], strict=True):
        assert other.result(60).token_ids == greedy(plain_model, prompt, 20)
        ranked = found.result(60).ranked
        assert len(ranked) == len(answers)
        assert found.result().token_ids == list(answers[ranked[0].place][:-1])
        for one in ranked[:3] + ranked[-3:]:
            ids = [*prompt, *answers[one.place]]
            with torch.no_grad():
                logprobs = plain_model(torch.tensor([ids])).logits[0].log_softmax(-1)
            places = range(len(prompt) - 1, len(ids) - 1)
            assert one.logprob == pytest.approx(
                float(logprobs[places, ids[len(prompt) :]].sum()), abs=2e-3
            )


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers_one_by_one(family: str, start) -> None:  # type: ignore[no-untyped-def]
    """Ragged prompts, more of them than slots, answers that outgrow a slot, shared prefixes."""
    model = make_model(FAMILIES[family])
    prompts = prompts_of([1, 7, 120, 33, 130, 250, 2, 64, 127])
    shared = prompts_of([70], seed=1)[0]
    prompts += [shared + suffix for suffix in prompts_of([3, 9, 40, 1], seed=2)]
    budgets = [5 + 7 * (index % 4) for index in range(len(prompts))]
    expected = [greedy(model, p, n) for p, n in zip(prompts, budgets, strict=True)]

    engine = start(model, max_batch_size=4)
    futures = [
        engine.submit(DecodeRequest(prompt, SamplingParams(max_tokens=count)))
        for prompt, count in zip(prompts, budgets, strict=True)
    ]
    assert [future.result(60).token_ids for future in futures] == expected
    assert any(len(prefix) == 70 for prefix in engine._prefixes)


def test_transposed_products_write_the_same(start, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """As many rows as `argmax` needs, in a vocabulary that its blocks divide."""
    from tuneloop.serving.linear import speed_up_linear

    monkeypatch.setattr("tuneloop.serving.linear.MIN_GAIN", 0.0)
    model = make_model(LlamaConfig(**{**SMALL, "vocab_size": 128}, mlp_bias=True))
    prompts = prompts_of([1 + 3 * index for index in range(24)])
    expected = [greedy(model, prompt, 10) for prompt in prompts]
    assert speed_up_linear(model, num_rows=24)
    sizes = []
    model.lm_head.register_forward_hook(
        lambda _, __, out: sizes.append((out[0].stride(0), out.shape[1]))
    )
    engine = start(model, max_batch_size=24)
    futures = [engine.submit(DecodeRequest(p, SamplingParams(max_tokens=10))) for p in prompts]
    assert [future.result(60).token_ids for future in futures] == expected
    assert any(stride == 1 and num_rows >= 16 for stride, num_rows in sizes)


def test_answers_too_improbable_for_a_number_have_shares() -> None:
    for coverage, places, share in ((0.0, [0], 1 / (1 + math.exp(-1))), (1.0, [0, 1], 1.0)):
        search = AnswerSearch(AnswerTree([(1, 0), (2, 0)]), coverage)
        logits = torch.tensor([0.0, -2000.0, -2001.0])
        while search.advance(logits) is not None:
            pass
        assert [one.place for one in search.found] == places
        assert search.coverage == pytest.approx(share)


def test_the_first_of_the_likeliest_is_taken() -> None:
    torch.manual_seed(0)
    for vocab, rows in ((128, 40), (128, 3), (99, 40)):
        # Few values, so that most rows have several largest ones, in one block and in others.
        logits = torch.randint(0, 3, (rows, vocab)).float()
        first = torch.tensor([row.tolist().index(row.max()) for row in logits])
        assert torch.equal(argmax(logits), first)
        assert torch.equal(argmax(logits.t().contiguous().t()), first)


def test_prompts_longer_than_a_step_are_read_in_chunks(start, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("tuneloop.serving.engine.PREFILL_TOKENS_PER_STEP", 13)
    model = make_model(FAMILIES["gemma3 with window"])
    prompts = prompts_of([50, 5, 61])
    expected = [greedy(model, prompt, 8) for prompt in prompts]
    engine = start(model)
    futures = [engine.submit(DecodeRequest(p, SamplingParams(max_tokens=8))) for p in prompts]
    assert [future.result(60).token_ids for future in futures] == expected


def test_a_prefix_is_computed_once(start, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    import tuneloop.serving.engine as module

    model = make_model(FAMILIES["llama"])
    engine = start(model)
    shared = prompts_of([200])[0]
    prompts = [shared + suffix for suffix in prompts_of([5] * 8, seed=3)]
    read = []
    original = module.forward

    def counting(model, groups):  # type: ignore[no-untyped-def]
        read.append(sum(len(g.token_ids) for g in groups if isinstance(g, module.Prompt)))
        return original(model, groups)

    monkeypatch.setattr(module, "forward", counting)
    with_future = [engine.submit(DecodeRequest(p, SamplingParams(max_tokens=2))) for p in prompts]
    for future in with_future:
        future.result(60)
    # The first may have been read whole, before there was anything to compare it with.
    assert sum(read) <= 205 + 200 + 8 * 5


def test_scores_equal_a_plain_forward_pass(start, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("tuneloop.serving.engine.PREFILL_TOKENS_PER_STEP", 11)
    model = make_model(FAMILIES["llama"])
    prompt = prompts_of([40])[0]
    answer = greedy(model, prompt, 6)
    ids = torch.tensor([prompt + answer])
    with torch.inference_mode():
        expected = model(ids).logits[0].log_softmax(-1)
    chosen = expected[:-1].gather(1, ids[0, 1:, None])[:, 0]

    engine = start(model)
    params = SamplingParams(max_tokens=6, logprobs=True)
    got = engine.submit(DecodeRequest(prompt, params, num_top=2, score_prompt=True)).result(60)
    assert got.token_ids == answer
    scores = [*got.prompt_scores, *got.scores]
    assert [s.logprob for s in scores] == pytest.approx(chosen.tolist(), abs=1e-4)
    assert got.logprobs == [score.logprob for score in got.scores]
    best = expected[:-1].topk(2)
    assert [[token for token, _ in s.top] for s in scores] == best.indices.tolist()
    # Exactly equal where the token is the likeliest: harnesses read "is greedy" from it.
    assert all(score.logprob == score.top[0][1] for score in got.scores)


def test_scoring_alone_writes_nothing(start) -> None:  # type: ignore[no-untyped-def]
    engine = start(make_model(FAMILIES["llama"]))
    got = engine.submit(
        DecodeRequest([5, 6, 7], SamplingParams(max_tokens=0), score_prompt=True)
    ).result(60)
    assert (got.token_ids, got.completion_tokens, len(got.prompt_scores)) == ([], 0, 2)


def test_stop_token_ends_and_is_not_part_of_the_answer(start) -> None:  # type: ignore[no-untyped-def]
    model = make_model(FAMILIES["llama"])
    prompt = prompts_of([20])[0]
    answer = greedy(model, prompt, 12)
    stop = next(
        token for index, token in enumerate(answer) if index and token not in answer[:index]
    )
    cut = answer.index(stop)
    got = start(model, stop_ids=[stop]).submit(
        DecodeRequest(prompt, SamplingParams(max_tokens=12, logprobs=True))
    ).result(60)  # fmt: skip
    assert got.token_ids == answer[:cut]
    assert (got.finish_reason, got.completion_tokens) == ("stop", cut + 1)
    assert len(got.logprobs) == cut


def test_stop_string_is_cut_off(start) -> None:  # type: ignore[no-untyped-def]
    model = make_model(FAMILIES["llama"])
    prompt = prompts_of([20])[0]
    text = decode(greedy(model, prompt, 12))
    params = SamplingParams(max_tokens=12, stop=("never there", text[4:7]))
    got = start(model).submit(DecodeRequest(prompt, params)).result(60)
    assert got.text == text[: text.index(text[4:7])]
    assert got.finish_reason == "stop"


def test_stop_strings_are_looked_for_in_the_text_that_a_request_asks_for(start) -> None:  # type: ignore[no-untyped-def]
    model = make_model(FAMILIES["llama"])
    prompt = prompts_of([20])[0]
    ids = greedy(model, prompt, 12)
    params = SamplingParams(max_tokens=12, stop=(f"<{ids[4]}>",))
    request = DecodeRequest(prompt, params, decode=lambda ids: "".join(f"<{i}>" for i in ids))
    got = start(model).submit(request).result(60)
    assert got.text == "".join(f"<{i}>" for i in ids[: ids.index(ids[4])])
    assert got.finish_reason == "stop"


def test_sampling_follows_seed_temperature_and_top_p(start) -> None:  # type: ignore[no-untyped-def]
    model = make_model(FAMILIES["llama"])
    prompt = prompts_of([20])[0]
    likeliest = greedy(model, prompt, 24)
    engine = start(model)

    def draw(**params):  # type: ignore[no-untyped-def]
        return engine.submit(DecodeRequest(prompt, SamplingParams(max_tokens=24, **params)))

    alone = draw(temperature=1.5, seed=3).result(60).token_ids
    crowd = [draw(temperature=1.5, seed=seed) for seed in range(6)]
    drawn = [future.result(60).token_ids for future in crowd]
    assert drawn[3] == alone
    assert len({tuple(ids) for ids in drawn}) == 6
    assert draw(temperature=1.5, top_p=0.0).result(60).token_ids == likeliest


def test_sampled_frequencies_follow_the_model(start) -> None:  # type: ignore[no-untyped-def]
    model = make_model(FAMILIES["llama"])
    with torch.inference_mode():
        probs = (model(torch.tensor([[1, 2, 3]])).logits[0, -1] / 2.0).softmax(-1)
    kept = probs.sort(descending=True)
    size = int((kept.values.cumsum(0) < 0.5).sum()) + 1
    engine = start(model)
    futures = [
        engine.submit(
            DecodeRequest(
                [1, 2, 3], SamplingParams(max_tokens=1, temperature=2.0, top_p=0.5, seed=seed)
            )
        )
        for seed in range(400)
    ]
    drawn = [future.result(60).token_ids[0] for future in futures]
    assert set(drawn) <= set(kept.indices[:size].tolist())
    share = drawn.count(int(kept.indices[0])) / 400
    expected = float(kept.values[0] / kept.values[:size].sum())
    assert abs(share - expected) < 4 * (expected * (1 - expected) / 400) ** 0.5


def test_impossible_requests_fail_alone(start) -> None:  # type: ignore[no-untyped-def]
    model = make_model(FAMILIES["llama"])
    expected = greedy(model, [1, 2, 3], 4)
    engine = start(model)
    good = engine.submit(DecodeRequest([1, 2, 3], SamplingParams(max_tokens=4)))
    with pytest.raises(InvalidRequest, match="together 401, but the model has 400") as caught:
        engine.submit(DecodeRequest([1] * 391, SamplingParams(max_tokens=10)))
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(InvalidRequest, match="outside the vocabulary of 99"):
        engine.submit(DecodeRequest([99], SamplingParams(max_tokens=1)))
    with pytest.raises(InvalidRequest, match="no tokens"):
        engine.submit(DecodeRequest([], SamplingParams(max_tokens=1)))
    assert good.result(60).token_ids == expected


def test_a_failing_step_costs_only_the_running_requests(start, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    import tuneloop.serving.engine as module

    model = make_model(FAMILIES["llama"])
    engine = start(model, max_batch_size=1)
    original, failures = module.forward, [True]

    def failing(model, groups):  # type: ignore[no-untyped-def]
        if failures and failures.pop():
            raise RuntimeError("can't allocate memory")
        return original(model, groups)

    monkeypatch.setattr(module, "forward", failing)
    first, second = (
        engine.submit(DecodeRequest([1, 2], SamplingParams(max_tokens=3))) for _ in "ab"
    )
    with pytest.raises(RuntimeError, match="allocate"):
        first.result(60)
    assert len(second.result(60).token_ids) == 3


@pytest.mark.parametrize("temperature", [1e-40, 5e-324, 1e-6])
def test_the_smallest_temperatures_are_greedy(start, temperature: float) -> None:  # type: ignore[no-untyped-def]
    model = make_model(FAMILIES["llama"])
    params = SamplingParams(max_tokens=8, temperature=temperature, seed=1)
    expected = greedy(model, [1, 2, 3], 8)
    got = start(model).submit(DecodeRequest([1, 2, 3], params)).result(60)
    assert got.token_ids == expected


def test_a_request_that_fails_costs_the_others_nothing(start, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Whether its token cannot be drawn, or its listener has gone."""
    import tuneloop.serving.engine as module

    def failing(logits, params, shaping, sampler):  # type: ignore[no-untyped-def]
        raise RuntimeError("cannot be drawn")

    def gone(token, score):  # type: ignore[no-untyped-def]
        if len(heard) == 3:
            raise RuntimeError("the loop is closed")
        heard.append(token)

    model = make_model(FAMILIES["llama"])
    prompts = prompts_of([20, 5, 9])
    expected = [greedy(model, prompt, 12) for prompt in prompts]
    monkeypatch.setattr(module, "sample", failing)
    engine, heard = start(model), []
    params = SamplingParams(max_tokens=12)
    good = [engine.submit(DecodeRequest(prompt, params)) for prompt in prompts]
    bad = engine.submit(DecodeRequest([1], SamplingParams(max_tokens=9, temperature=1.0)))
    silent = engine.submit(DecodeRequest([2], params, on_token=gone))
    assert [future.result(60).token_ids for future in good] == expected
    with pytest.raises(RuntimeError, match="drawn"):
        bad.result(60)
    with pytest.raises(RuntimeError, match="closed"):
        silent.result(60)
    assert engine.submit(DecodeRequest(prompts[0], params)).result(60).token_ids == expected[0]


def test_others_go_on_while_a_long_prefix_is_read(start, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    import tuneloop.serving.engine as module

    monkeypatch.setattr(module, "PREFILL_TOKENS_PER_STEP", 16)
    model = make_model(FAMILIES["llama"])
    shared = prompts_of([320])[0]
    expected = [greedy(model, [*shared, last], 3) for last in (1, 2)]
    heard: list[int] = []
    first_heard, order = threading.Event(), []

    def hear(token, score):  # type: ignore[no-untyped-def]
        heard.append(token)
        first_heard.set()

    engine = start(model)
    original = module.forward

    def noting(model, segments):  # type: ignore[no-untyped-def]
        order.append(any(isinstance(segment, module.DecodeBatch) for segment in segments))
        return original(model, segments)

    running = engine.submit(DecodeRequest([5, 6], SamplingParams(max_tokens=300), on_token=hear))
    assert first_heard.wait(60)
    monkeypatch.setattr(module, "forward", noting)
    futures = [
        engine.submit(DecodeRequest([*shared, i], SamplingParams(max_tokens=3))) for i in (1, 2)
    ]
    assert [future.result(60).token_ids for future in futures] == expected
    running.cancel()
    # The prefix takes 20 chunks; between any two of them the others have a step.
    alone = "".join("d" if decodes else "p" for decodes in order)
    assert "pp" not in alone.strip("p")


def test_shaping_by_hand() -> None:
    logits = torch.tensor([1.0, -1.0, 2.0, 0.0])
    assert shape(logits, Shaping(logit_bias={1: 5, 3: -2}), [], []).tolist() == [1, 4, 2, -2]
    penalties = Shaping(presence_penalty=0.5, frequency_penalty=0.25)
    assert shape(logits, penalties, [3], [2, 2, 0]).tolist() == [0.25, -1, 1, 0]
    assert shape(logits, Shaping(repetition_penalty=2.0), [1], [2]).tolist() == [1, -2, 1, 0]
    # A bias is part of what is penalized.
    both = Shaping(logit_bias={0: 3, 1: 3}, repetition_penalty=2.0)
    assert shape(logits, both, [1], [0]).tolist() == [2, 1, 2, 0]
    assert logits.tolist() == [1, -1, 2, 0]


def test_bounds_on_what_is_drawn() -> None:
    logits = torch.tensor([0.1, 0.3, 0.4, 0.2]).log()

    def drawn(top_p: float = 1.0, **shaping: float) -> set[int]:
        params = SamplingParams(temperature=1.0, top_p=top_p)
        sampler = torch.Generator().manual_seed(0)
        return {sample(logits, params, Shaping(**shaping), sampler) for _ in range(300)}

    assert drawn() == {0, 1, 2, 3}
    assert drawn(top_k=2) == {1, 2}
    assert drawn(min_p=0.45) == {1, 2, 3}
    assert drawn(top_p=0.6) == {1, 2}
    # The nucleus is taken of what the bound on ranks leaves: 4/7 and 3/7.
    assert drawn(top_p=0.5, top_k=2) == {2}
    assert drawn(min_p=1.0) == {2}
    # And of what the bound on probabilities leaves: 4/9, 3/9 and 2/9.
    assert drawn(top_p=0.75, min_p=0.45) == {1, 2}
    assert drawn(top_p=0.75) == {1, 2, 3}


def test_a_draw_belongs_to_the_token_not_to_its_rank() -> None:
    """Rounding may exchange the ranks of nearly equal tokens; the others are drawn as before."""
    logits = torch.randn(50, generator=torch.Generator().manual_seed(1))
    logits[1:40] = 1.0
    other = logits + 1e-6 * torch.randn(50, generator=torch.Generator().manual_seed(2))
    params = SamplingParams(temperature=1.0, top_p=0.95)
    for seed in range(50):
        pair = [
            sample(one, params, Shaping(), torch.Generator().manual_seed(seed))
            for one in (logits, other)
        ]
        assert pair[0] == pair[1]


def test_penalties_and_bias_change_greedy_answers(start) -> None:  # type: ignore[no-untyped-def]
    model = make_model(FAMILIES["llama"])
    expected = greedy(model, [1, 2, 3], 20)
    engine, params = start(model), SamplingParams(max_tokens=20)

    def write(**shaping):  # type: ignore[no-untyped-def]
        return engine.submit(DecodeRequest([1, 2, 3], params, shaping=Shaping(**shaping))).result(
            60
        )

    plain = write().token_ids
    assert plain == expected
    assert write(logit_bias={7: 100.0}).token_ids == [7] * 20
    banned = write(logit_bias={plain[0]: -100.0}).token_ids
    assert plain[0] not in banned
    assert (
        len(set(write(presence_penalty=2.0, frequency_penalty=2.0, logit_bias={7: 6.0}).token_ids))
        > 1
    )
    assert len(set(write(repetition_penalty=100.0).token_ids)) == 20


def test_stop_strings_cost_the_newest_text_alone(start) -> None:  # type: ignore[no-untyped-def]
    """The whole answer is decoded once, and the text is cut where it was."""
    model = make_model(FAMILIES["llama"])
    text = decode(greedy(model, [1, 2, 3], 60))
    longest: list[int] = []

    def counting(ids):  # type: ignore[no-untyped-def]
        longest.append(len(ids))
        return decode(ids)

    engine = Engine(model, counting, ())
    try:
        params = SamplingParams(max_tokens=60, stop=("never there", text[40:44]))
        got = engine.submit(DecodeRequest([1, 2, 3], params)).result(60)
    finally:
        engine.close()
    assert got.text == text[: text.index(text[40:44])]
    assert sum(size > 5 for size in longest) <= 2


def test_who_goes_away_waits_no_more(start, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    import tuneloop.serving.engine as module

    original = module.forward

    def slow(model, groups):  # type: ignore[no-untyped-def]
        time.sleep(0.01)
        return original(model, groups)

    engine = start(make_model(FAMILIES["llama"]), max_batch_size=1, max_waiting=2)
    monkeypatch.setattr(module, "forward", slow)
    request = DecodeRequest([1, 2], SamplingParams(max_tokens=390))
    running = engine.submit(request)
    deadline = time.monotonic() + 30
    while engine.activity().waiting and time.monotonic() < deadline:
        time.sleep(0.01)
    gone = [engine.submit(request), engine.submit(request)]
    assert all(future.cancel() for future in gone)
    while engine.activity().waiting and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.activity().waiting == 0
    assert not running.done()
    assert engine.submit(request).cancel()
    assert running.cancel()


def test_full_queue_cancel_and_close(start, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    import tuneloop.serving.engine as module

    gate, original = threading.Event(), module.forward

    def slow(model, groups):  # type: ignore[no-untyped-def]
        gate.wait(30)
        return original(model, groups)

    engine = start(make_model(FAMILIES["llama"]), max_batch_size=1, max_waiting=2)
    monkeypatch.setattr(module, "forward", slow)
    request = DecodeRequest([1, 2], SamplingParams(max_tokens=300))
    running = engine.submit(request)
    deadline = time.monotonic() + 30
    while not engine._prefilling and time.monotonic() < deadline:
        time.sleep(0.01)
    waiting = [engine.submit(request), engine.submit(request)]
    with pytest.raises(QueueFull):
        engine.submit(request)
    # Who goes away makes room, running or waiting.
    assert running.cancel()
    assert waiting[0].cancel()
    gate.set()
    assert len(waiting[1].result(60).token_ids) == 300

    gate.clear()
    last = engine.submit(request)
    closing = threading.Thread(target=engine.close)
    closing.start()
    gate.set()
    closing.join(30)
    with pytest.raises(TuneloopError, match="closed"):
        last.result(0)


def test_attention_that_cannot_be_reproduced_is_refused() -> None:
    small = {**SMALL, "head_dim": 16}
    with pytest.raises(ModelError, match="does not reproduce"):
        Engine(make_model(Gemma2Config(**small)), decode, ())


def test_load_serves_a_directory_and_tells_what_is_wrong(tiny_model: Path, tmp_path: Path) -> None:
    renderer = Renderer.load(tiny_model)
    engine = Engine.load(tiny_model, decode=renderer.decode, stop_ids=renderer.stop_ids)
    try:
        ids = renderer.text_ids("Return the number of")
        got = engine.submit(DecodeRequest(ids, SamplingParams(max_tokens=20))).result(60)
    finally:
        engine.close()
    reference = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    expected = greedy(reference, ids, 20)
    stop = next((i for i, token in enumerate(expected) if token in renderer.stop_ids), 20)
    assert got.token_ids == expected[:stop]
    assert got.text == renderer.decode(expected[:stop])
    with pytest.raises(ModelError, match="cannot load the model"):
        Engine.load(tmp_path, decode=decode, stop_ids=())
