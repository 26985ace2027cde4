"""The plain way to serve: transformers' own `generate`, one request after the other.

For models that the decode engine does not reproduce. Slower by the number of requests that would
have shared a step; queue, sampling, stops, scores and adapters are the engine's.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from tuneloop.serving.engine import Engine, _Row
from tuneloop.serving.kv_cache import Prefix
from tuneloop.serving.requests import DecodeRequest
from tuneloop.serving.sampling import score


class PlainEngine(Engine):
    """An engine for one causal language model of any kind. Arguments as of `Engine`."""

    def _prepare(self) -> int:
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
        self.adapters.select([row.prompt.next_chunk(ids.shape[1])])
        if row.request.score_prompt:
            logits = self.model(input_ids=ids, use_cache=False).logits[0]
            targets = ids[0, 1:].tolist()
            num_top = [row.request.num_top] * len(targets)
            row.prompt_scores += score(logits[:-1], targets, num_top)
            if not row.request.params.max_tokens:
                self._accept(row, self._choose(logits[-1:], [0], [row])[0])
                return
        step = _Step(self, row)
        self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(
                max_new_tokens=row.request.params.max_tokens, do_sample=False, pad_token_id=0
            ),
            logits_processor=LogitsProcessorList([step.choose]),
            stopping_criteria=StoppingCriteriaList([step.ended]),
        )


class _Step:
    """Lets the engine choose each token of a `generate`, and say when it is over."""

    def __init__(self, engine: PlainEngine, row: _Row) -> None:
        self.engine = engine
        self.row = row
        self.token = 0

    def choose(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores that leave the chosen token alone. Shape (1, V)."""
        self.token = self.engine._choose(scores, [0], [self.row])[0]
        only = torch.full_like(scores, float("-inf"))
        only[0, self.token] = 0.0
        return only

    def ended(self, input_ids: Tensor, scores: object) -> Tensor:
        """Take the chosen token into the answer, and return whether it was the last. Shape (1,)."""
        row, engine = self.row, self.engine
        ended = row.future.cancelled() or engine._closed or not engine._accept(row, self.token)
        return torch.tensor([ended], device=input_ids.device)
