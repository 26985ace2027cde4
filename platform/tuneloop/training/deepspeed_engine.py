"""The model and its DeepSpeed engine.

ZeRO (Rajbhandari et al. 2019, arXiv:1910.02054) shards optimizer state (stage 1), gradients (2)
and weights (3) over the workers; stage 0 is plain data parallelism.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from tuneloop.compat.deepspeed import (
    forget_step_at_start,
    full_shape,
    import_deepspeed,
    without_compiler,
)
from tuneloop.config import TrainingConfig
from tuneloop.models.attention import IMPLEMENTATION
from tuneloop.models.bases.weights import load_whole
from tuneloop.training.methods import METHODS
from tuneloop.training.worked import usual_learning_rate

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from peft import PeftModel
    from transformers import PreTrainedModel


class AttentionError(Exception):
    """A model's class takes no other attention than its own."""


@dataclass(frozen=True)
class Execution:
    """How a training is executed. None of it changes the result.

    Args:
        world_size: Workers.
        micro_batch_size: Rows of one forward pass.
        grad_accum_steps: Forward passes per worker and optimizer step.
        zero_stage: DeepSpeed ZeRO stage, 0 to 3.
        use_gpu: bf16 on CUDA, otherwise float32 on the CPU.
        gradient_checkpointing: Compute activations again instead of keeping them.
        rows_alone: Rows that are not packed are not padded either.
    """

    world_size: int
    micro_batch_size: int
    grad_accum_steps: int
    zero_stage: int = 0
    use_gpu: bool = False
    gradient_checkpointing: bool = False
    rows_alone: bool = False

    @property
    def dtype(self) -> torch.dtype:
        # bf16 matrix products are far slower than float32 on CPUs without AMX.
        return torch.bfloat16 if self.use_gpu else torch.float32


def load_model(
    path: Path,
    config: TrainingConfig,
    execution: Execution,
    device: torch.device | str = "cpu",
    own_attention: bool = False,
) -> PreTrainedModel | PeftModel:
    """Return the base model as `training.method` trains it, on a device.

    Args:
        path: The base model's directory.
        own_attention: The model keeps its own attention, for padded rows.

    Raises:
        AttentionError: The model's class takes no other attention than its own.
        ModelError: The base cannot be loaded, or its files are not whole.
    """
    method = METHODS[config.method]
    options = method.load_options(execution.dtype, device)
    if not own_attention:
        options["attn_implementation"] = IMPLEMENTATION
    try:
        model = load_whole(path, dtype=execution.dtype, **options)
    except (KeyError, ValueError) as error:
        if own_attention or IMPLEMENTATION not in str(error):
            raise
        raise AttentionError(f"the model has no other attention than its own: {error}") from error
    model.config.get_text_config().use_cache = False
    model = method.wrap(model, config)
    if execution.gradient_checkpointing:
        # Without reentrance gradients reach adapters although the embeddings are frozen.
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model if "device_map" in options else model.to(device)


def make_engine(
    model: torch.nn.Module, config: TrainingConfig, execution: Execution, num_steps: int
) -> DeepSpeedEngine:
    """Return the DeepSpeed engine that trains the model.

    The process group of torch.distributed has to exist.
    """
    deepspeed = import_deepspeed(execution.use_gpu)
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    plain = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [
        {"params": parameters, "weight_decay": decay}
        for parameters, decay in ((decayed, config.weight_decay), (plain, 0.0))
        if parameters
    ]
    optimizer = torch.optim.AdamW(groups, lr=peak_learning_rate(model, config), fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, num_steps, config)
    )
    with without_compiler():
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            lr_scheduler=scheduler,
            config=deepspeed_config(config, execution, sum(p.numel() for p in decayed + plain)),
            dist_init_required=False if deepspeed.comm.is_initialized() else None,
        )
    forget_step_at_start(engine)
    return engine


def peak_learning_rate(model: torch.nn.Module, config: TrainingConfig) -> float:
    """Return the learning rate that the configuration names, or the usual one for the model."""
    return config.learning_rate or usual_learning_rate(
        config.method, sum(map(num_weights, model.parameters()))
    )


def num_weights(parameter: torch.Tensor) -> int:
    """Return how many weights a parameter holds; with bitsandbytes two of them share a byte."""
    quantized = getattr(parameter, "quant_state", None)
    return parameter.numel() if quantized is None else quantized.shape.numel()


def deepspeed_config(
    config: TrainingConfig, execution: Execution, num_trained: int
) -> dict[str, Any]:
    """Return DeepSpeed's own configuration.

    Args:
        num_trained: Parameters that are trained.
    """
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": execution.micro_batch_size,
        "gradient_accumulation_steps": execution.grad_accum_steps,
        "gradient_clipping": config.max_grad_norm,
        # Gradients are reduced in a buffer of this many elements, by default a gigabyte in bf16
        # whatever is trained.
        "zero_optimization": {
            "stage": execution.zero_stage,
            "reduce_bucket_size": bucket_size(num_trained),
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }
    if execution.use_gpu:
        settings["bf16"] = {"enabled": True}
    return settings


def bucket_size(num_trained: int) -> int:
    """Return how many gradients ZeRO reduces at a time: all, or DeepSpeed's default."""
    return min(500_000_000, max(1, num_trained))


def learning_rate_factor(step: int, num_steps: int, config: TrainingConfig) -> float:
    """Return the share of the peak learning rate at a step from 0.

    Linear warm-up over `warmup_ratio` of the steps, then cosine or linear decay that would reach
    zero one step after the last, or a constant.
    """
    warmup = math.ceil(num_steps * config.warmup_ratio)
    if step < warmup:
        return (step + 1) / warmup
    if config.lr_scheduler == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, num_steps - warmup))
    if config.lr_scheduler == "linear":
        return 1.0 - progress
    return 0.5 * (1.0 + math.cos(math.pi * progress))


@contextlib.contextmanager
def gathered(parameters: list[torch.nn.Parameter], execution: Execution) -> Iterator[None]:
    """Gather parameters in every worker for a while; all workers have to enter."""
    if execution.zero_stage < 3:
        yield
        return
    with import_deepspeed(execution.use_gpu).zero.GatheredParameters(parameters):
        yield


@contextlib.contextmanager
def ready_to_generate(engine: DeepSpeedEngine, execution: Execution) -> Iterator[None]:
    """Prepare the model to generate; all workers have to enter, and call it together.

    ZeRO-3 fetches every layer from the other workers for every token. Where all workers have room
    for the whole model, it is fetched once, and DeepSpeed's hooks that fetch and drop layers are
    left out meanwhile.
    """
    if execution.zero_stage < 3 or not _has_room(engine):
        yield
        return
    from deepspeed.runtime.zero import unwrap_model_for_generation

    with unwrap_model_for_generation(engine):
        yield


def _has_room(engine: DeepSpeedEngine) -> bool:
    """Return whether twice the whole weights fit into every worker's free memory."""
    device = torch.device(engine.device)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        workers_here = int(os.environ.get("LOCAL_WORLD_SIZE", engine.world_size))
        free = psutil.virtual_memory().available // workers_here
    size = sum(math.prod(full_shape(p)) * p.element_size() for p in engine.module.parameters())
    fits = torch.tensor(int(2 * size <= free), device=device)
    torch.distributed.all_reduce(fits, torch.distributed.ReduceOp.MIN)
    return bool(fits.item())
