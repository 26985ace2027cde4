"""From logits to tokens and their scores.

What a request does not ask for is not done: no `generation_config`, no unstated default. What it
asks for is done in vLLM's order, so that every engine draws from the same distribution: biases,
penalties, temperature, min-p, top-k, nucleus; each is of what those before it have left.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tuneloop.records import SamplingParams
from tuneloop.serving.requests import Shaping, TokenScore

_BLOCK = 64  # divides most vocabularies
_FEW_ROWS = 16
_MIN_TEMPERATURE = 1e-6  # at this the likeliest token is drawn, short of exact ties


def argmax(logits: Tensor) -> Tensor:
    """Return the likeliest token of each row, the first of equal ones. Shapes (B, V) and (B,).

    The transposed product (`linear.py`) leaves logits with the rows side by side, where PyTorch's
    `argmax` reads against the grain: 64 rows of 262,144 take 89 ms, and 4 ms as the largest of each
    block first and then its position within the best block.
    """
    num_rows, vocab_size = logits.shape
    if logits.stride(0) != 1 or num_rows < _FEW_ROWS or vocab_size % _BLOCK:
        return logits.argmax(-1)
    blocks = logits.t().unflatten(0, (-1, _BLOCK))
    best = blocks.amax(1).argmax(0)
    rows = torch.arange(num_rows, device=logits.device)
    return best * _BLOCK + blocks[best, :, rows].argmax(1)


def shape(
    logits: Tensor, shaping: Shaping, prompt_ids: Sequence[int], token_ids: Sequence[int]
) -> Tensor:
    """Return one row's logits with bias and penalties. Shapes (V,) and (V,).

    Args:
        prompt_ids: They count for `repetition_penalty` alone.
        token_ids: What has been generated.
    """
    logits = logits.float().cpu().clone()
    for token, bias in shaping.logit_bias.items():
        logits[token] += bias
    if shaping.repetition_penalty != 1:
        seen = torch.tensor([*prompt_ids, *token_ids]).unique()
        values = logits[seen]
        factor = shaping.repetition_penalty
        logits[seen] = torch.where(values > 0, values / factor, values * factor)
    if token_ids and (shaping.presence_penalty or shaping.frequency_penalty):
        generated, counts = torch.tensor(token_ids).unique(return_counts=True)
        logits[generated] -= shaping.presence_penalty + shaping.frequency_penalty * counts
    return logits


def sample(
    logits: Tensor, params: SamplingParams, shaping: Shaping, sampler: torch.Generator
) -> int:
    """Return a token drawn with temperature, min-p, top-k and nucleus, in this order.

    The noise of a draw belongs to the token id, not to its rank: rounding, which depends on what
    else is in the batch, changes ranks of nearly equal tokens, and must not change what a seed
    draws.

    Source: nucleus, Holtzman et al. 2019, §3.1; min-p, Nguyen et al. 2024, §3.
    """
    logits = logits.float().cpu()
    # From the largest, so that no temperature, however small, makes an infinity.
    probs = torch.softmax((logits - logits.max()) / max(params.temperature, _MIN_TEMPERATURE), -1)
    if params.top_p < 1 or shaping.top_k or shaping.min_p:
        ranked, ids = probs.sort(descending=True, stable=True)
        kept = ranked >= shaping.min_p * ranked[0]
        if shaping.top_k:
            kept[shaping.top_k :] = False
        if params.top_p < 1:
            left = ranked * kept
            left /= left.sum()
            kept &= left.cumsum(0) - left < params.top_p
        kept[0] = True  # top_p 0: the likeliest
        probs[ids[~kept]] = 0
    return int(torch.multinomial(probs, 1, generator=sampler))


def score(logits: Tensor, targets: Sequence[int], num_top: Sequence[int]) -> list[TokenScore]:
    """Return the log-probability of each target and the likeliest tokens beside it."""
    if not targets:
        return []
    logprobs = torch.log_softmax(logits.float(), -1)
    index = torch.tensor(targets, device=logits.device)[:, None]
    chosen = logprobs.gather(1, index)[:, 0].tolist()
    values, ids = logprobs.topk(min(max(num_top), logprobs.shape[1]), -1)
    return [
        TokenScore(logprob, tuple(zip(row_ids[:count], row_values[:count], strict=True)))
        for logprob, row_ids, row_values, count in zip(
            chosen, ids.tolist(), values.tolist(), num_top, strict=True
        )
    ]
