"""Where transformers moves what is not public, these fail first and say which part it was."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tuneloop.compat.transformers import standard_attention
from tuneloop.training.packed import ATTENTION


def test_a_model_has_its_standard_attention_for_a_while() -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=50, num_attention_heads=2, **shape)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION).eval()
    plain = AutoModelForCausalLM.from_config(config).eval()
    plain.load_state_dict(model.state_dict())
    ids = torch.arange(6)[None]
    with standard_attention(model):
        assert torch.equal(model(ids).logits, plain(ids).logits)
    # Ours is back: it wants to be told where documents end.
    with pytest.raises(KeyError):
        model(ids)
