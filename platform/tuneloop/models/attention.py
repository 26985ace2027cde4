"""Attention over packed tokens, for training and serving: no linear layer computes padding.

Sequences of different lengths go through the model end to end, as one row of tokens. Only attention
has to know where a sequence begins: the model hands its queries, keys and values to `attend`
(transformers' `AttentionInterface`), which passes each segment of tokens to the object that knows
what those tokens see:

- `Documents`: the whole documents of a training batch, behind the prefix that all of them share.
- `serving.kv_cache`: the tokens of running sequences, in front of which a KV cache stands.

Shapes: T tokens, K keys, H key-value heads, G query heads per key-value head, D head dimension.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel

from tuneloop.compat.transformers import attention_implementation

IMPLEMENTATION = "tuneloop"
# What a model raises that does not know our attention or our arguments.
FOREIGN_ERRORS = (
    *(NotImplementedError, TypeError, ValueError, LookupError),
    *(AttributeError, RuntimeError, AssertionError),
)
# What some families add to attention and nothing here computes.
UNSUPPORTED = ("s_aux", "position_bias", "head_mask")

Masks = dict[tuple[int, int, int | None], Tensor]


@dataclass(frozen=True)
class Rule:
    """How one layer attends.

    Args:
        scaling: Factor of the products of queries and keys.
        window: A token sees itself and `window - 1` tokens before it; None: all before it.
        softcap: Scores are squashed into (-softcap, softcap); None: they are left alone.
        dropout: Share of the weights that is dropped, in [0, 1).
    """

    scaling: float
    window: int | None
    softcap: float | None
    dropout: float


class Segment(Protocol):
    """A run of packed tokens that is attended to on its own."""

    def __len__(self) -> int:
        """Return its number of tokens, T."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        """Return attention of its tokens in one layer; query (H*G, T, D) → (T, H*G, D)."""


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    segments: Sequence[Segment] = (),
    **options: Any,
) -> tuple[Tensor, None]:
    """Return attention of packed tokens, (1, T, H*G, D), segment by segment.

    The signature is transformers'. `segments` comes from the caller of the model's forward.

    Raises:
        NotImplementedError: The model asks for a kind of attention that is not computed here.
        RuntimeError: There are no segments.
    """
    for name in UNSUPPORTED:
        if options.get(name) is not None:
            raise NotImplementedError(f"attention with `{name}`")
    if not segments:
        raise RuntimeError("the model was called without `segments`, or does not pass them on")
    scaling = options.get("scaling")
    rule = Rule(
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        options.get("sliding_window"),
        options.get("softcap"),
        options.get("dropout") or 0.0,
    )
    sizes = [len(segment) for segment in segments]
    parts = (tensor[0].split(sizes, dim=1) for tensor in (query, key, value))
    outputs = [
        segment.attend(module.layer_idx, q, k, v, rule)
        for segment, q, k, v in zip(segments, *parts, strict=True)
    ]
    return (torch.cat(outputs) if len(outputs) > 1 else outputs[0])[None], None


def attend_causally(query: Tensor, key: Tensor, value: Tensor, rule: Rule, masks: Masks) -> Tensor:
    """Return attention of a sequence's last T tokens to all of its K tokens; (T, H*G, D).

    Args:
        query: Shape (H*G, T, D).
        key: Shape (H, K, D).
        value: Shape (H, K, D).
        masks: The masks so far; layers of the same kind share one.
    """
    num_queries, num_keys = query.shape[1], key.shape[1]
    windowed = rule.window is not None and rule.window < num_keys
    mask = None
    if num_keys > num_queries or windowed or rule.softcap is not None:
        shape = (num_queries, num_keys, rule.window)
        if shape not in masks:
            masks[shape] = _mask(*shape, query.device)
        mask = masks[shape]
    num_groups = query.shape[0] // key.shape[0]
    if mask is None or rule.softcap is None:
        out = functional.scaled_dot_product_attention(
            query[None],
            key[None],
            value[None],
            attn_mask=mask,
            dropout_p=rule.dropout,
            is_causal=mask is None,
            scale=rule.scaling,
            enable_gqa=num_groups > 1,
        )
        return out[0].transpose(0, 1)
    key, value = (part.repeat_interleave(num_groups, dim=0) for part in (key, value))
    scores = query @ key.transpose(1, 2) * rule.scaling
    scores = rule.softcap * torch.tanh(scores / rule.softcap)
    weights = scores.masked_fill(~mask, float("-inf")).float().softmax(-1).to(value.dtype)
    return (functional.dropout(weights, rule.dropout) @ value).transpose(0, 1)


def _mask(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    """Return which keys each of the last tokens sees. Shape (T, K)."""
    keys = torch.arange(num_keys, device=device)
    queries = keys[num_keys - num_queries :, None]
    mask = keys <= queries
    return mask if window is None else mask & (keys > queries - window)


@dataclass(frozen=True, eq=False)
class Documents:
    """Whole documents end to end, behind the prefix that all of them share.

    The work grows with the sum of squared lengths, where a block-diagonal mask costs the square of
    their sum. On a GPU in half precision it is one call of FlashAttention's kernel for documents of
    any length (Dao 2023, arXiv:2307.08691); elsewhere one call for each document.

    Args:
        num_prefix: Tokens at the front that every document begins with; 0 where each document is
            whole in its place.
        lengths: Tokens of each document behind the prefix.
        bounds: Where each document's own tokens begin, and T. Shape (documents + 1,), int32.
    """

    num_prefix: int
    lengths: tuple[int, ...]
    bounds: Tensor
    _masks: Masks = field(default_factory=dict)

    def __len__(self) -> int:
        return self.num_prefix + sum(self.lengths)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        """Return attention within each document; query (H*G, T, D) → (T, H*G, D)."""
        if not self.num_prefix and _has_kernel(query, rule):
            return self._attend_at_once(query, key, value, rule)
        sizes = (self.num_prefix, *self.lengths)
        parts = (tensor.split(sizes, dim=1) for tensor in (query, key, value))
        prefix, *documents = zip(*parts, strict=True)
        outputs: list[Tensor] = []
        for q, k, v in documents:
            if self.num_prefix:
                q, k, v = (torch.cat(both, dim=1) for both in zip(prefix, (q, k, v), strict=True))
            out = attend_causally(q, k, v, rule, self._masks)
            # What comes out for the prefix is needed once. To leave it out before would take a
            # mask, with which attention computes all pairs.
            outputs.append(out[self.num_prefix :] if outputs else out)
        return torch.cat(outputs)

    def _attend_at_once(self, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        num_groups, longest = query.shape[0] // key.shape[0], max(self.lengths)
        if num_groups > 1:
            key, value = (part.repeat_interleave(num_groups, dim=0) for part in (key, value))
        assert _varlen_attn is not None
        result: Tensor = _varlen_attn(
            *(part.transpose(0, 1) for part in (query, key, value)),
            self.bounds,
            self.bounds,
            longest,
            longest,
            scale=rule.scaling,
            window_size=(-1 if rule.window is None else rule.window - 1, 0),
        )
        return result


def _has_kernel(query: Tensor, rule: Rule) -> bool:
    """Return whether the kernel for documents of any length computes this attention."""
    return (
        _varlen_attn is not None
        and query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[2] % 8 == 0
        and not rule.dropout
        and rule.softcap is None
    )


def attends_packed(model: PreTrainedModel) -> bool:
    """Return whether a model attends with `attend`; otherwise it has its own attention."""
    return attention_implementation(model) == IMPLEMENTATION


def keeps_logits(model: torch.nn.Module) -> bool:
    """Return whether a model computes logits at chosen positions only; wrappers are looked into."""
    plain = getattr(model, "module", model)
    plain = plain.get_base_model() if hasattr(plain, "get_base_model") else plain
    return "logits_to_keep" in inspect.signature(plain.forward).parameters


@contextlib.contextmanager
def standard_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let a model attend as it does for anyone who loads it, afterwards as it did before."""
    if not attends_packed(model):
        yield
        return
    model.set_attn_implementation(model.get_correct_attn_implementation(None))
    try:
        yield
    finally:
        model.set_attn_implementation(IMPLEMENTATION)


AttentionInterface.register(IMPLEMENTATION, attend)

# Older versions of PyTorch than 2.11 lack it, or its window.
_varlen_attn = None
with contextlib.suppress(ImportError):
    from torch.nn.attention import varlen

    if "window_size" in inspect.signature(varlen.varlen_attn).parameters:
        _varlen_attn = varlen.varlen_attn
