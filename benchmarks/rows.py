"""How the rows of a large data set reach the workers: mapped files against Ray Data's split.

    python benchmarks/rows.py [--rows 400000] [--tokens 300] [--workers 1 2]

Writes a data set of so many rows, then measures, each in a process of its own:

- `list`: all rows as Python lists and then flat arrays in one process;
- `mapped`: the copy into flat files, and an epoch's batches read from them by one worker;
- `shard`: `ray.train.get_dataset_shard`'s own machinery, `Dataset.streaming_split`, for one and two
  workers: time to the first batch, memory, and which rows come when.

One JSON line each.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BATCH = 8


def main() -> None:
    """Write the data set and run each way in its own process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--ways", nargs="+", default=["list", "mapped", "shard"])
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(WAYS[options.only](options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        size = write(Path(folder), options)
        print(json.dumps({"rows": options.rows, "parquet_mb": round(size / 1e6)}), flush=True)
        for way in options.ways:
            command = [sys.executable, __file__, *sys.argv[1:], "--only", way, "--folder", folder]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            print(json.dumps({"way": way, **json.loads(done.stdout.splitlines()[-1])}), flush=True)


def write(folder: Path, options: argparse.Namespace) -> int:
    """Write the rows as preparation does and return the bytes of all files."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "train").mkdir()
    rng = np.random.default_rng(0)
    per_file, size = 50_000, 0
    for start in range(0, options.rows, per_file):
        count = min(per_file, options.rows - start)
        lengths = rng.integers(options.tokens // 2, options.tokens * 3 // 2, count)
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
        # About as hard to compress as text: few tokens are common, most are rare.
        ids = (rng.random(int(lengths.sum())) ** 3 * 49_000).astype(np.int32)
        mask = (np.arange(len(ids)) % 3 == 0).astype(np.int8)
        columns = {
            "row_id": pa.array([f"{start + number:032x}" for number in range(count)]),
            "input_ids": pa.ListArray.from_arrays(offsets, pa.array(ids)),
            "loss_mask": pa.ListArray.from_arrays(offsets, pa.array(mask)),
        }
        file = folder / "train" / f"part-{start:08d}.parquet"
        pq.write_table(pa.table(columns), file, compression="zstd", row_group_size=10_000)
        size += file.stat().st_size
    return size


def read_lists(options: argparse.Namespace) -> dict[str, Any]:
    """Read all rows as Python lists, then flat."""
    import numpy as np
    import pyarrow.parquet as pq

    began = time.perf_counter()
    table = pq.read_table(options.folder / "train")
    ids = table.column("input_ids").to_pylist()
    flat = np.fromiter((token for row in ids for token in row), np.int32)
    return {"start_s": seconds(began), "tokens": len(flat), **memory()}


def read_mapped(options: argparse.Namespace) -> dict[str, Any]:
    """Copy the rows into flat files, then read steps in shuffled order."""
    from tuneloop.training.batches import Schedule
    from tuneloop.training.rows import open_rows, store_rows

    began = time.perf_counter()
    folder = store_rows(options.folder, "train", options.folder / "stored")
    copied = {"copy_s": seconds(began), **{f"copy_{k}": v for k, v in memory().items()}}
    began = time.perf_counter()
    rows = open_rows(folder)
    schedule = Schedule(len(rows), BATCH, 1, None, 0)
    seen = [read_step(rows, schedule, 0)]
    first = seconds(began)
    began = time.perf_counter()
    steps = min(20_000, schedule.num_steps)
    for step in range(1, steps):
        seen.append(read_step(rows, schedule, step))
    per_step = (time.perf_counter() - began) / (steps - 1) * 1e6
    return copied | {"first_batch_s": first, "step_us": round(per_step), **memory()}


def read_step(rows: Any, schedule: Any, step: int) -> int:
    """Touch every token of one step."""
    return sum(int(rows.row(row)[0].sum()) for row in schedule.batch(step).tolist())


def read_shards(options: argparse.Namespace) -> dict[str, Any]:
    """Iterate the splits of a Ray Data pipeline in so many workers."""
    import ray
    import ray.data

    consume = ray.remote(num_cpus=0.25)(consume_shard)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    ray.data.DataContext.get_current().enable_progress_bars = False
    results: dict[str, Any] = {}
    for workers in options.workers:
        for attempt in (1, 2):
            data = ray.data.read_parquet(
                str(options.folder / "train"), columns=["row_id", "input_ids", "loss_mask"]
            ).randomize_block_order(seed=0)
            shards = data.streaming_split(workers, equal=True)
            began = time.time()
            told = ray.get([consume.remote(shard, began) for shard in shards])
            results[f"workers_{workers}_run_{attempt}"] = told
    ray.shutdown()
    return results


def consume_shard(shard: Any, began: float) -> dict[str, Any]:
    """Be a worker: read the whole shard and tell when what came."""
    order = hashlib.sha256()
    first, count, head = 0.0, 0, []
    for batch in shard.iter_batches(
        batch_size=BATCH, batch_format="pyarrow", local_shuffle_buffer_size=1000,
        local_shuffle_seed=0,
    ):  # fmt: skip
        first = first or time.time() - began
        ids = batch.column("row_id").to_pylist()
        head = head or ids
        order.update("".join(ids).encode())
        count += len(ids)
    return {
        "first_batch_s": round(first, 2),
        "epoch_s": round(time.time() - began, 2),
        "rows": count,
        "order": order.hexdigest()[:8],
        "first_row": int(head[0], 16),
        **memory(),
    }


def seconds(began: float) -> float:
    return round(time.perf_counter() - began, 2)


def memory() -> dict[str, float]:
    """Return this process's own memory, its peak with mapped files, in GB."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return {
        "own_gb": round(int(fields["RssAnon"].split()[0]) / 1e6, 2),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
    }


WAYS = {"list": read_lists, "mapped": read_mapped, "shard": read_shards}

if __name__ == "__main__":
    os.environ.setdefault("RAY_worker_niceness", "0")
    main()
