"""Keys and values of running sequences, and attention over them.

Each of these is a segment of the packed tokens of a step (`models.attention`):

- `Prompt`: one sequence in prefill, in chunks.
- `DecodeBatch`: sequences in decode, one token each per step. They share a prefix and a capacity,
  and lie in one preallocated block, so that a step copies nothing but the new token.

`Prefix` is the shared prefix of many prompts, computed once. A decode batch reads it once per step
for all its sequences, in one matrix product.

Shapes: T tokens, H key-value heads, G query heads per key-value head, D head dimension, B
sequences, P prefix tokens, C capacity in tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from tuneloop.models.attention import Masks, Rule, attend_causally

Layers = list[tuple[Tensor, Tensor]]
Owner = TypeVar("Owner")


@dataclass(frozen=True, eq=False)
class Prefix:
    """Keys and values of a shared prefix; `layers` holds pairs of shape (H, P, D)."""

    token_ids: tuple[int, ...]
    layers: Layers
    adapter: str = ""

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(eq=False)
class Prompt:
    """A sequence in prefill.

    Args:
        suffix: The token ids behind the prefix.
        keep_all: Score the successor of every token, not only of the last.
        adapter: Name of the adapter of these tokens; empty: the base weights alone.
        start: Tokens of the suffix that earlier chunks have prefilled.
        stop: Where the current chunk ends.
        layers: Pairs of shape (H, len(suffix), D).
    """

    prefix: Prefix | None
    suffix: list[int]
    keep_all: bool = False
    adapter: str = ""
    start: int = 0
    stop: int = 0
    layers: Layers = field(default_factory=list)
    _masks: Masks = field(default_factory=dict)

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def token_ids(self) -> list[int]:
        return self.suffix[self.start : self.stop]

    @property
    def positions(self) -> list[int]:
        offset = len(self.prefix) if self.prefix else 0
        return list(range(offset + self.start, offset + self.stop))

    @property
    def kept(self) -> Sequence[int]:
        """Which of the chunk's tokens the model shall score successors for."""
        if self.keep_all:
            return range(len(self))
        return [len(self) - 1] if self.stop == len(self.suffix) else []

    @property
    def done(self) -> bool:
        return self.start == len(self.suffix)

    def next_chunk(self, num_tokens: int) -> Prompt:
        """Set the current chunk to the next `num_tokens`, or to what is left, and return itself."""
        self.stop = min(len(self.suffix), self.start + num_tokens)
        return self

    def advance(self) -> None:
        """Note that the current chunk is prefilled."""
        self.start = self.stop
        self._masks.clear()

    def freeze(self) -> Prefix:
        """Return everything prefilled so far as a prefix for others."""
        ids, layers = tuple(self.suffix), self.layers
        if self.prefix is not None:
            ids = self.prefix.token_ids + ids
            layers = [
                (torch.cat([pk, k], 1), torch.cat([pv, v], 1))
                for (pk, pv), (k, v) in zip(self.prefix.layers, layers, strict=True)
            ]
        return Prefix(ids, layers, self.adapter)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        """Return attention of the current chunk; query (H*G, T, D) → (T, H*G, D)."""
        if layer == len(self.layers):
            size = len(self.suffix)
            self.layers.append(
                (key.new_empty(key.shape[0], size, key.shape[2]),
                 value.new_empty(value.shape[0], size, value.shape[2]))
            )  # fmt: skip
        keys, values = self.layers[layer]
        keys[:, self.start : self.stop] = key
        values[:, self.start : self.stop] = value
        keys, values = keys[:, : self.stop], values[:, : self.stop]
        if self.prefix is not None:
            keys = torch.cat([self.prefix.layers[layer][0], keys], 1)
            values = torch.cat([self.prefix.layers[layer][1], values], 1)
        return attend_causally(query, keys, values, rule, self._masks)


class DecodeBatch(Generic[Owner]):
    """Sequences in decode, with the same prefix, adapter and capacity.

    Args:
        capacity: Tokens behind the prefix that each slot has room for.
        adapter: Name of the adapter of these tokens; empty: the base weights alone.
    """

    def __init__(self, prefix: Prefix | None, capacity: int, adapter: str = "") -> None:
        self.prefix = prefix
        self.capacity = capacity
        self.adapter = adapter
        self.owners: list[Owner] = []
        self.lengths: list[int] = []
        self.token_ids: list[int] = []
        self.layers: Layers = []
        # Both hold for one step.
        self._index: tuple[Tensor, slice, Tensor] | None = None
        self._biases: dict[int | None, Tensor] = {}

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def positions(self) -> list[int]:
        offset = len(self.prefix) if self.prefix else 0
        return [offset + length for length in self.lengths]

    @property
    def kept(self) -> Sequence[int]:
        return range(len(self.lengths))

    def add(self, owner: Owner, layers: Layers, length: int, next_id: int) -> None:
        """Put a sequence into the next slot.

        Args:
            owner: What the caller identifies the sequence by.
            layers: Its keys and values behind the prefix, pairs of shape (H, >= length, D).
            next_id: The token that was chosen and is not in the cache yet.
        """
        slot = len(self.lengths)
        if not self.layers or slot == self.layers[0][0].shape[0]:
            self._grow(layers, max(4, 2 * slot))
        for mine, theirs in zip(self.layers, layers, strict=True):
            for block, tensor in zip(mine, theirs, strict=True):
                block[slot, :, :length] = tensor[:, :length]
        self.owners.append(owner)
        self.lengths.append(length)
        self.token_ids.append(next_id)
        self._changed()

    def remove(self, slot: int) -> None:
        """Drop a sequence; the last one moves into its slot."""
        last = len(self.lengths) - 1
        if slot != last:
            length = self.lengths[last]
            for blocks in self.layers:
                for block in blocks:
                    block[slot, :, :length] = block[last, :, :length]
        columns: list[list[Any]] = [self.owners, self.lengths, self.token_ids]
        for column in columns:
            column[slot] = column[last]
            column.pop()
        self._changed()

    def slot_layers(self, slot: int) -> Layers:
        """Return keys and values of one sequence, to move it elsewhere."""
        return [(keys[slot], values[slot]) for keys, values in self.layers]

    def advance(self, next_ids: Sequence[int]) -> None:
        """Note that every sequence's token is cached and the next one chosen."""
        self.lengths = [length + 1 for length in self.lengths]
        self.token_ids = list(next_ids)
        self._changed()

    def rewind(self, slot: int, num_tokens: int) -> None:
        """Forget the newest tokens of a sequence that are cached."""
        self.lengths[slot] -= num_tokens
        self._changed()

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        """Return attention of one new token per sequence; query (H*G, B, D) → (B, H*G, D)."""
        if rule.softcap is not None:
            raise NotImplementedError("attention with `softcap`")
        num_rows, num_heads = len(self.lengths), key.shape[0]
        keys, values = (block[:num_rows] for block in self.layers[layer])
        if self._index is None:
            self._index = (
                torch.arange(num_rows, device=key.device),
                slice(None),
                torch.tensor(self.lengths, device=key.device),
            )
        keys[self._index] = key.transpose(0, 1)
        values[self._index] = value.transpose(0, 1)
        longest = max(self.lengths) + 1
        keys, values = keys[:, :, :longest], values[:, :, :longest]

        heads = query.unflatten(0, (num_heads, -1)) * rule.scaling  # (H, G, B, D)
        queries = heads.permute(2, 0, 1, 3)  # (B, H, G, D)
        scores = queries @ keys.transpose(-1, -2)
        if self.prefix is not None:
            flat = heads.flatten(1, 2)  # (H, G*B, D)
            shared = flat @ self.prefix.layers[layer][0].transpose(-1, -2)
            shared = shared.unflatten(1, (-1, num_rows)).permute(2, 0, 1, 3)
            scores = torch.cat([shared, scores], -1)
        scores += self._bias(longest, rule.window, scores)
        weights = torch.softmax(scores, -1, dtype=torch.float32).to(values.dtype)
        if self.prefix is None:
            return (weights @ values).flatten(1, 2)
        size = len(self.prefix)
        out = weights[..., size:] @ values
        flat = weights[..., :size].permute(1, 2, 0, 3).flatten(1, 2)
        shared = flat @ self.prefix.layers[layer][1]
        out += shared.unflatten(1, (-1, num_rows)).permute(2, 0, 1, 3)
        return out.flatten(1, 2)

    def _bias(self, longest: int, window: int | None, like: Tensor) -> Tensor:
        """Return 0 where a sequence sees a key, -inf where not; shape (B, 1, 1, P + longest)."""
        if window not in self._biases:
            offset = len(self.prefix) if self.prefix else 0
            keys = torch.arange(offset + longest, device=like.device)
            queries = torch.tensor(self.positions, device=like.device)[:, None]
            seen = keys <= queries
            if window is not None:
                seen &= keys > queries - window
            bias = torch.zeros(seen.shape, dtype=like.dtype, device=like.device)
            self._biases[window] = bias.masked_fill_(~seen, float("-inf"))[:, None, None]
        return self._biases[window]

    def _changed(self) -> None:
        self._index = None
        self._biases.clear()

    def _grow(self, layers: Layers, num_slots: int) -> None:
        grown: Layers = []
        for index, pair in enumerate(layers):
            blocks = []
            for which, tensor in enumerate(pair):
                # Zeros: a masked weight of 0 times a stray NaN would still be NaN.
                block = tensor.new_zeros(num_slots, tensor.shape[0], self.capacity, tensor.shape[2])
                if self.layers:
                    old = self.layers[index][which]
                    block[: old.shape[0]] = old
                blocks.append(block)
            grown.append((blocks[0], blocks[1]))
        self.layers = grown


CachedSegment = Prompt | DecodeBatch[Any]
