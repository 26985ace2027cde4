"""The model and its DeepSpeed engine.

ZeRO (Rajbhandari et al. 2019, arXiv:1910.02054) shards optimizer state (stage 1), gradients (2)
and weights (3) over the workers; stage 0 is plain data parallelism.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tuneloop.config import TrainingConfig
from tuneloop.models.attention import IMPLEMENTATION
from tuneloop.models.export.exporter import four_bits


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
    """

    world_size: int
    micro_batch_size: int
    grad_accum_steps: int
    zero_stage: int = 0
    use_gpu: bool = False
    gradient_checkpointing: bool = False

    @property
    def dtype(self) -> torch.dtype:
        # bf16 matrix products are far slower than float32 on CPUs without AMX.
        return torch.bfloat16 if self.use_gpu else torch.float32


def load_model(
    path: Path,
    config: TrainingConfig,
    execution: Execution,
    device: torch.device | str = "cpu",
) -> Any:
    """Return the base model, with fresh LoRA adapters where they are what is trained.

    The adapters depend on `config.seed` alone, so every worker starts from the same weights.
    """
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": execution.dtype, "attn_implementation": IMPLEMENTATION}
    if config.method == "qlora":
        # Weights in 4 bits are made where they stay.
        options |= {"quantization_config": four_bits(execution.dtype), "device_map": {"": device}}
    model = AutoModelForCausalLM.from_pretrained(str(path), **options)
    model.config.use_cache = False
    model = with_adapters(model, config)
    if execution.gradient_checkpointing:
        # Without reentrance gradients reach adapters although the embeddings are frozen.
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model if config.method == "qlora" else model.to(device)


def with_adapters(model: Any, config: TrainingConfig) -> Any:
    """Return the model with fresh LoRA adapters, or itself where all weights are trained."""
    if config.method == "full":
        return model
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(config.seed)
    lora = LoraConfig(
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        target_modules=config.lora.target_modules,
        use_rslora=config.lora.use_rslora,
        use_dora=config.lora.use_dora,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # It asks transformers by a name that is being replaced; nothing a user can act on.
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, lora)


def make_engine(model: Any, config: TrainingConfig, execution: Execution, num_steps: int) -> Any:
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
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, num_steps, config)
    )
    with _without_compiler():
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            lr_scheduler=scheduler,
            config=deepspeed_config(config, execution, sum(p.numel() for p in decayed + plain)),
            dist_init_required=False if deepspeed.comm.is_initialized() else None,
        )
    if execution.zero_stage == 0 and execution.dtype != torch.float32:
        # DeepSpeed takes a step without gradients to make AdamW's state, which would count one
        # step too many, unlike every other stage.
        engine.optimizer.optimizer.state.clear()
    return engine


@contextlib.contextmanager
def _without_compiler() -> Iterator[None]:
    """Make `torch.compile` do nothing for a while.

    With ZeRO DeepSpeed imports an optimizer that nobody asked for and whose functions are compiled,
    and with it PyTorch's compiler: three to four CPU seconds in every worker.
    """
    name = "TORCHDYNAMO_DISABLE"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


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
def gathered(parameters: list[Any], execution: Execution) -> Iterator[None]:
    """Hold whole parameters in every worker for a while; all workers have to enter."""
    if execution.zero_stage < 3:
        yield
        return
    deepspeed = import_deepspeed(execution.use_gpu)
    with deepspeed.zero.GatheredParameters(parameters):
        yield


@contextlib.contextmanager
def answering(engine: Any, execution: Execution) -> Iterator[None]:
    """Let the model write for a while; all workers have to enter, and call it together.

    ZeRO-3 fetches every layer from the other workers for every token. Where all workers have room
    for the whole model, it is fetched once, and DeepSpeed's hooks that fetch and drop layers are
    left out meanwhile.
    """
    if execution.zero_stage < 3 or not _have_room(engine):
        yield
        return
    from deepspeed.runtime.zero import parameter_offload

    offload = engine.optimizer.parameter_offload
    with gathered(list(engine.module.parameters()), execution):
        offload._remove_module_hooks()
        offload.forward_hooks, offload.backward_hooks = [], []
        try:
            yield
        finally:
            # As it does itself at the start, but for the model at the bottom of its stack. The
            # order of layers that it has seen is forgotten, and recorded again in the next step.
            offload.setup_zero_stage3_hooks()
            parameter_offload.FWD_MODULE_STACK.pop()


def _have_room(engine: Any) -> bool:
    """Return whether twice the whole weights fit into every worker's free memory."""
    import psutil

    device = torch.device(engine.device)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        workers_here = int(os.environ.get("LOCAL_WORLD_SIZE", engine.world_size))
        free = psutil.virtual_memory().available // workers_here
    size = sum(p.ds_numel * p.element_size() for p in engine.module.parameters())
    fits = torch.tensor(int(2 * size <= free), device=device)
    torch.distributed.all_reduce(fits, torch.distributed.ReduceOp.MIN)
    return bool(fits.item())


def import_deepspeed(use_gpu: bool) -> Any:
    """Import DeepSpeed, bound to the CPU or the GPU, without compiling anything.

    On a CPU DeepSpeed's communication backend asks the accelerator for a shared-memory operator
    and compiles it with g++: half a minute, an error on a machine without a compiler, and for
    ever after a build that was interrupted. Only its inference engine uses that operator, so the
    accelerator given to it here says that it has none.
    """
    if not use_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    elif torch.cuda.is_available():
        # Whatever it was set to for work on the CPU.
        os.environ["DS_ACCELERATOR"] = "cuda"
    # It names functions of torch.distributed that are being renamed; nothing a user can act on.
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\..* is deprecated")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not use_gpu:
        from deepspeed.accelerator import get_accelerator, set_accelerator
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

        class CpuWithoutSharedMemory(CPU_Accelerator):
            def create_op_builder(self, class_name: str) -> Any:
                if class_name == "ShareMemCommBuilder":
                    return None
                return super().create_op_builder(class_name)

        if type(get_accelerator()) is CPU_Accelerator:
            set_accelerator(CpuWithoutSharedMemory())
    return deepspeed
