"""How long 10,000 stored answers take to be scored, compared, sliced and reported.

    python benchmarks/scoring.py               # 5,000 rows, two arms, ten metrics
    python benchmarks/scoring.py --clusters    # the same rows in 500 clusters

Rows and answers are made up, of the standard library's docstrings; half of the first arm's answers
and a third of the second's are wrong. The answers come from files: nothing is asked. Prints seconds
by the clock and of CPU, and the peak of memory. The seed is fixed.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import resource
import sysconfig
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tuneloop.artifacts import Artifact, Workspace
from tuneloop.config import TuneloopConfig
from tuneloop.evals.runner import evaluate
from tuneloop.evals.scoring.given import given_arm

NUM_ROWS, NUM_TRAIN, NUM_CLUSTERS = 5_000, 5_000, 500
METRICS = (
    *("token_f1", "rouge_l", "exact_match", "length_ratio", "exact_match_strict", "chrf", "bleu"),
    *("number", "multi_label_f1", "json_f1"),
)


def sentences() -> list[str]:
    """Return sentences of the docstrings of the standard library."""
    found: set[str] = set()
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                doc = ast.get_docstring(node) or ""
                found |= {" ".join(part.split()) for part in doc.split(". ")}
    return sorted(text for text in found if 6 <= len(text.split()) <= 40)


def publish(workspace: Workspace, texts: list[str], chooser: random.Random) -> Artifact:
    """Return a dataset whose questions and answers are made of these sentences."""

    def row(index: int) -> dict:
        asked, first, second = chooser.sample(texts, 3)
        turns = [
            {"role": "user", "content": f"What about this: {asked}? ({index})"},
            {"role": "assistant", "content": f"{first}. {second} {index % 97}."},
        ]
        own = {"topic": f"t{index % 12}", "cluster": f"c{index % NUM_CLUSTERS}"}
        return {"row_id": f"r{index:06d}", "source": "rows.jsonl:1", "messages": turns} | own

    with workspace.draft("datasets", "rows", "f" * 64) as draft:
        for split, rows in (
            ("test", map(row, range(NUM_ROWS))),
            ("train", map(row, range(NUM_ROWS, NUM_ROWS + NUM_TRAIN))),
        ):
            (draft.path / split).mkdir()
            table = pa.Table.from_pylist([one | {"num_tokens": 80} for one in rows])
            pq.write_table(table, draft.path / split / "part-00000.parquet")
        return draft.publish(config={}, resources={}, inputs=[], metrics={})


def main() -> None:
    """Make rows and answers, and evaluate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clusters", action="store_true", help=f"{NUM_CLUSTERS} clusters")
    options = parser.parse_args()
    chooser = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        workspace = Workspace(folder / "workspace")
        texts = sentences()
        dataset = publish(workspace, texts, chooser)
        arms = []
        for arm, wrong in (("first", 0.5), ("second", 0.33)):
            lines = []
            for row in pq.read_table(dataset.path / "test" / "part-00000.parquet").to_pylist():
                text = row["messages"][-1]["content"]
                if chooser.random() < wrong:
                    words = text.split()
                    chooser.shuffle(words)
                    text = " ".join(words[: chooser.randint(3, len(words))])
                    text += f" {chooser.choice(texts)}"
                lines.append(json.dumps({"example_id": row["row_id"], "completion": text}))
            (folder / f"{arm}.jsonl").write_text("\n".join(lines))
            arms.append(given_arm(arm, str(folder / f"{arm}.jsonl")))
        config = TuneloopConfig.model_validate(
            {
                "name": "bench",
                "task": {"type": "generation"},
                "model": {"base": "none"},
                "data": {"sources": [{"path": "rows.jsonl", "format": "messages"}]},
                "evaluation": {
                    "metrics": METRICS,
                    "group_by": "cluster" if options.clusters else None,
                },
            }
        )
        started, cpu = time.perf_counter(), time.process_time()
        artifact = evaluate(config, workspace, dataset, arms, "bench").artifact
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        megabytes = sum(file["bytes"] for file in artifact.manifest["files"]) / 1e6
    print(f"{2 * NUM_ROWS:,} answers, {len(METRICS)} metrics, 10,000 resamples: {seconds:.1f} s,")
    print(f"{cpu:.1f} s of CPU, at most {peak:.2f} GiB; the artifact has {megabytes:.1f} MB")


if __name__ == "__main__":
    main()
