"""Rows as any model takes them: one sequence to a row, padded to the longest, own attention.

The plain way for models whose layers do not keep packed rows apart. Slower, as padding is computed
and a shared prefix is computed for every row. Where even the length of its neighbours changes a
row (positions that are scaled by the longest of a batch), each row is computed alone.

Shape legend: B sequences, T tokens of the longest, N target tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tuneloop.models.attention import keeps_logits
from tuneloop.training.rows import Rows


@dataclass(frozen=True)
class PaddedBatch:
    """Documents one below the other, padded at the end, where causal layers do not see it.

    Args:
        input_ids: Shape (B, T).
        attention_mask: 1 where a token is a document's. Shape (B, T).
        predict_in: Sequences of the positions whose next token is a target. Shape (N,).
        pick: Which of `keep` those positions are. Shape (N,).
        keep: Positions whose next token is a target in any sequence, at least one.
        targets: The tokens behind them. Shape (N,).
        rows: Row numbers, in order.
        alone: Each sequence has a forward pass of its own, without padding.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    predict_in: torch.Tensor
    pick: torch.Tensor
    keep: torch.Tensor
    targets: torch.Tensor
    rows: tuple[int, ...]
    alone: bool = False

    @property
    def num_padding(self) -> int:
        """Computed tokens that belong to no row."""
        if not self.rows:
            return self.input_ids.numel()
        return 0 if self.alone else int((self.attention_mask == 0).sum())

    def logits(self, model: torch.nn.Module) -> torch.Tensor:
        """Return the logits at target positions; one row of them where there is no target.

        Shape (N, V).
        """
        if self.alone and len(self.input_ids) > 1:
            places = self.predict_in.unique().tolist() or [0]
            return torch.cat([self._only(place).logits(model) for place in places])
        chosen = keeps_logits(model)
        options = {"logits_to_keep": self.keep} if chosen else {}
        at = self.pick if chosen else self.keep[self.pick]
        logits: torch.Tensor = model(
            input_ids=self.input_ids,
            attention_mask=self.attention_mask,
            use_cache=False,
            **options,
        ).logits
        return logits[self.predict_in, at] if self.targets.numel() else logits[0, :1]

    def _only(self, place: int) -> PaddedBatch:
        """Return one of the sequences without its padding."""
        size = int(self.attention_mask[place].sum())
        mine = self.predict_in == place
        return PaddedBatch(
            self.input_ids[place : place + 1, :size],
            self.attention_mask[place : place + 1, :size],
            self.predict_in[mine] - place,
            self.pick[mine],
            self.keep[self.keep < size],
            self.targets[mine],
            self.rows,
        )


def pad_rows(
    rows: Rows,
    indices: Sequence[int],
    device: torch.device | str = "cpu",
    alone: bool = False,
) -> PaddedBatch:
    """Return the documents of the given rows as padded sequences.

    An empty list gives a single token without target, as `pack_rows` does.

    Args:
        alone: Each sequence gets a forward pass of its own.
    """
    documents = [
        part
        for index in indices
        for part in zip(*(_cut(whole, rows, index) for whole in rows.row(index)), strict=True)
    ]
    width = max((len(ids) for ids, _ in documents), default=1)
    ids = np.zeros((max(1, len(documents)), width), np.int64)
    seen = np.zeros_like(ids)
    learned = np.zeros(ids.shape, bool)
    for place, (document, mask) in enumerate(documents):
        ids[place, : len(document)] = document
        seen[place, : len(document)] = 1
        learned[place, : len(document)] = mask
    if not documents:
        seen[:] = 1
    # The first token of a document has nothing before it to be predicted from.
    learned[:, 0] = False
    sequence, at = np.nonzero(learned)
    keep, pick = np.unique(at - 1, return_inverse=True)
    keep = keep if len(keep) else np.zeros(1, np.int64)
    input_ids, seen_by, predict_in, picked, kept, targets = (
        torch.from_numpy(array).to(device)
        for array in (ids, seen, sequence, pick, keep, ids[sequence, at])
    )
    taken = tuple(int(index) for index in indices)
    return PaddedBatch(input_ids, seen_by, predict_in, picked, kept, targets, taken, alone)


def _cut(whole: np.ndarray, rows: Rows, index: int) -> list[np.ndarray]:
    return np.split(whole, np.cumsum(rows.document_lengths(index))[:-1])
