"""The shape of a model, and what its backward pass keeps, without loading its weights.

On PyTorch's "meta" device tensors have shapes and no content, so a forward pass costs next to
nothing, and what autograd keeps of it can be counted for any architecture, adapters included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.autograd.function import FunctionCtx
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, AutoConfig
from transformers.integrations.moe import ExpertsInterface

from tuneloop.compat.transformers import apply_gate
from tuneloop.config import TrainingConfig
from tuneloop.errors import ModelError, UserError
from tuneloop.models.bases.source import BaseModel
from tuneloop.models.bases.weights import load_whole
from tuneloop.training.loss import loss_sum
from tuneloop.training.methods import METHODS
from tuneloop.training.packed import PackedBatch, can_share, forget_draws, pack_rows
from tuneloop.training.padded import PaddedBatch, pad_rows
from tuneloop.training.rows import make_rows

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel

ATTENTION_SHAPE = "tuneloop_shape"
_SHAPES = {
    "attn_implementation": ATTENTION_SHAPE,
    "experts_implementation": ATTENTION_SHAPE,
}
_SHORT, _LONG = 32, 64


@dataclass(frozen=True)
class ModelShape:
    """The parts of a model that memory and time depend on.

    Args:
        num_parameters: All weights of the base.
        num_trainable: Weights that are trained.
        num_matmul: Weights of the linear layers but the output layer, without adapters.
        num_active: Weights that a token is multiplied with, of the chosen experts alone in a
            mixture of experts; without adapters and the output layer.
        num_adapter: Weights of the adapters.
        hidden_size: D of the residual stream.
        query_size: Query heads times head dimension, over all layers.
        num_layers: Transformer layers.
        vocab_size: Rows of the output layer.
        max_positions: Longest sequence the model knows, in tokens, or None.
        kept_bytes: Bytes that the backward pass keeps for each token, without the logits.
        adapted_size: Outputs of all layers that have an adapter.
        can_share: Whether rows of a micro-batch share the computation of a common prefix.
        unknown: Why the costs of a token are not known (`num_active` and `kept_bytes` are 0);
            empty where they are.
    """

    num_parameters: int
    num_trainable: int
    num_matmul: int
    num_active: int
    num_adapter: int
    hidden_size: int
    query_size: int
    num_layers: int
    vocab_size: int
    max_positions: int | None
    kept_bytes: int
    adapted_size: int
    can_share: bool
    unknown: str = ""


def model_shape(base: BaseModel, config: TrainingConfig, use_gpu: bool = False) -> ModelShape:
    """Return the shape of a base model from a load and a forward pass without content.

    Raises:
        ModelError: It is no causal language model of transformers, its files do not hold its
            tensors, or it has no layers that `lora.target_modules` names.
    """
    # The trials of a sweep differ in rows, seeds and rates, of which the shape knows nothing.
    return _shape_of(base, config.model_dump_json(include={"method", "lora"}), use_gpu)


@lru_cache(maxsize=16)
def _shape_of(base: BaseModel, settings_of_method: str, use_gpu: bool) -> ModelShape:
    config = TrainingConfig.model_validate_json(settings_of_method)
    dtype = torch.bfloat16 if use_gpu else torch.float32
    settings = model_settings(base)
    unknown, costs, shares = "", _Costs(0, 0), False
    for implementations in (_SHAPES, {}):
        # Loaded, not made from the configuration: the class, and whether the files hold it.
        model = _load_without_content(base, dtype, implementations)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        head = model.get_output_embeddings()
        num_matmul = sum(
            module.weight.numel()
            for module in model.modules()
            if isinstance(module, torch.nn.Linear) and module is not head
        )
        lay_out = pack_rows if implementations else pad_rows
        try:
            num_active = _num_active(model, lay_out)
            wrapped = _adapted(model, config)
            costs = _Costs(num_active, kept_bytes(wrapped, lay_out))
            shares = bool(implementations) and not use_gpu and can_share(wrapped.train())
            unknown = ""
            break
        except UserError:
            raise
        except Exception as error:
            # Any of what a family's own code may raise on tensors without content.
            unknown = unknown or f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    else:
        wrapped = _adapted(_load_without_content(base, dtype, {}), config)
    forget_draws()
    num_all = sum(parameter.numel() for parameter in wrapped.parameters())
    hidden = _setting(settings, "hidden_size", 0)
    heads = _setting(settings, "num_attention_heads", 0)
    head_size = _setting(settings, "head_dim", 0) or (hidden // heads if heads else 0)
    layers = _setting(settings, "num_hidden_layers", 1)
    return ModelShape(
        num_parameters=num_parameters,
        num_trainable=sum(p.numel() for p in wrapped.parameters() if p.requires_grad),
        num_matmul=num_matmul,
        num_active=costs.num_active,
        num_adapter=num_all - num_parameters,
        hidden_size=hidden,
        query_size=heads * head_size * layers,
        num_layers=layers,
        vocab_size=wrapped.get_input_embeddings().weight.shape[0],
        max_positions=getattr(settings, "max_position_embeddings", None),
        kept_bytes=costs.kept_bytes,
        adapted_size=sum(m.out_features for m in wrapped.modules() if hasattr(m, "lora_A")),
        can_share=shares,
        unknown=unknown,
    )


class _Costs(NamedTuple):
    """What a token costs: weights it is multiplied with, bytes kept for the backward pass."""

    num_active: int
    kept_bytes: int


def model_settings(base: BaseModel) -> PretrainedConfig:
    """Return the configuration of a base model's text layers.

    Raises:
        ModelError: It describes nothing that is trained here.
    """
    try:
        whole = AutoConfig.from_pretrained(str(base.path), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise _unusable(base, error) from error
    if getattr(whole, "quantization_config", None) is not None:
        method = dict(whole.to_dict()["quantization_config"]).get("quant_method", "unknown")
        raise ModelError.of(
            "the base model is quantized already",
            where=str(base.path / "config.json"),
            got=f"quantization_config of kind {method}",
            allowed="weights in float32, bfloat16 or float16",
            remedy="use the model it was quantized from; training.method qlora holds that one "
            "in 4 bits by itself",
        )
    return whole.get_text_config()


def _load_without_content(
    base: BaseModel, dtype: torch.dtype, implementations: dict[str, str]
) -> PreTrainedModel:
    try:
        return load_whole(base.path, dtype=dtype, device_map="meta", **implementations)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        if implementations and ATTENTION_SHAPE in str(error):
            return load_whole(base.path, dtype=dtype, device_map="meta")
        raise _unusable(base, error) from error


def _unusable(base: BaseModel, error: Exception) -> ModelError:
    own_code = "trust_remote_code" in str(error)
    return ModelError.of(
        "the base model brings code of its own, which is not run"
        if own_code
        else "the base model's configuration cannot be used",
        where=str(base.path / "config.json"),
        got="auto_map, and a model type that transformers does not know"
        if own_code
        else (str(error).splitlines() or [type(error).__name__])[0],
        allowed="a causal language model that transformers knows",
        remedy="use a version of the model in transformers' own format" if own_code else "",
    )


def _setting(settings: PretrainedConfig, name: str, default: int) -> int:
    """Return a number of a configuration; families without it, and lists of it, give a default."""
    value = getattr(settings, name, None)
    if isinstance(value, list):
        value = max(value, default=default)
    return value if isinstance(value, int) else default


def _adapted(model: PreTrainedModel, config: TrainingConfig) -> PreTrainedModel | PeftModel:
    dtype = model.dtype
    with torch.device("meta"):
        # PEFT keeps adapters in float32, DeepSpeed makes them what the base is.
        return METHODS[config.method].wrap(model, config).to(dtype)


def _batch(length: int, lay_out: Callable[..., PackedBatch | PaddedBatch]) -> Any:
    """Return one row with one target, so that the logits' share is the same in all lengths."""
    rows = make_rows(["a"], [[0] * length], [[0] * (length - 1) + [1]])
    return lay_out(rows, [0], "meta")


def _num_active(model: PreTrainedModel, lay_out: Callable[..., PackedBatch | PaddedBatch]) -> int:
    """Return how many weights of its layers a token is multiplied with."""

    def operations(length: int) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            _batch(length, lay_out).logits(model)
        return counter.get_total_flops()

    return (operations(_LONG) - operations(_SHORT)) // (2 * (_LONG - _SHORT))


def kept_bytes(
    model: PreTrainedModel | PeftModel,
    lay_out: Callable[..., PackedBatch | PaddedBatch] = pack_rows,
) -> int:
    """Return the bytes that the backward pass keeps for each token, the logits left out.

    Args:
        model: On the meta device, with `ATTENTION_SHAPE` for its attention where that is packed.
    """
    # A storage without memory has no address; PyTorch keeps one Python object for each.
    weights = {p.untyped_storage() for p in (*model.parameters(), *model.buffers())}

    def kept(length: int) -> int:
        storages: set[torch.UntypedStorage] = set()

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storages.add(tensor.untyped_storage())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss_sum(model, _batch(length, lay_out))
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


def _experts_shape(
    experts: torch.nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Return what a mixture's experts return, without content; one stands for each that is chosen.

    Shapes: tokens T, chosen experts K, hidden size D: (T, D), (T, K), (T, K) → (T, D).
    """
    chosen = top_k_index.shape[-1]
    up, down = experts.gate_up_proj if experts.has_gate else experts.up_proj, experts.down_proj
    first, second = (w[0] if experts.is_transposed else w[0].T for w in (up, down))
    inner = hidden_states.repeat_interleave(chosen, dim=0) @ first
    inner = apply_gate(experts, inner) if experts.has_gate else experts.act_fn(inner)
    outer = inner @ second * top_k_weights.reshape(-1, 1)
    return outer.view(-1, chosen, outer.shape[-1]).sum(1)


ExpertsInterface.register(ATTENTION_SHAPE, _experts_shape)
AttentionInterface.register(ATTENTION_SHAPE, _attention_shape)
