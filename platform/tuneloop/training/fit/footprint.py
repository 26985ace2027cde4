"""What the backward pass of a model keeps, found by running the model without any memory.

On PyTorch's "meta" device tensors have shapes and no content, so a forward pass costs next to
nothing, and what autograd keeps of it can be counted for any architecture, adapters included.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface

from tuneloop.training.packed import loss_sum, pack
from tuneloop.training.rows import make_rows

ATTENTION_SHAPE = "tuneloop_shape"
_SHORT, _LONG = 32, 64


def kept_bytes(model: Any) -> int:
    """Return the bytes that the backward pass keeps for each token, the logits left out.

    Args:
        model: On the meta device, with `ATTENTION_SHAPE` for its attention.
    """
    weights = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}

    def kept(length: int) -> int:
        storages: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                storages[storage._cdata] = storage.nbytes()
            return tensor

        # One target, so that the logits' share is the same in both lengths.
        rows = make_rows(["a"], [[0] * length], [[0] * (length - 1) + [1]])
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            # The loss is held, or what is kept would go and others take its place.
            loss = loss_sum(model, pack(rows, [0], "meta"))
        del loss
        return sum(storages.values())

    model.train()
    return (kept(_LONG) - kept(_SHORT)) // (_LONG - _SHORT)


class _Kept(torch.autograd.Function):
    """Stands for an attention kernel that keeps its inputs and its output, as flash kernels do."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Any:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output)
        return output


def _attention_shape(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, None]:
    """Return what attention returns, without content. Shapes as in `models.attention.attend`."""
    return _Kept.apply(query, key, value).transpose(1, 2), None


AttentionInterface.register(ATTENTION_SHAPE, _attention_shape)
