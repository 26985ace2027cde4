"""Which tensor gets which type: the rule of llama.cpp's files."""

from __future__ import annotations

import pytest

from tuneloop.models.export.llama_cpp.quantize import tensor_type


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("blk.0.attn_norm.weight", [576], ""),
        ("blk.0.ffn_gate_inp.weight", [512, 8], ""),
        ("token_embd.weight", [512, 49152], "Q4_K"),
        ("output.weight", [512, 49152], "Q6_K"),
        ("blk.5.attn_q.weight", [512, 512], "Q4_K"),
        ("blk.5.attn_qkv.weight", [512, 1536], "Q5_K"),
        # 32 layers: the first and last eighth, and every third between, from the sixth on.
        ("blk.3.ffn_down.weight", [512, 512], "Q6_K"),
        ("blk.4.ffn_down.weight", [512, 512], "Q4_K"),
        ("blk.6.attn_v.weight", [512, 512], "Q6_K"),
        ("blk.28.attn_v.weight", [512, 512], "Q6_K"),
        # 576 is no multiple of 256, 40 none of 32.
        ("blk.5.attn_q.weight", [576, 576], "Q5_0"),
        ("blk.3.attn_v.weight", [576, 192], "Q8_0"),
        ("blk.5.attn_q.weight", [40, 40], ""),
    ],
)
def test_types_of_q4_k_m(name: str, shape: list[int], expected: str) -> None:
    assert tensor_type(name, shape, "Q4_K_M", 32, is_tied=False) == expected


def test_a_tied_embedding_is_the_output_layer() -> None:
    assert tensor_type("token_embd.weight", [512, 49152], "Q4_K_M", 32, is_tied=True) == "Q6_K"
    assert tensor_type("token_embd.weight", [512, 49152], "Q8_0", 32, is_tied=True) == "Q8_0"
