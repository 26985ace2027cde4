"""Rows without padding: one packed sequence per micro-batch, no row attending to another one.

What all rows of a micro-batch begin with, such as an instruction, is computed once for all of them:
with causal attention its hidden states are the same in every row, and its gradient is the sum.

Shape legend: T tokens of the packed sequence, S of the shared beginning, N target tokens, V
vocabulary, H heads, D head dimension.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import AttentionInterface

from tuneloop.errors import ModelError, Problem
from tuneloop.training.rows import Rows

ATTENTION = "tuneloop_packed"
# Relative difference of a loss that rounding explains.
LOSS_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
_CHECK_ROWS = 2


@dataclass(frozen=True)
class PackedBatch:
    """Rows end to end, behind what all of them begin with.

    Args:
        input_ids: Shape (1, T).
        position_ids: Shape (1, T), places in a document; its own tokens start at S.
        num_shared: S, tokens at the front that are the beginning of every document; 0 where a
            document is whole in its place.
        lengths: Tokens of each document that are its own, row after row; with S they add up to T.
        bounds: Where each document's own tokens begin, and T. Shape (documents + 1,), int32.
        predict_at: Positions whose next token is a target. Shape (N,).
        targets: Those next tokens. Shape (N,).
        rows: Row numbers, in order.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    num_shared: int
    lengths: tuple[int, ...]
    bounds: torch.Tensor
    predict_at: torch.Tensor
    targets: torch.Tensor
    rows: tuple[int, ...]


def pack(
    rows: Rows,
    indices: Sequence[int],
    device: torch.device | str = "cpu",
    share_beginning: bool = False,
) -> PackedBatch:
    """Return one packed sequence of the given rows.

    An empty list gives a single token without target: a worker that has no row left still runs
    the same collective operations as the others, and adds nothing to the loss.

    Args:
        share_beginning: Compute what the rows have in common once, see `can_share`.
    """
    if not indices:
        zero = torch.zeros((1, 1), dtype=torch.long, device=device)
        none = torch.zeros(0, dtype=torch.long, device=device)
        bounds = torch.tensor([0, 1], dtype=torch.int32, device=device)
        return PackedBatch(zero, zero, 0, (1,), bounds, none, none, ())
    parts = [rows.row(index) for index in indices]
    lengths = np.array([n for index in indices for n in rows.document_lengths(index)])
    ids = np.concatenate([ids for ids, _ in parts]).astype(np.int64)
    mask = np.concatenate([mask for _, mask in parts]).astype(bool)
    positions = np.concatenate([np.arange(length) for length in lengths])
    # The first token of a document has nothing before it to be predicted from.
    mask[positions == 0] = False
    num_shared = rows.num_shared(indices) if share_beginning else 0
    # The first document stays whole: its beginning is that of all.
    kept = (positions >= num_shared) | (np.arange(len(ids)) < num_shared)
    ids, mask, positions = ids[kept], mask[kept], positions[kept]
    lengths = lengths - num_shared
    bounds = np.cumsum([num_shared, *lengths], dtype=np.int32)
    at = np.flatnonzero(mask)
    return PackedBatch(
        input_ids=torch.from_numpy(ids).to(device)[None],
        position_ids=torch.from_numpy(positions).to(device)[None],
        num_shared=num_shared,
        lengths=tuple(lengths.tolist()),
        bounds=torch.from_numpy(bounds).to(device),
        predict_at=torch.from_numpy(at - 1).to(device),
        targets=torch.from_numpy(ids[at]).to(device),
        rows=tuple(int(index) for index in indices),
    )


def can_share(model: Any) -> bool:
    """Return whether rows may share what they all begin with, without any effect on the result.

    With dropout, or noise on a router, every row draws numbers of its own: layers keep the strength
    in an attribute named after it. On a GPU the attention of all documents is mostly one call of a
    kernel for documents that are whole.
    """
    if model.device.type == "cuda":
        return False
    return not model.training or not any(
        isinstance(value, float) and value > 0
        for module in model.modules()
        for name, value in vars(module).items()
        if "drop" in name or "jitter" in name or isinstance(module, torch.nn.Dropout)
    )


def loss_sum(model: Any, batch: PackedBatch) -> torch.Tensor:
    """Return the cross-entropy summed over the batch's targets, a scalar in float32."""
    return loss_and_hits(model, batch)[0]


def loss_and_hits(model: Any, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed cross-entropy and the number of targets that are the likeliest token.

    Logits are computed at target positions only. Shape (1, N, V).

    Returns:
        Two scalars: the loss in float32, and a count without gradient.
    """
    empty = batch.predict_at.numel() == 0
    keep = batch.predict_at.new_zeros(1) if empty else batch.predict_at
    logits = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        num_shared=batch.num_shared,
        document_lengths=batch.lengths,
        document_bounds=batch.bounds,
        logits_to_keep=keep,
        use_cache=False,
    ).logits[0]
    if empty:
        return logits.float().sum() * 0.0, torch.zeros((), device=logits.device)
    loss = functional.cross_entropy(logits.float(), batch.targets, reduction="sum")
    return loss, (logits.detach().argmax(-1) == batch.targets).sum()


def check_packing(model: Any, rows: Rows, device: torch.device) -> None:
    """Compare packed rows with the same rows one by one in the model's own attention.

    A model whose layers carry state from one row to the next, or that ignores positions, would
    be trained on mixed rows without any other sign of it.

    Raises:
        ModelError: The losses differ.
    """
    learned = np.flatnonzero(rows.num_target_tokens)
    shortest = np.argsort(rows.lengths[learned], kind="stable")[:_CHECK_ROWS]
    chosen = learned[shortest].tolist()
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    attention = plain.config._attn_implementation
    model.eval()
    with torch.no_grad():
        packed = float(loss_sum(model, pack(rows, chosen, device, can_share(model))))
        plain.set_attn_implementation("sdpa" if plain._supports_sdpa else "eager")
        alone = 0.0
        for row in chosen:
            batch = pack(rows, [row], device)
            documents = batch.input_ids.split(batch.lengths, dim=1)
            logits = torch.cat(
                [model(input_ids=document, use_cache=False).logits[0] for document in documents]
            )[batch.predict_at]
            alone += float(functional.cross_entropy(logits.float(), batch.targets, reduction="sum"))
    plain.set_attn_implementation(attention)
    tolerance = LOSS_TOLERANCE[plain.dtype]
    if abs(packed - alone) > tolerance * max(1.0, abs(alone)):
        raise ModelError(
            Problem(
                "the model does not keep packed rows apart",
                where=f"rows {', '.join(rows.row_ids[row] for row in chosen)}",
                got=f"loss {packed:.5f} packed, {alone:.5f} one by one",
                remedy="use a model with plain attention layers (Llama, Qwen, Gemma, GPT-NeoX)",
            )
        )


def packed_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attend causally within each document of a packed sequence.

    The work grows with the sum of squared lengths, where a block-diagonal mask costs the square of
    their sum. On a GPU in half precision it is one call of FlashAttention's kernel for documents of
    any length (Dao 2023, arXiv:2307.08691); elsewhere one call for each document.

    Args:
        query: Shape (1, H, T, D).
        key: Shape (1, H of keys, T, D).
        value: Shape (1, H of keys, T, D).
        attention_mask: Always None here; the boundaries are in `document_lengths`.
        options: What transformers passes: `num_shared`, `document_lengths`, `document_bounds`,
            `scaling`, `dropout`, `sliding_window`, `softcap`.

    Returns:
        Shape (1, T, H, D), and no attention weights.
    """
    if options.get("s_aux") is not None or options.get("position_bias") is not None:
        raise NotImplementedError("attention sinks and position biases are not supported")
    lengths, num_shared = options["document_lengths"], options.get("num_shared", 0)
    groups = query.shape[1] // key.shape[1]
    if not num_shared and _varlen_attn is not None and _has_kernel(query, options):
        return _attend_at_once(query, key, value, groups, options), None
    parts = [part.split((num_shared, *lengths), dim=2) for part in (query, key, value)]
    front, *own = zip(*parts, strict=True)
    pieces: list[torch.Tensor] = []
    for document in own:
        q, k, v = document
        if num_shared:
            q, k, v = (torch.cat(both, dim=2) for both in zip(front, document, strict=True))
        piece = _attend(q, k, v, groups, options)
        # What comes out for the beginning is needed once. To leave it out before would take a
        # mask, with which attention computes all pairs.
        pieces.append(piece[:, :, num_shared:] if pieces else piece)
    return torch.cat(pieces, dim=2).transpose(1, 2), None


def _has_kernel(query: torch.Tensor, options: dict[str, Any]) -> bool:
    """Return whether the kernel for documents of any length computes this attention."""
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[3] % 8 == 0
        and not options.get("dropout")
        and options.get("softcap") is None
        and options.get("document_bounds") is not None
    )


def _attend_at_once(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    groups: int,
    options: dict[str, Any],
) -> torch.Tensor:
    """Attend within all documents in one call. Shapes as of `packed_attention`."""
    assert _varlen_attn is not None
    if groups > 1:
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    bounds, longest = options["document_bounds"], max(options["document_lengths"])
    window = options.get("sliding_window")
    result = _varlen_attn(
        *(part[0].transpose(0, 1) for part in (query, key, value)),
        bounds,
        bounds,
        longest,
        longest,
        scale=options.get("scaling"),
        window_size=(-1 if window is None else window - 1, 0),
    )
    assert isinstance(result, torch.Tensor)
    return result[None]


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    groups: int,
    options: dict[str, Any],
) -> torch.Tensor:
    """Attend within one document. Shape of query and result (1, H, T, D)."""
    length, window, softcap = query.shape[2], options.get("sliding_window"), options.get("softcap")
    mask = None
    if (window is not None and window < length) or softcap is not None:
        steps = torch.arange(length, device=query.device)
        distance = steps[:, None] - steps[None, :]
        mask = (distance >= 0) & (distance < (window or length))
    if mask is None or softcap is None:
        return functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=options.get("dropout") or 0.0,
            scale=options.get("scaling"),
            is_causal=mask is None,
            enable_gqa=groups > 1,
        )
    key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    scores = query @ key.transpose(2, 3) * (options.get("scaling") or query.shape[3] ** -0.5)
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~mask, float("-inf"))
    weights = functional.dropout(scores.float().softmax(-1).to(value.dtype), options["dropout"])
    return weights @ value


AttentionInterface.register(ATTENTION, packed_attention)

# Older versions of PyTorch than 2.11 lack it, or its window.
_varlen_attn = None
with contextlib.suppress(ImportError):
    from torch.nn.attention import varlen

    if "window_size" in inspect.signature(varlen.varlen_attn).parameters:
        _varlen_attn = varlen.varlen_attn
