"""Memory and time of a training, from the model's shape, before anything is loaded."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import numpy as np

from tuneloop.config import TrainingConfig, TuneloopConfig, grad_accum_steps, micro_batch_size
from tuneloop.errors import ModelError, Problem, ResourceError
from tuneloop.models.source import BaseModel
from tuneloop.training.batches import Rows, Schedule, split_batch

# A worker's libraries before any weight is loaded, in bytes.
_PROCESS_BYTES = 650_000_000
# What the allocator and the backward pass need beside the tensors that autograd keeps.
_ACTIVATION_OVERHEAD = 1.35
# Logits, their log-softmax and two gradients, each of shape (targets, vocabulary).
_LOGIT_COPIES = 4
# Tokens of the fullest micro-batch against the mean one, where the rows are not known yet.
_FULLEST = 1.25
# Share of the matrix-product rate that a whole training step reaches, measured.
_EFFICIENCY = 0.65


@dataclass(frozen=True)
class ModelShape:
    """What memory and time depend on.

    Args:
        num_parameters: All weights.
        num_trainable: Those that are trained.
        num_matmul: Weights of the linear layers but the output layer, without adapters.
        num_adapter: Weights of the adapters.
        hidden_size: D of the residual stream.
        intermediate_size: Of the feed-forward layer.
        key_value_size: Key heads times head dimension.
        num_layers: Transformer layers.
        vocab_size: Rows of the output layer.
        max_positions: Longest sequence the model knows, or None.
    """

    num_parameters: int
    num_trainable: int
    num_matmul: int
    num_adapter: int
    hidden_size: int
    intermediate_size: int
    key_value_size: int
    num_layers: int
    vocab_size: int
    max_positions: int | None


@dataclass(frozen=True)
class Workload:
    """How much is trained on.

    Args:
        num_tokens: Over all steps.
        num_target_tokens: Over all steps.
        micro_batch_tokens: In the largest micro-batch.
        micro_batch_targets: In the micro-batch with the most targets.
    """

    num_tokens: int
    num_target_tokens: int
    micro_batch_tokens: int
    micro_batch_targets: int


@dataclass(frozen=True)
class Estimate:
    """What a training needs.

    Args:
        peak_memory_bytes: Of one worker: the sum of weights, gradients, optimizer state,
            activations, logits and the process itself.
        machine_memory_bytes: Of all workers that share this machine's memory; 0 on GPUs.
        disk_bytes: For checkpoints and the model.
        training_s: Of all steps; None where it is not known, as on GPUs.
    """

    peak_memory_bytes: int
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    logits_bytes: int
    machine_memory_bytes: int
    disk_bytes: int
    training_s: float | None


def model_shape(base: BaseModel, config: TrainingConfig) -> ModelShape:
    """Return the shape of a base model without loading its weights.

    Raises:
        ModelError: Its configuration describes no causal language model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        settings = AutoConfig.from_pretrained(str(base.path)).get_text_config()
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(settings)
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
    linears = [
        module
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    ]
    total = sum(parameter.numel() for parameter in model.parameters())
    adapter = sum(
        config.lora.rank * (linear.in_features + linear.out_features) for linear in linears
    )
    heads = settings.num_attention_heads
    head_size = getattr(settings, "head_dim", None) or settings.hidden_size // heads
    lora = config.method != "full"
    if lora and config.lora.use_dora:
        adapter += sum(linear.out_features for linear in linears)
    return ModelShape(
        num_parameters=total,
        num_trainable=adapter if lora else total,
        num_matmul=sum(linear.weight.numel() for linear in linears),
        num_adapter=adapter if lora else 0,
        hidden_size=settings.hidden_size,
        intermediate_size=getattr(settings, "intermediate_size", 4 * settings.hidden_size),
        key_value_size=(getattr(settings, "num_key_value_heads", None) or heads) * head_size,
        num_layers=settings.num_hidden_layers,
        vocab_size=settings.vocab_size,
        max_positions=getattr(settings, "max_position_embeddings", None),
    )


def estimate(
    config: TuneloopConfig, base: BaseModel, num_rows: int, num_tokens: int, target_ratio: float
) -> Estimate:
    """Return what a training needs, from totals.

    Args:
        base: The model to train; only its configuration is read.
        num_rows: Rows in the train split, at least 1.
        num_tokens: Of those rows, together.
        target_ratio: Share of the tokens that are targets.

    Raises:
        ModelError: The configuration describes no causal language model.
    """
    schedule = make_schedule(config, num_rows)
    tokens = round(num_tokens * schedule.num_steps / schedule.steps_per_epoch)
    micro = round(micro_batch_size(config) * num_tokens / num_rows * _FULLEST)
    work = Workload(tokens, round(tokens * target_ratio), micro, round(micro * target_ratio))
    return estimate_work(config, model_shape(base, config.training), work)


def refuse_impossible(expected: Estimate) -> None:
    """Raise ResourceError if this machine's memory is clearly too small."""
    import psutil

    available = psutil.virtual_memory().available
    if expected.machine_memory_bytes <= available:
        return
    state = expected.optimizer_bytes + expected.gradients_bytes
    raise ResourceError(
        Problem(
            "the training does not fit into memory",
            where="this machine",
            got=f"about {_gb(expected.machine_memory_bytes)} needed; in a worker: weights "
            f"{_gb(expected.weights_bytes)}, optimizer and gradients {_gb(state)}, activations "
            f"{_gb(expected.activations_bytes + expected.logits_bytes)}",
            allowed=f"{_gb(available)} available",
            remedy="lower resources.micro_batch_size, resources.num_workers or "
            "data.max_seq_len, use training.method lora, or a smaller model",
        )
    )


def workload(config: TuneloopConfig, rows: Rows) -> Workload:
    """Return what a training on these rows amounts to; the micro-batches are those of epoch 1."""
    schedule = make_schedule(config, len(rows))
    lengths, targets = rows.lengths, rows.num_target_tokens
    bins = config.resources.num_workers * grad_accum_steps(config)
    largest = most = 0
    for step in range(min(schedule.steps_per_epoch, schedule.num_steps)):
        for share in split_batch(schedule.batch(step), lengths, bins, micro_batch_size(config)):
            largest = max(largest, int(lengths[share].sum()))
            most = max(most, int(targets[share].sum()))
    passes = schedule.num_steps / schedule.steps_per_epoch
    return Workload(
        round(float(lengths.sum()) * passes), round(float(targets.sum()) * passes), largest, most
    )


def make_schedule(config: TuneloopConfig, num_rows: int) -> Schedule:
    """Return the order of batches that the configuration asks for."""
    training = config.training
    return Schedule(
        num_rows,
        training.global_batch_size,
        training.num_epochs,
        training.max_steps,
        training.seed,
    )


def estimate_work(config: TuneloopConfig, shape: ModelShape, work: Workload) -> Estimate:
    """Return what a training of this shape on this workload needs."""
    resources, lora = config.resources, config.training.method != "full"
    on_gpu = resources.gpus_per_worker > 0
    element = 2 if on_gpu else 4
    stage, workers = resources.zero_stage, resources.num_workers
    # ZeRO shards optimizer state from stage 1 on, gradients from 2, weights from 3.
    state_shards, gradient_shards, weight_shards = (
        workers if stage >= least else 1 for least in (1, 2, 3)
    )
    # AdamW's two moments in float32, and a float32 copy of the weights where DeepSpeed keeps one.
    state = 12 if on_gpu or stage else 8
    per_token = (
        (7 if lora else 9) * shape.hidden_size
        + 4 * shape.intermediate_size
        + 2 * shape.key_value_size
        + (7 * config.training.lora.rank if lora else 0)
    )
    if resources.gradient_checkpointing:
        # What goes into each layer, and one layer that is computed again.
        per_token += shape.num_layers * shape.hidden_size
    else:
        per_token *= shape.num_layers
    weights = (shape.num_parameters + shape.num_adapter) * element
    if config.training.method == "qlora":
        # Four bits for a weight of a linear layer, and about half a bit for its scale.
        weights -= round(shape.num_matmul * (element - 4.5 / 8))
    parts = {
        "weights_bytes": weights // weight_shards,
        "gradients_bytes": shape.num_trainable * element // gradient_shards,
        "optimizer_bytes": shape.num_trainable * state // state_shards,
        "activations_bytes": round(
            work.micro_batch_tokens * per_token * element * _ACTIVATION_OVERHEAD
        ),
        "logits_bytes": work.micro_batch_targets * shape.vocab_size * 4 * _LOGIT_COPIES,
    }
    peak = sum(parts.values()) + _PROCESS_BYTES
    training_s = None
    if not on_gpu:
        rate = matmul_rate(max(1, (os.cpu_count() or 1) // workers))
        operations = _flops(shape, work, 2 if lora else 3, resources.gradient_checkpointing)
        training_s = operations / (workers * rate * _EFFICIENCY)
    shared = resources.ray_address is None and "RAY_ADDRESS" not in os.environ
    return Estimate(
        peak_memory_bytes=peak,
        **parts,
        machine_memory_bytes=0 if on_gpu else peak * (workers if shared else 1),
        # Two checkpoints and the one being written, and the merged model.
        disk_bytes=3 * shape.num_trainable * (element + state) + weights,
        training_s=training_s,
    )


def matmul_rate(num_threads: int, seconds: float = 0.5) -> float:
    """Return the float32 matrix-product rate of this machine's CPU, in operations per second."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        left, right = torch.rand(1024, 576), torch.rand(576, 1536)
        left @ right
        count, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            left @ right
            count += 1
        elapsed = time.perf_counter() - started
    finally:
        torch.set_num_threads(before)
    return float(count * 2 * np.prod([1024, 576, 1536]) / elapsed)


def _flops(shape: ModelShape, work: Workload, passes: int, again: bool) -> float:
    """Operations of all steps: forward, gradients of inputs, gradients of what is trained.

    Args:
        passes: 2 where only adapters are trained, 3 for all weights.
        again: The layers' forward pass is computed twice.
    """
    body = 2 * shape.num_matmul * (passes + again) + 6 * shape.num_adapter
    head = 2 * shape.hidden_size * shape.vocab_size * passes
    return float(work.num_tokens * body + work.num_target_tokens * head)


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
