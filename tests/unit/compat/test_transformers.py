"""What is used of transformers' insides is still there."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

from tuneloop.compat.transformers import apply_gate, attention_implementation

SMALL = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}


def test_the_attention_in_use_is_named() -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, num_attention_heads=2))
    model.set_attn_implementation("eager")
    assert attention_implementation(model) == "eager"
    model.set_attn_implementation("sdpa")
    assert attention_implementation(model) == "sdpa"


def test_a_gate_halves_what_comes_in() -> None:
    config = Qwen3MoeConfig(**SMALL, num_attention_heads=2, num_experts=2, moe_intermediate_size=8)
    model = AutoModelForCausalLM.from_config(config)
    experts = next(m for m in model.modules() if type(m).__name__.endswith("Experts"))
    inner = torch.randn(3, 16)
    gate, up = inner.chunk(2, dim=-1)
    torch.testing.assert_close(apply_gate(experts, inner), torch.nn.functional.silu(gate) * up)
    assert experts.has_gate
    assert not experts.is_transposed
