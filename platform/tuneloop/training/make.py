"""From a dataset artifact to a model artifact: judged, tried out, trained, and written down."""

from __future__ import annotations

import json
import logging
import math
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from tuneloop.artifacts import Artifact, Draft
from tuneloop.config import ResourcesConfig, TuneloopConfig
from tuneloop.models.bases.source import BaseModel
from tuneloop.text import format_duration
from tuneloop.training.card import model_card
from tuneloop.training.fit.assess import PreparedRows, assess
from tuneloop.training.fit.estimate import ResourceEstimate, gib, measured_estimate
from tuneloop.training.launch import result_parts
from tuneloop.training.progress import PADDED_NOTICE
from tuneloop.training.results import (
    DryRunResult,
    StepRecord,
    TrainingResult,
    last_steps,
    mean_loss,
)
from tuneloop.training.rows import Rows, open_rows, store_rows
from tuneloop.training.validation import best_step
from tuneloop.training.workers import StoredRows, can_resume, dry_run_workers, run_workers

logger = logging.getLogger("tuneloop.training")

_SAMPLES = "samples.jsonl"
# A training that takes longer, or more steps where the time is not known, has a dry run first.
_LONG_S = 600
_MANY_STEPS = 200


def make_model(
    config: TuneloopConfig, base: BaseModel, dataset: Artifact, draft: Draft
) -> Artifact:
    """Return the model artifact, trained and published. Arguments and errors as of `train`.

    Args:
        draft: The artifact's draft; what an earlier attempt left in its scratch is used.
    """
    folders = [
        store_rows(dataset.path, split, draft.scratch.absolute() / "rows")
        for split in ("train", "validation")
    ]
    rows, validation = map(open_rows, folders)
    fit = assess(config, base, PreparedRows(dataset, rows, validation, draft.scratch))
    if fit.prediction is None:
        shutil.rmtree(draft.scratch / "rows")
    prediction = fit.require()
    workload, expected = prediction.workload, prediction.estimate
    _mention_idle_gpus(config.resources)
    _announce(rows, expected, prediction.unknown)
    stored = StoredRows(folders[0], folders[1] if len(validation) else None)
    measured = None
    seconds = None if expected is None else expected.training_s
    if wants_dry_run(config.resources, seconds, workload.num_steps) and not can_resume(draft):
        measured = dry_run_workers(config, base, stored, draft)
        if expected is not None:
            expected = measured_estimate(config, expected, workload, measured)
        _announce_measured(expected, measured)
    result = run_workers(config, base, stored, draft)
    _write_log(result, draft.path)
    card = model_card(config, base, dataset, result)
    (draft.path / "README.md").write_text(card, encoding="utf-8")
    if result.packing_fault:
        logger.warning(PADDED_NOTICE, result.packing_fault)
    return draft.publish(
        config=result_parts(config, base, dataset)
        | {"base": base.name, "base_fingerprint": base.fingerprint},
        resources=config.resources.model_dump()
        | {
            "estimate": None if expected is None else asdict(expected),
            "measured": None if measured is None else asdict(measured),
        },
        inputs=[dataset.ref, f"{base.name} sha256:{base.fingerprint}"],
        metrics=metrics_of(result, config.training.keep == "best"),
    )


def wants_dry_run(
    resources: ResourcesConfig, training_s: float | None = 0.0, num_steps: int = 0
) -> bool:
    """Return whether a dry run comes before the training.

    Args:
        training_s: Seconds that the training is expected to take; None: not known, so that the
            number of steps decides.
    """
    if resources.preflight is not None:
        return resources.preflight
    long = num_steps >= _MANY_STEPS if training_s is None else training_s >= _LONG_S
    return long or resources.cluster_address is not None


def _mention_idle_gpus(resources: ResourcesConfig) -> None:
    num_gpus = ray.cluster_resources().get("GPU", 0)
    if num_gpus and not resources.gpus_per_worker:
        logger.warning(
            "training on the CPU while Ray has %g GPUs; resources.gpus_per_worker=1 uses them",
            num_gpus,
        )


def _announce(rows: Rows, expected: ResourceEstimate | None, unknown: str) -> None:
    if expected is None:
        logger.warning(
            "training on %s rows, %s tokens; memory and time cannot be estimated for this model: "
            "%s",
            f"{len(rows):,}",
            f"{int(rows.lengths.sum()):,}",
            unknown,
        )
        return
    logger.info(
        "training on %s rows, %s tokens; about %s per worker%s",
        f"{len(rows):,}",
        f"{int(rows.lengths.sum()):,}",
        gib(expected.peak_memory_bytes),
        _time_and_cost(expected),
    )


def _announce_measured(expected: ResourceEstimate | None, measured: DryRunResult) -> None:
    logger.info(
        "dry run passed in %.0f s: %.0f tokens/s, %s per worker, checkpoint %.1f s%s",
        measured.wall_s,
        measured.tokens_per_s,
        gib(measured.peak_memory_bytes),
        measured.checkpoint_s,
        "" if expected is None else _time_and_cost(expected),
    )


def _time_and_cost(expected: ResourceEstimate) -> str:
    time = f", about {format_duration(expected.training_s)}" if expected.training_s else ""
    return time + (f", cost {expected.cost:.2f}" if expected.cost is not None else "")


def _write_log(result: TrainingResult, path: Path) -> None:
    """Write one row per step, and what the model answered at each measurement."""
    rows = [{name: v for name, v in row.items() if name != "samples"} for row in result.log]
    table = pa.Table.from_pylist(rows)
    for name in ("validation_loss", "validation_accuracy"):
        # A column without any value would have no type.
        column = table.column(name).cast(pa.float64())
        table = table.set_column(table.column_names.index(name), name, column)
    pq.write_table(table, path / "trainer_log.parquet")
    samples = [
        {"step": row["step"], **sample} for row in result.log for sample in row.get("samples", [])
    ]
    if samples:
        lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
        (path / _SAMPLES).write_text(lines, encoding="utf-8")


def metrics_of(result: TrainingResult, keeps_best: bool) -> dict[str, Any]:
    """Return the numbers of a training that the manifest keeps.

    Args:
        keeps_best: The model has the weights of the lowest validation loss, not the last ones.
    """
    last = result.log[-1]
    tokens = sum(row["num_tokens"] for row in result.log)
    best = best_step(result.log)
    # The loss is that of the weights that became the model: a sweep may choose by it.
    kept = result.log[best - 1] if best is not None and keeps_best else last
    validated = {} if best is None else {"best_step": best, **_validation(kept)}
    return {
        "num_steps": last["step"],
        "first_loss": round(result.log[0]["loss"], 6),
        "final_loss": round(mean_loss(last_steps(result.log)), 6),
        "num_tokens": tokens,
        "train_s": last["elapsed_s"],
        "tokens_per_s": round(tokens / max(1e-9, last["elapsed_s"]), 2),
        "num_parameters": result.num_parameters,
        "num_trainable": result.num_trainable,
        "peak_memory_bytes": max(row["peak_memory_bytes"] for row in result.log),
        "parity_max_abs_logprob_diff": result.parity.max_abs_logprob_diff,
        **validated,
    }


def _validation(record: StepRecord) -> dict[str, float]:
    loss, accuracy = record["validation_loss"], record["validation_accuracy"]
    assert loss is not None
    assert accuracy is not None
    if not math.isfinite(loss):
        return {}
    return {"validation_loss": round(loss, 6), "validation_accuracy": round(accuracy, 6)}
