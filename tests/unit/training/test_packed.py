"""Packed rows are trained on exactly as if each stood alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
)

from tuneloop.models.attention import IMPLEMENTATION, Documents, Rule
from tuneloop.training.loss import loss_sum
from tuneloop.training.packed import can_share, pack_rows
from tuneloop.training.proof import packing_fault
from tuneloop.training.rows import MIN_SHARED_TOKENS, Rows, make_rows

_SMALL: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**_SMALL, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**_SMALL, num_key_value_heads=2),
    "qwen3": lambda: Qwen3Config(**_SMALL, num_key_value_heads=2, head_dim=16),
    # Windows shorter than the rows, so that local and global layers differ.
    "gemma3": lambda: Gemma3TextConfig(
        **_SMALL,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "gpt_neox": lambda: GPTNeoXConfig(**_SMALL),
}


@pytest.fixture(scope="module")
def rows() -> Rows:
    rng = np.random.default_rng(0)
    lengths = [17, 5, 23, 2, 11]
    ids = [rng.integers(5, 115, length).tolist() for length in lengths]
    masks = [[0] * (length // 2) + [1] * (length - length // 2) for length in lengths]
    return make_rows([f"r{i}" for i in range(5)], ids, masks)


def _model(family: str, attention: str) -> Any:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](), attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            # Enough variance that a leak between rows cannot hide.
            parameter.mul_(3.0) if parameter.ndim > 1 else None
    return model.eval()


@pytest.fixture(scope="module")
def instructed(rows: Rows) -> Rows:
    """The same rows behind an instruction, and one that is little more than that."""
    rng = np.random.default_rng(1)
    instruction = rng.integers(5, 115, 20).tolist()
    parts = [*(rows.row(index) for index in range(5)), (np.array([3, 4]), np.array([0, 1]))]
    return make_rows(
        [f"r{i}" for i in range(6)],
        [[*instruction, *ids.tolist()] for ids, _ in parts],
        [[0] * 20 + mask.tolist() for _, mask in parts],
    )


@pytest.mark.parametrize("prefix", ["own", "shared"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradient_equal_those_of_the_rows_one_by_one(
    family: str, prefix: str, rows: Rows, instructed: Rows
) -> None:
    model, plain = _model(family, IMPLEMENTATION), _model(family, "eager")
    rows = rows if prefix == "own" else instructed
    batch = pack_rows(rows, range(len(rows)), share_prefix=True)
    assert batch.documents.num_prefix == (0 if prefix == "own" else 20)
    packed = loss_sum(model, batch)
    packed.backward()
    alone = torch.zeros(())
    for index in range(len(rows)):
        ids, mask = (torch.from_numpy(part.astype(np.int64)) for part in rows.row(index))
        logits = plain(input_ids=ids[None]).logits[0, :-1]
        losses = functional.cross_entropy(logits, ids[1:], reduction="none")
        alone = alone + (losses * mask[1:]).sum()
    alone.backward()
    assert packed.item() == pytest.approx(alone.item(), rel=1e-5)
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert one.grad is not None
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-4)


def test_a_shared_prefix_is_computed_once(instructed: Rows) -> None:
    batch, whole = (pack_rows(instructed, range(6), share_prefix=share) for share in (True, False))
    assert batch.input_ids.shape[1] == whole.input_ids.shape[1] - 5 * 20
    own, all_lengths = batch.documents.lengths, whole.documents.lengths
    assert own == tuple(length - 20 for length in all_lengths)
    torch.testing.assert_close(batch.targets, whole.targets)
    for packed in (batch, whole):
        assert (
            packed.documents.bounds.tolist()[-1]
            == len(packed.documents)
            == packed.input_ids.shape[1]
        )
        # Every target has the token before it in its place.
        before = packed.input_ids[0, packed.predict_at]
        torch.testing.assert_close(before, whole.input_ids[0, whole.predict_at])
    assert pack_rows(instructed, [2], share_prefix=True).documents.num_prefix == 0


def test_what_is_learned_or_too_short_is_not_shared() -> None:
    def shared(*rows: tuple[list[int], list[int]]) -> int:
        ids, masks = zip(*rows, strict=True)
        return make_rows(["a", "b"], list(ids), list(masks)).num_prefix_tokens([0, 1])

    same, other = list(range(10, 40)), [*range(10, 30), 7, 8, 9]
    last = [0] * 29 + [1]
    assert shared((same, last), (other, [0] * 22 + [1])) == 20
    # A copy shares all but the token that the target is predicted from.
    assert shared((same, last), (same, last)) == 28
    # A target in the prefix of either row ends what is shared, that of the first token is none.
    learned = [1] + [0] * 23 + [1] * 6
    assert shared((same, learned), (same, last)) == shared((same, last), (same, learned)) == 23
    assert shared((same, [1] * 30), (same, [1] * 30)) == 0
    short = MIN_SHARED_TOKENS + 1
    assert shared((same[:short], last[-short:]), (same, last)) == 0


DRAWING: dict[str, tuple[Callable[[], Any], bool]] = {
    "no dropout": (lambda: LlamaConfig(**_SMALL), False),
    "attention": (lambda: LlamaConfig(**_SMALL, attention_dropout=0.1), True),
    "module": (lambda: GPTNeoXConfig(**_SMALL, hidden_dropout=0.1), True),
    "function": (lambda: OPTConfig(**_SMALL, ffn_dim=64, word_embed_proj_dim=32), True),
}
MIXTRAL: dict[str, Any] = {**_SMALL, "num_key_value_heads": 2, "router_jitter_noise": 0.1}


@pytest.mark.parametrize(
    ("make_config", "draws", "device"),
    [
        *((*DRAWING[kind], device) for kind in DRAWING for device in ("cpu", "meta")),
        (lambda: MixtralConfig(**MIXTRAL), True, "cpu"),
    ],
)
def test_rows_share_only_where_nothing_is_drawn_for_each(
    make_config: Callable[[], Any], draws: bool, device: str
) -> None:
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(make_config(), attn_implementation=IMPLEMENTATION)
    state = torch.get_rng_state()
    assert can_share(model.train()) == (not draws)
    assert can_share(model.eval())
    assert torch.equal(torch.get_rng_state(), state)


def test_documents_of_one_row_are_trained_on_as_rows_of_their_own(rows: Rows) -> None:
    ids, masks = (
        [np.concatenate([rows.row(i)[part] for i in row]).tolist() for row in ([3, 0, 1], [2, 4])]
        for part in (0, 1)
    )
    merged = make_rows(["p", "q"], ids, masks, [[2, 17, 5], [23, 11]])
    assert merged.num_target_tokens.sum() == rows.num_target_tokens.sum()
    model = _model("llama", IMPLEMENTATION)
    together = loss_sum(model, pack_rows(merged, [0, 1])).item()
    assert together == pytest.approx(loss_sum(model, pack_rows(rows, range(5))).item(), rel=1e-5)
    assert packing_fault(model, merged, torch.device("cpu")) == ""
    with pytest.raises(ValueError, match="row p: 24 ids but documents of 23"):
        make_rows(["p"], ids[:1], masks[:1], [[2, 17, 4]])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_does_not_see_the_row_before_it(family: str, rows: Rows) -> None:
    model = _model(family, IMPLEMENTATION)
    changed = make_rows(
        rows.row_ids,
        [[99] * 17, *(rows.row(i)[0].tolist() for i in range(1, 5))],
        [rows.row(i)[1].tolist() for i in range(5)],
    )
    both = [pack_rows(r, [0, 2]) for r in (rows, changed)]
    logits = [
        model(input_ids=b.input_ids, position_ids=b.position_ids, segments=[b.documents]).logits[
            0, 17:
        ]
        for b in both
    ]
    assert torch.equal(logits[0], logits[1])


def test_logits_are_computed_at_targets_only(rows: Rows) -> None:
    model = _model("llama", IMPLEMENTATION)
    shapes = []
    model.lm_head.register_forward_hook(lambda module, args, out: shapes.append(out.shape))
    batch = pack_rows(rows, range(5))
    loss_sum(model, batch)
    assert shapes == [(1, int(rows.num_target_tokens.sum()), 120)]


def test_an_empty_micro_batch_adds_nothing_and_still_has_gradients(rows: Rows) -> None:
    model = _model("llama", IMPLEMENTATION)
    loss = loss_sum(model, pack_rows(rows, []))
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_softcapped_scores_equal_the_formula() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(4, 7, 8), torch.randn(2, 7, 8), torch.randn(2, 7, 8)
    rule = Rule(scaling=0.5, window=None, softcap=5.0, dropout=0.0)
    out = Documents(0, (7,), torch.tensor([0, 7])).attend(0, query, key, value, rule)
    wide = [part.repeat_interleave(2, dim=0) for part in (key, value)]
    scores = 5.0 * torch.tanh(query @ wide[0].transpose(1, 2) * 0.5 / 5.0)
    scores = scores + torch.full((7, 7), float("-inf")).triu(1)
    torch.testing.assert_close(out, (scores.softmax(-1) @ wide[1]).transpose(0, 1))
