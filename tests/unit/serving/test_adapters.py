"""Adapters in the engine against PEFT's own model and the merged weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Qwen2MoeConfig,
)

from tuneloop.errors import ModelError
from tuneloop.records import SamplingParams
from tuneloop.serving.engine import Engine
from tuneloop.serving.requests import DecodeRequest, InvalidRequest

CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=300,
    ),
    "gpt_neox": GPTNeoXConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=300,
    ),
    # Its shared expert gets its tokens without the batch in front.
    "qwen2_moe": Qwen2MoeConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=300, num_experts=2,
        num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16,
    ),
    # Its layers are not `nn.Linear`: they keep the transposed weight.
    "gpt2": GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=300),
}  # fmt: skip
STOPLESS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}


def make_base(family: str, folder: Path) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family])
    for name, value in STOPLESS.items():
        setattr(model.config, name, value)
        setattr(model.generation_config, name, value)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    model.save_pretrained(folder / "base")
    return folder / "base"


def make_adapter(base: Path, folder: Path, seed: int, **options: Any) -> Path:
    """Save an adapter whose weights are random, so that it changes every answer."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(**(settings | options))
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder / f"adapter{seed}")
    return folder / f"adapter{seed}"


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", CONFIGS)
def test_each_request_is_answered_with_its_adapter(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Base and two adapters in one batch, the same prompts, a beginning shared by all."""
    from peft import PeftModel

    monkeypatch.setattr("tuneloop.serving.engine.num_threads", lambda: 1)
    monkeypatch.setattr("tuneloop.serving.model.num_threads", lambda: 1)
    base = make_base(family, tmp_path)
    folders = {name: make_adapter(base, tmp_path, seed) for name, seed in (("a", 1), ("b", 2))}
    generator = torch.Generator().manual_seed(3)
    shared = torch.randint(99, (70,), generator=generator).tolist()
    prompts = [shared + [token, 5, token] for token in (7, 30, 60)] + [[4], [8, 9] * 40]
    models = {"": AutoModelForCausalLM.from_pretrained(base).eval()}
    merged = {}
    for name, folder in folders.items():
        loaded = AutoModelForCausalLM.from_pretrained(base)
        models[name] = PeftModel.from_pretrained(loaded, folder).eval()
        again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
        merged[name] = again.merge_and_unload()
    asked = [(name, prompt) for prompt in prompts for name in models]
    expected = [greedy(models[name], prompt, 12) for name, prompt in asked]
    assert [greedy(merged["a"], p, 12) for p in prompts] == expected[1::3]
    assert len({tuple(ids) for ids in expected}) > 2 * len(prompts)

    engine = Engine.load(
        base, decode=lambda ids: "", stop_ids=(), max_batch_size=6, adapters=folders
    )
    try:
        params = SamplingParams(max_tokens=12)
        futures = [engine.submit(DecodeRequest(p, params, adapter=name)) for name, p in asked]
        assert [future.result(60).token_ids for future in futures] == expected
        assert {prefix.adapter for prefix in engine._prefixes} == {"", "a", "b"}
        with pytest.raises(InvalidRequest, match="no adapter `c`"):
            engine.submit(DecodeRequest([1], params, adapter="c"))
    finally:
        engine.close()


def with_setting(adapter: Path, copy: Path, name: str, value: object) -> Path:
    shutil.copytree(adapter, copy)
    file = copy / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    return copy


def test_an_adapter_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    base = make_base("llama", tmp_path)
    plain = make_adapter(base, tmp_path, 1)
    dora = make_adapter(base, tmp_path, 2, use_dora=True)
    head = make_adapter(base, tmp_path, 3, target_modules=["lm_head"])
    other = make_base("gpt_neox", tmp_path / "other")
    for model, folder, says in (
        (base, dora, "use_dora"),
        (base, head, "lm_head"),
        (other, plain, "no layer"),
        (base, with_setting(plain, tmp_path / "c", "bias", "all"), "bias: all"),
        (base, with_setting(plain, tmp_path / "d", "init_lora_weights", "pissa"), "pissa"),
        (base, with_setting(plain, tmp_path / "e", "use_something_new", True), "something_new"),
        (base, tmp_path, "adapter_config"),
    ):
        with pytest.raises(ModelError, match=says):
            Engine.load(model, decode=str, stop_ids=(), adapters={"a": folder})
    wide = AutoModelForCausalLM.from_config(LlamaConfig(**{**CONFIGS["llama"].to_dict(),
                                                           "intermediate_size": 64}))  # fmt: skip
    with pytest.raises(ModelError, match=r"mlp\.\w+ is .* and the adapter's part of it"):
        Engine(wide, str, (), adapters={"a": plain})
