"""Our engine with OpenVINO's compiled graph for its steps, on a CPU.

Queue, prefixes, sampling, forms and scores are `Engine`'s; only the forward pass is another one,
with keys and values in blocks of tokens. Sequences that share a prefix share its blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tuneloop.errors import ModelError
from tuneloop.models.attention import FOREIGN_ERRORS
from tuneloop.serving.adapters import MaskedAdapters
from tuneloop.serving.engine import PREFIX_CACHE_TOKENS, Engine
from tuneloop.serving.kv_cache import CachedSegment, DecodeBatch, Prefix, Prompt
from tuneloop.serving.model import load_decoder, long_rule
from tuneloop.serving.openvino.graph import BLOCK, Graph, Run

_TRIED = (BLOCK + 1, 4, 1, 1, 1)  # tokens of each pass of the check
_TRIED_WINDOW = 8  # tokens; a window shorter than what is tried
_TOLERANCE = 1e-3


class _Block:
    """A block of keys and values; free again when no sequence and no prefix refers to it."""

    def __init__(self, free: list[int]) -> None:
        self.index, self._free = free.pop(), free

    def __del__(self) -> None:
        self._free.append(self.index)


@dataclass(eq=False)
class _Pool:
    """The blocks that nobody uses; the next one to take is the last."""

    free: list[int] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class _BlockPrefix(Prefix):
    """A shared prefix of whole blocks."""

    blocks: tuple[_Block, ...] = ()


@dataclass(eq=False)
class _BlockPrompt(Prompt):
    """A sequence, in prefill or in decode.

    Args:
        blocks: Those of the prefix first.
    """

    pool: _Pool = field(default_factory=_Pool)
    blocks: list[_Block] = field(default_factory=list)

    def run(self, token_ids: Sequence[int], position: int) -> Run:
        """Return the pass of some tokens, with room for their keys and values."""
        if not self.blocks and isinstance(self.prefix, _BlockPrefix):
            self.blocks += self.prefix.blocks
        while len(self.blocks) * BLOCK < position + len(token_ids):
            self.blocks.append(_Block(self.pool.free))
        return Run(token_ids, position, [block.index for block in self.blocks], self.adapter)

    def freeze(self) -> Prefix:
        """Return everything prefilled so far as a prefix for others."""
        ids = (*(self.prefix.token_ids if self.prefix else ()), *self.suffix)
        return _BlockPrefix(ids, [], self.adapter, tuple(self.blocks))


class OpenVinoEngine(Engine):
    """A `DecodeEngine` whose forward passes OpenVINO computes. Arguments as of `Engine`.

    Raises:
        ModelError: OpenVINO does not reproduce the model, or an adapter does not fit.
    """

    prefix_unit = BLOCK
    _graph: Graph
    _pool: _Pool

    @classmethod
    def load(cls, path: str | Path, **options: Any) -> OpenVinoEngine:
        """Load a Hugging Face directory and start an engine on all cores.

        Args:
            options: Keyword arguments of the constructor.

        Raises:
            ModelError: The model cannot be loaded or not be reproduced, or an adapter does not fit.
        """
        return cls(load_decoder(path, on_cpu=True), **options)

    def _prepare(self, adapters: Mapping[str, Path]) -> int:
        text = self.model.config.get_text_config()
        size = min(sum(_TRIED), getattr(text, "max_position_embeddings", None) or sum(_TRIED))
        ids = [(37 * index + 11) % text.vocab_size for index in range(size)]
        if reason := long_rule(text, {getattr(text, "sliding_window", None)}):
            raise self._refusal(reason)
        try:
            expected = self._own_logits(ids)
            self.adapters = masked = MaskedAdapters(self.model, adapters)
            self._graph = Graph(self.model, masked)
            reason = long_rule(text, {self._graph.window})
            error = float((self._try(ids) - expected).abs().max() / expected.abs().max())
            if not error < _TOLERANCE:
                reason = f"logits differ by {error:.1e} of the largest, {_TOLERANCE} is allowed"
        except FOREIGN_ERRORS as error:
            reason = f"{type(error).__name__}: {error}"
        if reason:
            raise self._refusal(reason)
        self.model.to("meta")  # the graph has the weights now
        return self._graph.bytes_per_token

    def _refusal(self, reason: str) -> ModelError:
        return ModelError.of(
            "OpenVINO does not reproduce this model",
            where=type(self.model).__name__,
            got=reason[:500],
            allowed="causal models whose attention goes through transformers' "
            "AttentionInterface and sees all tokens before or a window of them, such as Llama, "
            "Qwen, SmolLM, Gemma 3",
            remedy="set serving.engine=auto",
        )

    def _own_logits(self, ids: list[int]) -> Tensor:
        """Return the logits of the model's own attention, where a window is that of `_try`."""
        text = self.model.config.get_text_config()
        window = getattr(text, "sliding_window", None)
        if window is not None:
            text.sliding_window = _TRIED_WINDOW  # what masks are made of
        logits: Tensor = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        if window is not None:
            text.sliding_window = window
        return logits

    def _try(self, ids: list[int]) -> Tensor:
        """Return the logits behind a sequence, read in chunks and single tokens.

        A window is so short that these tokens see where it ends.
        """
        window = self._graph.window
        if window is not None:
            self._graph.window = _TRIED_WINDOW
        self._set_aside(1 + len(ids) // BLOCK)
        prompt = self._prompt(None, ids, keep_all=True)
        parts = []
        for size in _TRIED:
            parts.append(self._forward([prompt.next_chunk(size)]))
            prompt.advance()
        self._graph.window = window
        return torch.cat(parts)

    def _reserve(self) -> None:
        # One prefix may be longer than the cache, and the newest comes before the oldest goes.
        # Each sequence and prefix has a block that is not full.
        tokens = min(self._token_budget, self.max_batch_size * self.max_length)
        tokens += PREFIX_CACHE_TOKENS + 2 * self.max_length
        self._set_aside(tokens // BLOCK + 2 * self.max_batch_size + 1)

    def _set_aside(self, num_blocks: int) -> None:
        self._graph.reserve(num_blocks)
        self._num_blocks = num_blocks
        self._pool = _Pool()
        self._free_all()

    def _free_all(self) -> None:
        self._pool.free = list(reversed(range(self._num_blocks)))

    def _forget(self) -> None:
        super()._forget()
        # The error that is told refers to the sequences of its step, and so to their blocks.
        self._free_all()

    def _prompt(
        self, prefix: Prefix | None, ids: list[int], keep_all: bool = False, adapter: str = ""
    ) -> Prompt:
        return _BlockPrompt(prefix, ids, keep_all, adapter, pool=self._pool)

    def _forward(self, segments: Sequence[CachedSegment]) -> Tensor:
        runs: list[Run] = []
        kept: list[int] = []
        start = 0
        for segment in segments:
            kept += [start + index for index in segment.kept]
            start += len(segment)
            if isinstance(segment, _BlockPrompt):
                runs.append(segment.run(segment.token_ids, segment.positions[0]))
            elif isinstance(segment, DecodeBatch):
                rows = zip(segment.owners, segment.token_ids, segment.positions, strict=True)
                runs += [row.prompt.run([token], position) for row, token, position in rows]
        return self._graph.forward(runs, kept)
