"""Memory and time of a training, from the model's shape, before anything is loaded."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from tuneloop.cluster import joins_cluster
from tuneloop.config import TrainingConfig, TuneloopConfig, grad_accum_steps, micro_batch_size
from tuneloop.errors import ModelError, Problem, ResourceError
from tuneloop.models.bases.source import BaseModel
from tuneloop.training.batches import Schedule, split_batch
from tuneloop.training.engine import bucket_size, with_adapters
from tuneloop.training.fit.footprint import ATTENTION_SHAPE, kept_bytes
from tuneloop.training.packed import can_share
from tuneloop.training.rows import Rows

if TYPE_CHECKING:
    from tuneloop.training.results import Measured

# A worker's libraries before any weight is loaded, in bytes.
_PROCESS_BYTES = 500_000_000
# What the allocator and the backward pass need beside the tensors that autograd keeps.
_ACTIVATION_OVERHEAD = 1.33
# Freed in the forward pass, for each output of a layer with an adapter, and not used again: glibc
# does not find room for an aligned block in a freed one of the same size.
_ADAPTER_WASTE = 1.1
# Logits, their log-softmax and two gradients, each of shape (targets, vocabulary).
_LOGIT_COPIES = 4
# Tokens of the fullest micro-batch against the mean one, where the rows are not known yet.
_FULLEST = 1.25
# Steps whose micro-batches are made for the estimate.
_LOOKED_AT = 2000
# Of those, micro-batches whose rows are compared with one another.
_COMPARED = 64
# Share of the matrix-product rate that a whole training step reaches, measured.
_EFFICIENCY = 0.7


@dataclass(frozen=True)
class ModelShape:
    """What memory and time depend on.

    Args:
        num_parameters: All weights of the base.
        num_trainable: Those that are trained.
        num_matmul: Weights of the linear layers but the output layer, without adapters.
        num_adapter: Weights of the adapters.
        hidden_size: D of the residual stream.
        query_size: Query heads times head dimension, over all layers.
        num_layers: Transformer layers.
        vocab_size: Rows of the output layer.
        max_positions: Longest sequence the model knows, or None.
        kept_bytes: What the backward pass keeps for each token, without the logits.
        adapted_size: Outputs of all layers that have an adapter.
        can_share: Whether rows of a micro-batch share their prefix.
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


@dataclass(frozen=True)
class Workload:
    """How much is trained on.

    Args:
        num_steps: Optimizer steps.
        num_tokens: Of all rows, over all steps.
        num_computed: Over all steps, with beginnings that rows share counted once.
        num_target_tokens: Over all steps.
        num_pairs: Of tokens that attend to one another, over all steps.
        micro_batch_tokens: Computed in the largest micro-batch.
        micro_batch_targets: In the micro-batch with the most targets.
    """

    num_steps: int
    num_tokens: int
    num_computed: int
    num_target_tokens: int
    num_pairs: int
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
        cost: Of all steps, in the currency of `resources.price_per_hour`; None without it.
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
    cost: float | None


def model_shape(base: BaseModel, config: TrainingConfig, use_gpu: bool = False) -> ModelShape:
    """Return the shape of a base model without loading its weights.

    Raises:
        ModelError: Its configuration describes no causal language model, or it has no layers that
            `lora.target_modules` names.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

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
    if config.method != "full":
        _refuse_other_layers(model, config.lora.target_modules)
    with torch.device("meta"):
        # PEFT keeps adapters in float32, DeepSpeed makes them what the base is.
        model = with_adapters(model, config).to(model.dtype)
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


def _refuse_other_layers(model: Any, targets: str | list[str]) -> None:
    """Raise ModelError for a name that no layer has; PEFT trains the others without a word."""
    import torch

    if targets == "all-linear":
        return
    names = [name for name, _ in model.named_modules()]
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    # As PEFT reads them: one string is a pattern of whole names, a list has names or their ends.
    unknown = (
        [t for t in targets if not any(f".{name}".endswith(f".{t}") for name in names)]
        if isinstance(targets, list)
        else [targets] * (not any(re.fullmatch(targets, name) for name in names))
    )
    if unknown or not targets:
        raise ModelError(
            Problem(
                "the base model has no layer of this name",
                where="training.lora.target_modules",
                got=", ".join(unknown) or "no name",
                allowed=f"all-linear, or a list of {', '.join(sorted(linear))}",
            )
        )


def estimate(
    config: TuneloopConfig,
    shape: ModelShape,
    num_rows: int,
    num_tokens: int,
    target_ratio: float,
    some_rows: Rows,
) -> Estimate:
    """Return what a training needs, from totals.

    Args:
        shape: Of the model to train.
        num_rows: Rows in the train split, at least 1.
        num_tokens: Of those rows, together.
        target_ratio: Share of the tokens that are targets.
        some_rows: That stand for all where their beginnings are compared.
    """
    schedule = make_schedule(config, num_rows)
    passes = schedule.num_steps / schedule.steps_per_epoch
    tokens = round(num_tokens * passes)
    size = micro_batch_size(config, config.resources.worker_counts[0])
    micro = round(size * num_tokens / num_rows * _FULLEST)
    shared = _mean_shared(some_rows, size, schedule.seed) if shape.can_share else 0
    work = Workload(
        schedule.num_steps,
        tokens,
        tokens - round(num_rows * passes * (size - 1) / size * shared),
        round(tokens * target_ratio),
        round(tokens * num_tokens / num_rows / 2),
        micro - (size - 1) * shared,
        round(micro * target_ratio),
    )
    return estimate_work(config, shape, work)


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


def _mean_shared(rows: Rows, size: int, seed: int) -> int:
    """Return how many tokens random micro-batches of so many rows have in common."""
    order = np.random.default_rng(seed).permutation(len(rows))
    count = max(1, len(rows) // size)
    return sum(rows.num_prefix_tokens(order[i::count].tolist()) for i in range(count)) // count


def workload(config: TuneloopConfig, shape: ModelShape, rows: Rows) -> Workload:
    """Return what a training on these rows amounts to.

    The micro-batches are those of epoch 1 on the least number of workers. Of a long epoch only
    the steps with the most tokens and those with the most targets are looked at; what rows share,
    in the largest of their micro-batches and in some others, which stand for all.
    """
    schedule = make_schedule(config, len(rows))
    lengths, targets = rows.lengths, rows.num_target_tokens
    num_workers = config.resources.worker_counts[0]
    size = micro_batch_size(config, num_workers)
    bins = num_workers * grad_accum_steps(config, num_workers)
    fullest = sorted({int(step) for v in (lengths, targets) for step in _highest(schedule.sums(v))})
    shares = [
        share
        for step in fullest
        for share in split_batch(schedule.batch(step), lengths, bins, size)
    ]
    num_tokens = np.array([lengths[share].sum() for share in shares], np.int64)
    most = max((int(targets[share].sum()) for share in shares), default=0)

    def computed(chosen: np.ndarray) -> np.ndarray:
        saved = [
            rows.num_prefix_tokens(shares[index]) * max(0, len(shares[index]) - 1) * shape.can_share
            for index in chosen
        ]
        return num_tokens[chosen] - np.array(saved, np.int64)

    largest = computed(np.argsort(num_tokens)[-_COMPARED:])
    some = np.arange(0, len(shares), max(1, len(shares) // _COMPARED))
    ratio = float(computed(some).sum() / max(1, num_tokens[some].sum()))
    passes = schedule.num_steps / schedule.steps_per_epoch
    pairs = np.square(np.diff(rows.documents), dtype=np.float64).sum() / 2
    return Workload(
        schedule.num_steps,
        round(float(lengths.sum()) * passes),
        round(float(lengths.sum()) * passes * ratio),
        round(float(targets.sum()) * passes),
        round(float(pairs) * passes),
        int(largest.max(initial=0)),
        most,
    )


def _highest(values: np.ndarray) -> np.ndarray:
    """Return where the highest values are, at most so many as are looked at."""
    count = min(len(values), _LOOKED_AT)
    return np.argpartition(values, len(values) - count)[len(values) - count :]


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
    resources = config.resources
    on_gpu = resources.gpus_per_worker > 0
    element = 2 if on_gpu else 4
    # The fewer the workers, the more each holds; the more, the sooner it is done.
    fewest, most = resources.worker_counts[0], resources.worker_counts[-1]
    # ZeRO shards optimizer state from stage 1 on, gradients from 2, weights from 3.
    stage = resources.zero_stage
    state_shards, gradient_shards, weight_shards = (
        fewest if stage >= least else 1 for least in (1, 2, 3)
    )
    # AdamW's two moments in float32, and a float32 copy of the weights where DeepSpeed keeps one.
    state = 12 if on_gpu or stage else 8
    per_token = shape.kept_bytes * _ACTIVATION_OVERHEAD
    if not on_gpu:
        per_token += shape.adapted_size * element * _ADAPTER_WASTE
    if resources.gradient_checkpointing:
        # What goes into each layer, and one layer that is computed again.
        per_token = shape.num_layers * shape.hidden_size * element + per_token / shape.num_layers
    weights = (shape.num_parameters + shape.num_adapter) * element
    if config.training.method == "qlora":
        # Four bits for a weight of a linear layer, and about half a bit for its scale.
        weights -= round(shape.num_matmul * (element - 4.5 / 8))
    # The buffer that gradients are reduced in; on a CPU untouched memory does not count.
    bucket = bucket_size(shape.num_trainable) * element if on_gpu and stage else 0
    parts = {
        "weights_bytes": weights // weight_shards,
        "gradients_bytes": shape.num_trainable * element // gradient_shards + bucket,
        "optimizer_bytes": shape.num_trainable * state // state_shards,
        "activations_bytes": round(work.micro_batch_tokens * per_token),
        "logits_bytes": work.micro_batch_targets * shape.vocab_size * 4 * _LOGIT_COPIES,
    }
    peak = sum(parts.values()) + _PROCESS_BYTES
    training_s = None if on_gpu else _training_s(config, shape, work)
    return Estimate(
        peak_memory_bytes=peak,
        **parts,
        machine_memory_bytes=0 if on_gpu or joins_cluster(resources) else peak * most,
        # Two checkpoints and the one being written, and the merged model.
        disk_bytes=3 * shape.num_trainable * (element + state) + weights,
        training_s=training_s,
        cost=_cost(config, training_s, most),
    )


def measured_estimate(
    config: TuneloopConfig, expected: Estimate, work: Workload, measured: Measured
) -> Estimate:
    """Return an estimate whose memory, time and cost are those that a preflight measured."""
    training_s = work.num_tokens / max(1e-9, measured.tokens_per_s) + measured.export_s
    return replace(
        expected,
        peak_memory_bytes=measured.peak_memory_bytes,
        training_s=training_s,
        cost=_cost(config, training_s, measured.num_workers),
    )


def _cost(config: TuneloopConfig, training_s: float | None, num_workers: int) -> float | None:
    price = config.resources.price_per_hour
    if price is None or training_s is None:
        return None
    return price * num_workers * training_s / 3600


def _training_s(config: TuneloopConfig, shape: ModelShape, work: Workload) -> float:
    workers = config.resources.worker_counts[-1]
    rate = matmul_rate(max(1, (os.cpu_count() or 1) // workers))
    passes = 3 if config.training.method == "full" else 2
    operations = _flops(shape, work, passes, config.resources.gradient_checkpointing)
    return operations / (workers * rate * _EFFICIENCY)


def matmul_rate(num_threads: int, seconds: float = 0.5) -> float:
    """Return the float32 matrix-product rate of this machine's CPU, in operations per second.

    CPU time counts, so that the rate is that of a machine that is left alone.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        left, right = torch.rand(1024, 576), torch.rand(576, 1536)
        left @ right
        count, until, started = 0, time.perf_counter() + seconds, time.process_time()
        while time.perf_counter() < until:
            left @ right
            count += 1
        elapsed = (time.process_time() - started) / num_threads
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
    # Two products forward, five backward, whatever is trained.
    attention = 2 * shape.query_size * (7 + 2 * again)
    return float(
        work.num_computed * body + work.num_target_tokens * head + work.num_pairs * attention
    )


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
