"""OpenVINO under our engine: which models it takes, and what becomes of its blocks."""

from __future__ import annotations

import copy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen3Config,
)

from tuneloop.config import TuneloopConfig
from tuneloop.contest import engine_problems
from tuneloop.errors import ModelError
from tuneloop.records import SamplingParams
from tuneloop.serving.loaded import ServedModel
from tuneloop.serving.openvino.environment import suits
from tuneloop.serving.replica import ModelServer
from tuneloop.serving.requests import DecodeRequest

SMALL = {
    "vocab_size": 99, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 400, "pad_token_id": 0,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
SHARED = [(31 * i + 7) % 99 for i in range(100)]


def make_model(config: PretrainedConfig) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    with torch.no_grad():  # larger weights, so that attention decides the next token
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.fixture
def engine_class(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("openvino")
    import tuneloop.serving.openvino.engine as module

    monkeypatch.setattr("tuneloop.serving.openvino.graph.num_threads", lambda: 1)
    torch.set_num_threads(1)
    return module.OpenVinoEngine


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SMALL, num_key_value_heads=2),
        Qwen3Config(**SMALL, num_key_value_heads=1, head_dim=24),
        GPTNeoXConfig(**SMALL),
        GPT2Config(
            vocab_size=99, n_embd=64, n_layer=2, n_head=4, n_positions=400, bos_token_id=None,
            eos_token_id=None, pad_token_id=0,
        ),
        MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=16),
        Gemma3TextConfig(
            **SMALL, num_key_value_heads=1, head_dim=32, sliding_window=40,
            layer_types=["sliding_attention", "full_attention"],
        ),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
def test_prompts_with_a_shared_prefix_share_its_blocks(
    config: PretrainedConfig, engine_class: Any
) -> None:
    model = make_model(config)
    prompts = [SHARED + [(k * 5 + i) % 99 for i in range(3 + 9 * k)] for k in range(5)]
    prompts.append([5, 7])
    expected = [greedy(model, prompt, 30) for prompt in prompts]
    engine = engine_class(model, str, (), max_batch_size=4)
    all_blocks = len(engine._pool.free)
    try:
        params = SamplingParams(max_tokens=30)
        futures = [engine.submit(DecodeRequest(prompt, params)) for prompt in prompts]
        assert [future.result(60).token_ids for future in futures] == expected
        # Whole blocks alone: the last one of a sequence is written to.
        assert [len(prefix) for prefix in engine._prefixes] == [96]
        cancelled = engine.submit(DecodeRequest(prompts[0], SamplingParams(max_tokens=250)))
        cancelled.cancel()
        engine.submit(DecodeRequest(prompts[1], params)).result(60)
    finally:
        engine.close()
    del futures
    held = {block.index for prefix in engine._prefixes for block in prefix.blocks}
    assert len(held) == 3
    engine._prefixes.clear()
    assert sorted(engine._pool.free) == list(range(all_blocks))


def test_a_failing_step_frees_the_blocks(engine_class: Any) -> None:
    model = make_model(LlamaConfig(**SMALL, num_key_value_heads=2))
    expected = greedy(model, SHARED, 3)
    engine = engine_class(model, str, (), max_batch_size=1)
    original, failures = engine._graph.forward, [True]

    def failing(*arguments: Any) -> Any:
        if failures and failures.pop():
            raise RuntimeError("can't allocate memory")
        return original(*arguments)

    engine._graph.forward = failing
    first, second = (
        engine.submit(DecodeRequest(SHARED, SamplingParams(max_tokens=3))) for _ in "ab"
    )
    try:
        with pytest.raises(RuntimeError, match="allocate"):
            first.result(60)
        assert second.result(60).token_ids == expected
    finally:
        engine.close()
    engine._prefixes.clear()
    assert sorted(engine._pool.free) == list(range(engine._num_blocks))


SQUASHED = Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=16)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (SQUASHED, "softcap"),
        (MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=2), "No conversion rule"),
    ],
    ids=["squashed scores", "experts"],
)
def test_what_is_not_computed_is_refused_by_name(
    config: PretrainedConfig, told: str, engine_class: Any
) -> None:
    with pytest.raises(ModelError, match="does not reproduce") as caught:
        engine_class(make_model(config), str, ())
    (problem,) = caught.value.problems
    assert told in problem.got
    assert "serving.engine=auto" in problem.remedy


def test_a_window_that_is_not_computed_is_noticed(
    engine_class: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with an OpenVINO that sees all tokens before: the model's is longer than what is tried."""
    import tuneloop.serving.openvino.graph as module

    original = module.paged_attention
    monkeypatch.setattr(
        module, "paged_attention", lambda *arguments: original(*arguments[:4], None)
    )
    model = make_model(MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=300))
    with pytest.raises(ModelError, match="does not reproduce") as caught:
        engine_class(model, str, ())
    assert "logits differ" in caught.value.problems[0].got
    assert model.config.sliding_window == 300


def test_auto_takes_openvino_for_what_it_reproduces_and_torch_for_the_rest(
    tiny_model: Path, tmp_path: Path, engine_class: Any
) -> None:
    squashed = tmp_path / "squashed"
    shutil.copytree(tiny_model, squashed)
    for file in squashed.glob("*.safetensors"):
        file.unlink()
    config = copy.deepcopy(SQUASHED)
    config.vocab_size = AutoConfig.from_pretrained(tiny_model).vocab_size
    make_model(config).save_pretrained(squashed)
    for path, kind, is_openvino in (
        (tiny_model, "auto", True),
        (squashed, "auto", False),
        (tiny_model, "tuneloop", False),
    ):
        server = ModelServer({"m": ServedModel(path)}, 2, kind, waits=True)
        engine = server._loading.result()["m"].engine
        assert isinstance(engine, engine_class) is is_openvino
        engine.close()


@pytest.mark.usefixtures("engine_class")
def test_auto_takes_openvino_while_the_adapters_are_small_beside_the_base() -> None:
    assert suits(1000, 0)
    assert suits(1000, 500)
    assert not suits(1000, 501)
    assert not suits(2**60, 0)


def test_an_engine_that_is_not_installed_is_one_problem_with_its_remedy(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TuneloopConfig.model_validate(
        {
            "name": "x",
            "task": {"type": "generation"},
            "model": {"base": str(tiny_model)},
            "data": {"sources": [{"path": "rows.jsonl", "format": "question_answer"}]},
            "serving": {"engine": "openvino"},
        }
    )
    monkeypatch.setitem(sys.modules, "openvino", None)
    (problem,) = engine_problems(config)
    assert (problem.where, problem.got) == ("serving.engine", "it is not installed")
    assert "pip install 'tuneloop[openvino]'" in problem.remedy
    server = ModelServer({"m": ServedModel(tiny_model)}, 2, "openvino")
    with pytest.raises(ModelError, match="it is not installed"):
        server._loading.result(60)
