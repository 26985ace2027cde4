"""Rows without padding: one packed sequence per micro-batch, no row attending to another one.

The shared prefix of a micro-batch's rows, such as an instruction, is computed once for all of them:
with causal attention its hidden states are the same in every row, and its gradient is the sum.

Shape legend: T tokens of the packed sequence, P of the shared prefix, N target tokens, V
vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from tuneloop.compat.torch import RandomOperations
from tuneloop.errors import ModelError, Problem
from tuneloop.models.attention import Documents, standard_attention
from tuneloop.training.rows import Rows, make_rows

# Relative difference of a loss that rounding explains.
LOSS_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
_CHECK_ROWS = 2


@dataclass(frozen=True)
class PackedBatch:
    """Rows end to end, behind their shared prefix.

    Args:
        input_ids: Shape (1, T).
        position_ids: Shape (1, T), positions in a document; its own tokens start at P.
        documents: Which tokens belong to which document, row after row.
        predict_at: Positions whose next token is a target. Shape (N,).
        targets: Those next tokens. Shape (N,).
        rows: Row numbers, in order.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    documents: Documents
    predict_at: torch.Tensor
    targets: torch.Tensor
    rows: tuple[int, ...]


def pack_rows(
    rows: Rows,
    indices: Sequence[int],
    device: torch.device | str = "cpu",
    share_prefix: bool = False,
) -> PackedBatch:
    """Return one packed sequence of the given rows.

    An empty list gives a single token without target: a worker that has no row left still runs
    the same collective operations as the others, and adds nothing to the loss.

    Args:
        share_prefix: Compute the rows' shared prefix once, see `can_share`.
    """
    if not indices:
        zero = torch.zeros((1, 1), dtype=torch.long, device=device)
        none = torch.zeros(0, dtype=torch.long, device=device)
        bounds = torch.tensor([0, 1], dtype=torch.int32, device=device)
        return PackedBatch(zero, zero, Documents(0, (1,), bounds), none, none, ())
    parts = [rows.row(index) for index in indices]
    lengths = np.array([n for index in indices for n in rows.document_lengths(index)])
    ids = np.concatenate([ids for ids, _ in parts]).astype(np.int64)
    mask = np.concatenate([mask for _, mask in parts]).astype(bool)
    positions = np.concatenate([np.arange(length) for length in lengths])
    # The first token of a document has nothing before it to be predicted from.
    mask[positions == 0] = False
    num_prefix = rows.num_prefix_tokens(indices) if share_prefix else 0
    # The first document stays whole: its prefix is that of all.
    kept = (positions >= num_prefix) | (np.arange(len(ids)) < num_prefix)
    ids, mask, positions = ids[kept], mask[kept], positions[kept]
    lengths = lengths - num_prefix
    bounds = torch.from_numpy(np.cumsum([num_prefix, *lengths], dtype=np.int32))
    at = np.flatnonzero(mask)
    return PackedBatch(
        input_ids=torch.from_numpy(ids).to(device)[None],
        position_ids=torch.from_numpy(positions).to(device)[None],
        documents=Documents(num_prefix, tuple(lengths.tolist()), bounds.to(device)),
        predict_at=torch.from_numpy(at - 1).to(device),
        targets=torch.from_numpy(ids[at]).to(device),
        rows=tuple(int(index) for index in indices),
    )


def can_share(model: torch.nn.Module) -> bool:
    """Return whether rows may share their prefix, without any effect on the result.

    With dropout, or noise on a router, every row draws random numbers of its own. On a GPU the
    attention of all documents is mostly one call of a kernel for documents that are whole.
    """
    return model.device.type != "cuda" and not (model.training and _draws_numbers(model))


@functools.lru_cache(maxsize=1)
def _draws_numbers(model: torch.nn.Module) -> bool:
    """Return whether a forward pass in training draws random numbers: one is run to see."""
    batch = pack_rows(make_rows(["a"], [[0, 0]], [[0, 1]]), [0], model.device)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), RandomOperations() as operations:
        loss_sum(model, batch)
    return operations.seen


def loss_sum(model: torch.nn.Module, batch: PackedBatch) -> torch.Tensor:
    """Return the cross-entropy summed over the batch's targets, a scalar in float32."""
    return loss_and_hits(model, batch)[0]


def loss_and_hits(model: torch.nn.Module, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
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
        segments=[batch.documents],
        logits_to_keep=keep,
        use_cache=False,
    ).logits[0]
    if empty:
        return logits.float().sum() * 0.0, torch.zeros((), device=logits.device)
    loss = functional.cross_entropy(logits.float(), batch.targets, reduction="sum")
    return loss, (logits.detach().argmax(-1) == batch.targets).sum()


def check_packing(model: torch.nn.Module, rows: Rows, device: torch.device) -> None:
    """Compare packed rows with the same rows one by one in the model's own attention.

    A model whose layers carry state from one row to the next, or that ignores positions, would
    be trained on mixed rows without any other sign of it.

    Raises:
        ModelError: The losses differ.
    """
    learned = np.flatnonzero(rows.num_target_tokens)
    shortest = np.argsort(rows.lengths[learned], kind="stable")[:_CHECK_ROWS]
    chosen = learned[shortest].tolist()
    can_share(model.train())  # remembered; ZeRO takes the layers apart afterwards
    model.eval()
    alone = 0.0
    with torch.no_grad():
        packed = float(loss_sum(model, pack_rows(rows, chosen, device, can_share(model))))
    with torch.no_grad(), standard_attention(model):
        for row in chosen:
            batch = pack_rows(rows, [row], device)
            documents = batch.input_ids.split(batch.documents.lengths, dim=1)
            logits = torch.cat(
                [model(input_ids=document, use_cache=False).logits[0] for document in documents]
            )[batch.predict_at]
            alone += float(functional.cross_entropy(logits.float(), batch.targets, reduction="sum"))
    tolerance = LOSS_TOLERANCE[model.dtype]
    if abs(packed - alone) > tolerance * max(1.0, abs(alone)):
        raise ModelError(
            Problem(
                "the model does not keep packed rows apart",
                where=f"rows {', '.join(rows.row_ids[row] for row in chosen)}",
                got=f"loss {packed:.5f} packed, {alone:.5f} one by one",
                remedy="use a model with plain attention layers (Llama, Qwen, Gemma, GPT-NeoX)",
            )
        )
