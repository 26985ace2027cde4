"""The shape of a model, and what its backward pass keeps, without loading its weights.

On PyTorch's "meta" device tensors have shapes and no content, so a forward pass costs next to
nothing, and what autograd keeps of it can be counted for any architecture, adapters included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import FunctionCtx
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from tuneloop.config import TrainingConfig
from tuneloop.errors import ModelError, Problem
from tuneloop.models.bases.source import BaseModel
from tuneloop.training.methods import METHODS
from tuneloop.training.packed import can_share, loss_sum, pack_rows
from tuneloop.training.rows import make_rows

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

ATTENTION_SHAPE = "tuneloop_shape"
_SHORT, _LONG = 32, 64


@dataclass(frozen=True)
class ModelShape:
    """The parts of a model that memory and time depend on.

    Args:
        num_parameters: All weights of the base.
        num_trainable: Weights that are trained.
        num_matmul: Weights of the linear layers but the output layer, without adapters.
        num_adapter: Weights of the adapters.
        hidden_size: D of the residual stream.
        query_size: Query heads times head dimension, over all layers.
        num_layers: Transformer layers.
        vocab_size: Rows of the output layer.
        max_positions: Longest sequence the model knows, in tokens, or None.
        kept_bytes: Bytes that the backward pass keeps for each token, without the logits.
        adapted_size: Outputs of all layers that have an adapter.
        can_share: Whether rows of a micro-batch share the computation of a common prefix.
    """

    num_parameters: int
    num_trainable: int
    num_matmul: int
    num_adapter: int
    hidden_size: int
    query_size: int
    num_layers: int
    vocab_size: int
    max_positions: int | None
    kept_bytes: int
    adapted_size: int
    can_share: bool


def model_shape(base: BaseModel, config: TrainingConfig, use_gpu: bool = False) -> ModelShape:
    """Return the shape of a base model without loading its weights.

    Raises:
        ModelError: Its configuration describes no causal language model, or it has no layers that
            `lora.target_modules` names.
    """
    try:
        settings = AutoConfig.from_pretrained(str(base.path)).get_text_config()
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                settings,
                dtype=torch.bfloat16 if use_gpu else torch.float32,
                attn_implementation=ATTENTION_SHAPE,
            )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            Problem(
                "the base model's configuration cannot be used",
                where=str(base.path / "config.json"),
                got=(str(error).splitlines() or [type(error).__name__])[0],
                allowed="a causal language model that transformers knows",
            )
        ) from error
    head = model.get_output_embeddings()
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    num_matmul = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    )
    with torch.device("meta"):
        # PEFT keeps adapters in float32, DeepSpeed makes them what the base is.
        model = METHODS[config.method].wrap(model, config).to(model.dtype)
    num_all = sum(parameter.numel() for parameter in model.parameters())
    heads = settings.num_attention_heads
    head_size = getattr(settings, "head_dim", None) or settings.hidden_size // heads
    return ModelShape(
        num_parameters=num_parameters,
        num_trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        num_matmul=num_matmul,
        num_adapter=num_all - num_parameters,
        hidden_size=settings.hidden_size,
        query_size=heads * head_size * settings.num_hidden_layers,
        num_layers=settings.num_hidden_layers,
        vocab_size=settings.vocab_size,
        max_positions=getattr(settings, "max_position_embeddings", None),
        kept_bytes=kept_bytes(model),
        adapted_size=sum(m.out_features for m in model.modules() if hasattr(m, "lora_A")),
        can_share=can_share(model.train()) and not use_gpu,
    )


def kept_bytes(model: PreTrainedModel | PeftModel) -> int:
    """Return the bytes that the backward pass keeps for each token, the logits left out.

    Args:
        model: On the meta device, with `ATTENTION_SHAPE` for its attention.
    """
    # A storage without memory has no address; PyTorch keeps one Python object for each.
    weights = {p.untyped_storage() for p in (*model.parameters(), *model.buffers())}

    def kept(length: int) -> int:
        storages: set[torch.UntypedStorage] = set()

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storages.add(tensor.untyped_storage())
            return tensor

        # One target, so that the logits' share is the same in both lengths.
        rows = make_rows(["a"], [[0] * length], [[0] * (length - 1) + [1]])
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss_sum(model, pack_rows(rows, [0], "meta"))
        return sum(storage.nbytes() for storage in storages - weights)

    model.train()
    return (kept(_LONG) - kept(_SHORT)) // (_LONG - _SHORT)


class _Kept(torch.autograd.Function):
    """Stands for an attention kernel that keeps its inputs and its output, as flash kernels do."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output)
        return output


def _attention_shape(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *_: Any,
    **__: Any,
) -> tuple[torch.Tensor, None]:
    """Return what attention returns, without content. Shapes as in `models.attention.attend`."""
    return _Kept.apply(query, key, value).transpose(1, 2), None


AttentionInterface.register(ATTENTION_SHAPE, _attention_shape)
