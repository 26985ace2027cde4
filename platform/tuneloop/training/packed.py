"""Rows without padding: one packed sequence per micro-batch, no row attending to another one.

A model has to be proved to keep packed rows apart (`proof.py`); the others get padded rows.

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

from tuneloop.compat.torch import RandomOperations
from tuneloop.models.attention import Documents
from tuneloop.training.rows import Rows, make_rows


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

    @property
    def num_padding(self) -> int:
        """Computed tokens that belong to no row."""
        return 0 if self.rows else self.input_ids.numel()

    def logits(self, model: torch.nn.Module) -> torch.Tensor:
        """Return the logits at target positions; one row of them where there is no target.

        Shape (N, V).
        """
        empty = self.predict_at.numel() == 0
        logits: torch.Tensor = model(
            input_ids=self.input_ids,
            position_ids=self.position_ids,
            segments=[self.documents],
            logits_to_keep=self.predict_at.new_zeros(1) if empty else self.predict_at,
            use_cache=False,
        ).logits[0]
        return logits


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
        batch.logits(model)
    return operations.seen


def forget_draws() -> None:
    """Let go of the model that `can_share` was asked about last."""
    _draws_numbers.cache_clear()
