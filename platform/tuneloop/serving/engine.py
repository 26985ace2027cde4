"""The decode engine: many requests share every step of the model.

One thread owns the model. Each step prefills a slice of the waiting prompts and decodes one token
for every running sequence, all packed into one forward pass. A sequence that ends leaves at once
and a waiting one takes its slot. Sampling happens here and nowhere else: what a request does not
say is not added, neither from `generation_config` nor from anywhere else.

    engine = Engine.load("path/of/model", decode=renderer.decode, stop_ids=renderer.stop_ids)
    result = engine.submit(DecodeRequest(prompt_ids, SamplingParams(max_tokens=64))).result()
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)

from tuneloop.errors import TuneloopError
from tuneloop.records import FinishReason
from tuneloop.serving.adapters import Adapters
from tuneloop.serving.constraint import TokenFilter
from tuneloop.serving.kv_cache import CachedSegment, DecodeBatch, Layers, Prefix, Prompt
from tuneloop.serving.linear import speed_up_linear
from tuneloop.serving.model import (
    AttentionMismatch,
    forward,
    load_decoder,
    num_threads,
    switch_attention,
)
from tuneloop.serving.ranking import AnswerSearch
from tuneloop.serving.requests import (
    Activity,
    DecodeRequest,
    DecodeResult,
    InvalidRequest,
    Limits,
    QueueFull,
    TokenScore,
)
from tuneloop.serving.sampling import argmax, sample, score, shape
from tuneloop.serving.text import StopFinder

log = logging.getLogger("tuneloop.serving")

DEFAULT_BATCH_SIZE = 64
PREFILL_TOKENS_PER_STEP = 512  # bounds how long running sequences wait, and the memory of scores
MIN_PREFIX_TOKENS = 32  # a shorter shared prefix is not worth its own matrix products
PREFIX_CACHE_TOKENS = 8192
MIN_CAPACITY = 128  # of a decode batch's slots; capacities are this times a power of two
MEMORY_SHARE = 0.25  # of the memory free after loading, for keys and values


@dataclass(eq=False)
class _Row:
    """A request on its way through the engine."""

    request: DecodeRequest
    future: Future[DecodeResult]
    submitted: float
    prompt: Prompt
    token_ids: list[int] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)
    prompt_scores: list[TokenScore] = field(default_factory=list)
    sampler: torch.Generator | None = None
    stop_finder: StopFinder | None = None
    token_filter: TokenFilter | None = None
    search: AnswerSearch | None = None

    @property
    def size(self) -> int:
        """Tokens this row may come to hold keys and values of."""
        return len(self.request.prompt_ids) + self.request.params.max_tokens


class Engine:
    """Continuous batching for one causal language model.

    Args:
        model: Any transformers causal language model on the `AttentionInterface`.
        decode: Ids to text without special tokens.
        stop_ids: Tokens that end a generation; they are not part of it.
        max_batch_size: Sequences that run together.
        max_waiting: Requests that may wait for a slot.
        adapters: Directories of LoRA adapters, by the name requests use.

    Raises:
        AttentionMismatch: The model cannot be reproduced, see `switch_attention`.
        ModelError: An adapter does not fit.

    Attributes:
        notice: What whoever asked for the model should know of how it is served; mostly empty.
    """

    notice = ""
    prefix_unit = 1  # tokens; shared prefixes have a multiple of it
    adapters: Adapters

    def __init__(
        self,
        model: PreTrainedModel,
        decode: Callable[[Sequence[int]], str],
        stop_ids: Sequence[int],
        *,
        max_batch_size: int = DEFAULT_BATCH_SIZE,
        max_waiting: int = 1024,
        adapters: Mapping[str, Path] = MappingProxyType({}),
    ) -> None:
        self.model = model.eval()
        self.decode = decode
        self.stop_ids = frozenset(stop_ids)
        self.max_batch_size = max_batch_size
        self.max_waiting = max_waiting
        text = model.config.get_text_config()
        self.vocab_size: int = text.vocab_size
        self._inbox: queue.SimpleQueue[_Row | None] = queue.SimpleQueue()
        self._waiting: deque[_Row] = deque()
        self._admitted: list[_Row] = []  # at most one, while a prefix is read for it
        self._prefilling: list[_Row] = []
        self._batches: list[DecodeBatch[_Row]] = []
        self._prefixes: list[Prefix] = []  # least recently used first
        self._recent: deque[DecodeRequest] = deque(maxlen=4 * max_batch_size)
        self._num_prompt_tokens = self._num_generated_tokens = 0
        self._closed = False
        with torch.inference_mode():
            bytes_per_token = self._prepare(adapters)
        # Tokens whose keys and values fit into memory, and the longest prompt plus answer.
        self._token_budget = int(MEMORY_SHARE * _free_bytes(model.device) / bytes_per_token)
        positions = getattr(text, "max_position_embeddings", None) or self._token_budget
        self._limits = Limits(
            self.vocab_size,
            min(positions, self._token_budget),
            self.adapters.names,
            is_memory_bound=self._token_budget <= positions,
        )
        self._reserve()
        self._thread = threading.Thread(target=self._run, name="tuneloop-engine", daemon=True)
        self._thread.start()

    @classmethod
    def load(cls, path: str | Path, **options: Any) -> Engine:
        """Load a Hugging Face directory and start an engine on all cores, or the GPU.

        A model whose attention cannot be reproduced gets a `PlainEngine`.

        Args:
            options: Keyword arguments of the constructor.

        Raises:
            ModelError: The model cannot be loaded, or an adapter does not fit.
        """
        try:
            return cls(load_decoder(path), **options)
        except AttentionMismatch as error:
            reason = error.problems[0].got
        engine = PlainEngine(load_decoder(path), **options)
        engine.notice = (
            "served by transformers' own generation, one request after the other, as the decode "
            f"engine does not reproduce this model: {reason}"
        )
        return engine

    def _prepare(self, adapters: Mapping[str, Path]) -> int:
        """Make the model ready, and return the bytes of keys and values of one token.

        Raises:
            AttentionMismatch: The engine does not compute what the model does.
            ModelError: An adapter does not fit.
        """
        # Only here: code that reads a layer's output as one block, such as Llama 4's rotation of
        # positions, fails on the transposed one, and then a PlainEngine serves the model as it is.
        if self.model.device.type == "cpu":
            speed_up_linear(self.model, num_rows=self.max_batch_size)
        bytes_per_token = switch_attention(self.model)
        self.adapters = Adapters(self.model, adapters)
        return bytes_per_token

    def _reserve(self) -> None:
        """Set aside what sequences need, before the first one comes."""

    def _prompt(
        self, prefix: Prefix | None, ids: list[int], keep_all: bool = False, adapter: str = ""
    ) -> Prompt:
        """Return a sequence to prefill; arguments as of `Prompt`."""
        return Prompt(prefix, ids, keep_all, adapter)

    @property
    def max_length(self) -> int:
        """Tokens of prompt and answer together."""
        return self._limits.max_length

    def submit(self, request: DecodeRequest) -> Future[DecodeResult]:
        """Queue a request and return its future; cancelling the future drops the request.

        Raises:
            InvalidRequest: The request can never be answered.
            QueueFull: `max_waiting` requests wait already.
        """
        self.check(request)
        self.refuse_dead()
        if self._inbox.qsize() + len(self._waiting) >= self.max_waiting:
            raise QueueFull(f"{self.max_waiting} requests wait already")
        ids, keep_all = list(request.prompt_ids), request.score_prompt
        prompt = self._prompt(None, ids, keep_all, request.adapter)
        row = _Row(request, Future(), time.monotonic(), prompt)
        if request.params.temperature > 0:
            row.sampler = torch.Generator().manual_seed(request.params.seed)
        if request.params.stop:
            row.stop_finder = StopFinder(request.decode or self.decode, request.params.stop)
        if request.constraint is not None:
            row.token_filter = request.constraint.start()
        if request.ranking is not None:
            row.search = AnswerSearch(request.ranking.tree, request.ranking.coverage)
        self._inbox.put(row)
        return row.future

    def close(self) -> None:
        """Stop the thread; requests that have not ended fail."""
        self._closed = True
        self._inbox.put(None)
        self._thread.join()
        self._collect()  # what came while the thread ended
        _fail(list(self._waiting), TuneloopError("the engine was closed"))

    def check(self, request: DecodeRequest) -> None:
        """Return if the request can be answered.

        Raises:
            InvalidRequest: It can never be.
        """
        self._limits.check(request)

    def refuse_dead(self) -> None:
        """Return if requests can still be answered.

        Raises:
            TuneloopError: The engine was closed.
        """
        if self._closed:
            raise TuneloopError("the engine is closed")

    def activity(self) -> Activity:
        """Return how much there is to do, and how much has been done."""
        running = len(self._prefilling) + sum(map(len, self._batches))
        waiting = self._inbox.qsize() + len(self._waiting)
        return Activity(running, waiting, self._num_prompt_tokens, self._num_generated_tokens)

    # The engine's thread.

    @torch.inference_mode()
    def _run(self) -> None:
        torch.set_num_threads(num_threads())  # holds for one thread only
        while not self._closed:
            try:
                self._collect()
                self._admit()
                self._step()
            except Exception as error:
                # Out of memory, mostly. Those that wait have done nothing wrong.
                log.exception("a step of the engine failed")
                _fail(self._running(), error)
                self._forget()
        self._collect()
        _fail([*self._running(), *self._waiting], TuneloopError("the engine was closed"))

    def _forget(self) -> None:
        """Drop all sequences and prefixes, but not the requests that wait."""
        self._admitted, self._prefilling = [], []
        self._batches, self._prefixes = [], []

    def _running(self) -> list[_Row]:
        return (
            self._admitted
            + self._prefilling
            + [row for batch in self._batches for row in batch.owners]
        )

    def _collect(self) -> None:
        """Move new requests to the waiting ones; with nothing to do, block until one comes."""
        idle = not (self._prefilling or self._batches or self._waiting or self._closed)
        while idle or not self._inbox.empty():
            row = self._inbox.get()
            idle = False
            if row is not None:
                self._waiting.append(row)
                self._recent.append(row.request)

    def _admit(self) -> None:
        """Start the prefill of waiting requests in order of arrival, as far as the budget goes."""
        running = self._running()
        num_rows, num_tokens = len(running), sum(row.size for row in running)
        while self._waiting and num_rows < self.max_batch_size:
            row = self._waiting[0]
            if num_rows and num_tokens + row.size > self._token_budget:
                return
            self._waiting.popleft()
            if row.future.cancelled():
                continue
            self._admitted.append(row)
            self._num_prompt_tokens += len(row.request.prompt_ids)
            num_rows, num_tokens = num_rows + 1, num_tokens + row.size
            # Scores of a prefix's own tokens are not kept, so such rows prefill everything.
            if not row.request.score_prompt:
                prefix = self._shared_prefix(row.request)
                row.prompt.prefix = prefix
                row.prompt.suffix = row.prompt.suffix[len(prefix) if prefix else 0 :]
            self._prefilling.append(self._admitted.pop())

    def _shared_prefix(self, request: DecodeRequest) -> Prefix | None:
        """Return keys and values of the prefix that the prompt shares with others, if any."""
        ids = tuple(request.prompt_ids)
        usable = [p for p in self._prefixes if p.adapter == request.adapter and len(p) < len(ids)]
        cached = [p for p in usable if p.token_ids == ids[: len(p)]]
        prefix = max(cached, key=len, default=None)
        start = len(prefix) if prefix else 0
        others = [r for r in self._recent if r is not request and r.adapter == request.adapter]
        stop = _shared_length(ids, [other.prompt_ids for other in others])
        stop -= stop % self.prefix_unit
        if stop >= start + MIN_PREFIX_TOKENS:
            prompt = self._prompt(prefix, list(ids[start:stop]), adapter=request.adapter)
            while not prompt.done:
                self._forward([prompt.next_chunk(PREFILL_TOKENS_PER_STEP)])
                prompt.advance()
                if not prompt.done:
                    self._step()  # the others go on while a long prefix is read
            prefix = prompt.freeze()
        if prefix is not None:
            self._prefixes = [p for p in self._prefixes if p is not prefix] + [prefix]
            while sum(map(len, self._prefixes)) > PREFIX_CACHE_TOKENS and len(self._prefixes) > 1:
                self._prefixes.pop(0)
        return prefix

    def _step(self) -> None:
        """Prefill a slice of the prompts and decode one token for every running sequence."""
        self._drop_cancelled()
        batches, prefilling = self._batches, self._next_chunks()
        if not batches and not prefilling:
            return
        logits = self._forward([*batches, *(row.prompt for row in prefilling)])
        decoding = [row for batch in batches for row in batch.owners]
        stop = len(decoding)
        logit_rows = list(range(stop))
        for row in prefilling:
            start, stop = stop, stop + len(row.prompt.kept)
            if row.request.score_prompt:
                targets = row.prompt.suffix[row.prompt.start + 1 : row.prompt.stop + 1]
                num_top = [row.request.num_top] * len(targets)
                scores = logits[start : start + len(targets)]
                row.prompt_scores += score(scores, targets, num_top)
            row.prompt.advance()
            if row.prompt.done:
                decoding.append(row)
                logit_rows.append(stop - 1)
        if not decoding:
            return
        chosen = dict(zip(decoding, self._choose(logits, logit_rows, decoding), strict=True))
        for batch in batches:
            # A failed row's slot is freed below; until then any token will do.
            batch.advance([chosen[row] or 0 for row in batch.owners])
            for slot, row in enumerate(batch.owners):
                if row.search is not None and row.search.num_to_drop:
                    batch.rewind(slot, row.search.num_to_drop)
            # From the end: the row that moves into a freed slot has been dealt with.
            for slot in reversed(range(len(batch))):
                if not self._accept(batch.owners[slot], chosen[batch.owners[slot]]):
                    batch.remove(slot)
        for batch in list(batches):
            for slot in reversed(range(len(batch))):
                if batch.lengths[slot] == batch.capacity:
                    row, length = batch.owners[slot], batch.lengths[slot]
                    self._assign_slot(row, batch.slot_layers(slot), length, row.token_ids[-1])
                    batch.remove(slot)
        for row in [row for row in self._prefilling if row.prompt.done]:
            self._prefilling.remove(row)
            if self._accept(row, chosen[row]):
                self._assign_slot(row, row.prompt.layers, len(row.prompt.suffix), row.token_ids[-1])
            row.prompt.layers = []
        self._batches = [batch for batch in self._batches if len(batch)]

    def _forward(self, segments: Sequence[CachedSegment]) -> Tensor:
        self.adapters.select(segments)
        return forward(self.model, segments)

    def _drop_cancelled(self) -> None:
        # Those that wait as well, so that no place in the queue is kept for nobody.
        self._waiting = deque(row for row in self._waiting if not row.future.cancelled())
        self._prefilling = [row for row in self._prefilling if not row.future.cancelled()]
        for batch in self._batches:
            for slot in reversed(range(len(batch))):
                if batch.owners[slot].future.cancelled():
                    batch.remove(slot)
        self._batches = [batch for batch in self._batches if len(batch)]

    def _next_chunks(self) -> list[_Row]:
        """Return the rows to prefill in this step, each set to its next chunk."""
        budget, rows = PREFILL_TOKENS_PER_STEP, []
        for row in self._prefilling:
            if budget > 0:
                budget -= len(row.prompt.next_chunk(budget))
                rows.append(row)
        return rows

    def _assign_slot(self, row: _Row, layers: Layers, length: int, next_id: int) -> None:
        """Move a row into a decode batch with room for more tokens than it has now."""
        capacity = MIN_CAPACITY
        while capacity <= length:
            capacity *= 2
        prefix, adapter = row.prompt.prefix, row.request.adapter
        for batch in self._batches:
            if (batch.prefix, batch.capacity, batch.adapter) == (prefix, capacity, adapter):
                break
        else:
            batch = DecodeBatch(prefix, capacity, adapter)
            self._batches.append(batch)
        batch.add(row, layers, length, next_id)

    def _choose(
        self, logits: Tensor, logit_rows: Sequence[int], rows: Sequence[_Row]
    ) -> list[int | None]:
        """Return each row's next token, and note its score where asked for.

        A row whose token cannot be chosen fails, has None, and costs the others nothing.

        Args:
            logits: Those of these rows, and of prompts that are scored.
            logit_rows: Which of the logits are each row's.
        """
        ids = argmax(logits).tolist()
        chosen: list[int | None] = [ids[logit_row] for logit_row in logit_rows]
        for index, row in enumerate(rows):
            likeliest = chosen[index]
            is_plain = row.sampler is None and not row.request.shaping.changes_logits
            if is_plain and row.token_filter is None and row.search is None:
                continue
            try:
                chosen[index] = self._choose_one(
                    logits[logit_rows[index]], row, likeliest if is_plain else None
                )
            except Exception as error:
                if not isinstance(error, InvalidRequest):
                    log.exception("no token can be chosen for a request")
                _fail([row], error)
                chosen[index] = None
        scored = [index for index, row in enumerate(rows) if row.request.params.logprobs]
        if scored:
            targets = [chosen[index] or 0 for index in scored]
            num_top = [rows[index].request.num_top for index in scored]
            scores = score(logits[[logit_rows[index] for index in scored]], targets, num_top)
            for index, token_score in zip(scored, scores, strict=True):
                rows[index].scores.append(token_score)
        return chosen

    def _choose_one(self, logits: Tensor, row: _Row, likeliest: int | None) -> int:
        """Return one row's next token.

        Args:
            logits: Shape (V,).
            likeliest: The likeliest token, if nothing but a form can make it another one.
        """
        if row.search is not None:
            return row.search.advance(logits) or 0
        request, allowed = row.request, row.token_filter
        if request.shaping.changes_logits:
            logits = shape(logits, request.shaping, request.prompt_ids, row.token_ids)
        if row.sampler is None:
            if likeliest is None:
                likeliest = int(logits.argmax())
            # An answer that has the form anyway costs no mask.
            if allowed is None or allowed.allows(likeliest):
                return likeliest
        if allowed is not None:
            logits = allowed.mask(logits)
        if row.sampler is None:
            return int(logits.argmax())
        return sample(logits, request.params, request.shaping, row.sampler)

    def _accept(self, row: _Row, token: int | None) -> bool:
        """Add a chosen token to its row; return whether the row goes on."""
        if token is None:
            return False
        try:
            return self._extend(row, token)
        except Exception as error:
            # A callback into an event loop that is closed, for one.
            if not isinstance(error, InvalidRequest):
                log.exception("a request's token cannot be handed on")
            _fail([row], error)
            return False

    def _extend(self, row: _Row, token: int) -> bool:
        if row.search is not None:
            return self._follow(row, row.search)
        params, stop_ids = row.request.params, row.request.stop_ids
        ended = token in (self.stop_ids if stop_ids is None else stop_ids) and params.max_tokens > 0
        may_stop = False
        if params.max_tokens and not ended:
            row.token_ids.append(token)
            self._num_generated_tokens += 1
            if row.stop_finder is not None:
                may_stop = row.stop_finder.push(token)
            if row.token_filter is not None:
                row.token_filter.push(token)
            if row.request.on_token is not None:
                row.request.on_token(token, row.scores[-1] if row.scores else None)
        is_full = len(row.token_ids) == params.max_tokens
        if row.stop_finder is not None and (may_stop or ended or is_full):
            text = (row.request.decode or self.decode)(row.token_ids)
            ends = [text.find(stop) for stop in params.stop if stop in text]
            if ends:
                return self._finish(row, "stop", text=text[: min(ends)])
        if ended:
            return self._finish(row, "stop", num_stop_tokens=1)
        if row.token_filter is not None and row.token_filter.is_complete:
            return self._finish(row, "stop")
        return self._finish(row, "length") if is_full else True

    def _follow(self, row: _Row, search: AnswerSearch) -> bool:
        """Go where a search wants to look next; return whether it wants to."""
        self._num_generated_tokens += 1
        is_over = search.is_over
        path = search.tree.answers[search.found[0].place][:-1] if is_over else search.path
        row.token_ids = list(path)
        return not is_over or self._finish(row, "stop", num_stop_tokens=1)

    def _finish(
        self,
        row: _Row,
        reason: FinishReason,
        text: str | None = None,
        num_stop_tokens: int = 0,
    ) -> bool:
        request, count = row.request, len(row.token_ids)
        decode = request.decode or self.decode
        scores = row.scores[:count] if request.params.logprobs else None
        result = DecodeResult(
            text=decode(row.token_ids) if text is None else text,
            finish_reason=reason,
            prompt_tokens=len(request.prompt_ids),
            completion_tokens=count + num_stop_tokens,
            latency_s=time.monotonic() - row.submitted,
            token_ids=row.token_ids,
            logprobs=None if scores is None else [token_score.logprob for token_score in scores],
            scores=scores,
            prompt_scores=row.prompt_scores if request.score_prompt else None,
            ranked=row.search.found if row.search else (),
            coverage=row.search.coverage if row.search else None,
        )
        with contextlib.suppress(InvalidStateError):  # cancelled
            row.future.set_result(result)
        return False


class PlainEngine(Engine):
    """The plain way for a model that the engine does not reproduce: transformers' own `generate`.

    One request after the other, so slower by the number of requests that would have shared a step.
    Queue, sampling, stops, scores and adapters are the engine's. Arguments as of `Engine`.
    """

    def _prepare(self, adapters: Mapping[str, Path]) -> int:
        self.adapters = Adapters(self.model, adapters)
        # `generate` would add what the model's own settings say to what a request asks for.
        self.model.generation_config = GenerationConfig()
        text = self.model.config.get_text_config()
        layers, size = getattr(text, "num_hidden_layers", 1), getattr(text, "hidden_size", 1)
        return 2 * layers * size * self.model.dtype.itemsize

    def _shared_prefix(self, request: DecodeRequest) -> Prefix | None:
        return None

    def _step(self) -> None:
        """Answer the request that has waited longest, to its end."""
        self._drop_cancelled()
        if self._prefilling:
            self._generate(self._prefilling[0])
            if not self._closed:
                self._prefilling.pop(0)

    def _generate(self, row: _Row) -> None:
        ids = torch.tensor([list(row.request.prompt_ids)], device=self.model.device)
        self.adapters.select_one(row.request.adapter)
        if row.request.score_prompt:
            logits = self.model(input_ids=ids, use_cache=False).logits[0]
            targets = ids[0, 1:].tolist()
            num_top = [row.request.num_top] * len(targets)
            row.prompt_scores += score(logits[:-1], targets, num_top)
            if not row.request.params.max_tokens:
                self._accept(row, self._choose(logits[-1:], [0], [row])[0])
                return
        if row.search is not None:
            self._search(row)
            return
        step = _PlainStep(self, row)
        self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(
                max_new_tokens=row.request.params.max_tokens, do_sample=False, pad_token_id=0
            ),
            logits_processor=LogitsProcessorList([step.choose]),
            stopping_criteria=StoppingCriteriaList([step.ended]),
        )

    def _search(self, row: _Row) -> None:
        goes_on = True
        while goes_on and not (row.future.cancelled() or self._closed):
            ids = [*row.request.prompt_ids, *row.token_ids]
            input_ids = torch.tensor([ids], device=self.model.device)
            logits = self.model(input_ids=input_ids, use_cache=False).logits[0, -1:]
            goes_on = self._accept(row, self._choose(logits, [0], [row])[0])


class _PlainStep:
    """Lets the engine choose each token of a `generate`, and say when it is over."""

    def __init__(self, engine: PlainEngine, row: _Row) -> None:
        self.engine = engine
        self.row = row
        self.token: int | None = 0  # None: none could be chosen, and the request has failed

    def choose(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores that leave the chosen token alone. Shape (1, V)."""
        self.token = self.engine._choose(scores, [0], [self.row])[0]
        only = torch.full_like(scores, float("-inf"))
        only[0, self.token or 0] = 0.0
        return only

    def ended(self, input_ids: Tensor, scores: object) -> Tensor:
        """Take the chosen token into the answer, and return whether it was the last. Shape (1,)."""
        row, engine = self.row, self.engine
        ended = row.future.cancelled() or engine._closed or not engine._accept(row, self.token)
        return torch.tensor([ended], device=input_ids.device)


def _shared_length(ids: Sequence[int], others: Sequence[Sequence[int]]) -> int:
    """Return the length of the prefix that would save most tokens if all `others` came again."""
    mine = np.asarray(ids)
    sizes = []
    for other in others:
        size = min(len(mine) - 1, len(other))
        differs = np.flatnonzero(mine[:size] != np.asarray(other)[:size])
        sizes.append(int(differs[0]) if len(differs) else size)
    sizes.sort(reverse=True)
    return max(((size * rank, size) for rank, size in enumerate(sizes, 1)), default=(0, 0))[1]


def _fail(rows: Sequence[_Row], error: Exception) -> None:
    for row in rows:
        with contextlib.suppress(InvalidStateError):  # cancelled
            row.future.set_exception(error)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
