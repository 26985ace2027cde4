"""What near-deduplication would take on corpora and clusters that are not here.

    python benchmarks/scaling.py [--rows 1000000 4000000 16000000] [--keys-mb-per-cpu-s 80]

Deduplication has a part that grows with the machines (keys, comparison of texts) and a part in one
process (`tuneloop.data.dedup.minhash`). That part is run here on made-up band hashes, of
which a tenth of the rows share 8 of 17 with another row, for numbers of rows far beyond what this
machine has text for: seconds and peak memory for each row. The other part scales by what
`benchmarks/dedup.py` measured. Both together give, for a size and a number of nodes, the time of
each part, and the first limit that is reached.

Each number of rows is run in a process of its own. One JSON line for each, then the table.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

TB = 1_000_000_000_000


@dataclass(frozen=True)
class Costs:
    """What was measured, for documents of the planted corpus a fifth of it in candidates.

    Args:
        keys_mb_per_cpu_s: Reading and all keys.
        compare_mb_per_cpu_s: Comparing, for MB of the whole corpus.
        compared_ratio: Bytes of candidates' texts sent, of all.
        document_bytes: Mean size.
        driver_s: Seconds for each row in one process.
        driver_bytes: Of `dedup`, for each row.
        prepare_bytes: Of all that `tuneloop prepare` holds in one process, for each row.
    """

    keys_mb_per_cpu_s: float
    compare_mb_per_cpu_s: float
    compared_ratio: float
    document_bytes: float
    driver_s: float
    driver_bytes: float
    prepare_bytes: float


@dataclass(frozen=True)
class Cluster:
    """Equal nodes."""

    nodes: int
    cpus: int = 16
    memory_bytes: float = 64e9
    network_bytes_s: float = 1.25e9


def predict(size: float, cluster: Cluster, costs: Costs) -> dict[str, Any]:
    """Return the time of each part for a corpus of some bytes, and what stops it first."""
    rows = size / costs.document_bytes
    cpus = cluster.nodes * cluster.cpus
    driver_bytes, prepare_bytes = rows * costs.driver_bytes, rows * costs.prepare_bytes
    sent = size * costs.compared_ratio
    limits = {
        "memory of the driver (prepare)": prepare_bytes / cluster.memory_bytes,
        "memory of the driver (dedup)": driver_bytes / cluster.memory_bytes,
        "memory of all nodes for the texts": size / (cluster.nodes * cluster.memory_bytes * 0.3),
    }
    first, excess = max(limits.items(), key=lambda item: item[1])
    return {
        "TB": size / TB,
        "nodes": cluster.nodes,
        "keys_h": size / 1e6 / costs.keys_mb_per_cpu_s / cpus / 3600,
        "send_h": sent / (cluster.nodes * cluster.network_bytes_s) / 3600,
        "compare_h": size / 1e6 / costs.compare_mb_per_cpu_s / cpus / 3600,
        "decide_h": rows * costs.driver_s / 3600,
        "dedup_gb": driver_bytes / 1e9,
        "prepare_gb": prepare_bytes / 1e9,
        "limit": f"{first}: {excess:.1f} times what there is" if excess > 1 else "none",
    }


def decide(num_rows: int) -> dict[str, float]:
    """Run the part in one process on made-up keys; return seconds and peak bytes for each row."""
    from tuneloop.config import DedupConfig
    from tuneloop.data.dedup.minhash import CandidateGroup, ResolvedGroup, find_duplicates
    from tuneloop.data.hashing.signatures import band_shape

    def compare(groups: Sequence[CandidateGroup]) -> Iterator[ResolvedGroup]:
        for group in groups:
            own = np.arange(len(group.rows))
            yield ResolvedGroup(own, own, np.ones(len(own)))

    def find_own(rows: Any, crowds: Any) -> Any:
        raise AssertionError("two rows at most share a band")

    config = DedupConfig()
    num_bands = band_shape(config.threshold)[0]
    find_duplicates(keys_of(1000, num_bands), config, compare, find_own)  # compiles
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    keys = keys_of(num_rows, num_bands)
    started = time.process_time()
    find_duplicates(keys, config, compare, find_own)
    seconds = time.process_time() - started
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return {
        "rows": num_rows,
        "us_per_row": seconds / num_rows * 1e6,
        "bytes_per_row": peak / num_rows,
    }


def keys_of(num_rows: int, num_bands: int) -> Any:
    """Return keys of rows of which a tenth share half of their bands with the row before."""
    from tuneloop.data.dedup.minhash import Keys

    chooser = np.random.default_rng(num_rows)
    bands = chooser.integers(1, 2**63, (num_rows, num_bands), dtype=np.uint64)
    repeated = np.arange(1, num_rows, 10)
    bands[repeated, : num_bands // 2] = bands[repeated - 1, : num_bands // 2]
    exact = chooser.integers(-(2**62), 2**62, num_rows)
    preference, size = chooser.permutation(num_rows), np.full(num_rows, 2700)
    return Keys(exact, bands, preference, size)


def main() -> None:
    """Measure the part in one process, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 4_000_000, 16_000_000])
    parser.add_argument("--keys-mb-per-cpu-s", type=float, default=80.0)
    parser.add_argument("--compare-mb-per-cpu-s", type=float, default=230.0)
    parser.add_argument("--compared-ratio", type=float, default=0.2)
    parser.add_argument("--document-bytes", type=float, default=3100.0)
    parser.add_argument("--keys-bytes", type=float, default=330.0, help="table of keys, a row")
    parser.add_argument("--prepare-bytes", type=float, default=1500.0)
    parser.add_argument("--decide", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.decide:
        print(json.dumps(decide(options.decide)))
        return
    for rows in options.rows:
        command = [sys.executable, __file__, "--decide", str(rows)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        measured = json.loads(done.stdout)
        print(json.dumps(measured), flush=True)
    costs = Costs(
        options.keys_mb_per_cpu_s,
        options.compare_mb_per_cpu_s,
        options.compared_ratio,
        options.document_bytes,
        measured["us_per_row"] / 1e6,
        measured["bytes_per_row"] + options.keys_bytes,
        options.prepare_bytes,
    )
    for size in (0.01 * TB, TB, 100 * TB):
        for nodes in (10, 100):
            found = predict(size, Cluster(nodes), costs)
            print({k: round(v, 2) if isinstance(v, float) else v for k, v in found.items()})


if __name__ == "__main__":
    main()
