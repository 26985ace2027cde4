"""Near-deduplication beside other programs, on planted duplicates whose similarities are known.

    python benchmarks/dedup.py                          # 200 MB; slow peers get less
    python benchmarks/dedup.py --only tuneloop --megabytes 20 100 400 --workers 1 2

The corpus is real text of this machine (`planted.py`), at Jaccard similarity 0.8 over word 5-grams.
Peers come from the package index into environments of their own (`peers.py`); corpora and
environments are kept in --cache. One that cannot be installed or fails is listed with the reason.
Each run is a process of its own, one after the other.

MB per CPU-second counts every process that a run starts, and the reading of its Parquet files, but
neither imports nor, for tuneloop, starting Ray and its workers; that is `start_s`.
What tuneloop runs here is what `tuneloop prepare` runs for plain text, less tokenizing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from peers import REQUIREMENTS
from planted import make_corpus, score
from watch import Memory, Stopwatch

OURS = "tuneloop"
# Slower than 2 MB per CPU-second when they were tried: they get a part of the corpus.
SMALLER = {"text-dedup": 0.1, "datatrove": 0.05, "data-juicer": 0.1}
COLUMNS = [
    *("program", "MB", "documents", "workers", "start_s", "wall_s", "cpu_s", "MB/cpu_s"),
    *("private_mb", "shared_mb", "recall", "recall_near", "precision"),
]


def main() -> None:
    """Make corpora, run each program on them, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, nargs="+", default=[200])
    parser.add_argument("--file-megabytes", type=int, default=16)
    parser.add_argument("--workers", type=int, nargs="+", default=[2], help="of tuneloop")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=[OURS, *REQUIREMENTS])
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "tuneloop-bench")
    parser.add_argument("--timeout-s", type=float, default=300)
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(json.dumps(run_tuneloop(Path(options.run[0]), int(options.run[1]))), flush=True)
        return
    programs = options.only or [OURS, *REQUIREMENTS]
    rows = []
    for megabytes in options.megabytes:
        for name in programs:
            for workers in options.workers if name == OURS else [""]:
                for _ in range(options.rounds):
                    size = max(5, round(megabytes * SMALLER.get(name, 1)))
                    row = measured(name, workers, size, options)
                    rows.append(row)
                    print(json.dumps(row), file=sys.stderr, flush=True)
    print_table(rows)


def measured(
    name: str, workers: Any, megabytes: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Run one program on a corpus and return its row of the table."""
    corpus = options.cache / f"planted-{megabytes}-in-{options.file_megabytes}"
    truth = make_corpus(corpus, megabytes, options.file_megabytes)
    row = {"program": name, "MB": round(truth["bytes"] / 1e6), "documents": truth["documents"]}
    try:
        with tempfile.TemporaryDirectory() as scratch:
            if name == OURS:
                command = [sys.executable, __file__, "--run", str(corpus), str(workers)]
            else:
                python = environment(name, options.cache)
                script = Path(__file__).with_name("peers.py")
                command = [str(python), str(script), name, str(corpus), scratch]
            found = finished(command, options.timeout_s)
    except (OSError, subprocess.SubprocessError) as error:
        return {**row, "failed": f"{type(error).__name__}: {error}"[-300:]}
    kept = set(found.pop("kept"))
    rate = row["MB"] / found["cpu_s"]
    return {**row, "workers": workers, **found, "MB/cpu_s": rate, **score(truth, kept)}


def finished(command: list[str], timeout_s: float) -> dict[str, Any]:
    """Return the last line of a command's output, which is JSON, and its peak memory.

    Raises:
        subprocess.SubprocessError: It failed, with the end of its messages, or took too long.
    """
    with tempfile.TemporaryFile("w+") as messages:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=messages, text=True)
        memory = Memory(process)
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.communicate()
            raise
        if process.returncode:
            messages.seek(0)
            last = messages.read().strip().splitlines()[-1:]
            raise subprocess.SubprocessError(f"exit code {process.returncode}: {' '.join(last)}")
    return {**json.loads(output.splitlines()[-1]), **memory.peaks}


def environment(name: str, cache: Path) -> Path:
    """Return the Python of a peer's environment, made at the first call.

    Raises:
        subprocess.SubprocessError: The peer cannot be installed.
    """
    folder = cache / "environments" / name
    python, note = folder / "bin" / "python", folder / "installed"
    wanted = "\n".join(REQUIREMENTS[name][0])
    if not note.exists() or note.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", *REQUIREMENTS[name][0]]
        done = subprocess.run(install, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:]
            raise subprocess.SubprocessError(f"not installed: {' '.join(last)}")
        note.write_text(wanted)
    return python


def run_tuneloop(corpus: Path, workers: int) -> dict[str, Any]:
    """Return the kept ids and what it took, each stage for itself."""
    started = time.monotonic()
    from tuneloop.cluster import connect
    from tuneloop.config import DataConfig, ResourcesConfig, TaskConfig
    from tuneloop.data import ray_rows
    from tuneloop.data.dedup import distributed
    from tuneloop.data.hashing.content import Content

    data = DataConfig.model_validate({"sources": [{"path": str(corpus), "format": "text"}]})
    content = Content.of(TaskConfig(type="language_modeling"))
    with connect(ResourcesConfig(num_cpus=workers)):
        import ray.data

        # Ray starts worker processes when there is work for them.
        ready: set[int] = set()
        while len(ready) < workers:
            blocks = ray.data.range(workers, override_num_blocks=workers)
            ready |= {row["pid"] for row in blocks.map_batches(_import).take_all()}
        _import()
        start_s = time.monotonic() - started
        watch, laps = Stopwatch(), {}
        files = sorted(str(path) for path in corpus.glob("*.parquet"))
        rows = ray.data.from_items(files, override_num_blocks=len(files)).map_batches(
            _read_with_keys, batch_size=1, batch_format="pyarrow", fn_args=(content, data.dedup)
        )
        rows = rows.materialize()
        laps["keys_wall_s"], laps["keys_cpu_s"] = watch.read().values()
        table = ray_rows.collect(rows, distributed.KEY_COLUMNS)
        one_task = np.zeros(table.num_rows, dtype=np.int64)
        duplicates = distributed.find_duplicate_rows(table, rows, content, data.dedup, one_task)
        took = watch.read()
    kept = set(range(table.num_rows)) - set(duplicates.removed.tolist())
    ids = table["key"].to_numpy()[sorted(kept)].tolist()
    return {**took, **laps, "start_s": start_s, "kept": ids}


def _import(batch: Any = None) -> dict[str, Any]:
    """Import what is needed and load compiled code, as peers do before their clocks start."""
    from tuneloop.data.dedup.minhash import GroupTexts, candidate_pairs, resolve_group
    from tuneloop.data.hashing.columns import Texts
    from tuneloop.data.hashing.signatures import band_hashes, normalised_hashes, shingles

    texts = Texts.of(["a", "b"])
    normalised_hashes(texts)
    candidate_pairs(band_hashes(texts, 5, 0.8), np.arange(2))
    group = GroupTexts.plain(shingles(texts, 5))
    resolve_group(np.array([[0, 1]]), group, np.zeros(2, dtype=np.int64), 0.8)
    time.sleep(0.5)  # long enough for every worker to get one
    return {"pid": np.array([os.getpid()])}


def _read_with_keys(paths: Any, content: Any, dedup: Any) -> Any:
    """Return the rows of a file as `prepare` knows them; it reads a file in a task as well."""
    import pyarrow as pa
    from pyarrow import parquet

    from tuneloop.data.hashing.content import dedup_keys

    table = parquet.read_table(paths["item"][0].as_py())
    columns = {"key": table["id"], "text": table["text"]}
    columns["synthetic"] = pa.array([False] * table.num_rows)
    return pa.table(columns | dedup_keys(table, content, dedup))


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print the rows, what failed below them, and where they were measured."""
    shown = [[_cell(row.get(name, "")) for name in COLUMNS] for row in rows if "failed" not in row]
    widths = [max(map(len, column)) for column in zip(COLUMNS, *shown, strict=True)]
    for cells in [COLUMNS, *shown]:
        print("  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)))
    for row in rows:
        if "failed" in row:
            print(f"{row['program']}: {row['failed']}")
    load = Path("/proc/loadavg").read_text().split()[0]
    print(f"{platform.machine()}, Python {platform.python_version()}, load at the end {load}")


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
