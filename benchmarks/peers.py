"""Other near-deduplication programs on the same corpus, each as its documentation tells.

    PYTHON_WITH_THE_PEER benchmarks/peers.py NAME CORPUS_FOLDER SCRATCH_FOLDER

`benchmarks/dedup.py` makes an environment for each and calls this. All of them: Jaccard
similarity 0.8 over word 5-grams, case ignored, and the same 17 bands of 7 values where bands can be
set. The last line of standard output is one JSON object: `kept` (ids), and `wall_s` and `cpu_s`
from the first byte read to the last decision, with processes that were started, without starting
Python and importing.

A library with no deduplication of its own (gaoya, datasketch) gets the usual loop: a document
stays unless one that stays and comes before it is found to be alike.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from watch import Stopwatch

THRESHOLD, NGRAM, BANDS, ROWS = 0.8, 5, 17, 7
# What pip installs for each, and what is imported before the clock starts.
REQUIREMENTS = {
    "gaoya": (["gaoya==0.2.2", "pyarrow"], ["gaoya"]),
    "rensa": (["rensa==0.5.0", "pyarrow"], ["rensa"]),
    "datasketch": (["datasketch==2.0.0", "pyarrow"], ["datasketch"]),
    "text-dedup": (["text-dedup==0.4.0", "pyarrow"], []),
    "datatrove": (["datatrove[io,processing]==0.10.1", "spacy", "pyarrow"], ["datatrove"]),
    "data-juicer": (
        ["py-data-juicer==1.6.1", "aiohttp"],
        ["datasets", "data_juicer.ops.deduplicator"],
    ),
}
_WORD = re.compile(r"\w+")


def read(corpus: Path) -> tuple[list[int], list[str]]:
    """Return ids and texts of a corpus."""
    from pyarrow import parquet

    table = parquet.read_table(sorted(map(str, corpus.glob("*.parquet"))))
    return table["id"].to_pylist(), table["text"].to_pylist()


def shingles(text: str) -> list[str]:
    """Return the word 5-grams of a text, as libraries without tokens of their own want them."""
    words = _WORD.findall(text.lower())
    return [" ".join(words[i : i + NGRAM]) for i in range(max(1, len(words) - NGRAM + 1))]


def first_ones(ids: list[int], alike: Iterable[Iterable[int]]) -> list[int]:
    """Return the ids that stay.

    Args:
        alike: For each id in turn the ids found for it, its own among them.
    """
    kept: set[int] = set()
    for number, found in zip(ids, alike, strict=True):
        if kept.isdisjoint(found):
            kept.add(number)
    return sorted(kept)


def run_gaoya(corpus: Path, scratch: Path) -> list[int]:
    import gaoya

    ids, texts = read(corpus)
    index = gaoya.minhash.MinHashStringIndex(
        hash_size=32,
        jaccard_threshold=THRESHOLD,
        num_bands=BANDS,
        band_size=ROWS,
        analyzer="word",
        lowercase=True,
        ngram_range=(NGRAM, NGRAM),
    )
    index.par_bulk_insert_docs(ids, texts)
    return first_ones(ids, index.par_bulk_query(texts))


def run_rensa(corpus: Path, scratch: Path) -> list[int]:
    from rensa import RMinHashDeduplicator

    ids, texts = read(corpus)
    index = RMinHashDeduplicator(
        threshold=THRESHOLD, num_perm=BANDS * ROWS, use_lsh=True, num_bands=BANDS
    )
    pairs = ((str(number), shingles(text)) for number, text in zip(ids, texts, strict=True))
    return [number for number, stays in zip(ids, index.add_pairs(pairs), strict=True) if stays]


def run_datasketch(corpus: Path, scratch: Path) -> list[int]:
    from datasketch import MinHash, MinHashLSH

    ids, texts = read(corpus)
    encoded = ([shingle.encode() for shingle in shingles(text)] for text in texts)
    hashes = dict(zip(ids, MinHash.generator(encoded, num_perm=BANDS * ROWS), strict=True))
    index = MinHashLSH(num_perm=BANDS * ROWS, params=(BANDS, ROWS))
    with index.insertion_session() as session:
        for number, one in hashes.items():
            session.insert(number, one)

    def alike() -> Iterator[list[int]]:
        for one in hashes.values():
            yield [o for o in index.query(one) if one.jaccard(hashes[o]) >= THRESHOLD]

    return first_ones(ids, alike())


def run_text_dedup(corpus: Path, scratch: Path) -> list[int]:
    from datasets import load_from_disk

    command = [sys.executable, "-m", "text_dedup.minhash", "--path", "parquet"]
    command += ["--data_files", f"{corpus}/*.parquet", "--split", "train", "--column", "text"]
    command += ["--cache_dir", str(scratch / "cache"), "--output", str(scratch / "out")]
    command += ["--ngram", str(NGRAM), "--threshold", str(THRESHOLD), "--min_length", "1"]
    command += ["--b", str(BANDS), "--r", str(ROWS), "--num_perm", str(BANDS * ROWS)]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return sorted(load_from_disk(str(scratch / "out"))["id"])


def run_datatrove(corpus: Path, scratch: Path) -> list[int]:
    from datatrove.executor.local import LocalPipelineExecutor
    from datatrove.pipeline.dedup import MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import (
        MinhashConfig,
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
    )
    from datatrove.pipeline.readers import ParquetReader
    from datatrove.pipeline.writers.jsonl import JsonlWriter

    config = MinhashConfig(n_grams=NGRAM, num_buckets=BANDS, hashes_per_bucket=ROWS)
    reader = ParquetReader(str(corpus), glob_pattern="*.parquet")
    folders = {name: str(scratch / name) for name in ("signatures", "buckets", "remove", "kept")}
    stages = [
        (2, [reader, MinhashDedupSignature(folders["signatures"], config=config)]),
        (BANDS, [MinhashDedupBuckets(folders["signatures"], folders["buckets"], config=config)]),
        (1, [MinhashDedupCluster(folders["buckets"], folders["remove"], config=config)]),
        (
            2,
            [
                reader,
                MinhashDedupFilter(folders["remove"]),
                JsonlWriter(folders["kept"], compression=None),
            ],
        ),
    ]
    for number, (tasks, steps) in enumerate(stages):
        LocalPipelineExecutor(
            steps, tasks=tasks, workers=2, logging_dir=str(scratch / f"log{number}")
        ).run()
    lines = (line for file in Path(folders["kept"]).rglob("*.jsonl") for line in file.open())
    # Its writer leaves out what is zero or empty, an id too.
    return sorted(int(json.loads(line).get("id", 0)) for line in lines)


def run_data_juicer(corpus: Path, scratch: Path) -> list[int]:
    from data_juicer.core.data import NestedDataset
    from data_juicer.ops.deduplicator import DocumentMinhashDeduplicator
    from datasets import load_dataset

    rows = load_dataset(
        "parquet", data_files=f"{corpus}/*.parquet", split="train", cache_dir=str(scratch)
    )
    step = DocumentMinhashDeduplicator(
        tokenization="space",
        window_size=NGRAM,
        lowercase=True,
        num_permutations=BANDS * ROWS,
        jaccard_threshold=THRESHOLD,
        num_bands=BANDS,
        num_rows_per_band=ROWS,
    )
    hashed = NestedDataset(rows).map(step.compute_hash, num_proc=2)
    kept, _ = step.process(hashed)
    return sorted(kept["id"])


def main() -> None:
    """Run one peer and tell what it kept and what it took."""
    name, corpus, scratch = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    os.chdir(scratch)
    for module in ["pyarrow.parquet", *REQUIREMENTS[name][1]]:
        importlib.import_module(module)
    watch = Stopwatch()
    kept = globals()["run_" + name.replace("-", "_")](corpus, scratch)
    print(json.dumps({**watch.read(), "kept": kept}), flush=True)


if __name__ == "__main__":
    main()
