"""Memory, disk and time of a training, from the model's shape, before anything is loaded."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace

import numpy as np
import torch

from tuneloop.config import TuneloopConfig, grad_accum_steps, micro_batch_size
from tuneloop.training.batches import Schedule, split_batch
from tuneloop.training.deepspeed_engine import bucket_size
from tuneloop.training.fit.shape import ModelShape
from tuneloop.training.methods import METHODS
from tuneloop.training.results import DryRunResult
from tuneloop.training.rows import Rows

# A worker's libraries before any weight is loaded, in bytes.
_PROCESS_BYTES = 500_000_000
# What the allocator and the backward pass need beside the tensors that autograd keeps.
_ACTIVATION_OVERHEAD = 1.33
# Freed in the forward pass, for each output of a layer with an adapter, and not reused: glibc does
# not find room for an aligned block in a freed one of the same size.
_ADAPTER_WASTE = 1.1
# Logits, their log-softmax and two gradients, each of shape (targets, vocabulary).
_LOGIT_COPIES = 4
# Tokens of the fullest micro-batch against the mean one, where the rows are not known yet.
_FULLEST = 1.25
# Steps whose micro-batches are made for an estimate.
_ESTIMATED_STEPS = 2000
# Of those, micro-batches whose rows are compared with one another.
_COMPARED = 64
# From the start of the workers to the first step, and from the last step to the published model, in
# seconds; measured on two cores with 135M and 270M parameters.
_START_S = 30.0
# Share of the matrix-product rate that a whole training step reaches, measured.
_EFFICIENCY = 0.7


@dataclass(frozen=True)
class Workload:
    """How much is computed in a training.

    Args:
        num_steps: Optimizer steps.
        num_tokens: Tokens of the rows of all steps.
        num_computed: Those tokens, with a prefix that a micro-batch shares counted once.
        num_target_tokens: Targets of all steps.
        num_pairs: Pairs of tokens that attend to one another in all steps.
        micro_batch_tokens: Tokens computed in the largest micro-batch.
        micro_batch_targets: Targets in the micro-batch with the most.
        validated_ratio: Tokens of all passes over the validation rows, by `num_tokens`.
    """

    num_steps: int
    num_tokens: int
    num_computed: int
    num_target_tokens: int
    num_pairs: int
    micro_batch_tokens: int
    micro_batch_targets: int
    validated_ratio: float = 0.0


@dataclass(frozen=True)
class ResourceEstimate:
    """What a training needs.

    Args:
        peak_memory_bytes: Memory of one worker: the sum of weights, gradients, optimizer state,
            activations, logits and the process itself.
        machine_memory_bytes: Memory of all workers that share this machine's; 0 on GPUs.
        disk_bytes: Disk space for checkpoints and the model.
        training_s: Seconds of all steps and of the passes over the validation rows between them;
            None where it is not known, as on GPUs.
        cost: Cost of those, in the currency of `resources.price_per_hour`; None without it.
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

    @property
    def whole_s(self) -> float | None:
        """Seconds from the start of the workers to the published model; None: not known."""
        return None if self.training_s is None else self.training_s + _START_S


@dataclass(frozen=True)
class RowTotals:
    """What is known of the rows before they are prepared.

    Args:
        num_rows: Rows in the train split, at least 1.
        num_validation_rows: Rows in the validation split, of the same lengths.
        num_tokens: Tokens of those rows, together.
        longest: Tokens of the longest row.
        target_ratio: Share of the tokens that are targets.
        sample: Rows that stand for all where they are compared for a shared prefix.
    """

    num_rows: int
    num_validation_rows: int
    num_tokens: int
    longest: int
    target_ratio: float
    sample: Rows


def workload_of_totals(config: TuneloopConfig, shape: ModelShape, totals: RowTotals) -> Workload:
    """Return what a training on rows with these totals amounts to."""
    schedule = Schedule.of(config.training, totals.num_rows)
    passes = schedule.num_steps / schedule.steps_per_epoch
    tokens = round(totals.num_tokens * passes)
    size = micro_batch_size(config, config.resources.worker_counts[0])
    micro = round(size * totals.num_tokens / totals.num_rows * _FULLEST)
    shared = _mean_shared(totals.sample, size, schedule.seed) if shape.can_share else 0
    return Workload(
        num_steps=schedule.num_steps,
        num_tokens=tokens,
        num_computed=tokens - round(totals.num_rows * passes * (size - 1) / size * shared),
        num_target_tokens=round(tokens * totals.target_ratio),
        num_pairs=round(tokens * totals.num_tokens / totals.num_rows / 2),
        micro_batch_tokens=micro - (size - 1) * shared,
        micro_batch_targets=round(micro * totals.target_ratio),
        validated_ratio=totals.num_validation_rows
        * schedule.num_validations(config.training.eval_every_steps)
        / (totals.num_rows * passes),
    )


def _mean_shared(rows: Rows, size: int, seed: int) -> int:
    """Return the mean length of the prefix that random micro-batches of so many rows share."""
    order = np.random.default_rng(seed).permutation(len(rows))
    count = max(1, len(rows) // size)
    return sum(rows.num_prefix_tokens(order[i::count].tolist()) for i in range(count)) // count


def workload_of_rows(
    config: TuneloopConfig, shape: ModelShape, rows: Rows, validation: Rows | None = None
) -> Workload:
    """Return what a training on these rows amounts to.

    The micro-batches are those of epoch 1 on the least number of workers. In a long epoch only
    the steps with the most tokens and those with the most targets count; shared prefixes are
    looked for in the largest of their micro-batches and in some others, which stand for all.
    """
    schedule = Schedule.of(config.training, len(rows))
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
    validated = 0.0 if validation is None else float(validation.lengths.sum())
    validated *= schedule.num_validations(config.training.eval_every_steps)
    return Workload(
        schedule.num_steps,
        round(float(lengths.sum()) * passes),
        round(float(lengths.sum()) * passes * ratio),
        round(float(targets.sum()) * passes),
        round(float(pairs) * passes),
        int(largest.max(initial=0)),
        most,
        validated / max(1.0, float(lengths.sum()) * passes),
    )


def _highest(values: np.ndarray) -> np.ndarray:
    """Return the indices of the highest values, at most `_ESTIMATED_STEPS` of them."""
    count = min(len(values), _ESTIMATED_STEPS)
    return np.argpartition(values, len(values) - count)[len(values) - count :]


def estimate(config: TuneloopConfig, shape: ModelShape, work: Workload) -> ResourceEstimate:
    """Return what a training of this shape on this workload needs."""
    resources, method = config.resources, METHODS[config.training.method]
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
    weights -= round(shape.num_matmul * (element - method.matmul_weight_bytes(element)))
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
    return ResourceEstimate(
        peak_memory_bytes=peak,
        **parts,
        machine_memory_bytes=0 if on_gpu or resources.cluster_address else peak * most,
        # Two checkpoints and the one being written, and the merged model.
        disk_bytes=3 * shape.num_trainable * (element + state) + weights,
        training_s=training_s,
        cost=_cost(config, training_s, most),
    )


def measured_estimate(
    config: TuneloopConfig, expected: ResourceEstimate, work: Workload, measured: DryRunResult
) -> ResourceEstimate:
    """Return an estimate whose memory, time and cost are those that a dry run measured."""
    # A validation row is a forward pass alone.
    passes = METHODS[config.training.method].num_matmul_passes
    num_tokens = work.num_tokens * (1 + work.validated_ratio / passes)
    training_s = num_tokens / max(1e-9, measured.tokens_per_s) + measured.export_s
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
    passes = METHODS[config.training.method].num_matmul_passes
    operations = _flops(shape, work, passes, config.resources.gradient_checkpointing)
    operations += work.validated_ratio * _flops(shape, work, 1, False)
    return operations / (workers * rate * _EFFICIENCY)


def matmul_rate(num_threads: int) -> float:
    """Return the float32 matrix-product rate of this machine's CPU, in operations per second.

    CPU time counts, so that the rate is that of a machine that is left alone.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        left, right = torch.rand(1024, 576), torch.rand(576, 1536)
        left @ right
        count, until, started = 0, time.perf_counter() + 0.5, time.process_time()
        while time.perf_counter() < until:
            left @ right
            count += 1
        elapsed = (time.process_time() - started) / num_threads
    finally:
        torch.set_num_threads(before)
    return float(count * 2 * np.prod([1024, 576, 1536]) / elapsed)


def _flops(shape: ModelShape, work: Workload, passes: int, checkpointing: bool) -> float:
    """Operations of all steps: forward, gradients of inputs, gradients of what is trained.

    Args:
        passes: 2 where only adapters are trained, 3 for all weights, 1 forward alone.
        checkpointing: The layers' forward pass is computed twice.
    """
    body = 2 * shape.num_active * (passes + checkpointing)
    body += (6 if passes > 1 else 2) * shape.num_adapter
    head = 2 * shape.hidden_size * shape.vocab_size * passes
    # Two products forward, five backward, whatever is trained.
    attention = 2 * shape.query_size * ((7 if passes > 1 else 2) + 2 * checkpointing)
    return float(
        work.num_computed * body + work.num_target_tokens * head + work.num_pairs * attention
    )


def gib(num_bytes: float) -> str:
    """Return a size in GiB, the unit of every figure that is shown."""
    return f"{num_bytes / (1 << 30):.1f} GiB"
