"""The estimates of memory and time before a training, against what a training then takes.

    python benchmarks/estimates.py BASE [BASE ...] [--methods lora full dora]
        [--lengths 128 512 1024] [--tokens 2048] [--steps 3]

Each point runs in a process of its own: rows of one length, a third of each to be learned, one
micro-batch of `--tokens` tokens a step, one worker. The peak is the process's, Ray imported. The
time is the CPU time of a step after the first, for each core: what it takes on a machine left
alone. One JSON line per point, then a table.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora"},
    "full": {"method": "full"},
    "dora": {"method": "lora", "lora": {"use_dora": True}},
}


def main() -> None:
    """Run every point in its own process and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bases", nargs="+")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--lengths", nargs="+", type=int, default=[128, 512, 1024])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--point", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        print(json.dumps(run_point(**json.loads(options.point))))
        return
    points = []
    for base in options.bases:
        for method in options.methods:
            for length in options.lengths:
                point = {"base": base, "method": method, "length": length}
                sizes = {"tokens": options.tokens, "steps": options.steps}
                command = [sys.executable, __file__, base, "--point", json.dumps(point | sizes)]
                # As in the product's workers: threads that wait sleep instead of taking CPU time.
                environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
                done = subprocess.run(
                    command, check=True, stdout=subprocess.PIPE, text=True, env=environment
                )
                points.append(point | json.loads(done.stdout.splitlines()[-1]))
                print(json.dumps(points[-1]), flush=True)
    print(table(points))


def run_point(base: str, method: str, length: int, tokens: int, steps: int) -> dict[str, Any]:
    """Return what was estimated and what was measured, in GB and seconds."""
    import numpy as np
    import ray.train
    import torch
    import torch.distributed as dist

    from tuneloop.config import TuneloopConfig
    from tuneloop.models.bases.source import resolve_base
    from tuneloop.training.deepspeed_engine import Execution
    from tuneloop.training.fit.estimate import estimate, workload_of_rows
    from tuneloop.training.fit.shape import model_shape
    from tuneloop.training.loop import TrainingJob, Worker, start_engine, train_step
    from tuneloop.training.rows import make_rows

    assert ray.train is not None
    batch = max(1, tokens // length)
    config = TuneloopConfig.model_validate(
        {
            "name": "benchmark",
            "task": {"type": "generation"},
            "model": {"base": base},
            "data": {"sources": [{"path": "rows.jsonl", "format": "messages"}]},
            "training": METHODS[method] | {"global_batch_size": batch},
            "resources": {"micro_batch_size": batch},
        }
    )
    model = resolve_base(base)
    rng = np.random.default_rng(0)
    ids = rng.integers(10, 20_000, (batch * steps, length)).tolist()
    mask = [[0] * (length - length // 3) + [1] * (length // 3)] * len(ids)
    rows = make_rows([str(number) for number in range(len(ids))], ids, mask)
    shape = model_shape(model, config.training)
    expected = estimate(config, shape, workload_of_rows(config, shape, rows))
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", DS_ACCELERATOR="cpu")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with tempfile.TemporaryDirectory() as folder:
        places = (Path(folder),) * 3
        job = TrainingJob(model.path, base, "auto", config.training, *places, steps)
        cores = len(os.sched_getaffinity(0))
        execution = Execution(1, batch, 1)
        worker = Worker(0, execution, torch.device("cpu"), cores, lambda *_: None)
        engine = start_engine(job, rows, worker).engine
        engine.train()
        schedule, times = job.schedule(rows), []
        for step in range(steps):
            began = time.perf_counter(), time.process_time()
            train_step(engine, rows, schedule, step, worker)
            times.append((time.perf_counter() - began[0], time.process_time() - began[1]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    parts = ("weights", "gradients", "optimizer", "activations", "logits")
    return {
        "estimated_gb": round(expected.peak_memory_bytes / 1e9, 2),
        "measured_gb": round(peak / 1e9, 2),
        "estimated_s": round((expected.training_s or 0.0) / steps, 2),
        # The least of the steps: what else runs on the machine only adds to it.
        "measured_s": round(min(cpu for _, cpu in times[1:]) / cores, 2),
        "wall_s": round(min(wall for wall, _ in times[1:]), 2),
        "first_step_s": round(times[0][1] / cores, 2),
        **{f"{part}_gb": round(getattr(expected, f"{part}_bytes") / 1e9, 2) for part in parts},
    }


def table(points: list[dict[str, Any]]) -> str:
    """Return the points as a table, with the estimates as shares of what was measured."""
    lines = [
        "| model | method | length | memory, GB | estimated | step, s | estimated |",
        "|---|---|---|---|---|---|---|",
    ]
    for point in points:
        memory = point["estimated_gb"] / point["measured_gb"] - 1
        seconds = point["estimated_s"] / point["measured_s"] - 1
        lines.append(
            f"| {point['base']} | {point['method']} | {point['length']} | {point['measured_gb']} "
            f"| {point['estimated_gb']} ({memory:+.0%}) | {point['measured_s']} "
            f"| {point['estimated_s']} ({seconds:+.0%}) |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
