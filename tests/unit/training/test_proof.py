"""Packed rows are for models that are proved to keep them apart; the others are padded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    Phi3Config,
    Qwen2MoeConfig,
    XGLMConfig,
)

from tuneloop.models.attention import IMPLEMENTATION, attends_packed
from tuneloop.training.loss import loss_sum, row_layout
from tuneloop.training.packed import pack_rows
from tuneloop.training.padded import pad_rows
from tuneloop.training.proof import packing_fault, padding_fault
from tuneloop.training.rows import Rows, make_rows

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": 32,
}
# Each trains wrongly on packed rows, and each for another reason.
MIXING: dict[str, Callable[[], Any]] = {
    "attention in chunks": lambda: Llama4TextConfig(
        **SMALL, head_dim=8, attention_chunk_size=16, num_local_experts=2, intermediate_size_mlp=64
    ),
    "a window in the mask only": lambda: Qwen2MoeConfig(
        **SMALL,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        use_sliding_window=True,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "positions of its own": lambda: XGLMConfig(
        vocab_size=120, d_model=32, ffn_dim=64, num_layers=2, attention_heads=4, dropout=0.0
    ),
    "convolution": lambda: Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]),
    "biases in place of positions": lambda: BloomConfig(
        vocab_size=120, hidden_size=32, n_layer=2, n_head=4
    ),
    "positions scaled by the longest row": lambda: Phi3Config(
        **SMALL, original_max_position_embeddings=32, rope_parameters=LONGROPE
    ),
}


def _model(config: Any, attention: str) -> Any:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model.eval()


@pytest.fixture(scope="module")
def rows() -> Rows:
    """Rows behind one instruction, shorter and longer than windows and chunks."""
    rng = np.random.default_rng(0)
    instruction = rng.integers(5, 115, 18).tolist()
    lengths = [24, 70, 26, 40, 61]
    ids = [[*instruction, *rng.integers(5, 115, length - 18).tolist()] for length in lengths]
    masks = [[0] * 20 + [1] * (length - 20) for length in lengths]
    return make_rows([f"r{length}" for length in lengths], ids, masks)


def _alone(model: Any, rows: Rows) -> torch.Tensor:
    """The loss as plain transformers has it, one row after the other."""
    total = torch.zeros(())
    for index in range(len(rows)):
        ids, mask = (torch.from_numpy(part.astype(np.int64)) for part in rows.row(index))
        losses = functional.cross_entropy(
            model(input_ids=ids[None], use_cache=False).logits[0, :-1], ids[1:], reduction="none"
        )
        total = total + (losses * mask[1:]).sum()
    return total


@pytest.mark.parametrize("reason", MIXING)
def test_a_model_that_mixes_packed_rows_is_found_and_trained_on_padded_ones(
    reason: str, rows: Rows
) -> None:
    assert packing_fault(_model(MIXING[reason](), IMPLEMENTATION), rows, CPU)
    model, plain = (_model(MIXING[reason](), "eager") for _ in range(2))
    alone = bool(padding_fault(model, rows, CPU))
    assert alone == reason.startswith("positions scaled")
    assert not attends_packed(model)
    batch = row_layout(model, alone)(rows, range(len(rows)))
    assert batch.num_padding == (0 if alone else 5 * 70 - int(rows.lengths.sum()))
    together = loss_sum(model, batch)
    apart = _alone(plain, rows)
    together.backward()
    apart.backward()
    assert together.item() == pytest.approx(apart.item(), rel=1e-5)
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-4)


def test_a_window_that_only_the_longest_row_exceeds_is_found(rows: Rows) -> None:
    config = MIXING["a window in the mask only"]()
    config.sliding_window = 50
    assert "of 70 tokens" in packing_fault(_model(config, IMPLEMENTATION), rows, CPU)
    short = make_rows(
        ["a", "b"], [rows.row(i)[0].tolist() for i in (0, 2)], [[0, 1] * 12, [1] * 26]
    )
    assert packing_fault(_model(config, IMPLEMENTATION), short, CPU) == ""


def test_a_prefix_that_is_computed_once_is_part_of_the_proof(
    rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = []

    def packed(*args: Any) -> Any:
        batch = pack_rows(*args)
        shared.append(batch.documents.num_prefix)
        return batch

    monkeypatch.setattr("tuneloop.training.proof.pack_rows", packed)
    model = _model(LlamaConfig(**SMALL), IMPLEMENTATION)
    assert packing_fault(model, rows, CPU) == ""
    assert shared == [0, 35]


def test_padded_documents_of_one_row_do_not_see_each_other(rows: Rows) -> None:
    model = _model(LlamaConfig(**SMALL), "eager")
    parts = [rows.row(index) for index in (0, 3)]
    ids, masks = ([[part for row in parts for part in row[k].tolist()]] for k in (0, 1))
    joined = make_rows(["joined"], ids, masks, [[24, 40]])
    apart = loss_sum(model, pad_rows(rows, [0, 3])).item()
    assert loss_sum(model, pad_rows(joined, [0])).item() == pytest.approx(apart, rel=1e-6)
    empty = loss_sum(model, pad_rows(rows, []))
    empty.backward()
    assert empty.item() == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
