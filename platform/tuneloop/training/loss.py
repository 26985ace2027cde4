"""The loss of a micro-batch, whichever way its rows are laid out."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Protocol

import torch
from torch.nn import functional

from tuneloop.models.attention import attends_packed
from tuneloop.training.packed import PackedBatch, can_share, pack_rows
from tuneloop.training.padded import PaddedBatch, pad_rows
from tuneloop.training.rows import Rows

# Relative difference of a loss that rounding explains.
LOSS_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}


class Layout(Protocol):
    """Makes a micro-batch of rows."""

    def __call__(
        self, rows: Rows, indices: Sequence[int], device: torch.device | str = "cpu"
    ) -> PackedBatch | PaddedBatch:
        """Return the given rows as one micro-batch on a device."""


def row_layout(model: torch.nn.Module, rows_alone: bool = False) -> Layout:
    """Return how a model takes its rows: packed where that was proved, else padded.

    Args:
        rows_alone: Each row that is not packed gets a forward pass of its own.
    """
    if not attends_packed(model):
        return functools.partial(pad_rows, alone=rows_alone)
    share_prefix = can_share(model)
    return lambda rows, indices, device="cpu": pack_rows(rows, indices, device, share_prefix)


def loss_sum(model: torch.nn.Module, batch: PackedBatch | PaddedBatch) -> torch.Tensor:
    """Return the cross-entropy summed over the batch's targets, a scalar in float32."""
    return loss_and_hits(model, batch)[0]


def loss_and_hits(
    model: torch.nn.Module, batch: PackedBatch | PaddedBatch
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed cross-entropy and the number of targets that are the likeliest token.

    Logits are computed at target positions only.

    Returns:
        Two scalars: the loss in float32, and a count without gradient.
    """
    logits = batch.logits(model)
    if not batch.targets.numel():
        return logits.float().sum() * 0.0, torch.zeros((), device=logits.device)
    loss = functional.cross_entropy(logits.float(), batch.targets, reduction="sum")
    return loss, (logits.detach().argmax(-1) == batch.targets).sum()
