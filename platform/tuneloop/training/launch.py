"""From a dataset artifact to a model artifact: the step that starts the workers."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuneloop.artifacts import Artifact, Published, Workspace, fingerprint
from tuneloop.cluster import joins_cluster
from tuneloop.config import ResourcesConfig, TuneloopConfig
from tuneloop.errors import UserError
from tuneloop.models.bases.source import BaseModel

if TYPE_CHECKING:
    from tuneloop.training.fit.estimate import Estimate
    from tuneloop.training.results import Measured, TrainingResult
    from tuneloop.training.rows import Rows

logger = logging.getLogger("tuneloop.training")

CODE_VERSION = 3

SAMPLES = "samples.jsonl"


def identity(config: TuneloopConfig, base: BaseModel, dataset: Artifact) -> str:
    """Return the fingerprint of what `train` makes, before it is made."""
    return fingerprint("train", CODE_VERSION, **_parts(config, base, dataset))


def _parts(config: TuneloopConfig, base: BaseModel, dataset: Artifact) -> dict[str, Any]:
    """Return all that changes the result, as the manifest keeps it."""
    return {
        "dataset": dataset.fingerprint,
        "base": base.fingerprint,
        "training": config.training.model_dump(),
        "chat_template": config.model.chat_template,
    }


def train(
    config: TuneloopConfig, workspace: Workspace, base: BaseModel, dataset: Artifact
) -> Published:
    """Return `models/<config.name>`, made or reused. Needs a running Ray.

    An interrupted training goes on from its last checkpoint when it is called again.

    Args:
        config: `training`, `model.chat_template`, `resources` and `name` are used.
        base: The model to train; the dataset was rendered with its tokenizer.
        dataset: A published dataset artifact.

    Raises:
        ModelError: The dataset does not belong to the model, the loss is not finite, or the
            exported model differs from the trained one.
        DataError: The train split cannot be learned from.
        ResourceError: Memory, disk or workers do not suffice.
    """
    made = identity(config, base, dataset)
    existing = workspace.find("models", config.name, made)
    if existing is not None:
        return Published(existing, reused=True)
    # From here on PyTorch is needed; looking an artifact up stays quick without it.
    from tuneloop.training.card import model_card
    from tuneloop.training.fit.estimate import (
        estimate_work,
        measured_estimate,
        model_shape,
        workload,
    )
    from tuneloop.training.fit.refusals import (
        refuse_other_renderer,
        refuse_too_small,
        refuse_unreadable_rows,
        refuse_unsupported,
        refuse_unusable_rows,
        refuse_without_validation,
        together,
    )
    from tuneloop.training.rows import open_rows, store_rows
    from tuneloop.training.workers import Stored, can_go_on, run_preflight, run_workers

    shape = model_shape(base, config.training, config.resources.gpus_per_worker > 0)
    with workspace.draft("models", config.name, made) as draft:
        folders = [
            store_rows(dataset.path, split, draft.scratch.absolute() / "rows")
            for split in ("train", "validation")
        ]
        rows, validation = map(open_rows, folders)
        try:
            together(
                lambda: refuse_other_renderer(config, base, dataset),
                lambda: refuse_unsupported(config),
                lambda: refuse_without_validation(config, validation, dataset),
                lambda: refuse_unusable_rows(rows, shape, dataset),
                lambda: refuse_unreadable_rows(validation, shape, f"{dataset.ref}, validation"),
            )
        except UserError:
            shutil.rmtree(draft.scratch / "rows")
            raise
        work = workload(config, shape, rows)
        expected = estimate_work(config, shape, work)
        refuse_too_small(config, expected, draft.scratch)
        _mention_idle_gpus(config.resources)
        _announce(rows, expected)
        stored = Stored(folders[0], folders[1] if len(validation) else None)
        measured = None
        if wants_preflight(config.resources) and not can_go_on(draft):
            measured = run_preflight(config, base, stored, draft)
            expected = measured_estimate(config, expected, work, measured)
            _announce_measured(expected, measured)
        result = run_workers(config, base, stored, draft)
        _write_log(result, draft.path)
        card = model_card(config, base, dataset, result)
        (draft.path / "README.md").write_text(card, encoding="utf-8")
        artifact = draft.publish(
            config=_parts(config, base, dataset)
            | {"base": base.name, "base_fingerprint": base.fingerprint},
            resources=config.resources.model_dump()
            | {
                "estimate": asdict(expected),
                "measured": None if measured is None else asdict(measured),
            },
            inputs=[dataset.ref, f"{base.name} sha256:{base.fingerprint}"],
            metrics=_metrics(result),
        )
    return Published(artifact, reused=False)


def wants_preflight(resources: ResourcesConfig) -> bool:
    """Return whether the training is tried out in small before it starts."""
    wanted = resources.preflight
    return joins_cluster(resources) if wanted is None else wanted


def _mention_idle_gpus(resources: ResourcesConfig) -> None:
    import ray

    num_gpus = ray.cluster_resources().get("GPU", 0)
    if num_gpus and not resources.gpus_per_worker:
        logger.warning(
            "training on the CPU while Ray has %g GPUs; resources.gpus_per_worker=1 uses them",
            num_gpus,
        )


def _announce(rows: Rows, expected: Estimate) -> None:
    logger.info(
        "training on %s rows, %s tokens; about %.1f GB a worker%s",
        f"{len(rows):,}",
        f"{int(rows.lengths.sum()):,}",
        expected.peak_memory_bytes / 1e9,
        _time_and_cost(expected),
    )


def _announce_measured(expected: Estimate, measured: Measured) -> None:
    logger.info(
        "preflight passed in %.0f s: %.0f tokens/s, %.1f GB a worker, checkpoint %.1f s%s",
        measured.wall_s,
        measured.tokens_per_s,
        measured.peak_memory_bytes / 1e9,
        measured.checkpoint_s,
        _time_and_cost(expected),
    )


def _time_and_cost(expected: Estimate) -> str:
    from tuneloop.training.workers import duration

    time = f", about {duration(expected.training_s)}" if expected.training_s else ""
    return time + (f", cost {expected.cost:.2f}" if expected.cost is not None else "")


def _write_log(result: TrainingResult, path: Path) -> None:
    """Write one row per step, and what the model answered at each measurement."""
    import pyarrow as pa
    import pyarrow.parquet as pq

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
        (path / SAMPLES).write_text(lines, encoding="utf-8")


def _metrics(result: TrainingResult) -> dict[str, Any]:
    from tuneloop.training.validation import best_step

    last = result.log[-1]
    tail = [row["loss"] for row in result.log[-max(1, len(result.log) // 10) :]]
    tokens = sum(row["num_tokens"] for row in result.log)
    best = best_step(result.log)
    seen = {} if best is None else {"best_step": best, **_least(result.log[best - 1])}
    return {
        "num_steps": last["step"],
        "first_loss": round(result.log[0]["loss"], 6),
        "final_loss": round(sum(tail) / len(tail), 6),
        "num_tokens": tokens,
        "train_s": last["elapsed_s"],
        "tokens_per_s": round(tokens / max(1e-9, last["elapsed_s"]), 2),
        "num_parameters": result.num_parameters,
        "num_trainable": result.num_trainable,
        "peak_memory_bytes": max(row["peak_memory_bytes"] for row in result.log),
        "parity_max_abs_logprob_diff": result.parity.max_abs_logprob_diff,
        **seen,
    }


def _least(row: dict[str, Any]) -> dict[str, float]:
    return {name: round(row[name], 6) for name in ("validation_loss", "validation_accuracy")}
